"""Stage 2 of the search: parameters of templates, sampled where that is expected to pay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..fusion.runners import TEMPLATES, Params

if TYPE_CHECKING:
    from .search import Bounds, Search

__all__ = ["NOISE", "Sampler"]

#: Relative differences below this are noise.
NOISE = 0.005
#: Candidates that are drawn together.
_BATCH = 8
#: What a first sample of a template's parameters is expected to gain, relative to its time.
_HOPE = 0.15
#: How much of that expectation is left after a sample that gained nothing.
_PATIENCE = 0.75


@dataclass
class Arm:
    """A template for a segment, whose parameters stage 2 samples.

    Args:
        weights: parameter -> value -> how well samples with it did.
        params: the best so far, and time_us, their time.
        hope: expected gain of the next sample, relative to that time.
    """

    bounds: Bounds
    template: str
    weights: dict[str, dict[int, float]]
    params: Params
    time_us: float
    hope: float = _HOPE
    tried: set[tuple[int, ...]] = field(default_factory=set)


class Sampler:
    """Samples parameters for a search.

    Half of the samples lie near a template's best parameters; the others take each value with a
    weight that grows with how well samples with it did.
    """

    def __init__(self, search: Search):
        self.search = search
        self.arms: dict[tuple[Bounds, str], Arm] = {}

    def run(self) -> bool:
        """Sample while it is expected to pay; whether anything was sampled."""
        search, waiting = self.search, list[tuple[Arm, Params]]()
        sampled = False
        while not search.over():
            batch = self.draw_batch()
            if batch is None and not waiting:
                return sampled
            # They are compiled while those before them are measured.
            search.prepare((arm.bounds, arm.template, params) for arm, params in batch or ())
            self.measure_batch(waiting)
            sampled = sampled or bool(waiting)
            waiting = batch or []
        search.measurer.forget()
        return sampled

    def draw_batch(self) -> list[tuple[Arm, Params]] | None:
        """What to measure next, or None where that is not expected to pay."""
        search, worth = self.search, self.worth()
        if max(worth.values(), default=0.0) < NOISE / 5 * search.cost(search.scheme):
            return None
        arms = [self.arms[place] for place in worth]
        drawn = search.random.choices(arms, list(worth.values()), k=_BATCH)
        return [(arm, params) for arm in drawn if (params := self.draw(arm)) is not None]

    def worth(self) -> dict[tuple[Bounds, str], float]:
        """What the next sample of a template is expected to gain, in microseconds.

        Templates that lag behind, of the scheme's segments or of those that one move makes, have to
        make that up first.
        """
        search = self.search
        now, worth = search.cost(search.scheme), {}
        for scheme in (search.scheme, *search.moves(search.scheme)):
            behind = max(0.0, search.cost(scheme) - now)
            if behind > _HOPE * now:
                continue
            for bounds in scheme.bounds:
                for name in search.templates(bounds):
                    arm = self.arm(bounds, name)
                    if arm is None:
                        continue
                    lag = arm.time_us - search.best[bounds].time_us
                    gain = arm.hope * arm.time_us - lag - behind
                    if gain > 0:
                        place = bounds, name
                        worth[place] = max(gain, worth.get(place, 0.0))
        return worth

    def arm(self, bounds: Bounds, name: str) -> Arm | None:
        """What stage 2 knows of a template for a segment; None where it has nothing to sample."""
        place, space = (bounds, name), TEMPLATES[name].space
        run = self.search.fastest.get(place)
        if not space or run is None or run.time_us == math.inf:
            return None
        if place not in self.arms:
            weights = {key: dict.fromkeys(values, 1.0) for key, values in space.items()}
            self.arms[place] = Arm(bounds, name, weights, run.params, run.time_us)
        return self.arms[place]

    def draw(self, arm: Arm) -> Params | None:
        """Parameters that fit and were not tried; None, and no more hope, where none turn up."""
        template, part = TEMPLATES[arm.template], self.search.sample.part(arm.bounds)
        for _ in range(100):
            params = {
                name: self.search.random.choices(list(values), list(values.values()))[0]
                for name, values in arm.weights.items()
            }
            if self.search.random.random() < 0.5:
                # Near the best ones: one or two parameters differ.
                changed = self.search.random.sample(sorted(params), min(2, len(params)))
                params = {
                    name: (params if name in changed else arm.params)[name] for name in params
                }
            drawn = tuple(params.values())
            if drawn not in arm.tried and self.sensible(params) and template.allows(
                params, part, self.search.measurer.shared_memory
            ):  # fmt: skip
                arm.tried.add(drawn)
                return params
        arm.hope = 0.0
        return None

    def sensible(self, params: Params) -> bool:
        """No tile is more than twice as high as there are rows."""
        return params.get("block_m", 0) <= max(16, 2 * self.search.sample.rows)

    def measure_batch(self, batch: list[tuple[Arm, Params]]) -> None:
        """Measure, and learn which parameters do well, and where sampling pays."""
        self.search.measure_all((arm.bounds, arm.template, params) for arm, params in batch)
        for arm, params in batch:
            key = self.search.sample.key(arm.bounds, arm.template, params)
            taken = self.search.measurer.times.get(key)
            if taken is None:  # time was over
                continue
            reward = (arm.time_us / max(taken, arm.time_us)) ** 4
            for name, value in params.items():
                arm.weights[name][value] = 0.8 * arm.weights[name][value] + reward
            gain = max(0.0, 1 - taken / arm.time_us)
            arm.hope = _PATIENCE * arm.hope + (1 - _PATIENCE) * gain
            if taken < arm.time_us:
                arm.params, arm.time_us = params, taken
