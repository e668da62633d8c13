"""The contrastive losses against loops over their definitions, and the cosine head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from remanence.core.errors import BadInput
from remanence.models import mlp
from remanence.nn.anatomy import head, head_name
from remanence.nn.contrast import (
    CosineLinear,
    add_projection,
    class_means,
    cosine_head,
    info_nce,
    neighbours,
    prototype_contrast,
    proxy_contrast,
    supervised_contrast,
    unit,
)


def drawn(seed=0, n=9, d=5, classes=4):
    rng = torch.Generator().manual_seed(seed)
    z = unit(torch.randn(n, d, generator=rng, dtype=torch.float64))
    return z, torch.randint(classes, (n,), generator=rng), unit(torch.randn(7, d, generator=rng, dtype=torch.float64))


def naive(s, positive, among):
    """The definition, one term at a time."""
    found = []
    for i in range(len(s)):
        rivals = [float(s[i, k]) for k in range(s.shape[1]) if among[i, k]]
        mine = [float(s[i, j]) for j in range(s.shape[1]) if positive[i, j]]
        total = math.log(sum(math.exp(r) for r in rivals)) if rivals else 0.0
        found.append(-sum(m - total for m in mine) / len(mine) if mine else 0.0)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_info_nce_is_its_definition_under_any_masks(seed):
    rng = torch.Generator().manual_seed(seed)
    s = 3 * torch.randn(6, 8, generator=rng, dtype=torch.float64)
    among = torch.rand(6, 8, generator=rng) < 0.7
    positive = among & (torch.rand(6, 8, generator=rng) < 0.4)
    positive[0], among[1], positive[1] = False, False, False  # a row without positives, and one without anybody
    s.requires_grad_()
    found = info_nce(s, positive, among)
    torch.testing.assert_close(found.detach(), naive(s.detach(), positive, among), rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert torch.isfinite(s.grad).all() and (s.grad[~among] == 0).all() and (s.grad[:2] == 0).all()
    everyone = torch.ones_like(among)
    assert torch.equal(info_nce(s, positive), info_nce(s, positive, everyone))


def test_supervised_contrast_is_its_definition():
    z, y, _ = drawn()
    others = ~torch.eye(len(z), dtype=torch.bool)
    wanted = naive(z @ z.T / 0.3, (y[:, None] == y) & others, others)
    torch.testing.assert_close(supervised_contrast(z, y, 0.3), wanted, rtol=1e-12, atol=1e-12)
    twice = supervised_contrast(torch.cat([z, -z]), torch.arange(len(z)).repeat(2), 0.5)  # NT-Xent: one positive each
    stacked = torch.cat([z, -z])
    s = (stacked @ stacked.T / 0.5).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * len(z)).roll(len(z))
    torch.testing.assert_close(twice, F.cross_entropy(s, partner, reduction="none"))


def test_proxy_contrast_is_its_definition_and_a_cross_entropy_with_counts():
    z, y, proxies = drawn(1)
    s = z @ proxies[y].T / 0.09  # one proxy for each row, duplicates kept, the anchor's own a positive
    wanted = naive(s, y[:, None] == y, torch.ones(len(y), len(y), dtype=torch.bool))
    weight, other = proxies.clone().requires_grad_(), proxies.clone().requires_grad_()
    found = proxy_contrast(z, weight, y, 0.09)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-12)
    present, place, counts = y.unique(return_inverse=True, return_counts=True)
    logits = z @ other[present].T / 0.09 + counts.log()
    entropy = F.cross_entropy(logits, place, reduction="none")
    torch.testing.assert_close(found - counts[place].log(), entropy)
    found.mean().backward()
    entropy.mean().backward()
    torch.testing.assert_close(weight.grad, other.grad)
    absent = torch.ones(len(proxies), dtype=torch.bool)
    absent[present] = False
    assert absent.sum() >= 3 and (weight.grad[absent] == 0).all() and (weight.grad[present] != 0).any(1).all()


def test_two_opposite_prototypes():
    """Each one's partner is at 1, both rivals at -1: log(1 + 2 e^-4) at temperature 0.5."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    found = prototype_contrast(z, z, torch.tensor([3, 5]), 0.5)
    torch.testing.assert_close(found, torch.full((4,), math.log(1 + 2 * math.exp(-4)), dtype=torch.float64))


def test_one_class_has_nothing_to_be_told_from():
    z = unit(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    found = prototype_contrast(z, z.flip(0), torch.full((6,), 2), 0.5)
    found.sum().backward()
    assert float(found.detach().abs().max()) < 1e-6 and float(z.grad.abs().max()) < 1e-6


def test_the_contrast_of_means_is_its_definition():
    rng = torch.Generator().manual_seed(1)
    one, two = (unit(torch.randn(12, 5, generator=rng, dtype=torch.float64)) for _ in range(2))
    y = torch.tensor([4, 4, 7, 1, 1, 1, 7, 4, 9, 9, 1, 7])
    p = [F.normalize(z[y == c].mean(0), dim=0) for z in (one, two) for c in (1, 4, 7, 9)]
    wanted = []
    for i in range(8):
        rivals = [math.exp(float(p[i] @ p[k]) / 0.3) for k in range(8) if k != i]
        wanted.append(math.log(sum(rivals)) - float(p[i] @ p[(i + 4) % 8]) / 0.3)
    torch.testing.assert_close(prototype_contrast(one, two, y, 0.3), torch.tensor(wanted, dtype=torch.float64))
    labels, means = class_means(one, y)
    assert labels.tolist() == [1, 4, 7, 9]
    torch.testing.assert_close(means[2], one[y == 7].mean(0))


def test_neighbours_leave_out_the_row_itself():
    z, _, _ = drawn(2, n=4)
    found = neighbours(z, 0.5)
    for i in range(4):
        assert torch.equal(found[i], torch.stack([(z @ z.T / 0.5)[i, j] for j in range(4) if j != i]))
    assert neighbours(z[:1], 0.5).shape == (1, 0)


def test_cosine_head_keeps_the_rows_and_draws_nothing():
    before = torch.get_rng_state()
    model = mlp(6, [5], 3, seed=1)
    rows = model.head.weight.detach().clone()
    model = cosine_head(model, 0.1)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(head(model), CosineLinear) and head_name(model) == "head" and head(model).bias is None
    assert torch.equal(head(model).weight, rows) and head(model).weight.requires_grad
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    z = model.body(x)
    wanted = torch.stack([F.cosine_similarity(z, row[None]) for row in rows], 1) / 0.1
    torch.testing.assert_close(model(x), wanted)
    head(model).weight.data *= 7  # only directions count
    torch.testing.assert_close(model(x), wanted)


def test_a_vector_without_direction_is_no_trouble():
    z = torch.zeros(2, 3, requires_grad=True)
    proxy_contrast(unit(z), unit(torch.eye(3)), torch.tensor([0, 1]), 0.1).mean().backward()
    assert (unit(z) == 0).all() and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("make", [lambda: mlp(6, [5], 3, seed=1), lambda: torch.nn.Sequential(torch.nn.Linear(6, 3))])
def test_a_projection_changes_no_answer_and_is_no_head(make):
    model = make()
    x, name = torch.ones(2, 6), head_name(model)
    before = model(x)
    add_projection(model, 4, seed=3)
    assert torch.equal(model(x), before) and head_name(model) == name
    again = make()
    add_projection(again, 4, seed=3)
    assert torch.equal(head(model).projection.weight, head(again).projection.weight)
    assert head(model).projection(torch.ones(2, head(model).in_features)).shape == (2, 4)
    assert {f"{name}.projection.weight", f"{name}.projection.bias"} <= dict(model.named_parameters()).keys()


def test_masks_of_another_shape_are_refused():
    with pytest.raises(BadInput, match="one shape"):
        info_nce(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
