"""A step of generation: one more token for each sequence, with a static cache.

Every contestant runs without the host, in a CUDA graph. So does what torch.compile makes of a
model, although with a static cache `generate` has it make graphs of its own ("reduce-overhead"):
those of several models in one process failed in torch 2.11. Steps follow each other as in
generation: each writes its key and value, and sees one more than the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from ..runtime.recorder import no_collection, own_workspace
from . import flash
from .attention import FORMAT, describe, known_contestants, save, source_hash
from .contestants import missing_flash_attn
from .records import model_environment
from .timing import turns_ms
from .zoo import in_dtype

__all__ = ["CELLS", "CONTESTANTS", "Cell", "copied_lengths", "run", "table"]

#: Tokens that a cache has room for beyond its context, and after which steps begin again.
_ROOM = 512
#: Logits may be so much farther from fp32 than the plain model's in half precision.
_WORSE = 1.25


@dataclass(frozen=True)
class Cell:
    """A model of MODELS, sequences, and the tokens that each has in its cache.

    Args:
        whole: keep all keys of layers with a window, as a cache that does not know it does.
    """

    model: str
    batch: int
    context: int
    whole: bool = True


_SIZES = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
    "max_position_embeddings": 32768,
}  # fmt: skip
#: Classes without Config and ForCausalLM, and options of configurations.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_1b": ("Llama", {**_SIZES, "vocab_size": 128256}),
    "mistral_1b": ("Mistral", {**_SIZES, "vocab_size": 32000, "sliding_window": 1024}),
}
CELLS = (
    Cell("llama_1b", 1, 4096), Cell("llama_1b", 32, 4096),
    Cell("mistral_1b", 1, 16384), Cell("mistral_1b", 1, 16384, whole=False),
)  # fmt: skip
#: Transformers' implementation, and what is done to the model.
CONTESTANTS = {
    "sdpa": ("sdpa", None),
    "sdpa compiled": ("sdpa", "compiled"),
    "flex compiled": ("flex_attention", "compiled"),
    "flash": (flash.NAME, None),
    "flash compiled": (flash.NAME, "compiled"),
    "stof": ("stof", None),
    "stof compiled": ("stof", "compiled"),
    "stof tuned": ("stof", "tuned"),
}


def run(
    chosen: Iterable[Cell] = CELLS, contestants: Iterable[str] = tuple(CONTESTANTS), *,
    device: torch.device, options: dict[str, Any] | None = None, budget_s: float = 30,
    json_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure, and return the results, which are also saved in `json_path`.

    Args:
        options: of the configurations, in place of the real sizes.
        budget_s: seconds for `stof_hf.tune`.

    Raises StofError for another contestant. On a CPU nothing is captured.
    """
    names = known_contestants(contestants, CONTESTANTS)
    data = {"format": FORMAT, **model_environment(device), "sources": source_hash(), "cells": []}
    with copied_lengths():
        for cell in chosen:
            results = _measure(cell, names, device, options or {}, budget_s)
            data["cells"].append({"cell": asdict(cell), "results": results})
            save(data, json_path)
    return data


@contextmanager
def copied_lengths() -> Iterator[None]:
    """Lets FlexAttention keep a copy of a static cache's length.

    Its mask function reads the length when the kernel runs, which by then counts the new token:
    every query would see one key too many.
    """
    known, name = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "flex_attention"
    own = known[name]

    def with_a_copy(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("q_offset"), torch.Tensor):
            kwargs["q_offset"] = kwargs["q_offset"].clone()
        return own(*args, **kwargs)

    known[name] = with_a_copy
    try:
        yield
    finally:
        known[name] = own


class _Constants(TorchFunctionMode):
    """Tensors of Python's numbers are made once: a CUDA graph captures no copy from the host."""

    def __init__(self):
        super().__init__()
        self.made: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor:
            return func(*args, **kwargs)
        of = repr((args, kwargs))
        if of not in self.made:
            self.made[of] = func(*args, **kwargs)
        return self.made[of]


class _Step:
    """A model with a full cache: a call computes the logits of the next token, [B, vocabulary]."""

    def __init__(self, cell: Cell, model: nn.Module, device: torch.device):
        self.context, self.count = cell.context, 0
        config = model.config
        known = deepcopy(config)
        if cell.whole and getattr(known, "sliding_window", None):
            known.sliding_window, known.layer_types = None, None
        self.cache = transformers.StaticCache(known, max_cache_len=cell.context + _ROOM)
        self.cache.early_initialization(
            cell.batch, config.num_key_value_heads, config.head_dim, model.dtype, device
        )
        noise = torch.Generator(device).manual_seed(0)
        for layer in self.cache.layers:
            for part in (layer.keys, layer.values):
                part.copy_(torch.randn(part.shape, generator=noise, device=device).half())
        # A layer that holds its window alone moves its keys with each step.
        self.windows = [
            (part, part.clone())
            for layer in self.cache.layers if layer.is_sliding
            for part in (layer.keys, layer.values)
        ]  # fmt: skip
        ids = torch.randint(config.vocab_size, (cell.batch, 1), generator=noise, device=device)
        # As `generate` has them: a full window's own count is a number, which graphs would keep.
        self.positions = torch.zeros_like(ids)

        def step() -> Any:
            out = model(
                ids, position_ids=self.positions, past_key_values=self.cache, use_cache=True
            )
            self.positions += 1
            return out

        self.run: Callable[[], Any] = step
        self.reset()

    def reset(self) -> None:
        """Back to the context."""
        self.count = 0
        self.positions.fill_(self.context)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.context
        for part, first in self.windows:
            part.copy_(first)

    def __call__(self) -> torch.Tensor:
        if self.count == _ROOM:
            self.reset()
        self.count += 1
        return self.run()[0][:, -1]

    def capture(self, warm: AbstractContextManager[Any]) -> None:
        """Let a CUDA graph do it from here on.

        Args:
            warm: a context for the calls before the capture, and for that.
        """
        eager, side = self.run, torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with warm:
            with torch.cuda.stream(side):
                for _ in range(3):
                    eager()
            torch.cuda.current_stream().wait_stream(side)
            with no_collection(), own_workspace(), torch.cuda.graph(graph):
                logits = eager()[0]

        def replay() -> tuple[torch.Tensor]:
            graph.replay()
            return (logits,)

        # What the graph reads, the model and the tokens, must live as long as it.
        self.captured = eager, warm
        self.run = replay
        self.reset()


def _prepare(
    name: str, cell: Cell, device: torch.device, options: dict[str, Any], budget_s: float
) -> _Step:
    implementation, how = CONTESTANTS[name]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = _model(cell, implementation, dtype, device, options)
    if how == "tuned":
        import stof_hf

        stof_hf.tune(
            model, batch_size=cell.batch, seq_len=min(cell.context, 4096), phase="decode",
            budget_s=budget_s, progress=False,
        )  # fmt: skip
    if how == "compiled" and device.type == "cuda":
        model.forward = torch.compile(model.forward)
    step = _Step(cell, model, device)
    if device.type == "cuda":
        # A full window makes an index of a number with every step: torch.compile makes it once.
        step.capture(nullcontext() if how == "compiled" else _Constants())
    return step


def _model(
    cell: Cell, implementation: str, dtype: torch.dtype, device: torch.device,
    options: dict[str, Any],
) -> nn.Module:  # fmt: skip
    family, sizes = MODELS[cell.model]
    config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")._from_config(
            config, attn_implementation=implementation
        )
    return in_dtype(model, dtype).eval()


@torch.no_grad()
def _measure(
    cell: Cell, names: list[str], device: torch.device, options: dict[str, Any], budget_s: float
) -> dict[str, Any]:
    def plain(dtype: torch.dtype) -> torch.Tensor:
        return _Step(cell, _model(cell, "sdpa", dtype, device, options), device)().float()

    # What an earlier cell compiled would make this one's shapes dynamic, and counts as compilations
    # of the same code, of which there may be eight.
    torch.compiler.reset()
    exact = plain(torch.float32)
    half = plain(torch.float16) if device.type == "cuda" else exact
    least = float((half - exact).norm() / exact.norm())
    steps: dict[str, _Step] = {}
    results: dict[str, Any] = {name: {} for name in names}
    for name in names:
        if CONTESTANTS[name][0] == flash.NAME and (reason := missing_flash_attn()):
            results[name] = {"status": "unavailable", "error": reason}
            continue
        try:
            step = _prepare(name, cell, device, options, budget_s)
            error = float((step().float() - exact).norm() / exact.norm())
        except Exception as failure:
            results[name] = {"status": "error", "error": describe(failure)}
            continue
        right = error <= _WORSE * least + 1e-5
        results[name] = {"status": "ok" if right else "wrong", "error": error, "plain_error": least}
        steps[name] = step
    for name, taken in turns_ms(steps, device).items():
        results[name]["time_ms"] = round(taken, 4)
    return results


def table(data: dict[str, Any]) -> Table:
    """Milliseconds a step, a row a cell, and how many times as fast as the best peer ours is."""
    shown = Table("model", "B", "context", "cache", *CONTESTANTS, "times the best peer")
    for record in data["cells"]:
        cell, results = Cell(**record["cell"]), record["results"]
        times = {name: one["time_ms"] for name, one in results.items() if "time_ms" in one}
        ours = [times[name] for name in times if name.startswith("stof")]
        peers = [times[name] for name in times if not name.startswith("stof")]
        ratio = f"{min(peers) / min(ours):.2f}" if ours and peers else "-"
        row = [f"{times[name]:.3f}" if name in times else "-" for name in CONTESTANTS]
        whole = "all keys" if cell.whole else "windows"
        shown.add_row(cell.model, str(cell.batch), str(cell.context), whole, *row, ratio)
    return shown
