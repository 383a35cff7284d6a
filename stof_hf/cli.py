"""The `stof` command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import MaskError, StofError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
mask_app = typer.Typer(no_args_is_help=True, help="Look at masks.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure.")
cache_app = typer.Typer(no_args_is_help=True, help="Look at tuned results, move and remove them.")
app.add_typer(mask_app, name="mask")
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
console = Console()
if not console.is_terminal:
    console = Console(width=140)  # tables in a log are not cut to 80 columns


PATTERN_HELP = "Name of a pattern (causal, longformer, ...) or its JSON."


def _numbers(text: str | None) -> list[int] | None:
    """Read "1,8,16".

    >>> _numbers("1,8,16")
    [1, 8, 16]
    """
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,8,16") from None


def _dtype(name: str | None) -> Any:
    import torch

    if name is None:
        return None
    if name not in ("float16", "bfloat16", "float32"):
        raise typer.BadParameter(f"{name!r} is none of float16, bfloat16 and float32")
    return getattr(torch, name)


@app.command()
def demo(
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of the long input; 4096 on a GPU, else 2048.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the BERT; by default the packaged MiniLM.")
    ] = None,
) -> None:
    """Run a real pretrained BERT through "stof" and through its own attention, and compare."""
    from .demo import run

    if not run(console, model_path=model, seq_len=seq_len):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Show the GPU, compilers, versions, and which backends work here and why not."""
    from .info import report

    console.print(report())


@app.command()
def build(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="For GPUs of this architecture, such as 80 or 90a; by default, yours."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="For all architectures.")] = False,
) -> None:
    """Compile the CUDA kernels ahead of their first use.

    stof build --arch 90a
    """
    from rich.progress import Progress

    from .kernels import cuda_build, jit
    from .kernels.cuda_kernels import all_kernels

    arch = arch or cuda_build.present_gpus()
    if not (arch or every):
        raise typer.BadParameter("there is no CUDA GPU here: name --arch, such as 90a, or --all")
    kernels = all_kernels() if every else cuda_build.kernels_for(arch)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("CUDA kernels", total=len(kernels) + 1)
        cuda_build.build(kernels, done=lambda: progress.advance(task))
    console.print(f"{len(kernels)} kernel libraries are ready; the cache is {jit.cache_dir()}")


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Folder, or name on the Hugging Face hub.")],
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens; keys in decoding.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="By default float16 on a GPU, else float32.")
    ] = None,
    phase: Annotated[str, typer.Option(help="forward, prefill or decode.")] = "forward",
    pattern: Annotated[str | None, typer.Option(help="A pattern set on the model.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds that the search may take.")] = 60,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    seed: Annotated[int, typer.Option(help="Of what the search draws.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the report here.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Save a picture here.")] = None,
) -> None:
    """Search how a model's layers run fastest here, and remember it for stof_hf.apply_tuned.

    stof tune google-bert/bert-base-uncased --batch 8 --seq-len 512
    """
    import torch
    from transformers import AutoModel

    from . import set_pattern
    from .tuning import tune as tuning

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    number = _dtype(dtype or ("float32" if where == "cpu" else "float16"))
    try:
        loaded = AutoModel.from_pretrained(model, attn_implementation="stof", dtype=number)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot load {model}: {error}") from error
    loaded = loaded.to(where).eval()
    if pattern is not None:
        set_pattern(loaded, _pattern(pattern, {}))
    report = tuning.tune(
        loaded, batch_size=batch, seq_len=seq_len, phase=phase, budget_s=budget, seed=seed
    )
    console.print(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if plot_path is not None:
        report.plot(plot_path)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, or name on the Hugging Face hub.")],
    pattern: Annotated[
        list[str], typer.Option(help=f"{PATTERN_HELP} Repeat it to compare several.")
    ],
    dataset: Annotated[
        str, typer.Option(help="Text file, folder of *.txt, or name on the Hugging Face hub.")
    ],
    config: Annotated[str | None, typer.Option(help="The dataset's configuration.")] = None,
    split: Annotated[
        str | None, typer.Option(help="By default test, else validation, else train.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The dataset's column of texts.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window; by default at most 1024.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows, from the first one on.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a forward.")] = 4,
    dtype: Annotated[
        str | None, typer.Option(help="By default the checkpoint's on a GPU, else float32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tokens that are masked.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the results here.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Save a picture here.")] = None,
) -> None:
    """Measure what patterns cost a model in quality, beside their density and speed.

    Perplexity of causal language models, pseudo-perplexity of masked ones, and for encoders how
    similar embeddings stay to those of dense attention.

    stof eval openai-community/gpt2 --pattern sliding-window --pattern longformer --dataset text.txt
    """
    from rich.progress import MofNCompleteColumn, Progress

    from . import evaluate as evaluation
    from .bench.attention import default_device
    from .evaluate.models import length_for

    chosen = [_pattern(text, {}) for text in pattern]
    where = default_device(device)
    loaded, tokenizer, metric = evaluation.load(model, where, _dtype(dtype))
    windows = evaluation.windows(
        evaluation.read(dataset, config=config, split=split, column=column),
        tokenizer, length_for(loaded, seq_len), samples, ending=metric != "perplexity",
    )  # fmt: skip
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        data = evaluation.evaluate(
            loaded, windows, chosen, metric, batch=batch, seed=seed,
            track=lambda items, what: progress.track(items, description=what),
        )  # fmt: skip
    source = {"name": dataset, "config": config, "split": split, "column": column}
    console.print(evaluation.table(data))
    console.print(
        f"{len(windows.ids)} windows of {windows.ids.shape[1]} tokens of {dataset}; "
        f"{data['dtype']} on {data['environment']['device']}", highlight=False, markup=False,
    )  # fmt: skip
    if json_path is not None:
        json_path.write_text(json.dumps({**data, "dataset": source}, indent=1) + "\n")
    if plot_path is not None:
        evaluation.plot(data, plot_path)


@app.command()
def models(
    types: Annotated[
        str | None, typer.Option(help="Such as bert,llama; all model types by default.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Results; a file that exists is completed.")
    ] = None,
    markdown_path: Annotated[
        Path | None, typer.Option("--markdown", help="Save the table here.")
    ] = None,
) -> None:
    """Compare "stof" with eager attention on a tiny model of each model type of Transformers.

    The exit status is 1 where a model type silently differs from eager or ignores "stof", or fails
    without a clear error.
    """
    from rich.progress import MofNCompleteColumn, Progress

    from .audit import audit, markdown, model_types, summary
    from .audit.report import FAILURES, outcome_of, share

    known = model_types()
    names = known if types is None else types.split(",")
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"Transformers has no model type {unknown.pop()!r}")
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("model types", total=len(names))
        data = audit(names, json_path=json_path, done=lambda *_: progress.advance(task))
    if markdown_path is not None:
        markdown_path.write_text(markdown(data))
    for name, result in data["types"].items():
        outcome, reason = outcome_of(result)
        if types is not None or outcome in FAILURES:
            console.print(f"{name}: {outcome} {reason}".rstrip(), highlight=False, markup=False)
    counts = summary(data)
    console.print(", ".join(f"{name} {count}" for name, count in counts.items()), highlight=False)
    console.print(share(counts), highlight=False)
    if any(counts.get(outcome) for outcome in FAILURES):
        raise typer.Exit(1)


@mask_app.command("show")
def mask_show(
    pattern: Annotated[str, typer.Argument(help=PATTERN_HELP)],
    seq_len: Annotated[int, typer.Option(min=1, help="Number of queries and keys.")],
    window: Annotated[int | None, typer.Option(help="Tokens seen on each side.")] = None,
    global_tokens: Annotated[str | None, typer.Option(help="Positions, such as 0,1,2.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field, such as random_blocks=2.")
    ] = None,
    causal: Annotated[bool, typer.Option(help="Combine with a causal mask.")] = False,
    out: Annotated[Path | None, typer.Option(help="Save a picture here.")] = None,
) -> None:
    """Show a mask's density and size, and save a picture of it.

    stof mask show longformer --seq-len 4096 --window 64 --out mask.png
    """
    from . import SparseMask, patterns

    fields: dict[str, Any] = {}
    if window is not None:
        fields["window"] = window
    if global_tokens is not None:
        fields["global_tokens"] = _numbers(global_tokens)
    for item in option or []:
        name, _, value = item.partition("=")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            raise typer.BadParameter(f"--set {item}: write NAME=NUMBER") from None
    chosen = _pattern(pattern, fields)
    if causal:
        chosen = chosen & patterns.Causal()
    mask = SparseMask.from_pattern(chosen, seq_len)
    console.print(mask, highlight=False)
    if out is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5, 4.5), layout="constrained")
        mask.plot(figure.subplots())
        figure.savefig(out, dpi=150)
        console.print(f"saved {out}", highlight=False)


# What a name alone stands for, where the pattern has no default of its own.
DEFAULTS = {
    "Longformer": {"window": 64},
    "BigBird": {"window": 64},
    "SlidingWindow": {"window": 64},
    "Dilated": {"window": 64, "dilation": 2},
    "PrefixLM": {"prefix": 64},
    "Chunked": {"size": 256},
}


def _pattern(text: str, fields: dict[str, Any]) -> Any:
    from . import patterns

    if text.lstrip().startswith("{"):
        try:
            return patterns.Pattern.from_json(json.loads(text))
        except ValueError as error:
            raise typer.BadParameter(f"not a pattern: {error}") from error
    named = {name.lower(): name for name in ("Full", "Causal", *DEFAULTS)}
    key = text.lower().replace("-", "").replace("_", "")
    if key not in named:
        raise typer.BadParameter(f"no pattern is called {text!r}; there are {', '.join(named)}")
    name = named[key]
    given = {**DEFAULTS.get(name, {}), **fields}
    if name == "SlidingWindow":
        width = given.pop("window")
        given = {"left": width, "right": width, **given}
    cls = getattr(patterns, name)
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := set(given) - set(known):
        has = ", ".join(known) or "no fields"
        raise typer.BadParameter(f"{name} has no {unknown.pop()!r}; it has {has}")
    try:
        return cls(**given)
    except MaskError as error:
        raise typer.BadParameter(str(error)) from error


# Options of the benchmarks of attention and of its backward.
Masks = Annotated[str | None, typer.Option(help="Such as causal,longformer; all by default.")]
Heads = Annotated[int | None, typer.Option(help="Query heads.")]
KVHeads = Annotated[int | None, typer.Option(help="Key and value heads.")]
HeadDim = Annotated[int | None, typer.Option(help="Head size.")]
Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16 or float32.")]
Contestants = Annotated[str | None, typer.Option(help="Such as stof,flex_triton; all by default.")]


def _sizes(batch: str | None, seq_len: str | None, **others: Any) -> dict[str, Any]:
    """Those of a grid's sizes that were given."""
    sizes = others | {"batch": _numbers(batch), "seq_len": _numbers(seq_len)}
    return {name: value for name, value in sizes.items() if value is not None}


@bench_app.command("attention")
def bench_attention(
    quick: Annotated[bool, typer.Option(help="A few cells only.")] = False,
    masks: Masks = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, such as 1,8,16.")] = None,
    seq_len: Annotated[str | None, typer.Option(help="Lengths, such as 512,4096.")] = None,
    heads: Heads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    dtype: Dtype = None,
    contestants: Contestants = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that compile ahead of the timing.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Results; a file that exists is completed.")
    ] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Save a picture here.")] = None,
) -> None:
    """Time attention on identical masks: PyTorch, FlexAttention, FlashAttention-4 and ours.

    Without options: the grid of the paper's figures with head size 64, and head size 128 with
    grouped-query attention at 4,096 to 32,768 tokens. Any size named replaces that grid. The exit
    status is 1 where a contestant is missing, raised, or computed something else.
    """
    from .bench import attention, summary
    from .bench.contestants import CONTESTANTS
    from .bench.masks import MASKS

    where = attention.default_device(device)
    chosen_masks = masks.split(",") if masks else list(MASKS)
    sizes = _sizes(batch, seq_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    cells = attention.cells(where, chosen_masks, quick=quick, **sizes)
    names = contestants.split(",") if contestants else list(CONTESTANTS)

    def progress(cell: Any, record: dict[str, Any]) -> None:
        times = " ".join(
            f"{name} {result['time_us']:.1f}"
            for name, result in record["results"].items()
            if "time_us" in result
        )
        console.print(f"{cell}: {times}", highlight=False, soft_wrap=True)

    data = attention.run(
        cells, contestants=names, device=where, json_path=json_path, jobs=jobs, progress=progress
    )
    console.print(summary.detail(data))
    console.print(summary.summary(data))
    for line in summary.problems(data):
        console.print(line, style="red", markup=False)
    if plot_path is not None:
        from .bench.plot import plot

        plot(data, plot_path)
    if summary.problems(data):
        raise typer.Exit(1)


@bench_app.command("backward")
def bench_backward(
    masks: Masks = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, such as 1,8.")] = None,
    seq_len: Annotated[str | None, typer.Option(help="Lengths, such as 1024,4096.")] = None,
    heads: Heads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = None,
    dtype: Dtype = None,
    contestants: Contestants = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the results here.")] = None,
) -> None:
    """Time gradients of attention on identical masks: PyTorch, FlexAttention and ours.

    The exit status is 1 where a contestant raised or computed something else.
    """
    from .bench import backward
    from .bench.attention import default_device

    where = default_device(device)
    sizes = _sizes(batch, seq_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    chosen = backward.cells(where, masks.split(",") if masks else backward.MASKS, **sizes)
    names = contestants.split(",") if contestants else list(backward.NAMES)
    failed = []

    def progress(cell: Any, record: dict[str, Any]) -> None:
        for name, result in record["results"].items():
            if result["status"] not in ("ok", "unavailable"):
                failed.append(name)
                text = f"{cell}: {name} {result['status']} {result.get('error', '')}"
                console.print(text, style="red", markup=False)

    data = backward.run(
        chosen, contestants=names, device=where, json_path=json_path, progress=progress
    )
    console.print(backward.table(data))
    if failed:
        raise typer.Exit(1)


@bench_app.command("roofline")
def bench_roofline(
    results: Annotated[Path, typer.Argument(help="What stof bench attention --json saved.")],
    picture: Annotated[Path, typer.Argument(help="Save the picture here.")],
) -> None:
    """Draw how near the cells of a result file come to what the GPU can do."""
    from .bench.attention import load
    from .bench.roofline import roofline

    for mask, share in roofline(load(results), picture).items():
        console.print(f"{mask}: {share:.0%} of the roof from 1024 tokens on", highlight=False)


@bench_app.command("masks")
def bench_masks(
    patterns: Annotated[
        str | None, typer.Option(help="Such as causal,longformer; all by default.")
    ] = None,
    seq_len: Annotated[str | None, typer.Option(help="Lengths, such as 4096,131072.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the results here.")] = None,
) -> None:
    """Time how masks are built from closed-form patterns, and the plans that kernels stream.

    On a GPU beside FlexAttention's create_block_mask, compiled.
    """
    from .bench import building
    from .bench.attention import default_device

    names = patterns.split(",") if patterns else list(building.PATTERNS)
    lengths = _numbers(seq_len) or building.LENGTHS
    where = default_device(device)
    console.print(building.table(building.run(names, lengths, device=where, json_path=json_path)))


# Options of the benchmarks of whole models.
Models = Annotated[str | None, typer.Option(help="Such as bert_base,t5; all by default.")]
Batches = Annotated[str | None, typer.Option(help="Only the cells of these batch sizes.")]


def _zoo_cells(models: str | None, batch: str | None) -> list[Any]:
    """Those of the models named, or of all, with the batch sizes named, or all."""
    from .bench.zoo import ZOO, cells

    sizes = _numbers(batch)
    chosen = cells(models.split(",") if models else ZOO)
    return [cell for cell in chosen if sizes is None or cell.batch in sizes]


@bench_app.command("model")
def bench_model(
    models: Models = None,
    batch: Batches = None,
    contestants: Annotated[
        str | None, typer.Option(help="Such as sdpa,tuned; all by default.")
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds to tune a cell for.")] = 60,
    jobs: Annotated[int, typer.Option(help="Cells that are prepared side by side.")] = 1,
    prepare_s: Annotated[
        float,
        typer.Option("--prepare", help="Seconds; a cell's rest is for the next run."),
    ] = math.inf,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Results; a file that exists is completed.")
    ] = None,
) -> None:
    """Time whole models: Transformers, torch.compile, Liger-Kernel and ours, under one mask.

    Each cell runs in a process of its own; several may compile at once, and one at a time measures.
    The exit status is 1 where a contestant raised or computed something else.
    """
    from .bench import model
    from .bench.attention import default_device

    chosen = _zoo_cells(models, batch)
    names = contestants.split(",") if contestants else list(model.CONTESTANTS)
    failed = []

    def progress(cell: Any, record: dict[str, Any]) -> None:
        results = record["results"]
        times = (f"{n} {r['time_ms']:.3f}" for n, r in results.items() if "time_ms" in r)
        console.print(cell, *times, highlight=False, soft_wrap=True)
        for name, result in results.items():
            if result["status"] != "ok":
                failed.append(name)
                text = f"{name}: {result['status']} {result.get('error')}"
                console.print(text, style="red", markup=False)

    where = default_device(device)
    data = model.run_apart(
        chosen, where, progress, jobs=jobs, contestants=names, budget_s=budget_s,
        prepare_s=prepare_s, json_path=json_path,
    )  # fmt: skip
    console.print(model.table(data))
    if failed:
        raise typer.Exit(1)


@bench_app.command("search")
def bench_search(
    models: Models = None,
    batch: Batches = None,
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds to tune a cell for.")] = 15,
    seeds: Annotated[int, typer.Option(min=0, help="Random searches of a cell.")] = 3,
    exhaustive: Annotated[
        str | None,
        typer.Option(help="Cells to search exhaustively, such as bert_base:1x128,vit_base:1x65."),
    ] = None,
    exhaustive_s: Annotated[
        float, typer.Option("--exhaustive-budget", min=1, help="Seconds for each of these.")
    ] = 600,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Results; a file that exists is completed.")
    ] = None,
) -> None:
    """Measure the search: its time, a cache hit's, and what it finds beside random and exhaustive.

    Build the CUDA kernels before (stof build): a search begins with empty caches but for them. An
    exhaustive search takes hours where spaces are large; with --json, the same command goes on
    where it stopped.
    """
    from .bench import search
    from .bench.attention import default_device
    from .bench.zoo import Cell

    chosen = _zoo_cells(models, batch)
    small = [Cell.parse(text) for text in exhaustive.split(",")] if exhaustive else []
    if others := [str(cell) for cell in small if cell not in chosen]:
        there = ", ".join(map(str, chosen))
        raise StofError(f"{others[0]} is not among the cells that are measured: {there}")

    def progress(cell: Any, record: dict[str, Any]) -> None:
        found, ratios = record["search"], search.ratios(record)
        text = f"{cell}: {found['seconds']} s, {found['measurements']} measurements"
        text += f"; a hit {record['hit']['seconds']} s"
        if "random" in ratios:
            text += f"; the best random search takes {ratios['random']:.3f} times as long"
        console.print(text, highlight=False, soft_wrap=True)
        share = search.covered(record)
        if share is not None and share < 1:
            text = f"{cell}: the exhaustive search is not complete, {share:.1%} of its candidates"
            console.print(text, style="yellow", highlight=False, soft_wrap=True)

    data = search.run(
        chosen, progress, device=default_device(device), budget_s=budget_s, seeds=seeds,
        exhaustive=small, exhaustive_s=exhaustive_s, json_path=json_path,
    )  # fmt: skip
    console.print(search.table(data))


@bench_app.command("padded")
def bench_padded(
    contestants: Annotated[
        str | None, typer.Option(help="Such as sdpa,unpadded; all by default.")
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds to tune for.")] = 60,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the results here.")] = None,
) -> None:
    """Time BERT-base on 16 sequences of 64 to 2,048 tokens: padded, and unpadded.

    The exit status is 1 where a contestant raised or computed something else.
    """
    from .bench import padded
    from .bench.attention import default_device

    names = contestants.split(",") if contestants else list(padded.CONTESTANTS)
    where = default_device(device)
    data = padded.run(names, device=where, budget_s=budget_s, json_path=json_path)
    console.print(padded.table(data))
    if any(result["status"] != "ok" for result in data["results"].values()):
        raise typer.Exit(1)


@bench_app.command("decode")
def bench_decode(
    batch: Annotated[str | None, typer.Option(help="Batch sizes, such as 1,16.")] = None,
    cached: Annotated[str | None, typer.Option(help="Cached keys, such as 1024,32768.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the results here.")] = None,
) -> None:
    """Time one decode step: PyTorch, FlashAttention-4 and ours, in bf16, 32/8 heads of size 128.

    Ours also under the masks of a step: a causal view, and a window of 1024 keys.
    """
    from .bench import decode
    from .bench.attention import default_device

    sizes = _numbers(batch) or decode.BATCH, _numbers(cached) or decode.CACHED
    data = decode.run(*sizes, device=default_device(device), json_path=json_path)
    console.print(decode.table(data))


@bench_app.command("generate")
def bench_generate(
    contestants: Annotated[
        str | None, typer.Option(help="Such as sdpa,stof; all by default.")
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds to tune a cell for.")] = 30,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the results here.")] = None,
) -> None:
    """Time a step of generation of models of 1B parameters, with a static cache, in CUDA graphs.

    LLaMA behind 4,096 tokens, and Mistral with a window of 1,024 behind 16,384.
    Beside ours: PyTorch, FlexAttention and FlashAttention-4.
    The exit status is 1 where a contestant is missing, raised, or computed something else.
    """
    from .bench import generate
    from .bench.attention import default_device

    names = contestants.split(",") if contestants else list(generate.CONTESTANTS)
    data = generate.run(
        contestants=names, device=default_device(device), budget_s=budget_s, json_path=json_path
    )
    console.print(generate.table(data))
    failed = [
        f"{name}: {result['status']} {result.get('error')}"
        for record in data["cells"]
        for name, result in record["results"].items()
        if result["status"] != "ok"
    ]
    for text in failed:
        console.print(text, style="red", markup=False)
    if failed:
        raise typer.Exit(1)


@bench_app.command("parallel")
def bench_parallel(
    contestants: Annotated[str | None, typer.Option(help="sdpa or stof; both by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the results here.")] = None,
) -> None:
    """Time a forward of a model of 1B parameters on one GPU, and by tensor parallelism on two.

    Mistral with a window of 1,024, on 4,096 tokens.
    The exit status is 1 where a contestant computed something else.
    """
    from .bench import parallel
    from .bench.attention import default_device

    names = contestants.split(",") if contestants else parallel.CONTESTANTS
    data = parallel.run(names, device=default_device(device), json_path=json_path)
    console.print(parallel.table(data))
    if any(result["status"] != "ok" for result in data["results"]):
        raise typer.Exit(1)


@cache_app.command("list")
def cache_list() -> None:
    """Show all tuned results, and which hold here."""
    from .tuning import cache, tables

    console.print(tables.overview(cache.list_(), cache.environment()))


@cache_app.command("show")
def cache_show(id: Annotated[str, typer.Argument(help="As the list names it.")]) -> None:
    """Show a result: its schemes, kernels and times.

    stof cache show 1f2e3d4c
    """
    from .tuning import cache, tables

    for found in cache.show(id):
        console.print(tables.detail(*found))


@cache_app.command("export")
def cache_export(path: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Write what was tuned for this GPU with these versions to a file."""
    from .tuning import cache

    count = cache.export(path, cache.environment())
    console.print(f"results exported to {path}: {count}", highlight=False, soft_wrap=True)


@cache_app.command("import")
def cache_import(path: Annotated[Path, typer.Argument(help="What export wrote.")]) -> None:
    """Add what another machine exported, where it is faster than what is here."""
    from .tuning import cache

    count, where = cache.import_(path)
    console.print(f"results new or faster than before: {count}", highlight=False)
    if differences := where.differences(cache.environment()):
        text = f"they are not used here, being measured with {differences}"
        console.print(text, style="yellow", markup=False, soft_wrap=True)


@cache_app.command("clear")
def cache_clear(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove all tuned results of yours, for every GPU and version."""
    from .tuning import cache

    if not yes:
        typer.confirm(f"Remove all tuned results in {cache.folder()}?", abort=True)
    console.print(f"files removed: {cache.clear()}", highlight=False)


@bench_app.command("own")
def bench_own(
    models: Annotated[str | None, typer.Option(help="Such as longformer,big_bird.")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, such as 1,8.")] = None,
    seq_len: Annotated[str | None, typer.Option(help="Lengths, such as 4096.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save the results here.")] = None,
) -> None:
    """Time a forward of Longformer and BigBird by their own code and by ours, at real sizes."""
    from .bench import own
    from .bench.attention import default_device

    names = models.split(",") if models else ("longformer", "big_bird")
    sizes = _numbers(batch) or own.BATCH, _numbers(seq_len) or own.TOKENS
    console.print(
        own.table(own.run(names, *sizes, device=default_device(device), json_path=json_path))
    )


def main() -> None:
    """Run the command; an error of ours is one line, not a traceback."""
    try:
        app()
    except StofError as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}:[/] {error}", soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
