"""Training by a plan: records, solves in the background, applies what is decided, while steps go on."""

import lazy_loader as _lazy

# The Trainer's callback needs transformers, which plain loops do without: see the stub beside this file.
__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
