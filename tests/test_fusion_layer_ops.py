"""Schemes: partitions of a layer's operators, their bits, and the moves of the search."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stof_hf.errors import UnsupportedError
from stof_hf.fusion import layer_ops
from stof_hf.fusion.layer_ops import SEGMENTS, Scheme, schemes

BERT = (
    "gemm", "bias", "attention", "gemm", "bias", "residual", "norm",
    "gemm", "bias", "act", "gemm", "bias", "residual", "norm",
)  # fmt: skip
GPT2 = (
    "norm", "gemm", "bias", "attention", "gemm", "bias", "residual",
    "norm", "gemm", "bias", "act", "gemm", "bias", "residual",
)  # fmt: skip
LLAMA = (
    "norm", "gemm", "rotary", "attention", "gemm", "residual",
    "norm", "gemm", "gate", "gemm", "residual",
)  # fmt: skip
LAYERS = {"bert": BERT, "gpt2": GPT2, "llama": LLAMA}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def test_examples():
    assert doctest.testmod(layer_ops).failed == 0


@given(st.sampled_from(sorted(LAYERS)), st.data())
def test_bits_say_the_partition(name, data):
    layer = LAYERS[name]
    marks = data.draw(st.lists(st.booleans(), min_size=len(layer) - 1, max_size=len(layer) - 1))
    borders = [i + 1 for i, mark in enumerate(marks) if mark]
    ends = [0, *borders, len(layer)]
    scheme = Scheme(layer, tuple(b - a for a, b in zip(ends, ends[1:], strict=False)))
    assert len(scheme.bits) == len(layer) and scheme.bits[0] == "0"
    assert Scheme.decode(layer, scheme.bits) == scheme
    assert hash(Scheme.decode(layer, scheme.bits)) == hash(scheme)
    assert list(scheme.borders) == borders
    assert sum(scheme.segments, ()) == layer
    assert scheme.legal == all(segment in SEGMENTS for segment in scheme.segments)
    assert scheme.legal == (scheme in schemes(layer))


@each_layer
def test_moves_lead_from_no_fusion_to_every_legal_scheme(layer):
    unfused = Scheme.unfused(layer)
    assert unfused.legal
    found, todo = {unfused}, [unfused]
    while todo:
        scheme = todo.pop()
        moved = [*scheme.expand(), *scheme.seize(), *scheme.compete()]
        assert all(other.legal and other != scheme for other in moved)
        assert all(len(s.sizes) == len(scheme.sizes) - 1 for s in scheme.expand())
        assert all(len(s.sizes) == len(scheme.sizes) for s in scheme.seize())
        assert all(len(s.sizes) == len(scheme.sizes) - 1 for s in scheme.compete())
        todo += set(moved) - found
        found |= set(moved)
    assert found == set(schemes(layer))


@each_layer
def test_the_first_scheme_has_the_longest_segments(layer):
    first = schemes(layer)[0]
    assert len(first.sizes) == min(len(scheme.sizes) for scheme in schemes(layer))
    assert len(set(schemes(layer))) == len(schemes(layer))


def test_what_is_no_scheme():
    with pytest.raises(UnsupportedError, match="no operator is called 'conv'"):
        Scheme(("gemm", "conv"), (1, 1))
    for sizes in ((1,), (0, 2), (3,)):
        with pytest.raises(ValueError, match="no partition"):
            Scheme(("gemm", "bias"), sizes)
    for bits in ("0", "012", "02"):
        with pytest.raises(ValueError, match="no scheme"):
            Scheme.decode(("gemm", "bias"), bits)
