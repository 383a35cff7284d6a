"""Parity of "stof" with eager attention on tiny random models of many families."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, GENERATIVE_KINDS, TEXT_KINDS, Family, inputs_of, tokens
from packaging.version import Version
from transformers import Cache

import stof_hf.hf.attention as hf_attention

TOLERANCE = 1e-4

PRESENT = [f for f in FAMILIES if f.exists]
TEXT = [f for f in PRESENT if f.kind in TEXT_KINDS]
GENERATIVE = [f for f in PRESENT if f.kind in GENERATIVE_KINDS]


def by_name(families: list[Family]) -> Any:
    return pytest.mark.parametrize("family", families, ids=lambda f: f.name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the op, so that a model that bypasses "stof" cannot pass."""
    count = [0]
    original = hf_attention.attention_by_rows

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        count[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(hf_attention, "attention_by_rows", counted)
    return count


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits_per_image if "logits_per_image" in out else out[0]


def both(family: Family, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    model = family.build("eager")
    expected = output(model, inputs)
    model.set_attn_implementation("stof")
    return expected, output(model, inputs)


def error(expected: torch.Tensor, actual: torch.Tensor, rows: torch.Tensor | None = None) -> float:
    difference = (expected - actual).abs()
    return float((difference if rows is None else difference[rows]).max())


def test_enough_families() -> None:
    assert len(PRESENT) >= 40


@by_name(PRESENT)
def test_no_mask(family: Family, calls: list[int]) -> None:
    assert error(*both(family, inputs_of(family))) <= TOLERANCE
    assert calls[0] >= 2


def padded(family: Family, side: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs with padding in the second element, and which rows of the output are real."""
    inputs = inputs_of(family)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, slice(14, None) if side == "right" else slice(0, 7)] = 0
    inputs["attention_mask"] = mask
    real = mask
    if family.kind == "encdec":
        real = torch.ones_like(inputs["decoder_input_ids"])
        real[1, slice(6, None) if side == "right" else slice(0, 3)] = 0
        inputs["decoder_attention_mask"] = real
    return inputs, real.bool()


@pytest.mark.parametrize("side", ["right", "left"])
@by_name(TEXT)
def test_padding(family: Family, side: str) -> None:
    inputs, real = padded(family, side)
    assert error(*both(family, inputs), real) <= TOLERANCE


@by_name([f for f in PRESENT if f.name in ("llava", "bridgetower")])
def test_padding_beside_images(family: Family) -> None:
    inputs = inputs_of(family)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, -7:] = 0
    assert error(*both(family, inputs), inputs["attention_mask"].bool()) <= TOLERANCE


@by_name([f for f in PRESENT if f.kind == "encdec"])
def test_padding_of_the_encoder_alone(family: Family) -> None:
    """The decoder's own mask is then the same for the whole batch, the encoder's is not."""
    inputs = inputs_of(family)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 14:] = 0
    assert error(*both(family, inputs)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["bool", "float"])
@by_name([f for f in TEXT if f.kind != "encdec"])
def test_4d_mask(family: Family, kind: str) -> None:
    if "4d" in family.skip:
        pytest.skip(family.skip["4d"])
    inputs = inputs_of(family)
    length = inputs["input_ids"].shape[1]
    allowed = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(4)) < 0.5
    allowed |= torch.eye(length, dtype=torch.bool)
    if family.kind == "decoder":
        allowed &= torch.ones(length, length, dtype=torch.bool).tril()
    model = family.build("eager")
    # Eager attention adds the mask, whatever its dtype: only a float one is defined for it.
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    named = {"full_attention", "sliding_attention", "chunked_attention"}
    layers = named.intersection(getattr(model.config, "layer_types", None) or ())

    def given(mask: torch.Tensor) -> Any:
        return {name: mask for name in layers} if layers else mask

    expected = output(model, {**inputs, "attention_mask": given(additive)})
    model.set_attn_implementation("stof")
    actual = output(
        model, {**inputs, "attention_mask": given(allowed if kind == "bool" else additive)}
    )
    assert error(expected, actual) <= TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@by_name(GENERATIVE)
def test_generate(family: Family, cache: str) -> None:
    if cache in family.skip:
        pytest.skip(family.skip[cache])
    inputs = inputs_of(family, length=12)
    for name in ("decoder_input_ids",):
        inputs.pop(name, None)
    if family.kind == "decoder":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :5] = 0
    model = family.build("eager")
    results = []
    for implementation in ("eager", "stof"):
        model.set_attn_implementation(implementation)
        out = model.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, output_logits=True,
            return_dict_in_generate=True, disable_compile=True, use_cache=True,
            cache_implementation=None if cache == "dynamic" else "static",
        )  # fmt: skip
        results.append(torch.stack(out.logits))
    assert results[0].shape == results[1].shape
    assert error(*results) <= TOLERANCE


@pytest.mark.parametrize("name", [
    "gpt2", "llama", "t5",
    pytest.param("mistral", marks=pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"),
        reason="eager itself fails: a cache of windows is cropped to another length than its mask",
    )),
])  # fmt: skip
def test_a_draft_model_proposes_tokens(name: str, calls: list[int]) -> None:
    family = next(f for f in PRESENT if f.name == name)
    model, draft = family.build("eager"), family.build("eager")
    # Near enough to the model that some of its tokens are taken, and some are not.
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape) * parameter.std())
    inputs = inputs_of(family, batch=1, length=12)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    alone = model.generate(**inputs, **options)
    results = []
    for implementation in ("eager", "stof"):
        for each in (model, draft):
            each.set_attn_implementation(implementation)
        results.append(model.generate(**inputs, assistant_model=draft, **options))
        assert (calls[0] > 0) == (implementation == "stof")
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], alone)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is offloaded is fetched again on a stream that does not wait for it: while others use
    the GPU, eager attention computes something else, too."""
    update = Cache.update

    def waiting(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        out = update(*args, **kwargs)
        torch.cuda.synchronize()
        return out

    monkeypatch.setattr(Cache, "update", waiting)


@pytest.mark.gpu
@by_name([f for f in PRESENT if f.name in ("gpt2", "llama", "mistral", "gemma3")])
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_generate_with_an_offloaded_cache(family: Family, cache: str, in_order: None) -> None:
    if (family.name, cache) == ("mistral", "offloaded_static"):
        pytest.skip("Transformers looks for a layer without a window, and mistral has none")
    model = family.build("eager").cuda()
    ids = tokens(2, 12).cuda()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    results = []
    for implementation, kept in (("eager", None), ("eager", cache), ("stof", cache)):
        model.set_attn_implementation(implementation)
        new = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False,
            cache_implementation=kept, disable_compile=True,
        )  # fmt: skip
        results.append(new.tolist())
    assert results[0] == results[1] == results[2]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="Transformers before 5.23 takes it"
)
@pytest.mark.parametrize("name", ["stof", "paged|stof"])
@pytest.mark.filterwarnings("ignore:The `paged.` prefix:FutureWarning")
def test_continuous_batching_is_refused(name: str) -> None:
    """By Transformers, whose message says what to use."""
    model = next(f for f in PRESENT if f.name == "llama").build(name)
    message = "Implementation stof is not supported for continuous batching. Use 'paged|eager'"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate_batch(
            inputs=[[5, 6, 7]],
            generation_config=transformers.GenerationConfig(eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                auto_switch_to_flash=False
            ),
        )


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.23"),
    reason="Transformers 5.23 refuses the name",
)
@by_name([f for f in PRESENT if f.name in ("llama", "mistral", "gemma3")])
def test_continuous_batching(family: Family) -> None:
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 14, 9)]
    settings = transformers.GenerationConfig(
        max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model = family.build("eager")
    expected = [
        model.generate(torch.tensor([p]), generation_config=settings)[0, len(p) :].tolist()
        for p in prompts
    ]
    batch = family.build("stof").generate_batch(inputs=prompts, generation_config=settings)
    assert [out.generated_tokens for out in batch.values()] == expected


COMPILED = ["bert", "llama", "gemma2", "t5", "vit", "layoutlm", "bridgetower"]


@by_name([f for f in PRESENT if f.name in COMPILED])
def test_compile_fullgraph(family: Family) -> None:
    if "compile" in family.skip:
        pytest.skip(family.skip["compile"])
    inputs = inputs_of(family) if family.kind not in TEXT_KINDS else padded(family, "right")[0]
    rows = None if family.kind not in TEXT_KINDS else padded(family, "right")[1]
    model = family.build("eager")
    expected = output(model, inputs)
    model.set_attn_implementation("stof")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(**inputs)[0]
    assert error(expected, actual, rows) <= TOLERANCE
