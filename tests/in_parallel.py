"""A model divided among two processes, beside the whole model in each of them.

Run by torchrun; an assertion that fails ends both.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard

import stof_hf
from stof_hf import MaskError, StofWarning, patterns
from stof_hf.fusion.install import find

LAYERS = 2
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


def save(folder: Path) -> None:
    """A checkpoint with a pattern of its own."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="stof")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # so that attention is not nearly uniform
    stof_hf.set_pattern(model, patterns.SlidingWindow(30, 0), persist=True)
    model.save_pretrained(folder)


def load(folder, **options):
    cls = transformers.LlamaForCausalLM
    return cls.from_pretrained(folder, attn_implementation="stof", dtype="float32", **options)


def inputs(device):
    """Two sequences, one of which is padded on the left."""
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 96, (2, 100), generator=noise)
    valid = (torch.arange(100) >= torch.tensor([[0], [37]])).long()
    return {"input_ids": ids.to(device), "attention_mask": valid.to(device)}


def compare_gradients(model, whole):
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
        error = (grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-4, f"the gradient of {name} is off by {error:.1e}"


def tensor_parallel(folder, device):
    model, whole = load(folder, tp_plan="auto").eval(), load(folder).to(device).eval()
    given = inputs(device)
    real = given["attention_mask"].bool()

    def compare():
        with torch.no_grad():
            got, want = (m(**given).logits[real] for m in (model, whole))
        torch.testing.assert_close(got, want, **TOLERANCE)

    compare()
    tokens = [m.generate(**given, max_new_tokens=4, do_sample=False) for m in (model, whole)]
    assert torch.equal(*tokens)
    report = stof_hf.tune(model, batch_size=2, seq_len=32, budget_s=1, progress=False)
    assert report.installed == 0 and len(report.skipped) == LAYERS
    assert all("tensor parallel" in why for why in report.skipped.values()), report.skipped
    for m in (model, whole):
        stof_hf.set_pattern(m, patterns.Longformer(10, (0,)) & patterns.Causal())
    compare()
    if device == "cuda":
        stof_hf.use_graphs(model)
        with pytest.warns(StofWarning, match="tensor parallel"):
            compare()
        stof_hf.restore(model)
    for m in (model, whole):
        m(**given, labels=given["input_ids"].masked_fill(~real, -100)).loss.backward()
    compare_gradients(model, whole)
    for_each_head = patterns.Custom(lambda b, h, q, k: k >= q - 10 * h, heads=4)
    stof_hf.set_pattern(model, for_each_head, persist=False)
    with pytest.raises(MaskError, match="4 heads, the tensors hold 2 and 2"):
        model(**given)


def fully_sharded(model, device):
    if device == "cuda":
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters())  # prepared with its model, or neither is
        return Accelerator(fsdp_plugin=plugin).prepare(model, optimizer)[0]
    # Accelerate has FSDP for GPUs and their like alone.
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    return model


def fsdp(folder, device):
    """Each process has one of the sequences."""
    model, whole = fully_sharded(load(folder), device), load(folder).to(device)
    assert not find(model)  # nothing for `tune`
    ids = inputs(device)["input_ids"]
    mine = ids[dist.get_rank()][None]
    got, want = model(mine, labels=mine), whole(ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits[dist.get_rank()][None], **TOLERANCE)
    got.loss.backward()
    want.loss.backward()
    compare_gradients(model, whole)


if __name__ == "__main__":
    tensor_parallel(*sys.argv[1:])
    fsdp(*sys.argv[1:])
    dist.destroy_process_group()
