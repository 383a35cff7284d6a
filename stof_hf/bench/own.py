"""Longformer, LED, BigBird, BigBird-Pegasus and LongT5: a forward by their own code, and by ours.

Real sizes, random weights. Every call is timed as a user calls it, host time included, and the two
take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import nn

from ..errors import StofError
from .attention import save, source_hash
from .records import model_environment
from .timing import finished_times_ms

__all__ = ["BATCH", "MODELS", "TOKENS", "run", "table"]

BATCH, TOKENS = (1, 8), (4096,)
_LONGT5 = {
    "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "num_decoder_layers": 1,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
#: Class names without Config and Model, and the options of a configuration for so many tokens.
MODELS: dict[str, tuple[str, Any]] = {
    "longformer": ("Longformer", lambda n: {"max_position_embeddings": n + 2}),
    "big_bird": ("BigBird", lambda n: {"max_position_embeddings": n}),
    "led": ("LED", lambda n: {"max_encoder_position_embeddings": n, "attention_window": 1024}),
    "bigbird_pegasus": ("BigBirdPegasus", lambda n: {"max_position_embeddings": n}),
    "longt5": ("LongT5", lambda n: {**_LONGT5, "encoder_attention_type": "transient-global"}),
    "longt5_local": ("LongT5", lambda n: {**_LONGT5, "encoder_attention_type": "local"}),
}
_ENCODERS = ("led", "bigbird_pegasus", "longt5", "longt5_local")
_TURNS, _TURN_MS = 6, 100
#: Our output may be so much farther from fp32 than the own code's in the same dtype.
_WORSE = 1.25


def run(
    models: Iterable[str] = ("longformer", "big_bird"), batch: Iterable[int] = BATCH,
    tokens: Iterable[int] = TOKENS, *, device: torch.device, dtype: torch.dtype | None = None,
    options: dict[str, Any] | None = None, json_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure, and return the results, which are also saved in `json_path`.

    Args:
        models: of MODELS; of LED, BigBird-Pegasus and LongT5 the encoder.
        dtype: float16 on a GPU by default, else float32.
        options: of the configurations, in place of the real sizes.

    Raises StofError for another model.
    """
    names = list(models)
    if unknown := set(names) - set(MODELS):
        raise StofError(f"no model is called {min(unknown)!r}; there are {', '.join(MODELS)}")
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    data = {"format": 1, **model_environment(device), "sources": source_hash(), "cells": []}
    for name in names:
        for n in tokens:
            for b in batch:
                cell = {"model": name, "batch": b, "tokens": n, "dtype": str(dtype)[6:]}
                results = _measure(name, b, n, device, dtype, options or {})
                data["cells"].append({"cell": cell, "results": results})
                save(data, json_path)
    return data


def _model(name: str, tokens: int, implementation: str, options: dict[str, Any]) -> nn.Module:
    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**sizes(tokens), **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")._from_config(
        config, attn_implementation=implementation
    )
    return (model.encoder if name in _ENCODERS else model).eval()


def _inputs(name: str, model: nn.Module, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens), generator=noise)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ("longformer", "led"):
        # What a classifier and a summariser are called with.
        given["global_attention_mask"] = torch.zeros_like(ids)
        given["global_attention_mask"][:, 0] = 1
    return given


@torch.inference_mode()
def _measure(
    name: str, batch: int, tokens: int, device: torch.device, dtype: torch.dtype,
    options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    own = _model(name, tokens, "eager", options).to(device)
    given = {k: x.to(device) for k, x in _inputs(name, own, batch, tokens).items()}
    exact = own(**given)[0].double()
    own = own.to(dtype)
    ours = _model(name, tokens, "stof", options)
    ours.load_state_dict(own.state_dict())
    models = {"own": own, "stof": ours.to(device, dtype)}
    results: dict[str, Any] = {}
    for key, model in models.items():
        error = model(**given)[0].double() - exact
        results[key] = {"rms_error": float(error.square().mean().sqrt()), "times_ms": []}
    least = float(exact.square().mean().sqrt()) * 1e-6
    if results["stof"]["rms_error"] > _WORSE * results["own"]["rms_error"] + least:
        return {**results, "status": "wrong"}
    for _ in range(_TURNS):
        for key, model in models.items():
            call = partial(model, **given)
            results[key]["times_ms"] += finished_times_ms(call, device, _TURN_MS)
    for entry in results.values():
        entry["time_ms"] = statistics.median(entry.pop("times_ms"))
    return {**results, "status": "ok"}


def table(data: dict[str, Any]) -> Table:
    """The results of `run`."""
    out = Table("model", "batch", "tokens", "own code, ms", "stof, ms", "speed-up")
    for entry in data["cells"]:
        cell, found = entry["cell"], entry["results"]
        columns = [cell["model"], str(cell["batch"]), str(cell["tokens"])]
        if found["status"] != "ok":
            out.add_row(*columns, "", "", found["status"])
            continue
        own, ours = found["own"]["time_ms"], found["stof"]["time_ms"]
        out.add_row(*columns, f"{own:.2f}", f"{ours:.2f}", f"{own / ours:.2f}")
    return out
