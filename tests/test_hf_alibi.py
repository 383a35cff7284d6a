"""Decoders with attention code of their own, by ALiBi or rotary: "stof" against that code."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import stof_hf
from stof_hf import UnsupportedError, patterns
from stof_hf.hf import attention as hf_attention

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOOM = {
    **TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 6,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
FALCON = {
    **TOKENS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
OLD = {**FALCON, "new_decoder_architecture": False}
MPT = {
    **TOKENS, "d_model": 48, "n_layers": 2, "n_heads": 6, "expansion_ratio": 2, "max_seq_len": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "bloom": BloomConfig(**BLOOM),
    "bloom_sliced": BloomConfig(
        **BLOOM,
        pretraining_tp=3,
        slow_but_exact=True,
        apply_residual_connection_post_layernorm=True,
    ),
    "falcon": FalconConfig(**OLD, multi_query=True),
    "falcon_heads": FalconConfig(**OLD, multi_query=False, parallel_attn=False, bias=True),
    "falcon_groups": FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": FalconConfig(**OLD, alibi=True, multi_query=False, parallel_attn=False),
    "falcon_alibi_query": FalconConfig(**OLD, alibi=True, multi_query=True),
    "mpt": MptConfig(**MPT),
    "mpt_clipped": MptConfig(**MPT, attn_config={"clip_qkv": 0.5, "softmax_scale": 0.2}),
}
MODELS = {"bloom": BloomForCausalLM, "falcon": FalconForCausalLM, "mpt": MptForCausalLM}
TAKES_4D = [name for name in CONFIGS if "bloom" not in name and "alibi" not in name]


def class_of(name: str) -> type:
    return MODELS[name.split("_")[0]]


def module_of(name: str) -> Any:
    return sys.modules[class_of(name).__module__]


def own_attention(name: str) -> str:
    """The reference: Falcon's eager attention adds ALiBi twice, unlike the default."""
    return "sdpa" if "alibi" in name else "eager"


def pair(name: str, **changes: Any) -> tuple[Any, Any]:
    """(the model with its own code, the same with "stof")."""
    cls, config = class_of(name), copy.deepcopy(CONFIGS[name])
    config.update(changes)
    torch.manual_seed(0)
    reference = cls._from_config(copy.deepcopy(config), attn_implementation=own_attention(name))
    for parameter in reference.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4.0)  # initial weights are so small that nothing would show
    model = cls._from_config(config, attn_implementation="stof")
    model.load_state_dict(reference.state_dict())
    return reference.eval(), model.eval()


def inputs(size: int, padding: str = "none") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    given = {"input_ids": torch.randint(3, 50, (3, size), generator=generator)}
    at, last = torch.arange(size), torch.tensor([[size], [size - size // 3], [size // 2 + 1]])
    if padding == "right":
        given["attention_mask"] = (at < last).long()
    elif padding == "left":
        given["attention_mask"] = (at >= size - last).long()
    elif padding == "holes":
        seen = torch.rand(3, size, generator=generator) < 0.8
        given["attention_mask"] = (seen | (at == 0)).long()
    return given


def first(model: Any, given: dict[str, torch.Tensor], **arguments: Any) -> torch.Tensor:
    return model(**given, **arguments)[0]


def real(out: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a forward gave at tokens that are no padding."""
    mask = given.get("attention_mask")
    return out.flatten(0, 1) if mask is None or mask.ndim == 4 else out[mask.bool()]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= 2e-5


def near_gradients(reference: Any, model: Any) -> bool:
    """Of all parameters that have any: a sliced projection of BLOOM leaves out its bias."""
    wanted, found = ([p.grad for p in m.parameters()] for m in (reference, model))
    assert [g is None for g in wanted] == [g is None for g in found]
    pairs = [(a, b) for a, b in zip(wanted, found, strict=True) if a is not None]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    return all(float((a - b).abs().max()) <= 1e-5 * largest for a, b in pairs)


def sparse_own_code(monkeypatch: pytest.MonkeyPatch, name: str, pattern: patterns.Pattern) -> None:
    """Add the pattern to the dense masks that the family's own code computes with."""
    module = module_of(name)
    original = module.create_causal_mask

    def create_causal_mask(config: Any, **arguments: Any) -> Any:
        mask = original(config=config, **arguments)
        if config._attn_implementation == "stof":
            return mask
        at = torch.arange(mask.shape[-1])
        seen = pattern(0, 0, at[-mask.shape[-2] :, None], at)
        if mask.dtype == torch.bool:
            return mask & seen
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    monkeypatch.setattr(module, "create_causal_mask", create_causal_mask)


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("size", [1, 7, 77])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients(name: str, size: int, padding: str) -> None:
    reference, model = (m.train() for m in pair(name))
    given = inputs(size, padding)
    wanted, found = (real(first(m, given), given) for m in (reference, model))
    assert close(found, wanted)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    for out in (wanted, found):
        (out * weights).sum().backward()
    assert near_gradients(reference, model)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generate(name: str, cache: str, padding: str, beams: int) -> None:
    given = inputs(21, padding)
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    options = {
        "max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False,
        "cache_implementation": cache,
    }  # fmt: skip
    reference, model = pair(name)
    if cache == "static" and "alibi" in name:
        with pytest.raises((RuntimeError, ValueError)):
            reference.generate(**given, **options)
        with pytest.raises(UnsupportedError, match="dynamic cache"):
            model.generate(**given, **options)
        return
    assert torch.equal(model.generate(**given, **options), reference.generate(**given, **options))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_patterns(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = pair(name)
    dense = first(model, inputs(40))
    window = patterns.SlidingWindow(9, 0) | patterns.GlobalKeys((0, 12, 20))
    sparse_own_code(monkeypatch, name, window)
    stof_hf.set_pattern(model, window)
    given = inputs(40, padding)
    wanted, found = (real(first(m, given), given) for m in (reference, model))
    assert close(found, wanted)
    wanted.square().mean().backward()
    found.square().mean().backward()
    assert near_gradients(reference, model)
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = reference.generate(**given, **options)
    assert torch.equal(model.generate(**given, **options), wanted)
    stof_hf.set_pattern(model, None)
    assert torch.equal(first(model, inputs(40)), dense)


@pytest.mark.parametrize("name", TAKES_4D)
def test_masks_of_four_dimensions(name: str) -> None:
    reference, model = pair(name)
    given = inputs(40)
    seen = torch.rand(3, 1, 40, 40, generator=torch.Generator().manual_seed(2)) < 0.5
    seen = (seen | torch.eye(40, dtype=torch.bool)).tril()
    given["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    assert close(first(model, given), first(reference, given))
    assert close(first(model, {**given, "attention_mask": seen}), first(reference, given))
    # A bias to Falcon; MPT hides whatever is not 0.
    noise = torch.randn(3, 1, 40, 40).masked_fill(torch.eye(40, dtype=torch.bool), 0.0)
    given["attention_mask"] = noise if name.startswith("falcon") else noise * ~seen
    assert close(first(model, given), first(reference, given))


@pytest.mark.parametrize("name", TAKES_4D)
def test_masks_of_this_package(name: str) -> None:
    _, model = pair(name)
    mask = stof_hf.SparseMask.from_pattern(patterns.SlidingWindow(9, 0), 40)
    dense = torch.where(mask.to_dense(), 0.0, torch.finfo(torch.float32).min)
    found = first(model, {**inputs(40), "attention_mask": mask})
    assert close(found, first(model, {**inputs(40), "attention_mask": dense}))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in TAKES_4D])
def test_alibi_needs_a_mask_of_padding(name: str) -> None:
    _, model = pair(name)
    for mask in (patterns.Causal(), torch.ones(3, 1, 40, 40, dtype=torch.bool)):
        with pytest.raises(UnsupportedError, match="computes ALiBi from"):
            first(model, {**inputs(40), "attention_mask": mask})


def test_shared_keys_are_cached_once() -> None:
    reference, model = pair("falcon_groups")
    shapes = [m(**inputs(9)).past_key_values.layers[0].keys.shape for m in (reference, model)]
    assert shapes == [(3, 6, 9, 8), (3, 2, 9, 8)]


@pytest.mark.parametrize("name", CONFIGS)
def test_ways_to_switch(name: str, tmp_path: Path) -> None:
    reference, model = pair(name)
    given = inputs(40, "right")
    with torch.no_grad():
        wanted = first(reference, given)
        assert set(model.state_dict()) == set(reference.state_dict())
        model.save_pretrained(tmp_path)
        loaded = class_of(name).from_pretrained(tmp_path, attn_implementation="stof").eval()
        for candidate in (model, loaded, copy.deepcopy(model)):
            assert candidate.config._attn_implementation == "stof"
            found = first(candidate, given)
            assert close(real(found, given), real(wanted, given))
        model.set_attn_implementation(own_attention(name))
        assert torch.equal(first(model, given), wanted)
        reference.set_attn_implementation("stof")
        assert torch.equal(first(reference, given), found)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_weights_are_refused(name: str) -> None:
    _, model = pair(name)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**inputs(7), output_attentions=True)
    model.set_attn_implementation("eager")
    assert len(model(**inputs(7), output_attentions=True).attentions) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_continuous_batching_is_refused(name: str) -> None:
    _, model = pair(name)
    with pytest.raises(UnsupportedError, match="continuous batching"):
        model.set_attn_implementation("paged|stof")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bias_is_one_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, original = [], hf_attention.attention_by_rows

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        bias = kwargs["bias"]
        shapes.append(None if bias is None else tuple(bias.shape))
        return original(*args, **kwargs)

    monkeypatch.setattr(hf_attention, "attention_by_rows", recording)
    _, model = pair(name)
    first(model, inputs(40, "left"))
    batch = 1 if name.startswith("mpt") else 3
    rotary = name.startswith("falcon") and "alibi" not in name
    assert set(shapes) == {None if rotary else (batch, 6, 1, 40)}


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_in_training(name: str) -> None:
    _, model = pair(name, attention_dropout=0.3)
    for layer in model.modules():
        if hasattr(layer, "attn_dropout_p"):
            layer.attn_dropout_p = 0.3  # MPT's configuration takes whole numbers
    given = inputs(40, "right")
    without = first(model, given)
    model.train()
    torch.manual_seed(3)
    found = first(model, given)
    torch.manual_seed(3)
    assert torch.equal(first(model, given), found)
    drops = name not in ("falcon", "falcon_groups")  # neither by rotary nor beside the residual
    assert close(found, without) != drops and close(found, first(model, given)) != drops


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    reference, model = (m.train() for m in pair(name))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given = inputs(40, "right")
    for candidate in (reference, model):
        real(first(candidate, given), given).square().mean().backward()
    assert near_gradients(reference, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision(name: str) -> None:
    reference, model = pair(name)
    given = inputs(77, "right")
    with torch.no_grad():
        wanted = real(first(reference, given), given)
        theirs, ours = (real(first(m.bfloat16(), given), given) for m in (reference, model))
    error = (theirs - wanted).square().mean()
    assert float((ours - wanted).square().mean()) <= 1.2 * float(error)


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled(name: str) -> None:
    reference, model = pair(name)
    given = inputs(40, "left")
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = first(compiled, given, use_cache=False)
        assert close(real(found, given), real(first(reference, given), given))


def test_patched_families_alone_may_switch() -> None:
    assert "_can_set_attn_implementation_cached_value" not in vars(transformers.PreTrainedModel)
