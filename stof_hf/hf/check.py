"""Which models may load with "stof": a wrapper of two methods of Transformers' PreTrainedModel.

Transformers lets every model load with any registered attention name, also those that compute
attention on their own and never look at it (XLNet, Reformer). Such a model would run as
before and look as if it were sparse. The wrappers below add to Transformers' own check, which runs
in every model's constructor and in `set_attn_implementation`:

- a model class that bypasses the attention interface, or changes its mask on the way to it, raises
  UnsupportedError for "stof";
- attention classes that bypass it beside others that do not, as Gemma 4's audio tower, warn;
- a model made from a configuration with patterns is noted, so that its layers get them;
- a model with patterns that runs with another implementation than "stof" warns.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

from transformers import PreTrainedModel

from ..errors import StofWarning, UnsupportedError, warn_once
from . import classes, own, patching

_NAMES = ("stof", "paged|stof")


def install() -> None:
    """Wrap Transformers' check; a second call changes nothing."""
    if hasattr(PreTrainedModel.get_correct_attn_implementation, "__wrapped__"):
        return
    PreTrainedModel.get_correct_attn_implementation = _wrap_check(
        PreTrainedModel.get_correct_attn_implementation
    )
    PreTrainedModel.set_attn_implementation = _wrap_set(PreTrainedModel.set_attn_implementation)


def _wrap_check(original: Any) -> Any:
    @functools.wraps(original)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        reason = _obstacle_to(requested_attention, type(self))
        if reason and not (classes.is_a_part(type(self)) and _inside_a_model(self, is_init_check)):
            requested_attention = _refuse(self, reason)
        if requested_attention in _NAMES and is_init_check and classes.picked_by_name(type(self)):
            requested_attention = _refuse(self, _PICKS)
        chosen = original(self, requested_attention, is_init_check)
        if chosen in _NAMES:
            _warn_of_own(type(self))
        if is_init_check:
            patching.register(self)
            _warn_if_dense(self, chosen)
        return chosen

    return get_correct_attn_implementation


def _wrap_set(original: Any) -> Any:
    @functools.wraps(original)
    def set_attn_implementation(
        self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        wanted = attn_implementation
        if isinstance(wanted, dict):
            wanted = wanted.get("")
        if reason := _obstacle_to(wanted, type(self)):
            wanted = _refuse(self, reason)
            attn_implementation = (
                wanted if isinstance(attn_implementation, str) else attn_implementation
            )
        if isinstance(attn_implementation, str) and attn_implementation in _NAMES:
            for module in self.modules():
                if not isinstance(module, PreTrainedModel) or classes.is_a_part(type(module)):
                    continue
                if reason := _obstacle_to(attn_implementation, type(module)):
                    _refuse(module, reason)
        if attn_implementation is not None:
            original(self, attn_implementation, *args, **kwargs)
        if wanted in _NAMES and self.config._attn_implementation not in _NAMES:
            # Transformers reads a class's source to see whether it may; a notebook's has none.
            self.config._attn_implementation_internal = wanted
        chosen = self.config._attn_implementation
        for module in self.modules():
            if not isinstance(module, PreTrainedModel):
                continue
            # Copies of the configuration, as in T5's stacks: Transformers before 5.23 forgets them.
            copied = type(module.config) is type(self.config)
            if copied and "stof" in (chosen, module.config._attn_implementation):
                module.config._attn_implementation_internal = chosen
        _warn_if_dense(self, chosen)

    return set_attn_implementation


_BYPASSES = (
    'computes attention on its own and would ignore attn_implementation="stof": load it without '
    "attn_implementation; where it is a part of a larger model, name the other parts, as in "
    'attn_implementation={"text_config": "stof"}'
)
_EXTENDS = (
    "appends keys of its own to the mask inside its attention layers, if that is the tensor that "
    'eager attention adds to scores, and does not work with attn_implementation="stof": load it '
    "without attn_implementation"
)
_PICKS = (
    'picks classes by the name of the attention implementation and knows no "stof": load it '
    "without attn_implementation, then switch its other layers with "
    'model.set_attn_implementation("stof")'
)
_NOT_PAGED = (
    "computes attention on its own, for which continuous batching has no form: use generate with "
    'attn_implementation="stof"'
)


def _obstacle_to(name: Any, cls: type) -> str | None:
    """Why a model class cannot run with an attention implementation of ours, or None."""
    if name not in _NAMES:
        return None
    return _NOT_PAGED if name == "paged|stof" and own.serves(cls) else obstacle(cls)


def _refuse(model: PreTrainedModel, reason: str) -> None:
    """Raise for a model that bypasses the interface, or warn where its configuration says so."""
    message = f"{type(model).__name__} {reason}"
    if (getattr(model.config, "stof", None) or {}).get("fallback") != "sdpa":
        raise UnsupportedError(message)
    warnings.warn(message, StofWarning, stacklevel=4)


def _inside_a_model(model: PreTrainedModel, is_init_check: bool) -> bool:
    """Whether another model's constructor makes this one, or another model switches it.

    A part has a configuration of its own and knows nothing of the model around it.
    """
    if not is_init_check:
        return True  # What a user switches is checked before, in `set_attn_implementation`.
    frame = sys._getframe(1)
    while frame is not None:
        outer = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(outer, PreTrainedModel) and outer is not model:
            return True
        frame = frame.f_back
    return False


def _warn_of_own(cls: type) -> None:
    if names := ", ".join(classes.left_alone(cls)):
        warn_once(
            f'attn_implementation="stof" does not reach {names}, which attends on its own, beside '
            "Transformers' attention interface: it runs as before, and patterns leave it dense",
            stacklevel=4,
        )


def _warn_if_dense(model: PreTrainedModel, chosen: str | None) -> None:
    if chosen in _NAMES or not patching.has_patterns(model):
        return
    if not any(patching.uses_stof(config) for config in patching.configs_of(model.config)):
        warnings.warn(
            f"{type(model).__name__} has sparse attention patterns, which "
            f'attn_implementation="{chosen}" ignores: use "stof", or remove them with '
            "stof_hf.set_pattern(model, None)",
            StofWarning,
            stacklevel=3,
        )


@functools.cache
def obstacle(cls: type) -> str | None:
    """Why a model class cannot run with "stof", or None."""
    if not classes.uses_interface(cls):
        return _BYPASSES
    return _EXTENDS if classes.extends_mask(cls) else None
