"""Problem in, plan with bound out."""

from .._lazy import attach_stub as _attach_stub

# Each name is imported when first used: see the stub beside this file.
__getattr__, __dir__, __all__ = _attach_stub(__name__, __file__)
