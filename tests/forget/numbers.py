"""A regression whose forgotten part is or is not to be guessed from the rest, and runs of forgetters on it without a life."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from remanence.core.ids import Ids
from remanence.core.problem import Regression
from remanence.data import Examples, Request
from remanence.learn.finetune import Finetune
from remanence.models import mlp
from remanence.train.loop import forget, learn
from remanence.train.roles import Forgetter, Owner
from remanence.train.settings import Settings
from remanence.train.update import Update

Sets = dict[str, Examples]


@lru_cache
def _made(seed: int, guessable: bool) -> Sets:
    x = 2 * torch.rand(2000, 5, generator=torch.Generator().manual_seed(seed)) - 1
    smooth = 3 * x[:, 0] + torch.sin(4 * x[:, 1])
    data = Examples({"x": x, "y": (smooth + 3 * (x[:, 2] > 0.6))[:, None]}, "numbers")
    gone = Ids(data.id[smooth < -2 if guessable else x[:, 2] > 0.6].numpy())
    return {"task": data, "seen": data, "forget": data.only(gone), "retain": data.without(gone)}


def sets(seed: int = 0, guessable: bool = False) -> Sets:
    """y = 3 x_0 + sin(4 x_1) + 3 [x_2 > 0.6] on [-1, 1]^5. Asked for: the rows with the step, or (`guessable`) those whose smooth part is
    below -2."""
    return dict(_made(seed, guessable))


def update(model: nn.Module, owner: Owner, data: Sets, kind: str, seed: int = 0, **settings: Any) -> Update:
    return Update(model=model, problem=Regression(), owner=owner, settings=Settings(**settings), data=data.__getitem__, seed=seed,
                  event=f"{kind}/1", kind=kind)  # fmt: skip


@lru_cache
def _model(seed: int, guessable: bool, only: str, draw: int) -> nn.Module:
    model = mlp(5, [64, 64], 1, seed=draw)
    data = {"task": sets(seed, guessable)[only]}
    learn(update(model, Finetune(), data, "learn", draw, epochs=40, batch_size=64, optimizer="adam", lr=2e-3))
    return model


def model(seed: int = 0, guessable: bool = False) -> nn.Module:
    """A network that learned all of `sets`."""
    return copy.deepcopy(_model(seed, guessable, "seen", seed))


def retrained(seed: int = 0, guessable: bool = False) -> nn.Module:
    """One with other first weights that learned the retained rows only."""
    return copy.deepcopy(_model(seed, guessable, "retain", seed + 100))


def forgotten(start: nn.Module, by: Forgetter, data: Sets, seed: int = 0, **settings: Any) -> nn.Module:
    """A copy of `start` after `by` forgot ``data["forget"]``."""
    made = copy.deepcopy(start)
    u = update(made, by, data, "forget", seed, **{**by.defaults, **settings})
    forget(u, Request(ids=data["forget"].ids if len(data["forget"]) else [0]))
    return made


def answers(made: nn.Module, examples: Examples) -> torch.Tensor:
    with torch.no_grad():
        return made.eval()(examples["x"])


def absolute_error(made: nn.Module, examples: Examples) -> float:
    return float((answers(made, examples) - examples["y"]).abs().mean())
