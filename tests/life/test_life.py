"""The Python surface: lives as a user lives them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from remanence.core.errors import BadInput, Corrupt, DataChanged, Refused, UnknownName
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Classification
from remanence.data import Examples, Request, Task, cat
from remanence.keep.ewc import EWC
from remanence.keep.replay import Replay
from remanence.life.life import Life
from remanence.life.record import Event, Trace
from remanence.life.run import run_plan
from remanence.life.snapshots import weights_sha256
from remanence.models import identity, mlp
from remanence.train.roles import Keeper, Metric
from remanence.train.update import Context, Update
from tests.life.helpers import FAST, REPLAY, again, bits, kinds, lived, network, of_class, stream, tree

# -- names and signatures ---------------------------------------------------------------------------------------------


def parameters(function: Any) -> dict[str, Any]:
    found = inspect.signature(function).parameters
    return {name: p.default for name, p in found.items() if name not in ("self", "cls")}


def test_the_surface_has_the_names_of_the_design() -> None:
    no = inspect.Parameter.empty
    wanted: dict[Any, dict[str, Any]] = {
        rm.Life.__init__: {
            "model": no, "problem": None, "tokenizer": None, "learner": None, "keep": (), "where": None, "home": None,
            "seed": 0, "device": None, "ledger": None,
        },
        rm.Life.learn: {
            "task": no, "epochs": 1, "batch_size": 64, "optimizer": "adamw", "lr": 1e-3, "schedule": "constant",
            "learner": None, "keep": None, "where": None, "carry": False,
        },
        rm.Life.forget: {
            "request": no, "by": no, "keep": (), "where": None, "verify": None, "retain": "lineage", "epochs": None,
            "batch_size": None, "optimizer": None, "lr": None, "schedule": None,
        },
        rm.Life.measure: {"tasks": None},
        rm.Life.trace: {"ids": no},
        rm.Life.predict: {"x": no, "task": None},
        rm.Life.report: {"path": None},
        rm.Life.resume: {"home": no, "model": None, "data": None},
        rm.Request: {
            "ids": None, "classes": None, "documents": None, "spans": None, "entities": None, "concepts": None,
            "client": None,
        },
        rm.data.Examples: {"columns": no, "source": no, "ids": None},
        rm.data.split_digits: {"tasks": 5},
    }  # fmt: skip
    for function, expected in wanted.items():
        found = parameters(function)
        assert {name: found.get(name, "absent") for name in expected} == expected, function
        kind = inspect.signature(function).parameters
        assert all(
            kind[name].kind == kind[name].KEYWORD_ONLY for name in found if name not in expected
        ) or function in (
            rm.data.split_digits,
            rm.data.Examples,
        )
    assert isinstance(rm.Life.model, property) and isinstance(rm.Life.holders, property)
    assert {"holder", "ids", "state", "inputs", "reason"} == set(Trace.__dataclass_fields__)


def test_the_readme_of_the_design_runs(tmp_path: Path) -> None:
    life = rm.Life(network, keep=[rm.keep.Replay(per_class=5), rm.keep.EWC(strength=10.0)], home=tmp_path / "digits")
    for task in list(stream())[:2]:
        event = life.learn(task)
        assert isinstance(event, Event) and event.kind == "learn" and event.status == "done"
    receipt = life.forget(rm.Request(classes=[3]), by=rm.forget.SSD(), verify={"retrain": {"seeds": 1}})
    for row in life.trace(receipt.ids):
        assert row.state in ("deleted", "unlearned", "suppressed", "holds") and str(row).startswith(f"{row.holder}: ")
    assert life.report() == tmp_path.resolve() / "digits" / "report.html"
    assert set(life.holders) == {"weights", "keep/replay", "keep/ewc", "snapshots"}
    assert isinstance(life.model, nn.Module)
    life.close()


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (object(), {}, "function of a seed"),
        (lambda seed: "net", {}, "torch module"),
        (network, {"seed": 1.5}, "integer"),
        (network, {"keep": "replai"}, "did you mean 'replay'"),
        (network, {"keep": [{"replay": {"perclass": 3}}]}, "did you mean 'per_class'"),
        (network, {"keep": ["ssd"]}, "ssd"),
        (network, {"learner": "finetun"}, "did you mean 'finetune'"),
        (network, {"problem": "regresion"}, "did you mean 'regression'"),
        (network, {"measure": ["acuracy"]}, "did you mean 'accuracy'"),
        (network, {"tokenizer": object()}, "language"),
    ]
    for model, options, words in wrong:
        with pytest.raises(BadInput, match=words):
            Life(model, home=tmp_path / "home", **options)
    broken = mlp(64, [4])
    with torch.no_grad():
        next(broken.parameters())[0] = float("inf")
    with pytest.raises(BadInput, match="NaN or infinite"):
        Life(broken, home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_wrong_tasks_and_knobs_are_refused_and_nothing_moves(tmp_path: Path) -> None:
    task = stream()[1]
    train = task.train
    twice = Examples(dict(train.columns), "twice", torch.zeros(len(train), dtype=torch.int64))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (replace(task, train=twice), {}, "are repeated"),
        (replace(task, train=train.replace(y=train["y"].float())), {}, "integer labels"),
        (replace(task, train=Examples({"x": train["x"]}, "s", train.id)), {}, "column 'y'"),
        (replace(task, train=train.select(torch.arange(0))), {}, "no training examples"),
        (task, {"lr": -1.0}, "lr"),
        (task, {"epochs": -1}, "epochs"),
        (task, {"schedule": "cosin"}, "did you mean 'cosine'"),
        (task, {"optimizer": {"sgd": {"momentun": 0.9}}}, "did you mean 'momentum'"),
        (task, {"keep": ["replai"]}, "did you mean 'replay'"),
    ]
    with lived(tmp_path, tasks=1) as life:
        before, rows = bits(life), kinds(life)
        for given, options, words in wrong:
            with pytest.raises(BadInput, match=words):
                life.learn(given, **{**FAST, **options})
            assert bits(life) == before and kinds(life) == rows, words
        with pytest.raises(BadInput, match="at least one id"):
            life.trace([])


# -- events, measuring, answering -------------------------------------------------------------------------------------


def test_events_tell_what_was_done(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        life.forget(Request(classes=[3]), by="retrain")
        first, second, third = life.events
        assert [first.number, second.number, third.number] == [1, 2, 3]
        assert first.label == "learn task 0" and third.kind == "forget" and third.status == "done"
        assert set(first.accuracy) == {0} and set(second.accuracy) == {0, 1}
        assert first.steps == -(-len(stream()[0].train) // FAST["batch_size"]) and first.seconds > 0
        assert first.measures["accuracy"] == pytest.approx(first.accuracy[0], abs=1e-5)
        lineage = [row.body["consumed"] for row in life._rows[:2]]
        assert lineage[0] == {"new": len(stream()[0].train), "replayed": 0}
        assert lineage[1]["new"] == len(stream()[1].train) and 0 < lineage[1]["replayed"] <= 10


@dataclass
class Calls(Metric):
    """Counts how often it was asked: a metric that remembers."""

    def setup(self) -> None:
        self.count = torch.zeros(1)

    def value(self, c: Context) -> dict[str, float]:
        self.count += 1
        return {"calls": float(self.count)}


def test_measuring_predicting_tracing_and_reporting_leave_no_trace(tmp_path: Path) -> None:
    measure = ["accuracy", "forgetting", {"stability-gap": {"every": 2, "subset": 10}}, Calls()]
    with lived(tmp_path, keep=[*REPLAY, "ewc"], measure=measure) as life:
        before, rows, rng = bits(life), kinds(life), torch.get_rng_state()
        flags = [m.training for m in life.model.modules()]
        one = life.measure()
        assert life.measure() == one and set(one["tasks"]) == {0, 1} and set(life.measure([1])["tasks"]) == {1}
        assert one["calls"] == 3  # twice by the events, and now
        life.predict(stream()[0].test["x"])
        life.trace(stream()[0].train.ids)
        life.report()
        assert bits(life) == before and kinds(life) == rows and torch.equal(torch.get_rng_state(), rng)
        assert [m.training for m in life.model.modules()] == flags
    with Life(network, home=tmp_path / "young") as life:
        assert life.measure() == {"tasks": {}} and life.events == [] and life.receipts == []


def test_metrics_of_one_moment_share_what_they_measured() -> None:
    """One forward for each test set, however many metrics ask; new weights are measured anew."""
    for metrics in (["bytes"], ["accuracy", "forgetting", "stability-gap"]):
        with Life(network, seed=1, measure=metrics) as life:
            for task in stream().tasks[:2]:
                life.learn(task, **FAST)
            calls: list[int] = []
            handle = life.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            before = life.measure()["tasks"]
            handle.remove()
            assert len(calls) == 2, metrics
            with torch.no_grad():
                for p in life.model.parameters():
                    p.zero_()
            assert life.measure()["tasks"] != before


def test_seconds_of_learning_leave_out_what_metrics_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only a metric in the loop moves, an event takes no time."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    @dataclass
    class Slow(Metric):
        """Takes its time after every step."""

        every: int = knob(1, "steps", low=1)

        def value(self, c: Context) -> dict[str, float]:
            clock[0] += 7.0
            return {}

    with Life(network, seed=1, measure=[Slow()]) as life:
        event = life.learn(stream().tasks[0], **FAST)
    assert event.seconds == 0 and clock[0] >= 7 * event.steps > 0


def test_predict_answers_in_labels(tmp_path: Path) -> None:
    test = cat([task.test for task in list(stream())[:2]])
    with lived(tmp_path, tasks=0, keep=[{"replay": {"per_class": 30, "batch_size": 30}}]) as life:
        for task in (stream()[1], stream()[0]):  # labels 2, 3 come before 0, 1: columns are not labels
            life.learn(task, **{**FAST, "epochs": 6})
        answers = life.predict(test["x"])
        assert answers.shape == (len(test),) and set(answers.tolist()) <= {0, 1, 2, 3}
        accuracy = (answers == test["y"]).float()
        assert float(accuracy.mean()) > 0.8
        tasks = life.measure()["tasks"]
        assert float(accuracy[: len(stream()[0].test)].mean()) == pytest.approx(tasks[0], abs=1e-5)
        assert set(life.predict(test["x"], task=1).tolist()) <= {2, 3}
        assert set(life.predict(test["x"], task=0).tolist()) <= {0, 1}
        with pytest.raises(BadInput, match=r"learned tasks \[0, 1\], not 4"):
            life.predict(test["x"], task=4)
        bad = test["x"].clone()
        bad[0, 0] = float("nan")
        with pytest.raises(BadInput, match="NaN or infinite"):
            life.predict(bad)


def test_bare_examples_are_a_task(tmp_path: Path) -> None:
    train = [task.train for task in stream()]
    with Life(network, home=tmp_path, keep=REPLAY) as life:
        for examples in train[:2]:
            life.learn(examples, **FAST)
        assert [event.label for event in life.events] == ["learn task 0", "learn task 1"]
        life.forget(Request(classes=[2]), by="retrain")
        before = bits(life)
    with again(tmp_path, train[:2]) as life:  # given back as they came
        assert bits(life) == before and life.measure()["tasks"].keys() == {0, 1}
        assert life.forget(Request(classes=[3]), by="retrain").status == "done"


# -- problems and models ----------------------------------------------------------------------------------------------


def line(first: int, seed: int) -> Task:
    """y = 2 x_0 - x_1 with inputs of 4 numbers."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed))
    y = 2 * x[:, :1] - x[:, 1:2]
    both = Examples({"x": x, "y": y}, f"line {seed}", range(first, first + 60))
    return Task(both.select(torch.arange(45)), both.select(torch.arange(45, 60)), (), (), seed)


def test_a_regression_life(tmp_path: Path) -> None:
    tasks = [line(0, 0), line(100, 1)]

    def build(seed: int) -> nn.Module:
        return mlp(4, [16], 1, seed=seed)

    with Life(
        build, problem="regression", keep=[{"replay": {"policy": "reservoir", "capacity": 20}}], home=tmp_path
    ) as life:
        for task in tasks:
            event = life.learn(task, epochs=30, batch_size=15, optimizer="adam", lr=0.01)
        assert event.measures["mse"] < 1.0 and "forgetting" not in event.measures
        values = life.predict(tasks[0].test["x"])
        assert values.shape == (15, 1)
        mse = float((values - tasks[0].test["y"]).square().mean())
        assert mse == pytest.approx(life.measure()["tasks"][0], rel=1e-4)
        receipt = life.forget(Request(ids=range(0, 20)), by="retrain")
        assert set(receipt.states.values()) == {"deleted"}
        receipt = life.forget(
            Request(ids=range(20, 40)), by="gradient-ascent", verify={"retrain": {"seeds": 2}}, lr=0.001
        )
        assert {cell["metric"] for cell in receipt.evidence} >= {"forget mse", "retain mse", "KL from references"}
        before = bits(life)
    with again(tmp_path, tasks, model=build) as life:
        assert bits(life) == before
    wrong = Task(line(200, 2).train.replace(y=torch.zeros(45, 3)), line(200, 2).test, (), (), 2)
    with again(tmp_path, tasks, model=build) as life, pytest.raises(BadInput, match="shape"):
        life.learn(wrong, **FAST)


def test_a_model_with_a_fixed_wide_head(tmp_path: Path) -> None:
    problem = {"classification": {"classes": list(range(6))}}
    with lived(tmp_path, problem=problem, model=lambda seed: mlp(64, [12], 6, seed=seed)) as life:
        assert life._state.labels == list(range(6)) and life.model.head.out_features == 6  # type: ignore[union-attr]
        life.forget(Request(classes=[3]), by="retrain")
        assert life.model.head.out_features == 6  # type: ignore[union-attr]
        life.learn(stream()[2], **FAST)
        x = stream()[2].train["x"][:10]
        strange = Examples({"x": x, "y": torch.tensor([44, 45] * 5)}, "strange", range(9000, 9010))
        with pytest.raises(BadInput, match=r"not among the problem's classes"):
            life.learn(Task(strange, strange, (44, 45), ("44", "45"), 9), **FAST)
    with Life(mlp(64, [12], 8), home=tmp_path / "wider") as life:  # more columns than labels so far
        life.learn(stream()[0], **FAST)
        life.learn(stream()[1], **FAST)
        assert set(life.predict(stream()[1].test["x"]).tolist()) <= {0, 1, 2, 3}


def test_a_model_given_as_an_object_and_as_a_function(tmp_path: Path) -> None:
    """Equal weights give equal lives; only a function lets references start afresh."""
    with lived(tmp_path / "a") as one, lived(tmp_path / "b", model=network(0)) as other:
        assert bits(one) == bits(other)
        for life in (one, other):
            life.forget(Request(classes=[3]), by="retrain")
        assert bits(one)["state"] == bits(other)["state"]
        fresh, same = one._initial(17), other._initial(17)
        assert weights_sha256(fresh.state_dict()) == weights_sha256(network(17).state_dict())
        assert weights_sha256(same.state_dict()) == weights_sha256(network(0).state_dict())
        before = bits(other)
    with again(tmp_path / "b", model=network(0)) as other:
        assert bits(other) == before
    with pytest.raises(BadInput, match="give the initial model"):
        Life.resume(tmp_path / "b")
    with pytest.raises(DataChanged):
        again(tmp_path / "b", model=mlp(64, [11]))


# -- methods of one's own, and for one event --------------------------------------------------------------------------


@dataclass
class Mine(Keeper):
    """Counts steps and sums labels it has seen: a keeper of one's own."""

    rate: float = knob(0.1, "pull", low=0)

    def setup(self) -> None:
        self.total = torch.zeros(3)

    def after(self, u: Update, batch: Any) -> None:
        self.total[0] += 1
        self.total[1] += float(batch["y"].sum())

    def forgot(self, u: Update, ids: Ids) -> None:
        self.total = torch.zeros(3)


def test_a_keeper_of_ones_own(tmp_path: Path) -> None:
    with lived(tmp_path, keep=[Mine(rate=0.5), Replay(per_class=3)]) as life:
        assert "keep/mine" in life.holders and float(life._state.keepers[0].total[0]) > 0  # type: ignore[attr-defined]
        rows = life.trace(stream()[0].train.ids)
        assert any(row.holder == "keep/mine" and row.inputs == ("weights",) and row.state == "holds" for row in rows)
        before = bits(life)
    with again(tmp_path, parts=[Mine]) as life:
        assert bits(life) == before and life._state.keepers[0].rate == 0.5  # type: ignore[attr-defined]
        life.forget(Request(classes=[3]), by="retrain")


def test_without_its_class_a_life_says_what_is_missing(tmp_path: Path) -> None:
    import subprocess
    import sys

    lived(tmp_path / "home", keep=[Mine()]).close()
    code = (
        "import sys; from remanence import Life; from remanence.models import mlp\n"
        "try: Life.resume(sys.argv[1], lambda seed: mlp(64, [12], seed=seed), allow_drift=True)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "home")], capture_output=True, text=True)
    assert done.stdout.startswith("UnknownName") and "mine" in done.stdout, done


def test_what_is_given_for_one_event_holds_for_it_alone(tmp_path: Path) -> None:
    with lived(tmp_path, keep=[{"l2": {"strength": 0.5}}]) as life, lived(tmp_path / "none", keep=[]) as bare:
        row = life._rows[-1].body
        assert row["keep"] == ["l2"]
        life.learn(stream()[2], **FAST, keep=[], learner={"finetune": {"compete": "new"}})
        row = life._rows[-1].body
        assert row["keep"] == [] and row["learner"] == "finetune" and row["recipe"]["keep"] == []
        assert [keeper.slug for keeper in life._state.keepers] == ["l2"]
        life.learn(stream()[2], **FAST)
        assert life._rows[-1].body["keep"] == ["l2"]
        bare.learn(stream()[2], **FAST, keep=["ewc", "replay"])
        assert bare._rows[-1].body["keep"] == ["ewc", "replay"] and bare._state.keepers == []
        assert not any(name.startswith("keep/") for name in bare.holders)
        bare.forget(Request(classes=[3]), by="retrain")  # recipes are repeated as they were
        with pytest.raises(UnknownName):
            bare.learn(stream()[2], learner="jont")


def test_an_event_without_keepers_is_the_event_of_a_life_without(tmp_path: Path) -> None:
    with lived(tmp_path / "a", tasks=0) as kept, lived(tmp_path / "b", tasks=0, keep=[]) as bare:
        for task in list(stream())[:2]:
            kept.learn(task, **FAST, keep=[])
            bare.learn(task, **FAST)
        assert weights_sha256(kept.model.state_dict()) == weights_sha256(bare.model.state_dict())


def test_the_optimizer_state_is_carried_only_if_asked_for(tmp_path: Path) -> None:
    found = {}
    for carry in (False, True):
        with lived(tmp_path / str(carry), tasks=0) as life:
            life.learn(stream()[0], **FAST, carry=carry)
            assert bool(life._state.optimizer) == carry
            life.learn(stream()[1], **FAST, carry=carry)
            found[carry] = weights_sha256(life.model.state_dict())
            before = bits(life)
        with again(tmp_path / str(carry)) as life:
            assert bits(life) == before
            life.learn(stream()[2], **FAST, carry=carry)
            end = bits(life)["state"]
            life.forget(Request(classes=[3]), by={"ssd": {"selection": 10}})
            assert life._state.optimizer == {}  # never across a forget
        with lived(tmp_path / f"{carry} straight", tasks=0) as life:
            for task in stream():
                life.learn(task, **FAST, carry=carry)
            assert bits(life)["state"] == end
    assert found[False] != found[True]


class _Cut(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("where", [[], [{"lora": {"rank": 2}}]])
def test_going_on_from_a_snapshot_inside_an_event_changes_no_bit(where: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {**FAST, "epochs": 2, "where": where, "carry": True}
    keep: list[Any] = [*REPLAY, "ewc", {"fpf": {"k": 2, "steps": 3}}]

    def build(seed: int) -> nn.Module:
        return mlp(64, [12], dropout=0.2, seed=seed)

    with lived(tmp_path / "whole", keep=keep, model=build) as life:
        life.learn(stream()[2], **options)
        wanted = bits(life)
    with lived(tmp_path / "cut", keep=keep, model=build) as life:
        for after in (5, 12):
            left = [after]

            def count(*_: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise _Cut

            hook = life.model.body.register_forward_hook(count)  # type: ignore[union-attr]
            with pytest.raises(_Cut):
                life.learn(stream()[2], **options, snapshot_every=2)
            hook.remove()
            assert life._ledger.get_current("checkpoint") is not None
        steps = []
        life.model.body.register_forward_hook(lambda *_: steps.append(1))  # type: ignore[union-attr]
        life.learn(stream()[2], **options, snapshot_every=2)
        assert bits(life) == wanted and life._ledger.get_current("checkpoint") is None
    with lived(tmp_path / "other", keep=keep, model=build) as life:
        life.learn(stream()[2], **options, snapshot_every=3)
        assert bits(life) == wanted  # taking them changes nothing either


# -- other learners ---------------------------------------------------------------------------------------------------


def test_a_joint_life_forgets(tmp_path: Path) -> None:
    with lived(tmp_path / "a", learner="joint", keep=[], tasks=3) as life:
        assert life._rows[2].body["consumed"]["replayed"] == sum(len(stream()[i].train) for i in (0, 1))
        receipt = life.forget(Request(classes=[1]), by="retrain")
        assert {row.state for row in life.trace(receipt.ids)} == {"deleted"}
        with lived(tmp_path / "b", learner="joint", keep=[], tasks=0) as fresh:
            for task in stream():
                left = task.train.without(receipt.ids)
                classes = tuple(c for c in task.classes if c != 1)
                fresh.learn(Task(left, task.test, classes, tuple(map(str, classes)), task.id), **FAST)
            assert tree(fresh._state.pack()["weights"]) == tree(life._state.pack()["weights"])


def test_an_nmc_life_forgets(tmp_path: Path) -> None:
    with lived(tmp_path, learner="nmc", keep=[], model=lambda seed: identity(64, seed=seed)) as life:
        assert life.measure()["tasks"][0] > 0.8 and not life._books.consumed  # nothing was trained
        gone = of_class(stream()[1], 3)
        assert {row.holder.partition("/")[0] for row in life.trace(gone)} == {
            "learn",
            "snapshots",
        }  # the sums, and saved ones
        receipt = life.forget(Request(classes=[3]), by="retrain")
        assert receipt.states["learn/nmc"] == "deleted" and "weights" not in receipt.states
        assert 3 not in life.predict(stream()[1].test["x"]).tolist()
        before = life.predict(stream()[0].test["x"])
    with lived(
        tmp_path / "fresh", learner="nmc", keep=[], tasks=0, model=lambda seed: identity(64, seed=seed)
    ) as fresh:
        for task in list(stream())[:2]:
            fresh.learn(Task(task.train.without(gone), task.test, (), (), task.id), **FAST)
        assert torch.equal(fresh.predict(stream()[0].test["x"]), before)


# -- homes ------------------------------------------------------------------------------------------------------------


def test_a_life_without_a_home_leaves_nothing_behind() -> None:
    with lived(None) as life:
        home = life.home
        life.forget(Request(classes=[3]), by="retrain")
        assert (home / "ledger.db").exists() and life.report().exists()
    assert not home.exists()
    life.close()  # harmless
    forgotten = lived(None)
    home = forgotten.home
    forgotten.close()
    assert not home.exists()


def test_with_closes_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lived(tmp_path) as life:
        raise ZeroDivisionError
    again(tmp_path).close()
    assert not life._lock.held
    with pytest.raises(Refused, match="already holds a life"):
        Life(network, home=tmp_path)
    again(tmp_path).close()


def test_a_life_that_was_never_born_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no life"):
        again(tmp_path)
    from remanence.life.ledger import Ledger

    Ledger(tmp_path / "ledger.db").close()
    with pytest.raises(Corrupt, match="stopped before it began"):
        again(tmp_path)


def test_lives_do_not_touch_the_users_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with lived(tmp_path) as life:
        life.forget(Request(classes=[3]), by="salun", verify={"retrain": {"seeds": 1}})
        assert torch.equal(torch.get_rng_state(), before)
        one = bits(life)["digest"]
    torch.manual_seed(6)
    with lived(tmp_path / "again") as life:
        life.forget(Request(classes=[3]), by="salun", verify={"retrain": {"seeds": 1}})
        assert bits(life)["digest"] == one
    with lived(tmp_path / "seed", seed=1) as life:
        assert bits(life)["digest"] != one


PLAN = """
name: small
seed: 4
model: {mlp: {hidden: [12]}}
stream: {split-digits: {tasks: 5}}
keep: [{replay: {per_class: 4, batch_size: 8}}, {ewc: {strength: 2}}]
train: {epochs: 1, batch_size: 32, optimizer: {sgd: {momentum: 0.9}}, lr: 0.05}
events:
  - learn: 0
  - learn: {task: 1, epochs: 2, keep: []}
  - forget: {classes: [3], by: {ssd: {selection: 5}}, verify: {retrain: {seeds: 1}}}
  - forget: {ids: [0, 1], by: retrain, verify: none}
measure: [accuracy, bytes]
"""


def test_a_plan_and_python_build_the_same_life(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(PLAN)
    planned = run_plan(tmp_path / "small.yaml", tmp_path / "planned")
    from remanence.core.rng import seed_of

    settings: dict[str, Any] = {"epochs": 1, "batch_size": 32, "optimizer": {"sgd": {"momentum": 0.9}}, "lr": 0.05}
    tasks = rm.data.split_digits(tasks=5)
    with rm.Life(
        lambda seed: mlp(64, [12], seed=seed_of(seed, "model") % 2**31),
        keep=[Replay(per_class=4, batch_size=8), EWC(strength=2)],
        problem=Classification(),
        home=tmp_path / "python",
        seed=4,
        measure=["accuracy", "bytes"],
        name="small",
    ) as life:
        life.learn(tasks[0], **settings)
        life.learn(tasks[1], **{**settings, "epochs": 2}, keep=[])
        life.forget(Request(classes=[3]), by=rm.forget.SSD(selection=5), verify={"retrain": {"seeds": 1}})
        life.forget(Request(ids=[0, 1]), by="retrain")
        assert [row.body for row in life._ledger.rows("born")] == [row.body for row in planned._ledger.rows("born")]
        assert life.content_digest() == planned.content_digest()
        assert tree(life._state.pack()) == tree(planned._state.pack())
        assert isinstance(life.predict(tasks[0].test["x"]), Tensor)
    planned.close()
