"""Training and evaluation of networks: :func:`fit`, and what ``fused-resnet train`` and ``evaluate`` are made of."""

from .config import Config
from .errors import TrainingError, UsageError
from .logs import COLUMNS, Row
from .loop import History, fit
from .recipe import Plateau, Recipe, WarmUp

__all__ = ["COLUMNS", "Config", "History", "Plateau", "Recipe", "Row", "TrainingError", "UsageError", "WarmUp", "fit"]
