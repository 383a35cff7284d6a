"""Evaluates a sweep of patterns against dense attention: quality, mask density and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from functools import partial
from importlib import metadata
from typing import Any

from torch import nn

from ..errors import MaskError, StofError, UnsupportedError
from ..hf.combine import require_positions
from ..masks.pattern import And, Not, Or, Pattern
from ..masks.patterns import Causal, Full
from ..masks.sparse_mask import SparseMask
from ..tuning.environment import environment
from .data import Windows
from .metrics import METRICS
from .models import is_causal, use_pattern
from .speed import times_ms

__all__ = ["FORMAT", "evaluate", "label"]

FORMAT = 1


def evaluate(
    model: nn.Module,
    windows: Windows,
    patterns: Sequence[Pattern],
    metric: str,
    *,
    batch: int = 4,
    seed: int = 0,
    track: Callable[[Sequence[Any], str], Iterable[Any]] = lambda items, what: items,
) -> dict[str, Any]:
    """Compare patterns with dense attention on the same windows.

    Dense is the model with attn_implementation="stof" and no pattern: the same kernels, so that
    what differs is the pattern's alone. The model has no pattern afterwards.

    Args:
        model: in evaluation mode, computing attention by "stof".
        metric: "perplexity", "pseudo-perplexity" or "similarity" (`metric_of`).
        batch: sequences a forward.
        seed: of the tokens that are masked.
        track: goes through batches under a heading.

    Returns:
        The contents of a result file: {"format": 1, "model", "metric", "windows", "seq_len",
        "batch", "seed", "dtype", "causal", "environment", "results"}. A result, the first of which
        is dense's, has "label", "pattern" (its JSON, or None), "density" (share of all pairs of
        tokens that the pattern and causality allow; windows that the model's layers have by
        themselves do not count), "valid_share" (of 16 x 16 blocks that hold one), "quality"
        (figures, of which "value" is the metric), "time_ms" (of a forward), "tokens_per_second" and
        "speedup".

    Raises:
        MaskError: a pattern does not fit the windows.
        UnsupportedError: perplexity of a model whose tokens see those behind them; a model that
            computes no attention by "stof".
        StofError: the model's outputs are not finite.

    >>> import torch
    >>> from stof_hf.masks.patterns import SlidingWindow
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 50, "hidden_size": 64, "num_attention_heads": 2}
    >>> config = LlamaConfig(**sizes, intermediate_size=64, num_hidden_layers=1)
    >>> model = LlamaForCausalLM._from_config(config, attn_implementation="stof").eval()
    >>> windows = Windows(torch.randint(50, (2, 32)), first=0, last=32)
    >>> found = evaluate(model, windows, [SlidingWindow(7, 0)], "perplexity")
    >>> [(result["label"], result["density"]) for result in found["results"]]
    [('dense', 0.515625), ('SlidingWindow(7, 0)', 0.22265625)]
    """
    scores_of, compare = METRICS[metric].scores, METRICS[metric].compare
    use_pattern(model, None)
    causal = is_causal(model, windows.ids[:1])
    if metric == "perplexity" and not causal:
        raise UnsupportedError(
            f"tokens of this {type(model).__name__} see those behind them, so that it has no "
            "perplexity: name a causal model (BERT's and its kin have is_decoder=True)"
        )
    seq_len = windows.ids.shape[1]
    masks = [_mask(pattern, causal, seq_len) for pattern in (None, *patterns)]
    results = []
    dense = None
    try:
        for pattern, mask in zip((None, *patterns), masks, strict=True):
            name = "dense" if pattern is None else label(pattern)
            use_pattern(model, pattern)
            scores = scores_of(model, windows, batch, seed, partial(track, what=name))
            if not scores.isfinite().all():
                raise StofError(
                    f"the outputs of {name} are not finite in {model.dtype}: pass --dtype bfloat16 "
                    "or float32"
                )
            dense = scores if dense is None else dense
            written = pattern.to_json() if pattern is not None and pattern.serializable else None
            results.append(
                {
                    "label": name, "pattern": written, "density": mask.density,
                    "valid_share": mask.valid_share, "quality": compare(scores, dense),
                }
            )  # fmt: skip
        sample = windows.ids[:batch]
        times = times_ms(model, (None, *patterns), sample, partial(track, what="speed"))
    finally:
        use_pattern(model, None)
    for result, time in zip(results, times, strict=True):
        result["time_ms"] = time
        result["tokens_per_second"] = sample.numel() / time * 1e3
        result["speedup"] = times[0] / time
    return {
        "format": FORMAT,
        "model": model.name_or_path or type(model).__name__,
        "metric": metric,
        "windows": len(windows.ids),
        "seq_len": seq_len,
        "batch": batch,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "causal": causal,
        "environment": {
            **asdict(environment(model.device)),
            "transformers": metadata.version("transformers"),
        },
        "results": results,
    }


def _mask(pattern: Pattern | None, causal: bool, seq_len: int) -> SparseMask:
    """What the model lets attend, as far as the pattern and causality decide it."""
    own = Causal() if causal else Full()
    if pattern is None:
        return SparseMask.from_pattern(own, seq_len)
    try:
        require_positions(pattern, seq_len)
        return SparseMask.from_pattern(own & pattern, seq_len)
    except MaskError as error:
        raise MaskError(f"{label(pattern)} does not fit {seq_len} tokens: {error}") from error


def label(pattern: Pattern) -> str:
    """A pattern as a short text, in which values that are as by default are left out.

    >>> from stof_hf.masks.patterns import BigBird, Causal, SlidingWindow
    >>> label(Causal() & (SlidingWindow(64, 0) | ~BigBird(32, random_blocks=1)))
    'Causal() & (SlidingWindow(64, 0) | ~BigBird(32, random_blocks=1))'
    """
    if isinstance(pattern, And | Or):
        sign = " & " if isinstance(pattern, And) else " | "
        return sign.join(map(_part, pattern.patterns))
    if isinstance(pattern, Not):
        return f"~{_part(pattern.pattern)}"
    given = []
    for field in fields(pattern):
        value = getattr(pattern, field.name)
        shown = repr(value) if len(repr(value)) <= 20 else "..."
        if field.default is MISSING:
            given.append(shown)
        elif value != field.default:
            given.append(f"{field.name}={shown}")
    return f"{type(pattern).__name__}({', '.join(given)})"


def _part(pattern: Pattern) -> str:
    return f"({label(pattern)})" if isinstance(pattern, And | Or) else label(pattern)
