"""Where things are in a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput, UnknownName
from remanence.models import cnn, mlp
from remanence.nn.anatomy import (
    evaluating,
    features,
    head,
    head_name,
    module_bytes,
    norm_modules,
    replace_module,
    tensor_bytes,
    weighted_modules,
)


class Named(nn.Module):
    """A model whose output layer has the name given and is not the last one defined."""

    def __init__(self, name: str, last: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.body = nn.Linear(4, 3)
        setattr(self, name, last)
        self.extra = nn.Linear(2, 9)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(self.body(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["head", "fc", "classifier", "lm_head"])
def test_the_head_is_found_by_its_usual_names(name: str) -> None:
    model = Named(name, nn.Linear(3, 2))
    assert head_name(model) == name and head(model) is getattr(model, name)
    deep = Named(name, nn.Sequential(nn.Dropout(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert head_name(deep) == f"{name}.3"


def test_else_it_is_the_last_linear_layer() -> None:
    assert head_name(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Softmax(1))) == "2"
    assert head_name(nn.Linear(2, 2)) == ""
    with pytest.raises(BadInput, match="no linear layer"):
        head_name(nn.Conv2d(1, 1, 1))


def test_features_are_the_heads_input() -> None:
    model, x = Named("fc", nn.Linear(3, 2)), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(features(model, x), model.body(x).relu()) and not model.fc._forward_pre_hooks  # type: ignore[operator, union-attr]
    image = cnn((1, 8, 8), [2], 3)
    assert features(image, torch.zeros(2, 1, 8, 8)).shape == (2, 2 * 4 * 4)


def test_kinds_of_modules() -> None:
    model = mlp(4, [3], 2, norm=True)
    assert list(weighted_modules(model)) == ["body.1", "body.2", "head"] and list(norm_modules(model)) == ["body.2"]
    assert list(
        norm_modules(
            nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.BatchNorm2d(2, affine=False), nn.Linear(1, 1))
        )
    ) == ["0", "1", "2"]


def test_replacing() -> None:
    model, new = mlp(4, [3], 2), nn.Linear(4, 3)
    assert replace_module(model, "body.1", new) is model and model.body[1] is new  # type: ignore[index]
    assert replace_module(model, "", new) is new
    with pytest.raises(UnknownName, match=r"did you mean 'body\.1'"):
        replace_module(model, "body.11", new)


def test_evaluating_restores_every_modules_own_flag() -> None:
    model = mlp(4, [3], 2, norm=True, dropout=0.5)
    model.body[2].eval()  # type: ignore[index, operator]
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()


def test_bytes_count_shared_storage_once() -> None:
    tensor = torch.zeros(10, dtype=torch.float64)
    assert tensor_bytes([tensor, tensor, tensor[:5], torch.zeros(3, dtype=torch.int8)]) == 80 + 3
    assert tensor_bytes([tensor[:2], tensor]) == 80
    assert tensor_bytes([torch.zeros(0), torch.zeros(0)]) == 0
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert module_bytes(tied) == 36
    assert module_bytes(nn.BatchNorm1d(3)) == 4 * 3 * 4 + 8
