"""Training by a plan: records, solves in the background, applies what is decided, while steps go on."""

from .._lazy import attach_stub as _attach_stub

# The Trainer's callback needs transformers, which plain loops do without: see the stub beside this file.
__getattr__, __dir__, __all__ = _attach_stub(__name__, __file__)
