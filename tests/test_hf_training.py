"""Trainer and accelerate with "stof": dropout, checkpointing, losses, packing, offloading."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import stof_hf

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
CLASSES = {"bert": (BertForMaskedLM, BertConfig), "gpt2": (GPT2LMHeadModel, GPT2Config)}


def model_of(name: str, implementation: str = "stof", **changes: Any) -> Any:
    torch.manual_seed(0)
    cls, config = CLASSES[name]
    made = config(vocab_size=32, **SIZES[name], **changes)
    return cls._from_config(made, attn_implementation=implementation)


def rows() -> list[dict[str, torch.Tensor]]:
    """Sequences that count up from where they begin, the second half of them padded."""
    found = []
    for i in range(64):
        ids = 4 + (i + torch.arange(40)) % 28
        mask = torch.ones_like(ids)
        mask[40 - (i // 32) * 10 :] = 0
        labels = ids.where(mask > 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def losses_of(model: Any, folder: Path, steps: int, **options: Any) -> list[float]:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, seed=0,
        disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_default_dropout_trains(name: str, checkpointing: bool, tmp_path: Path) -> None:
    options = {}
    if checkpointing:
        options = {"gradient_checkpointing": True,
                   "gradient_checkpointing_kwargs": {"use_reentrant": False}}  # fmt: skip
    found = losses_of(model_of(name), tmp_path, 25, **options)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


@pytest.mark.parametrize("name", CLASSES)
def test_losses_without_dropout_are_those_of_eager(name: str, tmp_path: Path) -> None:
    wanted, found = (
        losses_of(model_of(name, implementation, **NO_DROPOUT[name]), tmp_path, 8)
        for implementation in ("eager", "stof")
    )
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    """Each layer is computed twice, with the same elements dropped."""
    given = {key: torch.stack([row[key] for row in rows()[::16]]) for key in rows()[0]}
    grads = []
    for checkpointing in (False, True):
        model = model_of(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        model(**given).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_accelerate_launch(tmp_path: Path) -> None:
    """One process on the CPU, started as users start it."""
    here = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(
        "from pathlib import Path\n"
        "from test_hf_training import losses_of, model_of\n"
        f"losses = losses_of(model_of('bert'), Path({str(tmp_path)!r}), 3)\n"
        "assert len(losses) == 3, losses\n"
        "print('trained')\n"
    )
    paths = [str(here), str(Path(stof_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(script),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr


def small_llama(implementation: str = "stof") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # else a wrong mask would hardly show
    return model


@pytest.mark.parametrize("flash_kwargs", [False, True])
def test_packed_sequences_are_as_each_alone(flash_kwargs: bool) -> None:
    """Without a cache, as in the Trainer: with one, Transformers looks for no packed sequences."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_kwargs, return_tensors="pt")
    sequences = [torch.randint(3, 97, (n,)).tolist() for n in (5, 33, 1, 14)]
    batch = collate([{"input_ids": ids} for ids in sequences])
    assert batch["input_ids"].shape == (1, 53) and ("cu_seq_lens_q" in batch) == flash_kwargs
    model = small_llama()
    packed = model(**batch, use_cache=False)
    alone = [model(torch.tensor([ids])).logits for ids in sequences]
    torch.testing.assert_close(packed.logits, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
    eager = small_llama("eager")
    eager(**batch, use_cache=False).loss.backward()
    packed.loss.backward()
    for got, want in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "memory", [{"cpu": "150KB"}, pytest.param({0: "150KB", "cpu": "150KB"}, marks=pytest.mark.gpu)]
)
def test_layers_that_device_map_auto_offloads(memory: dict[Any, str], tmp_path: Path) -> None:
    model = small_llama()
    window = stof_hf.patterns.SlidingWindow(4, 0)
    stof_hf.set_pattern(model, window)
    ids = torch.randint(3, 97, (2, 20))
    with torch.no_grad():
        want = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=memory,
        offload_folder=tmp_path / "weights", attn_implementation="stof",
    )  # fmt: skip
    assert set(loaded.hf_device_map.values()) == {*memory, "disk"}
    with torch.no_grad():
        got = loaded(ids).logits
    tolerance = 2e-3 if 0 in memory else 1e-4
    torch.testing.assert_close(got.cpu(), want, atol=tolerance, rtol=tolerance)
