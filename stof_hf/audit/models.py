"""The classes of a model type, and tiny models of them with inputs that they take."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import UnsupportedError
from . import inputs as given
from .checks import Inputs, forward
from .shrink import PROFILES, shrunk

MOST_PARAMETERS = 80_000_000

_HEADS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")


class Unbuildable(Exception):
    """No way to shrink the configuration gave a model that runs with eager attention."""


def classes_of(model_type: str) -> list[type]:
    """The base class of a model type and, where there are such, its heads for generation."""
    config = CONFIG_MAPPING[model_type]

    def found(mapping: str) -> type | None:
        try:
            cls = getattr(modeling_auto, mapping)[config]
        except (KeyError, ValueError):  # ValueError: listed, but not in the library.
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


def runnable(cls: type, config_class: type) -> tuple[Any, Inputs, str]:
    """A tiny model in eval mode with eager attention, inputs that it takes, and the profile."""
    reasons: dict[str, str] = {}  # the inputs or profile of the first time, by error
    for profile in PROFILES:
        try:
            model = build(cls, shrunk(config_class(), profile), small=profile != PROFILES[-1])
        except Exception as error:
            reasons.setdefault(short(error), profile)
            continue
        for inputs in given.candidates(model):
            try:
                output = forward(model, inputs)
            except Exception as error:
                reasons.setdefault(short(error), f"{profile}, {'+'.join(inputs)}")
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


def refusal_of(cls: type, config_class: type) -> str | None:
    """Why a class cannot be loaded with "stof", or None."""
    for profile in PROFILES:
        try:
            with torch.device("meta"):
                cls._from_config(shrunk(config_class(), profile), attn_implementation="stof")
        except UnsupportedError as error:
            return str(error)
        except Exception:
            continue  # Not about attention: whether it builds at all is for `runnable` to say.
        return None
    return None


def short(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
