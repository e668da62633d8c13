"""How near each forgetter comes to retrained models on lives of digits and MNIST, beside do nothing, and what it costs.

python -m bench.forget [--seeds 5] [--jobs 2]

The lives are those of `remanence compare`; they are cached in runs/bench-forget-*, so that only what changed is run again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.common import MNIST, save
from remanence.life.compare import compare
from remanence.life.compare_report import as_markdown, write

PLANS = Path(__file__).parent / "plans"
FORGETTERS = (
    "retrain, catastrophic, gradient-ascent, random-label, ssd, {ssd: {selection: 2, importance: example}}, salun"
)
TEXT = (
    "Lives of five tasks with replay; then a whole class is asked for, and after it single examples. Every figure is a distance to "
    "models retrained without the request (mean over seeds ± half of the 95 % interval), with what it says beside *do nothing* and "
    "*retrain, another seed*: see docs/compare.md. Cost is a share of one retraining. The second request is asked of a network that the "
    "same method has changed before."
)


def plan(name: str, folder: Path) -> Path | None:
    """The plan with its paths filled in; None where its data is absent."""
    text = (PLANS / f"forget-{name}.yaml").read_text()
    if name == "mnist":
        images, labels = MNIST / "t10k-images-idx3-ubyte.gz", MNIST / "t10k-labels-idx1-ubyte.gz"
        if not (images.exists() and labels.exists()):
            return None
        text = text.replace("IMAGES", str(images)).replace("LABELS", str(labels))
    path = folder / f"forget-{name}.yaml"
    path.write_text(text)
    return path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--jobs", type=int, default=2)
    given = options.parse_args()
    tables: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("digits", "mnist"):
            path = plan(name, Path(folder))
            if path is None:
                print(f"forget-{name}: its data is absent, left out")
                continue
            made, home = compare(
                path, forget=FORGETTERS, seeds=given.seeds, jobs=given.jobs, folder=Path("runs") / f"bench-forget-{name}",
                told=lambda done, count, words, name=name: print(f"forget-{name}: {done} of {count} lives {words}", flush=True),
            )  # fmt: skip
            write(home, made)
            tables[name] = requests(made)
    save("forget", "Forgetting, against retraining", TEXT, [], seeds=given.seeds, tables=tables)


def requests(made: dict[str, Any]) -> str:
    """The tables of the requests, as Markdown."""
    text = as_markdown(made)
    return text[text.index("## ") :].replace("## Forget", "### Forget").replace("## forget", "### forget")


if __name__ == "__main__":
    main()
