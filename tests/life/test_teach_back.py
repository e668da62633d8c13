"""Keepers do not teach back: what was forgotten stays so when more is learned under any keeper's protection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request
from remanence.life.forgetting import reference_seed
from remanence.life.life import Life
from remanence.life.references import live_again
from remanence.life.state import State
from remanence.models import mlp
from remanence.train.roles import Keeper
from remanence.train.update import Update
from tests.life.helpers import stream

LEARN: dict[str, Any] = {"epochs": 4, "batch_size": 15, "lr": 0.01}
#: Knobs for lives of 240 digits; all others are the defaults.
KNOBS: dict[str, dict[str, Any]] = {
    "replay": {"per_class": 10, "batch_size": 30},
    "ewc": {"strength": 100.0},
    "fpf": {"steps": 20},
    "gpm": {"samples": 20},
    "cuber": {"samples": 20},
}
APPROXIMATE: dict[str, Any] = {"by": "salun", "epochs": 15, "optimizer": "adamw", "lr": 0.01}
#: Largest accuracy on the class, and largest share among the classes of its time. Seen over all keepers, knobs and three seeds,
#: one task later: 0.00 and 0.00 after retrain, 0.00 and 0.20 after salun; with a stale anchor or teacher 0.00 and 1.00. The share
#: is what shows a relapse: the newest classes take all answers where nothing is replayed.
MARGINS = (0.1, 0.3)


def network(seed: int) -> nn.Module:
    return mlp(64, [32], seed=seed)


def shares(life: Life, label: int, state: State | None = None) -> tuple[float, float]:
    """Held-out accuracy on the class; and how often it is chosen among the classes of its time, so that a head that leans to the
    newest classes hides nothing."""
    task = stream(40, 8)[label // 2]
    test = task.test.select((task.test["y"] == label).nonzero()[:, 0])
    c = life._context(state)
    if label not in c.labels:
        return 0.0, 0.0
    logits = c.outputs(c.mapped(test))
    old = torch.tensor([known < 6 for known in c.labels])
    among = logits[:, : len(old)].masked_fill(~old, -torch.inf).argmax(1)
    return c.evaluate(test)["accuracy"], float((among == c.labels.index(label)).float().mean())


def through(keeper: Any, forget: dict[str, Any], home: Path | None = None, seed: int = 0) -> Iterator[Any]:
    """The class's shares before the request, after it, and after one more task; then the references' after that task."""
    tasks = list(stream(40, 8))
    keep = [keeper] if keeper is not None else []
    where = ["lora"] if isinstance(keeper, dict) and "sefe" in keeper else None  # which holds adapters
    with Life(network, keep=keep, where=where, home=home, seed=seed, measure=["accuracy"]) as life:
        for task in tasks[:3]:
            life.learn(task, **LEARN)
        gone = max(range(6), key=lambda label: shares(life, label))  # the class that the life knows best
        yield shares(life, gone)
        receipt = life.forget(Request(classes=[gone]), **forget)
        yield shares(life, gone)
        life.learn(tasks[3], **{**LEARN, "epochs": 8})
        yield shares(life, gone)
        lost = life._rows[-1].body["lost"][str(gone)]
        assert lost == pytest.approx(shares(life, gone)[0], abs=1e-5)  # what the report draws
        yield [shares(life, gone, live_again(life, receipt.ids, reference_seed(seed, k))) for k in range(3)]


def allowed(references: list[float], margin: float) -> float:
    """The upper end of the references' prediction interval, or the margin where they are all alike."""
    values = torch.tensor(references, dtype=torch.float64)
    half = 4.303 * float(values.std()) * (1 + 1 / 3) ** 0.5  # Student's t, two degrees of freedom
    return max(margin, float(values.mean()) + half)


KEEPERS = [part.slug for part in rm.parts(verb="keep")]


@pytest.mark.parametrize("slug", KEEPERS)
@pytest.mark.parametrize("how", ["retrain", "approximate"])
def test_no_keeper_teaches_a_forgotten_class_back(slug: str, how: str) -> None:
    _stays_forgotten({slug: KNOBS.get(slug, {})}, how, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("slug", [*KEEPERS, "fpf kd", "ewc exact", "reservoir"])
@pytest.mark.parametrize("how", ["retrain", "approximate"])
def test_nor_with_other_seeds_and_knobs(slug: str, how: str, seed: int) -> None:
    others = {
        "fpf kd": {"fpf": {"steps": 20, "objective": "kd", "capacity": 40}},
        "ewc exact": {"ewc": {"strength": 1000.0, "fisher": "exact"}},
        "reservoir": {"replay": {"policy": "reservoir", "capacity": 60, "batch_size": 30}},
    }
    _stays_forgotten(others.get(slug, {slug: KNOBS.get(slug, {})}), how, seed)


def _stays_forgotten(keeper: Any, how: str, seed: int) -> None:
    forget = {"by": "retrain"} if how == "retrain" else APPROXIMATE
    before, after, later, references = through(keeper, forget, seed=seed)
    assert before[0] > 0.5 and after[1] <= MARGINS[0], (
        f"not known, or not forgotten in the first place: {before} -> {after}"
    )
    for k in (0, 1):
        assert later[k] <= allowed([r[k] for r in references], MARGINS[k]), (before, after, later, references)


# -- the test can fail ------------------------------------------------------------------------------------------------


@dataclass
class StaleAnchor(Keeper):
    """Anchors at the weights of the end of the last event, and does not move the anchor when something is forgotten."""

    strength: float = knob(1.0, "weight of the penalty", low=0)

    def setup(self) -> None:
        self.anchor: dict[str, Tensor] = {}

    def gradient(self, u: Update) -> None:
        for name, p in u.parameters.items():
            if name in self.anchor and p.grad is not None:
                rows = self.anchor[name]
                block = tuple(slice(0, size) for size in rows.shape)
                p.grad[block] += 2 * self.strength * (p.detach()[block] - rows)

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self.anchor = {name: p.detach().clone() for name, p in u.model.named_parameters()}

    def forgot(self, u: Update, ids: Ids) -> None:
        """Wrongly, nothing."""


@dataclass
class StaleTeacher(Keeper):
    """Distils the answers of the network as it was at the end of the last event, also after a forget."""

    strength: float = knob(10.0, "weight of the distillation term", low=0)

    def setup(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if u.kind != "learn" or not self.weights:
            return None
        x = batch["x"].flatten(1)
        hidden = torch.relu(x @ self.weights["body.1.weight"].T + self.weights["body.1.bias"])
        old = hidden @ self.weights["head.weight"].T + self.weights["head.bias"]
        return self.strength * (u.out(batch).logits[:, : old.shape[1]] - old).square().mean()

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self.weights = {name: p.detach().clone() for name, p in u.model.named_parameters()}

    def forgot(self, u: Update, ids: Ids) -> None:
        """Wrongly, nothing."""


@pytest.mark.parametrize("faulty", [StaleAnchor, StaleTeacher])
def test_a_keeper_with_a_stale_memory_is_caught(faulty: Callable[[], Keeper]) -> None:
    before, after, later, references = through(faulty(), APPROXIMATE)
    assert after[1] <= MARGINS[0] < 0.5 < before[0], (before, after, later)
    assert later[1] > 0.9 and later[1] > allowed([r[1] for r in references], MARGINS[1])
    with pytest.raises(AssertionError):
        _stays_forgotten(faulty(), "approximate", 0)


def test_a_keeper_that_could_not_rebuild_is_refused_from_the_start(tmp_path: Path) -> None:
    @dataclass
    class NoRebuild(Keeper):
        """Stores weights."""

        def setup(self) -> None:
            self.anchor = torch.zeros(3)

    with pytest.raises(BadInput, match=r"no `forgot`.*teach forgotten data back"):
        Life(network, keep=[NoRebuild()], home=tmp_path / "home")
    assert not (tmp_path / "home").exists()
