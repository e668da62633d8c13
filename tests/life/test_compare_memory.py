"""Variants at equal memory: what their stores may hold, what does not fit, and what the tables say."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from remanence import catalogue
from remanence.cli import main
from remanence.core.errors import BadInput
from remanence.life import compare as comparing
from remanence.life import compare_report, grid, memory
from remanence.life.compare import compare
from remanence.life.plan import parse_plan
from remanence.nn.buffer import Buffer
from tests.life.test_compare import InProcess

PLAN = """
name: small
stream: {split-digits: {tasks: 5}}
model: {mlp: {hidden: [16]}}
train: {epochs: 2, batch_size: 32}
events: [{learn: 0}, {learn: 1}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three budgets; the smallest has no room for the Fisher of ewc."""
    root = tmp_path_factory.mktemp("memory")
    (root / "small.yaml").write_text(PLAN)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "ProcessPoolExecutor", InProcess)
        patch.setenv("REMANENCE_CONFIG", str(root / "config"))
        found = compare(
            root / "small.yaml",
            keep="none, replay, der, ewc",
            memory="8kB, 20kB, 12kB",
            seeds=1,
            folder=root / "grid",
        )
    torch.set_num_threads(threads)
    return found


def row(made: dict[str, Any], keep: str, area: str = "AUC-L") -> dict[str, Any]:
    (found,) = [r for r in made["memory"]["rows"] if (r["keep"], r["area"]) == (keep, area)]
    return found


def test_everything_fits_and_one_example_more_would_not(made: Any) -> None:
    """Bytes of an example in replay: 64 float32 and two int64. der stores the two columns of its first answers beside them, and its
    rows are made wider when the head grows."""
    data, _ = made
    assert data["failed"] == [] and data["memory"]["budgets"] == [8000, 12000, 20000]
    weighed = {(r["keep"], r["memory"]): r["figures"]["bytes"]["mean"] for r in data["lives"]}
    network = weighed["none", "8.0 kB"]
    assert network == 4 * (64 * 16 + 16 + 16 * 4 + 4)
    for budget, said in ((8000, "8.0 kB"), (12000, "12.0 kB"), (20000, "20.0 kB")):
        stored = {p["budget"]: p["stored"] for p in row(data, "replay")["points"]}[budget]
        assert stored == math.floor((budget - network) / (64 * 4 + 16))
        assert weighed["replay", said] == network + stored * (64 * 4 + 16) <= budget
        stored = {p["budget"]: p["stored"] for p in row(data, "der")["points"]}[budget]
        each = (weighed["der", said] - network) / stored
        assert weighed["der", said] <= budget < network + (stored + 1) * each


def test_what_does_not_fit_is_listed_and_not_lived(made: Any) -> None:
    data, folder = made
    ewc = row(data, "ewc")
    assert [p["outside"] is None for p in ewc["points"]] == [False, False, True]
    assert ewc["points"][0]["value"] is None and ewc["auc"] is None
    assert not [r for r in data["lives"] if (r["keep"], r["memory"]) == ("ewc", "8.0 kB")]
    lived = 1 + 3 + 3 + 1  # without a store it is one life at all budgets
    trials = 1 + 2 + 2 + 1
    assert len(list((folder / "cells").iterdir())) == lived + trials


def test_areas_are_those_of_the_points(made: Any) -> None:
    data, _ = made
    for area, figure in (("AUC-A", "average_incremental_accuracy"), ("AUC-L", "average_accuracy")):
        found = row(data, "replay", area)
        a, b, c = (p["value"]["mean"] for p in found["points"])
        lives = {r["memory"]: r["figures"][figure]["mean"] for r in data["lives"] if r["keep"] == "replay"}
        assert [a, b, c] == [lives["8.0 kB"], lives["12.0 kB"], lives["20.0 kB"]]
        assert found["auc"]["mean"] == pytest.approx(0.004 * (a + b) / 2 + 0.008 * (b + c) / 2)
        assert found["apm_s"]["mean"] == pytest.approx(a / 0.008) and found["apm_e"]["mean"] == pytest.approx(c / 0.02)
    constant = row(data, "none")
    assert constant["auc"]["mean"] == pytest.approx(0.012 * constant["points"][0]["value"]["mean"])


def matrix_of(rows: list[list[float | None]]) -> dict[str, Any]:
    summary = {name: {"value": 0.5} for name in comparing.LIFE_FIGURES[:4]}
    return {"events": [], "receipts": [], "holders": [], "summary": summary, "score": "accuracy", "matrix": rows}


def test_lives_are_held_against_joint() -> None:
    """Omega over the rows after the first: (.6 / .8 + .4 / .7) / 2. Intransigence: (.9 - .9 + .7 - .6 + .5 - .9) / 3."""
    joint = matrix_of([[0.9, None, None], [0.9, 0.7, None], [0.9, 0.7, 0.5]])
    mine = matrix_of([[0.9, None, None], [0.6, 0.6, None], [0.1, 0.2, 0.9]])
    cells = [
        grid.Cell({**dict.fromkeys(grid.AXES, "as planned"), "learner": learner}, 0, "", learner, None)
        for learner in ("finetune", "joint")
    ]
    data = comparing.collect(cells, [{"error": None, "report": report} for report in (mine, joint)])
    lives = {r["learner"]: r["figures"] for r in data["lives"]}
    assert lives["joint"]["omega_all"]["mean"] == pytest.approx(1)
    assert lives["joint"]["intransigence"]["mean"] == pytest.approx(0)
    assert lives["finetune"]["omega_all"]["mean"] == pytest.approx((0.6 / 0.8 + 0.4 / 0.7) / 2)
    assert lives["finetune"]["intransigence"]["mean"] == pytest.approx((0.1 - 0.4) / 3)
    assert "Omega" in compare_report.lives_table(data)[0]
    alone = comparing.collect(cells[:1], [{"error": None, "report": mine}])
    assert "omega_all" not in alone["lives"][0]["figures"] and "Omega" not in compare_report.lives_table(alone)[0]


def test_the_files_say_it(made: Any, tmp_path: Path) -> None:
    data, _ = made
    page = compare_report.write(tmp_path, json.loads(json.dumps(data))).read_text()
    assert "At equal memory" in page and "Accuracy against memory" in page and "needs" in page
    lines = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    mine = [line for line in lines if (line["table"], line["keep"]) == ("memory", "replay")]
    assert {line["budget"] for line in mine} == {"8.0 kB", "12.0 kB", "20.0 kB", ""}
    (area,) = [line for line in mine if line["figure"] == "AUC-L of average_accuracy"]
    assert float(area["mean"]) == pytest.approx(row(data, "replay")["auc"]["mean"])
    assert "| replay | last |" in (tmp_path / "comparison.md").read_text()


def test_learners_and_keepers_are_shown_against_bytes_without_budgets(made: Any) -> None:
    data, _ = made
    plain = {**data, "lives": [{**r, "memory": grid.AS_PLANNED} for r in data["lives"] if r["memory"] == "20.0 kB"]}
    picture = compare_report.against_bytes("m", plain)
    assert picture is not None and picture.count("<title>") == len(plain["lives"]) and "polyline" not in picture
    forgetters = {
        **plain,
        "lives": [{**r, "keep": grid.AS_PLANNED} for r in plain["lives"]],
    }
    assert compare_report.against_bytes("m", forgetters) is None


# -- sizes


@pytest.mark.parametrize(
    "text, found",
    [
        ("200KB,500KB,1MB", [200_000, 500_000, 1_000_000]),
        ("1.5 MB, 64KiB, 900", [900, 65_536, 1_500_000]),
    ],
)
def test_budgets_are_read(text: str, found: list[int]) -> None:
    assert memory.budgets_of(text) == found


@pytest.mark.parametrize("text", ["", "1MB,", "lots", "0KB", "1MB,1000KB", "5 apples", "-1MB"])
def test_budgets_that_cannot_be(text: str) -> None:
    with pytest.raises(BadInput, match="--memory"):
        memory.budgets_of(text)


def test_the_knobs_of_stores_are_set_and_nothing_else() -> None:
    text = json.dumps(
        {**parse_plan(PLAN).canonical(), "keep": [{"replay": {"batch_size": 7}}, {"der": {}}, {"ewc": {}}]}
    )
    found = json.loads(memory.sized(text, 9))
    assert found["keep"] == [
        {"replay": {"batch_size": 7, "capacity": 9, "per_class": None}},
        {"der": {"capacity": 9}},
        {"ewc": {}},
    ]
    assert {**found, "keep": None} == {**json.loads(text), "keep": None}


def test_a_knob_that_a_budget_sets_may_not_be_given() -> None:
    memory.refuse_sizes(None, [[{"replay": {"batch_size": 3}}], []])
    with pytest.raises(BadInput, match="sets per_class itself"):
        memory.refuse_sizes(None, [[{"replay": {"per_class": 5}}]])
    with pytest.raises(BadInput, match="sets capacity itself"):
        memory.refuse_sizes([[{"onpro": {"capacity": 5}}]], None)


def test_room() -> None:
    room = memory.room_of([1000 + 20 * 10, 1000 + 40 * 10])
    assert (room.base, room.each) == (1000, 10) and room.units(1499) == 49
    with pytest.raises(BadInput, match=r"needs 1\.0 kB"):
        room.units(1009)
    assert memory.room_of([1000]).units(1000) is None
    with pytest.raises(BadInput):
        memory.room_of([1000]).units(999)


@pytest.mark.parametrize(
    "part", [p for v in ("learn", "keep") for p in catalogue.parts(v, "method")], ids=lambda p: p.slug
)
def test_every_store_says_which_knob_limits_it(part: Any) -> None:
    """A part that makes a buffer of examples names the knob of its size, and that knob does set it."""
    cls = part.load()
    assert bool(buffers_of(cls())) == bool(cls.stores)
    if cls.stores:
        limit, *others = cls.stores
        found = [(b.capacity, b.per_class) for b in buffers_of(cls(**{limit: 7, **dict.fromkeys(others)}))]
        assert (7, None) in found or (None, 7) in found


def buffers_of(method: Any) -> list[Buffer]:
    return [value for value in vars(method).values() if isinstance(value, Buffer)]


def test_the_command_takes_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(PLAN)
    words = ["compare", str(tmp_path / "small.yaml"), "--home", str(tmp_path / "grid"), "--keep"]
    assert main([*words, "replay", "--memory", "lots"]) == 2
    assert "no amount of memory" in capsys.readouterr().err
    assert main([*words, "{replay: {capacity: 5}}", "--memory", "8kB"]) == 2
    assert "sets capacity itself" in capsys.readouterr().err and not (tmp_path / "grid").exists()
