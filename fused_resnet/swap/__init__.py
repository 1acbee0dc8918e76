"""Swap fused blocks into a model that exists: recognise, replace, explain."""

from .explain import Explanation, explain
from .replace import fuse, unfuse

__all__ = ["Explanation", "explain", "fuse", "unfuse"]
