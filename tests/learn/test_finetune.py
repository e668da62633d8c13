"""Finetune: a plain loop in every bit, and who competes in the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from remanence.core.errors import BadInput
from remanence.core.problem import Classification
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.learn.finetune import Finetune
from remanence.models import mlp
from remanence.train.settings import Settings
from remanence.train.update import Update
from tests.keep.helpers import NEW, Course, rows, same, stream, update

TASK = stream()[1].train


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.fidelity(
    "learn/finetune",
    check="a plain PyTorch loop; gradients of old head rows",
    measured="the same bits; old rows exactly 0 with compete=new, above 1e-3 with softmax over all",
    paper="-",
    differs="-",
)
def test_equals_a_plain_loop_bit_for_bit(optimizer):
    course = Course(model=mlp(64, [32], 10, norm=True, dropout=0.0), optimizer=optimizer, lr=0.01)
    course.learn(stream(1)[0], epochs=2)
    naive, train = mlp(64, [32], 10, norm=True).train(), stream(1)[0].train
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](naive.parameters(), lr=0.01, fused=True)
    for epoch in range(2):
        for picked in torch.randperm(len(train), generator=generator(0, "learn/0", "", "order", epoch)).split(64):
            made.zero_grad()
            F.cross_entropy(naive(train["x"][picked]), train["y"][picked]).backward()
            made.step()
    assert same(course.model, naive)


def head_gradients(compete, link, new=(2, 3)):
    model = mlp(64, [16], 4, seed=3)
    learner = Finetune(compete=compete)
    u = update(model, TASK, new=new, link=link, learner=learner)
    learner.objective(u, rows(u)).backward()
    return model.head.weight.grad


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_the_bias_test(link):
    """Card: old head rows get exactly no gradient where only new classes compete, and some where all do."""
    assert not head_gradients("new", link)[:2].any() and head_gradients("new", link)[2:].any(1).all()
    assert (head_gradients("seen", link)[:2].abs().amax(1) > 1e-3).all()


def test_sigmoid_loss_is_the_formula():
    model = mlp(64, [16], 4, seed=3)
    learner = Finetune(compete="new")
    u = update(model, TASK, link="sigmoid", learner=learner)
    batch = rows(u)
    p, t = model(batch["x"])[:, 2:].sigmoid(), (batch["y"][:, None] == torch.tensor([2, 3])).float()
    torch.testing.assert_close(learner.objective(u, batch), -(t * p.log() + (1 - t) * (1 - p).log()).mean())


def test_without_new_classes_all_seen_compete():
    """A task that brings more of the same: there is nobody else to compete."""
    assert torch.equal(head_gradients("new", "softmax", new=()), head_gradients("seen", "softmax", new=()))


@pytest.mark.parametrize("seed", range(2))
def test_alone_it_forgets_and_new_rows_forget_less(seed):
    """Measured after two tasks of five digits: softmax keeps 0 % of the first, BCE on the new rows 74 to 77 %."""
    softmax, bce = (Course((), by, link, hidden=(64,), seed=seed, epochs=20, batch_size=32) for by, link in (("finetune", "softmax"), (NEW, "sigmoid")))  # fmt: skip
    for course in (softmax, bce):
        course.learn(*stream(2))

    assert softmax.accuracies()[0] < 0.1 and bce.accuracies()[0] > 0.6


def test_refusals():
    with pytest.raises(BadInput, match="compete"):
        Finetune(compete="old")


def test_replayed_rows_compete_among_all_classes() -> None:
    """compete=new with rows of old classes: the new rows' loss over new columns, the replayed rows' over all; never infinite."""
    model = mlp(5, [4], 4)
    data = Examples(
        {"x": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), "y": torch.tensor([2, 3, 2, 0, 1, 3])},
        "rows",
    )
    owner = Finetune(compete="new")
    u = Update(
        model=model,
        problem=Classification(),
        owner=owner,
        settings=Settings(),
        data=lambda name: data,
        labels=[0, 1, 2, 3],
        new_labels=[2, 3],
    )
    batch = {
        **data.batch(torch.arange(6)),
        "origin": torch.tensor([0, 0, 0, 1, 1, 1]),
        "weight": torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 3.0]),
    }
    logits = model(batch["x"])
    new = F.cross_entropy(logits[:3, 2:], batch["y"][:3] - 2, reduction="none")
    old = F.cross_entropy(logits[3:], batch["y"][3:], reduction="none")
    wanted = (torch.cat([new, old]) * batch["weight"]).sum() / batch["weight"].sum()
    torch.testing.assert_close(owner.objective(u, batch), wanted)
    for link in ("softmax", "sigmoid"):
        for keeper in (rm.keep.Replay(per_class=5), rm.keep.FPF(capacity=20, steps=10)):
            with rm.Life(
                rm.models.mlp(64, [16]),
                learner=Finetune(compete="new"),
                keep=[keeper],
                problem={"classification": {"link": link}},
            ) as life:
                for task in list(rm.data.split_digits())[:2]:
                    life.learn(task)  # an infinite loss would fail the event
