"""`stof eval`: what a pattern costs in quality, and what it gains in speed."""

from .data import Windows, read, windows
from .models import load
from .report import plot, table
from .run import evaluate

__all__ = ["Windows", "evaluate", "load", "plot", "read", "table", "windows"]
