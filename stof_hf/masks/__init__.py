"""Who may attend to whom: patterns, and their storage as block-sparse rows plus bitmaps."""

from . import patterns
from .pattern import Pattern
from .sparse_mask import SparseMask

__all__ = ["Pattern", "SparseMask", "patterns"]
