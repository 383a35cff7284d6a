"""Hypothesis strategies: patterns from the whole algebra, and the masks they make; padded masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from stof_hf.masks import Pattern, SparseMask, patterns

SPECIAL = [1, 63, 64, 65, 127, 128, 129, 192, 256, 320, 448]
lengths = st.one_of(st.integers(1, 300), st.sampled_from(SPECIAL))


@dataclass
class Case:
    """A pattern, where it is looked at, and the padding of the batch."""

    pattern: Pattern
    q_len: int
    kv_len: int
    q_offset: int
    kv_offset: int
    padding: torch.Tensor | None

    @property
    def where(self) -> dict[str, int]:
        return {"q_offset": self.q_offset, "kv_offset": self.kv_offset}

    def mask(self, padding: bool = True) -> SparseMask:
        valid = self.padding if padding else None
        return SparseMask.from_pattern(
            self.pattern, self.q_len, self.kv_len, **self.where, padding=valid
        )

    def bound(self) -> Pattern:
        return self.pattern.bind(self.kv_offset + self.kv_len)

    def truth(self, padding: bool = True) -> torch.Tensor:
        """bool [B, Hm, Sq, Sk]: the mask function on all of the index grid at once."""
        dense = evaluate(self.bound(), self.q_len, self.kv_len, **self.where)
        if padding and self.padding is not None:
            dense = dense & self.padding[:, None, None]
        return dense


def evaluate(
    pattern: Pattern, q_len: int, kv_len: int, q_offset: int = 0, kv_offset: int = 0
) -> torch.Tensor:
    """bool [Bm, Hm, Sq, Sk] of a bound pattern."""
    batch, heads = pattern.batch or 1, pattern.heads or 1
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[None, :, None, None]
    q = q_offset + torch.arange(q_len)[None, None, :, None]
    k = kv_offset + torch.arange(kv_len)
    return pattern(b, h, q, k).expand(batch, heads, q_len, kv_len)


def linear(m: int, t: int, weights: tuple[int, int, int, int]):
    """A mask function without any block structure: a linear form of the indices modulo m."""
    wb, wh, wq, wk = weights

    def function(b, h, q, k):
        return (b * wb + h * wh + q * wq + k * wk) % m < t

    return function


@st.composite
def customs(draw, batch, heads):
    m = draw(st.integers(1, 97))
    per_batch, per_head = draw(st.booleans()), draw(st.booleans())
    weights = (5 * per_batch, 3 * per_head, draw(st.integers(0, 9)), draw(st.integers(0, 9)))
    return patterns.Custom(
        linear(m, draw(st.integers(0, m)), weights),
        batch if per_batch and batch > 1 else None,
        heads if per_head and heads > 1 else None,
    )


@st.composite
def denses(draw, batch, heads, q_end, k_end):
    shapes = [(q_end, k_end), (1, heads, q_end, k_end), (batch, 1, q_end, k_end)]
    shape = draw(st.sampled_from(shapes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    density = draw(st.sampled_from([0.001, 0.1, 0.999]))
    return patterns.Dense(torch.rand(shape, generator=g) < density)


@st.composite
def documents(draw, batch, end):
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (draw(st.sampled_from([1, batch])), draw(st.integers(1, end)))
    ids = torch.randint(-1, draw(st.integers(1, 6)), shape, generator=g)
    if draw(st.booleans()):
        ids = ids.sort(-1).values
    return patterns.Documents(ids if draw(st.booleans()) or shape[0] > 1 else ids[0])


@st.composite
def random_blocks(draw, kv_end):
    size = draw(st.sampled_from([7, 16, 64, 100]))
    bound = draw(st.sampled_from([None, kv_end, kv_end + 50]))
    return patterns.RandomBlocks(
        draw(st.integers(0, min(4, -(-kv_end // size)))),
        size,
        draw(st.integers(0, 5)),
        draw(st.sampled_from([1.0, 0.5])),
        draw(st.booleans()),
        bound,
    )


@st.composite
def block_tables(draw, heads, q_end, kv_end):
    size = draw(st.sampled_from([7, 16, 64, 100]))
    shape = (draw(st.sampled_from([1, heads])), -(-q_end // size), -(-kv_end // size))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return patterns.BlockTable(rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.9])), size)


def leaves(batch, heads, q_end, kv_end):
    end = max(q_end, kv_end)
    small = st.integers(0, 100)
    tokens = st.lists(st.integers(0, end + 5), max_size=6).map(tuple)
    drawn = st.integers(0, -(-kv_end // 64))
    return st.one_of(
        st.builds(patterns.Full),
        st.builds(patterns.Causal),
        st.builds(patterns.SlidingWindow, small, small),
        st.builds(patterns.Dilated, st.integers(0, 20), st.integers(1, 9)),
        st.builds(patterns.Chunked, st.integers(1, 150)),
        st.builds(patterns.PrefixLM, st.integers(0, end)),
        st.builds(patterns.GlobalTokens, tokens),
        st.builds(patterns.GlobalKeys, tokens),
        st.builds(patterns.Longformer, small, tokens),
        st.builds(patterns.BigBird, small, tokens, drawn, st.just(64), small),
        random_blocks(kv_end),
        documents(batch, end),
        block_tables(heads, q_end, kv_end),
        customs(batch, heads),
        denses(batch, heads, q_end, kv_end),
    )


@st.composite
def paddings(draw, batch, kv_len):
    """None, or valid keys: right, left, or with holes; a whole row may be padding."""
    kind = draw(st.sampled_from(["none", "right", "left", "holes"]))
    if kind == "none":
        return None
    at = torch.arange(kv_len)
    if kind == "holes":
        g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        return torch.rand(batch, kv_len, generator=g) < draw(st.sampled_from([0.1, 0.9]))
    real = torch.tensor([draw(st.integers(0, kv_len)) for _ in range(batch)])[:, None]
    return at < real if kind == "right" else at >= kv_len - real


@st.composite
def cases(draw, max_batch=2, max_heads=3, offsets=True) -> Case:
    batch, heads = draw(st.integers(1, max_batch)), draw(st.integers(1, max_heads))
    q_len, kv_len = draw(lengths), draw(lengths)
    q_offset = draw(st.sampled_from([0, 1, 64, 100])) if offsets else 0
    kv_offset = draw(st.sampled_from([0, 3, 64, 70])) if offsets else 0
    leaf = leaves(batch, heads, q_offset + q_len, kv_offset + kv_len)
    pattern = draw(
        st.recursive(
            leaf,
            lambda inner: st.one_of(
                st.tuples(inner, inner).map(lambda p: p[0] & p[1]),
                st.tuples(inner, inner).map(lambda p: p[0] | p[1]),
                inner.map(lambda p: ~p),
            ),
            max_leaves=4,
        )
    )
    padding = draw(paddings(batch if pattern.batch is None else pattern.batch, kv_len))
    return Case(pattern, q_len, kv_len, q_offset, kv_offset, padding)


#: Of which sequences `padded` hides keys.
PADDINGS = ["none", "right", "left", "all of one"]


def padded(mask_shape, padding):
    """A random mask [*mask_shape, 70, 140] with such padding, and what it allows, dense."""
    g = torch.Generator().manual_seed(5)
    allowed = torch.rand(*mask_shape, 70, 140, generator=g) < 0.3
    mask = SparseMask.from_dense(allowed)
    if padding != "none":
        at, real = torch.arange(140), torch.tensor([[140], [33]])
        valid = {"right": at < real, "left": at >= 140 - real, "all of one": real + 0 * at > 100}
        mask = mask.with_padding(valid[padding])
        allowed = allowed & valid[padding][:, None, None]
    return mask, allowed
