"""The training loop against bare loops: finetuning, replay and EWC on digits and MNIST.

    python -m bench.loop [--rounds 15]

A run is a whole life at the level of `learn_event`: 5 tasks x 2 classes, one epoch each, MLP d-256-256-10, fused SGD,
batch 64, on preloaded tensors. The bare loops are what a careful engineer writes for the same thing: whole tensors, one
gather per batch, no books. Both sides must end in the same weights, bit for bit, or the benchmark stops.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import Row, Side, Times, interleave, network, quartiles, ratio, ratio_row, save, streams, timed
from remanence import Life
from remanence.core.problem import Classification
from remanence.core.rng import generator
from remanence.data import Stream
from remanence.life.events import Recipe, learn_event
from remanence.life.state import State
from remanence.nn.fisher import diagonal_fisher
from remanence.train.loop import learn
from remanence.train.resolve import resolve, resolve_all
from remanence.train.roles import Keeper, Learner
from remanence.train.settings import Settings
from remanence.train.update import Update

LR, BATCH, PER_CLASS, STRENGTH = 0.1, 64, 20, 100.0
SETTINGS = {"epochs": 1, "batch_size": BATCH, "optimizer": "sgd", "lr": LR}
REPLAY = {"replay": {"per_class": PER_CLASS, "batch_size": BATCH, "policy": "class-balanced"}}
EWC = {"ewc": {"strength": STRENGTH}}
PROBLEM = Classification(classes=list(range(10)))


# ------------------------------------------------------------------------------------------------- our side


def ours(stream: Stream, keep: Any = (), ends: dict[str, nn.Module] | None = None) -> Side:
    """Every task through `learn_event`, as a life and its references do."""

    def prepare() -> Callable[[], object]:
        state = State(network(stream), resolve("learn", "finetune", Learner), resolve_all("keep", keep, Keeper))

        def run() -> None:
            history: list[Any] = []
            for number, task in enumerate(stream):
                learn_event(state, task, Recipe(number, SETTINGS), problem=PROBLEM, seed=0, history=history)
                history.append(task.train)
            if ends is not None:
                ends["ours"] = state.model

        return run

    return prepare


def a_life(stream: Stream, folder: Path) -> Side:
    """Every task through `Life.learn`: measured, with ledger and snapshots."""
    count = iter(range(10**6))

    def prepare() -> Callable[[], object]:
        life = Life(network(stream), problem=PROBLEM, home=folder / str(next(count)))

        def run() -> None:
            for task in stream:
                life.learn(task, epochs=1, batch_size=BATCH, optimizer="sgd", lr=LR)
            life.close()

        return run

    return prepare


# ------------------------------------------------------------------------------------------------- bare loops


def order_of(number: int, rows: int) -> Tensor:
    """The order of task `number` that our loop draws."""
    return torch.randperm(rows, generator=generator(0, f"learn/{number}", "", "order", 0))


def bare(stream: Stream, ends: dict[str, nn.Module] | None = None) -> Side:
    def prepare() -> Callable[[], object]:
        model = network(stream)
        data = [(task.train["x"], task.train["y"]) for task in stream]

        def run() -> None:
            model.train()
            for number, (x, y) in enumerate(data):
                optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
                for rows in order_of(number, len(x)).split(BATCH):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x[rows]), y[rows])
                    loss.backward()
                    optimizer.step()
            if ends is not None:
                ends["bare"] = model

        return run

    return prepare


def bare_replay(stream: Stream, uniform: bool = False, ends: dict[str, nn.Module] | None = None) -> Side:
    """`PER_CLASS` rows of every class stay, as many of each class as can be are drawn for every batch.

    uniform: draw without regard to classes, the least that a replay loop can do.
    """

    def prepare() -> Callable[[], object]:
        model = network(stream)
        data = [(task.train["x"], task.train["y"]) for task in stream]
        kept = [[(y == label).nonzero()[:, 0] for label in y.unique()] for _, y in data]

        def run() -> None:
            model.train()
            old_x, old_y = data[0][0][:0], data[0][1][:0]
            for number, (x, y) in enumerate(data):
                optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
                draws = generator(0, f"learn/{number}", "", "replay", 0)
                for rows in order_of(number, len(x)).split(BATCH):
                    batch_x, batch_y = x[rows], y[rows]
                    if len(old_y):
                        drawn = torch.randperm(len(old_y), generator=draws)
                        drawn = drawn[:BATCH] if uniform else balanced(drawn, old_y, draws)
                        batch_x, batch_y = torch.cat([batch_x, old_x[drawn]]), torch.cat([batch_y, old_y[drawn]])
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(batch_x), batch_y)
                    loss.backward()
                    optimizer.step()
                chosen = torch.cat([rows[torch.randperm(len(rows), generator=draws)[:PER_CLASS]] for rows in kept[number]])
                old_x, old_y = torch.cat([old_x, x[chosen]]), torch.cat([old_y, y[chosen]])
            if ends is not None:
                ends["bare"] = model

        return run

    return prepare


def balanced(drawn: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    """`BATCH` of the shuffled row numbers `drawn`, as many of each class as can be, in random order."""
    labels = y[drawn]
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(drawn)
    rank[by_class] = torch.arange(len(drawn)) - first[labels[by_class]]
    chosen = drawn[rank.argsort(stable=True)[:BATCH]]
    return chosen[torch.randperm(len(chosen), generator=draws)]


def bare_ewc(stream: Stream, ends: dict[str, nn.Module] | None = None) -> Side:
    """One anchor and one summed Fisher; the Fisher itself is computed as ours is."""

    def prepare() -> Callable[[], object]:
        model = network(stream)
        data = [(task.train["x"], task.train["y"]) for task in stream]

        def run() -> None:
            model.train()
            params = list(model.parameters())
            named = dict(model.named_parameters())
            anchor: list[Tensor] = []
            stiff: list[Tensor] = []
            for number, (x, y) in enumerate(data):
                optimizer = torch.optim.SGD(params, lr=LR, fused=True)
                for rows in order_of(number, len(x)).split(BATCH):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x[rows]), y[rows])
                    loss.backward()
                    if anchor:
                        with torch.no_grad():
                            away = torch._foreach_sub(params, anchor)
                            torch._foreach_mul_(away, STRENGTH)
                            torch._foreach_addcmul_([p.grad for p in params], away, stiff)
                    optimizer.step()
                batches = ({"x": a, "y": b} for a, b in zip(x.split(256), y.split(256), strict=True))
                fisher = list(diagonal_fisher(model, PROBLEM, batches, named, "empirical", torch.arange(10)).values())
                if anchor:
                    torch._foreach_add_(fisher, stiff)
                anchor, stiff = [p.detach().clone() for p in params], fisher
            if ends is not None:
                ends["bare"] = model

        return run

    return prepare


# ------------------------------------------------------------------------------------------------- EWC by task


def ewc_by_task(stream: Stream, rounds: int) -> list[list[tuple[Times, Times]]]:
    """Per task, `rounds` pairs: the steps alone (no Fisher) of our loop under EWC, and of the bare loop without it."""
    found: list[list[tuple[Times, Times]]] = [[] for _ in stream]
    for number in range(2 + rounds):
        state = State(network(stream), resolve("learn", "finetune", Learner), resolve_all("keep", EWC, Keeper))
        model = network(stream)
        for at, task in enumerate(stream):
            pair: dict[str, Times] = {}
            for side in ("ours", "bare") if number % 2 else ("bare", "ours"):
                pair[side] = timed(_ewc_steps(state, task) if side == "ours" else _bare_steps(model, task, at))
            learn_event(state, task, Recipe(at, {**SETTINGS, "epochs": 0}), problem=PROBLEM, seed=0, history=[])
            if number >= 2:
                found[at].append((pair["ours"], pair["bare"]))
    return found


def _ewc_steps(state: State, task: Any) -> Callable[[], object]:
    class Steps(type(state.keepers[0])):  # type: ignore[misc]
        """EWC that does not consolidate."""

        end = None
