"""One model type: its tiny model with "stof" against itself with eager attention."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import StofWarning, UnsupportedError
from ..hf import attention as hf_attention
from .checks import Check, Named, checks_of
from .models import Unbuildable, classes_of, refusal_of, runnable, short

_ATTENTION = re.compile(r"(?<!gated)atte?n", re.IGNORECASE)

Result = dict[str, Any]


def audit_type(model_type: str) -> Result:
    """All checks of a model type.

    Returns:
        {"classes": {class name: {"checks": {name: {"outcome", "reason"?, "error"?}}, ...}}}, or
        {"reason"} where the type has no model of its own. Outcomes: "works", "refused", "falls
        back", "unverified", "ignored" (the model has attention, and "stof" was never called),
        "no attention", "crash" (an error that names no fix) and "WRONG".
    """
    try:
        classes = classes_of(model_type)
    except Exception as error:
        return {"reason": f"cannot be imported: {short(error)}"}
    if not classes:
        return {"reason": "has no model in the auto classes: it is a part of other models"}
    results = {}
    for cls in classes:
        thorough = cls is not classes[0] or len(classes) == 1
        try:
            results[cls.__name__] = audit_class(cls, CONFIG_MAPPING[model_type], thorough)
        except Unbuildable as error:
            results[cls.__name__] = {"checks": {}, "reason": str(error)}
    return {"classes": results}


def audit_class(cls: type, config_class: type, thorough: bool = True) -> Result:
    """The checks of one class; only forward and padding unless `thorough`."""
    if refusal := refusal_of(cls, config_class):
        return {"load": refusal, "checks": {}}
    model, inputs, profile = runnable(cls, config_class)
    checks = compare(model, list(checks_of(model, inputs, thorough)))
    return {"profile": profile, "inputs": sorted(inputs), "checks": checks}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the calls of the attention op, so that a model that bypasses it cannot pass."""
    count, original = [0], hf_attention.attention_by_rows

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        count[0] += 1
        return original(*args, **kwargs)

    hf_attention.attention_by_rows = counting
    try:
        yield count
    finally:
        hf_attention.attention_by_rows = original


def compare(model: Any, checks: list[Check]) -> dict[str, Result]:
    """Outcomes by the names of the checks; the model has eager attention and ends with "stof"."""
    results: dict[str, Result] = {}
    expected: dict[str, Named] = {}
    for check in checks:
        try:
            first, second = check.run(model), check.run(model)
        except Exception as error:
            results[check.name] = _unverified(f"eager raises {short(error)}")
            continue
        if not first:
            results[check.name] = _unverified("no float outputs")
        elif _distance(check, first, second) > 1e-6:
            results[check.name] = _unverified("eager attention gives another result each time")
        elif any(not t.isfinite().all() for t in map(check.real, first.values())) and (
            _nan_everywhere(check, first)
        ):
            results[check.name] = _unverified("eager attention gives NaN")
        elif check.unlike in expected and _distance(check, first, expected[check.unlike]) < 1e-6:
            results[check.name] = _unverified("eager ignores this mask")
        else:
            expected[check.name] = first
    try:
        model.set_attn_implementation("stof")
    except UnsupportedError as error:
        refused = {"outcome": "refused", "reason": str(error)}
        return {c.name: results.get(c.name, refused) for c in checks}
    for check in checks:
        if check.name in expected:
            results[check.name] = _with_stof(model, check, expected[check.name])
    return {c.name: results[c.name] for c in checks}


def _with_stof(model: Any, check: Check, expected: Named) -> Result:
    with counted() as calls, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            actual = (check.stof_run or check.run)(model)
        except UnsupportedError as error:
            return {"outcome": "refused", "reason": str(error)}
        except Exception as error:
            return {"outcome": "crash", "reason": short(error)}
    fallbacks = [str(w.message) for w in caught if issubclass(w.category, StofWarning)]
    error = _distance(check, expected, actual)
    result: Result = {"outcome": "works", "error": float(f"{error:.1e}"), "calls": calls[0]}
    if not error <= check.tolerance:
        floor = _rounding(model, check)
        result["outcome"] = "WRONG"
        if 0.2 * error < floor:
            return _unverified(f"rounding alone changes the result by {floor:.1e}")
        where = [
            n
            for n in expected
            if n in actual and n != "tokens" and not _near(check, n, expected, actual)
        ]
        result["reason"] = f"differs from eager by {error:.1e} in {', '.join(where[:3])}"
    elif fallbacks:
        result |= {"outcome": "falls back", "reason": fallbacks[0]}
    elif not calls[0]:
        attention = any(_ATTENTION.search(type(m).__name__) for m in model.modules())
        # What has features for a method of its own may well be without the model's attention.
        attention = attention and not check.name.endswith("features")
        result["outcome"] = "ignored" if attention else "no attention"
    return result


def _distance(check: Check, expected: Named, actual: Named) -> float:
    """The largest difference over all tensors, relative to the largest value of each above 1.

    Gradients, whose sizes differ by orders of magnitude, relative to the largest value itself.
    """
    if expected.keys() != actual.keys():
        return float("inf")
    if "tokens" in expected:
        return _distance_of_steps(expected, actual)
    worst = 0.0
    largest = max((float(t.abs().max()) for t in expected.values()), default=0.0)
    for name, tensor in expected.items():
        if tensor.shape != actual[name].shape:
            return float("inf")
        a, b = check.real(tensor).float(), check.real(actual[name]).float()
        known = a.isfinite()
        if not known.any():
            continue
        if not b[known].isfinite().all():
            return float("inf")
        scale = max(1.0, float(a[known].abs().max()))
        if check.name == "backward":
            scale = max(float(a[known].abs().max()), 1e-3 * largest, 1e-12)
        worst = max(worst, float((a[known] - b[known]).abs().max()) / scale)
    return worst


def _near(check: Check, name: str, expected: Named, actual: Named) -> bool:
    return _distance(check, {name: expected[name]}, {name: actual[name]}) <= check.tolerance


def _distance_of_steps(expected: Named, actual: Named) -> float:
    """Logits of the steps that follow the same tokens: after a tie the texts may differ."""
    if expected["logits"].shape != actual["logits"].shape:
        return float("inf")
    same = (expected["tokens"] == actual["tokens"]).long().cumprod(1)
    follows = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).bool()
    a, b = expected["logits"][follows], actual["logits"][follows]
    known = a.isfinite()
    difference = (a[known] - b[known]).abs().max()
    return float(difference) / max(1.0, float(a[known].abs().max()))


def _nan_everywhere(check: Check, outputs: Named) -> bool:
    return not any(check.real(t).isfinite().any() for t in outputs.values())


def _rounding(model: Any, check: Check) -> float:
    """How much eager's result changes where all weights change by a millionth."""
    model.set_attn_implementation("eager")
    before = check.run(model)
    kept = [p.data.clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.is_floating_point():
            p.data.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator))
    try:
        return _distance(check, before, check.run(model))
    finally:
        for p, data in zip(model.parameters(), kept, strict=True):
            p.data = data
        model.set_attn_implementation("stof")


def _unverified(reason: str) -> Result:
    return {"outcome": "unverified", "reason": reason}
