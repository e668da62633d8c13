"""Ours and avalanche's loops side by side: two processes, asked in turn, each with its own clock.

make bench-peers        or    python -m bench.peers PYTHON_OF_THE_PEERS [--rounds 9]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.common import Row, Times, quartiles, ratio, save, seconds, streams

#: How many times as fast as avalanche each should be, on digits and MNIST.
WANTED = {
    "naive": (2.4, 1.7),
    "replay": (2.8, 1.7),
    "ewc": (4.0, 4.0),
    "ewc-online": (None, None),
    "lwf": (2.0, 2.0),
    "si": (2.0, 2.0),
    "mas": (2.0, 2.0),
    "agem": (2.0, 2.0),
    "naive+default": (None, None),
    "replay+default": (None, None),
    "ewc+default": (None, None),
}
HERE = Path(__file__).parent


class Worker:
    """A process that runs the method named on a line and answers with its seconds."""

    def __init__(self, *command: str) -> None:
        root = HERE.parents[1]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        self.about = self._answer()

    def __call__(self, method: str) -> Times:
        assert self._process.stdin is not None
        self._process.stdin.write(method + "\n")
        self._process.stdin.flush()
        return Times(**self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the other side stopped; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="the interpreter that can import avalanche")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    rows: list[Row] = []
    about: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for at, (on, stream) in enumerate(streams().items()):
            data = Path(folder) / f"{on}.npz"
            arrays = {f"{c}{n}": task.train[c].numpy() for n, task in enumerate(stream) for c in ("x", "y")}
            np.savez(data, **arrays)  # type: ignore[arg-type]
            mine = Worker(sys.executable, "-m", "bench.peers.ours_loop", on)
            theirs = Worker(given.python, str(HERE / "avalanche_loop.py"), str(data))
            about = theirs.about
            for method, wanted in WANTED.items():
                rows.append(compare(method, on, mine, theirs, wanted[at], given.rounds))
            mine.close()
            theirs.close()
    text = "How many times as long avalanche-lib 0.6.0 takes for the same: its strategy's `train` without metrics and loggers (and, in rows of their own, with those it comes with) against our whole learn events, borders (buffer, Fisher) included; same tensors, network, optimizer, batch size, memory and strength. EWC includes each side's own Fisher: ours is per example, theirs squares the gradients of batches. MAS too: ours takes the absolute gradient of each example, theirs of each batch."
    save("peers", "Against avalanche-lib 0.6.0", text, rows, rounds=given.rounds, peer=about)


def compare(method: str, on: str, mine: Worker, theirs: Worker, wanted: float | None, rounds: int) -> Row:
    pairs: list[tuple[Times, Times]] = []
    for number in range(1 + rounds):
        if number % 2:
            a = theirs(method)
            b = mine(method)
        else:
            b = mine(method)
            a = theirs(method)
        if number:
            pairs.append((a, b))
    over, under = [a for a, _ in pairs], [b for _, b in pairs]
    low, middle, high = ratio(over, under)
    wall = quartiles([a.wall / b.wall for a, b in pairs])[1]
    note = f"{seconds(over)[1] * 1e3:.0f} ms against {seconds(under)[1] * 1e3:.0f} ms; wall clock {wall:.1f}"
    method, _, default = method.partition("+")
    what = {
        "ewc": "EWC, a penalty per task (its default)",
        "ewc-online": "EWC, one penalty (its online mode)",
        "lwf": "LwF",
        "si": "SI",
        "mas": "MAS",
        "agem": "A-GEM",
    }
    target = f"at least {wanted}" if wanted else ""
    met = None if wanted is None else middle >= wanted
    return Row(
        f"avalanche{' with its default evaluator' if default else ''} over ours: {what.get(method, method)}",
        on,
        middle,
        "x",
        target,
        met,
        low,
        high,
        note,
    )


if __name__ == "__main__":
    main()
