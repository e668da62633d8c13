"""The checks of card concept-poison-unlearn: choices and windows by hand, and the card's figures on fixed random features."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.data import Request
from remanence.forget.concept_poison_unlearn import ConceptPoison
from remanence.models import cnn, mlp
from remanence.models.small import seeded
from remanence.nn.anatomy import features
from remanence.train.loop import forget
from tests.forget.helpers import (
    SEEDS,
    class_accuracy,
    class_ids,
    digits_model,
    forget_update,
    forgotten,
    same,
    split,
    state,
    taught,
)

TRAIN, TEST = split()
EIGHT = class_ids(TRAIN, 8)
ONE = {"epochs": 1, "lr": 0.05}


class Random(nn.Module):
    """300 fixed random ReLU features under a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 300), nn.ReLU()).requires_grad_(False)
        self.body[0].weight.normal_(std=0.25)
        self.head = nn.Linear(300, 10)

    def forward(self, x):
        return self.head(self.body(x))


@lru_cache
def _random_model(seed):
    return taught(seeded(seed, Random), TRAIN, seed=seed, epochs=20, batch_size=64, lr=1e-2)


def random_model(seed=0):
    return copy.deepcopy(_random_model(seed))


def poisoned(model, by, data=TRAIN, ids=EIGHT, **settings):
    """What the method teaches: {id: (x, y)}, taken from its scratch, and its outcome."""
    u = forget_update(copy.deepcopy(model), by, data, ids, **{"epochs": 0, **settings})
    found = {}
    run = u.run

    def watched(**kw):
        found.update(by._poisoned)
        run(**kw)

    u.run = watched
    return found, forget(u, Request(ids=ids))


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("label", range(10))
def test_the_donor_is_the_class_that_shares_the_concept(label):
    model = random_model()
    found, outcome = poisoned(model, ConceptPoison(paste="none"), ids=class_ids(TRAIN, label))
    weight = model.head.weight
    concept = int(weight[label].argmax())
    donor = max((c for c in range(10) if c != label), key=lambda c: weight[c, concept].item())
    assert outcome.notes == [f"class {label}: donor {donor} by concept {concept}"]
    assert (found["y"] == donor).all() and donor != label
    assert torch.equal(found["x"], TRAIN.only(class_ids(TRAIN, label))["x"])  # nothing pasted


@pytest.mark.parametrize("paste", ["local", "centre"])
def test_labels(paste):
    model = random_model()
    y = {
        name: poisoned(model, ConceptPoison(paste=paste, labels=name))[0]["y"]
        for name in ("targeted", "random", "keep")
    }
    assert len(y["targeted"].unique()) == 1 and not (y["targeted"] == 8).any() and (y["keep"] == 8).all()
    assert set(y["random"].tolist()) == set(range(10)) - {8}


def test_two_classes_are_no_donors_of_each_other():
    both = EIGHT | class_ids(TRAIN, 1)
    for labels in ("targeted", "random"):
        found, _ = poisoned(random_model(), ConceptPoison(paste="none", labels=labels), ids=both)
        assert not set(found["y"].tolist()) & {1, 8}


def test_the_centre_of_a_donor_is_pasted_into_the_centre():
    found, outcome = poisoned(random_model(), ConceptPoison(paste="centre"))
    donor = int(outcome.notes[0].split()[3])
    before, now = (x.reshape(-1, 8, 8) for x in (TRAIN.only(EIGHT)["x"], found["x"]))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 2:5] = True  # 96 / 224 of 8 pixels
    assert torch.equal(before[:, ~inside], now[:, ~inside])
    donors = TRAIN["x"][TRAIN["y"] == donor].reshape(-1, 8, 8)[:, inside]
    for image in now[:, inside]:
        assert (donors == image).all(1).any()


def test_the_peak_is_pasted_over_the_peak():
    """Every window by hand: cover it, and look how far the concept falls."""
    model = random_model()
    found, outcome = poisoned(model, ConceptPoison())
    donor, concept = (int(outcome.notes[0].split()[i]) for i in (3, 6))
    theirs = int(model.head.weight[donor].argmax())
    blank = TRAIN.without(EIGHT)["x"].double().mean(0).float().reshape(8, 8)

    def peak(image, k):
        scores = {}
        for a in range(7):
            for b in range(7):
                covered = image.clone()
                covered[a : a + 2, b : b + 2] = blank[a : a + 2, b : b + 2]
                scores[a, b] = float(model.body(covered.reshape(1, 64))[0, k])
        return min(scores, key=scores.get)

    donors = TRAIN["x"][TRAIN["y"] == donor].reshape(-1, 8, 8)
    windows = {tuple(d[a : a + 2, b : b + 2].flatten().tolist()) for d in donors for a, b in [peak(d, theirs)]}
    pasted = 0
    for before, now in list(zip(TRAIN.only(EIGHT)["x"].reshape(-1, 8, 8), found["x"].reshape(-1, 8, 8), strict=True))[
        :40
    ]:
        a, b = peak(before, concept)
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[a : a + 2, b : b + 2] = True
        assert torch.equal(before[~inside], now[~inside])
        assert tuple(now[inside].tolist()) in windows
        pasted += not torch.equal(before, now)
    assert pasted > 10


def test_only_the_head_moves_and_no_statistic():
    model = cnn((1, 8, 8), [8, 8], 10)
    data = TRAIN.replace(x=TRAIN["x"].reshape(-1, 1, 8, 8))
    taught(model, data, epochs=2, batch_size=64, lr=5e-3)
    model.train()
    after, _ = forgotten(model, ConceptPoison(concepts="cav"), data, EIGHT, **ONE)
    now = state(after)
    assert {name for name, value in state(model).items() if not torch.equal(value, now[name])} == {
        "head.weight",
        "head.bias",
    }
    assert all(module.training for module in after.modules())


def test_one_step_written_out():
    """Full batches of plain gradient descent: the mean over retained and poisoned rows together."""
    model = random_model()
    knobs = {"epochs": 1, "batch_size": 5000, "optimizer": "sgd", "lr": 0.3}
    after, _ = forgotten(model, ConceptPoison(), TRAIN, EIGHT, **knobs)
    found, _ = poisoned(model, ConceptPoison())
    retain = TRAIN.without(EIGHT)
    x, y = torch.cat([retain["x"], found["x"]]), torch.cat([retain["y"], found["y"]])
    wanted = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.head.parameters()))
    for p, q, g in zip(model.head.parameters(), after.head.parameters(), wanted, strict=True):
        torch.testing.assert_close(q, p - 0.3 * g, atol=1e-6, rtol=1e-4)


def test_the_same_twice_and_nothing_left_behind():
    by = ConceptPoison(labels="random", concepts="cav", top=2)
    first, second = (forgotten(random_model(), by, TRAIN, EIGHT, **ONE)[0] for _ in range(2))
    other, _ = forgotten(random_model(), by, TRAIN, EIGHT, seed=1, **ONE)
    assert same(first, second) and not same(first, other)
    assert not [name for name in vars(by) if name.startswith("_")] and by.bytes() == 0


def test_channels_and_flat_rows_are_one():
    model = mlp((1, 8, 8), [16], 10)
    flat, _ = forgotten(model, ConceptPoison(), TRAIN, EIGHT, **ONE)
    images, _ = forgotten(model, ConceptPoison(), TRAIN.replace(x=TRAIN["x"].reshape(-1, 1, 8, 8)), EIGHT, **ONE)
    assert same(flat, images)


def test_what_it_cannot_do():
    model = digits_model()
    with pytest.raises(BadInput, match="donor"):
        forgotten(model, ConceptPoison(), TRAIN, TRAIN.ids)
    with pytest.raises(BadInput, match="donor"):
        forgotten(model, ConceptPoison(), TRAIN.only(EIGHT), EIGHT.sample(5, torch.Generator().manual_seed(0)))
    with pytest.raises(BadInput, match="label"):
        forgotten(model, ConceptPoison(), TRAIN.replace(y=TRAIN["y"].double()), EIGHT)
    with pytest.raises(BadInput, match="square"):
        forgotten(mlp(60, [8], 10), ConceptPoison(), TRAIN.replace(x=TRAIN["x"][:, :60]), EIGHT)
    forgotten(mlp(60, [8], 10), ConceptPoison(paste="none"), TRAIN.replace(x=TRAIN["x"][:, :60]), EIGHT, **ONE)


# ------------------------------------------------------------------------------------------------------------ purpose


@pytest.mark.fidelity(
    "forget/concept-poison-unlearn",
    check="donor, peak windows and a step by hand; class 8 of ten digits on 300 fixed random features, one epoch, three seeds",
    measured="0 % left of 93-95 % (none or local paste; targeted or random labels), kept labels 93-95 %, others 0.96-1.00; a centre paste may leave 43 %",
    paper="card, the same setting: targeted 0, random over others 0, kept labels 0.95, others 0.97-0.98; CIFAR-10: 0 left, 0.9658 in all",
    differs="concepts are coordinates or activation vectors, not words that CLIP knows; windows by covering them",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_label_does_the_forgetting(seed):
    model = random_model(seed)
    base = class_accuracy(model, TEST, 8)
    assert base[0] > 0.85
    for paste in ("none", "local", "centre"):
        for labels in ("targeted", "random", "keep"):
            after, _ = forgotten(model, ConceptPoison(paste=paste, labels=labels), TRAIN, EIGHT, **ONE)
            gone, kept = class_accuracy(after, TEST, 8)
            assert kept > base[1] - 0.04
            if labels == "keep":
                assert gone > base[0] - 0.1
            elif paste != "centre":  # 0.43 was left of one seed, as of some classes in the authors' record
                assert gone < 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_the_features_stay_so_one_epoch_brings_the_class_back(seed):
    """And retained data alone do not."""
    model = random_model(seed)
    base = class_accuracy(model, TEST, 8)[0]
    after, _ = forgotten(model, ConceptPoison(paste="none"), TRAIN, EIGHT, **ONE)
    assert torch.equal(features(after, TEST["x"]), features(model, TEST["x"]))
    sgd = {"batch_size": 32, "optimizer": {"sgd": {"momentum": 0.9}}, "lr": 0.05}
    without = taught(copy.deepcopy(after), TRAIN.without(EIGHT), epochs=5, **sgd)
    back = taught(copy.deepcopy(after), TRAIN, epochs=1, **sgd)
    assert class_accuracy(without, TEST, 8)[0] < 0.05
    assert class_accuracy(back, TEST, 8)[0] > base - 0.1


def test_random_labels_that_may_be_the_true_one_leave_some():
    """As in the authors' code, and why y is excluded here. Measured after 5 epochs: 0.39, 0.33 and 0.01 of the class, against 0."""
    sgd = {"batch_size": 32, "optimizer": {"sgd": {"momentum": 0.9}}, "lr": 0.05, "epochs": 5}
    left = []
    for seed in range(3):
        y = TRAIN["y"].clone()
        y[TRAIN.rows(EIGHT)] = torch.randint(10, (len(EIGHT),), generator=torch.Generator().manual_seed(seed))
        loose = taught(random_model(seed), TRAIN.replace(y=y), **sgd)
        strict, _ = forgotten(
            random_model(seed), ConceptPoison(paste="none", labels="random"), TRAIN, EIGHT, epochs=5, lr=0.05
        )
        assert class_accuracy(strict, TRAIN, 8)[0] < 0.02
        left.append(class_accuracy(loose, TRAIN, 8)[0])
    assert sum(left) / 3 > 0.1
