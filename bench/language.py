"""What methods of learning and keeping do to a small language model: new loss, old loss, forgetting, seconds, bytes.

    python -m bench.language [--only domains people] [--rows finetune gere ...] [--seeds 3] [--jobs 2]

Two streams. *domains*: a network that was taught Shakespeare goes on with Wikipedia. *people*: one that was taught general sentences
learns authors who do not exist, in three batches. Every cell is a life; they are cached in runs/bench-language.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.common import MNIST, RESULTS, save
from remanence import CausalLM, Life
from remanence.data import Examples, Task
from remanence.data.people import general_text, people_stream
from remanence.data.tokenizers import bpe
from remanence.data.tokens import tokenised, tokenised_task
from remanence.life.report_words import size
from remanence.measure.evidence import interval
from remanence.models import llama, save_weights
from remanence.nn.anatomy import module_bytes

DATA = MNIST.parent
SHAKESPEARE, WIKIPEDIA = DATA / "tinyshakespeare" / "input.txt", DATA / "wikitext2" / "valid.txt"
RUNS = Path("runs") / "bench-language"
CONTEXT = {"domains": 128, "people": 64}
REPLAY: dict[str, Any] = {"replay": {"policy": "reservoir", "capacity": 100, "batch_size": 8}}
SLOW: dict[str, Any] = {"capacity": 100, "a_max": 0.9, "gamma": 10.0}
LORA: dict[str, Any] = {"lora": {"rank": 16, "alpha": 32.0}}


@dataclass
class Row:
    """A method, what it is held beside, and what its card expects of it there."""

    name: str
    life: dict[str, Any] = field(default_factory=dict)  # of the whole life
    event: dict[str, Any] = field(default_factory=dict)  # of the events that are learned
    beside: str = "finetune"
    expects: str = "old loss lower"
    only: tuple[str, ...] = ("domains", "people")


def rows() -> list[Row]:
    """Every row of both tables; what is stored is equally much where something is."""
    lora = {"where": [LORA], "lr": 5e-3}
    return [
        Row("finetune", expects=""),
        Row("joint", event={"learner": "joint"}),
        Row("replay", {"keep": [REPLAY]}),
        Row("l2", {"keep": [{"l2": {"strength": 1e-2}}]}),
        Row("ewc", {"keep": [{"ewc": {"strength": 100.0}}]}),
        Row("si", {"keep": ["si"]}),
        Row("agem", {"keep": [{"agem": {"capacity": 100}}]}),
        Row("feature-distill", {"keep": [{"feature-distill": {"strength": 1e-2}}]}),
        Row("gere", {"keep": [{"gere": {"texts": 100, "strength": 1.0}}]}),
        Row("gere, labels only", {"keep": [{"gere": {"texts": 100, "form": "labels"}}]}),
        Row("hft", event={"where": ["hft"]}),
        Row("migu", {"keep": ["migu"]}),
        Row("lt-sft, 5 %", event={"learner": {"lt-sft": {"density": 0.05}}}),
        Row("lcia", {"keep": ["lcia"]}),
        Row("i-lora, all weights", {"keep": [{"i-lora": {**SLOW}}]}, beside="replay"),
        Row("ama", {"keep": [{"ama": {"alpha": 0.3}}]}),
        Row("lines", {"keep": ["lines"]}),
        Row("lora", event=lora),
        Row("kore", event={"where": [{"kore": {"rank": 16}}], "lr": 5e-3}, beside="lora"),
        Row("loramoe", event={"where": ["loramoe"], "lr": 5e-3}, beside="lora"),
        Row("mora-cl", event={"where": ["mora-cl"], "lr": 5e-3}, beside="lora"),
        Row("i-lora", {"keep": [{"i-lora": {**SLOW}}]}, lora, beside="lora"),
        Row("sefe", {"keep": ["sefe"], "where": [LORA]}, {"lr": 5e-3}, beside="lora", only=("people",)),
        Row(
            "infinite-lr",
            event={"schedule": {"infinite-lr": {"warmup": 10, "cooldown": 30, "constant": 0.55}}},
            expects="old loss lower",
            only=("people",),
        ),
        Row("cpt-rewarm-replay, 7 %", event={"learner": {"cpt-rewarm-replay": {"share": 0.07}}}),
        Row("cpt-rewarm-replay, 25 %", event={"learner": {"cpt-rewarm-replay": {"share": 0.25}}}),
        Row(
            "stability-gap-cpt",
            event={"learner": {"stability-gap-cpt": {"subset": 0.5}}, "epochs": 4},
            only=("domains",),
        ),
        Row("dmt, 1/16", event={"learner": {"dmt": {"k": 1 / 16}}}),
    ]


# -- the two streams -------------------------------------------------------------------------------------------------------------------


def blocks(path: Path, count: int) -> list[str]:
    """The first `count` paragraphs of some length of a file."""
    found, held = list[str](), ""
    for line in path.read_text(encoding="utf-8").splitlines():
        held += line.strip() + "\n"
        if len(held) >= 1500:
            found.append(held)
            held = ""
    return found[:count]


@cache
def parts(which: str) -> tuple[Any, CausalLM, Task, list[Task]]:
    """The tokenizer, the problem, what the network is taught first, and what the life then learns."""
    problem = CausalLM(context=CONTEXT[which], long="split")
    if which == "people":
        tokenizer = bpe(512)
        stream = people_stream(3, 12)
        general = general_text(2400)
        first = Task(general.select(torch.arange(2000)), general.select(torch.arange(2000, 2400)), id=0)
        later = [Task(t.train, t.test, id=1 + t.id, strangers=t.strangers) for t in stream]
        return (
            tokenizer,
            problem,
            tokenised_task(first, tokenizer, problem),
            [tokenised_task(t, tokenizer, problem) for t in later],
        )
    tokenizer = bpe(1024, str(SHAKESPEARE))
    made = []
    for number, path in enumerate((SHAKESPEARE, WIKIPEDIA)):
        texts = blocks(path, 200 if number == 0 else 100)
        cut = len(texts) - 20
        train, test = (
            tokenised(
                Examples({"text": texts[at]}, path.parent.name, torch.arange(len(texts))[at] + 1000 * number),
                tokenizer,
                problem,
            )
            for at in (slice(0, cut), slice(cut, None))
        )
        made.append(Task(train, test, id=number))
    return tokenizer, problem, made[0], made[1:]


SETTINGS: dict[str, dict[str, Any]] = {
    "domains": {
        "epochs": 2,
        "batch_size": 16,
        "lr": 1e-3,
        "schedule": {"cosine": {"warmup": 5, "final": 0.1}},
        "clip": 1.0,
    },
    "people": {"epochs": 15, "batch_size": 32, "lr": 2e-3, "schedule": {"cosine": {"warmup": 10}}, "clip": 1.0},
}


def network(which: str, seed: int) -> Any:
    """The network that was taught the first part; made once for each seed."""
    tokenizer, problem, first, _ = parts(which)
    file = RUNS / f"base-{which}-{seed}.safetensors"
    shape = {"hidden": 96, "layers": 3, "context": problem.context, "seed": seed}
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with Life(llama(len(tokenizer), **shape), tokenizer=tokenizer, problem=problem, seed=seed) as life:
            life.learn(
                first,
                epochs=6 if which == "domains" else 8,
                batch_size=32,
                lr=2e-3,
                schedule={"cosine": {"warmup": 20, "final": 0.1}},
                clip=1.0,
            )
            print(f"{which}, seed {seed}: taught; {life.measure()['accuracy']:.3f}", flush=True)
            save_weights(life.model, file)
    return llama(len(tokenizer), **shape, weights=str(file))


def cell(which: str, row: Row, seed: int) -> dict[str, Any]:
    """One life's figures."""
    file = RUNS / f"{which}-{row.name.replace('/', '-')}-{seed}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    torch.set_num_threads(1)
    tokenizer, problem, first, later = parts(which)
    with Life(
        network(which, seed), tokenizer=tokenizer, problem=problem, seed=seed, measure=["bytes"], **row.life
    ) as life:
        life.learn(first, epochs=0)  # what the network was taught: the life knows of it and trains nothing

        def looked() -> list[dict[str, float]]:
            c = life._context()
            return [c.evaluate(task.test) for task in [first, *later]]

        plain = module_bytes(life.model)
        table, seconds = [looked()], 0.0
        for task in later:
            start = time.process_time()
            life.learn(task, **{**SETTINGS[which], **row.event})
            seconds += time.process_time() - start
            table.append(looked())
        held = sum(value for name, value in life.holders.items() if name not in ("snapshots", "references"))
    last = table[-1]
    own = [table[1 + i][1 + i] for i in range(len(later))]
    old = range(len(later)) if which == "domains" else range(1, len(later))
    lasting = [last[i] for i in old]
    then = [table[i][i] for i in old]
    mean = lambda of, name: sum(each[name] for each in of) / len(of)  # noqa: E731
    found = {
        "new loss": mean(own, "loss"),
        "old loss": mean(lasting, "loss"),
        "forgetting": mean(lasting, "loss") - mean(then, "loss"),
        "new accuracy": mean(own, "accuracy"),
        "old accuracy": mean(lasting, "accuracy"),
        "general loss": last[0]["loss"] - table[0][0]["loss"],
        "seconds": seconds,
        "bytes": float(held - plain),
    }
    file.write_text(json.dumps(found))
    return found


def guarded(which: str, row: Row, seed: int) -> dict[str, Any] | str:
    """`cell`, or what went wrong."""
    try:
        return cell(which, row, seed)
    except Exception as error:  # one method must not take the others along
        return f"{type(error).__name__}: {error}"


# -- the tables ------------------------------------------------------------------------------------------------------------------------


def table(which: str, chosen: list[Row], seeds: int, jobs: int) -> str:
    """One stream's rows as Markdown."""
    for seed in range(seeds):
        network(which, seed)
    todo = [(row, seed) for row in chosen for seed in range(seeds)]
    found: dict[str, list[Any]] = {row.name: [] for row in chosen}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for (row, seed), made in zip(
            todo, pool.map(guarded, [which] * len(todo), *zip(*todo, strict=True)), strict=True
        ):
            found[row.name].append(made)
            print(
                f"{which}: {row.name}, seed {seed}: {made if isinstance(made, str) else {k: round(v, 3) for k, v in made.items()}}",
                flush=True,
            )
    names = ["new loss", "old loss", "forgetting"] + (
        ["new accuracy", "old accuracy", "general loss"] if which == "people" else []
    )
    lines = [
        f"| method | {' | '.join(names)} | seconds | over plain | memory beside the network | expected | seen |",
        "|---|" + "---|" * (len(names) + 5),
    ]
    plain = [made["seconds"] for made in found["finetune"]]
    for row in chosen:
        cells = found[row.name]
        if any(isinstance(made, str) for made in cells):
            lines.append(f"| {row.name} | not lived: {next(made for made in cells if isinstance(made, str))} |")
            continue
        said = [shown([made[name] for made in cells]) for name in names]
        seconds = [made["seconds"] for made in cells]
        over = sum(seconds) / sum(plain)
        expects, seen = verdict(row, cells, found.get(row.beside, []))
        lines.append(
            f"| {row.name} | {' | '.join(said)} | {sum(seconds) / len(seconds):.1f} | {over:.2f} x | {size(cells[0]['bytes'])} | {expects} | {seen} |"
        )
    return "\n".join(lines) + "\n"


def shown(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"


def verdict(row: Row, cells: list[dict[str, float]], control: list[Any]) -> tuple[str, str]:
    """What is expected beside the control, and whether the paired difference shows it: beyond its 95 % interval, or not."""
    if not row.expects or not control or any(isinstance(made, str) for made in control):
        return row.expects, ""
    name, _, way = row.expects.rpartition(" ")
    sign = -1 if way == "lower" else 1
    difference = [sign * (mine[name] - theirs[name]) for mine, theirs in zip(cells, control, strict=True)]
    mean, half = interval(difference)
    half = math.inf if half is None else half
    word = "seen" if mean > half else "the opposite" if -mean > half else "not beyond the interval"
    return f"{row.expects} than {row.beside}", f"{word} ({sign * mean:+.2f} ± {half:.2f})"


TEXT = (
    "A Llama of 0.4 million weights. Losses in nats per token of held-out text, accuracy in words of the answers when the same facts are "
    "asked for in a way that nobody trained on. *New*: right after learning; *old*: at the end, of what came before; *forgetting*: how much "
    "that loss rose since it was learned. *General loss*: how much the loss of general sentences rose. *Seen*: the paired difference to the "
    "row named, mean over seeds ± half of its 95 % interval. Replay, A-GEM, GeRe and I-LoRA store 100 rows each; adapters train at five "
    "(people: two and a half) times the rate. Seconds are the processor's, of learning and committing, on one thread beside other work."
)
ABOUT = {
    "domains": "**Two domains.** The network was taught Shakespeare (180 blocks of 1,500 letters, six epochs), and goes on with Wikipedia (80 blocks, two epochs).",
    "people": "**People.** The network was taught 2,000 general sentences, and learns twelve authors who do not exist in three batches (96 rows each, 15 epochs).",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    options.add_argument("--rows", nargs="*", default=None)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--jobs", type=int, default=2)
    given = options.parse_args()
    file = RESULTS / "language.json"
    kept = json.loads(file.read_text()) if file.exists() else {"settings": {"tables": {}}}
    tables = kept["settings"]["tables"]
    for which in given.only:
        if which == "domains" and not (SHAKESPEARE.exists() and WIKIPEDIA.exists()):
            print("domains: its data is absent, left out")
            continue
        chosen = [
            row for row in rows() if which in row.only and (given.rows is None or row.name in (*given.rows, "finetune"))
        ]
        start = time.perf_counter()
        made = table(which, chosen, given.seeds, given.jobs)
        print(made, f"{time.perf_counter() - start:.0f} s", flush=True)
        if given.rows is None:
            tables[which] = f"{ABOUT[which]}\n\n{made}"
            save("language", "Language models", TEXT, [], seeds=given.seeds, tables=tables)


if __name__ == "__main__":
    main()
