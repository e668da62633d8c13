"""Blocks by depth, two sets of weights mixed by them, changes of several models merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.models import cnn, mlp, resnet18, vit
from remanence.nn.adapters import add_low_rank
from remanence.nn.deltas import (
    block_count,
    block_of,
    changes,
    interpolate,
    l1_ratio,
    linear_in_depth,
    merge,
    slopes,
)
from tests.lm import tiny


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def moved(model, seed=1, size=0.1):
    """A copy with every weight moved."""
    made, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(size * torch.randn(p.shape, generator=rng))
    return made


def test_every_layer_of_a_perceptron_is_a_block_and_its_norm_belongs_to_it():
    found = block_of(mlp(6, [5, 4], 3, norm=True))
    assert found == {
        "body.1.weight": 0, "body.1.bias": 0, "body.2.weight": 0, "body.2.bias": 0,
        "body.4.weight": 1, "body.4.bias": 1, "body.5.weight": 1, "body.5.bias": 1,
        "head.weight": None, "head.bias": None,
    }  # fmt: skip
    assert block_count(found) == 2 and block_count({"head.weight": None}) == 0


def test_named_layers_without_numbers_are_blocks_in_their_order_and_embeddings_are_in_none():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(4, 3), nn.LayerNorm(3)
            self.one, self.two, self.fc = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    found = block_of(Plain())
    assert {name: number for name, number in found.items() if name.endswith("weight")} == {
        "embed.weight": None, "norm.weight": None, "one.weight": 0, "two.weight": 1, "fc.weight": None,
    }  # fmt: skip


@pytest.mark.parametrize("tie", [True, False])
def test_layers_of_a_language_model(tie):
    pytest.importorskip("transformers")
    from remanence.models.language import llama

    found = block_of(llama(32, 16, 3, 2, tie=tie))
    for name, number in found.items():
        parts = name.split(".")
        assert number == (int(parts[2]) if parts[1] == "layers" else None)
    assert block_count(found) == 3 and ("lm_head.weight" in found) != tie


def test_blocks_of_other_networks():
    found = block_of(vit((1, 8, 8), patch=4, width=16, depth=3, heads=2, outputs=2))
    assert block_count(found) == 3 and found["head.weight"] is None
    assert all(number is not None for name, number in found.items() if ".attn" in name or "mlp" in name)
    net = block_of(resnet18(outputs=2))
    assert block_count(net) == 8 and net["stem.0.weight"] is None
    assert [net[f"stages.{k}.{j}.conv1.weight"] for k in range(4) for j in range(2)] == list(range(8))
    assert block_count(block_of(nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(4)), nn.Linear(3, 2)))) == 4  # fmt: skip
    assert block_count(block_of(cnn((1, 8, 8), [4, 4], 2))) == 2
    backbone = nn.Sequential(
        mlp(4, [4, 4], 4), nn.Linear(4, 2)
    )  # a whole network is no block, nor is the head beside it
    assert block_count(block_of(backbone)) == 3


def test_an_adapter_belongs_to_the_layer_that_it_wraps():
    model = add_low_rank(mlp(6, [5, 4], 3), ["body.1"], 2, 1.0, 0)
    found = block_of(model)
    assert {found[f"body.1.{name}"] for name in ("down", "up", "base.weight", "base.bias")} == {0}
    assert found["body.3.weight"] == 1


@pytest.mark.parametrize("make", [lambda: mlp(6, [5, 5, 5], 3), tiny], ids=["mlp", "llama"])
def test_each_block_keeps_its_share_and_the_ends_are_exact(make):
    """The ratio of each block's change to the whole change is lambda_l, to 1e-6."""
    model = make()
    end = moved(model)
    start, there, blocks = weights(model), weights(end), block_of(model)
    last = block_count(blocks) - 1
    factors = linear_in_depth(model, 0.25, 0.75)
    for name, number in blocks.items():
        head = name.startswith(("head.", "lm_head."))
        assert factors[name] == pytest.approx(1.0 if head else 0.25 + 0.75 * ((number or 0) / last))
    into = {name: torch.empty_like(p) for name, p in start.items()}
    interpolate(into, start, there, factors)
    for name, mixed in into.items():
        ratio = float((mixed - start[name]).double().norm() / (there[name] - start[name]).double().norm())
        assert ratio == pytest.approx(factors[name], abs=1e-6)
    for alpha, beta, expected in ((1.0, 0.0, there), (0.0, 0.0, start)):
        interpolate(into, start, there, linear_in_depth(model, alpha, beta))
        assert all(torch.equal(into[name], expected[name]) for name in into)
    live = weights(end)
    interpolate(live, start, live, factors)  # in place, no third set
    interpolate(into, start, weights(moved(model)), factors)
    assert all(torch.equal(live[name], into[name]) for name in into)


def test_slopes_are_the_derivatives_by_the_shares():
    """Against central differences of the loss, in float64."""
    model = mlp(6, [5, 5, 5], 3).double()
    start, end = weights(model), weights(moved(model, size=0.3))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, blocks = torch.arange(8) % 3, block_of(model)
    live = dict(model.named_parameters())
    start = {name: p.clone() for name, p in start.items()}

    def loss(shares):
        chosen = {name: 0.4 if number is None else shares[number] for name, number in blocks.items()}
        interpolate(live, start, end, chosen)
        return nn.functional.cross_entropy(model(x), y)

    at = [0.2, 0.5, 0.9]
    grads = dict(zip(live, torch.autograd.grad(loss(at), list(live.values())), strict=True))
    found = slopes(grads, start, end, blocks, 3)
    for k in range(3):
        up, down = ([a + sign * 1e-5 * (i == k) for i, a in enumerate(at)] for sign in (1, -1))
        assert float(found[k]) == pytest.approx(float((loss(up) - loss(down)).detach()) / 2e-5, rel=1e-6, abs=1e-9)


def test_merging_by_depth():
    """A plain sum has the L1 ratio 1, so alpha is 1/T: the first block is that of the averaged weights, whatever beta is."""
    model = mlp(6, [5, 5, 5], 3)
    start = {name: p.clone() for name, p in weights(model).items()}
    ends = [weights(moved(model, seed)) for seed in range(3)]
    tasks = [changes(start, end) for end in ends]
    merged = copy.deepcopy(model)
    assert merge(merged, tasks, beta=0.5) == pytest.approx(1 / 3, abs=1e-6)
    for name, p in merged.named_parameters():
        mean = sum(end[name] for end in ends) / 3
        if name.startswith("body.1."):
            torch.testing.assert_close(p, mean, atol=1e-6, rtol=1e-6)
        if name.startswith(("body.5.", "head.")):  # the last block, and what comes after it
            whole = start[name] + (1 / 3 + 0.5) * sum(task[name] for task in tasks)
            torch.testing.assert_close(p, whole, atol=1e-6, rtol=1e-6)


def test_the_ratio_of_l1_norms():
    """By hand: |sum|_1 = |3| + |-1| + |4| = 8 against |merged|_1 = 2 + 0 + 2; half of 2 for two models."""
    tasks = [{"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([4.0])}, {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([0.0])}]  # fmt: skip
    half = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([2.0])}
    assert l1_ratio(tasks, half) == 8 / 4 / 2
    assert l1_ratio(tasks, {name: 2 * t for name, t in half.items()}) == 8 / 8 / 2  # of another scale, the other way
    model = mlp(6, [5], 3)
    tau = changes(weights(model), weights(moved(model)))
    merged = copy.deepcopy(model)
    assert merge(merged, [tau], 0.0, {name: 4 * t for name, t in tau.items()}) == pytest.approx(0.25)
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p, weights(model)[name] + tau[name])


def test_what_cannot_be_merged():
    model = mlp(6, [5], 3)
    zero = changes(weights(model), weights(model))
    for tasks, merged, match in (([], None, "no changes"), ([zero], None, "zero everywhere"), ([zero], {}, "architecture")):  # fmt: skip
        with pytest.raises(BadInput, match=match):
            merge(model, tasks, 0.0, merged)
