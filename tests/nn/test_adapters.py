"""Low-rank adapters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from remanence.core.rng import generator
from remanence.models import mlp
from remanence.nn.adapters import LowRank, add_low_rank


def test_nothing_changes_until_b_moves_then_it_is_the_formula() -> None:
    base, rng = nn.Linear(6, 4), torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, generator=rng)
    layer = LowRank(base, rank=2, alpha=3.0, rng=rng)
    assert torch.equal(layer(x), base(x)) and layer.down.shape == (2, 6) and layer.up.shape == (4, 2)
    assert float(layer.down.detach().abs().max()) <= 6**-0.5
    with torch.no_grad():
        layer.up.copy_(torch.randn(4, 2, generator=rng))
    expected = x @ (base.weight + 1.5 * layer.up @ layer.down).T + base.bias
    torch.testing.assert_close(layer(x), expected)
    values = layer(x)
    merged = copy.deepcopy(layer).merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), values)


def test_every_layer_draws_by_its_own_name() -> None:
    state = torch.random.get_rng_state()
    both = add_low_rank(mlp(6, [6, 6], 2), ["body.1", "body.3"], 2, 1.0, seed=4)
    one = add_low_rank(mlp(6, [6, 6], 2, seed=9), ["body.3"], 2, 1.0, seed=4)
    assert torch.equal(both.body[3].down, one.body[3].down) and not torch.equal(both.body[1].down, both.body[3].down)
    assert torch.equal(state, torch.random.get_rng_state())
    assert isinstance(both.body[1], LowRank) and isinstance(both.head, nn.Linear)


def test_dtype_follows_the_base() -> None:
    layer = LowRank(nn.Linear(3, 2).double(), 1, 1.0, generator(0, "x"))
    assert (
        layer.down.dtype == layer.up.dtype == torch.float64
        and layer(torch.zeros(1, 3, dtype=torch.float64)).dtype == torch.float64
    )
