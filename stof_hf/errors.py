"""The errors and the warning category that stof_hf raises."""

import warnings

__all__ = ["BuildError", "MaskError", "StofError", "StofWarning", "UnsupportedError", "warn_once"]


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


_said: set[str] = set()


def warn_once(message: str, stacklevel: int) -> None:
    """A StofWarning, unless this process had it before; `stacklevel` as in `warnings.warn`."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, StofWarning, stacklevel=stacklevel + 1)
