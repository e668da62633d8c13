"""The noise of Fisher forgetting: its size entry by entry, what it spares, and what only the reset of head rows forgets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Classification, Regression
from remanence.data import Examples, Request
from remanence.forget.fisher_noise import FisherNoise
from remanence.learn.finetune import Finetune
from remanence.nn.fisher import diagonal_fisher
from remanence.train.loop import forget
from remanence.train.settings import Settings
from remanence.train.update import Context, Update
from tests.forget.helpers import SEEDS, class_accuracy, class_ids, digits_model, forget_update, forgotten, same, split

TRAIN, TEST = split()
THREE = class_ids(TRAIN, 3)
SOME = TRAIN.ids.sample(130, torch.Generator().manual_seed(0))


def fisher_of(model, ids):
    u = forget_update(model, FisherNoise(), TRAIN, ids)
    return diagonal_fisher(
        model, u.problem, u.batches(u.data("retain")), dict(model.named_parameters()), "exact", u.classes.seen
    )


def noise(model, ids, **knobs):
    after, _ = forgotten(model, FisherNoise(**knobs), TRAIN, ids)
    return {
        name: q.detach() - p.detach() for (name, p), q in zip(model.named_parameters(), after.parameters(), strict=True)
    }


@pytest.mark.parametrize("power", [0.5, 0.25])
def test_every_weight_has_the_spread_of_the_formula(power):
    """The change over its wanted spread is standard normal: over the network, and over the weights below and at the cap alone."""
    model = digits_model()
    fisher, moved = fisher_of(model, SOME), noise(model, SOME, alpha=1e-4, cap=1e3, power=power)
    wanted = {name: (1e-4 * (1 / f).clamp(max=1e3)) ** power for name, f in fisher.items()}
    z, capped = (torch.cat([t.reshape(-1) for t in found]) for found in (
        [moved[name] / wanted[name] for name in wanted], [f <= 1e-3 for f in fisher.values()]))  # fmt: skip
    for chosen in (z, z[capped], z[~capped]):
        assert len(chosen) > 1000
        spread = 4 / len(chosen) ** 0.5
        assert abs(chosen.mean()) < spread and abs(chosen.square().mean() - 1) < 1.5 * spread
        assert abs((chosen.abs() < 1).float().mean() - 0.6827) < spread


def test_the_paper_and_the_release_differ_by_a_square_root():
    """One draw: the size at power 1/4 is the root of that at 1/2."""
    model = digits_model()
    half, quarter = (noise(model, SOME, alpha=1e-2, power=power) for power in (0.5, 0.25))
    fisher = fisher_of(model, SOME)
    for name, f in fisher.items():
        size = (1e-2 * (1 / f).clamp(max=1e3)) ** 0.25
        torch.testing.assert_close(half[name], quarter[name] * size, atol=1e-5, rtol=1e-3)


def test_it_does_not_read_the_forget_set():
    """Another request with the same retained rows gets the same noise, when no class goes."""
    model = digits_model()
    smaller = TRAIN.without(Ids(TRAIN.only(SOME).id[:60].numpy()))
    rest = Ids(TRAIN.only(SOME).id[60:].numpy())
    assert same(forgotten(model, FisherNoise(), TRAIN, SOME)[0], forgotten(model, FisherNoise(), smaller, rest)[0])


def test_rows_of_a_class_that_is_gone_are_drawn_anew():
    model = digits_model()
    after, outcome = forgotten(model, FisherNoise(alpha=0.0), TRAIN, THREE)
    assert outcome.notes == ["head rows drawn anew: 1"]
    others = torch.arange(10) != 3
    assert torch.equal(after.head.weight[others], model.head.weight[others]) and same(after.body, model.body)
    assert torch.equal(after.head.bias[others], model.head.bias[others]) and after.head.bias[3] != model.head.bias[3]
    assert abs(after.head.weight[3].std() / 0.001**0.5 - 1) < 0.25 and abs(after.head.weight[3].mean()) < 0.01
    for ids, knobs in ((THREE, {"reset": False}), (SOME, {}), (Ids(TRAIN.only(THREE).id[1:].numpy()), {})):
        after, outcome = forgotten(model, FisherNoise(alpha=0.0, **knobs), TRAIN, ids)
        assert same(after, model) and outcome.notes == []


def loss(model, data):
    return Context(model, Classification(), Finetune(), list(range(10))).evaluate(data)["loss"]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_spares_what_is_retained(seed):
    """Against the same amount of noise spread evenly, which is what a cap does that is below every 1 / F: measured 0.01
    to 0.10 nats lost against 0.36 to 0.75."""
    model = digits_model(seed)
    shaped = FisherNoise(alpha=1e-6, cap=1e5)
    fisher = fisher_of(model, SOME)
    mean = torch.cat([(1e-6 * (1 / f).clamp(max=1e5)).reshape(-1) for f in fisher.values()]).mean()
    even = FisherNoise(alpha=float(mean) / 1e-9, cap=1e-9)
    kept = TRAIN.without(SOME)
    base = loss(model, kept)
    rises, size = [], []
    for by in (shaped, even):
        after, _ = forgotten(model, by, TRAIN, SOME)
        rises.append(loss(after, kept) - base)
        size.append(
            sum(
                float((p - q).detach().square().sum())
                for p, q in zip(model.parameters(), after.parameters(), strict=True)
            )
        )
    assert size[0] == pytest.approx(size[1], rel=0.1)
    assert rises[0] < 0.3 * rises[1]


@pytest.mark.fidelity(
    "forget/fisher-noise",
    check="spread of every weight's noise; the same amount spread evenly; class 3 of ten digits, three seeds",
    measured="retained loss rises by 0.01 to 0.10 nats (spread evenly: 0.36 to 0.75); class 3: 2 to 33 % left after the reset of its head row, the others lose 0.5 to 1.2 points; without the reset the noise forgets no class before it harms all",
    paper="-",
    differs="no averaging over rows and no factors per tensor",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_class_goes_by_the_reset_and_not_by_the_noise(seed):
    model = digits_model(seed)
    before = class_accuracy(model, TEST, 3)
    gone, kept = class_accuracy(forgotten(model, FisherNoise(), TRAIN, THREE, seed=seed)[0], TEST, 3)
    assert before[0] > 0.9 and gone < 0.5 and kept > before[1] - 0.025
    for alpha in (1e-6, 1e-5, 3e-5):
        gone, kept = class_accuracy(
            forgotten(model, FisherNoise(alpha=alpha, reset=False), TRAIN, THREE, seed=seed)[0], TEST, 3
        )
        assert gone > 0.85 and kept > 0.88


def test_regression_and_determinism():
    g = torch.Generator().manual_seed(0)
    data = Examples({"x": torch.randn(50, 4, generator=g), "y": torch.randn(50, 2, generator=g)}, "values")
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    ids = Ids(data.id[:5].numpy())
    made = []
    for _ in range(2):
        by = FisherNoise(alpha=1e-3)
        sets = {"forget": data.only(ids), "retain": data.without(ids), "seen": data}
        u = Update(model=copy.deepcopy(model), problem=Regression(), owner=by, settings=Settings(), data=sets.__getitem__, event="forget/1",
                   kind="forget")  # fmt: skip
        draws = torch.random.get_rng_state()
        forget(u, Request(ids=ids))
        assert torch.equal(draws, torch.random.get_rng_state())
        made.append(u.model)
    assert same(*made) and not same(made[0], model)
    digit = digits_model(norm=True)
    first, other = (forgotten(digit, FisherNoise(), TRAIN, SOME, seed=seed)[0] for seed in (0, 1))
    assert not same(first, other) and same(dict(first.named_buffers()), dict(digit.named_buffers()))


def test_what_it_cannot_do_without():
    with pytest.raises(BadInput, match="retained"):
        forgotten(digits_model(), FisherNoise(), TRAIN, TRAIN.ids)
    for wrong in ({"alpha": -1.0}, {"cap": -1.0}, {"power": 2.0}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            FisherNoise(**wrong)
