"""stof_hf.attention against the fp64 oracle, forward and backward."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measure import measure
from strategies import Case, cases

import stof_hf
from stof_hf import MaskError, SparseMask, UnsupportedError, patterns
from stof_hf.attention.op import op_arguments
from stof_hf.attention.reference import reference_attention
from stof_hf.kernels import jit
from stof_hf.masks.traced import structure_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
dtypes = st.sampled_from(list(TOLERANCE))
head_sizes = st.sampled_from([1, 3, 8, 16, 20, 32, 33, 40, 64, 80, 96, 128, 160, 256])
LAYOUTS = ("contiguous", "transposed", "sliced", "packed", "strided")


def tensor(shape, dtype, layout, seed):
    """Random values [B, H, S, D] laid out as models pass them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).to(dtype)
    b, h, s, d = shape
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        room = torch.full((b, h + 1, s + 5, d + 3), torch.nan, dtype=dtype)
        out = room[:, 1:, 2 : s + 2, 3:]
    elif layout == "packed":
        out = torch.full((b, s, 3, h, d), torch.nan, dtype=dtype)[:, :, 1].transpose(1, 2)
    elif layout == "strided":
        out = torch.full((b, h, s, 2 * d), torch.nan, dtype=dtype)[..., ::2]
    else:
        return x
    out.copy_(x)
    return out


def assert_near(got, want, dtype, name, terms=1.0):
    """Near for `dtype`, where an element is the sum of so many independent roundings."""
    assert got.shape == want.shape, name
    error = (got.double() - want).abs().max().item() if want.numel() else 0.0
    limit = TOLERANCE[dtype] * terms**0.5 * (1 + want.abs().max().item())
    assert error <= limit, f"{name}: error {error:.2e} above {limit:.2e}"


def compare(tensors, mask, allowed, *, grad=True, **options):
    """Output and gradients of the op and of the oracle; tensors: dict q, k, v, bias, sinks."""
    dtype = tensors["q"].dtype
    ours = {n: t.detach().requires_grad_(grad) for n, t in tensors.items() if t is not None}
    exact = {n: t.detach().double().requires_grad_(grad) for n, t in ours.items()}

    def call(function, x, mask):
        rest = {name: x.get(name) for name in ("bias", "sinks")}
        return function(x["q"], x["k"], x["v"], mask, **rest, **options)

    out = call(stof_hf.attention, ours, mask)
    want, _ = call(reference_attention, exact, allowed)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert_near(out, want, dtype, "out")
    if allowed is not None and "sinks" not in ours:
        empty = ~allowed.any(-1).expand(out.shape[:3])
        assert (out[empty] == 0).all()
    if not grad:
        return
    g = torch.Generator().manual_seed(9)
    upstream = (torch.randn(want.shape, generator=g) / want.shape[-1] ** 0.5).to(dtype)
    out.backward(upstream)
    want.backward(upstream.double())
    for name in ours:
        assert ours[name].grad.dtype == ours[name].dtype
        rows = ours[name].numel() // (ours[name].shape[-1] if name == "bias" else 1)
        terms = want[..., 0].numel() / rows if name in ("bias", "sinks") else 1
        assert_near(ours[name].grad, exact[name].grad, dtype, f"grad of {name}", terms)


@dataclass
class Problem:
    case: Case
    tensors: dict[str, torch.Tensor] = field(repr=False)
    options: dict[str, float | None]
    shapes: dict[str, tuple] = field(init=False)

    def __post_init__(self):
        self.shapes = {n: (*t.shape, t.dtype, t.stride()) for n, t in self.tensors.items()}


@st.composite
def problems(draw):
    case = draw(cases())
    allowed = case.truth()
    batch = allowed.shape[0] if allowed.shape[0] > 1 else draw(st.integers(1, 2))
    heads = allowed.shape[1] if allowed.shape[1] > 1 else draw(st.sampled_from([1, 2, 3, 4, 6]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    dtype, dim = draw(dtypes), draw(head_sizes)
    value_dim = draw(st.one_of(st.just(dim), head_sizes))
    sq, sk = case.q_len, case.kv_len
    layouts = st.sampled_from(LAYOUTS)
    shapes = {"q": (batch, heads, sq, dim), "k": (batch, kv_heads, sk, dim)}
    shapes["v"] = (batch, kv_heads, sk, value_dim)
    tensors = {n: tensor(s, dtype, draw(layouts), i) for i, (n, s) in enumerate(shapes.items())}
    full = (batch, heads, sq, sk)
    g = torch.Generator().manual_seed(3)
    other = st.sampled_from([dtype, torch.float32])
    if draw(st.booleans()):
        shape = tuple(n if draw(st.booleans()) else 1 for n in full)[draw(st.integers(0, 3)) :]
        tensors["bias"] = torch.randn(shape, generator=g).to(draw(other))
    if draw(st.booleans()):
        tensors["sinks"] = torch.randn(heads, generator=g).to(draw(other))
    options = {"softcap": draw(st.sampled_from([0.0, 0.0, 2.0, 30.0]))}
    options["scale"] = draw(st.sampled_from([None, 1.0, 0.05, -0.3]))
    return Problem(case, tensors, options)


@given(problems())
def test_forward(problem):
    case = problem.case
    compare(problem.tensors, case.mask(), case.truth(), grad=False, **problem.options)


@given(problems())
def test_forward_and_backward(problem):
    case = problem.case
    compare(problem.tensors, case.mask(), case.truth(), **problem.options)


@given(cases(), st.data())
def test_decode_views(case, data):
    mask = case.mask(padding=False)
    q_len = data.draw(st.integers(1, min(mask.q_len, 20)))
    kv_len = data.draw(st.integers(1, mask.kv_len))
    row = data.draw(st.integers(0, mask.q_len - q_len))
    col = data.draw(st.integers(0, mask.kv_len - kv_len))
    starts = (row, col)
    if data.draw(st.booleans()):
        starts = tuple(torch.tensor([s]) for s in starts)
    view = mask.rows(starts[0], q_len, kv_len, starts[1])
    allowed = case.truth(padding=False)[:, :, row : row + q_len, col : col + kv_len]
    batch, heads = (n if n > 1 else 2 for n in allowed.shape[:2])
    if data.draw(st.booleans()):
        valid = torch.rand(batch, kv_len, generator=torch.Generator().manual_seed(1)) < 0.8
        view, allowed = view.with_padding(valid), allowed & valid[:, None, None]
    q = tensor((batch, heads, q_len, 24), torch.float32, "transposed", 0)
    k, v = (tensor((batch, heads, kv_len, 24), torch.float32, "sliced", i) for i in (1, 2))
    compare({"q": q, "k": k, "v": v}, view, allowed)


@given(cases(), st.booleans())
def test_structure_computed_in_a_graph(case, grad):
    """Every tile stored as bits, empty and full ones too: what a traced model computes."""
    allowed = case.truth(padding=False)
    mask = SparseMask(case.q_len, case.kv_len, *structure_of(allowed)).with_padding(case.padding)
    allowed = case.truth()
    batch, heads = (n if n > 1 else 2 for n in allowed.shape[:2])
    q = tensor((batch, heads, case.q_len, 16), torch.float32, "transposed", 0)
    k, v = (tensor((batch, heads, case.kv_len, 16), torch.float32, "contiguous", i) for i in (1, 2))
    compare({"q": q, "k": k, "v": v}, mask, allowed, grad=grad)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_a_mask(dtype):
    shapes = (2, 4, 70, 32), (2, 2, 130, 32), (2, 2, 130, 16)
    q, k, v = (tensor(s, dtype, "transposed", i) for i, s in enumerate(shapes))
    compare({"q": q, "k": k, "v": v}, None, None)


def plain(sq=130, sk=130, b=2, h=4, hkv=2, d=16, dtype=torch.float32):
    shapes = (b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, d)
    return [tensor(s, dtype, "contiguous", i) for i, s in enumerate(shapes)]


LONGFORMER = SparseMask.from_pattern(patterns.Longformer(20, (0,)), 130)
PADDED = LONGFORMER.with_padding(torch.arange(130) < torch.tensor([[130], [61]]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_keys_that_nobody_sees_may_hold_anything(poison):
    q, k, v = plain()
    allowed = PADDED.to_dense()
    dead = ~allowed.any(2).any(1)
    clean = [q, k.masked_fill(dead[:, None, :, None], 0), v.masked_fill(dead[:, None, :, None], 0)]
    dirty = [q, *(x.masked_fill(dead[:, None, :, None], poison) for x in (k, v))]
    results = []
    for x in (clean, dirty):
        x = [t.clone().requires_grad_() for t in x]
        out = stof_hf.attention(*x, PADDED)
        out.sum().backward()
        results.append([out.detach(), *(t.grad for t in x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "mask", [None, LONGFORMER, PADDED, PADDED.rows(0, 130, 130)], ids=lambda m: str(m)[:24]
)
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(mask, extras):
    q, k, v = (x.requires_grad_() for x in plain())
    bias = torch.randn(130, 130, requires_grad=True) if extras else None
    sinks = torch.randn(4, requires_grad=True) if extras else None
    dropout = (torch.tensor([7]), 6554) if extras else (None, 0)
    softcap = 5.0 if extras else 0.0
    args = (q, k, v, *op_arguments(q, k, mask), bias, sinks, *dropout, 0.25, softcap)
    torch.library.opcheck(torch.ops.stof.attention.default, args)


class Layer(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return stof_hf.attention(q, k, v, self.mask).transpose(1, 2).flatten(2)


NEEDS_COMPILER = pytest.mark.skipif(
    jit.find_compiler() is None, reason="torch's inductor needs a C++ compiler on the CPU"
)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)]
)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["dense", "padded"])
def test_compile_fullgraph(backend, mask):
    torch._dynamo.reset()
    layer = Layer(mask)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(2, 130, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    grads = []
    for run in (layer, compiled):
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append(layer.project.weight.grad.clone())
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_takes_mixed_dtypes(grad):
    q, k, v = plain()
    v = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
        out = stof_hf.attention(q, k, v, PADDED)
    assert out.dtype == torch.bfloat16
    want = stof_hf.attention(q.bfloat16(), k.bfloat16(), v, PADDED)
    torch.testing.assert_close(out, want)
    if grad:
        (want_grad,) = torch.autograd.grad(want.float().sum(), q)
        with torch.autocast("cpu", torch.bfloat16):
            out.float().sum().backward()
        torch.testing.assert_close(q.grad, want_grad)
        assert (q.grad.dtype, v.grad.dtype) == (torch.float32, torch.bfloat16)
        assert q.grad.isfinite().all() and q.grad.any()


def test_autocast_compiles():
    torch._dynamo.reset()
    q, k, v = plain()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return stof_hf.attention(q, k, v.bfloat16(), PADDED)

    want = stof_hf.attention(*(x.bfloat16() for x in (q, k, v)), PADDED)
    torch.testing.assert_close(run(q, k, v), want)


def test_checkpointing_and_double_use():
    q, k, v = (x.requires_grad_() for x in plain())
    once = stof_hf.attention(q, k, v, PADDED)
    again = torch.utils.checkpoint.checkpoint(
        stof_hf.attention, q, k, v, PADDED, use_reentrant=False
    )
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (once, again)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda q, k, v: (q, k.half(), v), UnsupportedError, "torch.autocast"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), UnsupportedError, "float64"),
        (lambda q, k, v: (q[:, :3], k, v), UnsupportedError, "multiple of Hkv"),
        (lambda q, k, v: (q, k[..., :8], v), UnsupportedError, "shapes do not fit"),
        (lambda q, k, v: (q, k, v[:, :, :9]), UnsupportedError, "shapes do not fit"),
        (lambda q, k, v: (q[0], k[0], v[0]), UnsupportedError, "shapes do not fit"),
        (lambda q, k, v: plain(d=264), UnsupportedError, "264 .* largest is 256"),
        (lambda q, k, v: plain(sq=129), MaskError, "130 queries and 130 keys, .* 129"),
        (lambda q, k, v: plain(sk=131), MaskError, r"from_pattern\(pattern, 130, 131\)"),
        (lambda q, k, v: plain(b=3), MaskError, "batch 2 and 1 heads, the tensors hold 3"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_errors(change, error, message, grad):
    tensors = [x.requires_grad_(grad) for x in change(*plain())]
    with pytest.raises(error, match=message):
        stof_hf.attention(*tensors, PADDED)


def test_error_of_devices():
    q, k, v = plain()
    with pytest.raises(UnsupportedError, match="cpu, meta and cpu: move them to one device"):
        stof_hf.attention(q, k.to("meta"), v)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\]"),
        ({"bias": torch.zeros(3, 1, 1, 1)}, "does not broadcast"),
        ({"bias": torch.zeros(1, 1, 1, 1, 1)}, "does not broadcast"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises(UnsupportedError, match=message):
        stof_hf.attention(*plain(), PADDED, **options)


def test_backward_never_holds_all_scores():
    work = """mask = stof_hf.SparseMask.from_pattern(stof_hf.patterns.SlidingWindow(64, 64), n)
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    stof_hf.attention(q, k, v, mask).sum().backward()
    return bool(q.grad.isfinite().all() and k.grad.any())"""
    _, mib, fine = measure("import stof_hf", work, 512, 8192)
    assert fine and mib < 64, "8192 x 8192 scores are 256 MiB, their booleans 64 MiB"
