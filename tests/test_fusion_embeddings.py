"""Embeddings as layers: what is looked up and cut into patches, and what runs their own code."""

import copy
import doctest
import pickle

import pytest
import torch
from layers import build, first, inputs_of, interpreted
from torch import nn

import stof_hf
from stof_hf.errors import StofWarning
from stof_hf.fusion import embeddings
from stof_hf.fusion.fused import Choice
from stof_hf.fusion.install import find, install, replaced, restore
from stof_hf.fusion.layer_ops import schemes

TEXT = ["bert", "roberta", "electra", "distilbert", "modernbert"]
each_text = pytest.mark.parametrize("name", TEXT)
each = pytest.mark.parametrize("name", [*TEXT, "vit"])
pytestmark = pytest.mark.usefixtures("fresh_warnings")


def embedding_of(model):
    (found,) = (found for found in find(model) if "embeddings" in found.name)
    return found


def by_template(found):
    """Everything in one kernel, where there is one."""
    names = found.layer.names
    best = schemes(names)[0]
    name = "embed" if names[0] == "embed" else "gemm"
    return {found.kind: {1: Choice.of(best, {best.segments[0]: (name, None)})}}


def replace(model, templates):
    found = embedding_of(model)
    install([found], by_template(found) if templates else None)
    return found.module


ways = pytest.mark.parametrize(
    "templates", [False, pytest.param(True, marks=interpreted)], ids=["torch", "template"]
)


def ids(*shape, below=97, seed=1, **kwargs):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(0, below, shape, generator=drawn, **kwargs)


CALLS = {
    "nothing else": {},
    "positions": {"position_ids": ids(2, 9, below=40)},
    "positions for all": {"position_ids": ids(1, 9, below=40)},
    "types": {"token_type_ids": ids(2, 9, below=2)},
    "types for all": {"token_type_ids": ids(1, 9, below=2)},
    "both": {"token_type_ids": ids(2, 9, below=2), "position_ids": ids(2, 9, below=40)},
    "past": {"past_key_values_length": 7},
    "past and types": {"past_key_values_length": 7, "token_type_ids": ids(2, 9, below=2)},
}


@ways
@each_text
@pytest.mark.parametrize("of_ids", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("call", CALLS)
def test_text(name, templates, of_ids, call, ran):
    model = build(name)
    own = embedding_of(model).module
    known = type(own).forward.__code__.co_varnames
    call = {key: value for key, value in CALLS[call].items() if key in known}
    tokens = ids(2, 9, dtype=of_ids)
    # Padding, which RoBERTa does not count.
    tokens[0, :3] = 1
    with torch.no_grad():
        want = own(input_ids=tokens, **call)
        module = replace(model, templates)
        near = {"atol": 1e-5, "rtol": 1e-5} if templates else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(module(input_ids=tokens, **call), want, **near)
        torch.testing.assert_close(module(tokens, **call), want, **near)
        # A step of decoding, and tokens that lie apart.
        for some in (tokens[:, :1], tokens[:1].T):
            torch.testing.assert_close(
                module(some), type(module).replaced.forward(module, some), **near
            )
    assert ran == [module] * 4


@ways
def test_half_precision_is_rounded_once(templates):
    model = build("bert")
    tokens = ids(2, 9)
    with torch.no_grad():
        exact = embedding_of(model.half()).module.double()(tokens)
        module = replace(model.half(), templates)
        own = type(module).replaced.forward(module, tokens).double()
        error = (module(tokens).double() - exact).norm()
        assert error <= 1.01 * (own - exact).norm() < 1e-3 * exact.norm()


@ways
@pytest.mark.parametrize("size", [(28, 28), (12, 40)])
def test_images(templates, size, ran):
    model = build("vit")
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = embedding_of(model).module(pixels)
        module = replace(model, templates)
        for given in (
            pixels, pixels.to(memory_format=torch.channels_last),
            torch.randn(2, 5, *size)[:, 1:4].copy_(pixels),
        ):  # fmt: skip
            torch.testing.assert_close(module(given), want, atol=1e-5, rtol=1e-5)
    assert ran == [module] * 3


def test_whole_models_of_images(ran):
    model = build("vit")
    masked = torch.arange(49)[None] % 3 == 0
    calls = [{"bool_masked_pos": masked.expand(2, -1)}, {"interpolate_pos_encoding": True}, {}]
    model.embeddings.mask_token = nn.Parameter(torch.randn(1, 1, 64))
    inputs = inputs_of(model)
    want = [first(model, inputs | call) for call in calls]
    larger = {"pixel_values": torch.randn(1, 3, 56, 36), "interpolate_pos_encoding": True}
    resized = first(model, larger)
    module = replace(model, False)
    for call, out in zip(calls, want, strict=True):
        torch.testing.assert_close(first(model, inputs | call), out)
    torch.testing.assert_close(first(model, larger), resized)
    assert ran == [module] * 4


@pytest.mark.parametrize("shape", [(2, 3, 30, 28), (2, 3, 28, 29), (3, 28, 28)])
def test_images_that_are_not_cut_up_run_the_own_code(shape, ran):
    module = replace(build("vit"), False)
    own = type(module).replaced.forward
    pixels = torch.randn(shape)
    with torch.no_grad():
        try:
            want = own(module, pixels)
        except ValueError:
            with pytest.raises(ValueError, match="channel dimension"):
                module(pixels)
        else:
            assert torch.equal(module(pixels), want)
    assert not ran


@each_text
def test_what_is_not_looked_up_runs_the_own_code(name, ran):
    module = replace(build(name), False)
    own = type(module).replaced.forward
    rows = torch.randn(2, 9, 32 if name == "electra" else 64)
    call = {"input_ids": None, "inputs_embeds": rows}
    with torch.no_grad():
        assert torch.equal(module(**call), own(module, **call))
        for wrong in (torch.zeros(2, 9), ids(2, 600) if name != "modernbert" else ids(2).float()):
            with pytest.raises((RuntimeError, IndexError)):
                module(wrong)
    assert not ran


@each_text
def test_ids_outside_of_a_table_are_an_error_on_a_cpu(name):
    module = replace(build(name), False)
    with torch.no_grad(), pytest.raises(IndexError):
        module(torch.full((1, 4), 97))


@interpreted
@each_text
def test_ids_outside_of_a_table_give_nan_in_a_kernel(name):
    module = replace(build(name), True)
    tokens = ids(1, 4)
    tokens[0, 2] = 97
    with torch.no_grad():
        assert module(tokens).isnan().any(-1).tolist() == [[False, False, True, False]]


@each
def test_outputs_and_state_are_what_they_were(name, ran):
    model = build(name)
    inputs = inputs_of(model)
    want, state = first(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    module = replace(model, False)
    torch.testing.assert_close(first(model, inputs), want)
    assert list(model.state_dict()) == list(state)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ran.clear()
        torch.testing.assert_close(first(other, inputs), want)
        assert len(ran) == 1 and restore(other) == 1
    assert restore(model) == 1 and not list(replaced(model))
    assert torch.equal(first(model, inputs), want) and not hasattr(type(module), "replaced")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@each
def test_training_gradients_and_autocast_run_the_own_code(name, ran):
    model = build(name, "sdpa")
    inputs = inputs_of(model)
    module = replace(model, False)
    model(**inputs)[0].sum().backward()
    assert next(module.parameters()).grad is not None
    with torch.no_grad():
        model.train()(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            model.eval()(**inputs)
        assert not ran
        model(**inputs)
    assert ran == [module]


@each
def test_hooks_run(name, ran):
    model = build(name)
    inputs = inputs_of(model)
    module, seen = replace(model, False), []
    handle = next(module.children()).register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(StofWarning, match="has forward hooks"):
        want = first(model, inputs)
    assert seen == [1] and not ran and "has forward hooks" in embedding_of(model).reason
    handle.remove()
    module.register_forward_hook(lambda *args: seen.append(2))
    torch.testing.assert_close(first(model, inputs), want)
    assert seen == [1, 2] and ran == [module]


@each
def test_weights_that_change_are_seen(name, ran):
    model = build(name)
    inputs = inputs_of(model)
    module = replace(model, False)
    first(model, inputs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.3)
            parameter.data = parameter.data.clone()
    got = first(model, inputs)
    assert len(ran) == 2
    restore(model)
    torch.testing.assert_close(got, first(model, inputs))


@ways
def test_more_tokens_are_seen(templates, ran):
    model = build("bert")
    module = replace(model, templates)
    tokens = torch.tensor([[3, 96, 5]])
    first(model, {"input_ids": tokens})
    model.resize_token_embeddings(120)
    tokens[0, 2] = 119
    out = first(model, {"input_ids": tokens})
    assert out.isfinite().all() and len(ran) == 2
    restore(model)
    torch.testing.assert_close(out, first(model, {"input_ids": tokens}), atol=1e-4, rtol=1e-4)
    assert type(module) is type(model.embeddings)


class OtherTable(nn.Embedding):
    """What PEFT or a quantiser puts in the place of a table."""


class OtherConvolution(nn.Conv2d):
    """Likewise."""


def test_other_modules_are_left_alone():
    model = build("bert")
    model.embeddings.word_embeddings = OtherTable(97, 64)
    assert "OtherTable, not nn.Embedding" in embedding_of(model).reason
    model.embeddings.word_embeddings = nn.Embedding(97, 64, max_norm=1.0)
    assert "max_norm" in embedding_of(model).reason
    model.embeddings.word_embeddings = nn.Embedding(97, 64, dtype=torch.bfloat16)
    assert "unlike" in embedding_of(model).reason
    model = build("vit")
    place = model.embeddings.patch_embeddings
    for projection, why in {
        OtherConvolution(3, 64, 4, 4): "is a OtherConvolution, not nn.Conv2d",
        nn.Conv2d(3, 64, 4, 2): "overlap or lie apart",
        nn.Conv2d(3, 64, 4, 4, padding=1): "overlap or lie apart",
        nn.Conv2d(3, 64, 4, 4, dilation=2): "overlap or lie apart",
        nn.Conv2d(3, 63, 4, 4, groups=3): "overlap or lie apart",
        nn.Conv2d(3, 64, 4, 4).to(memory_format=torch.channels_last): "not contiguous",
    }.items():
        place.projection = projection
        assert why in embedding_of(model).reason


def test_channels_last_runs_the_own_code(ran):
    model = build("vit")
    inputs = inputs_of(model)
    want = first(model, inputs)
    replace(model, False)
    model.to(memory_format=torch.channels_last)
    with pytest.warns(StofWarning, match="not contiguous"):
        torch.testing.assert_close(first(model, inputs), want)
    assert not ran


def test_a_convolution_without_bias():
    model = build("vit")
    model.embeddings.patch_embeddings.projection = nn.Conv2d(3, 64, 4, 4, bias=False)
    inputs = inputs_of(model)
    want = first(model, inputs)
    module = replace(model, False)
    assert embedding_of(model).layer.names == ("gemm",)
    torch.testing.assert_close(first(model, inputs), want)
    stof_hf.restore(model)
    assert type(module) is type(model.embeddings.patch_embeddings)


def test_attention_functions_do_not_matter():
    model = build("bert", "sdpa")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert embedding_of(model).reason is None


@pytest.mark.gpu
@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_kernels_in_cuda_graphs(name, dtype, ran):
    """Launched anew, as they were prepared, and replayed, each for other ids or images."""
    model = build(name).to("cuda", dtype)
    module = replace(model, True)
    assert ran == [] and next(module.parameters()).is_cuda
    own, shape = type(module).replaced.forward, (2, 3, 28, 28) if name == "vit" else (2, 50)

    def given():
        if name == "vit":
            return torch.randn(shape, device="cuda", dtype=dtype)
        return torch.randint(3, 97, shape, device="cuda")

    near = {torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]
    near = {"atol": near, "rtol": near}
    static = given()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        for _ in range(3):
            static.copy_(given())
            torch.testing.assert_close(module(static), own(module, static), **near)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            module(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(static)
        for _ in range(3):
            static.copy_(given())
            graph.replay()
            torch.testing.assert_close(out, own(module, static), **near)
    assert len(ran) == 5


def test_examples():
    assert doctest.testmod(embeddings).failed == 0
