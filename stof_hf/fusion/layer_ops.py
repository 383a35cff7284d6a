"""A layer as a sequence of operators, and schemes: which of them run as one kernel.

The source is STOF (PPoPP '26): a scheme partitions the sequence into segments and is written as a
string of bits in which a run of equal bits is a segment. What may be a segment, and what computes
it, is the table SEGMENTS; nothing else knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from ..errors import UnsupportedError

__all__ = ["OPERATORS", "SEGMENTS", "Scheme", "schemes"]

#: What each operator does to the rows [B * S, N] that come in.
OPERATORS = {
    "embed": "looks rows up by ids, [B * S, 1], in tables, and adds them up",
    "norm": "LayerNorm or RMSNorm",
    "gemm": "product with a weight, or with packed ones (queries, keys, values; gate and up)",
    "bias": "adds the bias of the product in front",
    "head norm": "RMSNorm of each head of queries and keys",
    "rotary": "rotates queries and keys",
    "attention": "stof::attention",
    "cross attention": "the same, to the encoder's rows, whose keys and values it computes",
    "act": "activation",
    "gate": "activation of the first half of the columns times the second",
    "residual": "adds the rows that came into the block",
    "clamp": "where fp16 has overflowed, brings everything back between limits (T5)",
}

#: Segments, and the templates that compute them (`runners.TEMPLATES`), best guesses first. "torch"
#: is PyTorch's own kernels, cuBLAS with what its epilogue can do, which the others compete with.
SEGMENTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("attention",): ("attention",),
    ("cross attention",): ("cross attention",),
    ("clamp",): ("overflow", "torch"),
    ("residual", "clamp"): ("overflow", "torch"),
    ("residual", "clamp", "norm"): ("clamped_norm", "torch"),
    **{(name,): ("torch",) for name in ("bias", "act", "gate", "residual", "head norm")},
    ("embed",): ("torch",),
    ("embed", "norm"): ("embed", "torch"),
    ("norm",): ("norm", "torch"),
    ("rotary",): ("rotary", "torch"),
    ("residual", "norm"): ("norm", "torch"),
    ("bias", "residual", "norm"): ("norm", "torch"),
    # The template for two products at once adds no bias.
    ("gemm", "gate"): ("gemv", "gated", "gemm_hopper", "gemm_split_k", "torch"),
}
for _product in ("gemm",), ("gemm", "bias"):
    SEGMENTS |= {
        _product: ("gemv", "torch", "gemm", "gemm_hopper", "gemm_split_k"),
        (*_product, "act"): ("gemv", "gemm", "gemm_hopper", "gemm_split_k", "torch"),
        (*_product, "rotary"): ("gemv", "qkv", "torch"),
        (*_product, "residual"): ("gemv", "gemm", "gemm_hopper", "gemm_split_k", "torch"),
        (*_product, "residual", "norm"): ("gemm_norm", "torch"),
        # PyTorch has no kernel for these: a norm by itself and what is behind it compete.
        ("norm", *_product): ("gemv", "gemm"),
        ("norm", *_product, "act"): ("gemv", "gemm"),
        ("norm", *_product, "rotary"): ("gemv", "qkv"),
        # A clamp by itself competes here too.
        (*_product, "residual", "clamp"): ("gemm", "gemm_split_k"),
    }
SEGMENTS[("norm", "gemm", "gate")] = ("gemv", "gated")


@dataclass(frozen=True)
class Scheme:
    """A partition of a layer's operators into segments.

    Args:
        operators: names from OPERATORS, in the order in which they run.
        sizes: operators of each segment.

    Raises UnsupportedError for an operator that is not known, and ValueError for sizes that do not
    add up.

    >>> layer = ("gemm", "bias", "attention", "gemm", "bias", "residual", "norm")
    >>> scheme = Scheme(layer, (2, 1, 4))
    >>> scheme.bits, str(scheme)
    ('0010000', '[gemm bias] [attention] [gemm bias residual norm]')
    >>> Scheme.decode(layer, "0010000") == scheme
    True
    >>> scheme.legal
    True
    """

    operators: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if unknown := set(self.operators) - set(OPERATORS):
            raise UnsupportedError(
                f"no operator is called {min(unknown)!r}: there are {', '.join(OPERATORS)}"
            )
        if min(self.sizes, default=0) < 1 or sum(self.sizes) != len(self.operators):
            raise ValueError(f"segments of {self.sizes} are no partition of {len(self.operators)}")

    @classmethod
    def unfused(cls, operators: tuple[str, ...]) -> Scheme:
        """Each operator by itself."""
        return cls(operators, (1,) * len(operators))

    @classmethod
    def decode(cls, operators: tuple[str, ...], bits: str) -> Scheme:
        """The scheme whose `bits` these are; raises ValueError where they are none."""
        if len(bits) != len(operators) or set(bits) - set("01"):
            raise ValueError(f"{bits!r} is no scheme of {len(operators)} operators")
        borders = [i for i in range(1, len(bits)) if bits[i] != bits[i - 1]]
        return cls._cut(operators, borders)

    @classmethod
    def _cut(cls, operators: tuple[str, ...], borders: list[int]) -> Scheme:
        ends = [0, *borders, len(operators)]
        return cls(operators, tuple(b - a for a, b in zip(ends, ends[1:], strict=False)))

    @property
    def bits(self) -> str:
        """One bit an operator; a run of equal bits is a segment. Begins with 0."""
        return "".join("01"[i % 2] * size for i, size in enumerate(self.sizes))

    @property
    def borders(self) -> tuple[int, ...]:
        """Where each segment but the first begins."""
        return tuple(accumulate(self.sizes))[:-1]

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Where each segment begins and ends."""
        return tuple(pairwise((0, *self.borders, len(self.operators))))

    @property
    def segments(self) -> tuple[tuple[str, ...], ...]:
        return tuple(self.operators[begin:end] for begin, end in self.bounds)

    @property
    def legal(self) -> bool:
        """Whether a template computes each segment."""
        return all(segment in SEGMENTS for segment in self.segments)

    def expand(self) -> Iterator[Scheme]:
        """Two neighbouring segments become one."""
        yield from self._legal([b for b in self.borders if b != border] for border in self.borders)

    def split(self) -> Iterator[Scheme]:
        """One segment becomes two: what takes an `expand` back that did not pay."""
        yield from self._legal(
            sorted({*self.borders, cut})
            for begin, end in self.bounds
            for cut in range(begin + 1, end)
        )

    def seize(self) -> Iterator[Scheme]:
        """A segment takes operators from the end or the beginning of its neighbour."""
        ends = (0, *self.borders, len(self.operators))
        yield from self._legal(
            [moved if b == border else b for b in self.borders]
            for before, border, behind in zip(ends, ends[1:], ends[2:], strict=False)
            for moved in range(before + 1, behind)
            if moved != border
        )

    def compete(self) -> Iterator[Scheme]:
        """Three neighbouring segments become two: the outer ones share out the one between."""
        ends = (0, *self.borders, len(self.operators))
        yield from self._legal(
            sorted({*self.borders, cut} - {first, second})
            for first, second in zip(ends[1:], ends[2:-1], strict=False)
            for cut in range(first + 1, second)
        )

    def _legal(self, cuts: Iterator[list[int]]) -> Iterator[Scheme]:
        found = (self._cut(self.operators, cut) for cut in cuts)
        yield from (scheme for scheme in found if scheme.legal)

    def __str__(self) -> str:
        return " ".join(f"[{' '.join(segment)}]" for segment in self.segments)


@cache
def schemes(operators: tuple[str, ...]) -> tuple[Scheme, ...]:
    """Every legal scheme of a layer, those with long segments in front first.

    >>> [str(s) for s in schemes(("gemm", "bias", "act"))]
    ['[gemm bias act]', '[gemm bias] [act]', '[gemm] [bias] [act]']
    """

    def sizes(rest: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
        if not rest:
            yield ()
        for size in range(len(rest), 0, -1):
            if rest[:size] in SEGMENTS:
                yield from ((size, *others) for others in sizes(rest[size:]))

    return tuple(Scheme(operators, found) for found in sizes(operators))
