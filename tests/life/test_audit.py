"""An audit of whole lives: what was deleted comes out clean, what was not is caught, and the life stays as it is."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput
from remanence.data import Examples, Request, Task, cat, split_classes
from remanence.life.life import Life
from remanence.measure.benchmarks.open_problems_unlearning import OpenProblems
from remanence.models import mlp
from tests.life.helpers import bits, kinds, network, stream

FAST = OpenProblems(
    relearn_n=[5, 20], rates=[0.01], steps=20, seeds=1, bits=[4], prune=[0.2], noise=[0.2], permutations=0
)
NOTHING: dict[str, Any] = {"ssd": {"selection": 1e30}}  # a method that dampens no weight
TASK = split_classes(cat([part for task in stream(80) for part in (task.train, task.test)]), tasks=1)[0]
CLASS, SOME = {"classes": [1]}, {"ids": [int(i) for i in TASK.train.id[::4]]}


def life_of(seed: int = 0, home: Any = None, **options: Any) -> Life:
    """A life that knows 360 examples of six digits well."""
    life = Life(options.pop("model", lambda s: mlp(64, [32], seed=s)), seed=seed, home=home, **options)
    life.learn(TASK, epochs=30, batch_size=32, lr=0.005)
    return life


def named(found: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check for check in found["checks"]}


@pytest.mark.parametrize("asked", [CLASS, pytest.param(SOME, marks=pytest.mark.slow)], ids=["class", "examples"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3, 4, 5))])
def test_what_was_deleted_comes_out_clean_and_what_was_not_is_caught(asked, seed):
    """Measured for seeds 0 to 5 and both requests: deleted is *removed* in twelve of twelve; unchanged is *holds* in eleven and
    *suppressed* in one, where three references leave the plain loss too wide an interval."""
    share = "share that looks learned, likelihood-ratio attack"
    with life_of(seed) as life:
        life.forget(Request(**asked), by="retrain")
        found = life.audit(shadows=8, protocol=FAST)["requests"][0]
        assert found["level"] == "removed" and found["said"] == "deleted"
        assert not [c for c in found["checks"] if c["decides"] and c["leak"]]
        assert named(found)["relearn advantage, forgotten examples"]["after"] < 1.5
        clean = named(found)[share]["after"]
    with life_of(seed) as life:
        life.forget(Request(**asked), by=NOTHING)
        found = life.audit(shadows=8, protocol=FAST)["requests"][0]
        assert found["level"] in ("holds", "suppressed") and found["said"] == "holds" and found["failed"] > 3
        assert named(found)[share]["after"] == named(found)[share]["nothing"] > clean + 0.1
        if asked is CLASS:
            assert clean == 0 and named(found)[share]["after"] == 1


def test_the_life_stays_as_it_is(tmp_path):
    """Weights, ledger, keepers, books and files: all that an audit leaves is its two files."""
    with life_of(home=tmp_path, keep=[{"replay": {"per_class": 3}}]) as life:
        life.forget(Request(**CLASS), by="random-label")
        before, rows, draws = bits(life), kinds(life), torch.get_rng_state()
        files = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
        current = life._ledger.get_current("references", [])
        found = life.audit(shadows=4, protocol=FAST)
        assert bits(life) == before and kinds(life) == rows and torch.equal(draws, torch.get_rng_state())
        assert life._ledger.get_current("references", []) == current
        assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} - {str(p) for p in files} == {
            "audit.json",
            "audit.html",
        }
        assert json.loads((tmp_path / "audit.json").read_text()) == found
        page = (tmp_path / "audit.html").read_bytes()
        assert life.audit(1, shadows=4, protocol=FAST) == found and (tmp_path / "audit.html").read_bytes() == page


def test_each_figure_says_what_it_is_and_no_example_is_named(tmp_path):
    with life_of(home=tmp_path, name="<b>x</b>") as life:
        life.forget(Request(**SOME), by="gradient-ascent")
        found = life.audit(protocol=FAST)
    (request,) = found["requests"]
    assert found["references"] == 3 and request["n"] == len(SOME["ids"])
    assert {c["group"] for c in request["checks"]} >= {
        "membership",
        "behaviour",
        "disturbance",
        "relearning",
        "side effect",
    }
    for check in request["checks"]:
        assert check["direction"] and check["range"] and check["verdict"] in ("pass", "fail", "cannot tell")
        assert len(check["retrained"]) == 3 and np.isfinite([check["after"], *check["retrained"]]).all()
        assert check["retrained_mean"] == pytest.approx(np.mean(check["retrained"]), rel=1e-4, abs=1e-5)
    assert "prompts" in " ".join(request["not_covered"]) and "shadow models" in request["not_covered"][0]
    assert max(len(v) for c in request["checks"] for v in c.values() if isinstance(v, list)) == 3

    class Page(HTMLParser):
        tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.append(tag)

    page = (tmp_path / "audit.html").read_text()
    Page().feed(page)
    assert "script" not in Page.tags and Page.tags.count("tr") == len(request["checks"]) + 1
    assert "<b>x</b>" not in page and request["level"] in page and "Not covered" in page


def test_models_that_learn_forgotten_data_again_are_kept_nowhere(tmp_path):
    """With a folder for references only the three retrained ones go there, and each is a holder that the ledger knows."""
    with life_of(home=tmp_path / "life", references=tmp_path / "refs") as life:
        receipt = life.forget(Request(**CLASS), by="random-label")
        life.audit(shadows=4, protocol=FAST)
        known = life._ledger.get_current("references", [])
        kept = [p.name for p in (tmp_path / "refs").iterdir()]
        assert len(kept) == 3 and {entry["key"] for entry in known} == set(kept)
        assert not any(receipt.ids & life._ids(entry["ids"]) for entry in known)
        assert len(life._references) == 3  # of this event; the shadow models and the original are gone


def test_what_cannot_be_tested_says_why(tmp_path):
    with life_of(home=tmp_path) as life:
        life.forget(Request(ids=[10**7]), by="retrain")
        life.forget(Request(ids=[int(i) for i in TASK.train.id[:6]]), by="retrain")
        life.forget(Request(ids=[int(i) for i in TASK.train.id[6:12]]), by="random-label")
        life.learn(Task(TASK.train.select(torch.arange(6, 12)), TASK.test, id=1), epochs=1, allow_forgotten=True)
        life.redact()
        found = life.audit(protocol=FAST)["requests"]
        assert ["untested" in request for request in found] == [True, True, True]
        words = [request["untested"] for request in found]
        assert words[0] == "nothing was held" and "redacted" in words[1] and "learned again" in words[2]
        for bad in ({"number": 9}, {"references": 1}, {"shadows": 5}, {"shadows": 2}):
            with pytest.raises(BadInput):
                life.audit(**bad)
    with life_of() as life, pytest.raises(BadInput, match="no receipt"):
        life.audit()


def test_without_the_data_nothing_is_tested(tmp_path):
    with life_of(home=tmp_path, model=lambda s: mlp(64, [32], seed=s)) as life:
        life.forget(Request(**CLASS), by="random-label")
    with Life.resume(tmp_path, lambda s: mlp(64, [32], seed=s)) as life:
        found = life.audit(protocol=FAST)["requests"]
        assert "cannot be reached" in found[0]["untested"]
    with Life.resume(tmp_path, lambda s: mlp(64, [32], seed=s), [TASK]) as life:
        assert life.audit(protocol=FAST)["requests"][0]["level"] in ("removed", "obscured", "suppressed", "holds")


def test_a_learner_without_weights_is_attacked_by_its_answers_only():
    with life_of(model=network, learner="nmc") as life:
        life.forget(Request(**SOME), by="retrain")
        found = life.audit(shadows=4, protocol=FAST)["requests"][0]
    assert {c["group"] for c in found["checks"]} == {"membership"} and "nmc answers" in " ".join(found["not_covered"])


def test_a_regression_has_an_audit_too():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(160, 2, generator=rng)
    rows = Examples({"x": x, "y": (3 * x[:, 0] + 3.0 * (x[:, 1] > 0.6))[:, None]}, "steps")
    task = Task(rows.select(torch.arange(120)), rows.select(torch.arange(120, 160)), id=0)
    gone = [int(i) for i in task.train.id[task.train["x"][:, 1] > 0.6]]
    levels = []
    for by in ("retrain", {"gradient-ascent": {"ascent": 0.0, "retain": 0.0}}):
        with Life(lambda s: mlp(2, [32], 1, seed=s), problem="regression") as life:
            life.learn(task, epochs=80, batch_size=40, lr=0.02)
            life.forget(Request(ids=gone), by=by)
            found = life.audit(shadows=4, protocol=FAST)["requests"][0]
            levels.append(found["level"])
            assert "AUC, squared-error attack" in named(found)
    assert levels == ["removed", "holds"]


def test_the_command(tmp_path, monkeypatch):
    """A table, JSON, or just where the page lies; from the home alone."""
    from tests.test_cli import call

    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "name: small\nstream: {split-digits: {tasks: 5}}\nmodel: {mlp: {hidden: [32]}}\n"
        "train: {epochs: 3, batch_size: 32}\nevents:\n  - learn: 0\n  - learn: 1\n  - forget: {classes: [1], by: retrain, verify: none}\n"
    )
    monkeypatch.setattr("remanence.life.audit.OpenProblems", lambda: FAST)
    home = tmp_path / "home"
    assert call("run", plan, "--home", home, "--quiet").code == 0
    ledger = (home / "ledger.db").read_bytes()
    answer = call("audit", home, "--references", "2")
    assert answer.code == 0 and "Request 1: class 1 by retrain" in answer.out and "Not covered" in answer.out
    assert (home / "ledger.db").read_bytes() == ledger and not list((home / "work").iterdir())
    said = json.loads(call("audit", home, "--references", "2", "--receipt", "1", "--json").out)
    assert said == json.loads((home / "audit.json").read_text())
    quiet = call("audit", home, "--references", "2", "--quiet")
    assert quiet.out.count("\n") == 1 and "audit.html" in quiet.out
    assert call("audit", home, "--receipt", "7").code == 2
    assert "shadows" in call("audit", home, "--shadows", "3").err
