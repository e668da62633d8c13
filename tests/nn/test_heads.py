"""Growing heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.models import mlp
from remanence.nn.heads import empty_linear, grow_head


def test_old_rows_keep_their_bits_and_old_outputs_their_values() -> None:
    model = mlp(4, [8], 3)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight, bias, before = model.head.weight.clone(), model.head.bias.clone(), model(x)
    grown = grow_head(model, 2, seed=5)
    assert grown is model and model.head.out_features == 5
    assert torch.equal(model.head.weight[:3], weight) and torch.equal(model.head.bias[:3], bias)
    torch.testing.assert_close(model(x)[:, :3], before)


def test_new_rows_are_drawn_as_a_linear_layers_by_seed_and_width_alone() -> None:
    state = torch.random.get_rng_state()
    heads = [grow_head(mlp(100, [], 2, seed=net), 400, seed).head for net, seed in ((0, 1), (7, 1), (0, 2))]
    assert torch.equal(heads[0].weight[2:], heads[1].weight[2:]) and not torch.equal(
        heads[0].weight[2:], heads[2].weight[2:]
    )
    new = heads[0].weight[2:].detach()
    assert float(new.abs().max()) <= 0.1 and abs(float(new.mean())) < 0.002  # uniform in +-1/sqrt(100)
    assert (
        float(new.std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)
        and float(heads[0].bias[2:].detach().abs().max()) <= 0.1
    )
    assert torch.equal(state, torch.random.get_rng_state())
    once, twice = grow_head(mlp(5, [], 2), 1, 3), grow_head(grow_head(mlp(5, [], 2), 1, 3), 1, 3)
    assert torch.equal(twice.head.weight[:3], once.head.weight) and not torch.equal(
        twice.head.weight[2], twice.head.weight[3]
    )


def test_a_head_may_start_with_no_rows_and_keeps_dtype_mode_bias_and_flags() -> None:
    model = mlp(4, [3]).double().eval()
    assert model(torch.zeros(2, 4, dtype=torch.float64)).shape == (2, 0)
    grow_head(model, 2, 0)
    assert model.head.weight.dtype == torch.float64 and not model.head.training
    plain = nn.Sequential(nn.Linear(3, 2, bias=False))
    plain[0].weight.requires_grad_(False)
    assert grow_head(plain, 1, 0)[0].bias is None and not plain[0].weight.requires_grad  # type: ignore[index]
    assert grow_head(nn.Linear(3, 2), 1, 0).out_features == 3
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert not any(p.requires_grad for p in grow_head(frozen, 1, 0).parameters())


def test_a_head_that_is_not_linear_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv1d(1, 1, 1)

    with pytest.raises(BadInput, match="Conv1d"):
        grow_head(Odd(), 1, 0)


def test_an_empty_layer_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    assert empty_linear(3, 0).weight.shape == (0, 3) and empty_linear(3, 2, bias=False).bias is None
    assert torch.equal(state, torch.random.get_rng_state())
