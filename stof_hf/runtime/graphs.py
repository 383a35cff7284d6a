"""CUDA graphs for a model's forward: `use_graphs`.

A small forward takes the host longer to launch than the GPU to compute. Its launches are therefore
captured, and repeated by a single one for every call of the same kind and bucket of shapes.
"""

from __future__ import annotations

import copyreg
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache
from transformers.utils.output_capturing import _active_collector

from ..errors import StofWarning, UnsupportedError
from ..fusion.layer import implementation
from .buckets import Size, Unknown, bucket_of, facts_of, is_for_unpadding, is_small
from .captured import Captured, arguments_of, shapes_of
from .recorder import Recorder
from .steps import Room, counts_on_device, methods_of, step_of
from .unpadded import unpads
from .watch import Watch, device_of, refusal

__all__ = ["class_of", "set_class", "take_off", "use_graphs"]

#: Kinds of calls that are remembered to have been seen once.
_MOST_SEEN = 4096
_OWN: Any = object()


def use_graphs(model: nn.Module, *, max_graphs: int = 32) -> None:
    """Let a model's forward replay CUDA graphs, so that small shapes do not wait for the host.

    Args:
        model: a Transformers model on a CUDA device. `tune` and `set_pattern` come before; after
            them, as after weights that were moved, graphs are captured anew.
        max_graphs: how many graphs are kept; the one that was not used for longest goes first. They
            share one memory pool.

    A call is captured when one like it comes the second time: the same arguments, and tensors whose
    shapes are in the same bucket. Encoders and decoders of text that `runtime.buckets` lists are
    padded to (powers of two, multiples of 64 tokens or more) as long as that is at most 4,096
    tokens; everything else has graphs of exactly its own shapes, and beyond 16,384 tokens none,
    because the GPU is then behind the host. Results are the caller's own: no later call writes to
    them. What is returned for a token that an attention mask hides may differ from the model's own
    forward, in which it means nothing either.

    So are steps of `generate` with `cache_implementation="static"` where `tune` has replaced
    layers, in the place of what Transformers compiles then, if the cache keeps all keys (no layer
    has a window): one graph for each cache. Change a model between calls of `generate`, not between
    tokens.

    The model's own forward runs in training mode, with gradients, under autocast, torch.compile or
    a capture of the caller's, and for calls with labels, other caches, packed sequences, masks
    [B, H, S, S] under "stof", whose plans follow from their values, or arguments that are neither
    tensors nor plain values. It runs, too, after one warning that says why, where a forward cannot
    be captured. A forward that decides by something other than its arguments, such as an attribute
    that somebody sets between calls, is not for graphs. `stof_hf.restore(model)` takes them away.

    Raises:
        UnsupportedError: not a Transformers model, or not on a CUDA device.

    >>> import stof_hf
    >>> from transformers import BertConfig, BertModel
    >>> stof_hf.use_graphs(BertModel(BertConfig(num_hidden_layers=1)))
    Traceback (most recent call last):
        ...
    stof_hf.errors.UnsupportedError: CUDA graphs need a model on a GPU, this one lies on cpu: ...
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"use_graphs takes a Transformers model, not a {type(model).__name__}: give the "
            "PreTrainedModel inside it"
        )
    if device_of(model).type != Recorder.device_type:
        raise UnsupportedError(
            f"CUDA graphs need a model on a GPU, this one lies on {device_of(model)}: call "
            'model.to("cuda") first'
        )
    if max_graphs < 1:
        raise UnsupportedError(f"max_graphs must be at least 1, not {max_graphs}")
    _forget(model)
    model.__dict__["_stof_graphs"] = Graphs(max_graphs)
    if not isinstance(model, _Graphed):
        model.__class__ = _subclass(type(model))


def take_off(model: nn.Module) -> None:
    """Put back what `use_graphs` changed."""
    for module in model.modules():
        if isinstance(module, _Graphed):
            _forget(module)
            module.__class__ = type(module).replaced


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class, beneath its graphs where it has some."""
    return type(module).replaced if isinstance(module, _Graphed) else type(module)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change what `class_of` gives; graphs are captured anew."""
    if isinstance(module, _Graphed):
        kept = module.__dict__["_stof_graphs"].max_graphs
        _forget(module)
        module.__dict__["_stof_graphs"] = Graphs(kept)
        cls = _subclass(cls)
    module.__class__ = cls


def _forget(model: nn.Module) -> None:
    graphs = model.__dict__.pop("_stof_graphs", None)
    if graphs is not None:
        graphs.clear()


class _Graphed:
    """Stands in front of a model's class."""

    def __reduce_ex__(self, protocol: int) -> Any:
        # Classes made at run time have no name to be found by.
        return _again, (type(self).replaced, self.__getstate__())


def _again(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = copyreg.__newobj__(_subclass(cls))
    module.__setstate__(state)
    return module


@cache
def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    # The same signature: Transformers and its users look up what a forward takes.
    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _runs_its_own(self):
            out = self.__dict__["_stof_graphs"].run(self, args, kwargs)
            if out is not _OWN:
                return out
        return cls.forward(self, *args, **kwargs)

    # The same name: Transformers finds what it records, and saves, by class or by name.
    body = {"replaced": cls, "forward": forward, "__module__": cls.__module__}
    body |= methods_of(cls, _stepping, _takes)
    return type(cls.__name__, (_Graphed, cls), body)


def _runs_its_own(model: nn.Module) -> bool:
    """Whether this is no call for graphs, whatever is called."""
    return (
        torch.compiler.is_compiling() or model.training or torch.is_grad_enabled()
        or bool(torch._C._len_torch_dispatch_stack()) or torch.jit.is_tracing()
        or _active_collector.get() is not None
    )  # fmt: skip


def _takes(model: nn.Module, cache: Any, look: bool) -> bool:
    """Whether a cache's steps are given to `_stepping` with the mask that only hides padding."""
    return not _runs_its_own(model) and model.__dict__["_stof_graphs"].takes(model, cache, look)


def _stepping(model: nn.Module, compile_config: Any) -> Callable[..., Any]:
    """What a call of `generate` takes for a compiled forward."""
    looked = False

    def step(**kwargs: Any) -> Any:
        nonlocal looked
        # Nothing changes a model between tokens, and looking takes longer than all else here.
        look, looked = not looked, True
        if not _takes(model, kwargs.get("past_key_values"), look):
            return class_of(model).get_compiled_call(model, compile_config)(**kwargs)
        if model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model):
            return model(**kwargs)
        out = model.__dict__["_stof_graphs"].step(model, kwargs)
        return model(**kwargs) if out is _OWN else out

    return step


def _reads_values(model: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether attention's plans follow from a mask's values, which may be others in a replay."""
    whole = any(x.ndim == 4 for name, x in tensors.items() if name.endswith("attention_mask"))
    return whole and implementation(model.config) not in ("sdpa", "eager")


def _kind(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> tuple[Any, ...]:
    """What a call's arguments are, but for sizes."""
    return (
        *sorted((name, type(x), x) for name, x in plain.items()),
        *sorted((name, x.dtype, x.ndim) for name, x in tensors.items()),
    )


class Graphs:
    """The graphs of one model. Copies and pickles begin without any.

    One lock for all: graphs share their memory, and a replay with what it copies must not be mixed
    with another.
    """

    def __init__(self, max_graphs: int):
        self.max_graphs = max_graphs
        self._recorder = Recorder()
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Any, Captured] = OrderedDict()
        #: Static caches by their ids, which are part of their graphs' keys.
        self._rooms: dict[int, Room] = {}
        self._seen: set[Any] = set()
        #: Calls that nothing can be captured of, and those that cannot be padded.
        self._own: set[Any] = set()
        self._exact: set[Any] = set()
        self._warned: set[str] = set()
        self._watch: Watch | None = None
        self._refused = False

    def __reduce__(self) -> Any:
        return Graphs, (self.max_graphs,)

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a forward returns, or _OWN where the model's own has to run."""
        given = arguments_of(type(model).replaced, args, kwargs)
        if given is None or not is_small(given[0]):
            return _OWN
        tensors, plain = given
        if _reads_values(model, tensors):
            return _OWN
        device = next(iter(tensors.values())).device
        if device.type != self._recorder.device_type or torch.is_autocast_enabled(device.type):
            return _OWN
        if any(x.device != device for x in tensors.values()) or self._recorder.capturing():
            return _OWN
        with self._lock:
            if self._watch is None or not self._watch.holds():
                self._look_again(model)
            if self._refused or device != self._device:
                return _OWN
            if self._unpads and is_for_unpadding(tensors):
                return _OWN
            return self._run(model, tensors, plain)

    def takes(self, model: nn.Module, cache: Any, look: bool) -> bool:
        """Whether steps with this cache are for graphs.

        Args:
            look: whether the model may have changed.
        """
        if not counts_on_device(cache):
            return False
        with self._lock:
            if self._watch is None or (look and not self._watch.holds()):
                self._look_again(model)
            return self._fused and not self._refused

    def step(self, model: nn.Module, kwargs: dict[str, Any]) -> Any:
        """What a step that is taken returns, or _OWN where the own forward has to run."""
        given = step_of(kwargs)
        parts = given and arguments_of(type(model).replaced, (), given[1], cached=True)
        if not parts or self._recorder.capturing():
            return _OWN
        (cache, _), (tensors, plain) = given, parts
        with self._lock:
            places = [*tensors.values(), cache.layers[0].keys]
            if any(x.device != self._device for x in places):
                return _OWN
            if torch.is_autocast_enabled(self._device.type):
                return _OWN
            for one in [one for one, room in self._rooms.items() if room.gone]:
                self._forget_room(one)
            room = self._rooms.get(id(cache))
            if room is None or not room.holds(cache):
                self._forget_room(id(cache))
                room = self._rooms[id(cache)] = Room(cache)
            key = (id(cache), _kind(tensors, plain), *shapes_of(tensors, None))
            if key[1:] in self._own:
                return _OWN
            return self._repeat(model, key, room.seen, tensors, plain, cache=cache)

    def _forget_room(self, one: int) -> None:
        self._rooms.pop(one, None)
        for key in [key for key in self._graphs if key[0] == one]:
            self._graphs.pop(key).recording.release()

    def clear(self) -> None:
        """Give all memory back."""
        for graph in self._graphs.values():
            graph.recording.release()
        self._graphs.clear()
        self._rooms.clear()
        self._own.clear()
        self._exact.clear()

    def _look_again(self, model: nn.Module) -> None:
        self.clear()
        self._device = device_of(model)
        reason = refusal(model, self._recorder.device_type)
        self._refused = reason is not None
        self._facts = facts_of(model, type(model).replaced)
        self._unpads = unpads(model)
        #: Layers that torch.compile would not make anything of but their own code.
        self._fused = any("_stof_fused" in vars(module) for module in model.modules())
        try:
            self._watch = Watch(model)
        except RuntimeError:  # tensors that lie nowhere
            self._watch = None
        if reason is not None:
            self._warn(model, reason)

    def _run(self, model: nn.Module, tensors: dict[str, torch.Tensor], plain: Any) -> Any:
        sizes = bucket_of(self._facts, tensors, plain)
        padded = tensors
        if sizes is not None and sizes[0].tokens < sizes[1].tokens and not self._facts.causal:
            one = torch.ones((), dtype=torch.int64, device=self._device)
            padded = {"attention_mask": one.expand(sizes[0]), **tensors}
        kind = _kind(padded, plain)
        if kind in self._exact:
            sizes = None
        else:
            tensors = padded
        key = (kind, sizes is None, *shapes_of(tensors, sizes))
        return self._repeat(model, key, self._seen, tensors, plain, sizes)

    def _repeat(
        self, model: nn.Module, key: Any, seen: set[Any], tensors: dict[str, torch.Tensor],
        plain: Any, sizes: tuple[Size, Size] | None = None, cache: StaticCache | None = None,
    ) -> Any:  # fmt: skip
        """What the graph of a key returns, which is captured at the second call."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self._recorder.order(self._device)
            return graph(tensors, sizes, cache)
        if key in self._own:
            return _OWN
        if key not in seen:
            # A shape that never comes back is not worth a capture, which takes as long as many
            # calls.
            if len(seen) == _MOST_SEEN:
                seen.clear()
            seen.add(key)
            return _OWN
        if len(self._graphs) == self.max_graphs:
            self._graphs.popitem(last=False)[1].recording.release()
        self._recorder.order(self._device)
        facts = self._facts if cache is None else None
        try:
            graph = Captured(self._recorder, model, facts, tensors, plain, sizes, cache)
            result = graph(tensors, sizes, cache)
        except Unknown as unknown:
            graph.recording.release()
            if sizes is not None:
                self._exact.add(key[0])
            else:
                self._refuse(model, key, plain, f"it returns {unknown}")
            return _OWN
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if cache is None:
                self._refuse(model, key, plain, reason)
            else:
                # Of any cache.
                self._own.add(key[1:])
                self._warn(model, reason)
            return _OWN
        self._graphs[key] = graph
        return result

    def _refuse(self, model: nn.Module, key: Any, plain: dict[str, Any], reason: str) -> None:
        self._own.add(key)
        if plain.get("use_cache", getattr(model.config, "use_cache", False)):
            reason += "; pass use_cache=False if you do not need the cache"
        self._warn(model, reason)

    def _warn(self, model: nn.Module, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"stof_hf: {type(model).__name__} runs without CUDA graphs: {reason}",
                StofWarning,
                stacklevel=2,
            )
