"""What evidence costs: membership attacks on 10^5 examples, importance per example, learning in shards.

python -m bench.evidence [--rounds 7]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.common import Row, Run, Side, interleave, network, ratio_row, save, seconds, streams
from remanence import Life
from remanence.core.ids import Ids
from remanence.core.problem import Classification
from remanence.data import Request, Stream
from remanence.measure import attacks
from remanence.models import cnn
from remanence.nn.fisher import diagonal_fisher

PROBLEM = Classification(classes=list(range(10)))
COUNT = 100_000


def plain(call: Callable[[], Any]) -> Side:
    """A side without preparation."""

    def prepare() -> Run:
        def run() -> None:
            call()

        return run

    return prepare


def attack_rows(rounds: int) -> list[Row]:
    """Each attack on 10^5 members against 10^5 others, logits of ten classes."""
    rng = np.random.default_rng(0)
    sides = [(rng.normal(size=(COUNT, 10)) * 3, rng.integers(10, size=COUNT)) for _ in range(2)]
    found = []
    for name in [name for name in attacks.ATTACKS if name != "squared-error"]:
        times = interleave({name: plain(lambda name=name: attacks.audit(*sides[0], *sides[1], [name]))}, rounds, 1)[
            name
        ]  # type: ignore[misc]
        low, middle, high = seconds(times, "wall")
        found.append(Row(f"{name} attack, 10^5 against 10^5", "logits", middle, "s", "under 5", middle < 5, low, high))
    return found


def fisher_rows(rounds: int, stream: Stream, on: str) -> list[Row]:
    """The diagonal Fisher of 512 examples against a loop with a backward for each."""
    x, y = stream[0].train["x"][:512], stream[0].train["y"][:512]
    models = (
        {"perceptron": network(stream), "convolutions": cnn((1, 28, 28), [8, 16], 10)}
        if on == "mnist"
        else {"perceptron": network(stream)}
    )
    found = []
    for name, model in models.items():
        shaped = x.reshape(-1, 1, 28, 28) if name == "convolutions" else x
        params = dict(model.named_parameters())

        def ours(model: nn.Module = model, x: Any = shaped, params: Any = params) -> dict[str, Any]:
            batches = ({"x": a, "y": b, "id": b} for a, b in zip(x.split(256), y.split(256), strict=True))
            return diagonal_fisher(model, PROBLEM, batches, params)

        def loop(model: nn.Module = model, x: Any = shaped, params: Any = params) -> dict[str, Any]:
            model.eval()
            total = {n: torch.zeros_like(p) for n, p in params.items()}
            for i in range(len(x)):
                loss = torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
                for n, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
                    total[n] += g.square()
            return {n: value / len(x) for n, value in total.items()}

        def least(model: nn.Module = model, x: Any = shaped, params: Any = params) -> None:
            model.eval()
            for a, b in zip(x.split(256), y.split(256), strict=True):
                torch.autograd.grad(torch.nn.functional.cross_entropy(model(a), b), list(params.values()))

        a, b = ours(), loop()
        if not all(torch.allclose(a[n], b[n], rtol=1e-3, atol=1e-8) for n in a):
            raise SystemExit("the two sides compute different Fishers, so their times mean nothing")
        times = interleave({"loop": plain(loop), "ours": plain(ours), "least": plain(least)}, rounds)
        row = ratio_row(f"diagonal Fisher, {name}: a loop over examples, over ours", on, times["loop"], times["ours"])
        row.target, row.met = "at least 5", row.value >= 5
        bound = ratio_row(
            f"the same loop, {name}, over forward and backward of its batches alone", on, times["loop"], times["least"]
        )
        bound.note += "; no Fisher can be faster than that"
        found += [row, bound]
    return found


def shard_rows(rounds: int, stream: Stream, on: str) -> list[Row]:
    """Learning in shards, and forgetting one example from them, against training the network itself."""
    settings = {"epochs": 5, "batch_size": 64, "optimizer": "adamw", "lr": 1e-3}
    learners: dict[str, Any] = {"plain": None, "sisa": "sisa", "s3t": {"s3t": {"slices": 2, "sequences": 1}}}
    lives: dict[str, Life] = {}
    count = iter(range(10**6))
    with TemporaryDirectory() as folder:

        def learned(name: str) -> Side:
            def prepare() -> Run:
                life = Life(
                    network(stream), problem=PROBLEM, learner=learners[name], home=Path(folder) / str(next(count))
                )

                def run() -> None:
                    life.learn(stream[0], **settings)
                    if name in lives:
                        lives[name].close()
                    lives[name] = life

                return run

            return prepare

        times = interleave({name: learned(name) for name in learners}, rounds, 1)
        found = [
            ratio_row(f"learning one task by {name}, against plain training", on, times[name], times["plain"])
            for name in ("sisa", "s3t")
        ]
        ids = iter(stream[0].train.id.tolist())
        for name in ("sisa", "s3t"):

            def forgotten(name: str = name) -> None:
                lives[name].forget(Request(ids=Ids([next(ids)])), by=name)

            gone = interleave({name: plain(forgotten)}, rounds, 1)[name]
            found.append(
                ratio_row(
                    f"forgetting one example by {name}, against plain training",
                    on,
                    gone,
                    times["plain"],
                    note="whole request, receipt included",
                )
            )
        for life in lives.values():
            life.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    found = attack_rows(rounds)
    for on, stream in streams().items():
        found += fisher_rows(rounds, stream, on) + shard_rows(rounds, stream, on)
    text = (
        "Attacks on the logits of 10^5 members and 10^5 others, from scores to AUC and TPR. The Fisher of 512 examples, per example, "
        "against a loop with one backward each. Shards: one task of two classes, 5 epochs, perceptron d-256-256-10; 5 shards of 4 slices "
        "(sisa), 5 of 2 with one order (s3t)."
    )
    save("evidence", "What evidence costs", text, found, rounds=rounds)


if __name__ == "__main__":
    main()
