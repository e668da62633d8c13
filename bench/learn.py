"""Every learner and keeper on the same streams: accuracy, forgetting, the deepest fall on the way, seconds, bytes.

    python -m bench.learn [--only split-mnist blurry-digits permuted-mnist omniglot pretrained pretrained-blurry long] [--jobs 2]

The lives are those of `remanence compare`; they are cached in runs/bench-learn-*, so that only what changed is run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.common import MNIST, RESULTS, Row, save
from remanence import Life
from remanence.data import omniglot
from remanence.life.compare import compare
from remanence.life.compare_report import stat, write
from remanence.life.report_words import percent, size
from remanence.models import cnn, save_weights, vit

OMNIGLOT = MNIST.parent / "omniglot" / "images_background_small1.zip"
IDX = {"images": str(MNIST / "t10k-images-idx3-ubyte.gz"), "labels": str(MNIST / "t10k-labels-idx1-ubyte.gz")}
VIT: dict[str, Any] = {"patch": 7, "width": 64, "depth": 5, "heads": 4, "ratio": 2, "pool": "token"}
LEARNERS = "joint, nmc, protocl, fetril, prd, uer, hpcr, onpro, napa-vq, {sharp: {phase_epochs: 1}}, lingocl, sisa"
KEEPERS = (
    "{replay: {per_class: 20}}, {der: {capacity: 200}}, {gss: {capacity: 200}}, {fpf: {capacity: 200}}, power-law-rehearsal, "
    "{agem: {capacity: 200}}, {ewc: {strength: 100}}, l2, si, mas, task-free-mas, lwf, feature-distill, gpm, cuber, hlop, "
    "gradient-restriction, refresh-learning, view-batch, [{replay: {per_class: 20}}, refresh-learning], [{replay: {per_class: 20}}, view-batch], "
    "[{replay: {per_class: 20}}, lwf]"
)
#: Learners that are meant to stand beside replay, and it.
BOTH, REPLAY = "uer, lingocl", "{replay: {per_class: 20}}"
#: Those that are meant for one head under changing inputs, and what they are held beside.
DOMAIN = (
    "{replay: {per_class: 20}}, {der: {capacity: 200}}, {agem: {capacity: 200}}, {ewc: {strength: 1}}, {ewc: {strength: 10}}, l2, si, "
    "{si: {strength: 1}}, {mas: {strength: 0.01}}, {mas: {strength: 0.1}}, gpm, cuber, hlop"
)
#: Those whose memory is meant to grow with the classes only, or not at all.
MANY = "{replay: {per_class: 5}}, {der: {capacity: 500}}, {gss: {capacity: 500}}, {ewc: {strength: 100}}, lwf"
#: Those whose time and memory are not meant to grow with the number of tasks, of equal size and one set of classes.
FLAT = ("none", "replay", "der", "agem", "ewc", "si", "mas", "gpm", "hlop")


@dataclass
class Setup:
    """One table: a plan without its name and events, the number of its tasks, and what is compared in it."""

    plan: dict[str, Any]
    tasks: int
    learn: str
    keep: str
    about: str
    needs: tuple[Path, ...] = ()
    every: int = 10  # steps between two looks at all tasks; 0: none

    def text(self, name: str) -> str:
        """The plan; JSON is YAML."""
        events = [{"learn": number} for number in range(self.tasks)]
        for knobs in self.plan["model"].values():
            if "weights" in knobs:
                knobs["weights"] = backbone(knobs["weights"])
        looks = ["accuracy", "forgetting", "bytes", {"stability-gap": {"every": self.every, "subset": 200}}]
        measure = looks if self.every else ["bytes"]
        return json.dumps({"name": f"learn-{name}", "threads": 1, **self.plan, "events": events, "measure": measure})


def setups() -> dict[str, Setup]:
    """The tables by name."""
    adam = {"batch_size": 64, "optimizer": "adamw", "lr": 0.001}
    mlp = {"mlp": {"hidden": [256, 256]}}
    return {
        "split-mnist": Setup(
            {"stream": {"split-idx": {**IDX, "flat": True}}, "model": mlp, "train": {**adam, "epochs": 3}},
            5, LEARNERS, KEEPERS,
            "Split MNIST: 7,500 images, five tasks of two classes, no task label at test time; MLP 784-256-256, three epochs.",
            (MNIST,),
        ),
        "blurry-digits": Setup(
            {
                "stream": {"blurry": {"source": "digits", "tasks": 5, "share": 0.2}},
                "model": {"mlp": {"hidden": [128, 128]}},
                "train": {**adam, "batch_size": 16, "epochs": 3},
            },
            5, LEARNERS, KEEPERS,
            "Blurry digits: 1,347 images, five tasks, a fifth of each task's rows from the classes of others, learners are not told of "
            "borders; MLP 64-128-128, three epochs.",
        ),
        "permuted-mnist": Setup(
            {
                "stream": {"permuted": {"source": {"idx": IDX}, "tasks": 10}},
                "model": mlp,
                "train": {"batch_size": 64, "optimizer": "sgd", "lr": 0.1, "epochs": 1},
            },
            10, "joint", DOMAIN,
            "Permuted MNIST: ten tasks of all ten classes and 7,500 images, pixels in another order in each; MLP 784-256-256, SGD, one epoch.",
            (MNIST,),
        ),
        "omniglot": Setup(
            {
                "stream": {
                    "split-classes": {
                        "source": {"omniglot": {"path": str(OMNIGLOT)}},
                        "tasks": [[2 * number, 2 * number + 1] for number in range(50)],
                    }
                },
                "model": {"cnn": {"channels": [16, 32]}},
                "train": {**adam, "batch_size": 16, "epochs": 10},
            },
            50, "joint, nmc, hpcr, lingocl", MANY,
            "Omniglot: 50 tasks of two characters, 15 images each to learn and 5 held out; a small convolutional network, ten epochs.",
            (OMNIGLOT,), 0,
        ),
        "pretrained": Setup(
            {
                "stream": {"split-classes": {"source": {"idx": IDX}, "tasks": 5}},
                "model": {"cnn": {"channels": [16, 32], "weights": "cnn"}},
                "train": {**adam, "epochs": 1},
            },
            5, "joint, nmc, acu, {dkvb: {codebooks: 64, pairs: 512}}, fetril, protocl, napa-vq, lingocl", "{replay: {per_class: 20}}, l2, lwf",
            "Split MNIST from a convolutional network that was taught Omniglot's 136 characters; one epoch.",
            (MNIST, OMNIGLOT),
        ),
        "pretrained-blurry": Setup(
            {
                "stream": {"si-blurry": {"source": {"idx": IDX}, "tasks": 5}},
                "model": {"vit": {**VIT, "weights": "vit"}},
                "train": {"batch_size": 64, "optimizer": "adam", "lr": 0.005, "epochs": 1},
            },
            5,
            "nmc, mvp-siblurry, {mvp-siblurry: {mask: false, contrast: false, focal: false, scaling: false}}, "
            "{mvp-siblurry: {own_blocks: [4], own_length: 1, shared_blocks: [0], shared_length: 1}}, acu",
            "{replay: {per_class: 20}}",
            "Si-Blurry MNIST, one pass without borders, from a small vision transformer that was taught Omniglot's 136 characters.",
            (MNIST, OMNIGLOT),
        ),
    }  # fmt: skip


def backbone(name: str) -> str:
    """The file of a network that was taught Omniglot's characters; made once."""
    file = Path("runs") / "bench-learn-backbones" / f"{name}.safetensors"
    if not file.exists():
        torch.set_num_threads(1)
        examples = omniglot(OMNIGLOT)
        model = cnn((1, 28, 28), [16, 32]) if name == "cnn" else vit((1, 28, 28), **VIT)
        with Life(model) as life:
            life.learn(examples, epochs=30, batch_size=64, optimizer="adamw", lr=0.002, schedule="cosine")
            print(f"backbone {name}: {life.measure()}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_weights(life.model, file)
    return str(file)


def table(name: str, setup: Setup, seeds: int, jobs: int) -> str:
    """One setup's lives as Markdown."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"learn-{name}.yaml"
        path.write_text(setup.text(name))
        made = [
            compare(path, learn=learn, keep=keep, seeds=seeds, jobs=jobs, folder=Path("runs") / f"bench-learn-{name}-{part}",
                    told=lambda done, count, words: print(f"{name}: {done} of {count} lives {words}", flush=True))
            for part, learn, keep in (("learn", f"finetune, {setup.learn}", "none"), ("keep", "finetune", f"none, {setup.keep}"),
                                      *([("both", BOTH, REPLAY)] if setup.learn == LEARNERS else []))
        ]  # fmt: skip
    for data, home in made:
        write(home, data)
    learners, keepers, *both = (data for data, _ in made)
    for life in (life for data in both for life in data["lives"]):
        life["difference"] = None  # it is to the first of these, and not to finetuning alone
    plain = keepers["lives"][0]["figures"]["seconds"]["mean"]
    lines = [
        f"**{setup.about}** Mean over seeds {learners['seeds'][0]} to {learners['seeds'][-1]} ± half of the 95 % interval:\n",
        "| learner | keeper | final accuracy | against finetune | incremental | forgetting | min-ACC | seconds | over plain | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(life, plain) for data in (learners, keepers, *both) for life in data["lives"] if life["figures"]["average_accuracy"]
              and not (data is keepers and life["keep"] == "none")]  # fmt: skip
    refused = {(f["learner"], f["keep"]): f["error"] for data, _ in made for f in data["failed"]}
    lines += [
        f"\nNot lived: {'; '.join(f'{learner} with {keep}: {error}' for (learner, keep), error in refused.items())}"
    ] * bool(refused)
    return "\n".join(lines) + "\n"


def row(life: Mapping[str, Any], plain: float) -> str:
    figures, measures = life["figures"], life["measures"]
    difference = stat(life["difference"], lambda value: percent(value, True)) if life["difference"] else ""
    seconds = figures["seconds"]
    cells = [
        life["learner"],
        life["keep"],
        stat(figures["average_accuracy"], percent),
        difference,
        stat(figures["average_incremental_accuracy"], percent),
        stat(figures["forgetting"], percent),
        stat(measures.get("min_acc"), percent),
        f"{seconds['mean']:.2f}",
        f"{seconds['mean'] / plain:.2f} x",
        size(figures["bytes"]["mean"]),
    ]
    return f"| {' | '.join(cells)} |"


def flat(seeds: int, jobs: int) -> list[Row]:
    """A stream of 100 tasks: what a task costs at its end, over what it cost near its beginning."""
    setup = {
        "name": "learn-long",
        "threads": 1,
        "stream": {"permuted": {"source": "digits", "tasks": 100}},
        "model": {"mlp": {"hidden": [128]}},
        "train": {"epochs": 2, "batch_size": 32, "optimizer": "adamw", "lr": 0.001},
        "events": [{"learn": number} for number in range(100)],
        "measure": ["bytes"],
    }
    rows = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "learn-long.yaml"
        path.write_text(json.dumps(setup))
        home = Path("runs") / "bench-learn-long"
        compare(path, learn="finetune", keep=", ".join(FLAT), seeds=seeds, jobs=jobs, folder=home)
    cells = sorted(home.glob("cells/*/cell.json"), key=lambda cell: cell.stat().st_mtime)
    newest = {
        told["names"]["keep"]: told for told in map(json.loads, map(Path.read_text, cells))
    }  # not those of older code
    for told in newest.values():
        if told["error"] is not None:
            raise SystemExit(f"{told['names']}: {told['error']}")
        events = told["report"]["events"]
        for what, of, unit in (("seconds", lambda e: e["seconds"], "time"), ("bytes", lambda e: e["measures"]["bytes"], "memory")):  # fmt: skip
            early, late = (median(of(e) for e in part) for part in (events[10:20], events[90:]))
            note = f"{early:.3g} {what} then {late:.3g}"
            name = "finetune" if told["names"]["keep"] == "none" else told["names"]["keep"]
            limit = 1.2 if unit == "time" else 1.02
            rows.append(Row(f"{name}: {unit} of task 90 to 99 over task 10 to 19, of 100 tasks", "digits", late / early,
                            "x", f"at most {limit}", late / early <= limit, note=note))  # fmt: skip
    return rows


TEXT = (
    "Every learner alone and every keeper under plain finetuning, beside *finetune* and *joint*, with default or published settings but "
    "equal memory where examples are stored. *Against finetune* is paired by seed. *min-ACC* is the mean over tasks of the lowest accuracy "
    "after a task's end, looked at every ten steps (not on Omniglot). Seconds are those of learning alone, on one thread beside another busy core; *over plain* "
    "is their share of finetuning's. On Omniglot, with the transformer, and of learners beside replay more work ran at the time: order of size only. Memory is the network and all that learner and keepers hold at the end."
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="*", default=[*setups(), "long"], choices=[*setups(), "long"])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--jobs", type=int, default=2)
    given = options.parse_args()
    file = RESULTS / "learn.json"
    kept = json.loads(file.read_text()) if file.exists() else {"settings": {"tables": {}}, "rows": []}
    tables, rows = kept["settings"]["tables"], [Row(**one) for one in kept["rows"]]
    for name in given.only:
        if name == "long":
            rows = flat(1, 1)
        elif not all(path.exists() for path in setups()[name].needs):
            print(f"{name}: its data is absent, left out")
        else:
            tables[name] = table(name, setups()[name], given.seeds, given.jobs)
        save("learn", "Learning and keeping", TEXT, rows, seeds=given.seeds, tables=tables)


if __name__ == "__main__":
    main()
