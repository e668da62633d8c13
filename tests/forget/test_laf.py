"""The checks of card laf."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.data import Request
from remanence.forget.laf import LAF, alignment, unlike
from remanence.nn.anatomy import features
from remanence.nn.distances import cosine_distance
from remanence.train.loop import forget
from tests.forget.helpers import class_accuracy, class_ids, digits_model, forget_update, forgotten, same, split

TRAIN, TEST = split()
THREE = class_ids(TRAIN, 3)
#: The published rate is meant for thousands of steps; here there are 180.
QUICK = {"epochs": 5, "lr": 1e-3}
STRONG = {"lr": 2e-3, "batch_size": 32}


def test_typicality_is_bounded_and_flat_far_away():
    m = torch.tensor([0.0, 0.5, 3.0, 1e3, 1e8], requires_grad=True)
    each = torch.stack([unlike(value[None]) for value in m])
    assert each[0] == 1 and (each < math.e + 1e-6).all() and (each[1:] > each[:-1]).all()
    (grad,) = torch.autograd.grad(unlike(m), m)
    torch.testing.assert_close(grad[1], torch.tensor(math.exp(1 / 3) / 2.25))
    assert (grad >= 0).all() and grad[3] < 1e-5 and grad[4] < 1e-15


def test_alignment_at_the_start():
    """All distances 0: -n_r log n_f, and no gradient in any weight of the network."""
    model, temperature = digits_model(), 5.0
    first = copy.deepcopy(model)
    rows = TRAIN["x"][:50]
    with torch.no_grad():
        origin = features(first, rows)
    away = cosine_distance(features(model, rows), origin)
    loss = alignment(away[:32], away[32:], temperature)
    assert loss.item() == pytest.approx(-32 * math.log(18), rel=1e-6)
    grads = torch.autograd.grad(loss, list(model.body.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 1e-5


def test_alignment_written_out():
    kept, gone = torch.rand(6), torch.rand(4)
    wanted = sum(torch.log(torch.exp(c) / sum(torch.exp(d / 3.0) for d in gone)) for c in kept)
    torch.testing.assert_close(alignment(kept, gone, 3.0), wanted)


def test_equals_two_optimizers_by_hand():
    """The batches it saw, gone through again with two of torch's own Adams over the same weights."""
    log = []

    @dataclass
    class Watched(LAF):
        def steps(self, u, batch):
            log.append((batch["x"], u.forget["x"], self._typical, self._gone, self._origin))
            yield from super().steps(u, batch)

    model = digits_model()
    after, _ = forgotten(model, Watched(align=3.0, temperature=5.0), TRAIN, THREE, epochs=1, lr=1e-3)
    hand = copy.deepcopy(model).train()
    first = torch.optim.Adam(hand.parameters(), 1e-3)
    second = torch.optim.Adam(hand.parameters(), 3e-3)
    for kept, gone, typical, gone_typical, teacher in log:
        e_r, e_f = hand.body(kept), hand.body(gone)
        m, n = (((vae(e)[0] - e) ** 2).sum(1) for vae, e in ((typical, e_r), (gone_typical, e_f)))
        first.zero_grad()
        (torch.exp(m / (m + 1)).sum() - torch.exp(n / (n + 1)).sum()).backward()
        first.step()
        c_r, c_f = (1 - F.cosine_similarity(hand.body(x), teacher.body(x)) for x in (kept, gone))
        second.zero_grad()
        torch.log(c_r.exp() / (c_f / 5.0).exp().sum()).sum().backward()
        second.step()
    assert len(log) == 3 and not same(after, model)
    for p, q in zip(after.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_labels_are_never_read():
    model = digits_model()
    after, _ = forgotten(model, LAF(), TRAIN, THREE, **QUICK)
    order = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(1))
    mixed = TRAIN.replace(y=TRAIN["y"][order])
    assert not same(after, model) and same(after, forgotten(model, LAF(), mixed, THREE, **QUICK)[0])
    repaired = [forgotten(model, LAF(repair=1), data, THREE, **QUICK)[0] for data in (TRAIN, mixed)]
    assert not same(*repaired)
    for other in repaired:  # and then only by the head
        assert same(other.body, after.body) and not same(other.head, after.head)
    assert same(after.head, model.head)


def test_deterministic_and_nothing_left_behind():
    model, by = digits_model(), LAF(repair=1)
    u = forget_update(model, by, TRAIN, THREE, **QUICK)
    torch.manual_seed(5)
    draws = torch.random.get_rng_state()
    forget(u, Request(ids=THREE))
    assert torch.equal(draws, torch.random.get_rng_state())
    assert not [name for name in vars(by) if name.startswith("_")] and not by.state_dict()
    assert u.extra_bytes > 2 * sum(p.nbytes for p in model.parameters())  # the teacher, two autoencoders, embeddings
    assert same(model, forgotten(digits_model(), LAF(repair=1), TRAIN, THREE, **QUICK)[0])
    assert not same(model, forgotten(digits_model(), LAF(repair=1), TRAIN, THREE, seed=1, **QUICK)[0])


def test_a_schedule_ends_with_the_last_step():
    """Along a line to 0: the last pair of batches still moves the weights, a little."""
    seen = []

    @dataclass
    class Watched(LAF):
        def steps(self, u, batch):
            for step in super().steps(u, batch):
                yield step
                seen.append(u.lr / u.settings.lr)

    forgotten(digits_model(), Watched(fit_epochs=0), TRAIN, THREE, schedule="linear", epochs=2)
    assert seen == pytest.approx([1 - k / 12 for k in range(12)])  # three batches, two steps of each, two epochs


def test_one_example_and_nothing_retained():
    model = digits_model()
    after, _ = forgotten(model, LAF(), TRAIN, Ids([int(TRAIN.id[7])]), **QUICK)
    assert not same(after, model) and all(torch.isfinite(p).all() for p in after.parameters())
    with pytest.raises(BadInput, match="retained"):
        forgotten(model, LAF(), TRAIN, TRAIN.ids, **QUICK)
    with pytest.raises(BadInput, match="accumulate"):
        forgotten(model, LAF(), TRAIN, THREE, accumulate=2)


def cosine(a, b, examples):
    with torch.no_grad():
        return float(1 - cosine_distance(features(a, examples["x"]), features(b, examples["x"])).mean())


@lru_cache
def forgot(seed, label):
    """A forgotten class: cosines to the start on held-out rows of it and of the others, accuracies before and after."""
    model, ids = digits_model(seed), class_ids(TRAIN, label)
    gone = class_ids(TEST, label)
    moved, _ = forgotten(model, LAF(repair=10), TRAIN, ids, seed=seed, **STRONG)
    only_head, _ = forgotten(model, LAF(repair=10, fit_epochs=0), TRAIN, ids, seed=seed, **{**STRONG, "epochs": 0})
    cosines = [cosine(moved, model, part) for part in (TEST.only(gone), TEST.without(gone))]
    return cosines, *[class_accuracy(made, TEST, label) for made in (model, moved, only_head)]


@pytest.mark.fidelity(
    "forget/laf",
    check="bounds and start values in closed form; the steps against two optimizers by hand; permuted labels give the same bits; class 3 (three seeds) and 8 of ten digits",
    measured="at lr 2e-3, batch 32, repair 10: held-out cosine to the start 0.42 to 0.58 for the class, 0.97 for the rest; 0 to 7 % of the class left (head repaired alone: 27 to 61 %), the rest loses at most 0.3 points",
    paper="-",
    differs="linear decoder, mu when judging, repair on all retained labels; at the published rate so few steps move nothing",
)
@pytest.mark.parametrize(
    ("seed", "label"), [(0, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 3), (2, 3), (0, 8)))]
)
def test_forgets_a_class(seed, label):
    (gone, kept), before, after, only_head = forgot(seed, label)
    assert gone < 0.7 and kept > 0.95
    assert before[0] > 0.9 and after[0] < 0.12 and after[0] < only_head[0] - 0.15
    assert after[1] > before[1] - 0.02


def test_temperature_decides_how_far_the_forget_set_may_go():
    model = digits_model()
    cosines = [
        cosine(forgotten(model, LAF(temperature=t), TRAIN, THREE, **STRONG)[0], model, TRAIN.only(THREE))
        for t in (5.0, 20.0)
    ]
    assert cosines[0] < 0.7 and cosines[1] > 0.9
