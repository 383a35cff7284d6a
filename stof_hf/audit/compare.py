"""One model type: its tiny model with "stof" against itself with eager attention."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import StofError, StofWarning
from ..hf import attention as hf_attention
from . import inputs as given
from .shrink import PROFILES, shrunk

TOLERANCE, GRADIENT_TOLERANCE = 2e-4, 2e-3
MOST_PARAMETERS = 80_000_000
NEW_TOKENS = 8

_HEADS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
_ATTENTION = re.compile(r"(?<!gated)atte?n", re.IGNORECASE)

Result = dict[str, Any]
Named = dict[str, torch.Tensor]
Inputs = dict[str, Any]


class Unbuildable(Exception):
    """No way to shrink the configuration gave a model that runs with eager attention."""


@dataclass(frozen=True)
class Check:
    """One comparison. run: from the model to named tensors; real: which of a tensor counts."""

    name: str
    run: Callable[[Any], Named]
    stof_run: Callable[[Any], Named] | None = None
    real: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    tolerance: float = TOLERANCE
    unlike: str | None = None


def classes_of(model_type: str) -> list[type]:
    """The base class of a model type and, where there are such, its heads for generation."""
    config = CONFIG_MAPPING[model_type]

    def found(mapping: str) -> type | None:
        try:
            cls = getattr(modeling_auto, mapping)[config]
        except KeyError:
            return None
        return cls[0] if isinstance(cls, (list, tuple)) else cls

    heads = [c for name in _HEADS if (c := found(f"MODEL_FOR_{name}_MAPPING"))][:1]
    first = [found("MODEL_MAPPING"), found("MODEL_FOR_CAUSAL_LM_MAPPING")]
    classes = [c for c in [*first, *heads] if c is not None]
    if not classes:
        mappings = [
            m for m in dir(modeling_auto) if m.startswith("MODEL_FOR_") and m.endswith("_MAPPING")
        ]
        classes = [c for name in mappings if (c := found(name))][:1]
    if not classes:
        classes = _unlisted(config)
    return list(dict.fromkeys(classes))


def _unlisted(config: type) -> list[type]:
    """The model of a configuration that the auto classes lack: of towers inside other models."""
    try:
        module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return []
    models = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, PreTrainedModel)
        and c.__module__ == module.__name__
        and c.config_class is config
        and not c.__name__.endswith("PreTrainedModel")
    ]
    stem = config.__name__.removesuffix("Config")
    return sorted(models, key=lambda c: c.__name__ not in (stem, f"{stem}Model"))[:1]


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
        return {"reason": f"cannot be imported: {_short(error)}"}
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
    if refusal := _refused_at_load(cls, config_class):
        return {"load": refusal, "checks": {}}
    model, inputs, profile = runnable(cls, config_class)
    checks = compare(model, list(_checks(model, inputs, thorough)))
    return {"profile": profile, "inputs": sorted(inputs), "checks": checks}


def runnable(cls: type, config_class: type) -> tuple[Any, Inputs, str]:
    """A tiny model in eval mode with eager attention, inputs that it takes, and the profile."""
    reasons: dict[str, str] = {}  # the inputs or profile of the first time, by error
    for profile in PROFILES:
        try:
            model = build(cls, shrunk(config_class(), profile), small=profile != PROFILES[-1])
        except Exception as error:
            reasons.setdefault(_short(error), profile)
            continue
        for inputs in given.candidates(model):
            try:
                output = forward(model, inputs)
            except Exception as error:
                reasons.setdefault(_short(error), f"{profile}, {'+'.join(inputs)}")
                continue
            if output:
                return model, inputs, profile
    text = "; ".join(f"{where}: {message}" for message, where in reasons.items())
    raise Unbuildable(text or "no inputs are known for its forward")


def build(cls: type, config: Any, small: bool = True) -> Any:
    """A model of random weights, large enough that a wrong mask shows; none is zero or unset."""
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
    except Exception:
        if not small:
            raise
        count = 0  # Some constructors read values, which meta tensors lack.
    if count > MOST_PARAMETERS:
        raise Unbuildable(f"{count / 1e6:.0f} M parameters after shrinking")
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval().float()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        data = parameter.data
        if not data.is_floating_point() or not data.numel():
            continue
        if not data.isfinite().all() or not data.any():
            data.copy_(torch.randn(data.shape, generator=generator) * 0.02)
        if data.ndim > 1 and 0 < (spread := float(data.std())) < 0.06:
            data.mul_(min(3.0, 0.06 / spread))
    return model


def _refused_at_load(cls: type, config_class: type) -> str | None:
    for profile in PROFILES:
        try:
            with torch.device("meta"):
                cls._from_config(shrunk(config_class(), profile), attn_implementation="stof")
        except StofError as error:
            return str(error)
        except Exception:
            continue  # Not about attention: whether it builds at all is for `runnable` to say.
        return None
    return None


def forward(model: Any, inputs: Inputs, **arguments: Any) -> Named:
    """The float tensors that a forward returns; caches, masks and attention weights left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(_tensors(model(**inputs, **arguments)))


def _tensors(value: Any, name: str = "out") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value.detach()
    elif hasattr(value, "items"):
        for key, part in value.items():
            if not re.search("past_key_values|mask|attentions", str(key)):
                yield from _tensors(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _tensors(part, f"{name}.{i}")


def gradients(model: Any, inputs: Inputs) -> Named:
    """Gradients of all parameters for a fixed random weighting of the outputs."""
    torch.manual_seed(0)
    model.zero_grad()
    outputs: list[torch.Tensor] = []
    out = model(**inputs)
    for part in out.values() if hasattr(out, "values") else out:
        if isinstance(part, torch.Tensor) and part.requires_grad and part.isfinite().all():
            outputs.append(part)
    if not outputs:
        raise ValueError("no output has a gradient")
    sum((part.float() * given.noise(*part.shape)).sum() for part in outputs).backward()
    named = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.numel()
    }
    model.zero_grad()
    return named


def generation(model: Any, inputs: Inputs, **arguments: Any) -> Named:
    """Greedy or beam search: the logits of each step up to where the choice was a tie."""
    torch.manual_seed(0)
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        output_logits=True, return_dict_in_generate=True, disable_compile=True, use_cache=True,
        **arguments,
    )  # fmt: skip
    if (scores := getattr(out, "sequences_scores", None)) is not None:
        return {"scores": scores}
    logits = torch.stack(out.logits, 1).float()
    return {"logits": logits, "tokens": logits.argmax(-1)}


def _checks(model: Any, inputs: Inputs, thorough: bool) -> Iterator[Check]:
    names = given.parameters(model)
    yield Check("forward", lambda m: forward(m, inputs))
    text = "input_ids" in inputs
    encdec = "decoder_input_ids" in inputs
    if text and "attention_mask" in names:
        for side in ("left", "right"):
            masked = given.padded(inputs, side)
            real = _real(masked["attention_mask"].bool())
            yield Check(
                f"{side} padding",
                lambda m, x=masked: forward(m, x),
                real=real,
                unlike="forward" if side == "left" else None,
            )
    if not thorough:
        return
    only_text = set(inputs) == {"input_ids"}
    if only_text and "attention_mask" in names:
        yield _check_4d(model, inputs)
    if only_text and "position_ids" in names and _is_causal(model):
        ids = inputs["input_ids"][:1]
        positions = torch.cat([torch.arange(8), torch.arange(ids.shape[1] - 8)])[None]
        packed = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        yield Check("packed", lambda m: forward(m, packed))
    yield from _features(model)
    yield Check("backward", lambda m: gradients(m, inputs), tolerance=GRADIENT_TOLERANCE)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return
    settings = model.generation_config
    settings.pad_token_id = 0
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = 1
    prompt = {n: t for n, t in inputs.items() if n != "decoder_input_ids"}
    if text and "attention_mask" in names:
        prompt = given.padded(prompt, "right" if encdec else "left")
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    for name, arguments in {
        "generate": {},
        "generate static": {"cache_implementation": "static"},
        "generate beams": {"num_beams": 2},
        "generate assisted": {"prompt_lookup_num_tokens": 2},
    }.items():
        x = prompt
        if name == "generate assisted":
            x = {n: t[:1] for n, t in prompt.items()}
        yield Check(
            name + (" (window)" if window and name == "generate" else ""),
            lambda m, x=x, a=arguments: generation(m, x, **a),
        )


def _check_4d(model: Any, inputs: Inputs) -> Check:
    allowed = given.mask_4d(_is_causal(model))
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    named = {"full_attention", "sliding_attention", "chunked_attention"} & set(kinds)

    def masked(mask: torch.Tensor) -> Inputs:
        value = {name: mask for name in named} if named else mask
        return {**inputs, "attention_mask": value}

    # Eager attention adds the mask, whatever its dtype: only a float one is defined for it.
    return Check(
        "4D mask",
        lambda m: {f"{k}.{n}": t for k in "fb" for n, t in forward(m, masked(additive)).items()},
        lambda m: {
            f"{k}.{n}": t
            for k, mask in (("f", additive), ("b", allowed))
            for n, t in forward(m, masked(mask)).items()
        },
        unlike="forward",
    )


def _features(model: Any) -> Iterator[Check]:
    """Towers for images and sounds of models that also run on text alone."""
    for method, key in (
        ("get_image_features", "pixel_values"),
        ("get_audio_features", "input_features"),
    ):
        function = getattr(model, method, None)
        if function is None:
            continue
        options = given.pictures(model.config) if "image" in method else given.recordings(model)
        for option in options:
            run = _feature_run(method, option)
            try:
                if not run(model):
                    continue
            except Exception:
                continue
            yield Check(key.split("_")[0].replace("pixel", "image") + " features", run)
            break


def _feature_run(method: str, option: Inputs) -> Callable[[Any], Named]:
    def run(model: Any) -> Named:
        torch.manual_seed(0)
        with torch.no_grad():
            return dict(_tensors(getattr(model, method)(**option)))

    return run


def _is_causal(model: Any) -> bool:
    return any(getattr(m, "is_causal", False) for m in model.modules())


def _real(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of real tokens; of a tensor without rows, the sequence without padding."""

    def rows(t: torch.Tensor) -> torch.Tensor:
        if t.ndim >= 2 and t.shape[:2] == mask.shape:
            return t[mask]
        if t.ndim >= 3 and t.shape[:2] == (given.BATCH, given.DECODER_LENGTH):
            return t
        if t.ndim >= 2 and t.shape[:2] == (given.BATCH, given.BATCH):
            return t[:1, :1]  # similarities between sequences
        return t[0] if t.ndim and t.shape[0] == given.BATCH else t[:0]

    return rows


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
            results[check.name] = _unverified(f"eager raises {_short(error)}")
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
    except StofError as error:
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
        except StofError as error:
            return {"outcome": "refused", "reason": str(error)}
        except Exception as error:
            return {"outcome": "crash", "reason": _short(error)}
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


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
