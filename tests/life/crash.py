"""Lives that are killed: each attempt is a process of its own, forked from a server that has torch loaded already."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAN = """
name: crash
seed: 3
model: {mlp: {hidden: [12]}}
stream: {split-digits: {tasks: 5}}
keep: [{replay: {per_class: 3, batch_size: 8}}, {ewc: {strength: 5}}]
train: {epochs: 1, batch_size: 32, optimizer: {sgd: {momentum: 0.9}}, lr: 0.05}
events:
  - learn: 0
  - learn: {task: 1, snapshot_every: 2, epochs: 2}
  - forget: {classes: [3], by: ssd, verify: {retrain: {seeds: 2}}}
  - learn: {task: 2, where: [{lora: {rank: 2}}], snapshot_every: 3, carry: true}
  - forget: {ids: [0, 1, 2, '10-40'], by: retrain, verify: none}
  - learn: 3
measure: [accuracy, forgetting, bytes, {stability-gap: {every: 4, subset: 50}}]
"""

#: What two equal lives may differ in: times, random names and salts, and what is signed over them.
VARYING = {"seconds", "reference_seconds", "fraction_of_retraining", "life", "hash", "signer", "peak_bytes"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("remanence.life.run", "remanence.life.life", "remanence.life.report", "remanence.measure.attacks"),
        *("sklearn.datasets", "sklearn.linear_model", "sqlalchemy.dialects.sqlite"),
        "torch._dynamo",  # torch's optimizers import it, three seconds in every process that does not find it loaded
    ]
)


def live(plan: str, home: str, config: str, kill_at_sync: int | None, kill_at_step: str | None) -> None:
    """Begin the life of a plan or go on with it to its end; dies at the n-th flush to the disk, or when a step of a request is reached."""
    import torch

    from remanence.life import erasing, files
    from remanence.life.run import run_plan

    os.environ["REMANENCE_CONFIG"] = config
    torch.set_num_threads(1)
    count = 0

    def sync(real: Callable[..., Any]) -> Callable[..., Any]:
        def flush(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill_at_sync:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return flush

    def reached(step: str) -> None:
        if step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = sync(os.fsync)  # type: ignore[assignment]
    os.replace = sync(os.replace)  # type: ignore[assignment]
    erasing.reached = reached
    assert files.os is os
    run_plan(plan, home).close()


def attempt(
    plan: Path,
    home: Path,
    config: Path,
    *,
    after: float | None = None,
    sync: int | None = None,
    step: str | None = None,
) -> int:
    """Run `live` in a process; kill it `after` so many seconds, at flush number `sync`, or at `step`. Returns its exit status."""
    process = _context.Process(target=live, args=(str(plan), str(home), str(config), sync, step))
    process.start()
    process.join(after)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def outcome(home: Path) -> dict[str, Any]:
    """All that must be equal: weights, digest, report without times, traces and receipts as far as they must repeat."""
    report = json.loads((home / "report.json").read_text())
    return stripped(report)


def stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: stripped(item) for key, item in value.items() if key not in VARYING}
    return [stripped(item) for item in value] if isinstance(value, list) else value


def timed(run: Callable[[], int]) -> tuple[int, float]:
    start = time.monotonic()
    return run(), time.monotonic() - start
