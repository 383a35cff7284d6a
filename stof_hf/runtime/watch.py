"""Whether a model is still what its graphs were captured from, and whether it can be captured."""

from __future__ import annotations

from itertools import chain, repeat
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from ..fusion.guard import OWN_FORWARD, RECORDING, Guard, columns, pointer
from ..hf.patching import configs_of

__all__ = ["Watch", "device_of", "refusal"]

_training = attrgetter("training")
#: Fields of a configuration that say what a forward returns, or how it computes, when it is called.
_settings = attrgetter(
    "_attn_implementation", "output_hidden_states", "output_attentions", "return_dict"
)
_stof = ("_stof_fused", "_stof_stamp")


class Watch(Guard):
    """A guard over a whole model: what a fused layer compares, and what graphs depend on besides.

    Those are where buffers lie, every module's training mode, what `tune` and `set_pattern` wrote
    on layers, and settings of the configuration. Weights changed in place change nothing.
    """

    def __init__(self, model: nn.Module):
        self._all = list(model.modules())
        self._held = columns(
            (held, name)
            for held in chain((m._buffers for m in self._all), (model._parameters,))
            for name in held
            if held[name] is not None
        )
        self._configs = list(configs_of(model.config))
        super().__init__(model)

    def state(self) -> tuple[Any, ...]:
        return (
            *super().state(),
            list(map(pointer, map(getitem, *self._held))),
            list(map(_training, self._all)),
            *(list(map(dict.get, self._attributes, repeat(name))) for name in _stof),
            list(map(_settings, self._configs)),
            [getattr(config, "use_cache", None) for config in self._configs],
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter lies; the CPU without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def refusal(model: nn.Module, device_type: str) -> str | None:
    """Why no forward of a model can be captured, or None."""
    device = device_of(model)
    if device.type != device_type:
        return f"it lies on {device}: move it with model.to({device_type!r})"
    parts = set(getattr(model, "hf_device_map", {}).values())
    if len(parts) > 1:
        return f"its parts lie on several devices (hf_device_map: {', '.join(map(str, parts))})"
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device != device:
            return f"{name} lies on {tensor.device}, other weights on {device}"
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and type(tensor.data) is torch.Tensor
        if not plain:
            return f"{name} is a {type(tensor.data).__name__} (tensor parallel or quantised)"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "there are forward hooks for all modules, which a replay does not call"
    for name, module in model.named_modules():
        # The model's own hooks and forward are around a replay, not in it.
        reason = _of_module(module) if module is not model else None
        if reason is not None:
            return f"{name} {reason}"
    return None


def _of_module(module: nn.Module) -> str | None:
    hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    if any(getattr(hook, "__module__", None) != RECORDING for hook in hooks):
        return "has forward hooks, which a replay does not call"
    if "forward" in vars(module):
        return OWN_FORWARD
    if module.training:
        return "is in training mode: call model.eval()"
    if type(module).__module__.startswith("peft."):
        return "is PEFT's, which decides in Python what it adds: merge the adapter"
    rotary = getattr(module, "rope_type", None)
    kinds = rotary.values() if isinstance(rotary, dict) else (rotary,)
    if {"dynamic", "longrope"} & set(map(str, kinds)):
        return "reads how long the sequence is to choose its rotary frequencies"
    return None
