"""Sparse chains: exact counts, a constant density, and no way from a free unit into one that is taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.models import cnn, mlp, resnet18
from remanence.nn.aging import (
    SparseConv2d,
    SparseLinear,
    chain,
    is_sparse,
    older,
    open_entries,
    redraw,
    rewire,
    sparsify,
    spread,
    take,
    through,
    top_units,
)
from remanence.nn.anatomy import features, reinitialised
from remanence.nn.taps import taps


class Mixed(nn.Module):
    """Convolutions, then linear layers: one unit is a block of the inputs of the third layer."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Flatten(),
                nn.Linear(6 * 4, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.2),
                nn.Linear(10, 8), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def network(kind):
    made = {"mlp": lambda: mlp(64, [20, 16, 12], 3, seed=1), "cnn": lambda: cnn((1, 8, 8), [8, 8], 3), "mixed": Mixed}
    return made[kind]().eval()


def sparse(kind, pruned=0.6):
    model = network(kind)
    sparsify(model, pruned, 5)
    return model


def inputs(kind, n=6):
    shape = (n, 64) if kind == "mlp" else (n, 1, 8, 8)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def drawn(links, seed):
    """Units taken at random, by one event or another."""
    rng = torch.Generator().manual_seed(seed)
    for link in links:
        link.sparse.born.copy_(torch.randint(-1, 2, (link.units,), generator=rng))
        link.sparse.born[:4] = torch.tensor([-1, 1, -1, 0])


KINDS = ("mlp", "cnn", "mixed")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_network_is_the_dense_one_with_weights_at_zero(kind):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    model, dense = sparse(kind), network(kind)
    assert torch.equal(torch.get_rng_state(), before)
    links, plain = chain(model), chain(dense)
    assert is_sparse(links) and not is_sparse(plain) and [a.name for a in links] == [b.name for b in plain]
    for number, (link, old) in enumerate(zip(links, plain, strict=True)):
        kept = link.sparse.kept
        whole = number == 0 and isinstance(link.layer, SparseConv2d)
        assert int((~kept).sum()) == (0 if whole else round(0.6 * kept.numel()))
        with torch.no_grad():
            old.layer.weight[~kept] = 0
        assert torch.equal(link.layer.weight, old.layer.weight) and bool((link.sparse.born == -1).all())
    assert torch.equal(model(inputs(kind)), dense(inputs(kind)))
    loss = model(inputs(kind)).square().sum()
    loss.backward()
    assert all(not link.layer.weight.grad[~link.sparse.kept].any() for link in links)
    assert all(link.layer.weight.grad[link.sparse.kept].any() for link in links)


def test_a_layer_that_is_frozen_from_the_start_is_given_whole():
    model = network("mixed")
    chain(model)[1].layer.requires_grad_(False)
    sparsify(model, 0.6, 5)
    links = chain(model)
    assert links[1].sparse.kept.all() and not links[1].sparse.born.any() and not links[1].layer.weight.requires_grad
    drop = [links[i].sparse.kept.all() for i in (2, 3)]
    assert not any(drop) and (links[2].sparse.born == -1).all()
    take(links, [torch.ones(link.units) for link in links], 0.5, 1)
    assert not links[1].sparse.born.any() and (links[2].sparse.born == 1).any()


def test_it_can_be_copied_drawn_anew_and_saved():
    model = sparse("mixed")
    assert torch.equal(copy.deepcopy(model)(inputs("mixed")), model(inputs("mixed")))
    other = network("mixed")
    sparsify(other, 0.2, 9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs("mixed")), model(inputs("mixed")))
    fresh = reinitialised(model, 3)
    assert torch.equal(chain(fresh)[2].sparse.kept, chain(model)[2].sparse.kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_drop_and_grow(kind, seed):
    model = sparse(kind)
    links = chain(model)
    drawn(links, seed)
    before = [link.sparse.kept.clone() for link in links]
    weights = [link.layer.weight.detach().clone() for link in links]
    lacking, moved, lost = rewire(links, torch.Generator().manual_seed(seed)), 0, 0
    for link, above, old, weight in zip(links, [None, *links], before, weights, strict=False):
        kept, free = link.sparse.kept, link.sparse.born < 0
        idle = spread(above.sparse.born < 0, kept.shape[1]) if above else torch.zeros(kept.shape[1], dtype=torch.bool)
        dropped, grown = old & ~kept, kept & ~old
        assert torch.equal(dropped, old & ~free[:, None] & idle)
        assert not grown[~free].any() and not link.layer.weight[dropped | grown].any()
        assert torch.equal(link.layer.weight[old & kept], weight[old & kept])
        moved, lost = moved + int(grown.sum()), lost + int(dropped.sum()) - int(grown.sum())
    assert lost == lacking and moved > 0
    if kind == "mlp":  # where there is room for all
        assert [int(link.sparse.kept.sum()) for link in links] == [int(old.sum()) for old in before]


def test_where_no_place_is_left_it_says_so():
    model = sparse("mlp", pruned=0.1)
    links = chain(model)
    links[0].sparse.born[10:] = 0
    links[1].sparse.born[:-1] = 0
    count = sum(int(link.sparse.kept.sum()) for link in links)
    lacking = rewire(links, torch.Generator().manual_seed(0))
    assert lacking > 0 and sum(int(link.sparse.kept.sum()) for link in links) == count - lacking
    assert links[1].sparse.kept[-1].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_free_unit_moves_no_unit_that_is_taken(kind, seed):
    model = sparse(kind)
    links = chain(model)
    drawn(links, seed)
    x = inputs(kind)
    names = [link.relu for link in links]

    def outputs():
        with taps(model, names) as taken, torch.no_grad():
            model(x)
        return [taken[name].clone() for name in names]

    def shake():
        before = outputs()
        for link in links:
            free = link.sparse.born < 0
            with torch.no_grad():
                link.layer.weight[free] += 1.0
        after = outputs()
        return [
            (float((a - b)[:, link.sparse.born >= 0].abs().max()), float((a - b)[:, link.sparse.born < 0].abs().max()))
            for a, b, link in zip(before, after, links, strict=True)
        ]

    assert max(taken for taken, _ in shake()[1:]) > 1e-3
    rewire(links, torch.Generator().manual_seed(seed))
    found = shake()
    assert all(taken == 0 for taken, _ in found) and all(free > 0 for _, free in found)


def test_the_most_active_units_up_to_a_share():
    activity = torch.tensor([1.0, 0.0, 5.0, 3.0, 1.0])
    for share, expected in (
        (0.0, [2]),
        (0.5, [2]),
        (0.51, [2, 3]),
        (0.8, [2, 3]),
        (0.9, [0, 2, 3]),
        (1.0, [0, 2, 3, 4]),
    ):
        assert top_units(activity, share).nonzero()[:, 0].tolist() == expected
    assert top_units(torch.zeros(3), 0.7).sum() == 1


def test_only_units_of_no_earlier_event_are_taken():
    links = chain(sparse("mlp"))
    links[0].sparse.born[:4] = torch.tensor([0, 1, 2, 2])
    activity = [torch.ones(link.units) for link in links]
    activity[0] = torch.tensor([9.0, 0.0, 9.0, 0.0, 9.0] + [0.0] * 15)
    take(links, activity, 0.99, 2)
    assert links[0].sparse.born.tolist() == [0, 1, 2, -1, 2] + [-1] * 15
    assert older(links[0], 2).tolist() == [True, True] + [False] * 18


@pytest.mark.parametrize("kind", KINDS)
def test_open_entries_leave_frozen_units_alone(kind):
    """Whatever moves in the open entries, units that read frozen units only give the same."""
    model = sparse(kind)
    links = chain(model)
    for link in links:
        link.sparse.born[::2] = 0
    rewire(links, torch.Generator().manual_seed(0))
    masks = open_entries(links, [older(link, 1) for link in links])
    params, x = dict(model.named_parameters()), inputs(kind)
    assert set(masks) | {"head.weight", "head.bias"} == set(params)
    before = features(model, x)
    with torch.no_grad():
        for name, mask in masks.items():
            params[name] += mask * 0.7
    after = features(model, x)
    same = spread(links[-1].sparse.born >= 0, before.shape[1])
    assert torch.equal(before[:, same], after[:, same]) and not torch.equal(before[:, ~same], after[:, ~same])


def test_free_units_are_drawn_anew():
    model = mlp(400, [300, 200], seed=0)
    sparsify(model, 0.5, 0)
    links = chain(model)
    links[0].sparse.born[:100] = 0
    before = links[0].layer.weight.detach().clone()
    redraw(links, torch.Generator().manual_seed(0))
    weight, kept = links[0].layer.weight, links[0].sparse.kept
    assert torch.equal(weight[:100], before[:100]) and not weight[~kept].any()
    values = weight.detach()[100:][kept[100:]]
    assert abs(float(values.var()) * 400 / 2 - 1) < 0.03 and not links[0].layer.bias[100:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_the_middle_join_on_the_way(kind):
    model, x = sparse(kind), inputs(kind)
    for number in range(len(chain(model))):
        a, h = through(model, number, x)
        assert torch.equal(h, features(model, x))
        joined = through(model, number, x[:2], a[2:])[1]
        torch.testing.assert_close(joined, h)


def test_other_networks_are_refused():
    for model, says in (
        (resnet18((1, 8, 8), outputs=3), "chain"),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), "GELU"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "ReLU"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)), "LayerNorm"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "reads 6"),
        (nn.Sequential(nn.Linear(4, 2)), "no hidden layer"),
    ):
        with pytest.raises(BadInput, match=says):
            chain(model)
    assert [type(link.layer) for link in chain(sparse("mixed"))] == [SparseConv2d] * 2 + [SparseLinear] * 2
