"""Weights drawn anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.models import cnn, mlp
from remanence.nn.anatomy import reinitialised


@pytest.mark.parametrize("make", [lambda: mlp(64, [16], 3, norm=True), lambda: cnn((1, 8, 8), [4], 3)])
def test_every_weight_is_drawn_anew_and_by_its_seed(make):
    model, draws = make(), torch.random.get_rng_state()
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value += 7
    one, again, other = (reinitialised(model, seed) for seed in (1, 1, 2))
    assert torch.equal(draws, torch.random.get_rng_state())
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]) and (value < 6).all()
    assert not torch.equal(one.head.weight, other.head.weight) and not torch.equal(one.head.weight, model.head.weight)


def test_a_module_that_cannot_is_refused_by_name():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))

    with pytest.raises(BadInput, match=r"inner\.1.*reset_parameters"):
        reinitialised(nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 2), Token())}), 0)
