"""The errors and the warning category that stof_hf raises."""

__all__ = ["BuildError", "MaskError", "StofError", "StofWarning", "UnsupportedError"]


class StofError(RuntimeError):
    """Base class of every error that stof_hf raises on purpose."""


class UnsupportedError(StofError):
    """A case that the package does not compute; the message names what to change."""


class MaskError(StofError, ValueError):
    """A mask or pattern that is malformed or does not fit the tensors it is used with."""


class BuildError(StofError):
    """A kernel could not be compiled or loaded."""


class StofWarning(UserWarning):
    """Something works, but not as asked: a documented fallback was taken."""
