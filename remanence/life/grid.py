"""The grid of a comparison: a plan, what is varied in it, and the cells that come of it.

A *variant* is a choice of learner, keepers, wheres, memory and forgetter; a *cell* is a variant and a seed: one life. Its key is the hash of
all that its result depends on, so that a cell that was lived once is not lived again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from remanence import catalogue
from remanence.core.errors import BadInput
from remanence.core.part import Part
from remanence.core.problem import problem_of
from remanence.data.request import COLUMNS
from remanence.life.files import canonical, sha256
from remanence.life.plan import Forget, Plan, parse_plan
from remanence.life.references import code_sha256
from remanence.life.yaml import parse
from remanence.train.resolve import check_fits

Spec = dict[str, dict[str, Any]]
#: `memory` is set by `life.memory`, once the others are known.
AXES = ("learner", "keep", "where", "memory", "forget")
_VERBS = {"learner": "learn"}
_REQUEST = ("ids", *COLUMNS)
#: What stands for a choice of the plan itself.
AS_PLANNED = "as planned"


@dataclass(frozen=True)
class Cell:
    """One life of a comparison. `names` says in words what was chosen on each axis; `text` is its plan, as JSON."""

    names: dict[str, str]
    seed: int
    text: str
    key: str
    prefix: str | None

    @property
    def plan(self) -> Plan:
        return parse_plan(self.text, "cell.yaml")


@dataclass
class Group:
    """Cells that live the same life up to their first request: it is lived once."""

    prefix: str | None
    cells: list[Cell] = field(default_factory=list)


def choices(axis: str, text: str | None, plan: Plan | None = None) -> list[list[Spec]] | None:
    """The alternatives on an axis, in the syntax of plans: ``none, replay, [replay, ewc], {replay: {per_class: 5}}``; ``all`` is
    every method of the catalogue that serves the `plan`, but `auto`, which tries them itself. Each alternative is a list of specs;
    None: as planned.

    Raises:
        BadInput: no alternatives, two methods where one belongs, or an unknown name.
    """
    if text is None:
        return None
    verb = _VERBS.get(axis, axis)
    given = parse(f"[{text}]", f"--{verb}").data
    every: list[list[Spec]] = [
        [{part.slug: {}}] for part in catalogue.parts(verb=verb, kind="method") if _serves(part, plan)
    ]
    found: list[list[Spec]] = []
    for value in given if isinstance(given, list) else []:
        found += every if value == "all" else [_alternative(axis, value)]
    if not found:
        raise BadInput(
            f"--{verb} names nothing; give names with commas, such as --{verb} {catalogue.parts(verb=verb)[0].slug}"
        )
    for specs in found:
        if axis in ("learner", "forget") and len(specs) != 1:
            raise BadInput(f"--{verb}: each alternative is one method, not {len(specs)}")
        for spec in specs:
            catalogue.find(verb, next(iter(spec)))
    return found


def _serves(part: Part, plan: Plan | None) -> bool:
    """Whether a method can act in the lives of a plan: its learner's, its problem's."""
    if part.family == "search":
        return False
    if plan is None or part.verb != "forget":
        return True
    method = part.load()()
    learner = next(iter(plan.learner)) if plan.learner else "finetune"
    if method.learner:
        return bool(method.learner == learner and not plan.keep)
    moves = catalogue.find("learn", learner).load().moves_weights or part.slug == "retrain"
    try:
        check_fits([method], problem_of(plan.problem))
    except BadInput:
        return False
    return bool(moves)


def _alternative(axis: str, value: Any) -> list[Spec]:
    if value in (None, "none") and axis in ("keep", "where"):
        return []
    specs: list[Spec] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            specs.append({item: {}})
        elif isinstance(item, dict) and len(item) == 1:
            slug, knobs = next(iter(item.items()))
            specs.append({str(slug): dict(knobs or {})})
        else:
            raise BadInput(f"{item!r:.80} is no method; write a name or {{name: {{knob: value}}}}")
    return specs


def said(specs: Sequence[Spec]) -> str:
    """``replay(per_class=5) + ewc``"""
    words = []
    for spec in specs:
        ((slug, knobs),) = spec.items()
        words.append(slug + (f"({', '.join(f'{k}={v}' for k, v in knobs.items())})" if knobs else ""))
    return " + ".join(words) or "none"


def expand(
    plan: Plan,
    axes: Mapping[str, list[list[Spec]] | None],
    seeds: Sequence[int],
    references: int,
    fingerprint: str,
    versions: Mapping[str, Any],
) -> list[Cell]:
    """Every cell of the grid, variants in the order given, seeds within them.

    Args:
        references: how many models each request is measured against.
        fingerprint: of the plan's stream.
        versions: of everything else that equal bits depend on.

    Raises:
        BadInput: nothing to compare, forgetters for a plan without requests, or a variant that cannot be run.
    """
    if axes.get("forget") and not any(event.kind == "forget" for event in plan.events):
        raise BadInput("--forget compares forgetters, but the plan has no forget event; add one")
    cells = []
    planned: list[list[Spec] | None] = [None]
    for chosen in product(*(axes.get(axis) or planned for axis in AXES)):
        picked = dict(zip(AXES, chosen, strict=True))
        names = {axis: AS_PLANNED if specs is None else said(specs) for axis, specs in picked.items()}
        for seed in seeds:
            text = canonical(_variant(plan, picked, seed, references))
            cells.append(cell_of(names, seed, text, fingerprint, versions))
    return cells


def cell_of(names: dict[str, str], seed: int, text: str, fingerprint: str, versions: Mapping[str, Any]) -> Cell:
    """The cell of a plan, with the keys of all that its life and its beginning depend on.

    Raises:
        PlanError: the plan cannot be run.
    """
    checked = parse_plan(text, "a variant of the plan")
    parts = _parts(checked)
    about = [json.loads(canonical(checked.canonical())), code_sha256(parts), fingerprint, dict(versions)]
    first = next((i for i, event in enumerate(checked.events) if event.kind == "forget"), None)
    prefix = None
    if first:
        start = {**json.loads(text), "events": json.loads(text)["events"][:first]}
        learned = [part for part in parts if part.verb != "forget"]
        prefix = sha256(canonical([start, code_sha256(learned), fingerprint, dict(versions)]))
    return Cell(names, seed, text, sha256(canonical(about)), prefix)


def groups(cells: Sequence[Cell]) -> list[Group]:
    """Cells by their common beginning, in order."""
    found: dict[str, Group] = {}
    for number, cell in enumerate(cells):
        found.setdefault(cell.prefix or str(number), Group(cell.prefix)).cells.append(cell)
    return list(found.values())


def prefix_text(cell: Cell) -> str:
    """The plan of the beginning that a cell shares with its group."""
    whole = json.loads(cell.text)
    first = next(i for i, event in enumerate(whole["events"]) if "forget" in event)
    return canonical({**whole, "events": whole["events"][:first]})


def _variant(plan: Plan, picked: Mapping[str, list[Spec] | None], seed: int, references: int) -> dict[str, Any]:
    made = plan.canonical()
    made.update(name=plan.name, seed=seed, threads=plan.threads or 1)
    if picked["learner"] is not None:
        made["learner"] = picked["learner"][0]
    for axis in ("keep", "where"):
        if picked[axis] is not None:
            made[axis] = picked[axis]
    for event in made["events"]:
        if "forget" in event:
            asked = event["forget"]
            asked["verify"] = {"retrain": {"seeds": references}}
            if picked["forget"] is not None:  # the settings were those of the plan's own method
                settings = set(Forget.model_fields) - {*_REQUEST, "keep", "where", "verify", "retain", "limit"}
                event["forget"] = {**{k: v for k, v in asked.items() if k not in settings}, "by": picked["forget"][0]}
    return made


def _parts(plan: Plan) -> list[Part]:
    """Every part that a plan names."""
    named: list[tuple[str, Spec]] = [("measure", spec) for spec in plan.measure]
    named += [("learn", plan.learner)] if plan.learner else [("learn", {"finetune": {}})]
    named += [("keep", spec) for spec in plan.keep] + [("where", spec) for spec in plan.where or []]
    for event in plan.events:
        each = event.learn or event.forget
        assert each is not None
        named += [("keep", spec) for spec in each.keep or []] + [("where", spec) for spec in each.where or []]
        if event.learn is not None and event.learn.learner:
            named.append(("learn", event.learn.learner))
        if event.forget is not None:
            named.append(("forget", event.forget.by))
            if "auto" in event.forget.by:  # it may run any of them
                named += [("forget", {part.slug: {}}) for part in catalogue.parts(verb="forget")]
    return sorted(
        {catalogue.find(verb, next(iter(spec))) for verb, spec in named}, key=lambda part: (part.verb, part.slug)
    )
