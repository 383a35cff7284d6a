"""Functions that run in processes of their own."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import StofError

__all__ = ["alone", "told"]


def alone(
    function: Callable[..., Any], *args: Any, environ: Mapping[str, str], **options: Any
) -> Any:
    """What a function returns in a new process.

    Args:
        environ: variables that are set before anything but this module is imported.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=spawn, initializer=_enter, initargs=(dict(environ),)
    ) as pool:
        return pool.submit(told, function, *args, **options).result()


def told(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a function returns; any error is a StofError with its traceback.

    Some errors, such as torch.compile's, cannot be sent to another process.
    """
    try:
        return function(*args, **options)
    except Exception as error:
        raise StofError("".join(traceback.format_exception(error))) from None


def _enter(environ: dict[str, str]) -> None:
    os.environ.update(environ)
