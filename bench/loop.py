"""The training loop against bare loops: finetuning, replay and EWC on digits and MNIST.

    python -m bench.loop [--rounds 11]

A run is a whole life at the level of `learn_event`: 5 tasks x 2 classes, one epoch each, MLP d-256-256-10, fused SGD,
batch 64, on preloaded tensors. The bare loops are what a careful engineer writes for the same thing: whole tensors, one
gather per batch, no books. Finetuning and EWC must end in the same bits on both sides, or the benchmark stops.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import Row, Run, Side, Times, interleave, network, quartiles, ratio_row, save, streams, timed
from remanence import Life
from remanence.core.problem import Classification
from remanence.core.rng import generator
from remanence.data import Stream
from remanence.life.events import Recipe, learn_event
from remanence.life.state import State
from remanence.nn.fisher import diagonal_fisher
from remanence.train.resolve import resolve, resolve_all
from remanence.train.roles import Keeper, Learner
from remanence.train.update import Update

LR, BATCH, PER_CLASS, STRENGTH = 0.1, 64, 20, 100.0
SETTINGS = {"epochs": 1, "batch_size": BATCH, "optimizer": "sgd", "lr": LR}
REPLAY = {"replay": {"per_class": PER_CLASS, "batch_size": BATCH, "policy": "class-balanced"}}
EWC = {"ewc": {"strength": STRENGTH}}
PROBLEM = Classification(classes=list(range(10)))
Ends = dict[str, nn.Module]


# ------------------------------------------------------------------------------------------------- our side


def ours(stream: Stream, keep: Any = (), ends: Ends | None = None) -> Side:
    """Every task through `learn_event`, as a life and its references do; the parts are the loops alone."""

    def prepare() -> Run:
        state = State(network(stream), resolve("learn", "finetune", Learner), resolve_all("keep", keep, Keeper))

        def run() -> list[Times]:
            history: list[Any] = []
            parts: list[Times] = []

            def clock(u: Update) -> None:
                phase = u.run
                u.run = lambda: parts.append(timed(phase))  # type: ignore[method-assign, assignment, misc]

            for number, task in enumerate(stream):
                recipe = Recipe(number, SETTINGS)
                learn_event(state, task, recipe, problem=PROBLEM, seed=0, history=history, before=clock)
                history.append(task.train)
            if ends is not None:
                ends["ours"] = state.model
            return parts

        return run

    return prepare


def a_life(stream: Stream, folder: Path) -> Side:
    """Every task through `Life.learn`: measured after each, with ledger and snapshots."""
    count = iter(range(10**6))

    def prepare() -> Run:
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


def bare(stream: Stream, keep: str = "", ends: Ends | None = None) -> Side:
    """The bare loop; `keep`: nothing, ``replay`` (as many rows of each class as can be), ``uniform`` (rows drawn without
    regard to classes, the least that a replay loop can do) or ``ewc`` (one anchor, one summed Fisher, computed as ours is).
    """

    def prepare() -> Run:
        model = network(stream)
        data = [(task.train["x"], task.train["y"]) for task in stream]
        classes = [[(y == label).nonzero()[:, 0] for label in y.unique()] for _, y in data]

        def run() -> list[Times]:
            model.train()
            parts: list[Times] = []
            memory: Any = ()
            for number, (x, y) in enumerate(data):
                if keep == "ewc":
                    parts.append(timed(lambda: steps_ewc(model, number, x, y, memory)))  # noqa: B023
                    memory = consolidated(model, x, y, memory)
                elif keep:
                    draws = generator(0, f"learn/{number}", "", "replay", 0)
                    parts.append(timed(lambda: steps_replay(model, number, x, y, memory, draws, keep == "uniform")))  # noqa: B023
                    chosen = [rows[torch.randperm(len(rows), generator=draws)[:PER_CLASS]] for rows in classes[number]]
                    memory = [torch.cat([*memory[at : at + 1], c[torch.cat(chosen)]]) for at, c in enumerate((x, y))]
                else:
                    parts.append(timed(lambda: steps(model, number, x, y)))  # noqa: B023
            if ends is not None:
                ends["bare"] = model
            return parts

        return run

    return prepare


def steps(model: nn.Module, number: int, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
    for rows in order_of(number, len(x)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def steps_replay(
    model: nn.Module, number: int, x: Tensor, y: Tensor, memory: Any, draws: torch.Generator, uniform: bool
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
    for rows in order_of(number, len(x)).split(BATCH):
        batch_x, batch_y = x[rows], y[rows]
        if memory:
            old_x, old_y = memory
            drawn = torch.randperm(len(old_y), generator=draws)
            drawn = drawn[:BATCH] if uniform else balanced(drawn, old_y, draws)
            batch_x, batch_y = torch.cat([batch_x, old_x[drawn]]), torch.cat([batch_y, old_y[drawn]])
        optimizer.zero_grad()
        F.cross_entropy(model(batch_x), batch_y).backward()
        optimizer.step()


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


def steps_ewc(model: nn.Module, number: int, x: Tensor, y: Tensor, memory: Any) -> None:
    params: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=LR, fused=True)
    for rows in order_of(number, len(x)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        if memory:
            with torch.no_grad():
                away = torch._foreach_sub(params, memory[0])
                torch._foreach_mul_(away, STRENGTH)
                torch._foreach_addcmul_([p.grad for p in params], away, memory[1])  # type: ignore[misc]
        optimizer.step()


def consolidated(model: nn.Module, x: Tensor, y: Tensor, memory: Any) -> tuple[list[Tensor], list[Tensor]]:
    batches = ({"x": a, "y": b} for a, b in zip(x.split(256), y.split(256), strict=True))
    named = dict(model.named_parameters())
    fisher = list(diagonal_fisher(model, PROBLEM, batches, named, "empirical", torch.arange(10)).values())
    if memory:
        torch._foreach_add_(fisher, memory[1])
    return [p.detach().clone() for p in named.values()], fisher


# ------------------------------------------------------------------------------------------------- what is said


def loops(times: list[Times], first: int = 0) -> list[Times]:
    """Of every run, the loops alone, from task `first` on, as one."""
    return [Times(sum(p.wall for p in t.parts[first:]), sum(p.cpu for p in t.parts[first:])) for t in times]


def per_task(times: list[Times], task: int) -> list[Times]:
    return [t.parts[task] for t in times]


def same(ends: Ends) -> None:
    """Stop if the two sides did not compute the same."""
    a, b = (ends[side].state_dict() for side in ("ours", "bare"))
    if any(not torch.equal(a[name], b[name]) for name in a):
        raise SystemExit("the two sides end in different weights, so their times mean nothing")


def rows_of(on: str, stream: Stream, rounds: int) -> list[Row]:
    ends: Ends = {}
    t = interleave({"ours": ours(stream, ends=ends), "bare": bare(stream, ends=ends)}, rounds)
    with TemporaryDirectory() as folder:
        lives = interleave({"life": a_life(stream, Path(folder)), "bare": bare(stream)}, max(7, rounds // 3))
    same(ends)
    found = [
        ratio_row("finetuning, the loop", on, loops(t["ours"]), loops(t["bare"]), 1.05),
        ratio_row("finetuning, whole events", on, t["ours"], t["bare"], 1.05),
        ratio_row(
            "finetuning, `Life.learn`", on, lives["life"], lives["bare"], note="measured, with ledger and snapshots"
        ),
    ]
    sides = {"ours": ours(stream, REPLAY), "bare": bare(stream, "replay"), "uniform": bare(stream, "uniform")}
    t = interleave(sides, rounds)
    found += [
        ratio_row("replay, the loop", on, loops(t["ours"]), loops(t["bare"]), 1.15),
        ratio_row("replay, whole events", on, t["ours"], t["bare"], 1.15),
        ratio_row("replay, whole events, against uniform draws", on, t["ours"], t["uniform"]),
    ]
    sides = {"ours": ours(stream, EWC, ends=ends), "ewc": bare(stream, "ewc", ends=ends), "bare": bare(stream)}
    t = interleave(sides, rounds)
    a, b = loops(t["ours"], 1), loops(t["bare"], 1)
    found += [
        ratio_row("EWC, the loop of tasks 2 to 5, against finetuning", on, a, b, 1.25),
        ratio_row("EWC, whole events with Fisher, against bare EWC", on, t["ours"], t["ewc"]),
        constant(on, t["ours"], t["bare"]),
    ]
    return found


def constant(on: str, over: list[Times], under: list[Times]) -> Row:
    """How much a step costs in the last task, against the second, each over a bare step of the same task."""
    by_task = [[a.cpu / b.cpu for a, b in zip(per_task(over, at), per_task(under, at), strict=True)] for at in range(5)]
    low, middle, high = quartiles([last / second for second, last in zip(by_task[1], by_task[4], strict=True)])
    note = "over finetuning, task by task: " + ", ".join(f"{quartiles(ratios)[1]:.2f}" for ratios in by_task)
    return Row(
        "EWC, a step in task 5 over one in task 2", on, middle, "x", "at most 1.1", middle <= 1.1, low, high, note
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    found = [
        row for on, stream in streams().items() for row in rows_of(on, stream, rounds * (3 if on == "digits" else 1))
    ]
    text = (
        "Ours over bare: MLP d-256-256-10, SGD, batch 64, 5 tasks of 2 classes, one epoch each (digits: 5 batches per task; "
        "MNIST: 25). The bare loop gathers by index from whole tensors and keeps no books; with replay it draws as many rows "
        "of each class as ours. *The loop* is a phase, from making the optimizer to the last step; *whole events* are "
        "`learn_event`, with everything before and after: settings, labels, lineage, buffer, Fisher."
    )
    save("loop", "The training loop", text, found, rounds=rounds, lr=LR, batch=BATCH)


if __name__ == "__main__":
    main()
