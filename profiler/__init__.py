"""Records routing from live models, reads what was recorded, and counts it."""

from .._lazy import attach_stub as _attach_stub

# Each name is imported when first used: see the stub beside this file.
__getattr__, __dir__, __all__ = _attach_stub(__name__, __file__)
