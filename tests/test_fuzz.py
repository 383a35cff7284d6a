"""The script that runs random calls, on a few of them; by hand it runs thousands on a GPU."""

from itertools import combinations

import torch
from fuzz import KINDS, Case, Kind, run


def test_cases_pass():
    results = [run(number) for number in range(12)]
    assert not any(wrong for _, _, wrong in results)
    assert sum(bool(ran) for _, ran, _ in results) >= 10


def test_a_wrong_result_is_told(monkeypatch):
    monkeypatch.setattr("fuzz.attention", lambda q, *rest, **options: q * 2)
    assert any("chosen" in run(number)[2] for number in range(4))


def test_cases_differ_and_come_again():
    assert str(Case(3)) == str(Case(3)) != str(Case(4))


def test_every_pair_of_features_occurs():
    kinds = [
        (
            kind.dtype, kind.dim, kind.group, kind.most, kind.unit, kind.padded, kind.sinks,
            kind.several, kind.with_lse, kind.softcap, kind.bias and kind.bias.itemsize,
            kind.bias and kind.bias_by_key, "wide" in kind.memory, "odd" in kind.memory,
            kind.most_keys,
        )
        for kind in map(Kind, range(KINDS))
    ]  # fmt: skip
    missing = []
    for one, other in combinations(zip(*kinds, strict=True), 2):
        pairs = {(a, b) for a in one for b in other} - set(zip(one, other, strict=True))
        missing += pairs
    # A bias is of fp32 or of the query's dtype, and has keys or not only where it is.
    assert {*missing} <= {(torch.float32, 2), (None, True), (None, False), (2, None), (4, None)}
