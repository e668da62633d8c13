"""How near each forgetter comes to retrained models on lives of digits and MNIST, beside do nothing, and what it costs.

python -m bench.forget [--only digits mnist mnist-random digits-ten] [--jobs 2]

The lives are those of `remanence compare`; they are cached in runs/bench-forget-*, so that only what changed is run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bench.common import MNIST, RESULTS, save
from remanence.life.compare import compare
from remanence.life.compare_report import as_markdown, write

PLANS = Path(__file__).parent / "plans"
ALL = (
    "all, {ssd: {selection: 1, importance: example, guard: 0.01}}, {newton: {iterations: 6}}, {influence: {damping: 0.001}}, "
    "{sparse-unlearn: {gamma: 0.005}}"
)
#: Without those that take many times as long as retraining this network, and without gs-lora, which finds nothing to adapt in it.
QUICK = (
    "retrain, catastrophic, gradient-ascent, random-label, ssd, {ssd: {selection: 1, importance: example, guard: 0.01}}, salun, iau, boundary, "
    "{boundary: {mode: expand}}, fisher-noise, sparse-unlearn, scrub, bad-teacher"
)
SLOW = "influence, newton, dmm, laf, concept-poison-unlearn"
#: Plans, their seeds and methods; those that end in one request have KLoM, too.
RUNS = {
    "digits": (5, ALL),
    "mnist": (3, f"{QUICK}, {SLOW}"),
    "mnist-random": (3, QUICK),
    "digits-ten": (3, QUICK),
}
TEXT = (
    "Lives of five tasks with replay; then whole classes or single examples are asked for, or ten times in a row single examples. Every "
    "figure is a distance to models retrained without the request (mean over seeds ± half of the 95 % interval), with what it says "
    "beside *do nothing* and *retrain, another seed*: see docs/compare.md. Methods have their published or default settings; a few stand "
    "a second time with settings for small networks. Cost is a share of one retraining, which takes half a second on digits and half a minute on MNIST. Memory is the "
    "most that the run held: network, copies, gradients, optimizer. Of ten requests each is asked of a network that the same method has "
    "changed before; the first, the fifth, the tenth and all together are shown."
)


def plan(name: str, folder: Path) -> Path | None:
    """The plan with its paths filled in; None where its data is absent."""
    text = (PLANS / f"forget-{name}.yaml").read_text()
    if name.startswith("mnist"):
        images, labels = MNIST / "t10k-images-idx3-ubyte.gz", MNIST / "t10k-labels-idx1-ubyte.gz"
        if not (images.exists() and labels.exists()):
            return None
        text = text.replace("IMAGES", str(images)).replace("LABELS", str(labels))
    path = folder / f"forget-{name}.yaml"
    path.write_text(text)
    return path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    options.add_argument(
        "--forget", help="other methods than those of the plan's run, in the syntax of `remanence compare`"
    )
    options.add_argument("--jobs", type=int, default=2)
    given = options.parse_args()
    file = RESULTS / "forget.json"
    tables: dict[str, str] = json.loads(file.read_text())["settings"]["tables"] if file.exists() else {}
    tables = {name: text for name, text in tables.items() if name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            path = plan(name, Path(folder))
            if path is None:
                print(f"forget-{name}: its data is absent, left out")
                continue
            made, home = compare(
                path, forget=given.forget or RUNS[name][1], seeds=RUNS[name][0], jobs=given.jobs, folder=Path("runs") / f"bench-forget-{name}",
                klom=name != "digits-ten",
                told=lambda done, count, words, name=name: print(f"forget-{name}: {done} of {count} lives {words}", flush=True),
            )  # fmt: skip
            write(home, made)
            tables[name] = f"**Lives of {name}**, seeds {made['seeds'][0]} to {made['seeds'][-1]}:\n\n{requests(made)}"
            save(
                "forget",
                "Forgetting, against retraining",
                TEXT,
                [],
                seeds={name: seeds for name, (seeds, _) in RUNS.items()},
                tables=tables,
            )


def requests(made: dict[str, Any]) -> str:
    """The tables of the requests, as Markdown; of many in a row the first, the fifth, the last and all together."""
    text = as_markdown(made)
    parts = (
        text[text.index("## ") :].replace("## Forget", "### Forget").replace("## forget", "### forget").split("\n### ")
    )
    if len(parts) > 5:
        parts = [part for at, part in enumerate(parts) if at in (0, 4, len(parts) - 2, len(parts) - 1)]
    return "\n### ".join(parts)


if __name__ == "__main__":
    main()
