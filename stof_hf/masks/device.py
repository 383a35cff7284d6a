"""Tensors that outlive the call that makes them, on a CUDA device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..errors import MaskError


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, copied there without synchronising.

    Raises MaskError while a CUDA graph is captured: replays would read freed host memory.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    _check_capture()
    return x.pin_memory().to(device, non_blocking=True)


def staging(size: int, device: torch.device) -> torch.Tensor:
    """int32 [size] on the host, which `upload` takes to `device` without a copy in between."""
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.int32, device="cpu")
    _check_capture()
    return torch.empty(size, dtype=torch.int32, device="cpu", pin_memory=True)


def _check_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise MaskError(
            "a mask cannot be built while a CUDA graph is captured: run the same call once before "
            "the capture (a warm-up, which CUDA graphs need anyway), with the mask kept between"
        )


def keep(make: Callable[[], Any], device: torch.device) -> Any:
    """make(), whose tensors are kept for later calls.

    On a side stream it runs in a thread of its own, on the default stream, and is waited for: the
    side stream may be the warm-up of a CUDA graph, from whose memory pool nothing may be kept, and
    later calls on other streams do not wait for it.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return make()
    current = torch.cuda.current_stream(device)
    if current == torch.cuda.default_stream(device):
        return make()
    ready, made, failed = current.record_event(), [], []

    def run() -> None:
        try:
            with torch.cuda.device(device):
                torch.cuda.current_stream().wait_event(ready)
                made.append(make())
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
