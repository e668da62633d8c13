"""The checks of card corrective-unlearning."""

from __future__ import annotations

import pytest
import torch

from remanence.core.ids import Ids
from remanence.core.problem import Classification
from remanence.data import Request, corrupted, digits, stamp
from remanence.forget.ssd import SSD
from remanence.learn.finetune import Finetune
from remanence.measure.metrics.corrective_unlearning import CorrectiveUnlearning
from remanence.models import mlp
from remanence.train.update import Context
from tests.forget.helpers import LABELS, SEEDS, forgotten, taught

METRIC = CorrectiveUnlearning(size=2)


def figures(model, task, metric=METRIC):
    c = Context(model, Classification(), Finetune(), LABELS, [task])
    return {name.partition("/")[2]: value for name, value in metric.value(c).items()}


def lived(train, seed):
    return taught(mlp(64, [128], 10, seed=seed), train, seed=seed, epochs=30, batch_size=64, lr=2e-3)


def known_bad(task):
    return Request(concepts=["known bad"]).resolve([task.train])[0]


class Knowing(torch.nn.Module):
    """Answers every held-out image rightly, stamped or not."""

    def __init__(self, test):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)
        self.x, self.y = torch.cat([test["x"], stamp(test["x"], 2)]), test["y"].repeat(2)

    def forward(self, x):
        nearest = torch.cdist(x, self.x).argmin(1)
        return torch.nn.functional.one_hot(self.y[nearest], 10).float() + 0 * self.head(x)


def test_who_knows_everything_has_all_of_both():
    for how in ("patch", "confusion", "random"):
        task = corrupted(digits(), how=how, size=2)[0]
        found = figures(Knowing(task.test), task, CorrectiveUnlearning(how=how, size=2))
        assert found["retained"] == 1 and found.get("corrected", 1) == 1 and found.get("attack", 0) == 0


def test_figures_by_hand():
    task = corrupted(digits(), size=2)[0]
    model = lived(task.train, 0)
    test = task.test
    others = test["y"] != 0
    with torch.no_grad():
        plain, stamped = model(test["x"]).argmax(1), model(stamp(test["x"][others], 2)).argmax(1)
    found = figures(model, task)
    assert found["retained"] == pytest.approx(float((plain == test["y"]).float().mean()), abs=1e-6)
    assert found["corrected"] == pytest.approx(float((stamped == test["y"][others]).float().mean()), abs=1e-6)
    assert found["attack"] == pytest.approx(float((stamped == 0).float().mean()), abs=1e-6)


@pytest.mark.fidelity(
    "measure/corrective-unlearning",
    check="digits, 2 x 2 patch on 5 % of the rows, share known 0.2 / 0.5 / 1: attack success after retraining without them, and after SSD; 3 seeds",
    measured="before 0.94 to 1.00; retrained 0.96 to 0.99 / 0.84 to 0.98 / 0; SSD at 0.2, with a guard of 0.05: 0.00 to 0.02, accuracy within 0.01",
    paper="most methods, retraining included, need most of the bad data identified; SSD works with a small part",
    differs="digits and a perceptron (card's own figures: 0.98 / 0.94 / 0.00; SSD 0.03)",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_retraining_needs_all_of_the_bad_data_and_ssd_a_part(seed):
    whole = corrupted(digits(), share=0.05, reveal=1.0, size=2, seed=seed)[0]
    before = figures(lived(whole.train, seed), whole)
    assert before["attack"] > 0.9 and before["retained"] > 0.94
    attack = {}
    for reveal in (0.2, 0.5, 1.0):
        task = corrupted(digits(), share=0.05, reveal=reveal, size=2, seed=seed)[0]
        attack[reveal] = figures(lived(task.train.without(known_bad(task)), seed), task)["attack"]
    assert attack[0.2] > 0.9 and attack[0.5] > 0.8 and attack[1.0] < 0.05
    task = corrupted(digits(), share=0.05, reveal=0.2, size=2, seed=seed)[0]
    model, ids = lived(task.train, seed), known_bad(task)
    after = figures(forgotten(model, SSD(selection=0.1, dampening=0.1, guard=0.05), task.train, ids)[0], task)
    assert after["attack"] < 0.3 and after["retained"] > before["retained"] - 0.05


def test_nothing_known_is_nothing_to_do_and_all_known_leaves_the_clean_rows():
    none, every = (corrupted(digits(), reveal=share)[0] for share in (0.0, 1.0))
    assert "known bad" not in none.train.columns["concept"]
    rest = every.train.without(known_bad(every))
    assert set(rest.columns["concept"]) == {"clean"} and rest.ids == every.train.ids - known_bad(every)
    assert isinstance(known_bad(every), Ids)
