"""Several seeds of one small life at once (torch.func, vmap) against the same seeds one after another by our loop.

    python -m bench.vmap [--rounds 7]

Digits, 5 tasks x 2 classes, one epoch each, plain SGD; every seed has its own first weights and its own order of the data,
the same on both sides. It is a measurement: whether an engine is worth offering is decided by its rows.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from bench.common import Row, Run, Side, interleave, network, quartiles, ratio, save, seconds, streams
from bench.loop import BATCH, LR, PROBLEM, SETTINGS
from remanence.core.rng import generator
from remanence.data import Stream
from remanence.life.events import Recipe, learn_event
from remanence.life.state import State
from remanence.train.resolve import resolve
from remanence.train.roles import Learner

Ends = dict[str, list[dict[str, Tensor]]]


def one_by_one(stream: Stream, seeds: int, ends: Ends) -> Side:
    def prepare() -> Run:
        states = [State(network(stream, seed), resolve("learn", "finetune", Learner)) for seed in range(seeds)]

        def run() -> None:
            for seed, state in enumerate(states):
                history: list[Any] = []
                for number, task in enumerate(stream):
                    learn_event(state, task, Recipe(number, SETTINGS), problem=PROBLEM, seed=seed, history=history)
                    history.append(task.train)
            ends["ours"] = [dict(state.model.state_dict()) for state in states]

        return run

    return prepare


def at_once(stream: Stream, seeds: int, ends: Ends) -> Side:
    def prepare() -> Run:
        models: list[nn.Module] = [network(stream, seed) for seed in range(seeds)]
        base = network(stream)

        def run() -> None:
            params, _ = stack_module_state(models)
            params = {name: value.detach() for name, value in params.items()}

            def loss(one: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
                return F.cross_entropy(functional_call(base, one, (x,)), y)

            step = vmap(grad(loss))
            for number, task in enumerate(stream):
                x, y = task.train["x"], task.train["y"]
                orders = [_order(seed, number, len(x)) for seed in range(seeds)]
                for rows in torch.stack(orders).split(BATCH, dim=1):
                    found = step(params, x[rows], y[rows])
                    torch._foreach_add_(list(params.values()), [found[name] for name in params], alpha=-LR)
            ends["vmap"] = [{name: value[seed] for name, value in params.items()} for seed in range(seeds)]

        return run

    return prepare


def _order(seed: int, number: int, rows: int) -> Tensor:
    return torch.randperm(rows, generator=generator(seed, f"learn/{number}", "", "order", 0))


def rows_of(on: str, stream: Stream, seeds: int, rounds: int) -> list[Row]:
    ends: Ends = {}
    t = interleave({"ours": one_by_one(stream, seeds, ends), "vmap": at_once(stream, seeds, ends)}, rounds)
    low, middle, high = ratio(t["ours"], t["vmap"])
    wall = quartiles([a.wall / b.wall for a, b in zip(t["ours"], t["vmap"], strict=True)])[1]
    note = f"{seconds(t['ours'])[1] * 1e3:.0f} ms against {seconds(t['vmap'])[1] * 1e3:.0f} ms; wall clock {wall:.2f}"
    pairs = [(a[n], b[n]) for a, b in zip(ends["ours"], ends["vmap"], strict=True) for n in a]
    apart = max(float((a - b).abs().max()) for a, b in pairs)
    same = sum(torch.equal(a, b) for a, b in pairs)
    said = f"{same} of {len(pairs)} tensors have the same bits"
    return [
        Row(f"{seeds} seeds: one after another against all at once (more = vmap wins)", on, middle, "x", "", None, low, high, note),
        Row(f"{seeds} seeds: largest difference of a final weight", on, apart, "", "", None, note=said),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    rows = [row for on, stream in streams().items() for seeds in (3, 10) for row in rows_of(on, stream, seeds, rounds)]
    text = "One small life under several seeds: our loop one seed after another, against all seeds stacked and stepped by `torch.func` (vmap of the gradient, plain SGD), on one thread. The bits differ and the gain is small, so it is not offered as an engine."
    save("vmap", "Several seeds at once", text, rows, rounds=rounds)


if __name__ == "__main__":
    main()
