"""The checks of card ssd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.data import Examples
from remanence.forget.ssd import SSD, dampen
from remanence.models import mlp
from remanence.nn.fisher import batch_fisher
from tests.forget.helpers import (
    SEEDS,
    accuracy,
    class_accuracy,
    class_ids,
    digits_model,
    forgotten,
    same,
    split,
    taught,
)

TRAIN, TEST = split()
THREE = class_ids(TRAIN, 3)
KINDS = ("batch", "example", "label-free")


@pytest.mark.parametrize("importance", KINDS)
@pytest.mark.parametrize("selection", [0.0, 1.0, 10.0])
def test_forgetting_everything_changes_nothing(importance, selection):
    """I_F = I_D: nothing is above 1 times itself, and at 0 the factor is min(I / I, 1) = 1."""
    model = digits_model(norm=True)
    after, _ = forgotten(model, SSD(selection=selection, importance=importance), TRAIN, TRAIN.ids)
    assert same(after, model)


@pytest.mark.parametrize("importance", KINDS)
def test_zero_dampening_zeroes_what_is_selected_and_nothing_else(importance):
    model = digits_model(norm=True)
    after, outcome = forgotten(model, SSD(selection=3.0, dampening=0.0, importance=importance), TRAIN, THREE)
    gone = 0
    for (name, p), (_, q) in zip(model.named_parameters(), after.named_parameters(), strict=True):
        assert ((q == p) | (q == 0)).all(), name
        gone += int((q != p).sum())
    assert 0 < gone <= int(outcome.notes[0].split()[1]) < sum(p.numel() for p in model.parameters())
    assert same(dict(model.named_buffers()), dict(after.named_buffers()))


@pytest.mark.parametrize("selection", [0.0, 0.5, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("dampening", [0.0, 0.1, 1.0, 3.0])
def test_no_weight_grows_or_changes_sign(selection, dampening):
    model = digits_model()
    after, _ = forgotten(model, SSD(selection=selection, dampening=dampening), TRAIN, THREE)
    for p, q in zip(model.parameters(), after.parameters(), strict=True):
        assert (q.abs() <= p.abs()).all() and (q * p >= 0).all() and torch.isfinite(q).all()


def test_the_rule_written_out():
    theta = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    forget, everything = torch.tensor([4.0, 8.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    touched = dampen({"w": theta}, {"w": forget}, {"w": everything}, 2.0, 2.0)
    assert touched == 3 and theta.tolist() == [0.5, -0.5, 3.0, 4.0, 0.0]


def test_disjoint_features_touch_only_their_block():
    """Linear softmax, own inputs for each class, zero weights elsewhere: forgetting class 0 leaves the other blocks' columns alone."""
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.zeros(300, 9)
    x.view(300, 3, 3)[torch.arange(300), y] = torch.rand(300, 3) + 0.5
    examples = Examples({"x": x, "y": y}, "blocks")
    model = mlp(9, [], 3)
    taught(model, examples, epochs=20, lr=0.05, labels=[0, 1, 2], new=[0, 1, 2])
    for importance in KINDS:
        after, outcome = forgotten(
            model, SSD(selection=1.5, importance=importance), examples, class_ids(examples, 0), labels=[0, 1, 2]
        )
        changed = (after.head.weight != model.head.weight).any(0)
        assert changed[:3].any() and not changed[3:].any()
        others = x[y != 0]
        assert torch.equal(
            others @ after.head.weight.T, others @ model.head.weight.T
        )  # the bias is shared by all blocks
        assert "dampened 0 " not in outcome.notes[0]


def test_the_order_of_the_data_does_not_matter_much():
    """Data come in the order of tasks; batches are shuffled first, so that a batch mean is one over all classes."""
    model = digits_model()
    tidy = TRAIN.select(TRAIN["y"].argsort(stable=True))
    before = class_accuracy(model, TEST, 3)
    for data in (TRAIN, tidy):
        after = class_accuracy(forgotten(model, SSD(selection=30.0), data, THREE)[0], TEST, 3)
        assert after[0] < before[0] - 0.5


def test_per_example_importance_is_bounded_by_the_share():
    """D contains F, so I_F <= |D| / |F| I_D: a selection at or above that selects nothing, whatever the data."""
    model = digits_model()
    after, outcome = forgotten(
        model, SSD(selection=len(TRAIN) / len(THREE) * 1.001, importance="example"), TRAIN, THREE
    )
    assert outcome.notes == ["dampened 0 weights"] and same(after, model)


@pytest.mark.parametrize("seed", range(2))
def test_digits_class_forgetting(seed):
    """Card: best point of a grid per class, forget < 10 % and the rest within 3 points, for most of five classes (97 % perceptron, batch 64)."""
    model = taught(mlp(64, [128], 10, seed=seed), TRAIN, seed=seed, epochs=15)
    met = []
    for label in (0, 1, 3, 5, 8):
        base = class_accuracy(model, TEST, label)
        found = []
        for selection in (30.0, 50.0, 60.0, 80.0, 100.0):
            gone, kept = class_accuracy(
                forgotten(model, SSD(selection=selection), TRAIN, class_ids(TRAIN, label))[0], TEST, label
            )
            found.append(gone < 0.10 and base[1] - kept < 0.03)
        met.append(any(found))
        assert base[0] > 0.85
    assert sum(met) >= 3, met


@pytest.mark.fidelity(
    "forget/ssd",
    check="the rule written out; block-diagonal model; class 3 of six digits at one setting, three seeds",
    measured="96 % to 0 %, the other classes lose 0 to 0.4 points",
    paper="card, digits: forget 0-6 %, others 0.97 of 0.97 for 4 of 5 classes at the best point of a grid",
    differs="per-example, batch and label-free importance are offered",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_one_setting_forgets_class_three_of_six(seed):
    """The request of the digits example: selection 30 without a grid. Measured: 0 % left, the rest at 0.98 or more."""
    six = [data.select((data["y"] < 6).nonzero()[:, 0]) for data in (TRAIN, TEST)]
    labels = list(range(6))
    model = taught(mlp(64, [128], 6, seed=seed), six[0], seed=seed, epochs=15, labels=labels, new=labels)
    base = class_accuracy(model, six[1], 3)
    gone, kept = class_accuracy(
        forgotten(model, SSD(selection=30.0), six[0], class_ids(six[0], 3), labels=labels)[0], six[1], 3
    )
    assert base[0] > 0.9 and gone < 0.1 and kept > base[1] - 0.03


def test_deterministic_and_without_a_trace():
    model = digits_model(norm=True)
    torch.manual_seed(3)
    draws, mode = torch.random.get_rng_state(), [m.training for m in model.modules()]
    first, _ = forgotten(model, SSD(selection=20.0), TRAIN, THREE)
    second, _ = forgotten(model, SSD(selection=20.0), TRAIN, THREE)
    assert same(first, second) and torch.equal(draws, torch.random.get_rng_state())
    assert mode == [m.training for m in first.modules()] and all(
        p.grad is None and p.requires_grad for p in first.parameters()
    )


def test_batch_importance_written_out():
    model, batches = digits_model(), [TRAIN.batch(torch.arange(0, 64)), TRAIN.batch(torch.arange(64, 100))]
    from remanence.core.problem import Classification

    found = batch_fisher(model, Classification(), batches, dict(model.named_parameters()))
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    naive = copy.deepcopy(model).eval()
    for batch in batches:
        naive.zero_grad()
        nn.functional.cross_entropy(naive(batch["x"]), batch["y"]).backward()
        for name, p in naive.named_parameters():
            wanted[name] += p.grad.square() / 2
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_wrong_knobs():
    with pytest.raises(BadInput, match="selection"):
        SSD(selection=-1.0)
    with pytest.raises(BadInput, match="importance"):
        SSD(importance="examples")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_guard_finds_the_strongest_dampening_that_the_rest_bears(seed):
    """From a selection that ruins the network: it ends within the fall allowed, one step below it does not."""
    model, eight = digits_model(seed), class_ids(TRAIN, 8)
    ruined, _ = forgotten(model, SSD(selection=0.5), TRAIN, eight)
    rest = TRAIN.without(eight)
    assert accuracy(ruined, rest) < accuracy(model, rest) - 0.1
    guarded, outcome = forgotten(model, SSD(selection=0.5, guard=0.02), TRAIN, eight)
    assert accuracy(guarded, rest) >= accuracy(model, rest) - 0.02
    found = float(outcome.notes[0].rpartition(" ")[2])
    assert found > 0.5
    below, _ = forgotten(model, SSD(selection=found / (4 / 3)), TRAIN, eight)
    assert accuracy(below, rest) < accuracy(model, rest) - 0.02
    assert same(forgotten(model, SSD(selection=0.5, guard=1.0), TRAIN, eight)[0], ruined)  # everything is allowed


def test_a_guard_needs_something_to_look_at():
    model = digits_model()
    with pytest.raises(BadInput, match="guard"):
        forgotten(model, SSD(guard=0.1), TRAIN, TRAIN.ids)
