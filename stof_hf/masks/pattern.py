"""The Pattern base class, its algebra and its JSON form."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import MaskError
from .bits import TILE
from .intervals import Intervals

Index = torch.Tensor


def whole(name: str, value: Any, least: int = 0) -> int:
    """`value`; MaskError if it is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MaskError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


def positions(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a tuple of ints; MaskError if they are not positions in a sequence."""
    try:
        found = tuple(operator.index(v) for v in values)
    except TypeError:
        found = (-1,)
    if min(found, default=0) < 0:
        raise MaskError(f"{name} must be positions of at least 0, such as (0, 1), not {values!r}")
    return found


@dataclass(frozen=True)
class Rows:
    """The tile rows that a builder asks a pattern about: N of them, over one key range.

    batch, head: int64 [N]. first, last: absolute position of the first in-range query of each tile
    row and of the last, int64 [N]. Keys are the absolute positions [k0, k0 + kv_len).
    """

    batch: np.ndarray
    head: np.ndarray
    first: np.ndarray
    last: np.ndarray
    k0: int
    kv_len: int
    _structures: dict[int, tuple[Intervals, Intervals]] = field(default_factory=dict, repr=False)

    def structure_of(self, pattern: Pattern) -> tuple[Intervals, Intervals]:
        """`pattern.structure(self)`, worked out once."""
        if id(pattern) not in self._structures:
            self._structures[id(pattern)] = pattern.structure(self)
        return self._structures[id(pattern)]

    @property
    def count(self) -> int:
        return len(self.first)

    @property
    def tiles(self) -> int:
        return -(-self.kv_len // TILE)

    def all(self) -> Intervals:
        return Intervals.all(self.count, self.tiles)

    def none(self) -> Intervals:
        return Intervals.none(self.count, self.tiles)

    def touched(self, lo: np.ndarray, hi: np.ndarray) -> Intervals:
        """Tiles that share a key with the absolute key interval [lo, hi)."""
        lo = np.maximum(lo - self.k0, 0)
        hi = np.minimum(hi - self.k0, self.kv_len)
        return Intervals(lo // TILE, np.where(hi > lo, -(-hi // TILE), 0), self.tiles)

    def inside(self, lo: np.ndarray, hi: np.ndarray) -> Intervals:
        """Tiles that lie wholly inside the absolute key interval [lo, hi)."""
        lo = np.maximum(lo - self.k0, 0)
        hi = np.minimum(hi - self.k0, self.kv_len)
        return Intervals(-(-lo // TILE), hi // TILE, self.tiles)


class Pattern:
    """Who may attend to whom: a mask function on absolute positions, with its block structure.

    Calling a pattern with integer tensors (b, h, q, k) that broadcast against each other gives a
    bool tensor, True where query q may attend to key k: the convention of Transformers and of
    FlexAttention. Patterns combine with `&`, `|` and `~`.

    >>> import torch
    >>> from stof_hf.masks.patterns import Causal, SlidingWindow
    >>> q, k = torch.arange(4)[:, None], torch.arange(4)[None, :]
    >>> (Causal() & SlidingWindow(1, 0))(0, 0, q, k).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """

    registry: ClassVar[dict[str, type[Pattern]]] = {}
    #: Number of different masks along the batch and the head dimension; None where there is one.
    batch: int | None = None
    heads: int | None = None
    #: Whether a mask for a longer sequence holds the shorter one as its leading part.
    length_free: bool = True
    #: Whether a JSON form exists.
    serializable: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("_"):
            return
        known = Pattern.registry.setdefault(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise MaskError(
                f"a pattern named {cls.__name__} exists already, and saved models find patterns by "
                f"their name: rename the class in {cls.__module__}"
            )
        # A notebook may define its class again.
        Pattern.registry[cls.__name__] = cls

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        raise NotImplementedError

    def bind(self, kv_len: int) -> Pattern:
        """This pattern for keys [0, kv_len): itself, unless its definition needs the length."""
        return self

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        """(any, full): tiles of each row that may hold a True, and tiles that surely hold no False.

        `any` may be too large and `full` too small; the builder evaluates what lies between. In
        `full`, keys beyond the last one do not count.
        """
        return rows.all(), rows.none()

    def tile_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        """int64 [M]: tiles with equal keys have equal content (tile edges apart)."""
        return row * rows.tiles + tile

    def exact_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        """`tile_key`, with all tiles that are surely empty (or surely full) made equal."""
        touched, full = rows.structure_of(self)
        key = self.tile_key(rows, row, tile)
        key = np.where(touched.contains(row, tile), key - key.min(initial=0) + 2, 0)
        return np.where(full.contains(row, tile), 1, key)

    # What Transformers asks of the attention_mask that a model is called with.
    ndim = 4
    shape = torch.Size((1, 1, 0, 0))

    def contiguous(self) -> Pattern:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Pattern:
        return self

    def __and__(self, other: Pattern) -> Pattern:
        return And((self, other)) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Or((self, other)) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return Not(self)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values with string keys; `Pattern.from_json` makes an equal pattern of it.

        Raises MaskError for patterns that hold a function or a dense tensor.
        """
        if not self.serializable:
            raise MaskError(
                f"{type(self).__name__} has no JSON form, so it cannot be saved with a model: "
                "pass persist=False, or use a pattern of stof_hf.patterns"
            )
        out: dict[str, Any] = {"type": type(self).__name__}
        for f in fields(self):  # type: ignore[arg-type]
            out[f.name] = _jsonable(getattr(self, f.name))
        return out

    @staticmethod
    def from_json(data: dict[str, Any]) -> Pattern:
        """Inverse of `to_json`; MaskError for an unknown type or a wrong field.

        >>> from stof_hf.masks.patterns import Causal
        >>> Pattern.from_json((~Causal()).to_json())
        Not(pattern=Causal())
        """
        if not isinstance(data, dict):
            raise MaskError(f"expected a dict made by Pattern.to_json(), not {data!r}")
        args = dict(data)
        name = args.pop("type", None)
        cls = Pattern.registry.get(name)  # type: ignore[arg-type]
        if cls is None or not cls.serializable:
            raise MaskError(f"{name!r} is no pattern that this version of stof_hf can read")
        try:
            return cls(**{key: _from_jsonable(value) for key, value in args.items()})
        except TypeError as error:
            raise MaskError(f"cannot read pattern {name}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal masks. Never reads device memory."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def __getstate__(self) -> dict[str, Any]:
        # A copy may hold another tensor or function: it must work its fingerprint out anew.
        return {name: x for name, x in self.__dict__.items() if name != "fingerprint"}

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.fingerprint == other.fingerprint


def _jsonable(value: Any) -> Any:
    if isinstance(value, Pattern):
        return value.to_json()
    if isinstance(value, tuple):
        return [_jsonable(v) for v in value]
    return value


def _from_jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return Pattern.from_json(value)
    if isinstance(value, list):
        return tuple(_from_jsonable(v) for v in value)
    return value


def _check_pattern(value: Any) -> None:
    if not isinstance(value, Pattern):
        raise MaskError(f"only patterns combine, such as Causal(), not {value!r}")


def _common(name: str, sizes: Iterable[int | None]) -> int | None:
    distinct = {s for s in sizes if s is not None and s != 1}
    if len(distinct) > 1:
        raise MaskError(
            f"the combined patterns are for different {name}, {sorted(distinct)}: combine patterns "
            "made for the same model inputs"
        )
    return distinct.pop() if distinct else None


def _mixed_radix(keys: list[np.ndarray]) -> np.ndarray:
    """One key below 2^55 that is equal exactly where all of the keys are."""
    out = keys[0]
    for key in keys[1:]:
        if _span(out) * _span(key) >= 1 << 55:
            # Ranks keep the product of the ranges small whatever the keys are.
            out = np.unique(out, return_inverse=True)[1]
            key = np.unique(key, return_inverse=True)[1]
        out = (out - out.min(initial=0)) * _span(key) + (key - key.min(initial=0))
    return out


def _span(key: np.ndarray) -> int:
    return int(key.max(initial=0)) - int(key.min(initial=0)) + 1


@dataclass(frozen=True, eq=False)
class _Combined(Pattern):
    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        flat: list[Pattern] = []
        if not self.patterns:
            raise MaskError(f"{type(self).__name__} needs at least one pattern")
        for p in self.patterns:
            _check_pattern(p)
            flat.extend(p.patterns if type(p) is type(self) else (p,))
        object.__setattr__(self, "patterns", tuple(flat))
        object.__setattr__(self, "batch", _common("batch sizes", (p.batch for p in flat)))
        object.__setattr__(self, "heads", _common("numbers of heads", (p.heads for p in flat)))
        object.__setattr__(self, "length_free", all(p.length_free for p in flat))
        object.__setattr__(self, "serializable", all(p.serializable for p in flat))

    def bind(self, kv_len: int) -> Pattern:
        bound = tuple(p.bind(kv_len) for p in self.patterns)
        same = all(a is b for a, b in zip(bound, self.patterns, strict=True))
        return self if same else type(self)(bound)

    def exact_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        return _mixed_radix([p.exact_key(rows, row, tile) for p in self.patterns])

    @cached_property
    def fingerprint(self) -> str:
        parts = ",".join(sorted({p.fingerprint for p in self.patterns}))
        return hashlib.sha256(f"{type(self).__name__}({parts})".encode()).hexdigest()[:24]


class And(_Combined):
    """Allowed where every one of `patterns` allows it; `a & b` makes one."""

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        out = self.patterns[0](b, h, q, k)
        for p in self.patterns[1:]:
            out = out & p(b, h, q, k)
        return out

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        touched, full = rows.structure_of(self.patterns[0])
        for p in self.patterns[1:]:
            t, f = rows.structure_of(p)
            touched, full = touched & t, full & f
        return touched, full


class Or(_Combined):
    """Allowed where at least one of `patterns` allows it; `a | b` makes one."""

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        out = self.patterns[0](b, h, q, k)
        for p in self.patterns[1:]:
            out = out | p(b, h, q, k)
        return out

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        touched, full = rows.structure_of(self.patterns[0])
        for p in self.patterns[1:]:
            t, f = rows.structure_of(p)
            touched, full = touched | t, full | f
        return touched, full


@dataclass(frozen=True, eq=False)
class Not(Pattern):
    """Allowed exactly where `pattern` does not allow it; `~a` makes one."""

    pattern: Pattern

    def __post_init__(self) -> None:
        _check_pattern(self.pattern)
        for name in ("batch", "heads", "length_free", "serializable"):
            object.__setattr__(self, name, getattr(self.pattern, name))

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return ~self.pattern(b, h, q, k)

    def bind(self, kv_len: int) -> Pattern:
        bound = self.pattern.bind(kv_len)
        return self if bound is self.pattern else Not(bound)

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        touched, full = rows.structure_of(self.pattern)
        return ~full, ~touched

    def exact_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        return self.pattern.exact_key(rows, row, tile)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"Not({self.pattern.fingerprint})".encode()).hexdigest()[:24]
