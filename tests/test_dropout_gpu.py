"""Attention dropout on a CUDA GPU: through the op, compiled, in graphs, without synchronising."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import stof_hf
from stof_hf import SparseMask, patterns
from stof_hf.attention.dropout import Dropout, threshold_of
from stof_hf.attention.op import op_arguments
from stof_hf.attention.reference import reference_attention

pytestmark = pytest.mark.gpu

PATTERNS = {
    "none": None,
    "causal": patterns.Causal(),
    "longformer": patterns.Longformer(32, (*range(32), 512)),
    "heavy keys": patterns.SlidingWindow(40, 0) | patterns.GlobalKeys(tuple(range(64))),
}
#: Norm of an error over the norm.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5}


def make(heads, kv_heads, length, dim, dtype, batch=2):
    """q, k, v, and the gradient of the output [B, H, Sq, D]."""
    draw = torch.Generator("cuda").manual_seed(0)
    made = [
        torch.randn(batch, length, h, dim, generator=draw, device="cuda").to(dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads, heads)
    ]
    return [x.requires_grad_() for x in made[:3]], made[3]


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def pattern_of(out):
    """Which elements of P M are kept, where v holds unit vectors."""
    return out.detach() > 0


def unit_vectors(length=256, heads=4, dtype=torch.float16):
    unit = torch.eye(length, dtype=dtype, device="cuda").expand(1, heads, length, length)
    return torch.zeros_like(unit), unit.contiguous()


def compare(inputs, upstream, mask, p):
    """Output and gradients through the op against the oracle under the same seed."""
    drop = Dropout(torch.tensor([99], device="cuda"), threshold_of(p))
    q, k, _ = inputs
    copies = torch.arange(q.shape[0] * q.shape[1], device="cuda").view(q.shape[:2])
    rows, words = (torch.arange(n, device="cuda") for n in (q.shape[2], -(-k.shape[2] // 32)))
    factors = drop.kept(copies, rows, words)[..., : k.shape[2]] * drop.scale
    exact = [x.detach().double().requires_grad_() for x in inputs]
    allowed = None if mask is None else mask.to_dense()
    want, _ = reference_attention(*exact, allowed, factors=factors, scale=q.shape[3] ** -0.5)
    wants = torch.autograd.grad(want, exact, upstream.double())
    out, _ = torch.ops.stof.attention(
        *inputs, *op_arguments(q, k, mask), None, None, drop.seed, drop.threshold,
        q.shape[3] ** -0.5, 0.0,
    )  # fmt: skip
    grads = torch.autograd.grad(out.transpose(1, 2), inputs, upstream)
    limit = TOLERANCE[q.dtype]
    assert error(out.transpose(1, 2), want.detach()) < limit
    for name, got, expected in zip("qkv", grads, wants, strict=True):
        assert error(got, expected) < limit, name


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_against_the_oracle(no_other_backward, name, dim, dtype):
    inputs, upstream = make(8, 8 if dim < 128 else 2, 1100, dim, dtype)
    mask = PATTERNS[name]
    if mask is not None:
        mask = SparseMask.from_pattern(mask, 1100, device="cuda")
    compare(inputs, upstream, mask, 0.1)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [5, 300])
def test_fp32_and_padding(dim, length):
    inputs, upstream = make(4, 2, length, dim, torch.float32)
    valid = torch.arange(length, device="cuda") < torch.tensor(
        [[length], [length // 2]], device="cuda"
    )
    mask = SparseMask.from_pattern(patterns.Causal(), length, device="cuda", padding=valid)
    compare(inputs, upstream, mask, 0.3)


def test_bias():
    """T5 in training: its gradients come from plain PyTorch."""
    zeros, unit = unit_vectors()
    bias = torch.zeros(1, 4, 256, 256, device="cuda", dtype=torch.float16, requires_grad=True)
    v = unit.clone().requires_grad_()
    out = stof_hf.attention(zeros, unit, v, bias=bias, dropout_p=0.5)
    out.backward(unit)
    torch.testing.assert_close(v.grad.mT, out)
    assert bias.grad.any()


def test_the_share_and_the_mean():
    zeros, unit = unit_vectors(length=256, heads=16)
    kept = torch.stack([pattern_of(stof_hf.attention(zeros, unit, unit, dropout_p=0.1))
                        for _ in range(20)])  # fmt: skip
    deviation = (0.1 * 0.9 / kept.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - 0.9) < 6 * deviation + 2e-5
    inputs, _ = make(4, 4, 300, 64, torch.float32)
    with torch.no_grad():
        want = stof_hf.attention(*inputs)
        draws = torch.stack([stof_hf.attention(*inputs, dropout_p=0.1) for _ in range(300)])
    z = (draws.mean(0) - want) / (draws.std(0) / 300**0.5)
    assert z.abs().max() < 7 and 0.9 < z.std() < 1.1


def test_seeds_come_from_torch_and_checkpoints_replay_them():
    inputs, upstream = make(4, 4, 300, 64, torch.float16)

    def call(q, k, v):
        return stof_hf.attention(q, k, v, dropout_p=0.5)

    seen = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        out = checkpoint(call, *inputs, use_reentrant=False) if wrapped else call(*inputs)
        other = call(*inputs)  # moves the generator on
        assert not torch.equal(out, other)
        seen.append([out, *torch.autograd.grad(out, inputs, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    torch._dynamo.reset()
    zeros, unit = unit_vectors()

    @torch.compile(fullgraph=True, mode=mode)
    def call(v):
        return stof_hf.attention(zeros, unit, v, dropout_p=0.5) * 2

    seen = []
    for _ in range(4):
        v = unit.clone().requires_grad_()
        out = call(v)
        (grad,) = torch.autograd.grad(out, v, unit)
        # Both are 2 P M: backward drops what forward did.
        torch.testing.assert_close(grad.mT, out)
        seen.append(pattern_of(out).clone())
        assert 0.45 < float(seen[-1].double().mean()) < 0.55
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_graph_draws_anew_in_each_replay():
    zeros, unit = unit_vectors()
    v = unit.clone().requires_grad_()

    def step():
        out = stof_hf.attention(zeros, unit, v, dropout_p=0.5)
        return out, torch.autograd.grad(out, v, unit)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, grad = step()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(grad.mT, out)
        seen.append(pattern_of(out).clone())
        assert 0.45 < float(seen[-1].double().mean()) < 0.55
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_known_mask_does_not_synchronise():
    inputs, upstream = make(8, 2, 700, 64, torch.float16)
    mask = SparseMask.from_pattern(patterns.Longformer(50, (0,)), 700, device="cuda")
    for debug in ("default", "error"):
        torch.cuda.set_sync_debug_mode(debug)
        try:
            out = stof_hf.attention(*inputs, mask, dropout_p=0.1)
            torch.autograd.grad(out, inputs, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_equal_seeds_give_equal_bits():
    inputs, upstream = make(8, 2, 1100, 64, torch.bfloat16)
    mask = SparseMask.from_pattern(PATTERNS["heavy keys"], 1100, device="cuda")
    seen = []
    for _ in range(3):
        torch.manual_seed(0)
        out = stof_hf.attention(*inputs, mask, dropout_p=0.1)
        seen.append([out, *torch.autograd.grad(out, inputs, upstream)])
    first, *rest = seen
    assert all(torch.equal(a, b) for later in rest for a, b in zip(later, first, strict=True))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_train_at_their_default_dropout(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64}
    if name == "bert":
        sizes |= {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "intermediate_size": 256}  # fmt: skip
        cls, config = transformers.BertForMaskedLM, transformers.BertConfig(**sizes)
    else:
        sizes |= {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 256}
        cls, config = transformers.GPT2LMHeadModel, transformers.GPT2Config(**sizes)
    model = cls._from_config(config, attn_implementation="stof").cuda().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ids = torch.randint(4, 64, (8, 1), device="cuda").expand(8, 200) + torch.arange(
        200, device="cuda"
    )
    ids, losses = 4 + ids % 60, []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
