"""The masks of the STOF paper as mask functions, the same for every contestant."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..errors import MaskError

__all__ = ["MASKS", "BenchMask", "bench_mask"]

MASKS = ("full", "causal", "sliding", "longformer", "bigbird", "document")

BLOCK = 32
_BIGBIRD_SEED = 9
# Seeds under which the random documents keep the share of scores that the committed results name.
_DOCUMENT_SEEDS = {128: 36, 512: 60, 1024: 432, 4096: 44, 16384: 32}


@dataclass(frozen=True)
class BenchMask:
    """A mask over seq_len x seq_len, shared by batch and heads.

    mod(b, h, q, k): the closed-form mask function on `device`. lengths: lengths of the packed
    documents, or None. window: (left, right) of a causal sliding window, or None.
    """

    name: str
    seq_len: int
    mod: Callable[..., torch.Tensor]
    lengths: tuple[int, ...] | None = None
    window: tuple[int, int] | None = None

    def rows(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Rows [start, stop) as bool [stop - start, seq_len]."""
        q = torch.arange(start, stop, device=device)[:, None]
        k = torch.arange(self.seq_len, device=device)[None]
        zero = torch.zeros((), dtype=torch.long, device=device)
        return self.mod(zero, zero, q, k)

    def _strips(self, device: torch.device) -> Iterator[torch.Tensor]:
        step = max(1, 2**26 // self.seq_len)
        for start in range(0, self.seq_len, step):
            yield self.rows(start, min(start + step, self.seq_len), device)

    def dense(self, device: torch.device) -> torch.Tensor:
        """bool [seq_len, seq_len]."""
        return torch.cat(list(self._strips(device)))

    def kept_percent(self, device: torch.device) -> float:
        """Share of the seq_len x seq_len scores that the mask keeps."""
        return 100 * sum(int(strip.sum()) for strip in self._strips(device)) / self.seq_len**2


def document_lengths(seq_len: int) -> tuple[int, ...]:
    """Lengths of documents cut at random, about 512 tokens each and at least two of them."""
    cuts = max(2, seq_len // 512 + 1) - 1
    draw = random.Random(_DOCUMENT_SEEDS.get(seq_len, 0))
    edges = [0, *sorted(draw.sample(range(1, seq_len), cuts)), seq_len]
    return tuple(b - a for a, b in pairwise(edges))


def bench_mask(name: str, seq_len: int, device: torch.device) -> BenchMask:
    """The mask called `name`.

    full: no mask; causal; sliding: a causal band of 64; longformer: a band of 32 to each side, 32
    global tokens at 0 and at seq_len / 2; bigbird: the band, 32 global tokens at 0, and of every
    row of 32x32 blocks the diagonal block or one of its neighbours filled to 10 % at random;
    document: packed documents of about 512 tokens, causal inside each.

    Raises MaskError for another name and for a seq_len that is no multiple of 32.
    """
    if name not in MASKS:
        raise MaskError(f"no mask is called {name!r}; there are {', '.join(MASKS)}")
    if seq_len % BLOCK:
        raise MaskError(f"seq_len must be a multiple of {BLOCK}, not {seq_len}")
    if name == "full":
        return BenchMask(name, seq_len, lambda b, h, q, k: (q >= 0) & (k >= 0))
    if name == "causal":
        return BenchMask(name, seq_len, lambda b, h, q, k: q >= k)
    if name == "sliding":
        mod = lambda b, h, q, k: (q >= k) & (q - k <= 64)  # noqa: E731
        return BenchMask(name, seq_len, mod, window=(64, 0))
    if name == "longformer":
        middle = seq_len // 2

        def longformer(b, h, q, k):
            distance = q - k
            band = (distance <= 32) & (distance >= -32)
            return band | (q % middle < 32) | (k % middle < 32)

        return BenchMask(name, seq_len, longformer)
    if name == "bigbird":
        allowed = _bigbird(seq_len, device)
        # FlexAttention is fastest with a single look-up: faster than with arithmetic in its place.
        return BenchMask(name, seq_len, lambda b, h, q, k: allowed[q, k])
    lengths = document_lengths(seq_len)
    ids = torch.repeat_interleave(torch.tensor(lengths)).to(device, torch.int32)

    def document(b, h, q, k):
        return (q >= k) & (ids[q] == ids[k])

    return BenchMask(name, seq_len, document, lengths=lengths)


def _bigbird(seq_len: int, device: torch.device) -> torch.Tensor:
    """bool [S, S]."""
    position = torch.arange(seq_len, device=device)
    q, k = position[:, None], position[None]
    out = ((q - k).abs_() <= 32) | (q < 32) | (k < 32)
    draw = torch.Generator().manual_seed(_BIGBIRD_SEED)
    blocks = seq_len // BLOCK
    column = torch.arange(blocks) + torch.randint(-1, 2, (blocks,), generator=draw)
    column = column.clamp(0, blocks - 1).repeat_interleave(BLOCK)[:, None] * BLOCK
    fill = torch.rand(seq_len, BLOCK, generator=draw) < 0.1
    place = (column + torch.arange(BLOCK)).to(device)
    return out.scatter_(1, place, out.gather(1, place) | fill.to(device))
