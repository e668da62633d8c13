"""Runs of single methods on real digits, without a life: an `Update` built by hand, driven by the loop's `learn` and `forget`."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from remanence.core.ids import Ids
from remanence.core.problem import Classification
from remanence.data import Examples, Request, digits, split_classes
from remanence.learn.finetune import Finetune
from remanence.models import mlp
from remanence.train.loop import forget, learn
from remanence.train.roles import Forgetter, Learner, Method, Outcome
from remanence.train.settings import Settings
from remanence.train.update import Context, Update

torch.set_num_threads(1)
LABELS = list(range(10))
#: Seeds of a behaviour that trains networks: the first at once, the others with ``-m slow``.
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


@lru_cache
def split() -> tuple[Examples, Examples]:
    """Three quarters of the digits to train on, a quarter held out."""
    task = split_classes(digits(), tasks=1)[0]
    return task.train, task.test


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: nn.Module | dict[str, Any], b: nn.Module | dict[str, Any]) -> bool:
    """Equal names, and every tensor equal bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    bits = [
        torch.equal(a[n].contiguous().view(-1).view(torch.uint8), b[n].contiguous().view(-1).view(torch.uint8))
        for n in a
    ]
    return a.keys() == b.keys() and all(bits)


def learner_update(
    model: nn.Module,
    train: Examples,
    *,
    parts: list[Method] | None = None,
    seed: int = 0,
    event: str = "learn/0",
    owner: Learner | None = None,
    labels: list[int] = LABELS,
    new: list[int] = LABELS,
    **settings: Any,
) -> Update:
    return Update(model=model, problem=Classification(), owner=owner or Finetune(), settings=Settings(**settings), data=lambda name: train,
                  parts=parts or [], labels=labels, new_labels=new, seed=seed, event=event)  # fmt: skip


def taught(model: nn.Module, train: Examples, **kw: Any) -> nn.Module:
    """`model` after one learn event on `train`, in place."""
    learn(learner_update(model, train, **kw))
    return model


@lru_cache
def _digits_model(seed: int, norm: bool, without: Ids | None) -> nn.Module:
    train = split()[0]
    train = train if without is None else train.without(without)
    return taught(mlp(64, [128], 10, norm=norm, seed=seed), train, seed=seed, epochs=30, batch_size=64, lr=2e-3)


def digits_model(seed: int = 0, norm: bool = False, without: Ids | None = None) -> nn.Module:
    """A 64-128-10 perceptron that has learned the digits (but those in `without`)."""
    return copy.deepcopy(_digits_model(seed, norm, without))


def forget_update(model: nn.Module, by: Forgetter, train: Examples, ids: Ids, *, parts: list[Method] | None = None, seed: int = 0,
                  labels: list[int] = LABELS, **settings: Any) -> Update:  # fmt: skip
    sets = {"forget": train.only(ids), "retain": train.without(ids), "seen": train}
    return Update(model=model, problem=Classification(), owner=by, settings=Settings(**{**by.defaults, **settings}), data=sets.__getitem__,
                  parts=parts or [], labels=labels, seed=seed, event="forget/1", kind="forget")  # fmt: skip


def forgotten(model: nn.Module, by: Forgetter, train: Examples, ids: Ids, **kw: Any) -> tuple[nn.Module, Outcome]:
    """A copy of `model` after `by` forgot `ids`, and what it says it achieved."""
    model = copy.deepcopy(model)
    outcome = forget(forget_update(model, by, train, ids, **kw), Request(ids=ids))
    return model, outcome


def class_ids(examples: Examples, label: int) -> Ids:
    return examples.only(examples.ids).select((examples["y"] == label).nonzero()[:, 0]).ids


def accuracy(model: nn.Module, examples: Examples) -> float:
    return Context(model, Classification(), Finetune(), LABELS).evaluate(examples)["accuracy"]


def class_accuracy(model: nn.Module, examples: Examples, label: int) -> tuple[float, float]:
    """Accuracy on the class, and on all others."""
    ids = class_ids(examples, label)
    return accuracy(model, examples.only(ids)), accuracy(model, examples.without(ids))
