"""What all benchmarks share: one thread, interleaved runs, ratios pair by pair, results as JSON with the machine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import gc
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from remanence.data import Stream
from remanence.data.digits import digits, idx, split_classes
from remanence.models.small import MLP, seeded

torch.set_num_threads(1)

RESULTS = Path(__file__).parent / "results"
MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
PACKAGES = ("torch", "numpy", "SQLAlchemy", "remanence")


@dataclass
class Row:
    """One figure. `target`: what it should be, as a text; `met` says whether it is (None: there is no target).
    `low` and `high`: the quartiles of the runs or pairs."""

    what: str
    on: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass
class Times:
    """Seconds of one run: `wall`, and `cpu` of this process, which other work on the machine disturbs less; `parts`: of its
    parts, as the run itself clocked them."""

    wall: float
    cpu: float
    parts: list[Times] = field(default_factory=list)


#: A run: what it returns are the times of its parts, if it clocked any.
Run = Callable[[], list[Times] | None]
#: What is timed: called without arguments, it prepares a run off the clock and returns the run itself.
Side = Callable[[], Run]


def timed(run: Callable[[], Any]) -> Times:
    """Seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    parts = run()
    return Times(time.perf_counter() - wall, time.process_time() - cpu, parts or [])


def interleave(sides: Mapping[str, Side], rounds: int = 15, warmup: int = 2) -> dict[str, list[Times]]:
    """Run all sides in turn, `rounds` times after `warmup`; every second round backwards, so that each has each for a
    neighbour. What was imported is kept out of the garbage collector's rounds, which run before every side."""
    names = list(sides)
    found: dict[str, list[Times]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    for number in range(warmup + rounds):
        for name in names[:: 1 if number % 2 else -1]:
            run = sides[name]()
            gc.collect()
            took = timed(run)
            if number >= warmup:
                found[name].append(took)
    gc.unfreeze()
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    ordered = sorted(values)
    at = (len(ordered) - 1) / 4
    return ordered[round(at)], median(ordered), ordered[round(3 * at)]


def ratio(over: Sequence[Times], under: Sequence[Times], clock: str = "cpu") -> tuple[float, float, float]:
    """Quartiles of the ratios, pair by pair: the two runs of a pair stood side by side."""
    return quartiles([getattr(a, clock) / getattr(b, clock) for a, b in zip(over, under, strict=True)])


def seconds(times: Sequence[Times], clock: str = "cpu") -> tuple[float, float, float]:
    """Quartiles of the seconds."""
    return quartiles([getattr(t, clock) for t in times])


def ratio_row(
    what: str, on: str, over: Sequence[Times], under: Sequence[Times], limit: float | None = None, note: str = ""
) -> Row:
    """The ratio of CPU times as a row, wall times in its note; `limit` is the most it may be."""
    low, middle, high = ratio(over, under)
    wall = ratio(over, under, "wall")[1]
    said = f"{seconds(over)[1] * 1e3:.1f} ms against {seconds(under)[1] * 1e3:.1f} ms; wall clock {wall:.2f}"
    met = None if limit is None else middle <= limit
    return Row(
        what, on, middle, "x", f"at most {limit}" if limit else "", met, low, high, f"{said}{note and '; ' + note}"
    )


def machine() -> dict[str, Any]:
    """The processor, its cores, the load by others and the versions."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "cpu": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load,
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


def save(name: str, title: str, text: str, rows: Sequence[Row], **settings: Any) -> None:
    """Write ``results/<name>.json`` and show the rows. `title` and `text` head its table in the docs."""
    RESULTS.mkdir(exist_ok=True)
    found = {
        "name": name,
        "title": title,
        "text": text,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "settings": settings,
        "rows": [{k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        sign = {None: " ", True: "+", False: "-"}[row.met]
        print(f"{sign} {row.on:8} {row.what:58} {row.value:10.4g} {row.unit:4} {row.target:14} {row.note}", flush=True)


# ------------------------------------------------------------------------------------------------- the problem


def streams() -> dict[str, Stream]:
    """Digits, and the 10,000 images of MNIST's test set where ``../shared/data/mnist`` has them: 5 tasks x 2 classes."""
    found = {"digits": split_classes(digits(), tasks=5)}
    files = [MNIST / "t10k-images-idx3-ubyte.gz", MNIST / "t10k-labels-idx1-ubyte.gz"]
    if all(file.exists() for file in files):
        examples = idx(files[0], files[1], "mnist")
        found["mnist"] = split_classes(examples.replace(x=examples["x"].flatten(1)), tasks=5, test_share=0.2)
    return found


def network(stream: Stream, seed: int = 0) -> MLP:
    """The network of all loops: d-256-256-10."""
    return seeded(seed, lambda: MLP(stream[0].train["x"].shape[1], (256, 256), 10, False, 0.0))  # type: ignore[return-value]
