"""Records routing from live models, reads what was recorded, and counts it."""

import lazy_loader as _lazy

# Each name is imported when first used: see the stub beside this file.
__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
