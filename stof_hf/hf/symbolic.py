"""Which pattern a mask function of Transformers is, found by calling it with symbols.

Transformers rebuilds its mask functions (closures over closures) in every forward. Called with the
symbols below instead of index tensors, such a function returns an expression that says what it
computes: comparisons of positions, and look-ups in tensors of token groups. This works the same in
eager mode and inside torch.compile, where closures cannot be inspected, and needs no list of the
functions that a version of Transformers defines. Whatever does something else with the symbols is
opaque: its values are then computed instead of recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: An expression is a nested tuple: ("true",), ("false",), ("all" | "any", a, b, ...), ("not", a),
#: or an atom ("offset", lo, hi, table): lo <= k - q <= hi, None is no bound; table is None or an
#: index into the tensors, which then maps positions first.
#: ("key" | "query", lo, hi): lo <= position <= hi. ("same", t): equal groups in tensor t.
#: ("grouped", t): the query's group in tensor t is not negative. ("chunk", size, t): same chunk of
#: `size` tokens, counted from tensor t[b].
Expression = tuple[Any, ...]

OPAQUE: Expression = ("opaque",)
TRUE: Expression = ("true",)
FALSE: Expression = ("false",)


def _tighter(a: Expression, b: Expression) -> Expression | None:
    """The conjunction of two offset atoms over the same positions as one atom."""
    if a[0] != "offset" or b[0] != "offset" or a[3] != b[3]:
        return None
    lo = b[1] if a[1] is None else a[1] if b[1] is None else max(a[1], b[1])
    hi = b[2] if a[2] is None else a[2] if b[2] is None else min(a[2], b[2])
    return ("offset", lo, hi, a[3])


def _all(a: Expression, b: Expression) -> Expression:
    parts: list[Expression] = []
    for part in (a[1:] if a[0] == "all" else (a,)) + (b[1:] if b[0] == "all" else (b,)):
        merged = None
        for i in range(len(parts)):
            if merged is None:
                merged = _tighter(parts[i], part)
                if merged is not None:
                    parts[i] = merged
        if merged is None and part != TRUE:
            parts.append(part)
    if not parts:
        return TRUE
    return parts[0] if len(parts) == 1 else ("all", *parts)


def _any(a: Expression, b: Expression) -> Expression:
    if a == FALSE:
        return b
    return a if b == FALSE else ("any", a, b)


class _Symbol:
    """What every symbol shares: an operation that it does not define makes the result opaque."""

    device = None

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def new_ones(self, *args: Any, **kwargs: Any) -> Truth:
        return Truth(TRUE)

    def new_zeros(self, *args: Any, **kwargs: Any) -> Truth:
        return Truth(FALSE)

    def __bool__(self) -> bool:
        raise TypeError("the value of a symbol is not known")

    __int__ = __index__ = __float__ = __len__ = __iter__ = __bool__  # type: ignore[assignment]

    def _opaque(self, *args: Any) -> Opaque:
        return Opaque()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = _opaque
    __and__ = __rand__ = __or__ = __ror__ = __invert__ = __abs__ = _opaque
    __le__ = __lt__ = __ge__ = __gt__ = __eq__ = __ne__ = _opaque
    __hash__ = None  # type: ignore[assignment]


class Truth(_Symbol):
    """A bool value for each (batch, head, query, key)."""

    def __init__(self, expression: Expression):
        self.expression = expression

    def __and__(self, other: Any) -> Truth:
        return Truth(_all(self.expression, _expression(other)))

    def __or__(self, other: Any) -> Truth:
        return Truth(_any(self.expression, _expression(other)))

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Truth:
        return Truth(("not", self.expression))


def _expression(x: Any) -> Expression:
    if isinstance(x, Truth):
        return x.expression
    if isinstance(x, bool):
        return TRUE if x else FALSE
    return OPAQUE


class Index(_Symbol):
    """A batch, head, query or key index: `axis` + `shift`, looked up in a tensor if `table` is set.

    `origin` is a tensor whose value for the batch element was subtracted; `chunk` the divisor.
    """

    def __init__(
        self,
        axis: str,
        shift: int = 0,
        table: int | None = None,
        origin: int | None = None,
        chunk: int | None = None,
    ):
        self.axis, self.shift, self.table, self.origin, self.chunk = (
            axis,
            shift,
            table,
            origin,
            chunk,
        )

    def _position(self) -> bool:
        return self.axis in ("q", "k") and self.origin is None and self.chunk is None

    def __add__(self, other: Any) -> Any:
        if type(other) is int and self._position():
            return Index(self.axis, self.shift + other, self.table)
        return Opaque()

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if type(other) is int:
            return self + (-other)
        if isinstance(other, Index):
            if (
                other.axis == "b"
                and other.table is not None
                and self._position()
                and not self.shift
            ):
                return Index(self.axis, 0, self.table, other.table)
            if self._position() and other._position() and self.table == other.table:
                if self.axis == other.axis:
                    return Opaque()
                return Distance(self.axis, self.shift - other.shift, self.table)
        return Opaque()

    def __floordiv__(self, other: Any) -> Any:
        bare = self.axis in ("q", "k") and self.table is None and self.chunk is None
        if bare and not self.shift and type(other) is int and other > 0:
            return Index(self.axis, 0, None, self.origin, other)
        return Opaque()

    def _compare(self, other: Any, lo: int | None, hi: int | None) -> Any:
        """lo <= self - other <= hi."""
        if isinstance(other, Index):
            if self._position() and other._position() and self.table == other.table:
                gap = self - other
                return gap.between(lo, hi) if isinstance(gap, Distance) else Opaque()
        elif type(other) is int and self._position():
            lo = None if lo is None else lo + other - self.shift
            hi = None if hi is None else hi + other - self.shift
            if self.table is not None:
                grouped = self.axis == "q" and lo == 0 and hi is None
                return Truth(("grouped", self.table)) if grouped else Opaque()
            if (lo is None or lo <= 0) and hi is None:
                return Truth(TRUE)
            return Truth(("key" if self.axis == "k" else "query", lo, hi))
        return Opaque()

    def __le__(self, other: Any) -> Any:
        return self._compare(other, None, 0)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, None, -1)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, 0, None)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, 1, None)

    def __eq__(self, other: Any) -> Any:
        if isinstance(other, Index) and {self.axis, other.axis} == {"q", "k"}:
            if (
                self.table != other.table
                or self.origin != other.origin
                or self.chunk != other.chunk
            ):
                return Opaque()
            if self.chunk is not None:
                return Truth(("chunk", self.chunk, self.origin))
            if self.table is not None and not self.shift and not other.shift:
                return Truth(("same", self.table))
        return self._compare(other, 0, 0)


class Distance(_Symbol):
    """Key minus query position (or the reverse) plus `shift`, or its absolute value."""

    def __init__(self, axis: str, shift: int, table: int | None, magnitude: bool = False):
        self.axis, self.shift, self.table, self.magnitude = axis, shift, table, magnitude

    def __abs__(self) -> Any:
        return Opaque() if self.shift else Distance(self.axis, 0, self.table, True)

    def abs(self) -> Any:
        return abs(self)

    def between(self, lo: int | None, hi: int | None) -> Any:
        if self.magnitude:
            if hi is None or (lo is not None and lo > 0):
                return Opaque()
            return Truth(("offset", -hi, hi, self.table)) if hi >= 0 else Truth(FALSE)
        lo = None if lo is None else lo - self.shift
        hi = None if hi is None else hi - self.shift
        if self.axis == "q":
            lo, hi = (None if hi is None else -hi), (None if lo is None else -lo)
        return Truth(("offset", lo, hi, self.table))

    def _compare(self, other: Any, lo: int | None, hi: int | None) -> Any:
        if type(other) is not int:
            return Opaque()
        return self.between(None if lo is None else lo + other, None if hi is None else hi + other)

    __le__, __lt__, __ge__, __gt__, __eq__ = (
        Index.__le__,
        Index.__lt__,
        Index.__ge__,
        Index.__gt__,
        lambda self, other: self._compare(other, 0, 0),
    )


class Opaque(Truth):
    """A value that is not understood; so is all that is computed from it."""

    def __init__(self) -> None:
        super().__init__(OPAQUE)

    __and__ = __rand__ = __or__ = __ror__ = __invert__ = _Symbol._opaque


class _Lookups(TorchFunctionMode):
    """Turns tensor[symbols] into a symbol and notes the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__getitem__:
            if any(isinstance(a, _Symbol) for a in args):
                return Opaque()
            return func(*args, **(kwargs or {}))
        tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if not any(isinstance(i, _Symbol) for i in index):
            return func(*args, **(kwargs or {}))
        if not all(isinstance(i, Index) and i.table is None and not i.shift for i in index):
            return Opaque()
        axes = [i.axis for i in index]
        if axes not in (["b"], ["b", "q"], ["b", "k"]):
            return Opaque()
        at = 0
        while at < len(self.tensors) and self.tensors[at] is not tensor:
            at += 1
        if at == len(self.tensors):
            self.tensors.append(tensor)
        return Index(axes[-1], 0, at)


def recognise(mask_function: Callable[..., Any]) -> tuple[Expression, list[torch.Tensor]]:
    """What a mask function f(b, h, q, k) computes: its expression and the tensors that this names.

    The expression contains ("opaque",) where the function does more than compare positions and
    token groups. An exception of the function itself passes through.
    """
    lookups = _Lookups()
    with lookups:
        result = mask_function(Index("b"), Index("h"), Index("q"), Index("k"))
    return _expression(result), lookups.tensors


def is_opaque(expression: Expression) -> bool:
    """Whether any part of the expression was not understood."""
    if expression[0] in ("all", "any", "not"):
        return any(is_opaque(part) for part in expression[1:])
    return expression[0] == "opaque"


def names_tensor(expression: Expression) -> bool:
    """Whether any part of the expression refers to a tensor."""
    kind = expression[0]
    if kind in ("all", "any", "not"):
        return any(names_tensor(part) for part in expression[1:])
    if kind in ("same", "grouped"):
        return True
    return kind in ("offset", "chunk") and expression[-1] is not None
