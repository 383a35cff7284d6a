"""`set_pattern`: sparse patterns on top of a model's own mask, saved with the model."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, inputs_of
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CompileConfig

import stof_hf
from stof_hf import UnsupportedError, patterns
from stof_hf.hf.attention import stof_attention
from stof_hf.hf.patching import is_cross_attention, matches

LONG = patterns.Longformer(window=2, global_tokens=(0,))


def family(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def values(pattern: patterns.Pattern, q_len: int, kv_len: int | None = None) -> torch.Tensor:
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len or q_len)
    return pattern.bind(kv_len or q_len)(0, 0, q, k)


def run(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", ["bert", "albert", "splinter", "llama", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_forward_equals_the_same_dense_mask(name: str, padded: bool) -> None:
    model = family(name).build("eager")
    ids = inputs_of(family(name))["input_ids"]
    length = ids.shape[1]
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 15:] = 0
    pattern = patterns.SlidingWindow(3, 2)
    allowed = values(pattern, length)[None, None] & mask[:, None, None, :].bool()
    if name in ("llama", "gpt2"):
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    expected = run(model, input_ids=ids, attention_mask=additive(allowed))
    dense = run(model, input_ids=ids)
    stof_hf.set_pattern(model, pattern)
    actual = run(model, input_ids=ids, **({"attention_mask": mask} if padded else {}))
    rows = mask.bool()
    assert close(expected[rows], actual[rows])
    assert not close(dense, actual)
    stof_hf.set_pattern(model, None)
    assert close(dense, run(model, input_ids=ids))


def test_masks_of_one_query_and_a_pattern() -> None:
    model = family("bert").build("stof")
    stof_hf.set_pattern(model, LONG)
    q, k, v = torch.randn(3, 2, 4, 20, 8).unbind()
    padding = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    padding[1, ..., 15:] = False
    layer = model.encoder.layer[0].attention.self
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=padding & values(LONG, 20)
    ).transpose(1, 2)
    for mask in (padding, additive(padding)):
        assert close(expected, stof_attention(layer, q, k, v, mask)[0])


def test_masks_without_positions_and_a_pattern() -> None:
    """Keys that T5Gemma 2 puts together from both sequences have no positions."""
    model = family("t5gemma2").build("stof")
    stof_hf.set_pattern(model, patterns.SlidingWindow(2, 2))
    with pytest.raises(UnsupportedError, match="needs the positions of its 9 queries among 30"):
        run(model, **inputs_of(family("t5gemma2")))
    stof_hf.set_pattern(model, None)
    stof_hf.set_pattern(model, patterns.SlidingWindow(2, 2), modules="model.encoder")
    run(model, **inputs_of(family("t5gemma2")))


def test_patterns_add_up_and_modules_are_chosen_by_name() -> None:
    model = family("bert").build("stof")
    ids = inputs_of(family("bert"))["input_ids"]
    narrow, left = patterns.SlidingWindow(2, 2), patterns.Causal()
    stof_hf.set_pattern(model, narrow)
    stof_hf.set_pattern(model, left, modules="encoder.layer.1")
    eager = family("bert").build("eager")
    masks = [additive(values(narrow, ids.shape[1])), additive(values(narrow & left, ids.shape[1]))]
    for layer, mask in zip(eager.encoder.layer, masks, strict=True):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (
                (args[0], mask[None, None], *args[2:]),
                kwargs,
            ),
            with_kwargs=True,
        )
    assert close(run(eager, input_ids=ids), run(model, input_ids=ids))


def test_t5_self_attention_only() -> None:
    """Encoder and decoder get the pattern, cross-attention does not."""
    model = family("t5").build("eager")
    inputs = inputs_of(family("t5"))
    n_enc, n_dec = inputs["input_ids"].shape[1], inputs["decoder_input_ids"].shape[1]
    causal = torch.ones(n_dec, n_dec, dtype=torch.bool).tril()
    # In T5 one mask serves the encoder and cross-attention, so the encoder runs on its own.
    encoded = run(model.encoder, input_ids=inputs["input_ids"],
                  attention_mask=additive(values(LONG, n_enc)[None, None]))  # fmt: skip
    expected = run(model, encoder_outputs=(encoded,), decoder_input_ids=inputs["decoder_input_ids"],
                   decoder_attention_mask=additive((values(LONG, n_dec) & causal)[None, None]),
                   )  # fmt: skip
    stof_hf.set_pattern(model, LONG)
    assert model.encoder.config.stof == model.decoder.config.stof == model.config.stof
    assert close(expected, run(model, **inputs))


def test_t5_generate_with_patterns() -> None:
    model = family("t5").build("stof")
    ids = inputs_of(family("t5"))["input_ids"]
    stof_hf.set_pattern(model, LONG)
    options = {
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(ids, use_cache=True, **options)
    full = model.generate(ids, use_cache=False, **options)
    assert close(torch.stack(cached.logits), torch.stack(full.logits))


def test_cross_attention_pattern() -> None:
    model = family("t5").build("stof")
    inputs = inputs_of(family("t5"))
    dense = run(model, **inputs)
    stof_hf.set_pattern(model, patterns.SlidingWindow(1, 3), kind="cross")
    stamped = [
        n
        for n, m in model.named_modules()
        if "_stof_stamp" in m.__dict__ and n.endswith("Attention")
    ]
    assert stamped == [
        f"decoder.block.{i}.layer.1.{m}" for i in (0, 1) for m in ("EncDecAttention",)
    ]
    assert not close(dense, run(model, **inputs))
    with pytest.raises(stof_hf.UnsupportedError, match="one by one"):
        model.generate(inputs["input_ids"], max_new_tokens=3, min_new_tokens=3)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "compiled"])
def test_generate_equals_full_forward(name: str, cache: str) -> None:
    model = family(name).build("stof")
    ids = inputs_of(family(name), length=12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    pattern = patterns.Longformer(window=3, global_tokens=(0, 5))
    stof_hf.set_pattern(model, pattern)
    options: dict[str, Any] = {"disable_compile": True}
    if cache == "compiled":
        torch._dynamo.reset()
        compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
        compile_config._compile_all_devices = True
        options = {"compile_config": compile_config}
    if cache != "dynamic":
        options["cache_implementation"] = "static"
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    full_mask = torch.cat([mask, torch.ones(2, 20, dtype=mask.dtype)], 1)
    position_ids = (full_mask.cumsum(-1) - 1).clamp(min=0)
    logits = run(model, input_ids=out.sequences, attention_mask=full_mask,
                 position_ids=position_ids, use_cache=False)  # fmt: skip
    assert close(torch.stack(out.logits, 1), logits[:, 11:-1])
    stof_hf.set_pattern(model, None)
    dense = run(model, input_ids=out.sequences, attention_mask=full_mask, position_ids=position_ids)
    assert not close(dense, logits)


def test_256_tokens_compile_at_most_two_graphs() -> None:
    model = family("llama").build("stof")
    stof_hf.set_pattern(model, patterns.SlidingWindow(30, 0))
    ids = inputs_of(family("llama"), length=12)["input_ids"]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    model.generate(
        ids, max_new_tokens=256, min_new_tokens=256, do_sample=False,
        cache_implementation="static", compile_config=compile_config,
    )  # fmt: skip
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_vision_language_model(tmp_path: Path) -> None:
    """A pattern on the language model alone, by name, and on everything."""
    model = family("llava").build("stof")
    inputs = inputs_of(family("llava"))
    dense = run(model, **inputs)
    stof_hf.set_pattern(model, patterns.SlidingWindow(4, 0), modules="*language_model*")
    text_only = run(model, **inputs)
    assert not close(dense, text_only)
    assert model.config.text_config.stof == model.config.vision_config.stof == model.config.stof
    vision = (
        model.get_submodule("model.vision_tower") if hasattr(model, "model") else model.vision_tower
    )
    assert not any("_stof_stamp" in m.__dict__ for m in vision.modules())
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert close(text_only, run(reloaded, **inputs))
    stof_hf.set_pattern(model, None)
    stof_hf.set_pattern(model, patterns.SlidingWindow(4, 4))
    assert not close(text_only, run(model, **inputs))


def test_save_and_load_keep_the_pattern(tmp_path: Path) -> None:
    model = family("llama").build("stof")
    ids = inputs_of(family("llama"))["input_ids"]
    stof_hf.set_pattern(model, LONG, modules=["model.layers.0"])
    expected = run(model, input_ids=ids)
    model.save_pretrained(tmp_path / "1")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    assert once.config._attn_implementation == "stof"
    assert close(expected, run(once, input_ids=ids))
    once.save_pretrained(tmp_path / "2")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    assert close(expected, run(twice, input_ids=ids))
    base = AutoModel.from_pretrained(tmp_path / "2")
    with torch.no_grad():
        assert close(expected, model.lm_head(base(input_ids=ids)[0]))
    from_config = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "2"))
    assert from_config.config._attn_implementation == "stof"
    stof_hf.set_pattern(twice, None)
    twice.save_pretrained(tmp_path / "3")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "3")
    assert plain.config._attn_implementation != "stof"
    assert not hasattr(plain.config, "stof")


def test_t5_save_and_load(tmp_path: Path) -> None:
    model = family("t5").build("stof")
    inputs = inputs_of(family("t5"))
    stof_hf.set_pattern(model, LONG, modules="encoder.*")
    expected = run(model, **inputs)
    model.save_pretrained(tmp_path)
    assert close(expected, run(type(model).from_pretrained(tmp_path), **inputs))


def test_loading_without_stof_hf_fails(tmp_path: Path) -> None:
    model = family("bert").build("stof")
    stof_hf.set_pattern(model, LONG)
    model.save_pretrained(tmp_path)
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "stof" in result.stderr.splitlines()[-1] and "ValueError" in result.stderr


def test_loading_compiles_with_the_pattern(tmp_path: Path) -> None:
    model = family("bert").build("stof")
    ids = inputs_of(family("bert"))["input_ids"]
    stof_hf.set_pattern(model, LONG)
    expected = run(model, input_ids=ids)
    model.save_pretrained(tmp_path)
    torch._dynamo.reset()
    compiled = torch.compile(
        AutoModel.from_pretrained(tmp_path).eval(), fullgraph=True, backend="eager"
    )
    assert close(expected, run(compiled, input_ids=ids))


def test_switching_away_warns(tmp_path: Path) -> None:
    model = family("bert").build("stof")
    stof_hf.set_pattern(model, LONG)
    with pytest.warns(stof_hf.StofWarning, match="sparse attention patterns"):
        model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    with pytest.warns(stof_hf.StofWarning, match="sparse attention patterns"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error", stof_hf.StofWarning)
        assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "stof"


def test_function_patterns_need_persist_false() -> None:
    model = family("llama").build("stof")
    ids = inputs_of(family("llama"))["input_ids"]
    dense = torch.rand(ids.shape[1], ids.shape[1]) < 0.5
    dense.fill_diagonal_(True)
    for pattern in (patterns.Custom(lambda b, h, q, k: (q - k) % 2 == 0), patterns.Dense(dense)):
        with pytest.raises(stof_hf.MaskError, match="persist=False"):
            stof_hf.set_pattern(model, pattern)
        assert not hasattr(model.config, "stof")
        stof_hf.set_pattern(model, pattern, persist=False)
        eager = family("llama").build("eager")
        allowed = (
            values(pattern, ids.shape[1])
            & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        )
        assert close(run(eager, input_ids=ids, attention_mask=additive(allowed[None, None])),
                     run(model, input_ids=ids))  # fmt: skip
        stof_hf.set_pattern(model, None)


def test_patterns_per_head() -> None:
    model = family("bert").build("eager")
    ids = inputs_of(family("bert"))["input_ids"]
    n = ids.shape[1]
    dense = torch.rand(1, 4, n, n, generator=torch.Generator().manual_seed(0)) < 0.4
    dense |= torch.eye(n, dtype=torch.bool)
    expected = run(model, input_ids=ids, attention_mask=additive(dense))
    stof_hf.set_pattern(model, patterns.Dense(dense), persist=False)
    assert close(expected, run(model, input_ids=ids))


def test_patterns_on_a_part_add_to_those_of_the_whole() -> None:
    """A pattern set on a part of a model adds to the whole model's."""
    model = family("t5").build("stof")
    inputs = inputs_of(family("t5"))
    stof_hf.set_pattern(model, patterns.SlidingWindow(6, 6))
    whole = run(model, **inputs)
    stof_hf.set_pattern(model.encoder, patterns.SlidingWindow(1, 1), modules="block.0")
    part = run(model, **inputs)
    assert not close(whole, part)
    stof_hf.set_pattern(model, None)
    stof_hf.set_pattern(model, patterns.SlidingWindow(6, 6))
    stof_hf.set_pattern(model, patterns.SlidingWindow(1, 1), modules="encoder.block.0")
    assert close(part, run(model, **inputs))


def test_parts_that_do_not_use_stof_keep_their_choice(tmp_path: Path) -> None:
    model = family("llava").build("eager")
    inputs = inputs_of(family("llava"))
    model.set_attn_implementation({"text_config": "stof"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", stof_hf.StofWarning)
        stof_hf.set_pattern(model, patterns.SlidingWindow(4, 0))
        expected = run(model, **inputs)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.text_config._attn_implementation == "stof"
    assert loaded.config.vision_config._attn_implementation == "eager"
    assert close(expected, run(loaded, **inputs))


def test_a_pattern_shorter_than_the_sequence() -> None:
    model = family("llama").build("stof")
    ids = inputs_of(family("llama"), length=12)["input_ids"]
    for pattern in (
        patterns.Dense(torch.ones(14, 14, dtype=torch.bool)),
        patterns.Documents([0] * 6 + [1] * 8),
    ):
        stof_hf.set_pattern(model, pattern, persist=False)
        model.generate(ids, max_new_tokens=2, min_new_tokens=2)
        with pytest.raises(stof_hf.MaskError, match="is for 14 positions"):
            model.generate(ids, max_new_tokens=6, min_new_tokens=6)
        stof_hf.set_pattern(model, None)


def test_settings_that_cannot_be_applied_when_loading(tmp_path: Path) -> None:
    model = family("bert").build("stof")
    ids = inputs_of(family("bert"))["input_ids"]
    stof_hf.set_pattern(model, LONG, modules="encoder.layer.1")
    model.config.stof["patterns"][0]["modules"] = ["encoder.layer.7"]
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for _ in range(2):
        with pytest.raises(stof_hf.MaskError, match="no module is named"):
            run(loaded, input_ids=ids)
    stof_hf.set_pattern(loaded, None)
    run(loaded, input_ids=ids)
    model.config.stof["version"] = 2
    model.save_pretrained(tmp_path)
    with pytest.raises(stof_hf.MaskError, match="format 2"):
        AutoModel.from_pretrained(tmp_path)


def test_copies_carry_the_pattern() -> None:
    model = family("bert").build("stof")
    ids = inputs_of(family("bert"))["input_ids"]
    dense = run(model, input_ids=ids)
    stof_hf.set_pattern(model, LONG)
    copied = copy.deepcopy(model)
    stof_hf.set_pattern(model, None)
    assert close(dense, run(model, input_ids=ids))
    assert not close(dense, run(copied, input_ids=ids))
    stof_hf.set_pattern(copied, None)
    assert close(dense, run(copied, input_ids=ids))


def test_names() -> None:
    assert matches("*.layers.0", "model.layers.0.self_attn") and not matches(
        "*.layers.0", "model.layers.01.x"
    )
    assert matches("encoder", "encoder.layer.0") and not matches("layer.0", "encoder.layer.0")
    linear = torch.nn.Linear(1, 1)
    for name in (
        "decoder.block.0.layer.1.EncDecAttention",
        "layers.1.encoder_attn",
        "layer.0.crossattention",
    ):
        assert is_cross_attention(linear, name)
    for name in (
        "encoder.layer.0.attention.self",
        "decoder.layers.0.self_attn",
        "encoder_decoder.layers.0.attn",
    ):
        assert not is_cross_attention(linear, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": "no.such.layer"}, "no module is named"),
        ({"kind": "both"}, "kind must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(stof_hf.MaskError, match=message):
        stof_hf.set_pattern(family("bert").build("stof"), LONG, **arguments)
