"""Supports: exact counts, the flow's closed form, and no layer cut off."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.models import cnn, mlp
from remanence.nn.prune import cut, magnitude, prunable, synflow
from tests.forget.helpers import same


def net(sizes=(6, 9, 5, 4), seed=0, bias=False):
    """Linear layers with ReLUs between."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def left(masks):
    return sum(int(m.sum()) for m in masks.values())


def test_matrices_and_kernels_only():
    assert set(prunable(mlp(4, [3], 2, norm=True))) == {"body.1.weight", "head.weight"}
    assert all(p.dim() == 4 or name == "head.weight" for name, p in prunable(cnn((1, 8, 8), [3, 4], 2)).items())


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.9, 0.95, 0.999, 1.0])
def test_magnitude_keeps_the_largest_of_all(ratio):
    """Exactly N - round(ratio N) are left: 1 - 0.9 is a little under 0.1 in floating point."""
    params = {"a": torch.randn(20, 30), "b": 3 * torch.randn(40, 10)}
    masks = magnitude(params, ratio)
    flat, kept = (torch.cat([v[n].flatten() for n in params]) for v in (params, masks))
    assert left(masks) == 1000 - round(1000 * ratio)
    if 0 < left(masks) < 1000:
        assert flat[kept].abs().min() > flat[~kept].abs().max()


def test_cut_leaves_exact_zeros():
    params = {"a": torch.tensor([[-1.0, 2.0], [3.0, -4.0]])}
    cut(params, {"a": torch.tensor([[False, True], [True, False]])})
    assert params["a"].tolist() == [[0.0, 2.0], [3.0, 0.0]] and not torch.signbit(params["a"]).any()


def flows(weights):
    """Closed form without biases: score of W_l[i, j] = (1' |W_L| ... |W_l+1|)_i |W_l|_ij (|W_l-1| ... |W_1| 1)_j."""
    sizes = [w.double().abs() for w in weights]
    found = []
    for at, w in enumerate(sizes):
        forward, backward = torch.ones(sizes[0].shape[1]).double(), torch.ones(sizes[-1].shape[0]).double()
        for before in sizes[:at]:
            forward = before @ forward
        for after in reversed(sizes[at + 1 :]):
            backward = backward @ after
        found.append(backward[:, None] * w * forward)
    return found


def test_the_closed_form_conserves_the_flow():
    """The reference itself: each layer's scores add up to R."""
    scores = flows([p.detach() for p in net().parameters()])
    for score in scores:
        torch.testing.assert_close(score.sum(), scores[0].sum())


@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.9])
def test_synflow_is_the_closed_form_round_by_round(ratio, rounds):
    model = net(seed=3)
    weights = [p.detach().clone() for p in model.parameters()]
    count = sum(w.numel() for w in weights)
    gone = torch.zeros(count, dtype=torch.bool)
    for k in range(1, rounds + 1):
        flat = torch.cat([s.flatten() for s in flows(weights)]).masked_fill(gone, -1.0)
        gone[flat.argsort()[: round((1 - (1 - ratio) ** (k / rounds)) * count)]] = True
        for w, g in zip(weights, gone.split([w.numel() for w in weights]), strict=True):
            w.view(-1)[g] = 0
    masks = synflow(model, torch.zeros(1, 6), ratio, rounds)
    for w, m in zip(weights, masks.values(), strict=True):
        assert torch.equal(w != 0, m)


@pytest.mark.parametrize("seed", range(3))
def test_no_layer_is_cut_off(seed):
    """One layer of small weights: magnitude cuts it off, so nothing reaches the output; the flow keeps a way through."""
    model = net((20, 30, 30, 10), seed)
    with torch.no_grad():
        model[2].weight *= 1e-3
    for masks, alive in ((magnitude(prunable(model), 0.9), False), (synflow(model, torch.zeros(1, 20), 0.9), True)):
        assert left(masks) == 1800 - 1620 and bool(masks["2.weight"].any()) is alive
        pruned = copy.deepcopy(model)
        cut(prunable(pruned), masks)
        with torch.no_grad():
            for p in pruned.parameters():
                p.abs_()
        assert bool((pruned(torch.ones(1, 20)) > 0).any()) is alive


def test_the_model_and_its_running_means_do_not_matter():
    model = mlp(6, [9, 5], 4, norm=True, seed=1).train()
    before, draws = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    masks = synflow(model, torch.zeros(1, 6), 0.5)
    assert same(before, model) and torch.equal(draws, torch.random.get_rng_state())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += 5.0
    assert same(masks, synflow(model, torch.zeros(1, 6), 0.5))


def test_wrong_ratios():
    for wrong in (-0.1, 1.1):
        with pytest.raises(BadInput, match="ratio"):
            magnitude({"a": torch.ones(2, 2)}, wrong)
    with pytest.raises(BadInput, match="rounds"):
        synflow(net(), torch.zeros(1, 6), 0.5, 0)
