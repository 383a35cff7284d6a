"""What no fusion can do without: a model's products with weights, as fast as cuBLAS is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .timing import CapturedCall, replay_times_us, wall_time_us

__all__ = ["ceiling_ms", "products"]


def products(model: nn.Module, call: Callable[[], Any]) -> Counter[tuple[int, int, int]]:
    """How often a call multiplies rows [M, K] with a weight [N, K], by (M, N, K).

    Convolutions whose kernels do not overlap are products, too.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    >>> products(model, lambda: model(torch.zeros(2, 3, 8)))
    Counter({(6, 16, 16): 2, (6, 16, 8): 1})
    """
    found: Counter[tuple[int, int, int]] = Counter()

    def note(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        n = module.out_channels if isinstance(module, nn.Conv2d) else out.shape[-1]
        found[out.numel() // n, n, module.weight.numel() // n] += 1

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D))
        or (isinstance(module, nn.Conv2d) and module.stride == module.kernel_size)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def ceiling_ms(
    sizes: Counter[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
) -> float:
    """Milliseconds of products of these sizes, one after the other, without anything else.

    On a GPU each is measured over as many weights as do not fit into its second-level cache, which
    those of a model do not, either.
    """
    total = 0.0
    for (m, n, k), count in sizes.items():
        x = torch.randn(m, k, device=device).to(dtype)
        nbytes, copies = n * k * dtype.itemsize, 1
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            copies = min(count, math.ceil(2 * cache / nbytes))
        weights = [torch.randn(n, k, device=device).to(dtype) * k**-0.5 for _ in range(copies)]

        def call(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
            for weight in weights:
                F.linear(x, weight)

        if device.type == "cuda":
            (taken,) = replay_times_us([CapturedCall(call)])
        else:
            taken = wall_time_us(call)
        total += count * taken / copies
    return total / 1e3
