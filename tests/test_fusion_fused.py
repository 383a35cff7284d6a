"""Replaced layers beside what users do with models: adapters, hooks, dtypes, saving, recording."""

import copy
import itertools
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from layers import blocks, build, first, inputs_of, interpreted
from safetensors.torch import save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import stof_hf
from stof_hf.errors import StofWarning, UnsupportedError
from stof_hf.fusion import fused
from stof_hf.fusion.fused import Choice
from stof_hf.fusion.install import find, install, restore
from stof_hf.fusion.layer_ops import SEGMENTS, Scheme, schemes
from stof_hf.fusion.runners import TEMPLATES
from stof_hf.tuning import cache

pytestmark = pytest.mark.usefixtures("fresh_warnings")


@pytest.fixture(params=["bert", "llama"])
def model(request):
    return build(request.param)


@pytest.fixture
def inputs(model):
    return inputs_of(model)


def projections(model):
    """Parents, names and modules of the projections that are packed."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in ("query", "key", "value", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    ]


def runs_fused(model, inputs, want=None, **tolerance):
    """Run; whether all layers ran fused, none of them, or the number of those that did."""
    count, run = 0, fused.Fused.run

    def counted(*args):
        nonlocal count
        out = run(*args)
        count += out is not None
        return out

    fused.Fused.run = counted
    try:
        out = first(model, inputs)
    finally:
        fused.Fused.run = run
    if want is not None:
        torch.testing.assert_close(out, want, **tolerance)
    return count == 2 if count in (0, 2) else count


# A projection of the first layer.
PROJECTIONS = {
    "bert": "layer.0.attention.self.query",
    "llama": "layers.0.self_attn.q_proj",
    "gpt2": "h.0.attn.c_attn",
    "t5": "block.0.layer.0.SelfAttention.q",
    "vit": "layers.0.attention.q_proj",
    "modernbert": "layers.0.attn.Wqkv",
}
every_kind = pytest.mark.parametrize("model", PROJECTIONS, indirect=True)
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


def adapted(model):
    """With LoRA of random weights on a projection of the first layer."""
    name = model.config.model_type
    config = peft.LoraConfig(
        target_modules=[PROJECTIONS[name]], init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    return peft.get_peft_model(model, config).eval()


@every_kind
def test_an_adapter_runs_the_layers_own_code_until_it_is_merged_and_unloaded(model, inputs):
    install(blocks(model))
    before = first(model, inputs)
    with_adapter = adapted(model)
    plain = copy.deepcopy(model)
    restore(plain)
    want = first(plain, inputs)
    assert not torch.allclose(want, before)
    with pytest.warns(StofWarning, match="peft.tuners.lora.layer.Linear, not nn.Linear") as caught:
        for change in (lambda: None, with_adapter.merge_adapter, with_adapter.unmerge_adapter):
            change()
            assert runs_fused(model, inputs, want, **ROUNDING) == 1
    assert len([w for w in caught if w.category is StofWarning]) == 1
    assert with_adapter.merge_and_unload() is model
    assert runs_fused(model, inputs, want, **ROUNDING) is True


def test_an_adapter_that_is_unloaded_leaves_no_trace(model, inputs):
    want = first(model, inputs)
    install(blocks(model))
    with_adapter = adapted(model)
    with pytest.warns(StofWarning):
        first(model, inputs)
    with_adapter.unload()
    assert runs_fused(model, inputs, want) is True


@every_kind
def test_layers_with_adapters_are_left_alone(model):
    adapted(model)
    found = blocks(model)
    assert [layer.reason is None for layer in found] == [False, True]
    assert "is a peft.tuners.lora.layer.Linear, not nn.Linear" in found[0].reason
    assert install(found) == [found[1].name]


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_quantised_layers_are_left_alone(model, inputs, kind):
    quantised = pytest.importorskip("bitsandbytes").nn
    parent, name, linear = projections(model)[0]
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    layer = getattr(quantised, kind)(64, 64, bias=linear.bias is not None, **options)
    layer.load_state_dict(linear.state_dict())
    setattr(parent, name, layer.to("cpu"))
    want = first(model, inputs)
    found = blocks(model)
    assert f"is a bitsandbytes.nn.modules.{kind}, not nn.Linear" in found[0].reason
    assert install(found) == [found[1].name]
    assert runs_fused(model, inputs, want, **ROUNDING) == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(model, inputs, where, when, tmp_path):
    want = first(model, inputs)
    if when == "after":
        install(blocks(model))
        assert runs_fused(model, inputs, want) is True
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    if when == "after":
        with pytest.warns(
            StofWarning, match="has a forward of its own .tensor parallel, offloaded"
        ):
            assert runs_fused(model, inputs, want) is False
    assert all("offloaded" in found.reason for found in blocks(model))
    assert not install(blocks(model))
    assert runs_fused(model, inputs, want) is False
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


@pytest.mark.parametrize(
    "dtype, convert",
    [
        (torch.float16, lambda model: model.half()),
        (torch.bfloat16, lambda model: model.bfloat16()),
        (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
    ],
    ids=["half", "bfloat16", "to"],
)
@every_kind
def test_another_dtype(model, inputs, dtype, convert):
    install(blocks(model))
    first(model, inputs)
    convert(model)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    plain = copy.deepcopy(model)
    restore(plain)
    want = first(plain, inputs)
    with pytest.warns(StofWarning, match=f"tuned for torch.float32, its weights are {dtype}"):
        assert runs_fused(model, inputs, want) is False
    install(blocks(model))
    assert runs_fused(model, inputs, want, rtol=5e-2, atol=5e-2) is True
    model.to(torch.float32)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    with pytest.warns(StofWarning, match=f"tuned for {dtype}"):
        assert runs_fused(model, inputs) is False


def test_weights_that_move_are_packed_again(model, inputs):
    want = first(model, inputs)
    install(blocks(model))
    first(model, inputs)
    # What .to() to another device and back does.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert runs_fused(model, inputs, want) is True
    model.to("cpu", torch.float32)
    assert runs_fused(model, inputs, want) is True


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(model, inputs, assign):
    other = build(model.config.model_type)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    install(blocks(model))
    first(model, inputs)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert runs_fused(model, inputs, first(other, inputs)) is True


def test_packed_weights_are_the_only_copy_and_can_be_saved(model, inputs, tmp_path):
    want, keys = first(model, inputs), list(model.state_dict())
    install(blocks(model))
    first(model, inputs)
    places = [child.weight.data_ptr() for _, _, child in projections(model)]
    sizes = [child.weight.nbytes for _, _, child in projections(model)]
    assert places[1] == places[0] + sizes[0]
    assert list(model.state_dict()) == keys
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    save_file(
        {k: v for k, v in model.state_dict().items() if "lm_head" not in k}, tmp_path / "a.st"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="stof").eval()
    assert not any("_stof" in name for name in loaded.state_dict())
    assert torch.equal(first(loaded, inputs), want)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert runs_fused(whole, inputs, want) is True
    restore(model)
    assert projections(model)[1][2].weight.data_ptr() != places[1]
    assert torch.equal(first(model, inputs), want)


def test_copies_do_not_share_weights(model, inputs):
    install(blocks(model))
    first(model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    assert runs_fused(other, inputs) is True
    assert not torch.allclose(first(other, inputs), first(model, inputs))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_functions(model, inputs, implementation):
    model.set_attn_implementation(implementation)
    want = first(model, inputs)
    install(blocks(model))
    assert runs_fused(model, inputs, want) is True


@every_kind
def test_attentions_are_recorded_by_the_layers_own_code(model, inputs):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(**inputs, output_attentions=True, output_hidden_states=True)
        install(blocks(model))
        got = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(got.attentions) == 2 and torch.equal(got.attentions[1], want.attentions[1])
    assert len(got.hidden_states) == 3
    # The hooks that record stay where they are, and do no harm.
    assert runs_fused(model, inputs, want[0]) is True
    fresh = build(model.config.model_type, "eager")
    install(blocks(fresh))
    with torch.no_grad():
        got = fresh(**inputs, output_attentions=True)
    assert len(got.attentions) == 2 and runs_fused(fresh, inputs) is True


def test_training_mode_and_gradients(model, inputs):
    model.set_attn_implementation("sdpa")
    install(blocks(model))
    model.train()
    assert runs_fused(model, inputs) is False
    model.eval()
    assert runs_fused(model, inputs) is True
    model(**inputs)[0].sum().backward()
    assert all(child.weight.grad is not None for _, _, child in projections(model))


def test_dropout_that_samples_in_evaluation():
    model = build("bert")
    inputs = inputs_of(model)
    install(blocks(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with pytest.warns(StofWarning, match="dropout"):
        assert runs_fused(model, inputs) is False


def test_forward_hooks(model, inputs):
    install(blocks(model))
    first(model, inputs)
    seen = []
    _, name, linear = projections(model)[0]
    handle = linear.register_forward_hook(lambda *args: seen.append(name))
    with pytest.warns(StofWarning, match="has forward hooks"):
        assert runs_fused(model, inputs) == 1
    assert seen == [name] and "has forward hooks" in blocks(model)[0].reason
    handle.remove()
    assert runs_fused(model, inputs) is True


def test_hooks_on_layers_run(model, inputs):
    install(blocks(model))
    seen = []
    for found in blocks(model):
        found.module.register_forward_hook(lambda *args: seen.append(1))
    assert runs_fused(model, inputs) is True and len(seen) == 2


def test_tied_projections_are_left_alone(model):
    linears = [child for _, _, child in projections(model)]
    linears[0].weight = linears[-1].weight
    assert all("tied" in found.reason for found in blocks(model))


def test_weights_that_kernels_cannot_read_are_left_alone(model):
    parent, name, linear = projections(model)[1]
    weight = linear.weight
    for data, why in (
        (TwoTensor(weight.detach(), weight.detach()), "is a TwoTensor"),
        (weight.detach().to("meta"), "is offloaded"),
        (weight.detach().double(), "is torch.float64"),
        (torch.cat([weight, weight]).detach()[: len(weight)], "part of another tensor"),
        (weight.detach().bfloat16(), "unlike"),
    ):
        linear.weight = nn.Parameter(data)
        found = blocks(model)
        assert why in found[0].reason and found[1].reason is None
        assert install(found) == [found[1].name]
        restore(model)


def test_autocast_runs_the_layers_own_code(model, inputs):
    install(blocks(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert runs_fused(model, inputs) is False


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_t5_decoders(projection, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        feed_forward_proj=projection, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.set_attn_implementation("stof")
    inputs = inputs_of(model, 20)
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(**inputs, **options)
    called = inputs | {"decoder_input_ids": inputs["input_ids"][:, :9]}
    logits = first(model, called)
    found = blocks(model)
    assert len(install(found)) == 4
    torch.testing.assert_close(first(model, called), logits)
    assert torch.equal(model.generate(**inputs, **options), want)
    restore(model)
    report = stof_hf.tune(model, batch_size=2, seq_len=16, budget_s=1, progress=False)
    assert not report.skipped and len(report.layers) == 2
    torch.testing.assert_close(first(model, called), logits)
    with pytest.raises(UnsupportedError, match="has an encoder"):
        stof_hf.tune(model, phase="prefill", progress=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_and_compiling_see_the_layers_own_code(model, inputs):
    want = first(model, inputs)
    install(blocks(model))
    model.set_attn_implementation("sdpa")
    compiled = torch.compile(model, backend="eager")
    assert runs_fused(compiled, inputs) is False
    torch.testing.assert_close(first(compiled, inputs), want)
    model.requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(lambda ids: model(ids, use_cache=False)[0], inputs["input_ids"])
    again = torch.randint(3, 97, (2, 50))
    torch.testing.assert_close(traced(again), first(model, {"input_ids": again}))


def test_replicas_run_their_own_code(model, inputs):
    install(blocks(model))
    want = first(model, inputs)
    found = blocks(model)[0]
    replica = found.module._replicate_for_data_parallel()
    replica._modules = copy.deepcopy(dict(found.module._modules))
    with torch.no_grad():
        for parameter in nn.ModuleDict(replica._modules).parameters():
            parameter.zero_()
    assert vars(replica)["_stof_fused"].run(replica, None, torch.zeros(1, 2, 64), None) is None
    assert runs_fused(model, inputs, want) is True


def test_another_class_runs_its_own_code(model, inputs):
    """As FSDP gives layers one, and weights that come and go."""
    install(blocks(model))
    want = first(model, inputs)
    for found in blocks(model):
        module = found.module
        module.__class__ = type("FSDP" + type(module).__name__, (type(module),), {})
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    with pytest.warns(StofWarning, match="another class"):
        assert runs_fused(model, inputs, want) is False


def test_other_attention_functions_leave_layers_alone(model):
    model.config._attn_implementation_internal = "flash_attention_2"
    assert all("flash_attention_2" in found.reason for found in blocks(model))


def test_loaded_weights_can_be_packed(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="stof").eval()
    assert len(install(blocks(loaded))) == 2
    assert runs_fused(loaded, inputs, first(model, inputs)) is True


def test_a_patch_may_decline():
    model = build("gpt2")
    model.config.reorder_and_upcast_attn = True
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    assert all("float32" in found.reason for found in blocks(model))


def test_inference_mode(model, inputs):
    want = first(model, inputs)
    install(blocks(model))
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs)[0], want)
    model(**inputs)[0].sum().backward()
    model.load_state_dict(model.state_dict())
    assert runs_fused(model, inputs, want) is True


def test_unknown_arguments_run_the_layers_own_code(model, inputs):
    install(blocks(model))
    layer = blocks(model)[0].module
    layer.__dict__["_stof_fused"].run = None  # nothing may call it
    hidden = torch.randn(2, 9, 64)
    extra = {}
    if model.config.model_type == "llama":
        extra["position_embeddings"] = model.model.rotary_emb(hidden, torch.arange(9)[None])
    with torch.no_grad():
        layer(hidden, unheard_of=1, **extra)


def test_a_choice_that_does_not_fit_is_an_error(model):
    found = blocks(model)[0]
    names = found.layer.names
    scheme = Scheme.unfused(names)
    weights, device = fused.Weights.of(found.layer), torch.device("cpu")
    good = Choice.unfused(found.layer)
    assert len(fused.steps_of(found.layer, good, weights, (1, 8), device)) == len(names)
    for bits, segments in {
        "01": good.segments,
        scheme.bits: good.segments[1:],
        "0" * len(names): (("torch", {}),),
        schemes(names)[0].bits: (("nonsense", {}),) * len(schemes(names)[0].segments),
    }.items():
        with pytest.raises(UnsupportedError, match="tune again"):
            fused.steps_of(found.layer, Choice(bits, segments), weights, (1, 8), device)


def test_every_segment_names_templates():
    assert {name for names in SEGMENTS.values() for name in names} == set(TEMPLATES)


TEXT = ("bert", "gpt2", "llama", "modernbert", "qwen2", "t5")


@interpreted
@pytest.mark.parametrize("name, which", [
    *itertools.product((*TEXT, "vit"), ("longest", "cut at norms")),
    *itertools.product(TEXT, ("one row",)),
])  # fmt: skip
def test_templates_compute_what_the_layers_do(name, which):
    """Through Triton's interpreter, with default parameters."""
    model = build(name)
    inputs = inputs_of(model, 20)
    rows, preferred = 40, "gemm"
    if which == "one row":
        inputs = {"input_ids": inputs["input_ids"][:1, :1]}
        rows, preferred = 1, "gemv"
    want = first(model, inputs)
    found = find(model)
    choices = {}
    for one in found:
        if one.reason is not None:
            continue
        possible = schemes(one.layer.names)
        if which == "cut at norms":
            possible = [s for s in possible if ("norm",) in s.segments or ("residual", "norm")
                        in s.segments or ("bias", "residual", "norm") in s.segments]  # fmt: skip
            # The first product of a ViT has no norm behind it.
            possible = possible or schemes(one.layer.names)
        runs = {}
        best = min(possible, key=lambda s: len(s.sizes))
        for segment in best.segments:
            known = [n for n in SEGMENTS[segment] if TEMPLATES[n].serves(rows)]
            chosen = preferred if preferred in known else known[0]
            runs[segment] = chosen, (None if chosen != "torch" else {})
        choices[one.kind] = {rows: Choice.of(best, runs)}
    names = install(found, choices)
    assert runs_fused(model, inputs, want, rtol=2e-4, atol=2e-4) in (True, len(names))


@interpreted
def test_what_computes_one_row_is_for_one_row():
    model = build("llama")
    one, few, many = (Choice("0" * 11, ((name, None),)) for name in ("gemv", "torch", "gemm"))
    assert (one.serves(1), one.serves(2), many.serves(2)) == (True, False, True)
    kept = fused.Fused({1: one, 64: many}, torch.float32)
    assert (kept.nearest(1), kept.nearest(2), kept.nearest(1000)) == (one, many, many)
    assert fused.Fused({1: one}, torch.float32).nearest(2) is None
    assert fused.Fused({1: one, 2: None}, torch.float32).nearest(3) is None
    assert fused.Fused({1: few}, torch.float32).nearest(300) is few

    # Another number of rows runs the layers' own code, without a word.
    found = blocks(model)
    layer = found[0].layer
    scheme = Scheme.unfused(layer.names)
    runs = {segment: ("torch", {}) for segment in scheme.segments}
    runs[("attention",)] = "attention", {}
    runs[("gemm",)] = "gemv", None
    inputs = {"input_ids": inputs_of(model, 5)["input_ids"]}
    first_token = {"input_ids": inputs["input_ids"][:1, :1]}
    wanted = [first(model, each) for each in (inputs, first_token)]
    install(found, {one.kind: {1: Choice.of(scheme, runs)} for one in found})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runs_fused(model, inputs, wanted[0], rtol=0, atol=0)
        assert runs_fused(model, first_token, wanted[1], rtol=2e-4, atol=2e-4)
    with pytest.raises(UnsupportedError, match="'gemv' does not compute 8 rows"):
        fused.steps_of(
            layer, Choice.of(scheme, runs), fused.Weights.of(layer), (2, 4), torch.device("cpu")
        )
