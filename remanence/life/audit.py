"""An audit: every attack and check that applies to what a life was asked to forget, beside models retrained without it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from remanence.core.errors import BadInput
from remanence.core.problem import CausalLM, Classification
from remanence.core.rng import seed_of
from remanence.data import Examples, cat
from remanence.life.erasing import NOT_COVERED, Receipt
from remanence.life.evidence import ABSENT, Assessor, _outputs
from remanence.life.forgetting import reference_seed
from remanence.life.references import live_again
from remanence.life.report import template
from remanence.life.report_words import number as figure
from remanence.life.snapshots import weights_sha256
from remanence.life.summary import asked_plain
from remanence.measure import attacks, lira
from remanence.measure.benchmarks.open_problems_unlearning import Check, OpenProblems, judge
from remanence.train.update import Context

if TYPE_CHECKING:
    from remanence.life.life import Life
    from remanence.life.state import State

DIRECTIONS = {
    "above": "fails above the retrained models",
    "below": "fails below the retrained models",
    "both": "fails away from the retrained models, on either side",
}
MEANING = {
    "holds": "the plain answers still give it away",
    "suppressed": "the answers hide it, and disturbed weights give it back",
    "obscured": "it does not come back by itself, but is learned again too fast or can be read off the layers",
    "removed": "no check found more of it than in models that never learned it",
    "cannot tell": "no check found it, and none could have told",
}


def audit(
    life: Life,
    number: int | None = None,
    *,
    references: int = 3,
    shadows: int = 0,
    protocol: OpenProblems | None = None,
) -> dict[str, Any]:
    """See `Life.audit`."""
    if references < 2:
        raise BadInput(f"references={references}: an audit needs 2 retrained models or more, for one has no spread")
    if shadows and (shadows < 4 or shadows % 2):
        raise BadInput(f"shadows={shadows}: give 0, or an even number of 4 or more")
    receipts = [receipt for receipt in life.receipts if number in (None, receipt.number)]
    if not receipts:
        raise BadInput("this life has no receipt" if number is None else f"this life has no receipt {number}")
    protocol = protocol or OpenProblems()
    data = {
        "life": life._born.body["name"],
        "weights_sha256": weights_sha256(life.model.state_dict()),
        "references": references,
        "shadows": shadows,
        "protocol": protocol.spec(),
        "requests": [_request(life, receipt, references, shadows, protocol) for receipt in receipts],
    }
    life._write("audit.json", (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
    life._write("audit.html", template("audit.html.j2").render(d=data, meaning=MEANING, figure=figure).encode())
    return data


def _request(life: Life, receipt: Receipt, references: int, shadows: int, protocol: OpenProblems) -> dict[str, Any]:
    """One request: its checks, or why it cannot be tested."""
    about = {
        "number": receipt.number,
        "asked": asked_plain(life, receipt.number),
        "by": receipt.by,
        "said": receipt.states.get("weights", ""),
    }
    ids = receipt.ids & life._books.tombstones
    parts = [learned.task.train.only(ids & learned.ids) for learned in life._learned if learned.task is not None]
    parts = [part for part in parts if len(part)]
    if not ids or not parts:
        why = (
            "nothing was held"
            if not receipt.content["n"]
            else "redacted: nobody knows any more which examples these were"
            if not receipt.ids
            else "all of it was learned again since"
            if not ids
            else "its data cannot be reached; resume with data=..."
        )
        return {**about, "untested": why}
    case = _Case(life, cat(parts), references)
    likelihood = case.lira(shadows) if shadows else []
    checks = [*likelihood, *case.memberships(decides=not likelihood)]
    missing = [*protocol.not_covered, *NOT_COVERED]
    if life._state.learner.moves_weights:
        try:
            checks += protocol.examine(*case.networks(), case.forget, case.retain, case.strangers, seed=life.seed)
        except BadInput as error:
            missing.insert(0, f"the network itself: {error}")
    else:
        missing.insert(
            0, f"the network itself: {life._state.learner.slug} answers from what it counted, not from weights"
        )
    if not shadows:
        missing.insert(0, "the likelihood-ratio attack: it needs shadow models (shadows=16)")
    level = protocol.verdict(checks)
    return {
        **about,
        "n": len(case.forget),
        "level": level,
        "meaning": MEANING[level],
        "failed": sum(check.verdict == "fail" for check in checks),
        "checks": [_row(check) for check in checks],
        "not_covered": missing,
    }


class _Case:
    """One request: the life, the life with the request never made, and lives that never learned it."""

    def __init__(self, life: Life, forget: Examples, references: int) -> None:
        if isinstance(life.problem, CausalLM):
            raise BadInput(
                "an audit is not there for language models yet; a forget with verify='retrain' measures them"
            )
        self.life, self.forget, gone = life, forget, life._books.tombstones
        self.gone = gone
        self.retain = cat(life._history())
        self.assessor = Assessor(life, forget, self.retain)
        self.strangers = self.assessor.strangers
        retrained = [live_again(life, gone, reference_seed(life.seed, k)) for k in range(references)]
        with _in_memory(life):
            original = live_again(life, gone - forget.ids, life.seed)
        self.states = [life._state, original, *retrained]

    def networks(self) -> tuple[Context, Context, list[Context]]:
        """The bare networks, as contexts."""
        found = []
        for state in self.states:
            c = self._context(state)
            c.model = state.learner.export(state.model)
            found.append(c)
        return found[0], found[1], found[2:]

    def _context(self, state: State) -> Context:
        return state.context(self.life.problem, device=self.life.device)

    def _answers(self, state: State, examples: Examples, wanted: Sequence[int]) -> tuple[Any, Any]:
        """Answers and targets; a label wanted that the model never knew has a column far below the others."""
        c = self._context(state)
        answers, y = _outputs(c, examples), examples["y"].numpy()
        if not isinstance(self.life.problem, Classification):
            return answers, y
        new = [label for label in wanted if label not in set(c.labels)]
        answers = np.concatenate([answers, np.repeat(answers.max(1, keepdims=True) - ABSENT, len(new), axis=1)], axis=1)
        place = {label: i for i, label in enumerate([*c.labels, *new])}
        return answers, np.array([place[label] for label in y.tolist()])

    def memberships(self, decides: bool) -> list[Check]:
        """Every attack that compares the request with held-out examples, and MIA-efficacy; the first may decide."""
        members, strangers, seed = (
            self.assessor.members,
            self.assessor.strangers,
            seed_of(self.life.seed, "audit") % 2**31,
        )
        if members is None or strangers is None:
            return []
        classifies = isinstance(self.life.problem, Classification)
        names = [
            name for name in attacks.ATTACKS if (name == "squared-error") is not classifies and name != "confidence"
        ]  # ranks as the loss does
        if min(len(members), len(strangers)) < 20:
            names = [name for name in names if name != "logistic"]  # nothing to fit on
        wanted = (
            sorted({*members["y"].tolist(), *strangers["y"].tolist(), *self.retain["y"].tolist()}) if classifies else []
        )
        tables = []
        for state in self.states:
            sides = [self._answers(state, examples, wanted) for examples in (members, strangers)]
            row = {
                f"{'AUC' if kind == 'auc' else f'TPR at {float(kind[4:]):.1%} FPR'}, {name} attack": value
                for name, found in attacks.audit(*sides[0], *sides[1], names, seed=seed).items()
                for kind, value in found.items()
                if kind not in ("low", "high")
            }
            test = self.assessor.test
            if classifies and test is not None and len(test) and len(self.retain):
                three = [self._answers(state, e, wanted) for e in (self.retain, test, self.forget)]
                row["MIA-efficacy"] = attacks.efficacy(three[0], three[1], three[2], seed)
            tables.append(row)
        found: list[Check] = []
        for name in tables[0]:
            span = "0 to 1, 0.5 is chance" if name.startswith("AUC") else "0 to 1"
            row_of = [table[name] for table in tables]
            check = judge("membership", name, row_of[0], row_of[1], row_of[2:], "both", span, 0.02)
            found.append(replace(check, decides=decides and not found))
        return found

    def lira(self, shadows: int) -> list[Check]:
        """The likelihood-ratio attack on the request: each example under the audited model, and the same one under retrained models.

        Half of the shadow models learned an example. Of a whole class they learned all or nothing: one that knows the class from
        other examples is no model of not knowing it.
        """
        life, n = self.life, len(self.forget)
        if n < 2:
            return []
        known = self.forget["y"].tolist() if isinstance(life.problem, Classification) else []
        wanted = sorted({*known, *self.retain["y"].tolist()}) if known else []
        whole = bool(known) and not set(known) & set(self.retain["y"].tolist())
        learned = lira.halves(n, shadows, seed_of(life.seed, "shadow halves") % 2**31)
        if whole:
            learned = np.repeat(np.arange(shadows)[:, None] % 2 == 0, n, axis=1)

        def scores(state: State) -> Any:
            score = attacks.log_odds if known else attacks.squared_error
            return score(*self._answers(state, self.forget, wanted))

        table = []
        for k, inside in enumerate(learned):
            taught = self.forget.select(torch.from_numpy(np.flatnonzero(inside))).ids
            with _in_memory(life):
                table.append(scores(live_again(life, self.gone - taught, seed_of(life.seed, "shadow", k) % 2**31 + 1)))
        own = [scores(state) for state in self.states]
        ratios = [lira.online(row, np.stack(table), learned) for row in own]
        share = [float((row > 0).mean()) for row in ratios]
        words = "share that looks learned, likelihood-ratio attack"
        check = judge("membership", words, share[0], share[1], share[2:], "above", "0 to 1", 0.02)
        found = [replace(check, decides=True)]
        for name, rows in (
            ("online", ratios),
            ("offline", [lira.offline(row, np.stack(table), learned) for row in own]),
        ):
            values = []
            for i, row in enumerate(rows):
                others = [other for j, other in enumerate(rows) if j > 1 and j != i]
                values.append(float(np.mean([attacks.auc(row, other).value for other in others])))
            words = f"AUC against retrained models, likelihood-ratio attack ({name})"
            found.append(
                judge("membership", words, values[0], values[1], values[2:], "both", "0 to 1, 0.5 is chance", 0.02)
            )
        return found


@contextmanager
def _in_memory(life: Life) -> Iterator[None]:
    """Models that learn forgotten data for the audit's sake are kept nowhere and dropped at once."""
    store, made, times = life._store, dict(life._references), dict(life._retraining)
    life._store = None
    try:
        yield
    finally:
        life._store, life._references, life._retraining = store, made, times


def _row(check: Check) -> dict[str, Any]:
    row = {**asdict(check), "retrained": [_six(v) for v in check.references], "direction": DIRECTIONS[check.side]}
    row["after"], row["nothing"] = _six(check.after), None if check.nothing is None else _six(check.nothing)
    row["retrained_mean"] = _six(float(np.mean(check.references)))
    return {name: value for name, value in row.items() if name not in ("references", "side")} | {
        "range": row.pop("span")
    }


def _six(value: float) -> float:
    return float(f"{value:.6g}")


def render(data: Mapping[str, Any]) -> RenderableType:
    """What a terminal prints of an audit."""
    parts: list[RenderableType] = []
    for request in data["requests"]:
        head = f"Request {request['number']}: {request['asked']} by {request['by']}"
        if "untested" in request:
            parts.append(Text(f"{head}: not tested; {request['untested']}\n"))
            continue
        parts.append(Text(f"{head}: {request['level']}, {request['meaning']}", style="bold"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        for name in ("", "check", "now", "retrained", "nothing done", "range", "verdict"):
            table.add_column(name, justify="right" if name in ("now", "retrained", "nothing done") else "left")
        for row in request["checks"]:
            low, high = min(row["retrained"]), max(row["retrained"])
            table.add_row(
                *(
                    Text(word)
                    for word in (
                        row["group"],
                        row["name"],
                        figure(row["after"]),
                        f"{figure(low)} to {figure(high)}",
                        figure(row["nothing"]),
                        row["range"],
                        row["verdict"],
                    )
                )
            )
        parts += [table, Text("Not covered: " + "; ".join(request["not_covered"]) + "\n")]
    return Group(*parts)
