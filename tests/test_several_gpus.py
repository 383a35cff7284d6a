"""Kernels on a GPU that is not the current one, on two at once, and on several streams of one."""

import threading

import pytest
import torch
import transformers

import stof_hf
from stof_hf import MaskError, SparseMask, UnsupportedError, patterns
from stof_hf.attention import cuda, cuda_decode, triton
from stof_hf.attention.reference import reference_attention

pytestmark = pytest.mark.gpu

several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
SECOND = "cuda:1"


def make(device, q_len, kv_len, dim, seed=0, dtype=torch.float16):
    """q of 8 heads, k and v of 2."""
    g = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(2, n, heads, dim, generator=g, device=device, dtype=dtype).transpose(1, 2)
        for n, heads in ((q_len, 8), (kv_len, 2), (kv_len, 2))
    ]


def prepared(kernel, q, k, v, mask):
    rest = q, k, v, mask, None, None, 0.2, 0.0
    if kernel == "decode":
        return cuda_decode.prepare(*rest)
    return triton.prepare(*rest, False) if kernel == "triton" else cuda.BlockCall(kernel, *rest)


def compare(out, q, k, v, mask):
    want, _ = reference_attention(
        q, k, v, mask.to_dense(), scale=0.2, softcap=0.0, bias=None, sinks=None
    )
    torch.testing.assert_close(out.double(), want, atol=4e-3, rtol=4e-3)


@several
@pytest.mark.parametrize(
    "kernel, dim, q_len",
    [("hopper", 64, 700), ("hopper", 128, 700), ("sm80", 96, 700), ("decode", 64, 1),
     ("decode", 80, 3), ("triton", 64, 700), ("triton", 64, 1)],
)  # fmt: skip
def test_a_gpu_that_is_not_the_current_one(kernel, dim, q_len):
    if kernel == "hopper" and torch.cuda.get_device_capability(SECOND)[0] != 9:
        pytest.skip("the GPU is no Hopper GPU")
    q, k, v = make(SECOND, q_len, 700, dim)
    mask = SparseMask.from_pattern(
        patterns.Longformer(40, (0,)), q_len, 700, q_offset=700 - q_len, device=SECOND
    )
    with torch.cuda.device(1):
        call = prepared(kernel, q, k, v, mask)
        out = call(q, k, v, mask, None, None)[0]
    compare(out.transpose(1, 2), q, k, v, mask)
    assert torch.cuda.current_device() == 0
    out = stof_hf.attention(q, k, v, mask, scale=0.2)
    assert out.device == q.device and torch.cuda.current_device() == 0
    compare(out, q, k, v, mask)


@several
@pytest.mark.parametrize("dense", [False, True])
def test_masks_are_built_where_they_are_asked_for(dense):
    mask = SparseMask.from_pattern(patterns.Longformer(40, (0,)), 700, device=SECOND)
    if dense:
        mask = SparseMask.from_dense(mask.to_dense())
    assert mask.device == torch.device(SECOND) and torch.cuda.current_device() == 0
    want = SparseMask.from_pattern(patterns.Longformer(40, (0,)), 700)
    assert torch.equal(mask.to_dense().cpu(), want.to_dense())


@several
def test_a_mask_goes_to_each_gpu_once_and_not_by_itself():
    mask = SparseMask.from_pattern(patterns.Causal(), 700, device="cuda:0")
    q, k, v = make(SECOND, 700, 700, 64)
    with pytest.raises(MaskError, match="the mask is on cuda:0"):
        stof_hf.attention(q, k, v, mask)
    there = mask.to(SECOND)
    compare(stof_hf.attention(q, k, v, there, scale=0.2), q, k, v, there)
    assert mask.to(SECOND).tile_bits is there.tile_bits
    with pytest.raises(UnsupportedError, match="move them to one device"):
        stof_hf.attention(q, k.to("cuda:0"), v, there)


@several
def test_two_gpus_at_once():
    found = {}

    def work(index):
        device = torch.device("cuda", index)
        mask = SparseMask.from_pattern(patterns.Longformer(40, (0, 1)), 1000, device=device)
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            inputs = make(device, 1000, 1000, 64, index)
            outs = [stof_hf.attention(*inputs, mask, scale=0.2) for _ in range(20)]
            torch.cuda.synchronize()
        assert all(torch.equal(out, outs[0]) for out in outs)
        found[index] = outs[0], inputs, mask

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, inputs, mask in found.values():
        compare(out, *inputs, mask)
    assert len(found) == 2


def test_streams_of_one_gpu_share_nothing():
    """Split rows go through memory of their own: two launches that overlap must not mix."""
    mask = SparseMask.from_pattern(patterns.Longformer(40, (0, 1)), 4096, device="cuda")
    inputs = [make("cuda", 4096, 4096, 64, seed) for seed in range(2)]
    alone = [stof_hf.attention(*x, mask, scale=0.2) for x in inputs]
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in inputs], [[], []]
    for _ in range(20):
        for stream, x, out in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(stof_hf.attention(*x, mask, scale=0.2))
    torch.cuda.synchronize()
    for want, many in zip(alone, outs, strict=True):
        assert all(torch.equal(want, out) for out in many)


@several
def test_a_model_whose_layers_lie_on_two_gpus():
    from accelerate import dispatch_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).half().to("cuda:0").eval()
    model.set_attn_implementation("stof")
    stof_hf.set_pattern(model, patterns.SlidingWindow(50, 0))
    ids = torch.randint(1, 97, (2, 300), device="cuda:0")
    valid = (torch.arange(300) >= torch.tensor([[0], [90]])).long().to("cuda:0")
    with torch.no_grad():
        want = model(ids, attention_mask=valid).logits
        places = {
            "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0,
            "model.layers.1": 1, "model.norm": 1, "lm_head": 1,
        }  # fmt: skip
        model = dispatch_model(model, places)
        got = model(ids, attention_mask=valid).logits
        new = model.generate(ids, attention_mask=valid, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(got.to("cuda:0")[valid.bool()], want[valid.bool()])
    assert new.shape == (2, 304)
