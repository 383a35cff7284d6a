"""What the search found for a key, as it is kept in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

__all__ = ["Entry", "Layer", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Operators computed by one kernel.

    Args:
        template: name of what computes them.
        params: its parameters; they must come back from JSON as they are.
        time_us: measured, in microseconds.
    """

    template: str
    params: dict[str, Any]
    time_us: float

    def __post_init__(self) -> None:
        _require(self, template=str, params=dict)
        _require_time(self, "time_us")
        if json.loads(json.dumps(self.params)) != self.params:
            raise TypeError(
                f"params must come back from JSON as they are, with lists for tuples and strings "
                f"as keys, unlike {self.params!r}"
            )


@dataclass(frozen=True)
class Layer:
    """How layers of one kind are computed: the scheme, and its segments in their order."""

    scheme: str
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        _require(self, scheme=str, segments=tuple)


@dataclass(frozen=True)
class Entry:
    """A tuned result.

    Args:
        name: what a list shows for the model, such as "bert-base-uncased".
        layers: layer kind -> how layers of that kind are computed.
        batch_size, seq_len: what was measured, not the buckets.
        time_us, baseline_us: all layers of a call with and without it, in microseconds.
        measured: when; now unless given.

    Raises TypeError and ValueError for fields of other types and times that are not positive.

    >>> segment = Segment("gemm_bias_gelu", {"BLOCK_M": 128}, 31.5)
    >>> entry = Entry("bert", {"encoder": Layer("00111", (segment,))}, 8, 500, 900.0, 1400.0)
    >>> Entry.from_json(entry.to_json()) == entry
    True
    """

    name: str
    layers: Mapping[str, Layer]
    batch_size: int
    seq_len: int
    time_us: float
    baseline_us: float
    measured: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        _require(self, name=str, layers=dict, batch_size=int, seq_len=int, measured=datetime)
        for time in ("time_us", "baseline_us", "batch_size", "seq_len"):
            _require_time(self, time)
        if self.measured.tzinfo is None:
            raise ValueError("measured must name its time zone: datetime.now(datetime.UTC)")

    def beats(self, other: Entry) -> bool:
        """Whether it is faster than another one of its key, or as fast and newer.

        Faster is who takes less time per token: two of one bucket need not be of one size.
        """
        mine, others = (x.time_us / (x.batch_size * x.seq_len) for x in (self, other))
        return mine < others or (mine == others and self.measured > other.measured)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "measured": self.measured.isoformat()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """Read what `to_json` gave; raises KeyError, TypeError or ValueError for anything else."""
        layers = {
            kind: Layer(layer["scheme"], tuple(Segment(**segment) for segment in layer["segments"]))
            for kind, layer in data["layers"].items()
        }
        measured = datetime.fromisoformat(data["measured"])
        return cls(**{**data, "layers": layers, "measured": measured})


def _require(entry: Any, **types: type) -> None:
    for name, expected in types.items():
        value = getattr(entry, name)
        if not isinstance(value, expected):
            raise TypeError(f"{name} must be of type {expected.__name__}, not {value!r}")


def _require_time(entry: Any, name: str) -> None:
    value = getattr(entry, name)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {value!r}")
