"""Sparse attention on the CPU against F.scaled_dot_product_attention, in one process.

    python benchmarks/cpu_attention.py [--threads 2] [--quick]

Two comparisons: a Longformer mask (32 tokens to each side, 32 global tokens at the start and 32 in
the middle) against SDPA with the same bool mask, and causal attention against SDPA with
is_causal=True. Contestants take turns; a row shows the least and the median wall-clock time of a
call and the largest error of any element against fp64. The table is printed and saved under
benchmarks/results/cpu/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from stof_hf.attention import cpu
from stof_hf.bench.attention import environment, source_hash
from stof_hf.masks.patterns import Causal, Longformer
from stof_hf.masks.sparse_mask import SparseMask

HEADS = 12
# Speed-up of the least times at the headline shape that a change must not fall below.
BARS = {"longformer": 5.0, "causal": 1.0}
HEADLINE = (4096, 64)


def take_turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, called in turn for at least 3 rounds and `seconds` in all."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def max_error(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    scale: float,
) -> float:
    """Largest absolute error of out [1, H, S, D] against a dense softmax in fp64."""
    worst = 0.0
    for head in range(q.shape[1]):
        scores = q[0, head].double() @ k[0, head].double().T * scale
        scores.masked_fill_(~allowed, float("-inf"))
        want = scores.softmax(-1) @ v[0, head].double()
        worst = max(worst, (out[0, head].double() - want).abs().max().item())
    return worst


def cell(name: str, seq_len: int, head_dim: int, dtype: torch.dtype, seconds: float) -> list[dict]:
    """Records of both contestants on one mask, length, head size and dtype."""
    middle = seq_len // 2
    tokens = tuple(itertools.chain(range(32), range(middle, middle + 32)))
    pattern = Causal() if name == "causal" else Longformer(32, tokens)
    mask = SparseMask.from_pattern(pattern, seq_len)
    dense = mask.to_dense()[0, 0]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seq_len, HEADS, head_dim).to(dtype).transpose(1, 2) for _ in range(3))
    scale = head_dim**-0.5

    def ours() -> torch.Tensor:
        return cpu.forward(q, k, v, mask, scale=scale)[0].transpose(1, 2)

    def sdpa() -> torch.Tensor:
        if name == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    calls: dict[str, Callable[[], torch.Tensor]] = {"stof": ours, "sdpa": sdpa}
    errors = {who: max_error(call(), q, k, v, dense, scale) for who, call in calls.items()}
    times = take_turns(calls, seconds)
    return [
        {
            "mask": name,
            "seq_len": seq_len,
            "head_dim": head_dim,
            "dtype": str(dtype).removeprefix("torch."),
            "contestant": who,
            "least_ms": round(min(t), 4),
            "median_ms": round(statistics.median(t), 4),
            "calls": len(t),
            "max_error": errors[who],
        }
        for who, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="the headline shape only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    shapes = [HEADLINE]
    if not args.quick:
        shapes += [(4096, 32), (4096, 128), (512, 64), (128, 64)]
    dtypes = [torch.float32, torch.bfloat16]
    records, missed = [], []
    header = f"{'mask':<11}{'S':>6}{'D':>5} {'dtype':<9}{'stof ms':>9}{'sdpa ms':>9}{'faster':>8}"
    print(header + f"{'error':>10}{'sdpa':>9}")
    for (seq_len, head_dim), name, dtype in itertools.product(shapes, BARS, dtypes):
        ours, sdpa = pair = cell(name, seq_len, head_dim, dtype, 6 if seq_len > 1000 else 0.5)
        records += pair
        ratio = sdpa["least_ms"] / ours["least_ms"]
        print(
            f"{name:<11}{seq_len:>6}{head_dim:>5} {ours['dtype']:<9}{ours['least_ms']:>9.2f}"
            f"{sdpa['least_ms']:>9.2f}{ratio:>7.1f}x{ours['max_error']:>10.1e}"
            f"{sdpa['max_error']:>9.1e}",
            flush=True,
        )
        if (seq_len, head_dim) == HEADLINE and ratio < BARS[name]:
            missed.append(f"{name} {ours['dtype']}: {ratio:.2f}x, wanted {BARS[name]}x")

    device = torch.device("cpu")
    result = {"heads": HEADS, "threads": args.threads, "processor": processor()}
    result |= environment(device) | {"sources": source_hash(), "records": records}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("attention_quick.json" if args.quick else "attention.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"saved {path}")
    if missed:
        raise SystemExit("behind the bar: " + "; ".join(missed))


def processor() -> str:
    """Name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next(
        (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "unknown"
    )


if __name__ == "__main__":
    main()
