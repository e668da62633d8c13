"""Evidence: what the life, the life with nothing done, and models retrained without the request say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from remanence.core.errors import BadInput
from remanence.core.problem import CausalLM, Classification
from remanence.core.rng import generator, seed_of
from remanence.data import Examples, Task, cat
from remanence.life.language import about, entities
from remanence.life.learning import content
from remanence.measure import attacks, divergence, relearn
from remanence.measure.evidence import Cell, compare, compare_distances, earned_unlearned, leave_one_out
from remanence.measure.relearn import Curve
from remanence.train.update import Context

if TYPE_CHECKING:
    from remanence.life.life import Life
    from remanence.life.state import State

#: A class whose column a reference does not have gets this log-odds below the largest: a probability of about 2e-9.
ABSENT = 20.0
#: Shares of the held-out data that may be used to choose a method (tune), to fit attacks (calibrate) and to report.
SPLITS = {"tune": 0.2, "calibrate": 0.2, "report": 0.6}
#: Figures about the request itself: what was asked is judged by these, not by what became of the rest.
FORGOTTEN = ("forget ", "membership AUC", "KL from references")
RANGES = {
    "relearn steps": "1 (at once) to 52 (not within 50 steps)",
    "accuracy": "0 to 1",
    "exact": "0 to 1",
    "AUC": "0 to 1, 0.5 is chance",
    "KL": "0 up, nats",
    "mse": "0 up",
    "TPR": "0 to 1",
}


def split(life: Life, part: str) -> list[Examples]:
    """The `part` (tune, calibrate or report) of each learned task's held-out data: split once per life, by id."""
    bounds = np.cumsum([0.0, *SPLITS.values()])
    index = list(SPLITS).index(part)
    salt = seed_of(life.seed, "held-out split")
    found = []
    for test in {
        learned.task.id: _unlearned(life, learned.task) for learned in life._learned if learned.task is not None
    }.values():
        mixed = (test.id.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(salt)
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        share = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
        chosen = (share >= bounds[index]) & (share < bounds[index + 1])
        found.append(test.select(torch.from_numpy(np.flatnonzero(chosen))))
    return found


def _unlearned(life: Life, task: Task) -> Examples:
    """The task's held-out rows without those that the life learned: bare examples are measured on themselves, and are no strangers."""
    test = task.test
    for learned in life._learned:
        shared = test.ids & learned.ids
        if shared and learned.task is not None and content(learned.task.train, shared) == content(test, shared):
            test = test.without(shared)
    return test


@dataclass
class Assessment:
    """Every figure about one request: the table, whether *unlearned* was earned, and what could not be covered."""

    cells: list[dict[str, Any]]
    earned: bool
    reason: str
    n: int
    before: dict[str, float]
    after: dict[str, float]


class Assessor:
    """Measures any state of a life on one request, with the `part` of the held-out data."""

    def __init__(self, life: Life, forget: Examples, retain: Examples, part: str = "report") -> None:
        self.life, self.forget, self.retain = life, forget, retain
        held = [rows for rows in split(life, part) if len(rows)]
        self.text = isinstance(life.problem, CausalLM)
        #: Held-out rows about whom the request forgets.
        self.hidden: Examples | None = None
        if self.text and held:
            gone = set(entities(forget)) - set(entities(retain))
            every = cat(held)
            asked = about(every, gone)
            self.hidden = every.select(asked.nonzero()[:, 0]) if bool(asked.any()) else None
            held = [rows for rows in [every.select((~asked).nonzero()[:, 0])] if len(rows)]
        kept = set(retain["y"].tolist()) if isinstance(life.problem, Classification) else set()
        lost = {label for part in held for label in part["y"].tolist()} - kept if kept else set()
        self.test = _without_labels(held, lost)
        self.classifies = isinstance(life.problem, Classification)
        self.members: Examples | None
        self.strangers: Examples | None
        self.members, self.strangers = self._matched(held)

    def _matched(self, held: Sequence[Examples]) -> tuple[Examples, Examples] | tuple[None, None]:
        """Examples of the request, and held-out ones of the same classes in the same proportions, that can be told apart or not."""
        if self.text:
            strangers = [learned.task.strangers for learned in self.life._learned if learned.task is not None]
            if not all(part is not None for part in strangers):
                ever = self.life._entities()[0]
                strangers = [part.select((~about(part, ever)).nonzero()[:, 0]) for part in held]
            found = {id(part): part for part in strangers if part is not None and len(part)}
            return (self.forget, cat(list(found.values()))) if found else (None, None)
        if not held:
            return None, None
        pool = cat(list(held))
        if not self.classifies:
            return self.forget, pool
        rng = np.random.default_rng(seed_of(self.life.seed, "non-members"))
        try:
            match = attacks.match_nonmembers(self.forget["y"].numpy(), pool["y"].numpy(), rng)
        except BadInput:  # no held-out example of any class asked for
            return None, None
        if min(len(match.members), len(match.nonmembers)) < 2:
            return None, None
        return self.forget.select(torch.from_numpy(match.members)), pool.select(torch.from_numpy(match.nonmembers))

    def answers(self, state: State, learn_again: bool = False) -> dict[str, Any]:
        """Logits on the request and on its non-members, labels of the columns, and the plain figures; with `learn_again` also how a copy
        of the network comes back to the request, where the network is what answers."""
        c = state.context(self.life.problem, device=self.life.device)
        found: dict[str, Any] = {"labels": list(state.labels), "figures": {}}
        name = c.problem.main
        for part, examples in (
            ("forget", self.forget),
            ("forget held-out", self.hidden),
            ("retain", self.retain),
            ("test", self.test),
        ):
            if examples is not None and len(examples):
                scores = c.evaluate(examples)
                found["figures"] |= {f"{part} {each}": scores[each] for each in (name, "exact") if each in scores}
        found["forget"] = _outputs(c, _some(self.forget, self.life.seed) if self.text else self.forget)
        if self.members is not None and self.strangers is not None:
            found["figures"].update(self._attacks(c))
        if learn_again and state.learner.moves_weights:
            found["curve"] = self._relearned(c)
        return found

    def _relearned(self, c: Context) -> Curve:
        """50 steps of Adam at 1e-3 on the request (200 examples of it at most), the same for every model."""
        seed = seed_of(self.life.seed, "relearn")
        order = torch.randperm(len(self.forget), generator=generator(seed, "subset"))[:200]
        some = self.forget.select(order.sort().values)
        model, labels = c.model, list(c.labels)
        if self.classifies:
            wanted = sorted(set(self.forget["y"].tolist()))
            model, labels = relearn.with_columns(model, labels, wanted, seed_of(seed, "head"))
        made = Context(model, c.problem, c.owner, labels, device=c.device)
        data = made.mapped(some)
        return relearn.relearn(model, c.problem, data, data, columns=made.columns, seed=seed, device=c.device)

    def _again(self, tables: Sequence[dict[str, Any]]) -> None:
        """Add ``relearn steps``: after how many a model is back at the level of the one before the request, the first of `tables`: 90 % of
        its accuracy for whole classes, else 1.05 times its loss."""
        curves: list[Curve] = [table["curve"] for table in tables if "curve" in table]
        if len(curves) < len(tables):
            return
        before = curves[0]
        kept = set(self.retain["y"].tolist()) if self.classifies and len(self.retain) else set()
        if self.classifies and not kept & set(self.forget["y"].tolist()) and before.accuracy is not None:
            level: dict[str, Any] = {"accuracy": 0.9 * float(before.accuracy[0])}
        else:
            level = {"loss": 1.05 * float(before.loss[0])}
        for table, curve in zip(tables, curves, strict=True):
            table["figures"]["relearn steps"] = float(curve.counted(**level))

    def _attacks(self, c: Context) -> dict[str, float]:
        """The attacks' figures; a class that the model never knew gets a column far below the others."""
        assert self.members is not None and self.strangers is not None
        if self.text:
            member, other = (
                (-c.scores(part)["loss"]).double().cpu().numpy() for part in (self.members, self.strangers)
            )
            told = {"membership AUC (loss-threshold)": attacks.auc(member, other).value}
            rate = attacks.tpr_at_fpr(member, other, 0.01)
            return told if rate is None else {**told, "membership TPR at 1 % FPR (loss-threshold)": rate}
        sides: list[tuple[Any, Any]] = []
        for examples in (self.members, self.strangers):
            answers, y = _outputs(c, examples), examples["y"].numpy()
            if self.classifies:
                wanted = sorted({*self.members["y"].tolist(), *self.strangers["y"].tolist()} - set(c.labels))
                answers = np.concatenate(
                    [answers, np.repeat(answers.max(1, keepdims=True) - ABSENT, len(wanted), axis=1)], axis=1
                )
                place = {label: i for i, label in enumerate([*c.labels, *wanted])}
                y = np.array([place[label] for label in y.tolist()])
            sides.append((answers, y))
        names = ["loss-threshold", "modified-entropy", "logistic"] if self.classifies else ["squared-error"]
        if min(len(self.members), len(self.strangers)) < 20:
            names = [name for name in names if name != "logistic"]  # nothing to fit on
        (inside, members), (outside, others) = sides
        found = attacks.audit(
            inside, members, outside, others, names, [0.01], seed=seed_of(self.life.seed, "logistic attack") % 2**31
        )
        figures = {f"membership AUC ({name})": values["auc"] for name, values in found.items()}
        figures.update(
            {f"membership TPR at 1 % FPR ({name})": v["tpr@0.01"] for name, v in found.items() if "tpr@0.01" in v}
        )
        return figures

    def distance(self, reference: dict[str, Any], other: dict[str, Any]) -> float:
        """Mean KL(reference || other) over the request, over the classes both know; over its targets for texts; Gaussian for
        regression."""
        if self.text:
            return float(divergence.kl(reference["forget"], other["forget"]).mean())
        if not self.classifies:
            return float(divergence.gaussian_kl(reference["forget"], other["forget"]).mean())
        return float(divergence.kl(reference["forget"], other["forget"], reference["labels"], other["labels"]).mean())

    def assess(self, before: dict[str, Any], after: dict[str, Any], references: Sequence[dict[str, Any]]) -> Assessment:
        """The table: after, do nothing, and the references with their spread."""
        cells: list[Cell] = []
        if references:
            self._again([before, after, *references])
            for name, nothing in before["figures"].items():
                if name in after["figures"] and all(name in r["figures"] for r in references):
                    cells.append(
                        compare(name, [r["figures"][name] for r in references], after["figures"][name], nothing)
                    )
            if not self.classifies or len(set(before["labels"]).intersection(*(r["labels"] for r in references))) > 1:
                between = None
                if len(references) > 1:
                    between = leave_one_out([[self.distance(a, b) for b in references] for a in references])
                to_after, to_before = ([self.distance(r, model) for r in references] for model in (after, before))
                cells.append(compare_distances("KL from references", to_after, to_before, between))
        judged = [cell for cell in cells if cell.metric.startswith(FORGOTTEN)]
        earned, reason = earned_unlearned(judged) if references else (False, "not measured against retraining")
        rows = [
            {**_plain(asdict(cell)), "range": next((r for k, r in RANGES.items() if k in cell.metric), "")}
            for cell in cells
        ]
        return Assessment(rows, earned, reason, len(references), _round(before["figures"]), _round(after["figures"]))


def _without_labels(held: Sequence[Examples], lost: set[int]) -> Examples | None:
    if not held:
        return None
    test = cat(list(held))
    return test.select((~torch.isin(test["y"], torch.tensor(sorted(lost)))).nonzero()[:, 0]) if lost else test


def _some(examples: Examples, seed: int) -> Examples:
    """At most 256 of them: an answer has as many numbers as there are words."""
    order = torch.randperm(len(examples), generator=generator(seed, "divergence"))[:256]
    return examples.select(order.sort().values)


def _outputs(c: Context, examples: Examples) -> np.ndarray:
    """Answers (N, columns) in float64; a class that the learner bars (-inf) gets `ABSENT` below the largest instead."""
    found = c.outputs(c.mapped(examples)).double().cpu().numpy()
    if not c.columns:
        return found
    found = found[:, : c.columns]
    return np.where(np.isneginf(found), found.max(1, keepdims=True) - ABSENT, found)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {
        k: (None if isinstance(v, float) and not np.isfinite(v) else float(f"{v:.6g}") if isinstance(v, float) else v)
        for k, v in row.items()
    }


def _round(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


__all__ = ["SPLITS", "Assessment", "Assessor", "split"]
