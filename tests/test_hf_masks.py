"""The mask function "stof" against Transformers' own `sdpa_mask`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils
from transformers.masking_utils import and_masks, or_masks, sdpa_mask

import stof_hf.hf.masks as hf_masks
from stof_hf import SparseMask, patterns
from stof_hf.hf import combine, register
from stof_hf.hf.masks import stof_mask
from stof_hf.hf.recognise import pattern_of, structural_key
from stof_hf.hf.symbolic import is_opaque, recognise
from stof_hf.masks import build, cache
from stof_hf.masks.traced import structure_of

GROUPS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2, 2, 2]])
BLOCKS = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1], [0, 0, 0, -1, -1, -1, -1, 2, 2, 2]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 0, 1, 2]])
LEFT = torch.tensor([0, 3])

CLOSED = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "window-both": masking_utils.sliding_window_bidirectional_mask_function(3),
    "prefix": or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 5),
    "distance": lambda b, h, q, k: ((q - k >= 0) & (q - k < 3)) | ((q - k < 0) & (k - q <= 1)),
    "strictly-before": lambda b, h, q, k: k < q,
    "inverse": lambda b, h, q, k: ~(k > q + 2),
    "after": lambda b, h, q, k: k >= q + 2,
}
GROUPED = {
    "packed": and_masks(
        masking_utils.packed_sequence_mask_function(GROUPS), masking_utils.causal_mask_function
    ),
    "blockwise": or_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(BLOCKS)
    ),
    "chunked": masking_utils.chunked_causal_mask_function(4, LEFT),
    "negative-groups": masking_utils.packed_sequence_mask_function(BLOCKS),
}
OTHER = {
    "modulo": lambda b, h, q, k: (q + k) % 3 > 0,
    "table": lambda b, h, q, k: GROUPS[b, torch.clamp(q, max=9)] > GROUPS[b, k],
    "product": lambda b, h, q, k: (q * k) % 5 < 3,
}
if hasattr(masking_utils, "packed_sequence_compatibility_function"):
    GROUPED["packed-window"] = masking_utils.packed_sequence_compatibility_function(
        masking_utils.sliding_window_causal_mask_function(3), POSITIONS, GROUPS
    )


def dense(mask: Any, shape: tuple[int, ...]) -> torch.Tensor:
    if isinstance(mask, SparseMask):
        mask = mask.to_dense()
    return mask.expand(shape)


def both(function: Callable[..., Any], geometry: tuple[int, int, Any, int], **kwargs: Any) -> Any:
    """The dense masks of sdpa_mask and stof_mask."""
    q_length, kv_length, q_offset, kv_offset = geometry
    arguments = {
        "batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": function, "allow_is_causal_skip": False, **kwargs,
    }  # fmt: skip
    shape = (2, 1, q_length, kv_length)
    expected = sdpa_mask(**{**arguments, "allow_is_bidirectional_skip": False})
    return dense(expected, shape), dense(stof_mask(**arguments), shape)


GEOMETRIES = [
    (10, 10, 0, 0),
    (3, 10, 7, 0),
    (1, 10, 9, 0),
    (1, 6, 9, 4),
    (2, 7, 6, 2),
    (10, 10, 0, 0),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", [*CLOSED, *GROUPED, *OTHER])
def test_equals_sdpa_mask(name: str, geometry: tuple[int, int, int, int]) -> None:
    function = {**CLOSED, **GROUPED, **OTHER}[name]
    expected, actual = both(function, geometry, attention_mask=None)
    if name != "chunked":  # without padding, chunks begin at 0 whatever the tensor says
        assert torch.equal(expected, actual)
    padding = torch.ones(2, 10, dtype=torch.bool)
    padding[1, :3] = False
    expected, actual = both(function, geometry, attention_mask=padding)
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("name", [*CLOSED, *GROUPED, *OTHER])
def test_offset_as_tensor(name: str) -> None:
    function = {**CLOSED, **GROUPED, **OTHER}[name]
    padding = torch.ones(2, 10, dtype=torch.bool)
    padding[1, :3] = False
    expected, actual = both(function, (2, 10, torch.tensor(4), 0), attention_mask=padding)
    assert torch.equal(expected, actual)


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 90),
    q_length=st.integers(1, 140),
    past=st.integers(0, 200),
    kv_offset=st.integers(0, 70),
    kind=st.sampled_from(["causal", "window", "window-both"]),
    padded=st.booleans(),
)
def test_geometry(
    window: int, q_length: int, past: int, kv_offset: int, kind: str, padded: bool
) -> None:
    function = {
        "causal": masking_utils.causal_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(window),
        "window-both": masking_utils.sliding_window_bidirectional_mask_function(window),
    }[kind]
    kv_offset = min(kv_offset, past)
    kv_length = past + q_length - kv_offset
    padding = None
    if padded:
        padding = (
            torch.rand(2, past + q_length, generator=torch.Generator().manual_seed(past)) < 0.8
        )
    geometry = (q_length, kv_length, past, kv_offset)
    expected, actual = both(function, geometry, attention_mask=padding)
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_is_recognised(name: str) -> None:
    expression, tensors = recognise(CLOSED[name])
    assert not is_opaque(expression) and not tensors
    pattern, cacheable = pattern_of(CLOSED[name], 10, False, False, 2)
    assert cacheable and pattern.serializable


def test_transformers_functions_become_the_patterns_of_that_name() -> None:
    def pattern(function: Any) -> patterns.Pattern:
        return pattern_of(function, 10, False, False, 2).pattern

    assert pattern(CLOSED["causal"]) == patterns.Causal()
    assert pattern(CLOSED["window"]) == patterns.SlidingWindow(3, 0)
    assert pattern(CLOSED["window-both"]) == patterns.SlidingWindow(3, 3)
    assert pattern(CLOSED["prefix"]) == patterns.PrefixLM(5)
    assert pattern(GROUPED["chunked"]) == patterns.Chunked(4) & patterns.Causal()
    assert pattern(GROUPED["packed"]) == patterns.Documents(GROUPS) & patterns.Causal()


def test_single_index_functions() -> None:
    """use_vmap=True: the function takes single indices, and may branch on tensors only."""

    def function(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return torch.where(GROUPS[b][q] == 1, k % 2 == 0, k <= q)

    for geometry in GEOMETRIES:
        expected, actual = both(function, geometry, attention_mask=None, use_vmap=True)
        assert torch.equal(expected, actual)


def test_functions_that_branch_are_not_recognised() -> None:
    for function in (
        lambda b, h, q, k: (k <= q) if q > 2 else (k > q),
        lambda b, h, q, k: (k <= q) and (k > q - 3),
        lambda b, h, q, k: k <= max(q, 3),
        lambda b, h, q, k: k <= [3, 4][q],
    ):
        assert isinstance(pattern_of(function, 10, False, False, 1).pattern, patterns.Custom)


BIDIRECTIONAL = {"q_length": 5, "kv_length": 5, "allow_is_bidirectional_skip": True}
ONES, HOLE = torch.ones(2, 5, dtype=torch.bool), torch.tensor([[1] * 5, [1, 1, 1, 1, 0]]).bool()


@pytest.mark.parametrize(
    ("none", "arguments"),
    [
        (True, {"q_length": 1, "kv_length": 9, "q_offset": 8}),
        (False, {"q_length": 1, "kv_length": 9, "q_offset": 8, "allow_is_causal_skip": False}),
        (False, {"q_length": 1, "kv_length": 9, "q_offset": 8, "local_size": 9}),
        (True, {"q_length": 1, "kv_length": 8, "q_offset": 7, "local_size": 9}),
        (False, {"q_length": 5, "kv_length": 5}),
        (False, {"q_length": 4, "kv_length": 9}),
        (True, {**BIDIRECTIONAL}),
        (True, {**BIDIRECTIONAL, "attention_mask": ONES}),
        (False, {**BIDIRECTIONAL, "attention_mask": HOLE}),
        (False, {**BIDIRECTIONAL, "local_size": 5}),
    ],
)  # fmt: skip
def test_none_where_all_keys_are_allowed(none: bool, arguments: dict[str, Any]) -> None:
    assert (stof_mask(batch_size=2, **arguments) is None) == none


def test_prepared_masks_pass_through() -> None:
    made = SparseMask.from_pattern(patterns.Causal(), 4)
    assert stof_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=made) is made
    from_pattern = stof_mask(
        batch_size=1,
        q_length=2,
        kv_length=6,
        q_offset=4,
        attention_mask=patterns.SlidingWindow(1, 0),
    )
    assert from_pattern.to_dense()[0, 0].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


def test_every_mask_creator() -> None:
    """All create_*_mask functions of Transformers, with and without caches and packed inputs."""
    register()  # no model was imported yet where this file runs alone
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, sliding_window=4
    )
    config.attention_chunk_size = 4
    embeds = torch.zeros(2, 10, 8)
    padding = torch.ones(2, 10, dtype=torch.long)
    padding[1, 7:] = 0
    names = [n for n in dir(masking_utils) if n.startswith("create_") and n.endswith("_mask")]
    names = [n for n in names if n not in ("create_block_mask", "create_recurrent_attention_mask")]
    assert len(names) >= 5
    for name in names:
        creator = getattr(masking_utils, name)
        accepted = inspect.signature(creator).parameters
        for mask in (None, padding):
            for position_ids in (None, POSITIONS):
                arguments = {
                    "inputs_embeds": embeds, "attention_mask": mask, "past_key_values": None,
                    "position_ids": position_ids, "encoder_hidden_states": None,
                    "block_sequence_ids": BLOCKS,
                }  # fmt: skip
                arguments = {k: v for k, v in arguments.items() if k in accepted}
                results = []
                for implementation in ("sdpa", "stof"):
                    config._attn_implementation = implementation
                    made = creator(config=config, **arguments)
                    results.append(None if made is None else dense(made, (2, 1, 10, 10)))
                if results[0] is None:  # sdpa leaves causality to the layer
                    causal = "bidirectional" not in name
                    results[0] = (
                        torch.ones(2, 1, 10, 10, dtype=torch.bool).tril() if causal else None
                    )
                assert (results[0] is None) == (results[1] is None), name
                assert results[0] is None or torch.equal(*results), name


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the masks that are built."""
    count = [0]
    original = build.build

    def counted(*args: Any) -> SparseMask:
        count[0] += 1
        return original(*args)

    monkeypatch.setattr(build, "build", counted)
    cache.clear()
    return count


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_generating_256_tokens_builds_few_masks(name: str, builds: list[int]) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    model = family.build("stof")
    inputs = inputs_of(family, length=12)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :5] = 0
    model.generate(**inputs, max_new_tokens=256, min_new_tokens=256, do_sample=False)
    assert builds[0] <= 4


def test_a_mask_is_shared_by_forwards() -> None:
    arguments = {"batch_size": 2, "q_length": 70, "kv_length": 70, "allow_is_causal_skip": False}
    first = stof_mask(
        mask_function=masking_utils.sliding_window_causal_mask_function(9), **arguments
    )
    again = stof_mask(
        mask_function=masking_utils.sliding_window_causal_mask_function(9), **arguments
    )
    other = stof_mask(
        mask_function=masking_utils.sliding_window_causal_mask_function(8), **arguments
    )
    assert first is again and first is not other


def test_unknown_functions_are_cached_by_what_they_read() -> None:
    def closure(table: torch.Tensor, step: int) -> Callable[..., torch.Tensor]:
        return lambda b, h, q, k: (table[b, q] + k) % step == 0

    arguments = {"batch_size": 2, "q_length": 10, "kv_length": 10, "allow_is_causal_skip": False}
    table = GROUPS.clone()
    first = stof_mask(mask_function=closure(table, 2), **arguments)
    assert stof_mask(mask_function=closure(table, 2), **arguments) is first
    assert stof_mask(mask_function=closure(table, 3), **arguments) is not first
    table[0, 0] = 1
    changed = stof_mask(mask_function=closure(table, 2), **arguments)
    assert not torch.equal(changed.to_dense(), first.to_dense())
    mutable = [2]
    assert structural_key(lambda b, h, q, k: q % mutable[0] == 0, []) is None


class Reads(TorchDispatchMode):
    """Counts operations that wait for a device: reading a number, sizes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "unique"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("q_length", [1, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_read_nothing_from_the_device(
    q_length: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the CPU alone it is free to look for padding that is all ones.
    monkeypatch.setattr(hf_masks, "_all_ones_for_free", lambda padding: False)
    padding = torch.ones(2, 16, dtype=torch.bool) if padded else None
    for function in (CLOSED["causal"], CLOSED["window"], masking_utils.causal_mask_function):
        for offset in (torch.tensor(5), 5):
            arguments = {
                "batch_size": 2, "q_length": q_length, "kv_length": 16, "q_offset": offset,
                "mask_function": function, "attention_mask": padding,
                "allow_is_causal_skip": False,
            }  # fmt: skip
            stof_mask(**arguments)
            with Reads() as reads:
                stof_mask(**arguments)
            assert not reads.names


def test_static_cache_length_is_copied() -> None:
    """The offset that a mask carries is a copy: the cache adds to its own in place."""
    length = torch.tensor(5)
    mask = stof_mask(
        batch_size=1, q_length=1, kv_length=16, q_offset=length, allow_is_causal_skip=False
    )
    length.add_(7)
    assert mask.row_start.tolist() == [5]
    assert mask.to_dense()[0, 0, 0].sum() == 6


def test_static_cache_continued_with_many_tokens() -> None:
    """A second long prompt: more queries than a view serves, and the offset is in a tensor."""
    family = next(f for f in FAMILIES if f.name == "llama")
    ids = inputs_of(family, length=50)["input_ids"]
    outputs = []
    for implementation in ("eager", "stof"):
        model = family.build(implementation)
        for made in (
            StaticCache(config=model.config, max_cache_len=64),
            DynamicCache(config=model.config),
        ):
            with torch.no_grad():
                model(input_ids=ids[:, :20], past_key_values=made)
                outputs.append(model(input_ids=ids[:, 20:], past_key_values=made).logits)
    for other in outputs[1:]:
        assert float((outputs[0] - other).abs().max()) <= 1e-4


def test_masks_act_as_tensors() -> None:
    padding = torch.ones(2, 90, dtype=torch.bool)
    padding[1, 50:] = False
    mask = SparseMask.from_pattern(patterns.Causal(), 90, padding=padding)
    dense = mask.to_dense()
    last = mask[:, :, -3:, :]
    assert isinstance(last, SparseMask) and torch.equal(last.to_dense(), dense[:, :, -3:])
    assert torch.equal(mask[:, :, -40:, :], dense[:, :, -40:])
    assert torch.equal(mask[..., :7], dense[..., :7])
    assert torch.equal(torch.where(mask, 1.0, 2.0), torch.where(dense, 1.0, 2.0))
    assert torch.equal(mask.float(), dense.float())
    scores = torch.randn(2, 1, 90, 90, dtype=torch.float16)
    additive = torch.where(dense, 0.0, torch.finfo(torch.float16).min).half()
    for added in (scores + mask, mask + scores, torch.add(scores, mask), scores.clone().add_(mask)):
        assert torch.equal(added, scores + additive)
    scores += mask
    every = SparseMask.from_pattern(patterns.Causal(), 90)
    joined = torch.cat([every, mask], dim=-1)
    assert torch.equal(joined, torch.cat([every.to_dense().expand(2, -1, -1, -1), dense], -1))
    assert torch.equal(torch.cat([every, mask]), torch.cat([every.to_dense(), dense]))
    assert torch.equal(torch.cat([mask, scores], -1), torch.cat([additive, scores], -1))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mask.nothing


def test_structure_in_graph() -> None:
    allowed = torch.rand(2, 1, 70, 130) < 0.3
    mask = SparseMask(70, 130, *structure_of(allowed))
    assert torch.equal(mask.to_dense(), allowed)


@pytest.mark.parametrize("name", [*CLOSED, *GROUPED, *OTHER])
def test_traced(name: str) -> None:
    """Inside torch.compile the op gets the same mask, as text where the function is recognised."""
    import stof_hf

    function = {**CLOSED, **GROUPED, **OTHER}[name]
    q = torch.randn(2, 2, 10, 16, generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 10, dtype=torch.bool)
    padding[1, :3] = False

    def step(q: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        mask = stof_mask(
            batch_size=2, q_length=10, kv_length=10, mask_function=function, attention_mask=padding,
            allow_is_causal_skip=False, use_vmap="masking_utils" not in function.__module__,
        )  # fmt: skip
        return stof_hf.attention(q, q, q, mask)

    torch._dynamo.reset()
    for mask in (padding, None):
        actual = torch.compile(step, fullgraph=True, backend="eager")(q, mask)
        assert torch.allclose(actual, step(q, mask), atol=1e-5)


def test_random_blocks_of_a_mask_with_a_key_offset() -> None:
    """Random blocks depend on the number of positions, wherever the keys at hand begin."""
    extra = patterns.BigBird(8, (0,), 1, block_size=16)
    place = {"q_offset": 192, "kv_offset": 64}
    allowed = torch.ones(1, 1, 64, 192, dtype=torch.bool)
    mask = SparseMask(64, 192, *structure_of(allowed), **place)
    expected = SparseMask.from_pattern(extra, 64, 192, **place).to_dense()
    assert torch.equal(combine.derive(mask, extra, "key").to_dense(), expected)
