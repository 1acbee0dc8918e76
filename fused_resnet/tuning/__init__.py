"""How a launch runs: measured choices where there are some, else a model's, the same on every call; no search at the first."""

from .choice import Choice, choose
from .tile import Strip, Tile

__all__ = ["Choice", "Strip", "Tile", "choose"]
