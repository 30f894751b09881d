from .rebalancer import Rebalancer as Rebalancer
from .trainer import RebalanceCallback as RebalanceCallback
