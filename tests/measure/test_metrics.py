"""The metrics of the catalogue on contexts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Classification, Out, Regression
from remanence.data import Examples, Task, split_digits
from remanence.keep.replay import Replay
from remanence.learn.finetune import Finetune
from remanence.measure.metrics.accuracy import Accuracy
from remanence.measure.metrics.bytes import Bytes
from remanence.measure.metrics.forgetting import Forgetting
from remanence.measure.metrics.membership import Membership
from remanence.models import mlp
from remanence.train.update import Context
from tests.forget.helpers import learner_update, taught


class Echo(Finetune):
    """Answers with its input: the test writes the logits."""

    def predict(self, c, batch):
        return Out(batch["x"])


def task(number: int, right: list[bool], labels=(0, 1), ids=None) -> Task:
    """One example per entry, answered rightly or not."""
    y = torch.tensor([labels[i % 2] for i in range(len(right))])
    column = torch.tensor([[0.0, 1.0] if (i % 2 == 0) ^ ok else [1.0, 0.0] for i, ok in enumerate(right)])
    data = Examples({"x": column, "y": y}, f"made-{number}", ids)
    return Task(data, data, tuple(labels), tuple(map(str, labels)), number)


def context(*tasks: Task, problem=None, labels=(0, 1)) -> Context:
    return Context(torch.nn.Linear(2, 2), problem or Classification(), Echo(), list(labels), list(tasks))


@pytest.mark.fidelity(
    "measure/accuracy", check="answers written by hand", measured="exact", paper="AA_k = 1/k sum_j a_kj", differs="-"
)
def test_accuracy_weighs_tasks_not_examples():
    found = Accuracy().value(context(task(0, [True, True, True, False]), task(7, [False, True])))
    assert found == {"accuracy": 0.625, "accuracy/0": 0.75, "accuracy/7": 0.5}
    assert Accuracy().value(context()) == {}
    empty = Task(task(0, [True]).train, task(0, [True]).train.select(torch.arange(0)), (0, 1), ("0", "1"), 1)
    assert Accuracy().value(context(task(0, [True]), empty)) == {"accuracy": 1.0, "accuracy/0": 1.0}


def test_accuracy_maps_labels_to_head_columns_and_never_answers_unknown_ones_rightly():
    """Columns 0 and 1 are labels 30 and 10; a test row of a label without a column is wrong."""
    made = task(0, [True, True], labels=(30, 10))
    assert Accuracy().value(context(made, labels=(30, 10)))["accuracy"] == 1.0
    assert Accuracy().value(context(made, labels=(10, 30)))["accuracy"] == 0.0
    strange = Examples({"x": made.test["x"], "y": torch.tensor([30, 99])}, "s")
    assert Accuracy().value(context(Task(strange, strange, (30,), ("30",), 0), labels=(30, 10)))["accuracy"] == 0.5


def test_regression_has_mean_squared_error():
    data = Examples({"x": torch.tensor([[1.0], [3.0]]), "y": torch.tensor([0.0, 3.5])}, "line")
    c = context(Task(data, data, (), (), 0), problem=Regression(), labels=())
    assert Accuracy().value(c) == {"mse": 0.625, "mse/0": 0.625}
    with pytest.raises(BadInput, match="accuracy"):
        Forgetting().value(c)


def test_forgetting_over_events_by_hand():
    """Task 0: 1.0, then .5; task 1: .75 when learned. A measurement without an event between adds no row."""
    metric = Forgetting()
    assert metric.value(context(task(0, [True] * 4))) == {"average_incremental_accuracy": 1.0}
    later = context(task(0, [True, False] * 2), task(1, [True, True, True, False]))
    for _ in range(2):
        found = metric.value(later)
    assert found == {
        "average_incremental_accuracy": pytest.approx((1.0 + 0.625) / 2),
        "forgetting": 0.5,
        "backward_transfer_gem": -0.5,
        "backward_transfer_best": -0.5,
    }
    assert len(metric.rows) == 2


def test_forgetting_takes_the_lifes_own_matrix():
    c = context(task(0, [True]))
    c.matrix, c.learned = [[0.9, np.nan], [0.6, 0.8]], [0, 1]
    assert Forgetting().value(c)["forgetting"] == pytest.approx(0.3)


@pytest.mark.fidelity(
    "measure/bytes", check="sum of numel x element size by hand", measured="exact", paper="-", differs="-"
)
def test_bytes_are_counted_by_hand():
    model = mlp(64, [32], 10, norm=True)
    by_hand = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    c = Context(model, Classification(), Finetune(), list(range(10)))
    assert Bytes().value(c) == {"bytes": by_hand, "bytes/finetune": 0.0, "bytes/model": by_hand}
    keeper = Replay(per_class=3)
    data = split_digits(tasks=5)[0].train
    taught(model, data, parts=[keeper], labels=[0, 1], new=[0, 1], epochs=1)
    inside = Bytes().value(learner_update(model, data, parts=[keeper]))
    assert inside["bytes/replay"] == keeper.bytes() >= 6 * (64 * 4 + 8 + 8)
    assert inside["bytes"] == sum(v for name, v in inside.items() if "/" in name)
    c.holders = {"keep/replay": 7, "weights": 5}  # as the life counts them
    assert Bytes().value(c) == {"bytes": 12, "bytes/keep/replay": 7, "bytes/weights": 5}


def test_bytes_count_shared_storage_once():
    model = torch.nn.Sequential(a := torch.nn.Linear(4, 4), b := torch.nn.Linear(4, 4))
    b.weight = a.weight
    found = Bytes().value(Context(model, Classification(), Finetune()))
    assert found["bytes/model"] == 4 * (16 + 4 + 4)


def learned(epochs: int) -> tuple[Context, Task]:
    first = split_digits(tasks=5)[0]
    small = Task(first.train.select(torch.arange(0, len(first.train), 4)), first.test, first.classes, first.names, 0)
    noisy = torch.randint(2, (len(small.train),), generator=torch.Generator().manual_seed(0))
    small = Task(small.train.replace(y=noisy), small.test, small.classes, small.names, 0)
    model = taught(mlp(64, [64], 2), small.train, labels=[0, 1], new=[0, 1], epochs=epochs, lr=5e-3)
    return Context(model, Classification(), Finetune(), [0, 1], [small]), small


def test_membership_finds_examples_learned_by_heart():
    """Random labels learned by heart against held-out ones: near 1; before learning about .5. It is scikit-learn's AUC."""
    fresh, _ = learned(0)
    found = Membership().value(fresh)
    assert found["membership/low"] < 0.5 < found["membership/high"]
    c, small = learned(120)
    found = Membership().value(c)
    assert found["membership"] > 0.7 and found["membership/low"] > 0.6
    from remanence.core.rng import generator
    from remanence.measure.attacks import loss, match_nonmembers

    rng = generator(0, "membership")
    zero = np.zeros(len(small.train)), np.zeros(len(small.test))
    match = match_nonmembers(small.train["y"], small.test["y"], rng, *zero)
    inside, outside = small.train.select(torch.tensor(match.members)), small.test.select(torch.tensor(match.nonmembers))
    scores = [-loss(c.outputs(part), part["y"]) for part in (inside, outside)]
    target = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    assert found["membership"] == pytest.approx(roc_auc_score(target, np.concatenate(scores)))
    for attack in ("modified-entropy", "logistic"):
        assert Membership(attack=attack).value(c)["membership"] > 0.65


def test_forgotten_examples_are_no_members():
    c, small = learned(120)
    everything = Membership().value(c)
    c.forgotten = Ids(small.train.id[: len(small.train) // 2].numpy())
    half = Membership().value(c)
    assert half and half["membership"] != everything["membership"]
    c.forgotten = small.train.ids
    assert Membership().value(c) == {}


def test_membership_of_a_regression_and_of_a_life_without_tests():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    exact = Examples({"x": x, "y": x[:, 0]}, "members")
    off = Examples({"x": x, "y": x[:, 0] + 1 + x[:, 1].abs()}, "others")
    line = torch.nn.Linear(3, 1, bias=False)
    line.weight.data = torch.tensor([[1.0, 0.0, 0.0]])
    c = Context(line, Regression(), Finetune(), [], [Task(exact, off, (), (), 0)])
    assert Membership().value(c)["membership"] == 1.0
    assert Membership().value(Context(line, Regression(), Finetune())) == {}


def test_a_metric_leaves_no_trace():
    c, _ = learned(5)
    c.model.train()
    before = torch.get_rng_state()
    state = {name: value.clone() for name, value in c.model.state_dict().items()}
    for metric in (Accuracy(), Forgetting(), Bytes(), Membership(), Membership(attack="logistic")):
        assert metric.value(c) == metric.value(c)
    assert torch.equal(before, torch.get_rng_state()) and c.model.training
    assert all(torch.equal(state[name], value) for name, value in c.model.state_dict().items())
