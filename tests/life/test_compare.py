"""Many lives side by side: the grid, what is shared and cached, and what the tables say."""

from __future__ import annotations

import csv
import json
import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import remanence as rm
from remanence.core.errors import BadInput, PlanError, Refused, UnknownName
from remanence.life import compare as comparing
from remanence.life import compare_report, grid
from remanence.life.compare import AGAIN, NOTHING, compare
from remanence.life.plan import parse_plan
from remanence.life.references import References, code_sha256
from remanence.life.run import run_plan

PLAN = """
name: small
stream: {split-digits: {tasks: 5}}
model: {mlp: {hidden: [16]}}
train: {epochs: 2, batch_size: 32}
events:
  - learn: 0
  - learn: 1
  - forget: {classes: [3], by: ssd, epochs: 7}
  - learn: 2
"""


class InProcess:
    """Stands for the pool: cells run here, so that they can be watched."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None: ...


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(comparing, "ProcessPoolExecutor", InProcess)
    monkeypatch.setenv("REMANENCE_CONFIG", str(tmp_path / "config"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(PLAN)
    return path


def cells(text: str = PLAN, seeds: tuple[int, ...] = (0,), **axes: str) -> list[grid.Cell]:
    chosen = {axis: grid.choices(axis, axes.get(axis)) for axis in grid.AXES}
    return grid.expand(parse_plan(text), chosen, seeds, 2, "data", {"torch": "1"})


# -- the grid


def test_alternatives_are_read_as_plans_are() -> None:
    assert grid.choices("keep", "none, replay, [replay, {ewc: {strength: 2}}]") == [
        [],
        [{"replay": {}}],
        [{"replay": {}}, {"ewc": {"strength": 2}}],
    ]
    assert grid.choices("forget", "ssd, {ssd: {selection: 2}}") == [[{"ssd": {}}], [{"ssd": {"selection": 2}}]]
    assert [next(iter(specs[0])) for specs in grid.choices("forget", "all") or []] == [
        part.slug
        for part in rm.parts("forget", kind="method")
        if part.slug != "auto"  # which tries them itself
    ]
    served = grid.choices("forget", "all, {ssd: {selection: 2}}", parse_plan(PLAN)) or []
    names = [next(iter(specs[0])) for specs in served]
    assert served[-1] == [{"ssd": {"selection": 2}}] and {"retrain", "ssd", "salun"} < set(names)
    assert not {"acu", "sisa", "s3t", "blindspot-regression", "gaussian-amnesiac", "auto"} & set(names)
    assert grid.choices("keep", None) is None
    assert grid.said([{"replay": {"per_class": 5}}, {"ewc": {}}]) == "replay(per_class=5) + ewc"


@pytest.mark.parametrize(
    "axis, text, words",
    [
        ("forget", "sdd", "did you mean 'ssd'"),
        ("keep", "", "names nothing"),
        ("forget", "[ssd, salun]", "one method"),
        ("keep", "3", "no method"),
    ],
)
def test_alternatives_that_cannot_be(axis: str, text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        grid.choices(axis, text)


def test_unknown_knobs_are_refused_before_anything_runs() -> None:
    with pytest.raises(PlanError, match="did you mean 'selection'"):
        cells(forget="{ssd: {selction: 2}}")
    with pytest.raises(UnknownName):
        grid.choices("where", "lorra")


def test_every_combination_is_a_cell_with_its_own_key() -> None:
    found = cells(seeds=(0, 1), keep="none, replay", forget="ssd, salun, retrain")
    assert len(found) == 12 == len({cell.key for cell in found})
    assert [cell.seed for cell in found[:2]] == [0, 1]
    assert {cell.plan.seed for cell in found} == {0, 1}


def test_a_forgetter_brings_its_own_settings() -> None:
    (cell,) = cells(forget="salun")
    asked = cell.plan.events[2].forget
    assert asked is not None and asked.epochs is None and asked.classes == [3]
    assert asked.verify == {"retrain": {"seeds": 2}}
    (planned,) = cells()
    assert planned.plan.events[2].forget is not None and planned.plan.events[2].forget.epochs == 7


def test_keys_change_with_what_a_result_depends_on_and_with_nothing_else() -> None:
    (base,) = cells(forget="ssd")
    spelled = PLAN.replace(
        "{classes: [3], by: ssd, epochs: 7}", "{by: {ssd: {selection: 10.0}}, classes: [3]}"
    ).replace("name: small", "name: other")
    assert cells(spelled, forget="ssd")[0].key == base.key
    for other in (
        cells(PLAN.replace("epochs: 2", "epochs: 3"), forget="ssd"),
        cells(forget="{ssd: {selection: 11}}"),
        cells(seeds=(1,), forget="ssd"),
    ):
        assert other[0].key != base.key
    moved = grid.expand(
        parse_plan(PLAN), {"forget": grid.choices("forget", "ssd")}, [0], 2, "other data", {"torch": "1"}
    )
    newer = grid.expand(parse_plan(PLAN), {"forget": grid.choices("forget", "ssd")}, [0], 2, "data", {"torch": "2"})
    assert len({base.key, moved[0].key, newer[0].key}) == 3


def test_the_code_of_a_part_counts_for_those_who_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from remanence.life import references

    real = references._module_sha256
    before = {cell.names["forget"]: (cell.key, cell.prefix) for cell in cells(forget="ssd, salun")}
    monkeypatch.setattr(
        references, "_module_sha256", lambda module: "edited" if module.endswith(".ssd") else real(module)
    )
    after = {cell.names["forget"]: (cell.key, cell.prefix) for cell in cells(forget="ssd, salun")}
    assert after["ssd"][0] != before["ssd"][0] and after["ssd"][1] == before["ssd"][1]  # what was learned before stays
    assert after["salun"] == before["salun"]
    assert len(code_sha256(rm.parts("forget"))) == 64


def test_forgetters_share_a_beginning_and_keepers_do_not() -> None:
    found = grid.groups(cells(seeds=(0, 1), keep="none, replay", forget="ssd, salun, retrain"))
    assert [len(group.cells) for group in found] == [3, 3, 3, 3]
    assert len({group.prefix for group in found}) == 4
    assert [event.kind for event in parse_plan(grid.prefix_text(found[0].cells[0])).events] == ["learn", "learn"]


def test_forgetters_need_a_request() -> None:
    with pytest.raises(BadInput, match="no forget event"):
        cells(PLAN[: PLAN.index("  - forget")], forget="ssd")


# -- lives


def test_a_cell_is_the_life_that_its_plan_describes(plan: Path, tmp_path: Path) -> None:
    """A copied beginning and shared references change no bit."""
    made, folder = compare(plan, forget="ssd, salun", seeds=1, references=2, folder=tmp_path / "grid")
    assert made["failed"] == [] and (folder / "comparison.json").is_file()
    for cell in sorted((folder / "cells").iterdir()):
        told = json.loads((cell / "cell.json").read_text())
        alone = tmp_path / f"{cell.name}.yaml"
        alone.write_text((cell / "plan.yaml").read_text())
        run_plan(alone, tmp_path / cell.name).close()
        again = json.loads((tmp_path / cell.name / "report.json").read_text())
        assert again["weights_sha256"] == told["report"]["weights_sha256"]
        assert again["content_digest"] == told["report"]["content_digest"]
        assert not list((folder / "beginnings").iterdir()) and not list((folder / "work").iterdir())


def test_nothing_is_lived_twice(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lived: list[str] = []
    real = comparing._live
    monkeypatch.setattr(
        comparing, "_live", lambda home, text, root: (lived.append(home.name), real(home, text, root))[1]
    )
    first, _ = compare(plan, forget="ssd", seeds=1, references=2, folder=tmp_path / "grid")
    assert len(lived) == 1
    again, _ = compare(plan, forget="ssd", seeds=1, references=2, folder=tmp_path / "grid")
    assert len(lived) == 1 and again == first
    retrained: list[int] = []
    monkeypatch.setattr(References, "put", lambda self, key, packed: retrained.append(1))
    more, _ = compare(plan, forget="ssd, random-label", seeds=1, references=2, folder=tmp_path / "grid")
    assert len(lived) == 2 and len(more["lives"]) == 2  # only the new one
    assert len(retrained) == 2  # asked to keep what the first had kept already: nothing new
    assert more["requests"][0]["rows"][2]["gaps"] == first["requests"][0]["rows"][2]["gaps"]


def test_a_killed_comparison_goes_on(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = compare(plan, forget="ssd, salun", seeds=1, references=2, folder=tmp_path / "whole")
    real, lived = comparing._live, []

    def killed(home: Path, text: str, root: Path) -> dict[str, Any]:
        if len(lived) == 2:  # the beginning and the first cell are done
            raise KeyboardInterrupt
        lived.append(home.name)
        return real(home, text, root)

    monkeypatch.setattr(comparing, "_live", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(plan, forget="ssd, salun", seeds=1, references=2, folder=tmp_path / "grid")
    monkeypatch.setattr(comparing, "_live", real)
    found, _ = compare(plan, forget="ssd, salun", seeds=1, references=2, folder=tmp_path / "grid")
    assert [without_times(row) for row in found["lives"]] == [without_times(row) for row in whole["lives"]]
    assert [[row["gaps"] for row in r["rows"]] for r in found["requests"]] == [
        [row["gaps"] for row in r["rows"]] for r in whole["requests"]
    ]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "figures": {name: value for name, value in row["figures"].items() if name != "seconds"}}


def test_a_life_that_fails_is_said_and_tried_again(plan: Path, tmp_path: Path) -> None:
    plan.write_text(
        PLAN.replace("train: {epochs: 2", "train: {epochs: 2, lr: 1.0e+30, optimizer: sgd").replace(
            "by: ssd, epochs: 7", "by: ssd"
        )
    )
    made, folder = compare(plan, seeds=1, references=2, folder=tmp_path / "grid")
    assert len(made["failed"]) == 1 and "EventFailed" in made["failed"][0]["error"]
    assert made["lives"][0]["figures"]["average_accuracy"] is None
    page = compare_report.write(folder, made)
    assert "Failed" in page.read_text()
    again, _ = compare(plan, seeds=1, references=2, folder=tmp_path / "grid")
    assert len(again["failed"]) == 1


def test_another_plan_is_refused(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "plan.yaml").write_text("name: other")
    with pytest.raises(Refused, match="another plan"):
        compare(plan, seeds=1, folder=tmp_path / "grid")


# -- what the tables say


def report(accuracy: float, after: float, nothing: float, mean: float, sd: float | None, n: int = 3) -> dict[str, Any]:
    cell = {
        "metric": "forget accuracy",
        "after": after,
        "nothing": nothing,
        "reference_mean": mean,
        "reference_sd": sd,
        "n": n,
        "direction": "nearest",
    }
    summary = {name: {"value": accuracy} for name in comparing.LIFE_FIGURES[:4]}
    receipt = {
        "asked_plain": "class 3",
        "evidence": [cell],
        "cost": {"fraction_of_retraining": 0.5, "seconds": 0.25},
        "done": [{"holder": "weights", "state": "unlearned"}],
    }
    return {
        "events": [{"seconds": 1.0}],
        "holders": [{"name": "weights", "bytes": 10}, {"name": "snapshots", "bytes": 99}],
        "summary": summary,
        "receipts": [receipt],
    }


def told(names: dict[str, str], seed: int) -> grid.Cell:
    return grid.Cell({axis: names.get(axis, "as planned") for axis in grid.AXES}, seed, "", f"{names}{seed}", None)


def test_figures_are_means_over_seeds_with_the_t_interval() -> None:
    values = [0.5, 0.6, 0.9]
    found = comparing.collect(
        [told({}, s) for s in range(3)], [{"error": None, "report": report(v, 0, 1, 0, 0.1)} for v in values]
    )
    figure = found["lives"][0]["figures"]["average_accuracy"]
    mean = sum(values) / 3
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert (
        figure["mean"] == pytest.approx(mean)
        and figure["half"] == pytest.approx(4.302652729911275 * sd / math.sqrt(3))
        and figure["n"] == 3
    )
    assert found["lives"][0]["figures"]["bytes"]["mean"] == 10  # snapshots are not what a method costs


def test_differences_are_paired_by_seed() -> None:
    grid_ = [told({"keep": k}, s) for k in ("none", "replay") for s in range(2)]
    results = [{"error": None, "report": report(v, 0, 1, 0, 0.1)} for v in (0.1, 0.5, 0.3, 0.7)]
    first, second = comparing.collect(grid_, results)["lives"]
    assert first["difference"] is None
    assert second["difference"]["mean"] == pytest.approx(0.2) and second["difference"]["half"] == pytest.approx(
        0, abs=1e-9
    )
    results[0] = {"error": "EventFailed: x", "report": None}
    assert comparing.collect(grid_, results)["lives"][1]["difference"]["n"] == 1  # only the seed that both have


def test_distances_stand_beside_do_nothing_and_another_seed() -> None:
    results = [{"error": None, "report": report(0.9, after, 0.95, 0.1, 0.03)} for after in (0.1, 0.12, 0.11)]
    (request,) = comparing.collect([told({"forget": "ssd"}, s) for s in range(3)], results)["requests"]
    rows = {row["by"]: row for row in request["rows"]}
    assert list(rows) == [NOTHING, AGAIN, "ssd"]
    assert rows[NOTHING]["gaps"]["forget accuracy"]["mean"] == pytest.approx(0.85)
    assert rows[AGAIN]["gaps"]["forget accuracy"]["mean"] == pytest.approx(0.03 * math.sqrt(3 / 2))
    assert rows["ssd"]["gaps"]["forget accuracy"]["mean"] == pytest.approx(0.01)
    assert rows["ssd"]["verdicts"]["forget accuracy"] == "indistinguishable from retraining"
    assert rows["ssd"]["cost"]["mean"] == 0.5 and rows["ssd"]["states"] == ["unlearned"]


@pytest.mark.parametrize(
    "after, nothing, verdict",
    [
        ((0.1, 0.1, 0.1), (0.11, 0.12, 0.1), "this request cannot tell"),
        ((0.5, 0.52, 0.51), (0.95, 0.96, 0.94), "closer than doing nothing"),
        ((0.99, 0.98, 0.99), (0.6, 0.61, 0.6), "farther"),
    ],
)
def test_verdicts(after: tuple[float, ...], nothing: tuple[float, ...], verdict: str) -> None:
    results = [{"error": None, "report": report(0.9, a, b, 0.1, 0.02)} for a, b in zip(after, nothing, strict=True)]
    (request,) = comparing.collect([told({"forget": "ssd"}, s) for s in range(3)], results)["requests"]
    assert request["rows"][2]["verdicts"]["forget accuracy"] == verdict


def test_one_seed_has_no_spread() -> None:
    (request,) = comparing.collect(
        [told({"forget": "ssd"}, 0)], [{"error": None, "report": report(0.9, 0.1, 0.9, 0.1, 0.02)}]
    )["requests"]
    assert request["rows"][2]["verdicts"]["forget accuracy"] == "spread unknown"
    assert request["rows"][2]["gaps"]["forget accuracy"]["half"] is None


def hostile() -> dict[str, Any]:
    cells_ = [told({"forget": f, "keep": "=cmd|'<script>"}, s) for f in ("ssd", "salun") for s in range(2)]
    found = comparing.collect(cells_, [{"error": None, "report": report(0.9, 0.1, 0.9, 0.1, 0.02)} for _ in cells_])
    return {"name": "<b>|x", "seeds": [0, 1], "references": 3, "versions": {}, **found}


def test_files_are_safe_and_whole(tmp_path: Path) -> None:
    data = hostile()
    page = compare_report.write(tmp_path, data).read_text()
    assert "<script>" not in page and "<b>|x" not in page and "http:" not in page and "https:" not in page
    lines = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert {line["table"] for line in lines} == {"lives", "requests"}
    assert all(line["keep"].startswith("'=") for line in lines)
    assert {
        line["verdict"] for line in lines if line["figure"] == "distance: forget accuracy" and line["forget"] == "ssd"
    } == {"indistinguishable from retraining"}
    table = (tmp_path / "comparison.md").read_text()
    assert table.startswith("# &lt;b>\\|x") and table.count("| ssd |") == 2


@pytest.mark.parametrize("width", [60, 200])
def test_the_terminal_table_is_drawn(width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(compare_report.render(hostile()))
    assert "do nothing" in console.export_text()


def test_the_front_is_what_nothing_beats() -> None:
    assert compare_report._front([(3, 1), (1, 3), (2, 2), (3, 3), (2, 4)]) == [(1, 3), (2, 2), (3, 1)]


# -- references


def test_references_are_kept_checked_and_erased(tmp_path: Path) -> None:
    store, key = References(tmp_path), "ab" * 32
    assert store.get(key) is None and key not in store and store.bytes(key) == 0
    store.put(key, {"weights": {"w": torch.arange(3.0)}, "labels": [1, 2]})
    found = store.get(key)
    assert found is not None and torch.equal(found["weights"]["w"], torch.arange(3.0)) and found["labels"] == [1, 2]
    store.put(key, {"weights": {"w": torch.zeros(3)}, "labels": []})  # equal by its key: the first stays
    assert store.get(key)["labels"] == [1, 2] and store.bytes(key) > 0  # type: ignore[index]
    file = next((tmp_path / key / "snapshots").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert store.get(key) is None and key not in store  # damaged: dropped, and made anew by who needs it
    assert [path.name for path in tmp_path.iterdir()] == []
    with pytest.raises(BadInput, match="64 hex"):
        store.get("../x")


def test_a_reference_is_a_holder_of_its_life(tmp_path: Path) -> None:
    stream = rm.data.split_digits()
    with rm.Life(lambda seed: rm.models.mlp(64, [8], seed=seed), references=tmp_path / "refs") as life:
        life.learn(stream[0])
        life.learn(stream[1])
        life.forget(rm.Request(classes=[3]), by="ssd", verify={"retrain": {"seeds": 2}})
        mine = stream[0].train.id[:2].tolist()
        assert [(t.state, len(t.ids)) for t in life.trace(mine) if t.holder.startswith("references/")] == [
            ("holds", 2)
        ] * 2
        assert life.holders["references"] > 0 and len(list((tmp_path / "refs").iterdir())) == 2
        life.forget(rm.Request(ids=mine), by="catastrophic")
        assert {t.state for t in life.trace(mine) if t.holder.startswith("references/")} == {"deleted"}
        assert list((tmp_path / "refs").iterdir()) == []
