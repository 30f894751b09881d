from .rebalancer import Rebalancer as Rebalancer
from .trainer import ExpertTrainer as ExpertTrainer
from .trainer import RebalanceCallback as RebalanceCallback
