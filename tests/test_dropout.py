"""Attention dropout: one mask in every backend, forward and backward, and its statistics.

Triton kernels are interpreted where there is no GPU; see test_triton.py.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import stof_hf
from stof_hf import SparseMask, UnsupportedError, patterns
from stof_hf.attention import backward as plain
from stof_hf.attention import cpu, dropout, gradients, plan, select
from stof_hf.attention.dropout import Dropout, threshold_of
from stof_hf.attention.op import op_arguments
from stof_hf.attention.reference import reference_attention
from stof_hf.kernels import jit

triton = pytest.importorskip("stof_hf.attention.triton", reason="Triton is not installed")
triton_backward = pytest.importorskip("stof_hf.attention.triton_backward")

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = {
    "triton": (triton.forward, triton_backward.backward, DEVICE),
    "plain": (
        cpu.forward,
        lambda grad, q, k, v, out, lse, mask, scale, softcap, drop: plain.backward(
            grad, q, k, v, out, lse, mask, None, None, scale, softcap, drop
        ),
        torch.device("cpu"),
    ),
}


def make_dropout(p=0.3, seed=12345678901234567, device="cpu"):
    return Dropout(torch.tensor([seed], device=device), threshold_of(p))


def kept(drop, batch, heads, q_len, kv_len):
    """bool [B, H, Sq, Sk] on the CPU."""
    drop = Dropout(drop.seed.cpu(), drop.threshold)
    copies = torch.arange(batch * heads).view(batch, heads)
    words = torch.arange(-(-kv_len // 32))
    return drop.kept(copies, torch.arange(q_len), words)[..., :kv_len]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("p", [0.1, 0.999])
def test_the_mask_itself(backend, p):
    """Equal scores show in the output and in dV, keys that are unit vectors in dQ, what is kept."""
    forward, backward, device = backend
    drop = make_dropout(p, device=device)
    n, allowed = 100, torch.ones(100, 100, dtype=torch.bool).tril()
    want = kept(drop, 1, 2, n, n) & allowed
    mask = SparseMask.from_dense(allowed).to(device)
    unit = torch.eye(n, dtype=torch.float16, device=device).expand(1, 2, n, n)
    zeros, ones = torch.zeros_like(unit), torch.ones_like(unit)
    out, lse = forward(zeros, unit, unit, mask, scale=1.0, dropout=drop)
    assert torch.equal(out.transpose(1, 2).cpu() > 0, want)
    grad = unit.transpose(1, 2)
    dv = backward(grad, zeros, unit, unit, out, lse, mask, 1.0, 0.0, drop)[2]
    assert torch.equal(dv.mT.cpu() > 0, want)
    # Of scores s and delta = rowsum(P M): dQ = P (M - delta) is positive where M is 1 / (1 - p).
    out, lse = forward(zeros, unit, ones, mask, scale=1.0, dropout=drop)
    grad = torch.zeros_like(out)
    grad[..., 0] = 1
    dq = backward(grad, zeros, unit, ones, out, lse, mask, 1.0, 0.0, drop)[0]
    both = (want.sum(-1) > 0) & (want.sum(-1) < allowed.sum(-1))
    assert torch.equal((dq.cpu() > 0)[both], want[both])


CASES = {
    "none": (2, 2, 70, 70, None, 0),
    "causal": (2, 1, 100, 100, patterns.Causal(), 0),
    "longformer, padded": (2, 1, 70, 140, patterns.Longformer(20, (0, 100)), 60),
    "few queries": (2, 2, 5, 200, patterns.Causal(), 0),
    "heads": (2, 1, 70, 70, patterns.Custom(lambda b, h, q, k: (q + h + k) % 3 > 0, None, 2), 0),
}


def inputs(heads, kv_heads, q_len, kv_len, dtype=torch.float32, dim=16):
    g = torch.Generator().manual_seed(3)
    sizes = (heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len), (heads, q_len)
    q, k, v, grad = (torch.randn(2, h, n, dim, generator=g).to(dtype) for h, n in sizes)
    return q, k, v, grad.transpose(1, 2)


def compare(backend, heads, kv_heads, q_len, kv_len, pattern, hidden=0, softcap=0.0, view=None):
    forward, backward, device = backend
    drop = make_dropout(0.3, device=device)
    mask = allowed = None
    if pattern is not None:
        valid = torch.arange(kv_len) < torch.tensor([[kv_len], [kv_len - hidden]])
        mask = SparseMask.from_pattern(
            pattern, q_len, kv_len, q_offset=kv_len - q_len, padding=valid if hidden else None
        )
        mask, allowed = mask.to(device), mask.to_dense()
    if view is not None:
        mask, allowed = view.to(device), view.to_dense()
    q, k, v, grad = inputs(heads, kv_heads, q_len, kv_len)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    factors = kept(drop, 2, heads, q_len, kv_len) * drop.scale
    want, want_lse = reference_attention(
        *exact, allowed, scale=0.4, softcap=softcap, factors=factors
    )
    wants = torch.autograd.grad(want, exact, grad.transpose(1, 2).double())
    q, k, v, grad = (x.to(device) for x in (q, k, v, grad))
    out, lse = forward(q, k, v, mask, scale=0.4, softcap=softcap, dropout=drop)
    near = {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(out.transpose(1, 2).double().cpu(), want, **near)
    torch.testing.assert_close(lse.double().cpu(), want_lse, atol=1e-4, rtol=1e-4)
    if view is not None:
        return
    grads = backward(grad, q, k, v, out, lse, mask, 0.4, softcap, drop)
    for got, expected in zip(grads, wants, strict=False):
        torch.testing.assert_close(got.double().cpu(), expected, **near)


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(backend, name):
    compare(backend, *CASES[name])


def test_softcap(backend):
    compare(backend, *CASES["few queries"], softcap=2.0)


def test_split_blocks(backend, monkeypatch):
    monkeypatch.setattr(plan, "_MERGE_COST", 0.5)
    monkeypatch.setattr(plan, "_LEAST_PIECE", 3.0)
    monkeypatch.setattr(select, "multiprocessors", lambda device: 64)
    monkeypatch.setattr(gradients, "multiprocessors", lambda device: 64)
    compare(backend, 1, 1, 400, 400, patterns.GlobalTokens((0, 1)))


def test_views(backend):
    whole = SparseMask.from_pattern(patterns.SlidingWindow(50, 0), 300)
    compare(backend, 2, 1, 3, 100, None, view=whole.rows(197, 3, 100, col_start=100))


def test_bias_and_sinks():
    drop = make_dropout()
    q, k, v, grad = inputs(2, 2, 70, 90)
    bias, sinks = torch.randn(2, 70, 90), torch.randn(2)
    given = [q, k, v, bias, sinks]
    exact = [x.double().requires_grad_() for x in given]
    factors = kept(drop, 2, 2, 70, 90) * drop.scale
    want, _ = reference_attention(*exact[:3], bias=exact[3], sinks=exact[4], factors=factors)
    wants = torch.autograd.grad(want, exact, grad.transpose(1, 2).double())
    leaves = [x.requires_grad_() for x in given]
    none = op_arguments(q, k, None)
    out, _ = torch.ops.stof.attention(
        *leaves[:3], *none, *leaves[3:], drop.seed, drop.threshold, 0.25, 0.0
    )
    torch.testing.assert_close(out.transpose(1, 2).double(), want, atol=1e-5, rtol=1e-5)
    for got, expected in zip(torch.autograd.grad(out, leaves, grad), wants, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(jit.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("p", [0.1, 0.5, 1e-4, 0.99])
def test_cpp_and_torch_make_the_same_bits(monkeypatch, p):
    drop = make_dropout(p)
    at = torch.tensor([[0, 3], [7, 2**31 - 1]]), torch.tensor([5, 0, 70000]), torch.arange(3, 40)
    native = drop.kept(*at)
    monkeypatch.setattr(dropout, "_library", lambda: None)
    assert torch.equal(drop.kept(*at), native) and native.shape == (2, 2, 3, 37 * 32)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.8])
def test_what_is_kept_looks_independent(p):
    """Over rows, keys, heads and seeds: the share, and of neighbours how many agree."""
    n = 512
    x = torch.stack([kept(make_dropout(p, seed), 1, 4, n, n) for seed in range(2)])
    x = x.double() - (1 - p)
    deviation = (p * (1 - p)) ** 0.5
    assert abs(x.mean()) < 5 * deviation / x.numel() ** 0.5
    for dim in (0, 2, 3, 4):
        a, b = x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)
        assert abs((a * b).mean()) < 5 * deviation**2 / a.numel() ** 0.5
    assert abs((x[..., 32:] * x[..., :-32]).mean()) < 5 * deviation**2 / x[..., 32:].numel() ** 0.5
    # Rows and columns by themselves: none is kept far more often than it should be.
    for dim in (3, 4):
        assert x.mean(dim).abs().max() < 6 * deviation / n**0.5


def test_the_mean_over_seeds_is_attention_without_dropout():
    q, k, v, _ = inputs(2, 2, 40, 70)
    mask = SparseMask.from_pattern(patterns.SlidingWindow(20, 5), 40, 70, q_offset=30)
    want = stof_hf.attention(q, k, v, mask)
    draws = torch.stack([stof_hf.attention(q, k, v, mask, dropout_p=0.2) for _ in range(200)])
    error = (draws.mean(0) - want) / (draws.std(0) / 200**0.5)
    assert error.abs().max() < 6 and 0.9 < error.std() < 1.1


@pytest.mark.parametrize("grad", [False, True])
def test_seeds_come_from_torch(grad):
    q, k, v, _ = inputs(2, 2, 40, 70)
    q.requires_grad_(grad)
    torch.manual_seed(5)
    first, second = (stof_hf.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(stof_hf.attention(q, k, v, dropout_p=0.5), first)


def test_without_dropout_nothing_is_drawn():
    q, k, v, _ = inputs(2, 2, 40, 70)
    state = torch.get_rng_state()
    # Less than half of 2**-16 is rounded to none.
    for p in (0.0, 1e-9):
        assert torch.equal(stof_hf.attention(q, k, v, dropout_p=p), stof_hf.attention(q, k, v))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2, float("nan")])
def test_probabilities_are_below_one(p):
    q, k, v, _ = inputs(1, 1, 4, 4)
    with pytest.raises(UnsupportedError, match="dropout_p"):
        stof_hf.attention(q, k, v, dropout_p=p)


def test_tiles_that_do_not_fit():
    q = torch.zeros(1, 1, 70, 256)
    with pytest.raises(UnsupportedError, match="autocast"):
        triton.forward(q, q, q, None, scale=1.0, dropout=make_dropout())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask(reentrant):
    q, k, v, _ = inputs(2, 2, 40, 70)
    grads = []

    def call(x):
        return stof_hf.attention(x, k, v, dropout_p=0.5)

    for wrapped in (False, True):
        x = q.clone().requires_grad_()
        torch.manual_seed(1)
        out = checkpoint(call, x, use_reentrant=reentrant) if wrapped else call(x)
        call(q)  # moves the generator on before the replay
        out.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


NEEDS_COMPILER = pytest.mark.skipif(
    jit.find_compiler() is None, reason="torch's inductor needs a C++ compiler on the CPU"
)


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_compiled(engine):
    torch._dynamo.reset()
    unit = torch.eye(70).expand(1, 2, 70, 70)
    zeros = torch.zeros_like(unit)

    def call(v):
        return stof_hf.attention(zeros, unit, v, dropout_p=0.5) * 2

    compiled = torch.compile(call, backend=engine, fullgraph=True)
    seen = []
    for _ in range(2):
        v = unit.clone().requires_grad_()
        out = compiled(v)
        out.backward(unit)
        # Both are 2 P M, transposed: backward drops what forward did.
        torch.testing.assert_close(v.grad.mT, out)
        seen.append(out.detach() > 0)
        assert 0.4 < seen[-1].double().mean() < 0.6
    assert not torch.equal(*seen)
