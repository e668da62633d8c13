"""What the books cost: ledger, lineage and snapshots in a life, traces among a million ids, room and set algebra.

    python -m bench.ledger [--rounds 9]

The share: while a life of 5 tasks runs (`Life.learn`, measured after each task), the clock is read around every call into
`Ledger`, `Lineage` and `Snapshots` and the weights' hash; calls inside calls count once. It is the share of wall time,
since the books wait for the disk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.common import Row, network, quartiles, save, streams
from bench.loop import BATCH, LR, PROBLEM
from remanence import Life
from remanence.core.ids import Ids
from remanence.data import Examples, Stream
from remanence.life import life as life_module
from remanence.life.ledger import Ledger, Transaction
from remanence.life.lineage import Lineage
from remanence.life.snapshots import Snapshots
from remanence.models.small import MLP, seeded

#: Epochs per task of the life whose share counts: about as many steps as five epochs of all 60,000 training images.
EPOCHS = {"digits": 20, "mnist": 37}
BOOKS: list[tuple[Any, tuple[str, ...]]] = [
    (Ledger, ("rows", "get_current", "verify_chain", "__init__", "close")),
    (Transaction, ("append", "set_current", "get_current", "put_private")),
    (Lineage, ("put", "get", "count", "intersect")),
    (Snapshots, ("save", "sweep", "bytes")),
    (life_module, ("weights_sha256",)),
]


class Clock:
    """Seconds inside the outermost of nested calls: of the wall, and of the processor."""

    def __init__(self) -> None:
        self.wall, self.cpu, self._depth, self._start = 0.0, 0.0, 0, (0.0, 0.0)

    def __enter__(self) -> None:
        if not self._depth:
            self._start = time.perf_counter(), time.process_time()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.wall += time.perf_counter() - self._start[0]
            self.cpu += time.process_time() - self._start[1]


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """The clock around every call of `BOOKS`, and around beginning and committing a transaction."""
    before = [(owner, name, getattr(owner, name)) for owner, names in BOOKS for name in names if hasattr(owner, name)]
    begin = Ledger.begin

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            with clock:
                return call(*args, **kwargs)

        return inner

    @contextmanager
    def transaction(self: Ledger) -> Iterator[Transaction]:
        with clock, begin(self) as tx:
            yield tx

    try:
        for owner, name, call in before:
            setattr(owner, name, wrapped(call))
        Ledger.begin = transaction  # type: ignore[method-assign]
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)
        Ledger.begin = begin  # type: ignore[method-assign]


def share(stream: Stream, epochs: int) -> tuple[float, float, float, int]:
    """Share of the books in one life's wall time and in its processor time, the life's seconds and its steps."""
    clock = Clock()
    with TemporaryDirectory() as folder, clocked(clock):
        start = time.perf_counter(), time.process_time()
        life = Life(network(stream), problem=PROBLEM, home=Path(folder) / "life")
        steps = sum(life.learn(t, epochs=epochs, batch_size=BATCH, optimizer="sgd", lr=LR).steps for t in stream)
        life.close()
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    return clock.wall / wall, clock.cpu / cpu, wall, steps


def shares(on: str, stream: Stream, rounds: int) -> list[Row]:
    rows = []
    share(stream, 1)
    for epochs, counts in ((1, False), (EPOCHS[on], on == "mnist")):
        found = [share(stream, epochs) for _ in range(rounds)]
        low, middle, high = quartiles([100 * wall for wall, _, _, _ in found])
        cpu, took = median(100 * c for _, c, _, _ in found), median(t for _, _, t, _ in found)
        note = f"{found[0][3]} steps in {took:.2f} s; of processor time {cpu:.2g} %, the rest waits for the disk"
        what = f"ledger, lineage and snapshots, {epochs} epoch{'s' * (epochs > 1)} per task"
        rows.append(
            Row(what, on, middle, "%", "at most 2" if counts else "", middle <= 2 if counts else None, low, high, note)
        )
    return rows


# ------------------------------------------------------------------------------------------------- many ids


def best(rounds: int, call: Callable[[], object]) -> tuple[float, float, float]:
    """Quartiles of the processor's milliseconds of a call."""
    found = []
    call()
    for _ in range(max(7, rounds)):
        start = time.process_time()
        call()
        found.append(1e3 * (time.process_time() - start))
    return quartiles(found)


def traces(rounds: int) -> list[Row]:
    """A life that learned a million examples under random ids in four events; 1,000 of them are traced."""
    rng = np.random.default_rng(0)
    ids = np.unique(rng.integers(0, 2**62, 1_000_100))[:1_000_000]
    rng.shuffle(ids)
    wanted = Ids(np.concatenate([ids[:900], rng.integers(0, 2**62, 100)]))
    with TemporaryDirectory() as folder:
        model = seeded(0, lambda: MLP(2, (4,), 2, False, 0.0))
        with Life(
            model, problem=PROBLEM.__class__(classes=[0, 1]), home=Path(folder) / "life", measure=["bytes"]
        ) as life:
            for number, part in enumerate(np.split(ids, 4)):
                y = torch.arange(len(part)) % 2
                data = Examples({"x": torch.ones(len(part), 2), "y": y}, f"rows-{number}", ids=torch.from_numpy(part))
                life.learn(data, batch_size=50_000, optimizer="sgd", lr=0.0)
            whole = best(rounds, lambda: life.trace(wanted))
            digests = [row.body["new"] for row in life._rows]
            one = best(rounds, lambda: [life._ledger.lineage.intersect(digest, wanted) for digest in digests])
            size = (Path(folder) / "life" / "ledger.db").stat().st_size / 1e6
    note = "900 known, 100 unknown; 4 events of 250,000"
    return [
        Row("`Life.trace` of 1,000 ids among 10^6 random ids", "life", whole[1], "ms", "under 100", whole[1] < 100, whole[0], whole[2], note),
        Row("`Lineage.intersect` of them with every event's ids", "ledger", one[1], "ms", "under 100", one[1] < 100, one[0], one[2], f"4 sets; the ledger takes {size:.1f} MB"),
    ]  # fmt: skip


def room() -> list[Row]:
    """10^8 dense ids in 20 events: each event takes the same range in, or a range of its own."""
    rows = []
    for what, count in (
        ("all in each of 20 events, the set shared", 20),
        ("a range of 5 x 10^6 in each of 20 events", 1),
    ):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "ledger.db"
            ledger = Ledger(path)
            start = time.perf_counter()
            if count == 20:
                everything = Ids.range(0, 10**8)
                for event in range(20):
                    with ledger.begin() as tx:
                        tx.append("learn", {"event": event, "new": ledger.lineage.put(everything)})
                del everything
            else:
                for event in range(20):
                    with ledger.begin() as tx:
                        part = Ids.range(event * 5 * 10**6, (event + 1) * 5 * 10**6)
                        tx.append("learn", {"event": event, "new": ledger.lineage.put(part)})
            took = time.perf_counter() - start
            ledger.close()
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        rows.append(
            Row(
                f"10^8 dense ids, {what}",
                "ledger",
                size,
                "MB",
                "at most 50",
                size <= 50,
                note=f"written in {took:.1f} s",
            )
        )
    return rows


def algebra(rounds: int) -> list[Row]:
    rng = np.random.default_rng(0)
    a, b = (Ids(rng.integers(0, 2**62, 10**6)) for _ in range(2))
    c, d = (Ids(rng.choice(3 * 10**6, 10**6, replace=False)) for _ in range(2))
    rows = []
    for name, call in (
        ("union of random ids", lambda: a | b),
        ("difference of random ids", lambda: a - b),
        ("union of dense ids", lambda: c | d),
        ("difference of dense ids", lambda: c - d),
    ):
        low, middle, high = best(rounds, call)
        rows.append(Row(f"10^6 and 10^6: {name}", "ids", middle, "ms", "under 50", middle < 50, low, high))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = [row for on, stream in streams().items() for row in shares(on, stream, rounds)]
    rows += traces(rounds) + room() + algebra(rounds)
    text = "Shares are of wall time: the clock runs in every call into ledger, lineage and snapshots while a life learns 5 tasks. One epoch on 8,000 images is over before a disk has answered; the share that counts is that of a life with about as many steps as five epochs of all 60,000."
    save("ledger", "Ledger, lineage and snapshots", text, rows, rounds=rounds, epochs=EPOCHS)


if __name__ == "__main__":
    main()
