"""Patterns on packed sequences against the same patterns on the padded batch."""

import numpy as np
import pytest
import torch

from stof_hf import SparseMask, patterns
from stof_hf.masks.packed import documents, is_packable, packed

BATCH, TOKENS = 4, 150
#: Whether padding in the middle of a sequence leaves a pattern what it is.
PACKABLE = {
    "full": (patterns.Full(), True),
    "causal": (patterns.Causal(), True),
    "window": (patterns.SlidingWindow(9, 4), False),
    "dilated": (patterns.Dilated(3, 5), False),
    "chunked": (patterns.Chunked(40), True),
    "global keys": (patterns.GlobalKeys((3, 70)), True),
    "global tokens": (patterns.GlobalTokens((0, 75, 149)), True),
    "longformer": (patterns.Longformer(7, (0, 1)), False),
    "combined": (patterns.Causal() & ~patterns.Chunked(32) | patterns.GlobalKeys((90,)), True),
    "combined window": (~patterns.SlidingWindow(9, 9) & patterns.Chunked(64), False),
}


def padding(holes):
    real = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    real[0, 80:] = False
    real[1, :33] = False
    real[2] = False
    if holes:
        real[3, 60:75] = False
    return real


@pytest.mark.parametrize("holes", [False, True], ids=["ends", "holes"])
@pytest.mark.parametrize("name", PACKABLE)
def test_the_same_pairs_are_allowed(name, holes):
    pattern, with_holes = PACKABLE[name]
    real = padding(holes)
    sequence, column = (x.numpy() for x in real.nonzero().T)
    rows = len(column) + 30
    assert is_packable(pattern)
    moved = packed(pattern, sequence, column, rows)
    if holes and not with_holes:
        assert moved is None
        return
    got = SparseMask.from_pattern(documents(sequence, rows) & moved, rows).to_dense()[0, 0]
    wanted = torch.zeros(rows, rows, dtype=torch.bool)
    for b in range(BATCH):
        (at,) = np.nonzero(sequence == b)
        at, places = torch.from_numpy(at), torch.from_numpy(column[at])
        wanted[at[:, None], at] = pattern(0, 0, places[:, None], places)
    assert torch.equal(got, wanted)


class Mine(patterns.SlidingWindow):
    """What a subclass changes is not known."""


@pytest.mark.parametrize(
    "pattern",
    [
        patterns.BigBird(4), patterns.RandomBlocks(1), Mine(3, 3),
        patterns.Custom(lambda b, h, q, k: q >= k), patterns.Documents([0, 0, 1]),
        patterns.Dense(torch.ones(9, 9, dtype=torch.bool)),
        patterns.Causal() & patterns.BigBird(4), ~patterns.RandomBlocks(1),
    ],
    ids=lambda pattern: type(pattern).__name__,
)  # fmt: skip
def test_what_cannot_be_packed(pattern):
    assert not is_packable(pattern)
