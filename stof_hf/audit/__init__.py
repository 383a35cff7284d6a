"""`stof models`: every model type of Transformers, "stof" against the model's own attention."""

from .report import markdown, summary
from .run import audit, model_types

__all__ = ["audit", "markdown", "model_types", "summary"]
