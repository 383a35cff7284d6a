"""What the search competes with: schemes and parameters at random, and all there are.

Both draw from the same candidates: schemes whose segments can be computed, their templates, and
all parameters that a template allows, but for those that only repeat others (`_repeats`). Of what
they measured they take the best: a layer's time is the sum of its segments', so the fastest
segments make the fastest scheme. That favours random search, which by itself would know whole
schemes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from ..fusion.fused import Choice
from ..fusion.runners import TEMPLATES, Params
from ..tuning.measure import Measurer
from ..tuning.sample import Sample
from ..tuning.search import Search

__all__ = ["Borrowed", "exhaustive_search", "random_search"]

Bounds = tuple[int, int]
Candidate = tuple[Bounds, str, Params]
#: Segment -> template -> parameters.
Space = dict[Bounds, dict[str, list[Params]]]
#: Candidates of the exhaustive search that are saved together.
_SAVED = 256


class Borrowed(Measurer):
    """Knows what one search has asked for, and takes times from a measurer that others use too.

    So each search counts its own measurements, and nothing is measured twice.
    """

    def __init__(self, measurer: Measurer):
        super().__init__()
        self.measurer = measurer
        self.templates, self.shared_memory = measurer.templates, measurer.shared_memory

    @property
    def at_once(self) -> int:
        return self.measurer.at_once

    def prepare(self, candidates: Mapping[str, Callable[[], Any]]) -> None:
        self.measurer.prepare({k: c for k, c in candidates.items() if k not in self.times})

    def forget(self) -> None:
        self.measurer.forget()

    def first(self, template: str, about: str) -> dict[str, int] | None:
        return self.measurer.first(template, about)

    def _time(self, key: str, make: Callable[[], Sequence[Callable[[], Any]]]) -> float:
        return self.measurer.time_us(key, make)


def random_search(
    sample: Sample, measurer: Borrowed, measurements: int, seed: int
) -> Choice | None:
    """The best of so many measurements, or of all there are; None where nothing computes a layer.

    Schemes are drawn uniformly, then a template for each segment, then its parameters. What the
    measurer knows already, of layers of another kind, costs nothing.
    """
    search = _search(sample, measurer, math.inf, seed)
    schemes, space, draw = search.schemes(), _space(search), search.random.choice
    new = {sample.key(*one) for one in _candidates(space)} - measurer.times.keys()
    measurements = min(measurements, len(new))
    while search.count < measurements:
        unknown: dict[str, Candidate] = {}
        for bounds in draw(schemes).bounds:
            name = draw([*space[bounds]])
            one = bounds, name, draw(space[bounds][name])
            if (key := sample.key(*one)) not in measurer.times:
                unknown[key] = one
        search.measure_all([*unknown.values()][: measurements - search.count])
    return _best(search, space)


def exhaustive_search(
    sample: Sample, measurer: Borrowed, budget_s: float, save: Callable[[], None]
) -> tuple[Choice | None, set[str]]:
    """The best of all candidates, and the keys of all there are, by which the measurer knows them.

    Segments that compute the same thing are one. What there is no time for is left out at random.

    Args:
        measurer: what it knows already costs nothing.
        budget_s: seconds after which nothing more is measured.
        save: called whenever another few hundred are measured.
    """
    search = _search(sample, measurer, budget_s, 0)
    space = _space(search)
    candidates = {sample.key(*one): one for one in _candidates(space)}
    left = [one for key, one in candidates.items() if key not in measurer.times]
    search.random.shuffle(left)
    while left and not search.over():
        batch, left = left[:_SAVED], left[_SAVED:]
        search.measure_all(batch)
        save()
    return _best(search, space), set(candidates)


def _search(sample: Sample, measurer: Measurer, budget_s: float, seed: int) -> Search:
    return Search(sample, measurer, budget_s, seed, lambda count, time_us: None)


def _space(search: Search) -> Space:
    """Of all segments that occur in a scheme."""
    space: Space = {}
    for bounds in dict.fromkeys(bounds for scheme in search.schemes() for bounds in scheme.bounds):
        part = search.sample.part(bounds)
        for name in search.templates(bounds):
            if search.start(bounds, name) is None:
                continue
            template = TEMPLATES[name]
            every = (
                dict(zip(template.space, values, strict=True))
                for values in product(*template.space.values())
            )
            space.setdefault(bounds, {})[name] = [
                params for params in every
                if template.allows(params, part, search.measurer.shared_memory)
                and not _repeats(params, template.space, search.sample.rows)
            ]  # fmt: skip
    return space


def _repeats(params: Params, space: Mapping[str, tuple[int, ...]], rows: int) -> bool:
    """Whether smaller groups of rows of tiles are walked in the same order (`common.tile_of`)."""
    if "group_m" not in params:
        return False
    tiles = math.ceil(rows / params["block_m"])
    enough = min((g for g in space["group_m"] if g >= tiles), default=math.inf)
    return params["group_m"] > enough


def _candidates(space: Space) -> list[Candidate]:
    return [
        (bounds, name, params)
        for bounds, templates in space.items()
        for name, allowed in templates.items()
        for params in allowed
    ]


def _best(search: Search, space: Space) -> Choice | None:
    """Of the fastest measured segments; None where no scheme has all of its segments measured."""
    for one in _candidates(space):
        if search.sample.key(*one) in search.measurer.times:
            search.measure(*one)
    scheme = min(search.schemes(), key=search.cost)
    if search.cost(scheme) == math.inf:
        return None
    runs = [search.best[bounds] for bounds in scheme.bounds]
    return Choice(scheme.bits, tuple((run.template, run.params) for run in runs))
