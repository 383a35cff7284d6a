"""A layer computed by the segments that were chosen for it, resolved once for each shape."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UnsupportedError, warn_once
from .guard import Guard, layer_of, refusal
from .layer import Context, Layer, attention_of, implementation, matrix
from .layer_ops import SEGMENTS, Scheme
from .packing import pack
from .parts import part_of
from .runners import IMPLEMENTATIONS, TEMPLATES, Params, Step

__all__ = ["Choice", "Fused", "Weights", "dtype_of", "steps_of"]

#: Plans kept: sequences of ever new lengths must not keep them all.
_MOST_PLANS = 256
_UNKNOWN: Any = object()


@dataclass(frozen=True)
class Choice:
    """How a layer is computed.

    Args:
        scheme: bits of the partition of its operators.
        segments: (template, parameters) of each segment; None as parameters takes the template's
            defaults for the call.
    """

    scheme: str
    segments: tuple[tuple[str, Params | None], ...]

    def serves(self, rows: int) -> bool:
        """Whether its templates compute so many rows."""
        known = (TEMPLATES[name] for name, _ in self.segments if name in TEMPLATES)
        return all(template.serves(rows) for template in known)

    @classmethod
    def unfused(cls, layer: Layer) -> Choice:
        """Each operator by itself, as PyTorch computes it."""
        scheme = Scheme.unfused(layer.names)
        return cls.of(scheme, {segment: ("torch", {}) for segment in set(scheme.segments)})

    @classmethod
    def of(
        cls, scheme: Scheme, runs: Mapping[tuple[str, ...], tuple[str, Params | None]]
    ) -> Choice:
        """A scheme whose segments are computed alike where their operators are."""
        fixed = "attention", "cross attention"
        runs = {**runs, **{(name,): (name, {}) for name in fixed}}
        return cls(scheme.bits, tuple(runs[segment] for segment in scheme.segments))


class Weights:
    """Packed weights of a layer's projections, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[nn.Module, ...], tuple[torch.Tensor, torch.Tensor | None]] = {}

    @classmethod
    def of(cls, layer: Layer) -> Weights:
        """Those of all products of a layer."""
        made = cls()
        for operator in layer.operators:
            if operator.projects:
                made(operator.modules)
        return made

    def __call__(self, modules: tuple[nn.Module, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N, K] and [N], or None where there is no bias."""
        if modules not in self._made:
            self._made[modules] = self._make(modules)
        return self._made[modules]

    def _make(self, modules: tuple[nn.Module, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if len(modules) == 1:
            one = modules[0]
            return one.weight if isinstance(one, nn.Linear) else matrix(one).detach(), one.bias
        bias = None if modules[0].bias is None else pack([m.bias for m in modules])
        return pack([m.weight for m in modules]), bias


def steps_of(
    layer: Layer, choice: Choice, weights: Weights, shape: tuple[int, int], device: torch.device
) -> list[Step]:
    """The steps of a layer for rows of a shape [batch, tokens].

    Raises:
        UnsupportedError: a scheme, template or parameters that there are not, or that do not fit
            this layer and device: what an older version found, say.
    """
    from ..attention.select import shared_memory

    try:
        scheme = Scheme.decode(layer.names, choice.scheme)
    except ValueError as error:
        raise UnsupportedError(f"{error}: tune again") from error
    if len(scheme.segments) != len(choice.segments):
        raise UnsupportedError(f"{scheme} has not {len(choice.segments)} segments: tune again")
    steps = []
    for segment, (name, params), bounds in zip(
        scheme.segments, choice.segments, scheme.bounds, strict=True
    ):
        part = part_of(layer, *bounds, weights)
        template = TEMPLATES.get(name)
        if template is None or name not in SEGMENTS.get(segment, ()) or not template.takes(part):
            raise UnsupportedError(f"{name!r} does not compute [{' '.join(segment)}]: tune again")
        if template.module and not runs_on(device):
            raise UnsupportedError(f"template {name!r} runs on CUDA GPUs, not on {device}")
        if not template.serves(rows := math.prod(shape)):
            raise UnsupportedError(f"{name!r} does not compute {rows} rows: tune again")
        if params is None:
            params = template.start(part, rows, device)
        elif not template.allows(params, part, shared_memory(device)):
            raise UnsupportedError(f"{name!r} does not run with {dict(params)}: tune again")
        steps.append(template.build(part, params, shape))
    return steps


def dtype_of(layer: Layer) -> torch.dtype:
    """Of the weights."""
    return next(op.modules[0].weight.dtype for op in layer.operators if op.weighs)


def runs_on(device: torch.device) -> bool:
    """Whether Triton templates run there."""
    if device.type == "cuda":
        return True
    from .templates.common import INTERPRETED

    return bool(INTERPRETED.value)


class _Made(NamedTuple):
    """A layer's modules as operators, and what holds as long as they are what they are."""

    module: nn.Module
    guard: Guard
    layer: Layer
    weights: Weights
    config: Any


class Fused:
    """What a replaced layer keeps beside its modules: choices, and what is made of them.

    Copies and pickles hold the choices alone; the rest is made again when a copy is first called.

    Args:
        choices: number of rows (batch size x tokens) -> choice, None where the layer's own code is
            faster; a call takes the nearest of those whose templates compute its rows.
        dtype: of the weights that they were measured with.
    """

    def __init__(self, choices: Mapping[int, Choice | None], dtype: torch.dtype):
        self.choices, self.dtype = dict(choices), dtype
        self._made: _Made | None = None
        self._plans: dict[Any, list[Step] | None] = {}
        self._refused: Any = None

    def __reduce__(self) -> Any:
        return Fused, (self.choices, self.dtype)

    def nearest(self, rows: int) -> Choice | None:
        serving = (
            tuned for tuned, choice in self.choices.items() if choice is None or choice.serves(rows)
        )
        near = min(serving, key=lambda tuned: abs(math.log2(tuned / rows)), default=None)
        return None if near is None else self.choices[near]

    def in_use(self) -> list[Any]:
        """What the last calls ran with, which ever new shapes may throw away."""
        return [self._made, *self._plans.values()]

    def prepare(self, module: nn.Module, make: Any) -> None:
        """Pack weights now, rather than in the first call."""
        self._remake(module, make)

    def run(self, module: nn.Module, make: Any, given: torch.Tensor, context: Context) -> Any:
        """What the layer returns, or None where its own code has to run."""
        made = self._made
        if made is not None and made.module is not module:
            # A replica, such as DataParallel makes, has weights of its own.
            return None
        if made is None or not made.guard.holds():
            made = self._remake(module, make)
        if made is None:
            return None
        if made.config is not None and implementation(made.config) not in IMPLEMENTATIONS:
            return None
        key = given.shape, given.dtype, given.device
        steps = self._plans.get(key, _UNKNOWN)
        if steps is None or (steps is _UNKNOWN and _capturing()):
            return None
        hidden = made.layer.begin(given, context)
        if hidden is None:
            return None
        if steps is _UNKNOWN:
            if len(self._plans) == _MOST_PLANS:
                self._plans.clear()
            steps = self._plans[key] = self._plan(module, made, hidden)
            if steps is None:
                return None
        # Kernels that are prepared launch on the current device.
        if hidden.is_cuda and hidden.device.index != torch.cuda.current_device():
            with torch.cuda.device(hidden.device):
                out = _through(steps, hidden, context)
        else:
            out = _through(steps, hidden, context)
        if made.layer.returns_biases:
            return out, context.position_bias, context.cross_bias
        return out

    def _remake(self, module: nn.Module, make: Any) -> _Made | None:
        # What was refused is looked at again only once it has changed.
        if self._refused is not None and self._refused.holds():
            return None
        self._made = self._refused = None
        self._plans.clear()
        if _capturing():
            return None
        layer = layer_of(module, make)
        reason = layer if isinstance(layer, str) else refusal(module, layer, set())
        if "replaced" not in vars(type(module)):
            reason = "something gave it another class, as FSDP does"
        if reason is None and (dtype := dtype_of(layer)) != self.dtype:
            reason = f"it is tuned for {self.dtype}, its weights are {dtype}: tune again"
        if reason is None:
            weights = Weights.of(layer)
            attention = attention_of(layer)
            config = None if attention is None else attention.module.config
            # What packing moved is where the guard expects it.
            self._made = _Made(module, Guard(module), layer, weights, config)
            return self._made
        with contextlib.suppress(RuntimeError):  # tensors that lie nowhere
            self._refused = Guard(module)
        warn(module, reason)
        return None

    def _plan(self, module: nn.Module, made: _Made, hidden: torch.Tensor) -> list[Step] | None:
        if not hidden.numel():
            return None
        # Ids have a dtype of their own.
        if hidden.dtype != self.dtype and made.layer.names[0] != "embed":
            return None
        choice = self.nearest(hidden.shape[0] * hidden.shape[1])
        if choice is None:
            return None
        try:
            return steps_of(
                made.layer, choice, made.weights, tuple(hidden.shape[:2]), hidden.device
            )
        except UnsupportedError as error:
            warn(module, str(error))
            return None


def _through(steps: list[Step], hidden: torch.Tensor, context: Context) -> torch.Tensor:
    shape = hidden.shape
    rows = residual = (hidden if hidden.is_contiguous() else hidden.contiguous()).view(
        -1, shape[-1]
    )
    for step in steps:
        rows, residual = step(rows, residual, context)
    return rows.view(*shape[:2], -1)


def _capturing() -> bool:
    # Weights that are packed and kernels that are loaded now would become part of the graph.
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def warn(module: nn.Module, reason: str) -> None:
    """Say once that layers of a class run their own code."""
    warn_once(f"stof_hf: {type(module).__name__} runs its own code: {reason}", stacklevel=4)
