"""How a tile is chosen: an analytical rule, the same on every call, no search at the first one."""

from .tile import Tile, choose_tile

__all__ = ["Tile", "choose_tile"]
