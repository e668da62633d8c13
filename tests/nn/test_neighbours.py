"""Masked distances and votes against plain loops."""

from __future__ import annotations

import pytest
import torch

from remanence.nn.neighbours import masked_distances, votes


def rows(seed):
    rng = torch.Generator().manual_seed(seed)
    h, v = torch.rand(12, 8, generator=rng), torch.rand(20, 8, generator=rng)
    masks = {n: torch.rand(8, generator=rng) < 0.6 for n in (2, 5)}
    return h, v, torch.tensor([2, 5])[torch.randint(2, (20,), generator=rng)], masks


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_a_plain_loop(seed):
    h, v, group, masks = rows(seed)
    found = masked_distances(h, v, group, masks)
    for i in range(12):
        for j in range(20):
            a, b = (x[masks[int(group[j])]].double() for x in (h[i], v[j]))
            expected = (a / a.norm() - b / b.norm()).norm()
            assert abs(float(found[i, j]) - float(expected)) < 1e-6


def test_what_lies_outside_the_mask_does_not_count():
    h, v, group, masks = rows(7)
    other = h.clone()
    other[:, ~masks[2]] += 5
    same = group == 2
    before, after = (masked_distances(x, v, group, masks) for x in (h, other))
    assert torch.equal(before[:, same], after[:, same]) and not torch.equal(before[:, ~same], after[:, ~same])


@pytest.mark.parametrize("k", [1, 3, 5, 50])
def test_the_most_votes_win_and_the_nearest_breaks_ties(k):
    rng = torch.Generator().manual_seed(k)
    distances, y = 1.4 * torch.rand(200, 20, generator=rng), torch.randint(4, (20,), generator=rng)
    y[y == 2] = 3  # a class without rows
    best = votes(distances, y, k, 5).argmax(1)
    for d, found in zip(distances, best.tolist(), strict=True):
        order = d.argsort()[:k].tolist()
        count = {c: sum(int(y[j]) == c for j in order) for c in set(y[order].tolist())}
        tied = [c for c in count if count[c] == max(count.values())]
        assert found == min(tied, key=lambda c: min(float(d[j]) for j in range(20) if int(y[j]) == c))
    assert torch.isinf(votes(distances, y, k, 5)[:, [2, 4]]).all()
