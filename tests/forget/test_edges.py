"""The edges of every forgetter: one example, half of everything, all of it; batch norm and dropout, convolutions, another link,
labels in another order than the head's columns. What it leaves behind is sound, and nothing else was touched."""

from __future__ import annotations

import copy
import random
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from remanence import catalogue
from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Classification, Problem, Regression
from remanence.data import Examples, Request, digits
from remanence.learn.finetune import Finetune
from remanence.models import cnn, mlp
from remanence.train.loop import forget, learn
from remanence.train.resolve import resolve
from remanence.train.roles import Forgetter
from remanence.train.settings import Settings
from remanence.train.update import Update
from tests.forget.helpers import same

#: Labels in the order of the head's columns: neither ascending nor from 0.
LABELS = [7, 2, 9, 4]
#: Those that do not train a given network at a request, or choose among others.
ELSEWHERE = {"retrain", "auto", "acu", "sisa", "s3t"}
NUMBERS: list[Any] = ["blindspot-regression", "gaussian-amnesiac"]
#: Those that serve a regression, too.
ANY: list[Any] = [
    "catastrophic",
    {"fisher-noise": {"alpha": 1e-4}},
    "gradient-ascent",
    "iau",
    {"influence": {"products": 5}},
    {"influence": {"solver": "sherman-morrison", "samples": 10, "damping": 0.1}},
    {"influence": {"solver": "woodfisher", "samples": 10}},
    {"laf": {"fit_epochs": 1, "repair": 1}},
    {"newton": {"iterations": 2}},
    "sparse-unlearn",
    {"sparse-unlearn": {"mode": "prune", "ratio": 0.5, "then": "gradient-ascent"}},
    "ssd",
]
CLASSES: list[Any] = [
    *ANY,
    "bad-teacher",
    "boundary",
    {"boundary": {"mode": "expand"}},
    "concept-poison-unlearn",
    {"concept-poison-unlearn": {"concepts": "cav", "sparsity": 0.1, "labels": "random"}},
    "dmm",
    {"dmm": {"targets": "trak", "size": 8}},
    {"gs-lora": {"rank": 2, "pull": 0.01, "hold": 0.01, "average_from": 0}},
    "random-label",
    {"random-label": {"drive": "mixed"}},
    "salun",
    {"salun": {"soft": True}},
    "scrub",
    {"sparse-unlearn": {"mode": "prune", "scores": "synflow", "then": "random-label"}},
    {"ssd": {"importance": "example", "selection": 1.0, "guard": 0.5}},
    {"ssd": {"importance": "label-free"}},
]
NETWORKS = ["mlp", "cnn"]
#: Those that need no retained data.
ALONE = {"boundary", "boundary-expand", "gradient-ascent", "ssd", "ssd-label-free"}
#: What a method refuses beyond that, and in which words.
REFUSED = {("gs-lora-2-0.01-0.01-0", "cnn"): "hidden linear layers", ("dmm-trak-8", "sigmoid"): "softmax"}


def slug(by: Any) -> str:
    return by if isinstance(by, str) else next(iter(by))


def name(by: Any) -> str:
    return by if isinstance(by, str) else slug(by) + "-" + "-".join(str(v) for v in by[slug(by)].values())


@lru_cache
def rows(network: str, kind: str) -> Examples:
    """20 examples of each of four digits, in the shape that the network takes."""
    data = digits()
    found = data.select(torch.cat([(data["y"] == label).nonzero()[:20, 0] for label in sorted(LABELS)]))
    x = found["x"].reshape(-1, 1, 8, 8) if network == "cnn" else found["x"]
    numbers = x.flatten(1)[:, 20:30].mean(1, keepdim=True)
    return found.replace(x=x, y=numbers) if kind == "regression" else found.replace(x=x)


def problem_of(kind: str) -> Problem:
    return Regression() if kind == "regression" else Classification(link=kind)


@lru_cache
def _learned(network: str, kind: str) -> nn.Module:
    outputs = 1 if kind == "regression" else len(LABELS)
    made = {
        "cnn": lambda: cnn((1, 8, 8), [4, 8], outputs, seed=1),
        "mlp": lambda: mlp(64, [16], outputs, norm=True, dropout=0.2, seed=1),
    }
    model = made[network]()
    data = rows(network, kind)
    learn(Update(model=model, problem=problem_of(kind), owner=Finetune(), settings=Settings(epochs=8, batch_size=16, lr=5e-3),
                 data=lambda _: data, labels=LABELS, new_labels=LABELS))  # fmt: skip
    return model


def asked(what: str, data: Examples) -> Ids:
    picked = {"one": data.id[5:6], "half": data.id[::2], "class": data.id[:20], "all": data.id}
    return Ids(picked[what].numpy())


def run(by: Any, network: str, kind: str, what: str, relabel: bool = False, batch_size: int = 16) -> nn.Module:
    """The network after the request, looked at from all sides."""
    model, data = copy.deepcopy(_learned(network, kind)), rows(network, kind)
    labels = LABELS
    if relabel:
        data = data.replace(y=torch.tensor([LABELS.index(label) for label in data["y"].tolist()]))
        labels = list(range(len(LABELS)))
    ids, method = asked(what, data), resolve("forget", by, Forgetter)
    sets = {"forget": data.only(ids), "retain": data.without(ids), "seen": data}
    settings = {**method.defaults, "epochs": 2, "batch_size": batch_size}
    u = Update(model=model, problem=problem_of(kind), owner=method, settings=Settings(**settings), data=sets.__getitem__, labels=labels,
               history=lambda: [sets["retain"]], event="forget/1", kind="forget")  # fmt: skip
    model.train()
    model.head.eval()
    next(model.parameters()).requires_grad_(False)
    before, first = look(model), copy.deepcopy(model)
    try:
        forget(u, Request(ids=ids))
    except BadInput:
        assert same(model, first) and look(model) == before
        raise
    assert look(model) == before
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    assert not [attribute for attribute in vars(method) if attribute.startswith("_")]
    return model


def look(model: nn.Module) -> list[Any]:
    """What must be as it was, the weights' values aside."""
    return [
        [(name, tuple(p.shape), p.dtype, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [(name, tuple(b.shape), b.dtype) for name, b in model.named_buffers()],
        [(name, type(m), m.training, len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    ]  # fmt: skip


def test_every_forgetter_is_here():
    assert {slug(by) for by in [*NUMBERS, *CLASSES]} == {part.slug for part in catalogue.parts("forget")} - ELSEWHERE


#: An example, alone in its batch; with 79 others in batches of 13 a retained one is alone, too.
SIZES = {"one": 13, "half": 16}


@pytest.mark.parametrize("what", list(SIZES))
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("by", CLASSES, ids=name)
def test_one_example_and_half_of_all(by, network, what):
    if (name(by), network) in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[name(by), network]):
            run(by, network, "softmax", what)
        return
    first, again = (run(by, network, "softmax", what, batch_size=SIZES[what]) for _ in range(2))
    assert same(first, again)


@pytest.mark.parametrize("what", list(SIZES))
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("by", [*ANY, *NUMBERS], ids=name)
def test_numbers_instead_of_classes(by, network, what):
    first, again = (run(by, network, "regression", what, batch_size=SIZES[what]) for _ in range(2))
    assert same(first, again)


@pytest.mark.parametrize(
    ("by", "kind"),
    [("bad-teacher", "softmax"), ({"random-label": {"drive": "mixed"}}, "softmax"), *[(by, "regression") for by in NUMBERS]],
    ids=name,
)  # fmt: skip
def test_one_row_of_both_sets_is_left_for_the_last_batch(by, kind):
    run(by, "mlp", kind, "one", batch_size=79)


@pytest.mark.parametrize("by", CLASSES, ids=name)
def test_labels_are_columns_in_any_order(by):
    """A class whose label is not its column: bit for bit as if the labels were the columns' numbers."""
    assert same(run(by, "mlp", "softmax", "class"), run(by, "mlp", "softmax", "class", relabel=True))


@pytest.mark.parametrize("by", CLASSES, ids=name)
def test_a_sigmoid_link(by):
    if (name(by), "sigmoid") in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[name(by), "sigmoid"]):
            run(by, "mlp", "sigmoid", "class")
        return
    run(by, "mlp", "sigmoid", "class")


@pytest.mark.parametrize("by", [*CLASSES, *NUMBERS], ids=name)
def test_nothing_is_retained(by):
    """A message says what is missing, before a weight moves; the few that do without leave sound weights."""
    kind = "regression" if by in NUMBERS else "softmax"
    if name(by) in ALONE:
        run(by, "mlp", kind, "all")
    else:
        with pytest.raises(BadInput, match="retain"):
            run(by, "mlp", kind, "all")


ONLY = {slug(by) for by in CLASSES} - {slug(by) for by in ANY}


@pytest.mark.parametrize("by", sorted({*ONLY, *NUMBERS}))
def test_a_problem_that_the_method_does_not_serve(by):
    with pytest.raises(BadInput, match="class"):
        run(by, "mlp", "softmax" if by in NUMBERS else "regression", "half")
