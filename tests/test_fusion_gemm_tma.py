"""The persistent GEMM by TMA against fp64: compiled on a GPU, interpreted where there is none."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import build, first, inputs_of
from transformers.activations import ACT2FN

from stof_hf.errors import UnsupportedError
from stof_hf.fusion.fused import Choice, Weights
from stof_hf.fusion.install import find, install
from stof_hf.fusion.layer_ops import SEGMENTS, schemes
from stof_hf.fusion.parts import part_of
from stof_hf.fusion.runners import TEMPLATES
from stof_hf.fusion.templates import tma

pytest.importorskip("triton", reason="Triton is not installed")
from compiling import without_a_gpu, wrong  # noqa: E402
from gemms import DEVICE, assert_near, matrix  # noqa: E402

from stof_hf.fusion.templates import gemm_tma as template  # noqa: E402
from stof_hf.fusion.templates.common import ACTIVATIONS  # noqa: E402
from stof_hf.fusion.templates.gemm_tma import SPACE, default, fits, gemm_tma  # noqa: E402
from stof_hf.fusion.templates.launch import Prepared  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(not tma.has_tma(DEVICE), reason="no TMA"),
]
HALF = torch.float16
PARAMS = [
    dict(zip(SPACE, values, strict=True)) for values in itertools.product(*SPACE.values())
]
SMALL = {
    "block_m": 64, "block_n": 64, "block_k": 32, "group_m": 4, "warps": 4, "stages": 2, "halves": 2,
}  # fmt: skip

rows = st.one_of(st.integers(1, 300), st.sampled_from([1, 63, 64, 65, 128, 129]))
eights = st.integers(1, 40).map(lambda count: 8 * count)
dtypes = st.sampled_from([torch.float16, torch.bfloat16])


def described(rows, columns, dtype=HALF, *, amid_nan=False, transposed=False, scale=1.0):
    """Random [rows, columns] that TMA reads; amid_nan: a view of NaN on all sides."""
    x = matrix(rows, columns, dtype, transposed=transposed, scale=scale)
    if amid_nan:
        flat = x.mT if transposed else x
        wide = flat.new_full((flat.shape[0] + 2, -(-flat.shape[1] // 8) * 8 + 16), torch.nan)
        wide[1:-1, 8 : 8 + flat.shape[1]] = flat
        flat = wide[1:-1, 8 : 8 + flat.shape[1]]
        x = flat.mT if transposed else flat
    assert tma.describes(x)
    return x


def oracle(x, w, bias=None, residual=None, activation="none", gate=False):
    y = x.double() @ w.double().T
    y, up = y.chunk(2, 1) if gate else (y, None)
    if bias is not None:
        y = y + bias.double()
    if activation != "none":
        y = ACT2FN[activation](y)
    y = y * up if gate else y
    return y if residual is None else y + residual.double()


@given(
    st.tuples(rows, eights, eights), dtypes, st.sampled_from(ACTIVATIONS), st.data(),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_random_shapes_and_options(shape, dtype, activation, data, flags):
    (m, n, k), (with_bias, with_residual, transposed, amid_nan) = shape, flags
    fitting = [p for p in PARAMS if fits(p, dtype, shared_memory=227 << 10, residual=True)]
    params = data.draw(st.sampled_from([None, *fitting]))
    x = described(m, k, dtype, amid_nan=amid_nan)
    w = described(n, k, dtype, amid_nan=amid_nan, transposed=transposed, scale=k**-0.5)
    bias = matrix(1, 2 * n, dtype)[0, :: 2 if amid_nan else 1][:n] if with_bias else None
    residual = described(m, n, dtype, amid_nan=amid_nan) if with_residual else None
    got = gemm_tma(x, w, bias, residual, activation=activation, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    assert_near(got, oracle(x, w, bias, residual, activation))


@given(
    st.tuples(rows, eights, eights), dtypes, st.sampled_from(ACTIVATIONS), st.data(), st.booleans()
)  # fmt: skip
def test_gates(shape, dtype, activation, data, amid_nan):
    m, n, k = shape
    fitting = [p for p in PARAMS if fits(p, dtype, shared_memory=227 << 10, gate=True)]
    params = data.draw(st.sampled_from([None, *fitting]))
    x = described(m, k, dtype, amid_nan=amid_nan)
    w = described(2 * n, k, dtype, amid_nan=amid_nan, scale=k**-0.5)
    got = gemm_tma(x, w, activation=activation, gate=True, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    assert_near(got, oracle(x, w, activation=activation, gate=True))


def test_more_tiles_than_blocks_in_every_order(monkeypatch):
    monkeypatch.setattr(template, "multiprocessors", lambda device: 4)
    x, w, residual = described(330, 72), described(200, 72, scale=0.1), described(330, 200)
    want = oracle(x, w, residual=residual)
    for group_m, halves in itertools.product(SPACE["group_m"], SPACE["halves"]):
        params = SMALL | {"group_m": group_m, "halves": halves}
        assert_near(gemm_tma(x, w, residual=residual, params=params), want)


def test_a_k_that_is_no_multiple_of_8_but_lies_in_one():
    x, w = described(70, 29, amid_nan=True), described(40, 29, amid_nan=True, scale=0.2)
    assert_near(gemm_tma(x, w, params=SMALL), oracle(x, w))


def test_nan_stays_nan_and_infinity_infinity():
    x = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]], device=DEVICE).half().repeat(1, 8)
    ones = torch.ones(8, 8, device=DEVICE).half()
    assert gemm_tma(x, ones, activation="relu")[:, 0].tolist()[1:] == [torch.inf, 0]
    for activation in ACTIVATIONS:
        y = gemm_tma(x, ones, activation=activation)
        assert y[0].isnan().all() and (y[1] == torch.inf).all()


@pytest.mark.gpu
def test_a_prepared_call_in_a_cuda_graph():
    w, other = described(520, 72, scale=0.1), described(700, 72)
    x, residual = described(700, 72), described(700, 520)
    call = Prepared(lambda x, residual: gemm_tma(x, w, residual=residual, clamp=True))
    call(x, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, residual)
    for rows in (x.clone(), other):
        x.copy_(rows)
        graph.replay()
        assert_near(out, oracle(rows, w, residual=residual))


def test_no_rows():
    assert gemm_tma(described(0, 32), described(48, 32)).shape == (0, 48)


def zeros(*shape, **options):
    return torch.zeros(*shape, **{"dtype": HALF, "device": DEVICE} | options)


GATE = {"gate": True, "bias": None, "residual": None}


@pytest.mark.parametrize("change, message", [
    ({"x": lambda: zeros(2, 8, 32)}, "flatten"),
    ({"x": lambda: zeros(8, 40)}, r"w \[48, 32\].* expected \[48, 40\]"),
    ({"x": lambda: zeros(8, 32, dtype=torch.bfloat16)}, "one dtype"),
    ({"x": lambda: zeros(8, 32, dtype=torch.float32), "bias": None, "residual": None,
      "w": lambda: zeros(48, 32, dtype=torch.float32)}, "use float16 or bfloat16, or gemm"),
    ({"x": lambda: zeros(32, 8).t()}, r"x\.contiguous\(\)"),
    ({"x": lambda: zeros(8, 36)[:, :32]}, r"x \[8, 32\].*\(36, 1\).*16 bytes"),
    ({"x": lambda: zeros(8 * 32 + 4)[4:].view(8, 32)}, r"x \[8, 32\].*16 bytes"),
    ({"x": lambda: zeros(1, 32).expand(8, 32)}, r"x \[8, 32\].*\(0, 1\)"),
    ({"w": lambda: zeros(48, 64)[:, ::2]}, r"w \[48, 32\].*\(64, 2\)"),
    ({"w": lambda: zeros(32, 52)[:, :48].t()}, r"w \[48, 32\].*\(1, 52\)"),
    ({"w": lambda: zeros(44, 32), "bias": None, "residual": None}, "44 columns"),
    ({"residual": lambda: zeros(48, 8).t()}, r"residual\.contiguous\(\)"),
    ({"residual": lambda: zeros(8, 52)[:, :48]}, r"residual \[8, 48\].*\(52, 1\)"),
    ({"bias": lambda: zeros(1, 48)}, r"bias \[1, 48\]"),
    ({"activation": "gelu_10"}, "'gelu_10'"),
    ({"w": lambda: zeros(48, 32, requires_grad=True)}, "no_grad"),
    (GATE | {"w": lambda: zeros(96, 32), "bias": lambda: zeros(48)}, "no bias"),
    (GATE | {"w": lambda: zeros(96, 32), "residual": lambda: zeros(8, 48)}, "no residual"),
    (GATE | {"w": lambda: zeros(32, 96).t()}, "nn.Linear"),
    (GATE | {"w": lambda: zeros(97, 32)}, r"w \[97, 32\]"),
], ids=lambda v: v if isinstance(v, str) else "-".join(v))  # fmt: skip
def test_refuses(change, message):
    given = {"x": zeros(8, 32), "w": zeros(48, 32), "bias": zeros(48), "residual": zeros(8, 48)}
    given |= {name: value() if callable(value) else value for name, value in change.items()}
    with pytest.raises(UnsupportedError, match=message):
        gemm_tma(**given)


def test_defaults_fit():
    for memory, (m, n, gate), residual in itertools.product(
        (163 << 10, 227 << 10),
        [(512, 768, False), (1000, 4096, False), (32768, 1024, False), (4096, 11008, True)],
        (False, True),
    ):
        template.shared_memory, before = lambda device, size=memory: size, template.shared_memory
        try:
            params = default(m, n, 1024, HALF, DEVICE, gate=gate, residual=residual)
        finally:
            template.shared_memory = before
        assert params.keys() == SPACE.keys()
        assert all(value in SPACE[name] for name, value in params.items()), params
        assert fits(params, HALF, shared_memory=memory, gate=gate, residual=residual), params


def test_what_fits():
    params = {
        "block_m": 128, "block_n": 256, "block_k": 64, "group_m": 8, "warps": 8, "stages": 4,
        "halves": 2,
    }  # fmt: skip
    memory = 227 << 10
    assert fits(params, HALF, shared_memory=memory)
    for change in ({"warps": 4}, {"stages": 5}, {"halves": 1}, {"block_m": 256}):
        assert not fits(params | change, HALF, shared_memory=memory)
    assert not fits(params, HALF, shared_memory=memory, residual=True)
    assert not fits(params, HALF, shared_memory=memory, gate=True)
    assert not fits(params, torch.float32, shared_memory=memory)


def choice_of(layer):
    """The longest segments that this template takes, and PyTorch's operators."""
    best = max(
        (s for s in schemes(layer.names) if all(map(wanted, s.segments))),
        key=lambda scheme: sum(len(one) ** 2 for one in scheme.segments),
    )
    runs = {
        one: ("gemm_tma", SMALL) if "gemm_tma" in SEGMENTS[one] else ("torch", {})
        for one in best.segments
    }
    return Choice.of(best, runs)


def wanted(segment):
    return len(segment) == 1 or "gemm_tma" in SEGMENTS[segment]


def on_device(name):
    model = build(name).half().to(DEVICE)
    return model, {key: value.to(DEVICE) for key, value in inputs_of(model, 20).items()}


@pytest.mark.parametrize("name, count", [("gpt2", 4), ("llama", 4), ("bert", 4)])
def test_layers(name, count):
    model, inputs = on_device(name)
    want = first(model, inputs)
    choices = {one.kind: {40: choice_of(one.layer)} for one in find(model)}
    for choice in choices.values():
        assert sum(template == "gemm_tma" for template, _ in choice[40].segments) == count
    assert len(install(find(model), choices)) == 2
    for _ in range(2):
        torch.testing.assert_close(first(model, inputs), want, atol=1e-2, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("segment", [("gemm", "residual"), ("gemm", "gate")])
def test_rows_that_tma_does_not_read_are_copied(segment):
    layer = find(on_device("llama")[0])[0].layer
    begin = next(i for i in range(20) if layer.names[i : i + 2] == segment)
    part = part_of(layer, begin, begin + 2, Weights.of(layer))
    step = TEMPLATES["gemm_tma"].build(part, SMALL, (2, 20))
    x = described(40, part.weight.shape[1])
    want, _ = step(x, x, None)
    flat = zeros(x.numel() + 4)[4:].view_as(x).copy_(x)
    wide = zeros(40, x.shape[1] + 4)[:, 4:].copy_(x)
    for rows in (flat, wide):
        assert not tma.describes(rows)
        assert torch.equal(step(rows, rows, None)[0], want)
    one, _ = step(x[:1].as_strided((1, x.shape[1]), (16, 1)), x[:1], None)
    assert torch.equal(one, want[:1])


@pytest.mark.parametrize("change, takes", [
    ({}, True),
    ({"weight": lambda: zeros(48, 32, dtype=torch.float32)}, False),
    ({"weight": lambda: zeros(48, 36)[:, :32]}, False),
    ({"weight": lambda: zeros(32, 48).t()}, True),
    ({"weight": lambda: zeros(48, 40)[:, :36]}, False),
    ({"weight": lambda: zeros(44, 32)}, False),
    ({"weight": lambda: zeros(48, 32), "names": ("gemm", "gate")}, True),
    ({"weight": lambda: zeros(40, 32), "names": ("gemm", "gate")}, False),
    ({"weight": lambda: zeros(32, 48).t(), "names": ("gemm", "gate")}, False),
    ({"activation": None}, False),
])  # fmt: skip
def test_parts_that_it_takes(change, takes):
    layer = find(on_device("bert")[0])[0].layer
    part = part_of(layer, 0, 1, Weights.of(layer))
    change = {name: value() if callable(value) else value for name, value in change.items()}
    part = replace(part, names=("gemm",), activation="none", weight=zeros(48, 32))
    assert TEMPLATES["gemm_tma"].takes(replace(part, **change)) == takes


def test_few_rows_and_older_gpus_do_not_try_it(monkeypatch):
    layer = find(on_device("bert")[0])[0].layer
    part = part_of(layer, 0, 1, Weights.of(layer))
    row = TEMPLATES["gemm_tma"]
    with pytest.raises(UnsupportedError, match="511 rows"):
        row.start(part, 511, DEVICE)
    assert row.start(part, 512, DEVICE).keys() == SPACE.keys()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not tma.has_tma(torch.device("cuda"))


@pytest.mark.timeout(600)
def test_compiles_without_spills_and_with_asynchronous_products():
    cases = without_a_gpu("compile_fusion.py", "gemm_tma")
    assert len(cases) == 45
    assert not wrong(cases), wrong(cases)
