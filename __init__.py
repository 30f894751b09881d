"""Expert placement for mixture-of-experts models: record routing, solve, judge on held-out steps, export.

    import moeplace as mp

    trace = mp.read_trace("examples/data/olmoe_small")
    problem = mp.Problem(trace, mp.Topology.preset("h100-hgx"))
    plan = mp.solve(problem)
    print(plan)

Public are the names in `moeplace.__all__` and in those of its packages (`moeplace.runtime`, `moeplace.solvers`, ...).
Modules further down, and those that begin with an underscore, are private: they may change with any release.
"""

from . import _deprecated, _lazy
from .placement.version import __version__ as __version__

# Loading every package takes longer than most commands run: the stub beside this file says where each name is from, for
# type checkers and for this, and each is imported when first used.
_new_name, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
__getattr__ = _deprecated.renamed(__name__, {"binding_terms": "bottleneck_terms"}, _new_name)
