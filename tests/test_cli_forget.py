"""What the command does about forgetting: methods chosen by measuring, requests by difficulty, comparisons as distributions, audits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remanence.life.compare import AGAIN
from remanence.life.compare import NOTHING as NOT_DONE
from remanence.measure.benchmarks.open_problems_unlearning import OpenProblems
from tests.test_cli import call

PLAN = """\
name: small
stream: {split-digits: {tasks: 5}}
model: {mlp: {hidden: [32]}}
keep: [{replay: {per_class: 10}}]
train: {epochs: 4, batch_size: 32, lr: 0.003}
events:
  - learn: 0
  - learn: 1
"""
#: A method that dampens no weight.
NOTHING = "{ssd: {selection: 1.0e+30}}"
FAST = OpenProblems(
    relearn_n=[5], rates=[0.01], steps=5, seeds=1, bits=[4], prune=[0.2], noise=[0.2], permutations=0
)  # fmt: skip


def lived(folder: Path, text: str = PLAN) -> Path:
    (folder / "plan.yaml").write_text(text)
    answer = call("run", folder / "plan.yaml", "--home", folder / "home", "--quiet")
    assert answer.code == 0, answer
    return folder / "home"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two tasks learned; do not change it."""
    return lived(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "home"))


@pytest.fixture(scope="module")
def forgotten(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, asked to forget a class; do not change it."""
    made = Path(shutil.copytree(finished, tmp_path_factory.mktemp("forgotten") / "home"))
    assert call("forget", made, "--classes", "3", "--by", "retrain", "--verify", "0", "--quiet").code == 0
    return made


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remanence.life.audit.OpenProblems", lambda: FAST)


def receipt(home: Path, number: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "receipts" / f"{number:04}.json").read_text())["receipt"]
    return found


# -- methods chosen by measuring -----------------------------------------------------------------------------------------


def test_auto_takes_a_candidate_with_its_own_bits(home: Path, finished: Path, tmp_path: Path) -> None:
    by = f"{{auto: {{candidates: [{NOTHING}, random-label], references: 2}}}}"
    answer = call("forget", home, "--classes", "3", "--by", by, "--verify", "0")
    assert answer.code == 0 and "forget class 3 by auto" in answer.out, answer
    notes = receipt(home)["notes"]
    assert notes[0].startswith("attempt 1: ssd: not like retraining in forget accuracy")
    assert notes[1].startswith("attempt 2: random-label") and notes[-1].startswith("took random-label")
    assert receipt(home)["method"]["auto"]["candidates"] == [{"ssd": {"selection": 1e30}}, "random-label"]
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    assert call("forget", other, "--classes", "3", "--by", "random-label", "--verify", "0").code == 0
    assert receipt(home)["weights_sha256"] == receipt(other)["weights_sha256"]
    assert call("verify", home / "receipts" / "0001.json").code == 0


def test_auto_refuses_what_is_no_candidate(home: Path) -> None:
    for candidates, said in (("[]", "names no method"), ("[retrain]", "no candidate"), ("[sdd]", "'ssd'")):
        answer = call("forget", home, "--classes", "3", "--by", f"{{auto: {{candidates: {candidates}}}}}")
        assert (answer.code, answer.out) == (2, "") and said in answer.err, answer
    assert not list((home / "receipts").iterdir())


@pytest.mark.slow
def test_auto_with_its_own_candidates(home: Path) -> None:
    answer = call("forget", home, "--classes", "3", "--by", "auto")
    assert answer.code == 0, answer
    notes = receipt(home)["notes"]
    assert notes[0].startswith("attempt 1: ssd") and notes[-1].startswith("took")
    assert receipt(home)["references"] == 3 and receipt(home)["after"]["forget accuracy"] < 0.1


# -- requests by difficulty ----------------------------------------------------------------------------------------------


def test_hardest_names_examples_as_forget_takes_them(home: Path) -> None:
    from remanence.data import split_digits

    found = [call("hardest", home, "--n", "12", *words) for words in ((), ("--easiest",), ("--json",))]
    assert [answer.code for answer in found] == [0, 0, 0] and all(answer.out.count("\n") == 1 for answer in found[:2])
    hard, easy = (answer.out.strip() for answer in found[:2])
    numbers = json.loads(found[2].out)
    assert len(set(numbers)) == 12 and numbers == sorted(numbers) and hard != easy
    learned = {int(i) for task in list(split_digits(tasks=5))[:2] for i in task.train.id}
    assert set(numbers) <= learned
    traced = json.loads(call("trace", home, "--ids", hard, "--json").out)
    assert [row["ids"] for row in traced if row["holder"] == "weights"] == [numbers]
    answer = call("forget", home, "--ids", hard, "--by", "retrain", "--verify", "0")
    assert answer.code == 0 and receipt(home)["n"] == 12
    assert not set(json.loads(call("hardest", home, "--n", "12", "--json").out)) & set(numbers)


def test_hardest_refuses_more_than_there_are(finished: Path) -> None:
    answer = call("hardest", finished, "--n", "100000")
    assert (answer.code, answer.out) == (2, "") and "100000" in answer.err and answer.err.count("\n") == 1
    assert call("hardest", finished, "--n", "0").code == 2 and call("hardest", finished).code == 2


# -- comparisons as distributions ----------------------------------------------------------------------------------------


def test_klom_needs_seeds_and_a_request_at_the_end(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    for text, seeds in ((PLAN + "  - forget: {classes: [1], by: ssd}\n", 1), (PLAN, 2)):
        plan.write_text(text)
        answer = call("compare", plan, "--klom", "--seeds", seeds, "--home", tmp_path / "grid")
        assert (answer.code, answer.out) == (2, "") and "two seeds or more" in answer.err, answer
    assert not (tmp_path / "grid").exists()


@pytest.mark.slow
def test_compare_with_klom(tmp_path: Path) -> None:
    plan, grid = tmp_path / "plan.yaml", tmp_path / "grid"
    plan.write_text(PLAN + "  - forget: {classes: [1], by: ssd}\n")
    words = ("compare", plan, "--forget", "catastrophic", "--seeds", "2", "--references", "2", "--klom", "--home", grid)
    answer = call(*words)
    assert answer.code == 0 and "KLoM" in answer.out, answer
    (request,) = json.loads((grid / "comparison.json").read_text())["requests"]
    assert request["klom"] == {"lives": 2, "oracles": 2, "estimator": "gaussian"}
    rows = {row["by"]: row["klom"]["forget"]["mean"] for row in request["rows"]}
    assert list(rows) == [NOT_DONE, AGAIN, "catastrophic"]
    assert rows[NOT_DONE] > rows[AGAIN] + 5, rows
    assert all("KLoM" in (grid / f"comparison.{kind}").read_text() for kind in ("md", "html"))
    lives = {path: path.stat().st_mtime_ns for path in grid.rglob("ledger.db")}
    assert call(*words).out == answer.out  # nothing is lived twice
    assert {path: path.stat().st_mtime_ns for path in grid.rglob("ledger.db")} == lives


# -- audits --------------------------------------------------------------------------------------------------------------


def test_an_audit_without_a_receipt_is_refused(finished: Path, forgotten: Path) -> None:
    for home, words, said in (
        (finished, (), "this life has no receipt"),
        (forgotten, ("--receipt", "2"), "no receipt 2"),
        (forgotten, ("--references", "1"), "references"),
        (forgotten, ("--shadows", "5"), "shadows"),
    ):
        answer = call("audit", home, *words)
        assert (answer.code, answer.out) == (2, "") and said in answer.err, answer
        assert not list(home.glob("audit.*"))


def test_an_audit_of_a_redacted_request_says_why_nothing_is_tested(home: Path, fast: None) -> None:
    assert call("forget", home, "--ids", "0,1,11", "--by", "retrain", "--verify", "0", "-q").code == 0
    assert call("redact", home, "--yes").code == 0
    answer = call("audit", home)
    assert answer.code == 0 and "not tested; redacted" in answer.out.replace("\n", " "), answer
    (request,) = json.loads((home / "audit.json").read_text())["requests"]
    assert set(request) == {"number", "asked", "by", "said", "untested"}


def test_an_audit_of_a_life_whose_data_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [",".join(f"{v:.3f}" for v in row) + f",{i % 2}" for i, row in enumerate(rng.random((60, 3)))]
    Path("people.csv").write_text("\n".join(["a,b,c,kind", *rows]))
    text = PLAN.replace(
        "{split-digits: {tasks: 5}}", "{permuted: {source: {csv: {path: people.csv, label: kind}}, tasks: 2}}"
    )
    home = lived(tmp_path, text + "  - forget: {ids: [0-5], by: catastrophic, verify: none}\n")
    Path("people.csv").unlink()
    answer = call("audit", home)
    assert answer.code == 2 and "people.csv" in answer.err and "Traceback" not in answer.err, answer
    assert not list(home.glob("audit.*"))


def test_delete_after_an_audit_leaves_nothing(forgotten: Path, tmp_path: Path, fast: None) -> None:
    home = Path(shutil.copytree(forgotten, tmp_path / "home"))
    assert call("audit", home, "--references", "2", "-q").code == 0
    assert {path.name for path in home.glob("audit.*")} == {"audit.json", "audit.html"}
    assert call("delete", home, "--yes").code == 0
    assert list(tmp_path.iterdir()) == []


# -- plans ---------------------------------------------------------------------------------------------------------------


def test_a_plan_asks_by_auto(tmp_path: Path) -> None:
    event = f"  - forget: {{classes: [3], by: {{auto: {{candidates: [{NOTHING}], references: 2, otherwise: retrain}}}}, verify: none}}\n"
    home = lived(tmp_path, PLAN + event)
    assert receipt(home)["notes"][-2:] == ["none of 1 is like retraining in every figure", "retrained"]
    assert receipt(home)["by"] == "auto" and receipt(home)["status"] == "done"
    states = {row["holder"]: row["state"] for row in receipt(home)["done"]}
    assert states["weights"] == "deleted"


def test_a_plan_asks_for_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{i % 7},{i % 5},{0.5 * i}" for i in range(80)]
    Path("ages.csv").write_text("\n".join(["a,b,age", *rows]))
    text = (
        "name: ages\nproblem: regression\nmodel: {mlp: {hidden: [8], outputs: 1}}\n"
        "stream: {permuted: {source: {csv: {path: ages.csv, label: age}}, tasks: 1}}\nevents:\n  - learn: 0\n"
        "  - forget: {targets: [0, 10.5], by: blindspot-regression, verify: {retrain: {seeds: 2}}}\n"
    )
    home = lived(tmp_path, text)
    assert receipt(home)["by"] == "blindspot-regression" and 10 < receipt(home)["n"] <= 22  # a quarter is held out
    assert "targets from 0 to 10.5" in call("report", home).out
    for wrong, said in (("[3, 1]", "the smaller first"), ("[1]", "targets")):
        Path("wrong.yaml").write_text(text.replace("[0, 10.5]", wrong))
        answer = call("run", "wrong.yaml", "--home", "other")
        assert answer.code == 2 and "wrong.yaml:7" in answer.err and said in answer.err, answer


def test_a_plan_undoes_corrupted_data_and_measures_it(tmp_path: Path) -> None:
    text = """\
name: poisoned
stream: {corrupted: {source: digits, how: patch, size: 2, share: 0.05, reveal: 0.5}}
model: {mlp: {hidden: [64]}}
train: {epochs: 15, batch_size: 64, lr: 0.003}
measure: [accuracy, {corrective-unlearning: {size: 2}}]
events:
  - learn: 0
  - forget: {concepts: [known bad], by: {ssd: {selection: 0.1, dampening: 0.1, guard: 0.05}}, verify: none}
"""
    home = lived(tmp_path, text)
    learned, forgot = (event["measures"] for event in json.loads((home / "report.json").read_text())["events"])
    assert learned["corrective/attack"] > 0.8 and forgot["corrective/attack"] < 0.3
    assert forgot["corrective/corrected"] > learned["corrective/corrected"] + 0.4
    assert forgot["corrective/retained"] == forgot["accuracy"] > learned["accuracy"] - 0.05
    assert receipt(home)["n"] == round(0.5 * round(0.05 * 1347))
