"""Random calls of every kernel against the fp64 oracle, for as long as one likes:

    python tests/fuzz.py --cases 10000 --jobs 12

Each case is drawn from its number alone, so that a failure can be run again: --first N --cases 1.
What the kernels allocate was filled with NaN before. Without a GPU the CPU backend is tested.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import traceback
from collections import Counter
from functools import partial

import torch
from rich.progress import track

from stof_hf import SparseMask, attention, patterns
from stof_hf.attention import cuda, cuda_decode, select, triton
from stof_hf.attention.granules import Layout
from stof_hf.attention.reference import reference_attention
from stof_hf.errors import MaskError

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 3e-5}
LAYOUTS = ((2, False), (1, True), (1, False))


class Case:
    """Case `number`: tensors, mask and options, on the GPU where there is one."""

    def __init__(self, number: int):
        self.rng = rng = random.Random(number)
        torch.manual_seed(number)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        halves = [torch.float16, torch.bfloat16]
        self.dtype = rng.choice([*halves, *halves, torch.float32])
        self.batch, self.kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
        self.heads = self.kv_heads * rng.choice([1, 1, 2, 4, 5])
        self.dim = rng.choice([32, 64, 64, 80, 96, 128, 128, 256])
        self.q_len = rng.choice(
            [rng.randrange(1, 17), rng.randrange(1, 200), rng.randrange(1, 900)]
        )
        self.kv_len = rng.choice([self.q_len, rng.randrange(1, 200), rng.randrange(1, 900)])
        self.mask = self._mask()
        self.q = self._tensor(self.heads, self.q_len)
        self.k, self.v = (self._tensor(self.kv_heads, self.kv_len) for _ in range(2))
        # Scores that are all of a size, or of which a few dominate.
        self.scale = rng.choice([0.05, self.dim**-0.5, 0.3])
        self.softcap = rng.choice([0.0, 0.0, 0.0, 2.0, 30.0])
        self.sinks = self.bias = None
        if rng.random() < 0.25:
            self.sinks = torch.randn(self.heads, device=self.device)
        if rng.random() < 0.25:
            sizes = (self.batch, self.heads, self.q_len, self.kv_len)
            shape = [rng.choice([1, size]) for size in sizes]
            dtype = rng.choice([torch.float32, self.dtype])
            self.bias = torch.randn(shape, device=self.device, dtype=dtype)

    def __str__(self) -> str:
        shape = f"B={self.batch} H={self.heads}/{self.kv_heads} {self.q_len}x{self.kv_len}"
        return f"{shape} D={self.dim} {self.dtype} {self.mask!r}"

    def _tensor(self, heads: int, rows: int) -> torch.Tensor:
        """[B, H, S, D] amid NaN: contiguous, transposed, of a packed projection, or not aligned."""
        dim = self.dim
        head, row, begin = self.rng.choice(
            [
                (rows * dim, dim, 0),
                (dim, heads * dim, 0),
                (dim, 3 * heads * dim, heads * dim),
                (rows * (dim + 8), dim + 8, 8),
                (dim, heads * dim, 1),
            ]
        )
        batch = max(head * heads, row * rows)
        memory = torch.full(
            (self.batch * batch + begin,), torch.nan, dtype=self.dtype, device=self.device
        )
        out = memory.as_strided((self.batch, heads, rows, dim), (batch, head, row, 1), begin)
        return out.copy_(torch.randn(out.shape, device=self.device))

    def _pattern(self) -> patterns.Pattern:
        rng, size = self.rng, max(self.q_len, self.kv_len)
        tiles = torch.rand(rng.choice([1, self.batch]), rng.choice([1, self.heads]), 16, 16) < 0.4
        tiles, per = tiles.to(self.device), rng.choice([1, 5, 16, 64])

        def by_tile(b, h, q, k):
            at = tiles.to(q.device)
            return at[b % len(at), h % at.shape[1], q // per % 16, k // per % 16]

        choices = [
            patterns.Full(),
            patterns.Causal(),
            patterns.SlidingWindow(rng.randrange(300), rng.choice([0, rng.randrange(300)])),
            patterns.Longformer(rng.randrange(1, 200), (0, size // 2)),
            patterns.Dilated(rng.randrange(1, 60), rng.randrange(1, 9)),
            patterns.PrefixLM(rng.randrange(size)),
            patterns.Custom(by_tile, *(n if n > 1 else None for n in tiles.shape[:2])),
        ]
        return rng.choice(choices)

    def _mask(self) -> SparseMask:
        rng, padding = self.rng, None
        pattern = self._pattern()
        if rng.random() < 0.4:
            pattern = rng.choice([lambda a, b: a & b, lambda a, b: a | b])(pattern, self._pattern())
        if rng.random() < 0.4:
            padding = torch.rand(self.batch, self.kv_len, device=self.device) < 0.8
            # Left, right or in the middle.
            begin = rng.randrange(self.kv_len)
            padding[rng.randrange(self.batch), begin : begin + rng.randrange(1, 600)] = False
        offset = max(0, self.kv_len - self.q_len) if rng.random() < 0.5 else 0
        return SparseMask.from_pattern(
            pattern, self.q_len, self.kv_len, q_offset=offset, padding=padding, device=self.device
        )

    def calls(self):
        """(name, function) for every kernel that computes the case."""
        q, k, v, mask, bias, sinks = self.q, self.k, self.v, self.mask, self.bias, self.sinks
        options = {"scale": self.scale, "softcap": self.softcap}
        yield "chosen", lambda: attention(q, k, v, mask, bias=bias, sinks=sinks, **options)
        if self.device == "cpu":
            return
        rng, rest = self.rng, (self.scale, self.softcap)
        wide = None if bias is None else bias[(None,) * (4 - bias.ndim)]
        for family in cuda.families(q, k, v, mask, wide, *rest):
            tiles, paired = rng.choice(LAYOUTS)
            alone = tiles == 2 or paired
            alike = self.heads // self.kv_heads % 2 == 0 and mask.pattern_id.shape[1] == 1
            if not alone and family == "hopper" and not alike:
                continue
            config = select.CudaConfig(
                Layout(tiles, paired, rng.choice([1.0, 5.5]), rng.choice([1.0, 12.0])),
                not alone and alike, rng.choice([1, 8, 264]), rng.choice([1 << 16, 12 << 20]),
            )  # fmt: skip
            call = cuda.BlockCall(family, q, k, v, mask, wide, sinks, *rest, config)
            yield f"{family} {config}", partial(self._run, call, wide)
        call = cuda_decode.prepare(q, k, v, mask, wide, sinks, *rest)
        if call is not None:
            splits = rng.choice([1, 2, 7, 8, 40])
            call = cuda_decode.DecodeCall(q, k, v, mask, wide, sinks, *rest, splits)
            yield f"decode {splits}", partial(self._run, call, wide)
        call = triton.prepare(q, k, v, mask, wide, sinks, *rest, False)
        yield "triton", partial(self._run, call, wide)

    def _run(self, call, bias: torch.Tensor | None) -> torch.Tensor:
        torch.full((1 << 22,), torch.nan, device=self.device)
        out, _ = call(self.q, self.k, self.v, self.mask, bias, self.sinks)
        return out.transpose(1, 2)

    def run(self) -> list[str]:
        """The kernels that computed it; raises AssertionError where one did not rightly."""
        want, _ = reference_attention(
            self.q, self.k, self.v, self.mask.to_dense(),
            scale=self.scale, softcap=self.softcap, bias=self.bias, sinks=self.sinks,
        )  # fmt: skip
        near, ran = TOLERANCE[self.dtype], []
        for name, call in self.calls():
            try:
                torch.testing.assert_close(call().double(), want, atol=near, rtol=near)
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error
            ran.append(name.split()[0])
        return ran


def run(number: int) -> tuple[int, list[str], str]:
    """(number, kernels that ran, what went wrong) of a case; none where a pattern does not fit."""
    case = None
    try:
        case = Case(number)
        return number, case.run(), ""
    except MaskError:
        return number, [], ""
    except Exception as error:
        # The whole course of things where no case came to be.
        return number, [], f"{case}: {error}" if case else traceback.format_exc()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    given = parser.parse_args()
    counted, failed, done, begin = Counter(), [], 0, time.monotonic()
    numbers = range(given.first, given.first + given.cases)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for number, ran, wrong in track(pool.imap_unordered(run, numbers, 8), total=given.cases):
            counted.update(ran)
            done += 1
            if wrong:
                failed.append(number)
                print(f"case {number}: {wrong}", file=sys.stderr)
            if time.monotonic() - begin > given.seconds:
                break
    print(f"{done} cases, {len(failed)} failed {sorted(failed)[:20]}; calls: {dict(counted)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
