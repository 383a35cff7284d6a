"""A model's forward on one device, and by tensor parallelism on several.

Mistral with its window, so that all compute under the same mask. Processes are started as torchrun
starts them; each loads its part of one checkpoint, as Transformers' own plan divides it.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.table import Table
from torch import nn
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import StofError
from .attention import FORMAT, describe, known_contestants, save, source_hash
from .generate import MODELS
from .records import model_environment
from .timing import finished_times_ms

__all__ = ["CONTESTANTS", "run", "table"]

CONTESTANTS = ("sdpa", "stof")
_MODEL = "mistral_1b"
_TURNS = 6
#: Logits may be so much farther from fp32 than those of one device with sdpa.
_WORSE = 1.25


def run(
    contestants: Iterable[str] = CONTESTANTS, *, device: torch.device, processes: int = 2,
    batch: int = 1, tokens: int = 4096, options: dict[str, Any] | None = None,
    json_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure, and return the results, which are also saved in `json_path`.

    Args:
        processes: each has a GPU of its own, where `device` is one.
        options: of the configuration, in place of the real sizes.

    Raises StofError for another contestant, where there are fewer GPUs, and with what went wrong
    in one of the processes.
    """
    names = known_contestants(contestants, CONTESTANTS)
    if device.type == "cuda" and (there := torch.cuda.device_count()) < processes:
        raise StofError(f"tensor parallelism on {processes} GPUs: there are {there} here")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, batch, tokens, device, options or {})
        results = _measure(folder, names, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # The processes need the memory.
        results += _apart(folder, names, device, processes)
    data = {
        "format": FORMAT, **model_environment(device), "sources": source_hash(), "model": _MODEL,
        "batch": batch, "tokens": tokens, "results": results,
    }  # fmt: skip
    save(data, json_path)
    return data


@torch.no_grad()
def _prepare(
    folder: Path, batch: int, tokens: int, device: torch.device, options: dict[str, Any]
) -> None:
    """Save a checkpoint, tokens, and what the model computes for them in fp32."""
    half = torch.float16 if device.type == "cuda" else torch.float32
    family, sizes = MODELS[_MODEL]
    config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=half)
    model.save_pretrained(folder)
    del model
    ids = torch.randint(config.vocab_size, (batch, tokens), device=device)
    exact, plain = (
        _load(folder, "sdpa", device_map=device, dtype=dtype)(ids, use_cache=False).logits
        for dtype in (torch.float32, half)
    )
    given = {"ids": ids.cpu(), "exact": exact.cpu(), "plain_error": _distance(plain, exact)}
    torch.save(given, folder / "given.pt")


def _load(folder: Path, implementation: str, **options: Any) -> nn.Module:
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, attn_implementation=implementation, **options).eval()


def _distance(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.float() - exact).norm() / exact.norm())


@torch.no_grad()
def _measure(
    folder: Path, names: list[str], device: torch.device, processes: int = 1
) -> list[dict[str, Any]]:
    """A result for each contestant, of this process or of all that call this."""
    divided = {"distributed_config": DistributedConfig(tp_plan="auto")}
    where = divided if processes > 1 else {"device_map": device}
    models = {name: _load(folder, name, **where) for name in names}
    given = torch.load(folder / "given.pt")
    ids, exact, least = given["ids"].to(device), given["exact"].to(device), given["plain_error"]
    times: dict[str, list[float]] = {name: [] for name in names}
    results: list[dict[str, Any]] = []
    for name, model in models.items():
        with _heads_seen(name) as heads:
            error = _distance(model(ids, use_cache=False).logits, exact)
        found = [(sorted(heads), error)] * processes
        if processes > 1:
            dist.all_gather_object(found, found[0])
        error = max(error for _, error in found)
        share = [model.config.num_attention_heads // processes]
        right = error <= _WORSE * least + 1e-5 and all(heads == share for heads, _ in found)
        results.append({
            "contestant": name, "processes": processes, "heads": [heads for heads, _ in found],
            "status": "ok" if right else "wrong", "error": error, "plain_error": least,
        })  # fmt: skip
    for _ in range(_TURNS):
        for name, model in models.items():
            # With no time to fill, all processes make as many calls, as collectives need.
            times[name] += finished_times_ms(partial(model, ids, use_cache=False), device, 0)
    for result in results:
        result["time_ms"] = round(statistics.median(times[result["contestant"]]), 4)
    return results


@contextlib.contextmanager
def _heads_seen(implementation: str) -> Iterator[set[int]]:
    """Numbers of query heads with which layers call an attention function."""
    attention, seen = ALL_ATTENTION_FUNCTIONS[implementation], set()

    def watched(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.add(query.shape[1])
        return attention(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[implementation] = watched
    try:
        yield seen
    finally:
        del ALL_ATTENTION_FUNCTIONS[implementation]


def _apart(
    folder: Path, names: list[str], device: torch.device, processes: int
) -> list[dict[str, Any]]:
    """What the first of several processes measures."""
    # Transformers takes GPUs where there are any.
    environ = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", "-m", __name__, str(folder), ",".join(names), device.type,
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True)
    if done.returncode:
        told = folder / "error.txt"
        raise StofError(told.read_text() if told.exists() else done.stderr[-2000:])
    return json.loads((folder / "results.json").read_text())


def _main(folder: Path, names: list[str], device: torch.device) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        results = _measure(folder, names, device, processes)
    except Exception as error:
        # What others fail with later is that this one is gone.
        with contextlib.suppress(FileExistsError), (folder / "error.txt").open("x") as file:
            file.write(f"process {rank} of {processes}: {describe(error)}")
        raise
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def table(data: dict[str, Any]) -> Table:
    """Milliseconds a forward, how many times as fast as on one device that is, and errors."""
    shown = Table(
        "contestant", "processes", "heads", "ms", "times one", "relative error", "of plain",
        "status", title=f"{data['model']}, {data['batch']} x {data['tokens']}",
    )  # fmt: skip
    results = data["results"]
    alone = {one["contestant"]: one["time_ms"] for one in results if one["processes"] == 1}
    for one in results:
        heads = ", ".join("/".join(map(str, seen)) for seen in one["heads"])
        ratio = f"{alone[one['contestant']] / one['time_ms']:.2f}"
        errors = (f"{one[key]:.2e}" for key in ("error", "plain_error"))
        shown.add_row(
            one["contestant"], str(one["processes"]), heads, f"{one['time_ms']:.3f}", ratio,
            *errors, one["status"],
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2].split(","), torch.device(sys.argv[3]))
