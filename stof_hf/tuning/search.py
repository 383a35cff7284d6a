"""The two-stage search for the fastest scheme of a layer, as in STOF (PPoPP '26).

Stage 1 moves the borders of segments, starting from what an analytical model likes best: expand,
seize, compete, and split, which takes an expansion back. Stage 2 samples parameters of the
templates, where time is and where sampling has paid so far. A layer's time is the sum of its
segments', so that each segment is measured once, in whatever schemes it occurs.

What the sum leaves out, how far a kernel hides behind the one in front of it, is measured at last:
whole layers, those that are nearly as fast by the sum beside the fastest.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import StofError
from ..fusion.fused import Choice
from ..fusion.layer import matrix
from ..fusion.layer_ops import SEGMENTS, Scheme, schemes
from ..fusion.runners import TEMPLATES, Params
from .measure import Measurer
from .sample import Sample
from .sampling import NOISE, Sampler

__all__ = ["Known", "Result", "Run", "search"]

Bounds = tuple[int, int]
#: The share of the time that stages 1 and 2 leave for whole layers.
_WHOLE = 0.15
#: Whole layers are measured whose segments take at most so much longer than the fastest's.
_NEAR = 0.1


@dataclass(frozen=True)
class Run:
    """What computes a segment, and its time in microseconds."""

    template: str
    params: Params
    time_us: float


#: The fastest run of a template by what it computes (`Sample.about`).
Known = dict[tuple[str, str], Run]
#: A scheme, and what computes each of its segments.
Computed = tuple[Scheme, tuple[Run, ...]]


@dataclass
class Result:
    """What a search found.

    Args:
        runs: of the scheme's segments.
        unfused: times of the operators one by one, as PyTorch computes them.
        course: (measurements so far, the layer's time by then), whenever it fell.
        measurements: all that the search took.
        interrupted: whether somebody pressed Ctrl-C.
    """

    scheme: Scheme
    runs: tuple[Run, ...]
    unfused: tuple[float, ...]
    course: list[tuple[int, float]]
    measurements: int
    interrupted: bool = False

    @property
    def time_us(self) -> float:
        return sum(run.time_us for run in self.runs)

    @property
    def choice(self) -> Choice:
        return choice_of(self.scheme, self.runs)


def choice_of(scheme: Scheme, runs: tuple[Run, ...]) -> Choice:
    return Choice(scheme.bits, tuple((run.template, run.params) for run in runs))


def search(
    sample: Sample,
    measurer: Measurer,
    *,
    budget_s: float,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda count, time_us: None,
    known: Known | None = None,
) -> Result:
    """Find how layers of a kind are computed fastest.

    Args:
        sample: the layers and what they are called with.
        measurer: takes the times.
        budget_s: seconds after which nothing more is measured. PyTorch's operators one by one and
            the analytical model's scheme always are, so that there is always a result, and a good
            one for what is searched in no time, such as embeddings.
        seed: of what stage 2 draws.
        progress: called with the number of measurements and the layer's time, whenever one is done.
        known: what searches for other kinds of layers, or an earlier one, found fastest; this one
            begins with that, and adds to it.
    """
    return Search(sample, measurer, budget_s, seed, progress, known).run()


class Search:
    """A search for layers of a kind: what is measured, and stage 1."""

    def __init__(
        self, sample: Sample, measurer: Measurer, budget_s: float, seed: int,
        progress: Callable[[int, float], None], known: Known | None = None,
    ):  # fmt: skip
        self.sample, self.measurer, self.progress = sample, measurer, progress
        self.known = {} if known is None else known
        self.deadline = time.monotonic() + budget_s
        self.random = random.Random(seed)
        self.names = sample.layer.names
        self.best: dict[Bounds, Run] = {}
        self.fastest: dict[tuple[Bounds, str], Run] = {}
        self.starts: dict[tuple[Bounds, str], Params | None] = {}
        self.count = 0
        self.course: list[tuple[int, float]] = []
        self.scheme = Scheme.unfused(self.names)

    def run(self) -> Result:
        for bounds in self.scheme.bounds:
            name = self.names[bounds[0]]
            self.measure(bounds, name if self.is_attention(bounds) else "torch", {})
        unfused = tuple(self.best[bounds].time_us for bounds in self.scheme.bounds)
        if math.inf in unfused:
            failed = self.names[unfused.index(math.inf)]
            raise StofError(f"{failed!r} of {self.sample.kind} could not be timed")
        interrupted, end, now = False, self.deadline, time.monotonic()
        self.deadline = now + (1 - _WHOLE) * (end - now)
        try:
            start = self.analytical()
            self.explore([start], needed=True)
            if self.cost(start) < self.cost(self.scheme):
                self.scheme = start
                self.note()
            self.move_borders()
            sampler = Sampler(self)
            while sampler.run():
                before = self.scheme
                self.move_borders()
                if self.scheme == before:
                    break
            self.deadline = end
            scheme, runs = self.whole(self.summed())
        except KeyboardInterrupt:
            interrupted = True
            scheme, runs = self.summed()
        return Result(scheme, runs, unfused, self.course, self.count, interrupted)

    def summed(self) -> Computed:
        """What is fastest by the sum of segments."""
        return self.fastest_of(min(self.scheme, Scheme.unfused(self.names), key=self.cost), {})

    def fastest_of(self, scheme: Scheme, kept: Mapping[Bounds, Run]) -> Computed:
        """A scheme with what is kept, and else what is fastest for each segment by itself."""
        return scheme, tuple(kept.get(bounds) or self.best[bounds] for bounds in scheme.bounds)

    def whole(self, chosen: Computed) -> Computed:
        """The fastest whole layer near one: step by step, and as long as there is time."""
        taken = self.whole_us(chosen)
        tried = {self.layer_key(chosen)}
        while not self.over() and taken < math.inf:
            near = {self.layer_key(each): each for each in self.near(*chosen)}
            times = {
                key: self.whole_us(each)
                for key, each in near.items()
                if key not in tried and not self.over()
            }
            tried.update(times)
            best = min(times, key=times.__getitem__, default="")
            if times.get(best, taken) >= taken * (1 - NOISE):
                break
            chosen, taken = near[best], times[best]
        return chosen

    def layer_key(self, computed: Computed) -> str:
        return self.sample.layer_key(choice_of(*computed))

    def whole_us(self, computed: Computed) -> float:
        """The time of a layer as it is; infinite where it fails."""
        choice = choice_of(*computed)
        key = self.sample.layer_key(choice)
        self.count += key not in self.measurer.times
        return self.measurer.time_us(key, lambda: self.sample.layer_calls(choice))

    def near(self, scheme: Scheme, runs: tuple[Run, ...]) -> list[Computed]:
        """Other templates for a segment, and schemes that one move makes, the fastest first."""
        made = [
            (scheme, (*runs[:i], run, *runs[i + 1 :]))
            for i, bounds in enumerate(scheme.bounds)
            for (place, _), run in self.fastest.items()
            if place == bounds and run.template != runs[i].template
        ]
        kept = dict(zip(scheme.bounds, runs, strict=True))
        made += [
            self.fastest_of(other, kept)
            for other in self.moves(scheme)
            if self.cost(other) < math.inf
        ]
        most = (1 + _NEAR) * self.cost(scheme)
        costs = [(sum(run.time_us for run in runs), runs, other) for other, runs in made]
        costs.sort(key=lambda each: each[0])
        return [(other, runs) for cost, runs, other in costs if cost <= most]

    def is_attention(self, bounds: Bounds) -> bool:
        return self.names[slice(*bounds)] in (("attention",), ("cross attention",))

    def cost(self, scheme: Scheme) -> float:
        """Its time as far as it is measured; infinite where a segment is not."""
        return sum(
            self.best[bounds].time_us if bounds in self.best else math.inf
            for bounds in scheme.bounds
        )

    def over(self) -> bool:
        return time.monotonic() >= self.deadline

    def templates(self, bounds: Bounds) -> Iterator[str]:
        """What can compute a segment here."""
        part = self.sample.part(bounds)
        for name in SEGMENTS[part.names]:
            template = TEMPLATES[name]
            if template.takes(part) and (self.measurer.templates or not template.module):
                yield name

    def start(self, bounds: Bounds, name: str) -> Params | None:
        """Parameters to begin with, or None where the template has none that fit.

        The best of another kind of layers, or those that nobody tuned.
        """
        place = bounds, name
        if place not in self.starts:
            self.starts[place] = self.make_start(bounds, name)
        return self.starts[place]

    def make_start(self, bounds: Bounds, name: str) -> Params | None:
        template, part = TEMPLATES[name], self.sample.part(bounds)
        params = None
        if template.module:
            about = self.sample.about(bounds)
            best = self.known.get((name, about))
            params = self.measurer.first(name, about) if best is None else best.params
        try:
            params = params or template.start(part, self.sample.rows, self.sample.hidden.device)
        except RuntimeError:
            return None
        if not template.allows(params, part, self.measurer.shared_memory):
            return None
        return {name: params[name] for name in template.space}

    def measure(self, bounds: Bounds, name: str, params: Params) -> None:
        """The time of a candidate, which becomes its segment's best if it is."""
        key = self.sample.key(bounds, name, params)
        self.count += key not in self.measurer.times
        taken = self.measurer.time_us(key, lambda: self.sample.calls(bounds, name, params))
        run = Run(name, params, taken)
        places: list[tuple[dict[Any, Run], Any]] = [
            (self.fastest, (bounds, name)), (self.best, bounds)
        ]  # fmt: skip
        if params and taken < math.inf:
            places.append((self.known, (name, self.sample.about(bounds))))
        for known, here in places:
            if here not in known or taken < known[here].time_us:
                known[here] = run
        self.note()

    def note(self) -> None:
        """Write down the layer's time where it fell."""
        now = self.cost(self.scheme)
        if now < (self.course[-1][1] if self.course else math.inf):
            self.course.append((self.count, now))
        self.progress(self.count, min(now, self.course[-1][1] if self.course else now))

    def measure_all(
        self, candidates: Iterable[tuple[Bounds, str, Params]], needed: bool = False
    ) -> None:
        """Measure as many as there is time for, or all if needed, compiling several at once.

        What is known takes no time.
        """
        rest = list(candidates)
        while rest and (needed or not self.over()):
            count = self.measurer.at_once
            batch, rest = rest[:count], rest[count:]
            self.prepare(batch)
            for i, one in enumerate(batch):
                if self.over() and not needed:
                    self.measurer.forget()
                    rest = batch[i:] + rest
                    break
                self.measure(*one)
        for one in rest:
            if self.sample.key(*one) in self.measurer.times:
                self.measure(*one)

    def prepare(self, candidates: Iterable[tuple[Bounds, str, Params]]) -> None:
        """Begin to compile what is measured next."""
        self.measurer.prepare({
            self.sample.key(*one): lambda one=one: self.sample.try_once(*one) for one in candidates
        })  # fmt: skip

    def explore(self, wanted: Iterable[Scheme], needed: bool = False) -> None:
        """Measure segments of schemes that are not measured yet, with parameters nobody tuned."""
        bounds = dict.fromkeys(bounds for scheme in wanted for bounds in scheme.bounds)
        starts = (
            (each, name, self.start(each, name))
            for each in bounds
            for name in self.templates(each)
            if (each, name) not in self.fastest
        )
        self.measure_all((one for one in starts if one[2] is not None), needed)

    def analytical(self) -> Scheme:
        """The scheme between whose segments the fewest bytes go through memory."""
        columns = list(_columns(self.sample))

        def traffic(scheme: Scheme) -> tuple[int, int]:
            return sum(columns[border] for border in scheme.borders), len(scheme.sizes)

        return min(self.schemes() or [self.scheme], key=traffic)

    def schemes(self) -> list[Scheme]:
        """Every scheme whose segments can be computed here."""
        return [s for s in schemes(self.names) if all(map(self.computable, s.bounds))]

    def computable(self, bounds: Bounds) -> bool:
        return any(self.start(bounds, name) is not None for name in self.templates(bounds))

    def moves(self, scheme: Scheme) -> dict[Scheme, None]:
        """Schemes that one move makes of one."""
        return dict.fromkeys(
            other
            for move in (Scheme.expand, Scheme.seize, Scheme.compete, Scheme.split)
            for other in move(scheme)
            if all(map(self.computable, other.bounds))
        )

    def move_borders(self) -> None:
        """Stage 1: take the best move as long as one helps.

        When time is over, of those whose segments are measured.
        """
        while moves := self.moves(self.scheme):
            self.explore(moves)
            best = min(moves, key=self.cost)
            if self.cost(best) >= self.cost(self.scheme) * (1 - NOISE / 10):
                return
            self.scheme = best
            self.note()


def _columns(sample: Sample) -> Iterator[int]:
    """Columns of the rows in front of each operator."""
    width = sample.hidden.shape[-1]
    for operator in sample.layer.operators:
        yield width
        if operator.name == "embed":
            width = operator.modules[0].weight.shape[1]
        elif operator.name == "gemm":
            width = sum(matrix(m).shape[0] for m in operator.modules)
        elif operator.name == "gate":
            width //= 2
        elif operator.name in ("attention", "cross attention"):
            width = operator.attention.heads * operator.attention.head_dim
