"""A secret that was learned and forgotten is in no file of the life, in no form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.data import Examples, Request, Task
from remanence.life import receipts
from remanence.life.life import Life
from remanence.models import identity
from tests.life import crash
from tests.life.helpers import (
    FAST,
    SECRET_IDS,
    SECRET_KEEP,
    SECRET_PLAN,
    SECRETS,
    again,
    forms,
    id_forms,
    network,
    scan,
    secret_life,
    secret_stream,
    stream,
)

KILLED = -9


def begun(home: Path, keep: Any = SECRET_KEEP, **options: Any) -> Life:
    life = Life(network, keep=keep, home=home, plan=SECRET_PLAN, **options)
    for task in secret_stream()[:2]:
        life.learn(task, **FAST, snapshot_every=2)
    life.report()
    return life


@pytest.mark.parametrize("by", ["retrain", "ssd"])
def test_a_forgotten_secret_is_in_no_file(by: str, tmp_path: Path) -> None:
    life = begun(tmp_path)
    before = scan(tmp_path, forms())
    assert any(name.startswith("snapshots/") and form == "float32" for name, form in before)  # the scan can fail
    assert ("ledger.db", "int64") in scan(tmp_path, id_forms()) or ("ledger.db-wal", "int64") in scan(
        tmp_path, id_forms()
    )
    receipt = life.forget(
        Request(ids=list(SECRET_IDS)), by=by, verify={"retrain": {"seeds": 1}} if by == "ssd" else None
    )
    life.report()
    assert (tmp_path / "ledger.db-wal").exists()  # still open
    assert scan(tmp_path, forms()) == set()
    assert life.holders["keep/replay"] and not life._state.keepers[0].holds(Ids(SECRET_IDS))
    for path in [tmp_path / "report.html", tmp_path / "report.json", receipt.path]:
        text = path.read_bytes()
        assert not any(needle in text for needles in id_forms().values() for needle in needles), path
    life.learn(stream()[2], **FAST)
    life.close()
    assert scan(tmp_path, forms()) == set()
    with again(tmp_path, secret_stream()) as life:
        life.report()
        assert scan(tmp_path, forms()) == set()


def test_redacting_removes_the_ids_and_the_chain_still_verifies(tmp_path: Path) -> None:
    life = begun(tmp_path)
    receipt = life.forget(Request(ids=list(SECRET_IDS)), by="retrain")
    life.report()
    left = scan(tmp_path, id_forms())
    assert ("plan.yaml", "text") in left and any(name.startswith("ledger.db") for name, _ in left)
    assert life.redact() == ["request 1 redacted"]
    life.report()
    assert scan(tmp_path, id_forms()) == set()  # while the life is open: log and free pages too
    assert scan(tmp_path, forms()) == set()
    assert life._ledger.verify_chain() == len(life._ledger)
    assert receipts.verify(receipt.path).ok
    assert life.redact() == []
    life.learn(stream()[2], **FAST)
    digest = life.content_digest()
    life.close()
    assert scan(tmp_path, id_forms()) == set()
    with again(tmp_path, secret_stream()) as life:  # the data still has them: they do not come back
        assert life.content_digest() == digest
        life.report()
        again_made = life.forget(Request(classes=[4]), by="retrain")
        assert again_made.status == "done" and not life._state.keepers[0].holds(Ids(SECRET_IDS))
        assert scan(tmp_path, {**forms(), **id_forms()}) == set()
        assert all(receipts.verify(path).ok for path in (tmp_path / "receipts").iterdir())


def test_a_request_that_is_not_deleted_everywhere_stays_readable_to_its_owner(tmp_path: Path) -> None:
    life = begun(tmp_path)
    life.forget(Request(ids=list(SECRET_IDS)), by="ssd")
    said = life.redact()
    assert len(said) == 1 and said[0].startswith("request 1 stays: ") and "weights" in said[0]
    assert Ids(SECRET_IDS) == life.receipts[0].ids
    life.close()


def test_a_class_mean_of_one_example_is_gone_too(tmp_path: Path) -> None:
    """Raw inputs as features: the float64 sum of a class with one example is the example."""
    lone = Examples({"x": SECRETS[:1], "y": torch.tensor([9])}, "lone", [SECRET_IDS[0]])
    task = Task(lone, lone, (9,), ("9",), 7)
    life = Life(lambda seed: identity(64, seed=seed), learner={"nmc": {"normalise": False}}, home=tmp_path)
    life.learn(stream()[0], **FAST)
    life.learn(task, **FAST)
    assert {form for name, form in scan(tmp_path, forms()) if name.startswith("snapshots/")} == {"float64"}
    receipt = life.forget(Request(classes=[9]), by="retrain")
    assert scan(tmp_path, forms()) == set() and set(receipt.states.values()) == {"deleted"}
    life.close()


def test_references_that_are_kept_let_it_go_too(tmp_path: Path) -> None:
    """Models retrained for an earlier request were trained on the secret, and their buffers hold it."""
    folder = tmp_path / "references"
    life = begun(tmp_path / "home", references=folder)
    life.forget(Request(ids=stream()[0].train.id[:3]), by="ssd", verify={"retrain": {"seeds": 1}})
    assert scan(folder, forms()) != set() and "references" in life.holders
    receipt = life.forget(Request(ids=list(SECRET_IDS)), by="retrain")
    assert scan(tmp_path, forms()) == set()
    assert {state for name, state in receipt.states.items() if name.startswith("references/")} == {"deleted"}
    life.close()


@pytest.mark.parametrize("step", ["accept", "stage", "commit", "erase"])
def test_killed_while_forgetting(step: str, tmp_path: Path) -> None:
    _killed(step, "retrain", tmp_path, times=1)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["retrain", "ssd"])
@pytest.mark.parametrize("step", ["work", "look again", "receipt", "file"])
def test_killed_while_forgetting_at_every_other_step(step: str, by: str, tmp_path: Path) -> None:
    _killed(step, by, tmp_path, times=2)


def _killed(step: str, by: str, folder: Path, times: int) -> None:
    home, config = folder / "home", folder / "config"

    def attempt(at: str | None) -> int | None:
        process = crash._context.Process(target=secret_life, args=(str(home), str(config), by, at))
        process.start()
        process.join()
        return process.exitcode

    assert attempt(step) == KILLED
    if step in ("accept", "work", "stage", "commit"):
        assert scan(home, forms()) != set()  # not erased yet
        if step == "commit":
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("REMANENCE_CONFIG", str(config))
                _holds_until_erased(home)
    if times > 1 and step not in ("receipt", "file"):
        assert attempt(step) == KILLED
    assert attempt(None) == 0
    assert scan(home, forms()) == set()
    assert (home / "receipts" / "0001.json").exists() and not os.listdir(home / "work")


def _holds_until_erased(home: Path) -> None:
    """Opened only to look: what is owed is called so."""
    from remanence.life.run import Reading

    life = Reading.resume(home, network, secret_stream(), allow_drift=True)
    try:
        rows = life.trace(Ids(SECRET_IDS))
        assert {row.state for row in rows} == {"holds"} and all(row.reason.startswith("erasing: ") for row in rows)
        with pytest.raises(BadInput, match="only to look"):
            life.learn(stream()[2], **FAST)
    finally:
        life.close()
