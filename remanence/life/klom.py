"""KLoM of lives: networks of lives that differ in their seed, as one distribution, against networks retrained without the request."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from remanence.core.errors import BadInput
from remanence.core.problem import Classification
from remanence.data import Examples, cat
from remanence.life.evidence import ABSENT, SPLITS, _outputs, _without_labels, split
from remanence.life.files import canonical, write_atomic
from remanence.life.forgetting import reference_seed
from remanence.life.plan import parse_plan
from remanence.life.references import live_again
from remanence.life.run import Reading, run_plan
from remanence.life.yaml import parse
from remanence.measure import klom as measure

if TYPE_CHECKING:
    from remanence.life.life import Life
    from remanence.life.state import State

__all__ = ["NOTHING", "ORACLES", "PARTS", "UNLEARNED", "klom"]

UNLEARNED, NOTHING, ORACLES = "unlearned", "do nothing", "oracle against oracle"
PARTS = ("forget", "retain", "test")
#: A set of fewer examples is left out: its 95th percentile would be the figure of one of them.
FEWEST = 20

Floats = NDArray[np.float64]


def klom(
    homes: Sequence[str | Path], references: str | Path, *, nothing: bool = False, estimator: str | None = None
) -> dict[str, Any]:
    """KLoM on the last request of finished lives of one plan with different seeds, as means and 95th percentiles over examples.

    The N lives' networks are one sample of margins, their R retrained references each the oracles. So that the rows can be compared, all
    have the same sizes: in turn, one reference of each life is set aside, N networks of a row are held against the N (R - 1)
    oracles left, and the R figures are averaged. The row *oracle against oracle* takes those set aside: it is the floor, what the figure
    says of N networks that are right, and with 3 to 5 lives it is high. A class that a network has no column for counts as 20 below its
    largest logit.

    Args:
        homes: two or more, each lived to its end, a forget request being the last event.
        references: the folder that keeps the lives' references; one that is not there is trained and kept.
        nothing: also live each plan again without its last event, in a temporary folder, for the row *do nothing*.
        estimator: see `measure.klom.klom`; None: gaussian below 100 networks or oracles, else histogram.

    Returns:
        ``lives``, ``oracles`` (that a row is held against), ``estimator``, and ``rows``: {row: {forget, retain, test: {mean, p95}}}; None for
        a set of fewer than 20 examples. No figure of a single example is kept anywhere.

    Raises:
        BadInput: fewer than two lives or references, or lives that cannot be compared.
    """
    if len(homes) < 2:
        raise BadInput("KLoM compares distributions over seeds, and one life is none; give two or more")
    threads = torch.get_num_threads()
    try:
        found = [_look(Path(home), Path(references), nothing) for home in homes]
    finally:
        torch.set_num_threads(threads)
    first = found[0]
    if len({one.seed for one in found}) < len(found):
        raise BadInput("two of the lives have the same seed; KLoM needs independent ones")
    if any(one.plan != first.plan or one.sets != first.sets for one in found):
        raise BadInput("these lives do not have the same plan, data and request but for their seed")
    count = len(first.oracles["forget"])
    chosen = estimator or measure.default_estimator(len(found), len(found) * (count - 1))
    rows: dict[str, dict[str, Any]] = {UNLEARNED: {}, **({NOTHING: {}} if nothing else {}), ORACLES: {}}
    for part in PARTS:
        if part not in first.after or first.after[part].shape[0] < FEWEST:
            for row in rows.values():
                row[part] = None
            continue
        oracles = np.stack([one.oracles[part] for one in found])  # (lives, references, examples)
        samples = {UNLEARNED: np.stack([one.after[part] for one in found])}
        if nothing:
            samples[NOTHING] = np.stack([one.before[part] for one in found])
        for name, row in rows.items():
            told = []
            for k in range(count):
                left = np.delete(oracles, k, axis=1).reshape(-1, oracles.shape[2])
                sample = oracles[:, k] if name == ORACLES else samples[name]
                told.append(measure.said(measure.klom(sample, left, chosen)))
            row[part] = {key: float(np.mean([each[key] for each in told])) for key in ("mean", "p95")}
    return {"lives": len(found), "oracles": len(found) * (count - 1), "estimator": chosen, "rows": rows}


@dataclass
class _Margins:
    """Of one life, for as long as `klom` runs: margins (examples,) or (references, examples) by set."""

    seed: int
    plan: str
    sets: dict[str, str]
    after: dict[str, Floats]
    before: dict[str, Floats]
    oracles: dict[str, Floats]


def _look(home: Path, references: Path, nothing: bool) -> _Margins:
    with Reading.resume(home, references=references) as life:
        if life._plan is None or not life._rows or life._rows[-1].kind != "forget" or not life._rows[-1].body["n"]:
            raise BadInput(f"{home}: KLoM needs a life of a plan whose last event forgot something")
        if not isinstance(life.problem, Classification):
            raise BadInput(f"{home}: KLoM compares margins of classes, and this life has none")
        body, sets = life._rows[-1].body, _sets(life)
        if body["seeds"] < 2:
            raise BadInput(f"{home}: its last request was measured against {body['seeds']} references; KLoM needs 2")
        seeds = [reference_seed(life.seed, k) for k in range(body["seeds"])]
        states = [live_again(life, life._books.tombstones, seed) for seed in seeds]
        plan = {k: v for k, v in json.loads(canonical(parse_plan(life._plan).canonical())).items() if k != "seed"}
        return _Margins(
            life.seed,
            canonical(plan),
            {name: examples.fingerprint() for name, examples in sets.items()},
            {name: _margins(life, life._state, examples) for name, examples in sets.items()},
            _before(life._plan, references, sets) if nothing else {},
            {name: np.stack([_margins(life, s, examples) for s in states]) for name, examples in sets.items()},
        )


def _sets(life: Life) -> dict[str, Examples]:
    """The request, what is retained, and everything held out of classes that are retained; in an order that no seed changes."""
    ids = life._ids(life._rows[-1].body["ids"])
    forget = [learned.task.train.only(ids & learned.ids) for learned in life._learned if learned.task is not None]
    retain = cat(life._history(life._books.tombstones))
    found = {"forget": cat([part for part in forget if len(part)]), "retain": retain}
    held = [cat(list(parts)) for parts in zip(*(split(life, part) for part in SPLITS), strict=True)]
    held = [part.select(part.id.argsort(stable=True)) for part in held if len(part)]
    lost = {label for part in held for label in part["y"].tolist()} - set(retain["y"].tolist())
    test = _without_labels(held, lost)
    return {**found, "test": test} if test is not None and len(test) else found


def _before(text: str, references: Path, sets: dict[str, Examples]) -> dict[str, Floats]:
    """Margins of the network before the last event: its plan is lived again up to there, and deleted."""
    whole = parse(text, "plan.yaml").data
    with tempfile.TemporaryDirectory(prefix="remanence-") as folder:
        path = Path(folder) / "plan.yaml"
        write_atomic(path, canonical({**whole, "events": whole["events"][:-1]}).encode())
        with run_plan(path, Path(folder) / "home", references=references) as life:
            return {name: _margins(life, life._state, examples) for name, examples in sets.items()}


def _margins(life: Life, state: State, examples: Examples) -> Floats:
    c = state.context(life.problem, device=life.device)
    answers, labels = _outputs(c, examples), list(c.labels)
    lacking = sorted(set(examples["y"].tolist()) - set(labels))
    far = np.repeat(answers.max(1, keepdims=True) - ABSENT, len(lacking), axis=1)
    place = {label: column for column, label in enumerate([*labels, *lacking])}
    y = np.array([place[label] for label in examples["y"].tolist()])
    return measure.margins(np.concatenate([answers, far], axis=1), y)
