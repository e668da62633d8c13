"""The alternation of max and min epochs written out, its resting point, and what it forgets on real digits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import Regression
from remanence.core.rng import generator
from remanence.data import Request
from remanence.forget.catastrophic import Catastrophic
from remanence.forget.scrub import SCRUB
from remanence.models import mlp
from remanence.train.loop import forget
from tests.forget.helpers import (
    SEEDS,
    accuracy,
    class_accuracy,
    class_ids,
    digits_model,
    forget_update,
    forgotten,
    same,
    split,
    taught,
)

TRAIN, TEST = split()
THREE = class_ids(TRAIN, 3)
WHOLE = {"batch_size": 10**6}  # an epoch is one step on each set


def written_out(model, forget_set, retained, epochs, msteps, alpha, gamma, temperature, lr):
    """The alternation as the paper's Algorithm 1 has it, one step an epoch, one optimizer."""
    teacher, student = copy.deepcopy(model).eval(), copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    def distance(x):
        p, log_q = (teacher(x).detach() / temperature).softmax(1), (student(x) / temperature).log_softmax(1)
        return F.kl_div(log_q, p, reduction="batchmean") * temperature**2

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for epoch in range(epochs):
        if epoch < msteps:
            step(-distance(forget_set["x"]))
        step(gamma * F.cross_entropy(student(retained["x"]), retained["y"]) + alpha * distance(retained["x"]))
    return student


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"msteps": 1}, {"alpha": 0.5, "gamma": 1.0, "temperature": 2.0}, {"alpha": 0.0, "msteps": 9}],
    ids=["paper", "one", "other", "no-alpha"],
)
def test_steps_written_out(norm, knobs):
    model, by, data = digits_model(norm=norm).double(), SCRUB(**knobs), TRAIN.replace(x=TRAIN["x"].double())
    made, _ = forgotten(model, by, data, THREE, epochs=5, lr=0.1, **WHOLE)
    naive = written_out(
        model, data.only(THREE), data.without(THREE), 5, by.msteps, by.alpha, by.gamma, by.temperature, 0.1
    )
    for (name, p), q in zip(made.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6, msg=name)
    assert not same(made, model)


def test_the_teacher_is_a_resting_point():
    """Student = teacher: d is 0 and so is its gradient, so a first epoch over the forget set alone moves nothing but rounding errors.
    One step over the retained data lifts the student off, and the next epoch over the forget set moves it a hundred times as far."""
    model, lone = digits_model(), {"epochs": 1, "lr": 0.1, "optimizer": "sgd", **WHOLE}
    still, _ = forgotten(model, SCRUB(gamma=0.0, alpha=0.0), TRAIN, THREE, **lone)
    far = [
        forgotten(model, SCRUB(msteps=msteps, alpha=0.0), TRAIN, THREE, **{**lone, "epochs": 2})[0] for msteps in (1, 2)
    ]

    def apart(a, b):
        return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))

    assert apart(still, model) < 1e-6 and apart(*far) > 100 * apart(still, model)


def test_the_teacher_is_frozen_and_the_student_moves():
    model = digits_model(norm=True)
    start, by = copy.deepcopy(model), SCRUB()
    u = forget_update(model, by, TRAIN, THREE)
    forget(u, Request(ids=THREE))
    teacher = u.reference()
    assert same(teacher, start) and not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    held = {id(p) for p in teacher.parameters()}
    assert not held & {id(p) for p in model.parameters()}
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        assert not torch.equal(p, q)
    assert u.extra_bytes == sum(v.numel() * v.element_size() for v in start.state_dict().values())
    assert not [name for name in vars(by) if name.startswith("_")] and by.bytes() == 0


def test_after_msteps_the_forget_set_is_not_looked_at():
    model = digits_model()
    noise = torch.rand(TRAIN["x"].shape, generator=torch.Generator().manual_seed(0))
    x = TRAIN["x"].clone()
    x[TRAIN.rows(THREE)] = noise[TRAIN.rows(THREE)]
    other = TRAIN.replace(x=x)
    pairs = {
        msteps: [forgotten(model, SCRUB(msteps=msteps), data, THREE, epochs=3)[0] for data in (TRAIN, other)]
        for msteps in (0, 2)
    }
    assert same(*pairs[0]) and not same(*pairs[2])


def test_columns_of_no_class_do_not_compete():
    model = taught(mlp(64, [32], 12, seed=0), TRAIN, epochs=3)
    found = []
    for bias in (0.0, 30.0):
        start = copy.deepcopy(model)
        with torch.no_grad():
            start.head.bias[10:] = bias
        after, _ = forgotten(start, SCRUB(), TRAIN, THREE, epochs=3)
        found.append({n: p[:10] if n.startswith("head.") else p for n, p in after.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_same_seed_same_bits():
    torch.manual_seed(5)
    draws = torch.random.get_rng_state()
    first, second, other = (forgotten(digits_model(), SCRUB(), TRAIN, THREE, epochs=3, seed=s)[0] for s in (0, 0, 1))
    assert same(first, second) and not same(first, other) and torch.equal(draws, torch.random.get_rng_state())


def test_refused():
    with pytest.raises(BadInput, match="retained"):
        forgotten(digits_model(), SCRUB(), TRAIN, TRAIN.ids)
    model = nn.Linear(64, 1)
    u = forget_update(model, SCRUB(), TRAIN.replace(y=torch.rand(len(TRAIN), 1)), THREE)
    u.problem = Regression()
    with pytest.raises(BadInput, match="classes"):
        forget(u, Request(ids=THREE))
    with pytest.raises(BadInput, match="temperature"):
        SCRUB(temperature=0.0)


def test_one_example():
    one = TRAIN.ids.sample(1, generator(0, "one"))
    made, _ = forgotten(digits_model(), SCRUB(), TRAIN, one)
    assert accuracy(made, TEST) > 0.96


@pytest.mark.fidelity(
    "forget/scrub",
    check="the alternation written out over five epochs; the teacher frozen and a resting point; classes 0, 3 and 8 of ten digits, three seeds",
    measured="0 % left (fine-tuned 59 to 95), the other classes lose at most 1 point",
    paper="-",
    differs="equal batch sizes, constant rate, no rewind",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_forgets_a_class(seed):
    """Fine-tuning by the same number of epochs over the retained data leaves most of the class."""
    model = digits_model(seed)
    for label in (0, 3, 8):
        ids = class_ids(TRAIN, label)
        before = class_accuracy(model, TEST, label)
        after = class_accuracy(forgotten(model, SCRUB(), TRAIN, ids)[0], TEST, label)
        tuned = class_accuracy(forgotten(model, Catastrophic(), TRAIN, ids)[0], TEST, label)
        assert before[0] > 0.9 and tuned[0] > 0.4 and after[0] < 0.05 and after[1] > before[1] - 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_undoes_confusion(seed):
    """Labels of 80 threes and 80 eights swapped, all of them named. Measured on the two classes, mean of five seeds: before 0.31, after
    0.89, retrained 0.95; but fine-tuning alone comes to 0.89, too: on this small network the retained data does it."""
    swapped = {label: class_ids(TRAIN, label).sample(80, generator(seed, "swap", label)) for label in (3, 8)}
    y = TRAIN["y"].clone()
    y[TRAIN.rows(swapped[3])], y[TRAIN.rows(swapped[8])] = 8, 3
    confused, ids = TRAIN.replace(y=y), swapped[3] | swapped[8]
    model, retrained = (
        taught(mlp(64, [128], 10, seed=seed), data, seed=seed, epochs=60, lr=2e-3)
        for data in (confused, confused.without(ids))
    )
    two = TEST.only(class_ids(TEST, 3) | class_ids(TEST, 8))
    before, after, aim = (accuracy(m, two) for m in (model, forgotten(model, SCRUB(), confused, ids)[0], retrained))
    assert before < 0.55 and aim > 0.9 and after > before + 0.3


@pytest.mark.slow
def test_random_examples_come_nearer_to_retraining():
    """60 of 300 digits, mean of six seeds, confidence on the forget set. Measured: nothing 0.973, fine-tuned 0.960, SCRUB 0.931, retrained 0.884."""
    found = dict.fromkeys(("nothing", "finetune", "scrub", "retrain"), 0.0)
    for seed in range(6):
        small = TRAIN.only(TRAIN.ids.sample(300, generator(seed, "s")))
        ids = small.ids.sample(60, generator(seed, "x"))
        model, retrained = (
            taught(mlp(64, [128], 10, seed=seed), data, seed=seed, epochs=80, lr=2e-3)
            for data in (small, small.without(ids))
        )
        settings = {"lr": 0.1, "batch_size": 32}
        tuned, made = (forgotten(model, by, small, ids, **settings)[0] for by in (SCRUB(msteps=0), SCRUB()))
        gone = small.only(ids)
        for name, m in {"nothing": model, "finetune": tuned, "scrub": made, "retrain": retrained}.items():
            with torch.no_grad():
                found[name] += float(m.eval()(gone["x"]).softmax(1)[torch.arange(60), gone["y"]].mean()) / 6
        assert accuracy(made, small.without(ids)) > 0.97 and accuracy(made, TEST) > accuracy(model, TEST) - 0.03
    assert found["retrain"] + 0.02 < found["scrub"] < found["finetune"] - 0.015
