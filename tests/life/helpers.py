"""Small lives on real digits, and what two of them must have in common."""

from __future__ import annotations

import json
import os
import signal
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from remanence.core.ids import Ids
from remanence.data import Examples, Stream, Task, cat, digits, split_classes
from remanence.life.ledger import Ledger
from remanence.life.life import Life
from remanence.life.snapshots import tensor_sha256, weights_sha256
from remanence.models import mlp

FAST: dict[str, Any] = {"epochs": 1, "batch_size": 16, "optimizer": {"sgd": {"momentum": 0.9}}, "lr": 0.05}
REPLAY: list[Any] = [{"replay": {"per_class": 5, "batch_size": 8}}]


@lru_cache
def stream(per_class: int = 40, classes: int = 6) -> Stream:
    """`per_class` examples of each of the digits 0 to 5 as three tasks; a quarter is held out."""
    data = digits()
    rows = torch.cat([(data["y"] == label).nonzero()[:per_class, 0] for label in range(classes)])
    return split_classes(data.select(rows), tasks=classes // 2, name="small")


def network(seed: int) -> nn.Module:
    """The lives' network: 64 inputs, 12 hidden units, a head that grows."""
    return mlp(64, [12], seed=seed)


def lived(home: Path | None, tasks: int = 2, keep: Any = REPLAY, **options: Any) -> Life:
    """A life that has learned the first `tasks` tasks."""
    life = Life(options.pop("model", network), keep=keep, home=home, **{"name": "small", **options})
    for task in list(stream())[:tasks]:
        life.learn(task, **FAST)
    return life


def again(home: Path, data: Any = None, **options: Any) -> Life:
    """The life in `home`, gone on with."""
    return Life.resume(home, options.pop("model", network), list(stream()) if data is None else data, **options)


def of_class(task: Task, label: int) -> Ids:
    """Training ids of one class."""
    return task.train.select((task.train["y"] == label).nonzero()[:, 0]).ids


def tree(value: Any) -> Any:
    """Nested tensors as their hashes: equal trees are equal bit for bit."""
    if isinstance(value, Tensor):
        return tensor_sha256(value)
    if isinstance(value, dict):
        return {str(key): tree(item) for key, item in value.items()}
    return [tree(item) for item in value] if isinstance(value, list | tuple) else value


def bits(life: Life) -> dict[str, Any]:
    """Everything that moves when a life moves: weights, labels, structures, keepers, optimizer, rows, books."""
    books = life._books
    return {
        "state": tree(life._state.pack()),
        "weights": weights_sha256(life.model.state_dict()),
        "digest": life.content_digest(),
        "events": len(life.events),
        "tombstones": books.tombstones.digest(),
        "consumed": books.consumed.digest(),
        "states": {state: ids.digest() for state, ids in books.states.items()},
    }


def kinds(life: Life) -> list[str]:
    """The ledger's rows in a word each."""
    return [row.kind for row in life._ledger.rows()]


def kinds_on_disk(home: Path) -> list[str]:
    with Ledger(home / "ledger.db", read_only=True) as ledger:
        return [row.kind for row in ledger.rows()]


# -- secrets ----------------------------------------------------------------------------------------------------------

SECRET_IDS = (7316150942184651337, 7316150942184659991)
_rng = np.random.default_rng(20240607)
#: Two rows of 64 numbers whose bytes occur nowhere by chance.
SECRETS = torch.from_numpy(_rng.uniform(0.1, 1.0, (2, 64)).astype(np.float32))


def secret_stream() -> list[Task]:
    """The small stream with one secret example in each of its first two tasks."""
    tasks = list(stream())
    for number in (0, 1):
        task = tasks[number]
        extra = Examples(
            {"x": SECRETS[number][None], "y": task.train["y"][:1]}, task.train.source, [SECRET_IDS[number]]
        )
        tasks[number] = Task(cat([task.train, extra]), task.test, task.classes, task.names, task.id)
    return tasks


SECRET_PLAN = (
    f"events:\n  - learn: 0\n  - learn: 1\n  - forget: {{ids: [{SECRET_IDS[0]}, {SECRET_IDS[1]}], by: retrain}}\n"
)
SECRET_KEEP: list[Any] = [{"replay": {"per_class": 100, "batch_size": 16}}, {"ewc": {"strength": 1.0}}]


def forms() -> dict[str, list[bytes]]:
    """The secrets' inputs in every dtype a file may hold: windows of four neighbours, so that a torn copy is found too."""
    found: dict[str, list[bytes]] = {}
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raw = [row.to(dtype).view(torch.uint8).numpy().tobytes() for row in SECRETS]
        width = dtype.itemsize
        found[str(dtype).removeprefix("torch.")] = [
            row[at * width : (at + 4) * width] for row in raw for at in (0, 13, 37, 60)
        ]
    found["big-endian float32"] = [row[13:17].numpy().astype(">f4").tobytes() for row in SECRETS]
    found["text"] = [f"{value:.6f}"[:8].encode() for row in SECRETS.tolist() for value in (row[0], row[20], row[63])]
    found["text"] += [repr(value)[:12].encode() for row in SECRETS.tolist() for value in (row[0], row[20], row[63])]
    return found


def id_forms() -> dict[str, list[bytes]]:
    """The secrets' ids as they could be written."""
    return {
        "int64": [np.int64(i).astype("<i8").tobytes() for i in SECRET_IDS],
        "big-endian int64": [np.int64(i).astype(">i8").tobytes() for i in SECRET_IDS],
        "float64": [np.float64(i).tobytes() for i in SECRET_IDS],
        "text": [str(i).encode() for i in SECRET_IDS],
    }


def scan(home: Path, patterns: dict[str, list[bytes]]) -> set[tuple[str, str]]:
    """(file, form) of every pattern found in any file below `home`."""
    found = set()
    for path in sorted(home.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            for form, needles in patterns.items():
                if any(needle in data for needle in needles):
                    found.add((path.relative_to(home).as_posix(), form))
    return found


def secret_life(home: str, config: str, by: str, kill_at_step: str | None) -> None:
    """Learn the secrets and forget them; die when a step of the request is reached. For a process of its own."""
    from remanence.data import Request
    from remanence.life import erasing

    os.environ["REMANENCE_CONFIG"] = config
    torch.set_num_threads(1)

    def reached(step: str) -> None:
        if step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    erasing.reached = reached
    tasks = secret_stream()
    if (Path(home) / "ledger.db").exists():
        life = Life.resume(home, network, tasks)
    else:
        life = Life(network, keep=SECRET_KEEP, home=home, plan=SECRET_PLAN)
        for task in tasks[:2]:
            life.learn(task, **FAST, snapshot_every=2)
        life.forget(Request(ids=list(SECRET_IDS)), by=by)
    life.report()
    life.close()


def receipt_text(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
