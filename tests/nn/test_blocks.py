"""Where the blocks and their feed-forward layers are found, and the lasso over groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence.models import cnn, mlp, vit
from remanence.nn.blocks import feed_forward, group_lasso


class Encoder(nn.Module):
    """torch's own blocks: self_attn holds a linear layer, too, and linear1 and linear2 stand beside it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)


class Nested(nn.Module):
    """Attention inside attention, its output layer beside the inner one, as some libraries build it."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"q": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
        attention = nn.ModuleDict({"attention": inner, "output": nn.Linear(4, 4)})
        block = {"attention": attention, "intermediate": nn.Linear(4, 8), "output": nn.Linear(8, 4)}
        self.layer = nn.ModuleList([nn.ModuleDict(block)])
        self.head = nn.Linear(4, 2)


def test_blocks_of_transformers():
    found = feed_forward(Encoder())
    assert found == {
        f"encoder.layers.{k}": [f"encoder.layers.{k}.linear1", f"encoder.layers.{k}.linear2"] for k in (0, 1)
    }
    assert feed_forward(Nested()) == {"layer.0": ["layer.0.intermediate", "layer.0.output"]}
    assert len(feed_forward(vit(64, patch=4, width=8, depth=3, heads=2, outputs=2))) == 3


def test_without_attention_every_hidden_linear_layer_is_a_group():
    assert feed_forward(mlp(6, [5, 4], 3)) == {"body.1": ["body.1"], "body.3": ["body.3"]}
    assert feed_forward(mlp(6, [], 3)) == {} and feed_forward(cnn((1, 8, 8), [4], 3)) == {}


def test_group_lasso():
    a, b, zero = torch.tensor([3.0]), torch.tensor([[0.0, 4.0]]), torch.zeros(3, requires_grad=True)
    assert float(group_lasso([[a, b]])) == pytest.approx(5.0)
    assert float(group_lasso([[a], [b]])) == pytest.approx(7.0)
    group_lasso([[zero], [a]]).backward()
    assert torch.equal(zero.grad, torch.zeros(3))  # not NaN


def test_group_lasso_pulls_along_the_group():
    a, b = (torch.randn(4, requires_grad=True) for _ in range(2))
    group_lasso([[a, b]]).backward()
    size = torch.cat([a, b]).norm()
    torch.testing.assert_close(a.grad, a.detach() / size)
    torch.testing.assert_close(b.grad, b.detach() / size)
