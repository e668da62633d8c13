"""Variants of a plan at equal memory: how much each may store, so that everything that remembers fits into a budget.

    bytes at the end of a life = base + each * n        n: what its stores may hold, by the knobs that their parts name in `stores`

Bytes follow from shapes, not from training. So two trial lives of one epoch, with n small, tell base and each for any variant: rows
with more columns, networks that grow, statistics beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remanence import catalogue
from remanence.core.errors import BadInput
from remanence.life.files import canonical
from remanence.life.grid import AXES, Cell, Spec
from remanence.life.report_words import size
from remanence.measure.memory import fitting

__all__ = ["Room", "budgets_of", "fitted", "refuse_sizes", "room_of", "sized", "trials"]

#: What the stores of the two trial lives may hold.
TRIALS = (20, 40)
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
Setting = tuple[str, ...]
Made = Callable[[dict[str, str], int, str], Cell]


@dataclass(frozen=True)
class Room:
    """What everything but the stores of a variant weighs, and what one unit of their knobs adds; `each` is 0 without a store."""

    base: float
    each: float

    def units(self, budget: int) -> int | None:
        """What the stores may hold within `budget` bytes; None: there is none to set.

        Raises:
            BadInput: the rest alone is larger than the budget, or leaves no room for anything in the stores.
        """
        if not self.each:
            if self.base > budget:
                raise BadInput(f"needs {size(self.base)}")
            return None
        found = fitting(budget, self.base, self.each)
        if not found:
            raise BadInput(f"needs {size(self.base + self.each)}")
        return found


def budgets_of(text: str) -> list[int]:
    """``200KB, 500KB, 1.5MB`` as bytes, from the smallest on; kB, MB, GB are decimal, KiB, MiB, GiB binary.

    Raises:
        BadInput: no amount of memory, none at all, or one twice.
    """
    found = []
    for word in text.split(","):
        match = _BUDGET.fullmatch(word)
        if not match or (match[2] or "B").upper() not in _UNITS or not float(match[1]):
            raise BadInput(f"--memory: {word.strip()!r} is no amount of memory; write 200KB,500KB,1MB")
        found.append(round(float(match[1]) * _UNITS[(match[2] or "B").upper()]))
    said = [size(budget) for budget in found]
    if len(set(said)) < len(said):
        raise BadInput(f"--memory {text}: these are the same amounts, to three figures; give different ones")
    return sorted(found)


def _stores(plan: Mapping[str, Any]) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The knobs of each part of a plan that has a store, and what it says in `stores`."""
    named: list[tuple[str, Spec]] = [("learn", plan.get("learner") or {"finetune": {}})]
    named += [("keep", spec) for spec in plan.get("keep") or []]
    found = []
    for verb, spec in named:
        ((slug, knobs),) = spec.items()
        stores = catalogue.find(verb, slug).load().stores
        if stores:
            found.append((knobs, stores))
    return found


def refuse_sizes(*axes: Sequence[Sequence[Spec]] | None) -> None:
    """Alternatives that set what a budget is to set.

    Raises:
        BadInput: names the knob.
    """
    for verb, alternatives in zip(("learner", "keep"), axes, strict=True):
        for specs in alternatives or ():
            for knobs, stores in _stores({verb: specs[0] if verb == "learner" else specs}):
                if given := sorted(set(knobs) & set(stores)):
                    raise BadInput(f"--memory sets {given[0]} itself; take it out of the alternatives")


def sized(text: str, units: int) -> str:
    """The plan `text`, its stores limited to `units` each and by nothing else."""
    plan = json.loads(text)
    for knobs, (limit, *others) in _stores(plan):
        knobs |= {limit: units, **dict.fromkeys(others)}
    return canonical(plan)


def _trial(text: str) -> str:
    """The learn events of a plan, of one epoch each."""
    plan = json.loads(text)
    plan["train"] = {**plan.get("train", {}), "epochs": 1}
    events = [event for event in plan["events"] if "learn" in event]
    plan["events"] = [{"learn": {**event["learn"], "epochs": 1}} for event in events]
    return canonical(plan)


def setting_of(cell: Cell) -> Setting:
    """What its memory depends on: learner, keepers and wheres."""
    return tuple(cell.names[axis] for axis in AXES[:3])


def trials(cells: Sequence[Cell], made: Made) -> dict[Setting, list[Cell]]:
    """The trial lives of each setting: two, or one where nothing has a store."""
    found: dict[Setting, list[Cell]] = {}
    for cell in cells:
        if setting_of(cell) not in found:
            text = _trial(cell.text)
            texts = [sized(text, n) for n in TRIALS] if _stores(json.loads(text)) else [text]
            found[setting_of(cell)] = [made(cell.names, cell.seed, each) for each in texts]
    return found


def room_of(weights: Sequence[float]) -> Room:
    """The room that the bytes at the end of a setting's trial lives tell."""
    if len(weights) == 1:
        return Room(weights[0], 0.0)
    each = (weights[1] - weights[0]) / (TRIALS[1] - TRIALS[0])
    return Room(weights[0] - each * TRIALS[0], each)


def fitted(
    cells: Sequence[Cell], budgets: Sequence[int], rooms: Mapping[Setting, Room], made: Made
) -> tuple[list[tuple[Cell, int, int | None]], list[dict[str, Any]]]:
    """Every variant at every budget: the cells with their budget and what their stores may hold, and what does not fit."""
    found: list[tuple[Cell, int, int | None]] = []
    unfit: list[dict[str, Any]] = []
    for setting, room in rooms.items():
        mine = [cell for cell in cells if setting_of(cell) == setting]
        for budget in budgets:
            try:
                units = room.units(budget)
            except BadInput as error:
                names = [{**cell.names, "memory": size(budget)} for cell in mine if cell.seed == mine[0].seed]
                unfit += [{**name, "budget": budget, "reason": str(error)} for name in names]
                continue
            for cell in mine:
                text = cell.text if units is None else sized(cell.text, units)
                found.append((made({**cell.names, "memory": size(budget)}, cell.seed, text), budget, units))
    return found, unfit
