"""Layers of one kind as a model calls them, cut up so that each of their segments can be timed."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..errors import StofError, UnsupportedError
from ..fusion.fused import Choice, Weights, steps_of
from ..fusion.install import Found, context_of, original_class, positional
from ..fusion.layer import Context, Rows, attention_of, implementation
from ..fusion.parts import Part, part_of
from ..fusion.runners import TEMPLATES, Params
from ..masks.pattern import Pattern
from ..masks.sparse_mask import SparseMask
from .keys import mask_bucket

__all__ = ["Sample", "capture", "pattern_of"]

#: Layers that are timed in turn, so that none finds its weights in the cache of the GPU.
_MOST_LAYERS = 12


@dataclass
class _Frozen:
    """Stands in for a cache of keys and values, which must not grow while a layer is timed."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


def pattern_of(attention: nn.Module) -> Pattern | None:
    """What `set_pattern` set on a layer's attention."""
    stamp = vars(attention).get("_stof_stamp")
    return None if stamp is None else stamp.pattern


@dataclass
class Sample:
    """What one kind of layers was called with.

    Args:
        layers: all of the kind.
        given: their first argument. hidden: the rows [B, S, N] that it stands for.
        kwargs: the rest of the call, with caches that do not grow.
    """

    kind: str
    layers: list[Found]
    given: torch.Tensor
    hidden: torch.Tensor
    kwargs: dict[str, Any]
    context: Context

    def __post_init__(self) -> None:
        self.shape: tuple[int, int] = tuple(self.hidden.shape[:2])
        self.rows = math.prod(self.shape)
        cache = self.context.cache
        #: Keys that a query may see.
        self.tokens = self.shape[1] if cache is None else cache.keys.shape[2]
        self.layer, self.dtype = self.layers[0].layer, self.layers[0].dtype
        self.weights = [Weights.of(found.layer) for found in self.layers[:_MOST_LAYERS]]
        self._parts: dict[tuple[int, int], Part] = {}
        self._copies: dict[int, list[torch.Tensor]] = {}

    def part(self, bounds: tuple[int, int]) -> Part:
        """The segment [begin, end) of the first layer."""
        if bounds not in self._parts:
            self._parts[bounds] = part_of(self.layer, *bounds, self.weights[0])
        return self._parts[bounds]

    @cached_property
    def mask(self) -> str:
        """The bucket of the mask that the layers were called with, or of their pattern's."""
        mask, shares = self.context.mask, []
        if isinstance(mask, SparseMask):
            shares.append(mask.valid_share)
        if (pattern := self.pattern) is not None:
            queries, keys = self.shape[1], self.tokens
            own = SparseMask.from_pattern(
                pattern, queries, keys, q_offset=keys - queries, device=self.hidden.device
            )
            shares.append(own.valid_share)
        if shares:
            return mask_bucket(min(shares))
        return "none" if mask is None else "dense"

    @property
    def pattern(self) -> Pattern | None:
        """What `set_pattern` set on the first layer's attention."""
        attention = attention_of(self.layer)
        if attention is None or implementation(attention.module.config) != "stof":
            return None
        return pattern_of(attention.module)

    @cached_property
    def _attended(self) -> str:
        """What decides how long attention takes, beyond its heads."""
        attention = attention_of(self.layer)
        if attention is None:
            return ""
        bias = "" if self.context.position_bias is None else ", biased"
        pattern = "" if self.pattern is None else f", pattern {_digest(self.pattern.fingerprint)}"
        chosen = implementation(attention.module.config)
        crossed = ""
        if (encoder := self.context.encoder) is not None:
            masked = "no mask" if self.context.cross_mask is None else "a mask"
            crossed = f", {encoder.shape[1]} of the encoder with {masked}"
        return f", {self.tokens} keys, mask {self.mask}{pattern}{bias}{crossed}, {chosen}"

    @cached_property
    def states(self) -> list[Rows]:
        """Rows [B * S, N] in front of each operator, and behind the last."""
        state = Rows(self.hidden, self.hidden)
        states = [state]
        for operator in self.layer.operators:
            state = self.layer.compute(operator, state, self.context)
            states.append(state)
        return [Rows(s.rows.flatten(0, 1), s.residual.flatten(0, 1)) for s in states]

    def key(self, bounds: tuple[int, int], template: str, params: Params) -> str:
        """What a measured time holds for."""
        values = ",".join(f"{name}={value}" for name, value in sorted(params.items()))
        return f"{template}({values}) {self.about(bounds)}"

    def about(self, bounds: tuple[int, int]) -> str:
        """The same for whatever computes the segment."""
        part = self.part(bounds)
        size = f"{self.rows} rows"
        if part.attention is not None:
            size = f"{self.shape[0]} x {self.shape[1]}"
        if part.names in (("attention",), ("cross attention",)):
            size += self._attended
        return f"[{part.text}] {size} {_name(self.dtype)}"

    def try_once(self, bounds: tuple[int, int], template: str, params: Params) -> Any:
        """Run a segment, which compiles what it runs."""
        state = self.states[bounds[0]]
        step = TEMPLATES[template].build(self.part(bounds), params, self.shape)
        return step(state.rows.clone(), state.residual, self.context)

    def layer_key(self, choice: Choice | None) -> str:
        """The same for a whole layer; None is its own code."""
        size = f"{self.shape[0]} x {self.shape[1]}{self._attended}"
        what = "own code" if choice is None else f"{choice.scheme} {list(choice.segments)}"
        return f"{self.kind} {what} {size} {_name(self.dtype)}"

    def calls(
        self, bounds: tuple[int, int], template: str, params: Params
    ) -> Sequence[Callable[[], Any]]:
        """Calls of a segment, each with weights in other memory.

        Raises:
            StofError: it does not compute what its operators compute one by one.
        """
        part, (begin, end) = self.part(bounds), bounds
        before, behind = self.states[begin], self.states[end]
        build = TEMPLATES[template].build
        in_place = part.names[0] in ("rotary", "clamp")
        rows = before.rows.clone() if in_place else before.rows
        got = self.try_once(bounds, template, params)
        for one, other in zip(got, (behind.rows, behind.residual), strict=True):
            # Behind a layer's last residual nobody reads what it had added.
            if end < len(self.layer.operators) or other is behind.rows:
                _check(one, other, f"{template} {dict(params)} of [{' '.join(part.names)}]")
        parts = [part]
        if part.weight is not None and part.weight.is_cuda:
            parts += [replace(part, weight=copy) for copy in self._copies_of(part.weight)]
        steps = [build(each, params, self.shape) for each in parts]
        return [lambda step=step: step(rows, before.residual, self.context) for step in steps]

    def _copies_of(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """As many as twice fill the second-level cache, as the weights of other layers do."""
        if weight.data_ptr() not in self._copies:
            cache = torch.cuda.get_device_properties(weight.device).L2_cache_size
            count = min(32, math.ceil(2 * cache / weight.nbytes)) - 1
            self._copies[weight.data_ptr()] = [weight.detach().clone() for _ in range(count)]
        return self._copies[weight.data_ptr()]

    def layer_calls(self, choice: Choice | None) -> Sequence[Callable[[], Any]]:
        """Calls of whole layers, fused as chosen, or as the model's own code has them for None.

        Raises:
            StofError: a layer computes something else than its own code.
        """
        calls = []
        for found, weights in zip(self.layers, self.weights, strict=False):
            own = original_class(found.module).forward
            if choice is None:
                calls.append(lambda own=own, m=found.module: own(m, self.given, **self.kwargs))
                continue
            steps = steps_of(found.layer, choice, weights, self.shape, self.hidden.device)

            def call(steps=steps, layer=found.layer):
                rows = layer.begin(self.given, self.context).flatten(0, 1)
                state = rows, rows
                for step in steps:
                    state = step(*state, self.context)
                return state[0]

            if not calls:
                want = own(found.module, self.given, **self.kwargs)
                want = want[0] if isinstance(want, tuple) else want
                _check(call().view_as(want), want, f"the fused {self.kind}")
            calls.append(call)
        return calls


def _check(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    most = _TOLERANCE[want.dtype]
    # What is infinite one by one, or no number, may be so here.
    finite = want.isfinite()
    got, want = (torch.where(finite, x, 0).float() for x in (got, want))
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    if not error <= most:
        raise StofError(f"{what} is off by {error:.1e}")


#: Relative errors that no rounding explains. Products of fp32 take three TF32 ones.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def capture(
    model: nn.Module, layers: Sequence[Found], call: Callable[[], Any], last: bool = False
) -> dict[str, Sample]:
    """Run a model, and keep what its layers are called with.

    Args:
        layers: without those that are left alone.
        call: runs the model.
        last: keep the last call of each layer, not the first.

    Returns:
        kind -> sample.

    Raises:
        UnsupportedError: no layer is called as its operators can compute it.
    """
    seen: dict[str, dict[str, Any]] = {}
    by_module = {found.module: found for found in layers}
    with contextlib.ExitStack() as stack:

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = by_module[module]
            if found.name in seen and not last:
                return
            given = dict(zip(positional(original_class(module)), args, strict=False)) | kwargs
            cache = _cache_of(given)
            if cache is not None and not isinstance(vars(cache).get("update"), _Recorder):
                cache.update = _Recorder(cache.update)
                stack.callback(vars(cache).pop, "update")
            seen[found.name] = given

        for module in by_module:
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        call()
        kinds: dict[str, list[Found]] = {}
        for found in layers:
            if found.name in seen:
                kinds.setdefault(found.kind, []).append(found)
        samples = {
            kind: sample
            for kind, alike in kinds.items()
            if (sample := _sample(kind, alike, seen[alike[0].name])) is not None
        }
    if not samples:
        raise UnsupportedError(
            f"{type(model).__name__} calls its layers with arguments that fused layers do not "
            "know: pass other example_inputs"
        )
    return samples


def _sample(kind: str, layers: list[Found], call: dict[str, Any]) -> Sample | None:
    first, *_ = positional(original_class(layers[0].module))
    kwargs = {name: value for name, value in call.items() if name != first}
    attention = attention_of(layers[0].layer)
    if attention is not None and (cache := _cache_of(kwargs)) is not None:
        kwargs["past_key_values"] = _Frozen(*cache.update.results[attention.module.layer_idx])
    context, given = context_of(kwargs), call.get(first)
    if context is None or given is None:
        return None
    hidden = layers[0].layer.begin(given, context)
    if hidden is None:
        return None
    if layers[0].layer.returns_biases:
        kwargs["position_bias"] = context.position_bias
    return Sample(kind, layers, given, hidden, kwargs, context)


def _cache_of(call: dict[str, Any]) -> Any:
    """The cache of self-attention; decoders with cross-attention have two in one."""
    cache = call.get("past_key_values")
    return getattr(cache, "self_attention_cache", cache)


class _Recorder:
    """Stands in for a cache's update, and keeps what it returned for each layer."""

    def __init__(self, update: Callable[..., Any]):
        self.update, self.results = update, {}

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, index: int, *args: Any) -> Any:
        self.results[index] = self.update(keys, values, index, *args)
        return self.results[index]
