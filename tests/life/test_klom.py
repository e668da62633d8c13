"""KLoM of lives: retraining stands at the floor, doing nothing does not, and no example's figure is kept."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput
from remanence.data import cat
from remanence.life import compare as comparing
from remanence.life import compare_report, references
from remanence.life.compare import AGAIN, NOTHING, compare
from remanence.life.evidence import ABSENT
from remanence.life.forgetting import reference_seed
from remanence.life.klom import PARTS, klom
from remanence.life.run import Reading, run_plan
from remanence.measure.klom import klom as divergence
from remanence.measure.klom import margins
from tests.life.test_compare import InProcess

PLAN = """
name: small
seed: {seed}
threads: 1
stream: {{split-digits: {{tasks: 5}}}}
model: {{mlp: {{hidden: [32]}}}}
train: {{epochs: 4, batch_size: 32, lr: 0.003}}
keep: [{{replay: {{per_class: 10}}}}]
events:
  - learn: 0
  - learn: 1
  - forget: {{{what}, by: {by}, verify: {{retrain: {{seeds: {count}}}}}}}
"""
SEEDS = (0, 1, 2)
#: What the gaussian estimator says on average of 3 networks against 6 of the same normal distribution.
FLOOR = 0.90


@pytest.fixture(autouse=True, scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMANENCE_CONFIG", str(tmp_path_factory.mktemp("keys")))
        yield
    torch.set_num_threads(threads)


def lived(folder: Path, what: str, by: str, seeds: tuple[int, ...] = SEEDS, count: int = 3) -> list[Path]:
    homes = []
    for seed in seeds:
        plan = folder / f"{seed}.yaml"
        plan.write_text(PLAN.format(seed=seed, what=what, by=by, count=count))
        homes.append(folder / f"life {seed}")
        run_plan(plan, homes[-1], references=folder / "references").close()
    return homes


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return lived(tmp_path_factory.mktemp("retrained"), "ids: [0-400]", "retrain")


def test_retraining_stands_at_the_floor_and_doing_nothing_does_not(retrained: list[Path]) -> None:
    before = [(home / "ledger.db").read_bytes() for home in retrained]
    found = klom(retrained, retrained[0].parent / "references", nothing=True)
    assert (found["lives"], found["oracles"], found["estimator"]) == (3, 6, "gaussian")
    for part in PARTS:
        rows = {name: row[part]["mean"] for name, row in found["rows"].items()}
        assert 0.4 < rows["unlearned"] / FLOOR < 1.6 and 0.4 < rows["oracle against oracle"] / FLOOR < 1.6
        assert rows["do nothing"] > 1.5 * max(rows["unlearned"], rows["oracle against oracle"])
    assert [(home / "ledger.db").read_bytes() for home in retrained] == before  # the lives were only looked at


def test_figures_are_those_of_the_lives_networks(retrained: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The request's row by hand: plain forwards of the lives' and the references' networks, in the order of columns they have."""
    after, oracles = [], []
    for home in retrained:
        with Reading.resume(home, references=home.parent / "references") as life:
            ids = life._ids(life._rows[-1].body["ids"])
            examples = cat([learned.task.train.only(ids) for learned in life._learned if learned.task is not None])
            known = [
                references.live_again(life, life._books.tombstones, reference_seed(life.seed, k)) for k in range(3)
            ]
            for state, into in [(life._state, after), *[(r, oracles) for r in known]]:
                state.model.eval()
                with torch.no_grad():
                    y = torch.tensor([state.labels.index(label) for label in examples["y"].tolist()])
                    into.append(margins(state.model(examples["x"]), y))
    each = []
    for k in range(3):
        left = [margin for i, margin in enumerate(oracles) if i % 3 != k]
        each.append(divergence(np.stack(after), np.stack(left)))
    found = klom(retrained, retrained[0].parent / "references")["rows"]["unlearned"]["forget"]
    assert found["mean"] == pytest.approx(np.mean(each), rel=1e-6)
    assert found["p95"] == pytest.approx(np.mean([np.percentile(one, 95) for one in each]), rel=1e-6)
    monkeypatch.setattr(references, "learn_event", lambda *_, **__: pytest.fail("a reference was trained again"))
    histogram = klom(retrained, retrained[0].parent / "references", estimator="histogram")
    assert histogram["rows"]["unlearned"]["forget"]["mean"] > 5  # the floor of a histogram of 3 against 6 is about 8


def test_only_means_and_percentiles_are_told(retrained: list[Path]) -> None:
    found = klom(retrained, retrained[0].parent / "references")
    assert set(found) == {"lives", "oracles", "estimator", "rows"}
    for row in found["rows"].values():
        assert set(row) == set(PARTS) and all(set(value) == {"mean", "p95"} for value in row.values())


def test_few_examples_have_no_percentile(tmp_path: Path) -> None:
    homes = lived(tmp_path, "ids: [0-40]", "catastrophic", (0, 1), 2)  # eleven of them were learned
    rows = klom(homes, tmp_path / "references")["rows"]
    assert rows["unlearned"]["forget"] is None and rows["unlearned"]["retain"]["mean"] > 0


def test_a_class_that_no_oracle_knows(tmp_path: Path) -> None:
    """Its column is missing there; the margin is about -20, far from any network's that knows the class."""
    homes = lived(tmp_path, "classes: [3]", "catastrophic", (0, 1), 2)
    rows = klom(homes, tmp_path / "references")["rows"]
    assert rows["unlearned"]["forget"]["mean"] == pytest.approx(-np.log(1e-5)) and ABSENT == 20
    assert rows["oracle against oracle"]["forget"]["mean"] < 6


def test_what_cannot_be_compared_is_said(retrained: list[Path], tmp_path: Path) -> None:
    folder = retrained[0].parent / "references"
    with pytest.raises(BadInput, match="two or more"):
        klom(retrained[:1], folder)
    shutil.copytree(retrained[0], tmp_path / "copy", ignore=shutil.ignore_patterns("lock"))
    with pytest.raises(BadInput, match="same seed"):
        klom([retrained[0], tmp_path / "copy"], folder)
    other = lived(tmp_path, "ids: [0-200]", "retrain", (7,), 2)
    with pytest.raises(BadInput, match="same plan"):
        klom([retrained[0], *other], folder)
    plan = tmp_path / "learn.yaml"
    plan.write_text(PLAN.format(seed=8, what="ids: [0]", by="retrain", count=2).rpartition("  - forget")[0])
    run_plan(plan, tmp_path / "learn").close()
    with pytest.raises(BadInput, match="last event"):
        klom([retrained[0], tmp_path / "learn"], folder)


def test_a_comparison_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.setattr(comparing, "ProcessPoolExecutor", InProcess)
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(seed=0, what="ids: [0-400]", by="ssd", count=2).replace("epochs: 4", "epochs: 1"))
    options: dict[str, Any] = {"forget": "retrain, ssd", "seeds": 2, "references": 2, "folder": tmp_path / "grid"}
    made, folder = compare(plan, klom=True, **options)
    (request,) = made["requests"]
    assert request["klom"] == {"lives": 2, "oracles": 2, "estimator": "gaussian"}
    rows = {row["by"]: row["klom"] for row in request["rows"]}
    assert list(rows) == [NOTHING, AGAIN, "retrain", "ssd"] and all(set(row) == set(PARTS) for row in rows.values())
    compare_report.write(folder, made)
    lines = [
        line
        for line in csv.DictReader((folder / "comparison.csv").read_text().splitlines())
        if "KLoM" in line["figure"]
    ]
    assert len(lines) == 4 * 3 * 2 and {line["half_width_95"] for line in lines} == {""}
    assert (
        "KLoM test" in (folder / "comparison.md").read_text()
        and "its floor" in (folder / "comparison.html").read_text()
    )
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(compare_report.render(made))
    assert "KLoM" in console.export_text()
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(json.dumps(made))
    plain, _ = compare(plan, **options)
    assert "klom" not in json.dumps(plain) and "KLoM" not in compare_report.as_markdown(plain)
    with pytest.raises(BadInput, match="two seeds"):
        compare(plan, klom=True, **{**options, "seeds": 1})
