"""A life killed anywhere ends like one that was not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from remanence.life import receipts
from remanence.life.ledger import Ledger
from tests.life.crash import PLAN, attempt, outcome, timed

STEPS = ("accept", "work", "stage", "commit", "erase", "look again", "receipt", "file")
KILLED = -9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any], float]:
    """(plan, config, outcome of the uninterrupted life, seconds it took)."""
    folder = tmp_path_factory.mktemp("whole")
    plan = folder / "crash.yaml"
    plan.write_text(PLAN)
    status, seconds = timed(lambda: attempt(plan, folder / "home", folder / "config"))
    assert status == 0
    return plan, folder / "config", outcome(folder / "home"), seconds


def ends_like(home: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    monkeypatch.setenv("REMANENCE_CONFIG", str(config))
    assert outcome(home) == expected
    assert not list((home / "work").iterdir())
    found = sorted((home / "receipts").iterdir())
    assert [path.name for path in found] == ["0001.json", "0002.json"]
    for path in found:
        verdict = receipts.verify(path)
        assert verdict.ok, verdict
    with Ledger(home / "ledger.db", read_only=True) as ledger:
        ledger.verify_chain()


def test_an_equal_life_has_an_equal_digest(whole: Any, tmp_path: Path) -> None:
    plan, config, expected, _ = whole
    assert attempt(plan, tmp_path / "home", config) == 0
    assert outcome(tmp_path / "home") == expected
    assert expected["events"] and expected["receipts"] and len(expected["weights_sha256"]) == 64


@pytest.mark.parametrize("step", STEPS)
def test_killed_after_a_step_of_a_request(
    step: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, config, expected, _ = whole
    home = tmp_path / "home"
    assert attempt(plan, home, config, step=step) == KILLED  # in the first request
    if step not in ("receipt", "file"):
        assert attempt(plan, home, config, step=step) == KILLED  # in the same one again: twice in a row
    assert attempt(plan, home, config) == 0
    ends_like(home, expected, monkeypatch, config)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(32))
def test_killed_at_a_random_instant(number: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, config, expected, seconds = whole
    draw = random.Random(number)
    home = tmp_path / "home"
    killed = 0
    for _ in range(1 + number % 2):  # every other one twice
        killed += attempt(plan, home, config, after=draw.uniform(0.02, 0.95) * seconds) == KILLED
    assert attempt(plan, home, config) == 0
    ends_like(home, expected, monkeypatch, config)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(8))
def test_killed_at_flushes_to_the_disk(start: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every eighth flush of the life, going on after each kill: many times in a row."""
    plan, config, expected, _ = whole
    home = tmp_path / "home"
    status, kills = KILLED, 0
    while status == KILLED and kills < 200:
        status = attempt(plan, home, config, sync=3 + start + 8 * (kills % 4))
        kills += status == KILLED
    assert status == 0 and kills > 3
    ends_like(home, expected, monkeypatch, config)
