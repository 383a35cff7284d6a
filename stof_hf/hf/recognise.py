"""From a mask function of Transformers to a Pattern."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import count
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from ..masks.pattern import And, Not, Or, Pattern
from ..masks.patterns import Causal, Chunked, Custom, Documents, Full, PrefixLM, SlidingWindow
from ..masks.traced import text_of
from .symbolic import TRUE, Expression, is_opaque, names_tensor, recognise

# Beyond every position, so that a window has one open side.
_FAR = 1 << 40

_serial = count()

MaskFunction = Callable[..., torch.Tensor]


class _NotClosed(Exception):
    """An expression has no pattern of closed form."""


@lru_cache(maxsize=256)
def closed_form(expression: Expression) -> Pattern:
    """The pattern of an expression that names no tensor; _NotClosed if there is none."""
    kind, *rest = expression
    if kind == "true":
        return Full()
    if kind == "false":
        return Not(Full())
    if kind == "not":
        return Not(closed_form(rest[0]))
    if kind == "all":
        return And(tuple(closed_form(part) for part in rest))
    if kind == "any":
        prefix = [part[2] for part in rest if part[0] == "key" and part[1] is None]
        if ("offset", None, 0, None) in rest and len(rest) == 2 and prefix:
            return PrefixLM(max(0, prefix[0] + 1))
        return Or(tuple(closed_form(part) for part in rest))
    if kind == "offset" and rest[2] is None:
        return _window(rest[0], rest[1])
    if kind == "chunk" and rest[1] is None:
        return Chunked(rest[0])
    raise _NotClosed


def _window(lo: int | None, hi: int | None) -> Pattern:
    """lo <= k - q <= hi."""
    if lo is None and hi is None:
        return Full()
    if lo is not None and lo > 0:
        return _window(None, hi) & ~_window(None, lo - 1)
    if hi is not None and hi < 0:
        return _window(lo, None) & ~_window(hi + 1, None)
    if lo is None:
        return Causal() if hi == 0 else SlidingWindow(_FAR, hi)
    return SlidingWindow(-lo, _FAR if hi is None else hi)


def chunks_from_zero(expression: Expression) -> Expression:
    """The expression with the chunks of all batch elements counted from position 0."""
    if expression[0] in ("all", "any", "not"):
        return (expression[0], *(chunks_from_zero(part) for part in expression[1:]))
    return ("chunk", expression[1], None) if expression[0] == "chunk" else expression


@torch.compiler.assume_constant_result
def closed_form_text(expression: Expression) -> str | None:
    """The pattern of an expression as JSON text, or None; a constant for torch.compile."""
    try:
        return text_of(closed_form(expression))
    except _NotClosed:
        return None


class Recognised(NamedTuple):
    """A mask function's pattern, and whether the pattern's fingerprint tells its values."""

    pattern: Pattern
    cacheable: bool


def pattern_of(
    mask_function: MaskFunction, positions: int, use_vmap: bool, has_padding: bool, batch: int
) -> Recognised:
    """The pattern of a mask function f(b, h, q, k) -> bool. May read token groups from the device.

    Args:
        positions: number of positions that token groups must cover.
        use_vmap: the function takes single indices only.
        has_padding: whether the batch may be padded on the left; if not, chunks begin at 0.
        batch: batch size.

    Gives a Custom pattern for a function that is not recognised.
    """
    try:
        expression, tensors = recognise(mask_function)
        expression = expression if has_padding else chunks_from_zero(expression)
        if not is_opaque(expression):
            if not names_tensor(expression):
                return Recognised(closed_form(expression), True)
            pattern = _with_groups(expression, tensors, positions)
            return Recognised(pattern, not names_tensor(chunks_from_zero(expression)))
    except Exception:
        # Whatever the function does with symbols, its values decide.
        pass
    alive: list[Any] = []
    key = structural_key(mask_function, alive)
    function = _elementwise(mask_function) if use_vmap else mask_function
    name = f"once {next(_serial)}" if key is None else repr(key)
    pattern = Custom(function, batch if batch > 1 else None, None, name)
    # An id in the key means its object only while that lives.
    object.__setattr__(pattern, "_alive", alive)
    return Recognised(pattern, key is not None)


def _with_groups(expression: Expression, tensors: list[torch.Tensor], positions: int) -> Pattern:
    """`closed_form` for expressions that name tensors, whose values are copied to the host."""
    host = [t.detach().to("cpu", torch.int64) for t in tensors]

    def convert(part: Expression) -> Pattern:
        kind, *rest = part
        if kind == "all":
            same = [p[1] for p in rest if p[0] == "same"]
            rest = [_own_positions(p, host, same) for p in rest if p != TRUE]
            patterns = [_groups(host[t], ("grouped", t) in rest) for t in same]
            others = [p for p in rest if p[0] not in ("same", "grouped")]
            if any(p[0] == "grouped" and p[1] not in same for p in rest):
                raise _NotClosed
            patterns += [convert(p) for p in others if p != TRUE]
            return patterns[0] if len(patterns) == 1 else And(tuple(patterns))
        if kind == "any":
            return Or(tuple(convert(p) for p in rest))
        if kind == "not":
            return Not(convert(rest[0]))
        if kind == "same":
            return _groups(host[rest[0]], False)
        if kind == "chunk" and rest[1] is not None:
            return _shifted_chunks(rest[0], tuple(host[rest[1]].tolist()), positions)
        return closed_form(part)

    return convert(expression)


@lru_cache(maxsize=16)
def _chunks_up_to(size: int, origins: tuple[int, ...], positions: int) -> Pattern:
    at = torch.arange(positions) - torch.tensor(origins)[:, None]
    return _groups(torch.div(at, size, rounding_mode="floor"), False)


def _shifted_chunks(size: int, origins: tuple[int, ...], positions: int) -> Pattern:
    """Chunks that begin at another position in each batch element; the same object for many
    steps."""
    if not any(origins):
        return Chunked(size)
    return _chunks_up_to(size, origins, max(4096, 1 << (2 * positions - 1).bit_length()))


def _groups(ids: torch.Tensor, negatives_excluded: bool) -> Pattern:
    """Documents by group number; negative numbers are groups like others unless excluded."""
    return Documents(ids if negatives_excluded else ids - ids.min().clamp(max=0))


def _own_positions(part: Expression, host: list[torch.Tensor], same: list[int]) -> Expression:
    """Replace positions looked up in a tensor by the positions themselves, where both agree.

    Packed sequences count positions from 0 in each sequence. Within a group whose looked-up
    positions go up one by one, differences of positions are the same in both counts.
    """
    kind = part[0]
    if kind in ("all", "any", "not"):
        return (kind, *(_own_positions(p, host, same) for p in part[1:]))
    table = part[3] if kind == "offset" else part[1] if kind == "grouped" else None
    if table is None or table in same:
        return part
    at = host[table]
    steady = any(
        bool(((at[:, 1:] - at[:, :-1] == 1) | (host[t][:, 1:] != host[t][:, :-1])).all())
        and bool((host[t][:, 1:] >= host[t][:, :-1]).all())
        for t in same
    )
    if not steady or bool((at < 0).any()):
        raise _NotClosed
    return TRUE if kind == "grouped" else ("offset", part[1], part[2], None)


def _elementwise(function: MaskFunction) -> MaskFunction:
    """A function of single indices as one of index tensors that broadcast against each other."""

    def mapped(*indices: torch.Tensor) -> torch.Tensor:
        device = next(i.device for i in indices if isinstance(i, torch.Tensor))
        spread = torch.broadcast_tensors(*(torch.as_tensor(i, device=device) for i in indices))
        with TransformGetItemToIndex():
            flat = torch.vmap(function)(*(i.reshape(-1) for i in spread))
        return flat.view(spread[0].shape)

    return mapped


def structural_key(value: Any, alive: list[Any], depth: int = 0) -> Any:
    """A key that is equal for closures with the same code over the same values, or None.

    Tensors count by identity and version, functions by their code and all that they reach; what
    counts by identity is added to `alive`. None where something reached can change unnoticed.
    """
    if (
        isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device))
        or value is None
    ):
        return (type(value).__name__, value)
    if isinstance(value, ModuleType):
        return ("module", value.__name__)
    if depth > 8:
        return None
    if isinstance(value, tuple):
        return _keys(value, alive, depth)
    alive.append(value)
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else ("tensor", id(value), value._version)
    if isinstance(value, FunctionType):
        code = value.__code__
        try:
            reached = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:
            return None
        reached += [value.__globals__[n] for n in _names(code) if n in value.__globals__]
        reached += [value.__defaults__, *(value.__kwdefaults__ or {}).values()]
        alive.append(code)
        key = _keys(reached, alive, depth)
        return None if key is None else ("function", id(code), key)
    return ("class", id(value)) if isinstance(value, type) else None


def _keys(values: Any, alive: list[Any], depth: int) -> tuple[Any, ...] | None:
    keys = tuple(structural_key(value, alive, depth + 1) for value in values)
    return None if None in keys else keys


def _names(code: CodeType) -> list[str]:
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return [*code.co_names, *inner]
