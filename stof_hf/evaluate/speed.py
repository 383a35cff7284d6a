"""Time of a forward under each of several patterns, which take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..masks.pattern import Pattern
from .models import use_pattern

__all__ = ["times_ms"]

#: Turns of each pattern, and seconds that one takes at least where calls are short.
_TURNS, _TURN_S = 5, 0.05


def times_ms(
    model: nn.Module,
    patterns: Sequence[Pattern | None],
    ids: torch.Tensor,
    track: Callable[[Sequence[Any]], Iterable[Any]] = lambda turns: turns,
) -> list[float]:
    """Milliseconds of a forward as a user calls it, host time included: medians over turns.

    Args:
        patterns: set on the model in turn, None for its own attention; every other round goes
            backwards, so that what ran before, and how warm the machine is, favours none.
        ids: int64 [B, S].
        track: goes through the turns.
    """
    ids = ids.to(model.device)
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None

    def seconds(calls: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            model(input_ids=ids)
        wait()
        return (time.perf_counter() - begin) / calls

    taken: list[list[float]] = [[] for _ in patterns]
    order = range(len(patterns))
    turns = [i for n in range(_TURNS) for i in (order if n % 2 == 0 else reversed(order))]
    with torch.no_grad():
        for i in track(turns):
            use_pattern(model, patterns[i])
            # The first compiles kernels and plans masks, and finds caches as another left them.
            once = min(seconds(1) for _ in range(1 if taken[i] else 2))
            taken[i].append(seconds(max(1, int(_TURN_S / once))))
    return [statistics.median(times) * 1e3 for times in taken]
