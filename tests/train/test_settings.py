"""Settings: checked when made, and the optimizer they build."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from remanence.core.errors import BadInput, UnknownName
from remanence.train.settings import OPTIMIZERS, Settings


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def test_the_optimizer_has_the_rate_and_the_arguments_given() -> None:
    made = Settings(optimizer={"sgd": {"momentum": 0.9}}, lr=0.25).build(parameters())
    assert isinstance(made, torch.optim.SGD) and made.defaults["momentum"] == 0.9 and made.defaults["lr"] == 0.25
    for name, cls in OPTIMIZERS.items():
        assert type(Settings(optimizer=name).build(parameters())) is cls
    own = {"params": parameters(), "lr": 7.0}
    assert Settings(lr=0.5).build([own]).param_groups[0]["lr"] == 7.0
    assert Settings(lr=0.5).build(parameters(), lr=2.0, optimizer="adam").param_groups[0]["lr"] == 2.0


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"epochs": -1}, BadInput, "epochs=-1"),
        ({"batch_size": 0}, BadInput, "batch_size=0"),
        ({"lr": float("nan")}, BadInput, "lr=nan"),
        ({"lr": "fast"}, BadInput, "wrong type"),
        ({"epochs": True}, BadInput, "wrong type"),
        ({"accumulate": 0}, BadInput, "accumulate=0"),
        ({"clip": -1.0}, BadInput, "clip"),
        ({"schedule": "cosin"}, UnknownName, "cosine"),
        ({"optimizer": "adan"}, UnknownName, "did you mean 'adam'"),
        ({"optimizer": {"sgd": {"momentun": 0.9}}}, UnknownName, "did you mean 'momentum'"),
        ({"optimizer": {"sgd": {"momentum": -1.0}}}, BadInput, "optimizer sgd"),
        ({"optimizer": {"adam": {"betas": 3}}}, BadInput, "optimizer adam"),
    ],
)
def test_what_cannot_train_is_refused_when_made(knobs: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Settings(**knobs)


def test_a_list_of_betas_from_a_plan_is_as_good_as_a_tuple() -> None:
    weights = [parameters(), parameters()]
    for mine, betas in zip(weights, ((0.5, 0.9), [0.5, 0.9]), strict=True):
        optimizer = Settings(optimizer={"adamw": {"betas": betas}}, lr=0.1).build(mine)
        mine[0].grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(weights[0][0], weights[1][0])
