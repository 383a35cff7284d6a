"""`stof_hf.tune` and `stof_hf.apply_tuned`: search, check, install, remember."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ..errors import StofError, StofWarning, UnsupportedError
from ..fusion import fused
from ..fusion.fused import Choice
from ..fusion.install import FAMILIES, Found, find, install
from ..fusion.layer import attention_of, implementation
from ..fusion.layer_ops import Scheme
from ..fusion.packing import unpack
from ..masks.cache import mask_for
from ..masks.pattern import Pattern
from ..masks.patterns import Causal, Full
from . import cache
from .inputs import Inputs, make_inputs, run
from .keys import PHASES, Key, mask_bucket, mask_distance
from .measure import Measurer, measurer_for
from .report import LayerReport, SegmentReport, TuneReport
from .sample import Sample, capture, pattern_of
from .search import Known, Result, search

__all__ = ["apply_tuned", "tune"]

Phase = Literal["forward", "prefill", "decode"]
#: Of the time that is left, what any kind of layers may take.
_LEAST_SHARE = 0.1
#: Of the time of kinds that are not searched last, what is kept for searching them again.
_AGAIN = 0.25


def tune(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    batch_size: int = 1,
    seq_len: int | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    phase: Phase = "forward",
    budget_s: float = 60,
    apply: bool = True,
    progress: bool = True,
    seed: int = 0,
) -> TuneReport:
    """Search how a model's layers and embeddings are computed fastest, keep that, and install it.

    Layers are replaced in place: outputs agree within rounding, parameters, state_dict and what
    is saved stay what they were (query, key and value weights become views of one tensor, the
    only copy), and `stof_hf.restore` puts everything back. What was found is used in evaluation
    without gradients (`torch.no_grad()`); everything else runs the layers' own code. Each result
    is checked against the layer's own code, and used only where it measured faster.

    Args:
        model: a Transformers model (BERT, RoBERTa, ELECTRA, DistilBERT, GPT-2, LLaMA, Mistral,
            Qwen2, Qwen3, ModernBERT, T5, ViT), on the device and in the dtype in which it will run.
        example_inputs: what the model is called with, instead of random inputs of a shape.
        batch_size, seq_len: of random inputs; by default 1, and as many tokens as the model takes,
            but at most 512. In decoding, seq_len counts the keys.
        shapes: several (batch_size, seq_len), instead of one.
        phase: "forward", "prefill" (filling a cache), or "decode" (one token more). What is found
            for one row, a token of one sequence, may be for one row alone.
        budget_s: seconds that the search may take for all shapes together. On a GPU, processes of
            its own compile meanwhile, one for each core, and end with it.
        apply: whether to install what was found.
        progress: whether to show a bar.
        seed: of random inputs, and of what the search draws.

    Returns:
        A `TuneReport`: print it, or see its `plot()` and `to_json()`. Ctrl-C ends the search early
        with what was found until then.

    Raises:
        UnsupportedError: no layer of the model is known, or it needs inputs that only you can give.
        StofError: arguments that contradict each other.

    >>> model = AutoModel.from_pretrained(name, attn_implementation="stof")  # doctest: +SKIP
    >>> report = stof_hf.tune(model.half().cuda(), batch_size=8, seq_len=512)  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    """
    begin = time.monotonic()
    if phase not in PHASES:
        raise StofError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
    if example_inputs is not None and (shapes or seq_len or batch_size != 1):
        raise StofError("example_inputs have a shape: give either them, or sizes")
    layers, report = _begin(model, phase)
    alike = [found for found in layers if found.reason is None]
    if not alike:
        return report
    measurer = measurer_for(_device(alike))
    known = set(measurer.times)
    wanted: Sequence[Any] = (
        [example_inputs] if example_inputs else shapes or [(batch_size, seq_len)]
    )
    choices: dict[str, dict[int, Choice | None]] = {}
    done = False
    with (
        _evaluating(model), torch.no_grad(), measurer.compiling(),
        _bar(progress, budget_s) as show,
    ):  # fmt: skip
        try:
            for shape in wanted:
                inputs = shape if example_inputs else make_inputs(model, *shape, phase, seed)
                _tune_shape(
                    model, alike, inputs, measurer, choices, report,
                    budget_s=budget_s / len(wanted), seed=seed, show=show,
                )  # fmt: skip
                if report.interrupted:
                    break
            done = True
        finally:
            if not (apply and done):
                choices.clear()
            report.installed = len(install(alike, choices))
            _unpack(found for found in alike if "_stof_fused" not in vars(found.module))
    report.timings = {
        key: None if math.isinf(taken) else taken for key, taken in measurer.times.items()
    }
    report.measurements = len(set(measurer.times) - known)
    report.seconds = time.monotonic() - begin
    return report


def apply_tuned(model: nn.Module, *, strict: bool = False) -> TuneReport:
    """Install what `stof_hf.tune` found before, here or for the package, and measure nothing.

    Args:
        model: as for `tune`: of the same configuration, dtype and GPU.
        strict: raise StofError instead of warning where nothing was found, or what was found does
            not fit.

    Returns:
        A `TuneReport` with what was installed, for all shapes that were tuned.

    >>> import stof_hf
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=48)).eval()
    >>> stof_hf.apply_tuned(model, strict=True)
    Traceback (most recent call last):
    stof_hf.errors.StofError: nothing is tuned for this model, dtype and GPU...
    """
    begin = time.monotonic()
    layers, report = _begin(model, "all phases")
    alike = [found for found in layers if found.reason is None]
    choices: dict[str, dict[int, Choice | None]] = {}
    results, misfits = [], {}
    if alike:
        key = Key.of(model.config, 1, 16, phase="forward", dtype=alike[0].dtype, mask="none")
        where = cache.environment(_device(alike))
        results = cache.results(key.model, key.dtype, where)
        # What comes last stays, where several hold for as many rows.
        results.sort(key=lambda found: _fit(alike, found[0]))
    for key, entry in results:
        rows = entry.batch_size * (1 if key.phase == "decode" else entry.seq_len)
        for kind in {found.kind for found in alike}:
            same = [found for found in alike if found.kind == kind]
            layer = entry.layers.get(kind)
            choice = layer and Choice(
                layer.scheme, tuple((s.template, s.params) for s in layer.segments)
            )
            try:
                if choice is not None:
                    weights = fused.Weights.of(same[0].layer)
                    fused.steps_of(same[0].layer, choice, weights, (1, rows), _device(alike))
            except UnsupportedError as error:
                misfits |= {found.name: str(error) for found in same}
                continue
            choices.setdefault(kind, {})[rows] = choice
            if layer is not None:
                report.layers.append(_from_cache(same, key, entry, layer))
    report.installed = len(install(alike, choices))
    report.skipped |= misfits
    _unpack(found for found in alike if "_stof_fused" not in vars(found.module))
    report.seconds = time.monotonic() - begin
    if not results:
        problem = (
            "nothing is tuned for this model, dtype and GPU with these versions: "
            "stof_hf.tune(model), or stof cache list"
        )
    elif misfits:
        problem = "; ".join(f"{name}: {why}" for name, why in misfits.items())
    else:
        return report
    if strict:
        raise StofError(problem)
    warnings.warn(f"stof_hf: {problem}", StofWarning, stacklevel=2)
    return report


def _fit(layers: list[Found], key: Key) -> tuple[float, bool]:
    """How well a result suits a model: its mask, then whether it is of whole sequences."""
    mask = _mask(layers, key.seq_len)
    distance = 0.0 if mask is None else mask_distance(mask, key.mask)
    return -distance, key.phase != "decode"


def _mask(layers: list[Found], tokens: int) -> str | None:
    """The bucket of the mask that layers have at a length, as far as their pattern says.

    None for patterns that hold functions or tensors, which may be made for other lengths.
    """
    attention = next(filter(None, (attention_of(found.layer) for found in layers)), None)
    if attention is None:
        return "none"
    if implementation(attention.module.config) != "stof":
        return "dense"
    whole: Pattern = Causal() if getattr(attention.module, "is_causal", False) else Full()
    pattern = pattern_of(attention.module)
    wanted = whole if pattern is None else whole & pattern
    if not wanted.serializable:
        return None
    # Several results of a length share the mask.
    return mask_bucket(mask_for(wanted, tokens, tokens, device=torch.device("cpu")).valid_share)


def _begin(model: nn.Module, phase: str) -> tuple[list[Found], TuneReport]:
    layers = find(model)
    if not layers:
        raise UnsupportedError(
            f"no layer of {type(model).__name__} is known: there are patches for "
            f"{', '.join(FAMILIES)}"
        )
    alike = [found for found in layers if found.reason is None]
    report = TuneReport(
        model=_name(model),
        device=cache.environment(_device(alike)).device if alike else "none",
        dtype=str(alike[0].dtype).removeprefix("torch.") if alike else "none",
        phase=phase,
        skipped={found.name: found.reason for found in layers if found.reason is not None},
    )
    return layers, report


def _tune_shape(
    model: nn.Module, layers: list[Found], inputs: Inputs, measurer: Measurer,
    choices: dict[str, dict[int, Choice | None]], report: TuneReport, *, budget_s: float,
    seed: int, show: Callable[..., Any],
) -> None:  # fmt: skip
    """Search for each kind of layers as the model calls them with these inputs."""
    call, last = run(model, inputs, report.phase)
    samples = capture(model, layers, call, last)
    # What the model's first call builds is not the search's.
    deadline = time.monotonic() + budget_s
    found: dict[str, tuple[Sample, Result, LayerReport]] = {}
    known: Known = {}
    # Time goes where layers are many and long; what kinds of few operators, such as embeddings,
    # leave of their share is for the others.
    order = sorted(samples, key=lambda kind: len(samples[kind].layer.operators))
    sizes = {kind: len(samples[kind].layers) * len(samples[kind].layer.operators) for kind in order}
    # Those that came first, when little was compiled yet, profit by what the others measured.
    again = order[:-1]
    kept_s = _AGAIN * budget_s * sum(map(sizes.get, again)) / sum(sizes.values())
    turns = (
        (kind, sizes[kind] / sum(map(sizes.get, kinds[i:])), end)
        for kinds, end in ((order, deadline - kept_s), (again, deadline))
        for i, kind in enumerate(kinds)
    )
    for kind, share, end in turns:
        sample = samples[kind]
        title = f"{kind} {sample.shape[0]} x {sample.tokens}"
        result = search(
            sample, measurer, budget_s=max(_LEAST_SHARE, share) * (end - time.monotonic()),
            seed=seed, progress=lambda count, us, title=title: show(f"{title}: {us:.1f} us"),
            known=known,
        )  # fmt: skip
        found[kind] = _better(found.get(kind), sample, result, measurer)
        report.interrupted |= result.interrupted
        kept = found[kind][2].kept
        choices.setdefault(kind, {})[sample.rows] = found[kind][1].choice if kept else None
        if report.interrupted:
            break
    found = {kind: found[kind] for kind in samples if kind in found}
    report.layers += [layer for *_, layer in found.values()]
    if not report.interrupted:
        _store(model, found, report.phase)


def _better(
    before: tuple[Sample, Result, LayerReport] | None, sample: Sample, result: Result,
    measurer: Measurer,
) -> tuple[Sample, Result, LayerReport]:  # fmt: skip
    """The faster of what two searches for a kind found, with the measurements of both."""
    judged = _judge(sample, result, measurer)
    if before is None:
        return sample, result, judged
    _, first, layer = before
    count = layer.measurements + result.measurements
    if (judged.time_us or math.inf) >= (layer.time_us or math.inf):
        return sample, first, replace(layer, measurements=count)
    best = layer.course[-1][1] if layer.course else math.inf
    lower = ((layer.measurements + at, us) for at, us in result.course if us < best)
    return sample, result, replace(judged, course=(*layer.course, *lower), measurements=count)


def _judge(sample: Sample, result: Result, measurer: Measurer) -> LayerReport:
    """Whether what was found is faster than the layer's own code, both measured whole."""
    own, ours = (
        measurer.time_us(sample.layer_key(choice), lambda choice=choice: sample.layer_calls(choice))
        for choice in (None, result.choice)
    )
    note = ""
    if math.isinf(ours):
        note = "not used: it fails, or computes something else than the layer's own code"
    elif ours >= own:
        note = "not used: no faster than the layer's own code"
    segments = tuple(
        SegmentReport(names, run.template, dict(run.params), sum(result.unfused[slice(*bounds)]),
                      run.time_us)
        for names, bounds, run in zip(
            result.scheme.segments, result.scheme.bounds, result.runs, strict=True
        )
    )  # fmt: skip
    return LayerReport(
        sample.kind, len(sample.layers), sample.shape[0], sample.tokens, result.scheme.bits,
        segments, None if math.isinf(ours) else ours, None if math.isinf(own) else own, not note,
        tuple(result.course), result.measurements, note,
    )  # fmt: skip


def _store(
    model: nn.Module, found: Mapping[str, tuple[Sample, Result, LayerReport]], phase: str
) -> None:
    if any(layer.baseline_us is None for _, _, layer in found.values()):
        return
    sample = next(iter(found.values()))[0]
    entry = cache.Entry(
        name=_name(model),
        layers={
            kind: cache.Layer(
                result.scheme.bits,
                tuple(cache.Segment(r.template, dict(r.params), r.time_us) for r in result.runs),
            )
            for kind, (_, result, layer) in found.items()
            if layer.kept
        },
        batch_size=sample.shape[0],
        seq_len=sample.tokens,
        time_us=sum(
            each.count * (each.time_us if each.kept else each.baseline_us)
            for _, _, each in found.values()
        ),
        baseline_us=sum(each.count * each.baseline_us for _, _, each in found.values()),
    )
    key = Key.of(
        model.config, sample.shape[0], sample.tokens, phase=phase, dtype=sample.dtype,
        mask=sample.mask,
    )  # fmt: skip
    cache.store(key, entry, cache.environment(sample.hidden.device))


def _from_cache(same: list[Found], key: Key, entry: cache.Entry, layer: cache.Layer) -> LayerReport:
    scheme = Scheme.decode(same[0].layer.names, layer.scheme)
    segments = tuple(
        SegmentReport(names, s.template, s.params, None, s.time_us)
        for names, s in zip(scheme.segments, layer.segments, strict=True)
    )
    return LayerReport(
        same[0].kind, len(same), entry.batch_size, entry.seq_len, layer.scheme, segments, None,
        None, True, note=f"cached, {key.phase}, {entry.measured:%Y-%m-%d}",
    )  # fmt: skip


def _unpack(layers: Iterator[Found]) -> None:
    """Give layers that keep their own code their own weights again."""
    for found in layers:
        for operator in found.layer.operators:
            if operator.projects and len(operator.modules) > 1:
                unpack(p for m in operator.modules for p in m._parameters.values() if p is not None)


def _name(model: nn.Module) -> str:
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def _device(layers: Sequence[Found]) -> torch.device:
    return next(layers[0].module.parameters()).device


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and then each module in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _bar(wanted: bool, budget_s: float) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import Progress

    begin = time.monotonic()
    with Progress(console=Console(stderr=True), disable=not wanted, transient=True) as bar:
        task = bar.add_task("tuning", total=budget_s)

        def show(text: str) -> None:
            bar.update(task, description=text, completed=min(budget_s, time.monotonic() - begin))

        yield show
