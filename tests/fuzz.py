"""Random calls of every kernel against the fp64 oracle, for as long as one likes:

    python tests/fuzz.py --cases 10000 --jobs 15

Each case is drawn from its number alone, so that a failure can be run again: --first N --cases 1.
What the kernels allocate was filled with NaN before. Without a GPU the CPU backend is tested.

Triton takes seconds to compile a kernel, so that what it compiles for is drawn by kinds of cases:
those of one kind run one after the other in one process. Its kernels compute the cases that they
are chosen for, and one in 16 of the others; CUDA kernels all that they can.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections import Counter
from functools import partial

import torch
from rich.progress import track
from triton import knobs

from stof_hf import SparseMask, attention, patterns
from stof_hf.attention import cuda, cuda_band, cuda_decode, select, triton
from stof_hf.attention.granules import Layout
from stof_hf.attention.reference import reference_attention
from stof_hf.errors import MaskError

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 3e-5}
LAYOUTS = ((2, False), (1, True), (1, False))
KINDS = 100
#: With it every pair of features occurs in some kind.
SEED = 254


class Kind:
    """What Triton compiles for, shared by the cases whose numbers are `number` modulo KINDS."""

    def __init__(self, number: int):
        rng = random.Random(f"kind {SEED} {number % KINDS}")
        halves = [torch.float16, torch.bfloat16]
        # What the hopper kernels compute. The others take every feature.
        plain = rng.random() < 0.3
        self.dtype = rng.choice(halves if plain else [*halves, *halves, torch.float32])
        self.dim = rng.choice([64, 128] if plain else [32, 64, 80, 96, 128, 256])
        self.group = rng.choice([1, 1, 2, 4, 5])
        #: Most queries, and what the number of keys is a multiple of.
        self.most = rng.choice([1, 16]) if rng.random() < 0.3 else rng.choice([200, 900])
        self.unit = rng.choice([1, 1, 16, 64])
        self.padded, self.sinks = rng.random() < 0.4, rng.random() < 0.3
        self.several = rng.random() < 0.4
        self.with_lse = rng.random() < 0.25
        self.softcap = not plain and rng.random() < 0.4
        self.bias = None if plain else rng.choice([None, None, torch.float32, self.dtype])
        self.bias_by_key = rng.random() < 0.7
        # Of query, key, value: memory whose rows are aligned, are not by Triton's reckoning, or
        # begin anywhere.
        memory = ["aligned"] if plain or rng.random() < 0.4 else ["aligned", "wide", "odd"]
        self.memory = [rng.choice(memory) for _ in range(3)]
        self.most_keys = rng.choice([200, 900])


class Case:
    """Case `number`: tensors, mask and options, on the GPU where there is one."""

    def __init__(self, number: int):
        self.rng = rng = random.Random(number)
        self.kind = kind = Kind(number)
        torch.manual_seed(number)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype, self.dim = kind.dtype, kind.dim
        self.batch, self.kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
        self.heads = self.kv_heads * kind.group
        self.q_len = rng.randrange(1, 1 + kind.most)
        if kind.most > 16 and rng.random() < 0.25:
            self.q_len = -(-self.q_len // 64) * 64
        self.kv_len = rng.randrange(1, 1 + kind.most_keys)
        if rng.random() < 1 / 3:
            self.kv_len = self.q_len
        self.kv_len = -(-self.kv_len // kind.unit) * kind.unit
        self.mask = self._mask()
        query, key, value = kind.memory
        self.q = self._tensor(self.heads, self.q_len, query)
        self.k = self._tensor(self.kv_heads, self.kv_len, key)
        self.v = self._tensor(self.kv_heads, self.kv_len, value)
        # Scores that are all of a size, or of which a few dominate.
        self.scale = rng.choice([0.05, self.dim**-0.5, 0.3])
        self.softcap = rng.choice([2.0, 30.0]) if kind.softcap else 0.0
        self.sinks = self.bias = None
        if kind.sinks:
            self.sinks = torch.randn(self.heads, device=self.device)
        if kind.bias is not None:
            shape = [rng.choice([1, n]) for n in (self.batch, self.heads, self.q_len)]
            shape.append(self.kv_len if kind.bias_by_key else 1)
            self.bias = torch.randn(shape, device=self.device, dtype=kind.bias)

    def __str__(self) -> str:
        shape = f"B={self.batch} H={self.heads}/{self.kv_heads} {self.q_len}x{self.kv_len}"
        return f"{shape} D={self.dim} {self.dtype} {self.mask!r}"

    def _tensor(self, heads: int, rows: int, memory: str) -> torch.Tensor:
        """[B, H, S, D] amid NaN: contiguous, transposed, of a packed projection, or not aligned."""
        dim = self.dim
        if memory == "wide":
            head, row, begin = (rows + rows % 2) * (dim + 8), dim + 8, 8
        elif memory == "odd":
            head, row, begin = dim, heads * dim, 1
        else:
            head, row, begin = self.rng.choice(
                [
                    (rows * dim, dim, 0),
                    (dim, heads * dim, 0),
                    (dim, 3 * heads * dim, heads * dim),
                ]
            )
        batch = max(head * heads, row * rows)
        room = torch.full(
            (self.batch * batch + begin,), torch.nan, dtype=self.dtype, device=self.device
        )
        out = room.as_strided((self.batch, heads, rows, dim), (batch, head, row, 1), begin)
        return out.copy_(torch.randn(out.shape, device=self.device))

    def _pattern(self) -> patterns.Pattern:
        rng, size = self.rng, max(self.q_len, self.kv_len)
        copies = [rng.choice([1, n]) if self.kind.several else 1 for n in (self.batch, self.heads)]
        tiles = torch.rand(*copies, 16, 16) < 0.4
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
        if self.kind.padded:
            padding = torch.rand(self.batch, self.kv_len, device=self.device) < 0.8
            # Left, right or in the middle.
            begin = rng.randrange(self.kv_len)
            padding[rng.randrange(self.batch), begin : begin + rng.randrange(1, 600)] = False
        offset = max(0, self.kv_len - self.q_len) if rng.random() < 0.5 else 0
        return SparseMask.from_pattern(
            pattern, self.q_len, self.kv_len, q_offset=offset, padding=padding, device=self.device
        )

    def calls(self):
        """(name, function of no arguments) for every kernel that computes the case: what it returns
        is out [B, H, Sq, D] and lse [B, H, Sq], or None."""
        q, k, v, mask, bias, sinks = self.q, self.k, self.v, self.mask, self.bias, self.sinks
        options = {"scale": self.scale, "softcap": self.softcap, "bias": bias, "sinks": sinks}
        if self.kind.with_lse:
            yield "chosen", partial(self._run, partial(select.forward, **options))
        else:
            yield "chosen", lambda: (self._poisoned(attention, q, k, v, mask, **options), None)
        if self.device == "cpu":
            return
        rng, rest = self.rng, (self.scale, self.softcap)
        wide = None if bias is None else bias[(None,) * (4 - bias.ndim)]
        for family in cuda.families(q, k, v, mask, wide, *rest):
            for _ in range(2):
                config = self._config(family)
                call = cuda.BlockCall(family, q, k, v, mask, wide, sinks, *rest, config)
                yield f"{family} {config}", partial(self._run, call, wide, sinks)
        if cuda_band.computes(q, k, v, mask, wide, *rest):
            for form in select.band_forms(q, k):
                call = cuda_band.BandCall(q, k, v, mask, sinks, self.scale, form=form)
                call.problem.grid = rng.choice([form.heads, 9, 132])
                call.problem.together = rng.randrange(1, self.batch * self.heads + 1)
                yield f"band {form}", partial(self._run, call, wide, sinks)
        if cuda_decode.prepare(q, k, v, mask, wide, sinks, *rest) is not None:
            for splits in rng.sample([1, 2, 7, 8, 40], 2):
                call = cuda_decode.DecodeCall(q, k, v, mask, wide, sinks, *rest, splits)
                yield f"decode {splits}", partial(self._run, call, wide, sinks)
        if rng.random() < 1 / 16 and not self.triton_is_chosen():
            call = triton.prepare(q, k, v, mask, wide, sinks, *rest, False, self.kind.with_lse)
            yield "triton", partial(self._run, call, wide, sinks, with_lse=self.kind.with_lse)

    def _config(self, family: str) -> select.CudaConfig:
        rng = self.rng
        alike = self.heads // self.kv_heads % 2 == 0 and self.mask.pattern_id.shape[1] == 1
        tiles, paired = rng.choice(LAYOUTS if alike or family != "hopper" else LAYOUTS[:2])
        return select.CudaConfig(
            Layout(tiles, paired, rng.choice([1.0, 5.5]), rng.choice([1.0, 12.0])),
            tiles == 1 and not paired and alike,
            rng.choice([1, 8, 264]),
            rng.choice([1 << 16, 12 << 20]),
        )

    def triton_is_chosen(self) -> bool:
        """Whether the chosen kernel, which has run, is Triton's."""
        kept = self.mask.plans["calls" if self.kind.with_lse else "calls without lse"]
        return any(type(one.call).__module__ == triton.__name__ for one in kept.values())

    def _poisoned(self, call, *arguments, **options):
        """call(...), whose outputs and workspace take the place of NaN."""
        rows = self.q.shape[:3].numel()
        for n, dtype in (
            (1 << 22 if self.device == "cuda" else 1, torch.float32),
            (rows * self.dim, self.dtype),
            (rows, torch.float32),
        ):
            torch.full((n,), torch.nan, device=self.device, dtype=dtype)
        return call(*arguments, **options)

    def _run(self, call, *rest, with_lse: bool = True):
        out, lse = self._poisoned(call, self.q, self.k, self.v, self.mask, *rest)
        return out.transpose(1, 2), lse if with_lse else None

    def run(self) -> list[str]:
        """The kernels that computed it; raises AssertionError where one did not rightly."""
        want, want_lse = reference_attention(
            self.q, self.k, self.v, self.mask.to_dense(),
            scale=self.scale, softcap=self.softcap, bias=self.bias, sinks=self.sinks,
        )  # fmt: skip
        near, ran = TOLERANCE[self.dtype], []
        for name, call in self.calls():
            try:
                out, lse = call()
                torch.testing.assert_close(out.double(), want, atol=near, rtol=near)
                if lse is not None:
                    torch.testing.assert_close(lse.double(), want_lse, atol=near, rtol=near)
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error
            ran.append(name.split()[0])
        if self.device == "cuda" and self.triton_is_chosen():
            ran.append("triton")
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


def run_kind(numbers: list[int]) -> tuple[list[tuple[int, list[str], str]], int]:
    """(what `run` says of each, how many kernels Triton compiled)"""
    compiled = []
    knobs.compilation.listener = lambda *, cache_hit, **rest: cache_hit or compiled.append(1)
    return [run(number) for number in numbers], len(compiled)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    given = parser.parse_args()
    calls, cases, failed = Counter(), Counter(), []
    done = compiled = 0
    begin = time.monotonic()
    end = given.first + given.cases
    kinds = [range(n, end, KINDS) for n in range(given.first, min(end, given.first + KINDS))]
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.jobs, torch.set_num_threads, (threads,)) as pool:
        for results, new in track(pool.imap_unordered(run_kind, kinds), total=len(kinds)):
            compiled += new
            for number, ran, wrong in results:
                calls.update(ran)
                cases.update(set(ran))
                done += bool(ran or wrong)
                if wrong:
                    failed.append(number)
                    print(f"case {number}: {wrong}", file=sys.stderr)
            if time.monotonic() - begin > given.seconds:
                break
    print(
        f"{done} cases in {time.monotonic() - begin:.0f} s, {len(failed)} failed "
        f"{sorted(failed)[:20]}; cases by family: {dict(cases)}; calls: {dict(calls)}; "
        f"Triton kernels compiled: {compiled}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
