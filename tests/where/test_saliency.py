"""The mask of card salun as a part of its own: which entries, and that the others keep their bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from remanence.forget.random_label import RandomLabel
from remanence.forget.salun import SalUn
from remanence.models import mlp
from remanence.train.loop import learn
from remanence.where.saliency import Saliency
from tests.forget.helpers import class_ids, digits_model, forget_update, forgotten, same, split
from tests.where.helpers import moved, state, trained, update

TRAIN, _ = split()
SMALL = TRAIN.select(torch.arange(200))


def naive_mask(model, examples, rho):
    """One example at a time, double loop over entries' ranks: gradients added with their sign, then ranked together."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in range(len(examples)):
        loss = F.cross_entropy(model(examples["x"][row : row + 1]), examples["y"][row : row + 1])
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total[name] += g / len(examples)
    flat = torch.cat([g.abs().flatten() for g in total.values()])
    keep = int(rho * len(flat))
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))[:keep]] = True
    parts = chosen.split([g.numel() for g in total.values()])
    return {name: part.view(total[name].shape) for (name, part) in zip(total, parts, strict=True)}


@pytest.mark.fidelity(
    "where/saliency",
    check="naive per-example gradient sum and ranking on digits; entries outside the mask keep their bits",
    measured="masks equal at rho 0.05, 0.5 and 0.9; sum(m) = int(rho N)",
    paper="m_j = 1 for the top rho of |sum grad|",
    differs="examples count equally, also in a ragged last batch",
)
@pytest.mark.parametrize("rho", [0.05, 0.5, 0.9])
def test_mask_is_the_naive_one(rho):
    model = mlp(64, [16], 10, seed=1)
    u = update(model, SMALL, [])
    part = Saliency(rho=rho)
    part.begin(u)
    expected = naive_mask(model, SMALL, rho)
    found = part.mask(u)
    count = sum(m.numel() for m in found.values())
    assert sum(int(m.sum()) for m in found.values()) == int(rho * count)
    differ = sum(int((found[name] != expected[name]).sum()) for name in found)
    assert differ <= 2  # two near-equal gradients may change places by rounding


@pytest.mark.parametrize("optimizer", [{"adamw": {"weight_decay": 0.5}}, {"sgd": {"momentum": 0.9, "weight_decay": 0.1}}])  # fmt: skip
def test_entries_outside_the_mask_keep_their_bits(optimizer):
    model = mlp(64, [16], 10, norm=True, seed=1)
    before = state(model)
    u = update(model, SMALL, [part := Saliency(rho=0.3)], epochs=4, batch_size=32, optimizer=optimizer, lr=0.05)
    part.begin(u)
    mask = part.mask(u)
    learn(u)
    after = state(model)
    for name, m in mask.items():
        assert torch.equal(after[name][~m], before[name][~m])
        assert (after[name][m] != before[name][m]).float().mean() > 0.9 or not m.any()


def test_whole_mask_is_not_there_and_empty_mask_moves_no_weight():
    plain, whole, none = (mlp(64, [16], 10, seed=1) for _ in range(3))
    before = state(none)
    trained(plain, SMALL, [], epochs=2)
    trained(whole, SMALL, [Saliency(rho=1.0)], epochs=2)
    assert not moved(state(plain), whole) and Saliency(rho=1.0).inert
    trained(none, SMALL, [Saliency(rho=0.0)], epochs=2)
    assert not moved(before, none)


def test_beside_random_label_it_is_salun():
    """SalUn = random labels under this mask, bit for bit: the plug-in form of the card."""
    model, three = digits_model(), class_ids(TRAIN, 3)
    whole, _ = forgotten(model, SalUn(rho=0.4), TRAIN, three, epochs=2)
    parts, _ = forgotten(model, RandomLabel(), TRAIN, three, epochs=2, parts=[Saliency(rho=0.4)])
    assert same(whole, parts)


def test_which_examples_it_looks_at():
    model, three = digits_model(), class_ids(TRAIN, 3)
    u = forget_update(model, RandomLabel(), TRAIN, three)
    masks = {}
    for on in ("auto", "forget", "retain", "seen"):
        part = Saliency(on=on)
        part.begin(u)
        masks[on] = part.mask(u)
    assert same(masks["auto"], masks["forget"]) and not same(masks["auto"], masks["retain"])
    assert not same(masks["seen"], masks["retain"])
    assert u.extra_bytes == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_purpose_a_tight_mask_changes_the_rest_less(seed):
    """Forgetting a class by random labels through 10 % of the weights moves the network less than through all, and forgets still."""
    from tests.forget.helpers import class_accuracy

    model, three = digits_model(seed), class_ids(TRAIN, 3)
    free, _ = forgotten(model, RandomLabel(), TRAIN, three)
    held, _ = forgotten(model, RandomLabel(), TRAIN, three, parts=[Saliency(rho=0.1)])
    far = {
        name: sum(
            float((p - q).detach().square().sum()) for p, q in zip(m.parameters(), model.parameters(), strict=True)
        )
        for name, m in (("free", free), ("held", held))
    }
    assert far["held"] < 0.8 * far["free"]
    assert class_accuracy(held, TRAIN, 3)[0] < 0.1
