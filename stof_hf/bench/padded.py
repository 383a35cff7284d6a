"""A padded batch: BERT-base on sequences whose lengths are spread evenly, padded and unpadded.

Contestants take turns in one process, and every call is timed as a user calls it, as in
`stof bench model`. What is compared with fp32 are the real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..tuning import environment as tuned
from .attention import FORMAT, known_contestants, save
from .model import Contestant, measure
from .records import model_environment
from .zoo import Problem

__all__ = ["CONTESTANTS", "run", "table"]

CONTESTANTS = {
    "sdpa": Contestant("sdpa"),
    "stof": Contestant("stof"),
    "unpadded": Contestant("stof", ours=("unpad",)),
    "tuned": Contestant("stof", ours=("unpad", "tune")),
    # Last, as in `stof bench model`.
    "default_sdpa": Contestant("sdpa", mode="default"),
}


class Padded(Problem):
    """Sequences of `least` to `tokens` tokens, padded on the right."""

    def __init__(
        self, name: str, batch: int, least: int, tokens: int, dtype: torch.dtype, device: Any
    ):
        super().__init__(name, batch, tokens, dtype, device)
        self.lengths = torch.linspace(least, tokens, batch).round().to(torch.int64)
        mask = torch.arange(tokens) < self.lengths[:, None]
        self.inputs["attention_mask"] = mask.to(device, torch.int64)

    def masks(self, form: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
        return {}

    def pattern(self) -> None:
        return None

    def real(self, out: torch.Tensor) -> torch.Tensor:
        return out[self.inputs["attention_mask"].bool()]


def run(
    contestants: Iterable[str] = tuple(CONTESTANTS), *, device: torch.device, batch: int = 16,
    least: int = 64, tokens: int = 2048, budget_s: float = 60, json_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure, and return the results, which are also saved in `json_path`.

    Args:
        least, tokens: the shortest and the longest sequence.
        budget_s: seconds for `stof_hf.tune`.

    Raises StofError for another contestant.
    """
    names = known_contestants(contestants, CONTESTANTS)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    problem = Padded("bert_base", batch, least, tokens, dtype, device)
    chosen = {name: CONTESTANTS[name] for name in names}
    results = measure(problem, chosen, budget_s, math.inf, tuned.environment(device).sources)
    data = {
        "format": FORMAT, **model_environment(device), "model": problem.name, "tokens": tokens,
        "lengths": problem.lengths.tolist(), "results": results,
    }  # fmt: skip
    save(data, json_path)
    return data


def table(data: dict[str, Any]) -> Table:
    """Milliseconds a forward, how many times as fast as sdpa that is, and errors."""
    share = sum(data["lengths"]) / len(data["lengths"]) / data["tokens"]
    shown = Table(
        "contestant", "ms", "times sdpa", "relative error", "of plain", "status",
        title=f"{data['model']}, {len(data['lengths'])} x {data['tokens']}, {share:.0%} real",
    )  # fmt: skip
    sdpa = data["results"].get("sdpa", {}).get("time_ms")
    for name, result in data["results"].items():
        taken = result.get("time_ms")
        if result["status"] == "error":
            shown.add_row(name, "-", "-", "-", "-", result["error"])
            continue
        ratio = f"{sdpa / taken:.2f}" if sdpa else "-"
        errors = (f"{result[key]:.2e}" for key in ("error", "plain_error"))
        shown.add_row(name, f"{taken:.3f}", ratio, *errors, result["status"])
    return shown
