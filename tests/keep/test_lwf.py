"""LwF: both links in closed form, its fixed point, a new teacher for each event, and what it is worth on the digits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Regression
from remanence.core.rng import generator
from remanence.data import Request
from remanence.forget.catastrophic import Catastrophic
from remanence.keep.lwf import LwF
from remanence.models import mlp
from remanence.train.loop import forget
from tests.keep.helpers import NEW, Course, rows, same, shaken, state, stream, update

TASK = stream()[1].train


def begun(link="softmax", norm=False, **knobs):
    """A keeper whose event began at weights theta0; the model has moved since."""
    model = mlp(64, [16], 4, norm=norm, seed=3)
    keeper = LwF(**knobs)
    u = update(model, TASK, [keeper], link=link)
    keeper.begin(u)
    teacher = copy.deepcopy(model).eval()
    shaken(model)
    return u, keeper, teacher, rows(u)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_softmax_is_the_formula(temperature):
    """-sum_c p0_c^(1/T) / Z log p_c^(1/T) / Z over the two old columns, written with powers as in the paper."""
    u, keeper, teacher, batch = begun(strength=0.7, temperature=temperature)
    p0, p = (m(batch["x"])[:, :2].softmax(1) ** (1 / temperature) for m in (teacher, u.model))
    p0, p = p0 / p0.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    torch.testing.assert_close(keeper.loss(u, batch), 0.7 * -(p0 * p.log()).sum(1).mean())


def test_sigmoid_is_the_formula():
    u, keeper, teacher, batch = begun("sigmoid", strength=0.7)
    p0, p = (m(batch["x"])[:, :2].sigmoid() for m in (teacher, u.model))
    torch.testing.assert_close(keeper.loss(u, batch), -0.7 * (p0 * p.log() + (1 - p0) * (1 - p).log()).mean())


def test_old_columns_are_taken_by_number():
    """Columns 1 and 3 are old: nothing else of the head gets a gradient."""
    model = mlp(64, [16], 4, seed=3)
    keeper = LwF()
    u = update(model, TASK, [keeper], new=(0, 2))
    keeper.begin(u)
    shaken(model)
    keeper.loss(u, u.data("task").batch(torch.arange(8))).backward()
    assert [bool(row.any()) for row in model.head.weight.grad] == [False, True, False, True]


@pytest.mark.parametrize("link, at_most", [("sigmoid", 0.0), ("softmax", 1e-6)])
def test_no_gradient_at_the_start(link, at_most):
    model = mlp(64, [16], 4, seed=3)
    keeper = LwF(strength=10.0)
    u = update(model, TASK, [keeper], link=link)
    keeper.begin(u)
    for moved in (False, True):
        u.fresh_out()
        model.zero_grad()
        keeper.loss(u, rows(u)).backward()
        largest = max(float(p.grad.abs().max()) for p in model.parameters())
        assert largest > 1e-3 if moved else largest <= at_most
        shaken(model)


def test_the_teacher_is_frozen_and_in_eval_mode():
    """A network with batch statistics, in train mode: the teacher answers with its own running ones and never moves."""
    u, keeper, teacher, batch = begun(norm=True)
    u.model.train()
    before, teachers = state(u.model), state(keeper._teacher)
    loss = keeper.loss(u, batch)
    loss.backward()
    assert not any(module.training for module in keeper._teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in keeper._teacher.parameters())
    assert same(keeper._teacher, teachers) and u.reference() is keeper._teacher
    ran = copy.deepcopy(u.model)
    ran.load_state_dict(before)
    ran(batch["x"])
    assert same(u.model, ran)  # one forward of the student, no more
    p0 = (teacher(batch["x"])[:, :2] / 2).softmax(1)
    torch.testing.assert_close(loss, -(p0 * (u.out(batch).logits[:, :2] / 2).log_softmax(1)).sum(1).mean())


def test_the_first_event_has_no_teacher_and_nothing_outlives_an_event():
    plain, kept = Course(learner=NEW, link="sigmoid"), Course("lwf", NEW, "sigmoid")
    plain.learn(stream()[0])
    assert kept.learn(stream()[0]).extra_bytes == 0
    assert same(plain.model, kept.model)
    u = kept.learn(stream()[1])
    assert u.extra_bytes == sum(p.numel() * p.element_size() for p in u.reference().parameters())
    assert kept.keeper.bytes() == 0 and kept.keeper.state_dict() == {} and not kept.keeper.derived()
    assert not [name for name in vars(kept.keeper) if name.startswith("_")]


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_three_events_are_a_plain_loop(link):
    """Twins but for the code: plain torch, a copy of the network as teacher at each event."""
    course = Course({"lwf": {"strength": 0.5}}, NEW if link == "sigmoid" else "finetune", link, model=mlp(64, [32], 10))
    course.problem.classes = None
    course.learn(*stream().tasks[:3])
    naive = mlp(64, [32], 10)
    for number, task in enumerate(stream().tasks[:3]):
        teacher, seen, old = copy.deepcopy(naive).eval(), 2 * number + 2, 2 * number
        optimizer = torch.optim.SGD(naive.parameters(), lr=0.1)
        for picked in torch.randperm(len(task.train), generator=generator(0, f"learn/{number}", "", "order", 0)).split(
            64
        ):
            batch = task.train.batch(picked)
            o, y = naive(batch["x"]), batch["y"]
            p0 = teacher(batch["x"])[:, :old].detach()
            if link == "softmax":
                loss = F.cross_entropy(o[:, :seen], y)
                kept = F.kl_div((o[:, :old] / 2).log_softmax(1), (p0 / 2).softmax(1), reduction="batchmean")
            else:
                loss = F.binary_cross_entropy(o[:, old:seen].sigmoid(), F.one_hot(y - old, 2).float())
                kept = F.binary_cross_entropy(o[:, :old].sigmoid(), p0.sigmoid()) if old else 0.0
            optimizer.zero_grad()
            (loss + 0.5 * kept if old else loss).backward()
            optimizer.step()
    for ours, theirs in zip(course.model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_strength_zero_is_plain_bce_finetuning_bit_for_bit():
    """Card: lambda = 0 and mu = 0 equals naive BCE fine-tuning step for step."""
    course = Course([{"lwf": {"strength": 0}}, {"l2": {"strength": 0}}], NEW, "sigmoid", model=mlp(64, [32], 10))
    course.learn(*stream().tasks[:3], epochs=2)
    naive = mlp(64, [32], 10)
    for number, task in enumerate(stream().tasks[:3]):
        optimizer = torch.optim.SGD(naive.parameters(), lr=0.1, fused=True)
        for epoch in range(2):
            order = torch.randperm(len(task.train), generator=generator(0, f"learn/{number}", "", "order", epoch))
            for picked in order.split(64):
                batch = task.train.batch(picked)
                new = torch.arange(2 * number, 2 * number + 2)
                logits, y = naive(batch["x"])[:, new], F.one_hot(batch["y"], 10)[:, new].float()
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1).mean().backward()
                optimizer.step()
    assert same(course.model, naive)


def test_a_forget_run_distils_the_retained_rows_only():
    """Class 1 is forgotten with LwF beside: its rows may hold anything, the result is the same in every bit."""
    seen, gone = stream(1)[0].train, stream(1)[0].train["y"] == 1
    ids = Ids(seen.id[gone].numpy())
    results = []
    for data in (seen, seen.replace(x=torch.where(gone[:, None], torch.full_like(seen["x"], 1e20), seen["x"]))):
        sets = {"forget": data.only(ids), "retain": data.without(ids)}
        model = mlp(64, [16], 10, seed=3)
        u = update(model, data, [LwF()], labels=range(10), new=(), event="forget/1", kind="forget")
        u.owner, u._data = Catastrophic(), sets.__getitem__
        forget(u, Request(ids=ids))
        results.append(model)
    assert same(*results) and not same(results[0], mlp(64, [16], 10, seed=3))


def test_refusals():
    with pytest.raises(BadInput, match="feature-distill"):
        keeper = LwF()
        keeper.begin(update(mlp(64, [8], 1), TASK, [keeper], problem=Regression()))
    for knobs in ({"strength": -1.0}, {"temperature": 0.0}):
        with pytest.raises(BadInput, match=next(iter(knobs))):
            LwF(**knobs)


def ordering(seed, **settings):
    """Mean accuracy after five tasks of two digits each: softmax, EWC on softmax, BCE, BCE with PredKD, and with L2, too."""
    found = {}
    for name, keep, learner, link in (
        ("softmax", [], "finetune", "softmax"),
        ("ewc", ["ewc"], "finetune", "softmax"),
        ("bce", [], NEW, "sigmoid"),
        ("predkd", ["lwf"], NEW, "sigmoid"),
        ("predkd+l2", ["lwf", {"l2": {"strength": 0.01}}], NEW, "sigmoid"),
    ):
        course = Course(keep, learner, link, hidden=(256, 256), seed=seed, **settings)
        course.learn(*stream())
        found[name] = course.accuracy()
    return found


@pytest.mark.slow
@pytest.mark.fidelity(
    "keep/lwf",
    check="order of methods on 5x2 digits, 4 seeds; the formula for both links; a plain torch loop",
    measured="PredKD 0.35, BCE 0.29, EWC 0.20, softmax 0.20",
    paper="CIFAR-100 in 10 tasks: PredKD 25.2, EWC (BCE) 7.7",
    differs="digits and an MLP instead of CIFAR-100 and a ResNet-18; weight of the term 1, not swept",
)
@pytest.mark.parametrize("seed", range(4))
def test_order_on_the_digits(seed):
    """Measured, seeds 0 to 3: softmax 0.20; EWC 0.18 to 0.20; BCE 0.28 to 0.32; PredKD 0.33 to 0.38, each 0.04 to 0.07 above."""
    found = ordering(seed, epochs=10, batch_size=8)
    assert max(found["softmax"], found["ewc"]) < 0.22
    assert found["bce"] > max(found["softmax"], found["ewc"]) + 0.05
    assert found["predkd"] > found["bce"] + 0.02
    assert found["predkd+l2"] > found["bce"] + 0.02


def test_better_than_nothing():
    """The same for one seed, without the rows of the table that others test: measured BCE 0.32, PredKD 0.38."""
    found = {}
    for keep in ((), "lwf"):
        course = Course(keep, NEW, "sigmoid", hidden=(256, 256), epochs=10, batch_size=16)
        course.learn(*stream())
        found[keep] = course.accuracy()
    assert found["lwf"] > found[()] + 0.02
