"""The database: models, topologies, statistics, plans, their evaluations and exports, kept for later.

Importing this package loads SQLAlchemy, which takes a while: import it where a store is opened, not at start-up.
"""

from .records import (
    CountWindow,
    DecisionRecord,
    EvaluationRecord,
    ExportRecord,
    ModelRecord,
    PlanRecord,
    PlanSummary,
    StatisticsRecord,
    StoreDescription,
    TopologyRecord,
)
from .store import Store

__all__ = [
    "CountWindow",
    "DecisionRecord",
    "EvaluationRecord",
    "ExportRecord",
    "ModelRecord",
    "PlanRecord",
    "PlanSummary",
    "StatisticsRecord",
    "Store",
    "StoreDescription",
    "TopologyRecord",
]
