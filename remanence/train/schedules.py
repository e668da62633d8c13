"""Learning-rate schedules: a factor of the base rate for every optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from remanence import catalogue
from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.knobs import build, check_knobs, knob


@dataclass
class Schedule:
    """Base: the factor 1 at every step."""

    def __post_init__(self) -> None:
        check_knobs(self)

    def factor(self, step: int, total: int | None, life_step: int) -> float:
        """The factor at `step` (0-based) of `total` (None: unknown) in this run, after `life_step` steps of the life."""
        return 1.0


@dataclass
class Constant(Schedule):
    """The base rate throughout, after `warmup` steps of a linear rise."""

    warmup: int = knob(0, "steps of linear warm-up", low=0)

    def factor(self, step: int, total: int | None, life_step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup + 1))


def _share(schedule: Cosine | Linear, step: int, total: int | None) -> float:
    if total is None:
        raise BadInput("this schedule needs to know the number of steps; use 'constant' for an endless stream")
    return min(1.0, max(0, step - schedule.warmup) / max(1, total - schedule.warmup))


@dataclass
class Cosine(Schedule):
    """From 1 to `final` along half a cosine, after `warmup` steps (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    warmup: int = knob(0, "steps of linear warm-up", low=0)
    final: float = knob(0.0, "factor at the end", low=0, high=1)

    def factor(self, step: int, total: int | None, life_step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * _share(self, step, total)))


@dataclass
class Linear(Schedule):
    """From 1 to `final` along a line, after `warmup` steps."""

    warmup: int = knob(0, "steps of linear warm-up", low=0)
    final: float = knob(0.0, "factor at the end", low=0, high=1)

    def factor(self, step: int, total: int | None, life_step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 1 - (1 - self.final) * _share(self, step, total)


@dataclass
class OneCycle(Schedule):
    """Up from `start` to 1 over a share `rise` of the steps, then down to ``start * final``, both along half a cosine.

    Smith & Topin 2018, "Super-Convergence", arXiv 1708.07120; as torch's `OneCycleLR`, without its cycle of the momentum. The base
    rate is the highest.
    """

    rise: float = knob(0.3, "share of the steps in which the rate rises", low=0, high=1)
    start: float = knob(0.04, "factor at the beginning", low=0, high=1)
    final: float = knob(1e-4, "factor at the end, of the one at the beginning", low=0, high=1)

    def factor(self, step: int, total: int | None, life_step: int) -> float:
        if total is None:
            raise BadInput("one-cycle needs to know the number of steps; use 'constant' for an endless stream")
        top, last = self.rise * total - 1, max(1, total - 1)
        if step <= top:
            return _between(self.start, 1.0, step / top if top > 0 else 1.0)
        return _between(1.0, self.start * self.final, min(1.0, (step - top) / max(1e-12, last - top)))


def _between(first: float, second: float, share: float) -> float:
    """Along half a cosine, from `first` at 0 to `second` at 1."""
    return second + (first - second) * 0.5 * (1 + math.cos(math.pi * share))


SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "cosine": Cosine, "linear": Linear, "one-cycle": OneCycle}


def kind_of(name: str) -> type[Schedule]:
    """The schedule called `name`: one of these, or a learner's part of kind ``schedule`` in the catalogue, imported only now.

    Raises:
        UnknownName: no such schedule.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    listed = {part.slug: part for part in catalogue.parts("learn") if part.kind == "schedule"}
    if name not in listed:
        raise UnknownName(f"no schedule is called {name!r}{nearest(name, [*SCHEDULES, *listed])}")
    return listed[name].load()


def spec_of(value: Any) -> Any:
    """A schedule as it can be written down: a name, or ``{name: knobs}``.

    Raises:
        BadInput: a schedule of your own that has no name here.
    """
    if not isinstance(value, Schedule):
        return value
    listed = {cls: name for name, cls in SCHEDULES.items()}
    listed |= {part.load(): part.slug for part in catalogue.parts("learn") if part.kind == "schedule"}
    if type(value) not in listed:
        raise BadInput(
            f"a life writes its schedules down by name, and {type(value).__name__} has none; give one of {', '.join(listed.values())}"
        )
    return {listed[type(value)]: {f.name: getattr(value, f.name) for f in fields(value)}}


def schedule_of(value: Any) -> Schedule:
    """A Schedule from a Schedule, a name or ``{name: knobs}``.

    Raises:
        UnknownName: no such schedule.
    """
    if isinstance(value, Schedule):
        return value
    name, knobs = next(iter(value.items())) if isinstance(value, Mapping) else (value, {})
    return build(kind_of(str(name)), knobs or {}, str(name))  # type: ignore[no-any-return]
