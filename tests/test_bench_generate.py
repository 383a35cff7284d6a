"""stof bench generate, in small, on the CPU."""

import contextlib
import dataclasses
import importlib.util
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F
from transformers import masking_utils

from stof_hf.bench import flash, generate
from stof_hf.bench.contestants import NO_FLASH_ATTN
from stof_hf.errors import StofError

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 60,
}  # fmt: skip
CELLS = [
    generate.Cell("llama_1b", 2, 70), generate.Cell("mistral_1b", 1, 90),
    generate.Cell("mistral_1b", 1, 90, whole=False),
]  # fmt: skip


def options(cell):
    return {**SMALL, **({"sliding_window": 40} if "mistral" in cell.model else {})}


def one_query(q, k, v, *, seqused_k, softmax_scale, window_size):
    """What flash_attn_varlen_func computes of [B, 1, H, D], [B, S, Hkv, D] and int32 [B]."""
    assert q.shape[1] == 1 and seqused_k.dtype == torch.int32 and seqused_k.stride() == (1,)
    distance = seqused_k[:, None] - 1 - torch.arange(k.shape[1])
    left, right = window_size
    assert right == (None if left is None else 0)
    allowed = (distance >= 0) & (distance <= (k.shape[1] if left is None else left))
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), allowed[:, None, None],
        scale=softmax_scale, enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_attn(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        module = importlib.util.module_from_spec(ModuleSpec(name, None))
        module.flash_attn_varlen_func = one_query
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_contestants_compute_the_same(cell, tmp_path, flash_attn):
    path = tmp_path / "generate.json"
    data = generate.run(
        [cell], ["sdpa", "flash", "stof", "stof tuned"], device=CPU, options=options(cell),
        budget_s=1, json_path=path,
    )  # fmt: skip
    results = data["cells"][0]["results"]
    assert {n: r["status"] for n, r in results.items()} == dict.fromkeys(results, "ok"), results
    assert all(r["time_ms"] > 0 for r in results.values()) and path.exists()
    assert generate.table(data).row_count == 1


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_steps_follow_each_other_and_begin_again(cell, monkeypatch):
    monkeypatch.setattr(generate, "_ROOM", 3)
    model = generate._model(cell, "stof", torch.float32, CPU, options(cell))
    step = generate._Step(cell, model, CPU)
    with torch.no_grad():
        seen = [step() for _ in range(4)]
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[3])


def logits(cell, implementation, compiled=False):
    """Of four steps."""
    model = generate._model(cell, implementation, torch.float32, CPU, options(cell))
    if compiled:
        torch.compiler.reset()
        model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    step = generate._Step(cell, model, CPU)
    with torch.no_grad():
        return torch.stack([step() for _ in range(4)])


@pytest.mark.parametrize("copied, seen", [(False, 2), (True, 1)])
def test_flex_masks_keep_the_length_that_they_were_made_for(copied, seen, monkeypatch):
    def made(mask_mod, **sizes):
        return mask_mod

    monkeypatch.setattr(masking_utils, "create_block_mask", made)
    length = torch.tensor(5)
    with generate.copied_lengths() if copied else contextlib.nullcontext():
        make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"]
        function = make(batch_size=1, q_length=1, kv_length=128, q_offset=length, device="cpu")
    length += 1
    zero = torch.tensor(0)
    # Transformers' own is wrong, and would be noticed here once it is not.
    allowed = [bool(function(zero, zero, zero, torch.tensor(k))) for k in (5, 6, 7)]
    assert sum(allowed) == seen
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"].__name__ == (
        "flex_attention_mask"
    )


NOT_FULL = generate.Cell("mistral_1b", 2, 30, whole=False)


@pytest.mark.parametrize("cell", [*CELLS, NOT_FULL], ids=str)
def test_flash_sees_what_sdpa_sees_at_every_step(cell, flash_attn):
    got, want = logits(cell, flash.NAME), logits(cell, "sdpa")
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_flash_compiles_without_a_graph_break(flash_attn):
    got, want = logits(CELLS[1], flash.NAME, compiled=True), logits(CELLS[1], flash.NAME)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_flash_is_unavailable_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    names = ["sdpa", "flash", "flash compiled"]
    data = generate.run(CELLS[:1], names, device=CPU, options=options(CELLS[0]))
    sdpa, *others = data["cells"][0]["results"].values()
    assert sdpa["status"] == "ok"
    assert others == 2 * [{"status": "unavailable", "error": NO_FLASH_ATTN}]
    assert generate.table(data).row_count == 1


def test_no_cell_makes_the_shapes_of_another_dynamic(monkeypatch):
    made, inputs = generate._model, []

    def backend(graph, examples):
        inputs.extend(examples)
        return graph.forward

    def compiled(*args):
        model = made(*args)
        model.forward = torch.compile(model.forward, backend=backend)
        return model

    monkeypatch.setattr(generate, "_model", compiled)
    cells = [dataclasses.replace(CELLS[0], batch=batch) for batch in (1, 2)]
    generate.run(cells, ["sdpa"], device=CPU, options=options(cells[0]))
    assert inputs and not any(isinstance(one, torch.SymInt) for one in inputs)


def test_another_model_is_found_out(monkeypatch):
    cell = CELLS[0]
    right = generate._model

    def other(cell, implementation, *args):
        model = right(cell, implementation, *args)
        if implementation == "stof":
            torch.nn.init.ones_(model.lm_head.weight)
        return model

    monkeypatch.setattr(generate, "_model", other)
    data = generate.run([cell], ["stof"], device=CPU, options=options(cell))
    assert data["cells"][0]["results"]["stof"]["status"] == "wrong"


def test_windows_are_read_from_the_cache():
    for whole, kept in ((True, 90 + generate._ROOM), (False, 40)):
        cell = dataclasses.replace(CELLS[1], whole=whole)
        model = generate._model(cell, "sdpa", torch.float32, CPU, options(cell))
        assert generate._Step(cell, model, CPU).cache.layers[0].keys.shape[2] == kept


def test_contestants_have_names():
    with pytest.raises(StofError, match="no contestant is called 'vllm'; there are sdpa"):
        generate.run(contestants=["vllm"], device=CPU)


def test_tensors_of_numbers_are_made_once():
    with generate._Constants():
        one, same, other = torch.tensor([-1]), torch.tensor([-1]), torch.tensor([-1], dtype=int)
        assert torch.equal(torch.zeros(2)[one], torch.zeros(1))
    assert one is same and one is not other and torch.tensor([-1]) is not one
