"""Try the cheap methods first, measure each, and take the first that is like retraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from remanence.core.errors import BadInput, RemanenceError
from remanence.core.knobs import knob
from remanence.data import Request
from remanence.train.resolve import check_fits, resolve
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Trial, Update

#: From the cheapest to the dearest, as measured in docs/bench.md; those for classes and those for single examples.
CANDIDATES: list[Any] = [
    {"ssd": {"selection": 1.0, "importance": "example", "guard": 0.01}},
    "gradient-ascent",
    {"sparse-unlearn": {"gamma": 0.005}},
    "salun",
    "boundary",
    "influence",
    {"newton": {"iterations": 6}},
]


@dataclass
class Auto(Forgetter):
    """Every candidate in turn forgets on a copy of the network, until one is like retraining in every figure.

        take the first k with  |figure_k - mean of the references| <= what one more retrained model would have, for every figure

    The figures are those of a receipt, but taken on the `tune` share of the held-out data; the receipt judges the chosen one on the
    `report` share, so a choice that was luck shows. Every attempt is listed in the receipt's notes, in the order it was made. Where
    none gets there, the notes say so, and `otherwise` decides: the attempt with the fewest figures that fell short (and, of equals, most
    that came nearer), unless doing nothing is better; retraining; or nothing at all. Each candidate has its own training defaults; one
    that cannot serve this life or request is noted and left out.

    Pick it when you do not know which method suits, and can afford the models retrained to compare with: they are most of its cost,
    and are shared with `verify`. Needs: the retained data, for the references. Source: ours; the verdicts are those of docs/compare.md.
    """

    trains: ClassVar[bool] = False

    candidates: list[Any] = knob(CANDIDATES, "the methods to try, in this order, as in a plan")
    references: int = knob(3, "models retrained without the request to compare with", low=2, high=100)
    otherwise: str = knob("best", "what to do where none is like retraining", choices=("best", "retrain", "nothing"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.candidates:
            raise BadInput("auto: candidates names no method")
        for candidate in self.candidates:
            method = resolve("forget", candidate, Forgetter)
            if isinstance(method, Auto) or method.learner or method.slug == "retrain":
                raise BadInput(f"auto: {method.slug} is no candidate; name approximate methods")

    def forget(self, u: Update, request: Request) -> Outcome:
        if u.trial is None:
            raise BadInput("auto measures against retrained models, so it works in a life only")
        notes, tried = list[str](), list[Trial]()
        for number, candidate in enumerate(self.candidates, 1):
            method = resolve("forget", candidate, Forgetter)
            try:
                check_fits([method], u.problem)
                tried.append(u.trial(method, self.references))
            except RemanenceError as error:
                notes.append(f"attempt {number}: {method.slug} could not: {error}")
                continue
            notes.append(f"attempt {number}: {tried[-1]}")
            if not tried[-1].short:
                tried[-1].adopt()
                return Outcome(notes=[*notes, f"took {method.slug}"])
        notes.append(f"none of {len(self.candidates)} is like retraining in every figure")
        if self.otherwise == "retrain":
            return Outcome(exact=True, model=u.retrain(u.data("forget").ids, u.seed), notes=[*notes, "retrained"])
        if self.otherwise == "nothing" or not tried:
            return Outcome(notes=[*notes, "changed nothing"])
        best = min(tried, key=_rank)  # the cheapest of equals comes first
        if _rank(best) > (len(best.idle), 0):
            return Outcome(notes=[*notes, "doing nothing is nearer than any; changed nothing"])
        best.adopt()
        return Outcome(notes=[*notes, f"took {best.slug}, the nearest"])


def _rank(trial: Trial) -> tuple[int, int]:
    """The lower the better; of doing nothing, the figures in which it falls short, and 0."""
    return len(trial.short), len(trial.far) - len(trial.near)
