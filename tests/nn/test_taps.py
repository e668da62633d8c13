"""Taps on layers, and attention maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput, UnknownName
from remanence.models import cnn, mlp
from remanence.nn.taps import attention_distance, attention_map, hidden_layers, taps


def test_taps_take_what_a_layer_gives_and_leave_no_hook():
    model, x = mlp(6, [5, 4], 2), torch.randn(3, 6)
    names = hidden_layers(model)
    assert [type(model.get_submodule(name)) for name in names] == [nn.ReLU, nn.ReLU]
    with taps(model, names) as seen:
        out = model(x)
        assert torch.equal(seen[names[1]], model.body(x)) and torch.equal(model.head(seen[names[1]]), out)
        seen[names[0]].sum().backward()
        assert model.body[1].weight.grad is not None
        model(x[:1])
        assert len(seen[names[0]]) == 1
    before = seen[names[0]]
    model(x)
    assert seen[names[0]] is before and not any(m._forward_hooks for m in model.modules())


def test_layers_where_no_module_is_an_activation():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second, self.head = (
                nn.Linear(3, 4),
                nn.LayerNorm(4),
                nn.Linear(4, 4),
                nn.Linear(4, 1),
            )

    assert hidden_layers(Plain()) == ["first", "second"]
    assert hidden_layers(nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.Linear(3, 1))) == ["1"]
    assert len(hidden_layers(cnn((1, 8, 8), [4, 4], 2))) == 2


def test_wrong_layers_are_refused():
    model = mlp(6, [5], 2)
    with pytest.raises(UnknownName, match="did you mean 'body"), taps(model, ["bodi"]):
        pass
    pair = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(BadInput, match="tuple"), taps(pair, ["0"]):
        pair(torch.randn(2, 5, 3))
    assert not any(m._forward_hooks for m in (*model.modules(), *pair.modules()))


@pytest.mark.parametrize(("shape", "places"), [((4, 3, 5, 6), 30), ((4, 7, 3), 7), ((4, 9), 9)])
def test_maps_of_every_shape(shape, places):
    a = torch.randn(shape)
    found = attention_map(a)
    assert found.shape == (4, places) and (found >= 0).all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(attention_map(-3.7 * a), found)
    assert not attention_map(torch.zeros(shape)).any()
    other = torch.randn(shape)
    torch.testing.assert_close(attention_distance(a, other), (found - attention_map(other)).pow(2).mean(1))
    assert not attention_distance(a, a).any()
    with pytest.raises(BadInput, match="attention maps"):
        attention_map(torch.randn(3))


def test_a_map_by_hand():
    image = torch.zeros(1, 2, 1, 2)
    image[0, :, 0, 0], image[0, :, 0, 1] = torch.tensor([1.0, 7.0]), torch.tensor([5.0, 5.0])  # squares 25 and 25
    torch.testing.assert_close(attention_map(image), torch.full((1, 2), 0.5**0.5))
    sequence = torch.tensor([[[3.0, 1.0], [1.0, 1.0], [0.0, 0.0]]])  # squares 5, 1, 0
    torch.testing.assert_close(attention_map(sequence), torch.tensor([[5.0, 1.0, 0.0]]) / 26**0.5)
