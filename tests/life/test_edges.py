"""Lives used in unusual ways: what a careful reader asked, and what must hold all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import remanence as rm
from remanence.core.errors import BadInput, EventFailed, Refused
from remanence.core.ids import Ids
from remanence.core.problem import Classification
from remanence.data import Examples, Task
from remanence.keep.ewc import EWC
from remanence.keep.fpf import FPF
from remanence.learn.finetune import Finetune
from remanence.life import erasing
from remanence.life.evidence import split
from remanence.life.references import live_again
from remanence.life.run import continue_plan, run_plan
from remanence.train.roles import Metric
from remanence.train.update import Context

TASKS = list(rm.data.split_digits())
FAST: dict[str, Any] = {"epochs": 2, "batch_size": 32}


def net(seed: int = 0) -> nn.Module:
    return rm.models.mlp(64, [16], seed=seed)


def cut(task: Task, n: int = 60) -> Task:
    return Task(task.train.select(torch.arange(n)), task.test, task.classes, task.names, task.id)


def test_references_of_other_networks_are_other_references(tmp_path: Path) -> None:
    """Equal initial weights under another activation: never found in the shared folder."""

    def with_activation(kind: type[nn.Module]) -> nn.Module:
        model = net()
        for name, module in list(model.body.named_children()):  # type: ignore[union-attr, operator]
            if isinstance(module, nn.ReLU):
                setattr(model.body, name, kind())
        return model

    found = {}
    for kind in (nn.ReLU, nn.Tanh):
        with rm.Life(with_activation(kind), references=tmp_path / "refs") as life:
            life.learn(cut(TASKS[0]), **FAST)
            life.forget(rm.Request(ids=TASKS[0].train.id[:3].tolist()), by="retrain")
            shared = live_again(life, life._books.tombstones, 0).model.state_dict()
        with rm.Life(with_activation(kind)) as alone:
            alone.learn(cut(TASKS[0]), **FAST)
            alone.forget(rm.Request(ids=TASKS[0].train.id[:3].tolist()), by="retrain")
            assert all(torch.equal(value, alone.model.state_dict()[name]) for name, value in shared.items())
        found[kind] = shared["head.weight"]
    assert not torch.equal(found[nn.ReLU], found[nn.Tanh])


def test_an_accepted_request_waits_for_its_data_and_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: str) -> None:
        if step == "accept":
            raise KeyboardInterrupt

    with rm.Life(net(), home=tmp_path) as life:
        life.learn(cut(TASKS[0]), **FAST)
        with monkeypatch.context() as patch:
            patch.setattr(erasing, "reached", stop)
            with pytest.raises(KeyboardInterrupt):
                life.forget(rm.Request(ids=TASKS[0].train.id[:3].tolist()), by="retrain")
    with rm.Life.resume(tmp_path, net()) as life, pytest.raises(Refused, match="data="):
        life.learn(cut(TASKS[1]), **FAST)
    with rm.Life.resume(tmp_path, net(), [cut(TASKS[0])]) as life:
        assert [receipt.status for receipt in life.receipts] == ["done"]


def test_redact_waits_for_the_end_of_the_plan(tmp_path: Path) -> None:
    plan = tmp_path / "p.yaml"
    plan.write_text(
        "threads: 1\nmodel: {mlp: {hidden: [8]}}\nstream: split-digits\ntrain: {batch_size: 64}\nevents:\n"
        "  - learn: 0\n  - forget: {ids: [0, 1], by: retrain, verify: none}\n  - forget: {ids: [30], by: retrain, verify: none}\n"
    )

    def stop(life: Any) -> None:
        if len(life.events) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "home", after=stop)
    with rm.Life.resume(tmp_path / "home") as life:
        with pytest.raises(Refused, match="events to come"):
            life.redact()
        continue_plan(life)
        assert life.redact() == ["request 1 redacted", "request 2 redacted"]
    assert (tmp_path / "home" / "plan.yaml").read_text().count("ids: redacted") == 2


def test_ids_that_were_deleted_stay_deleted_when_a_larger_request_names_them() -> None:
    with rm.Life(net()) as life:
        for task in TASKS[:2]:
            life.learn(cut(task), **FAST)
        some = Ids(TASKS[0].train.id[:60][TASKS[0].train["y"][:60] == 1][:5].numpy())
        life.forget(rm.Request(ids=some), by="retrain")
        receipt = life.forget(rm.Request(classes=[1]), by="catastrophic")
        assert not receipt.ids & some
        assert {row.state for row in life.trace(some)} == {"deleted"}


def test_the_same_method_with_more_evidence_is_no_repeat() -> None:
    with rm.Life(net) as life:
        for task in TASKS[:2]:
            life.learn(cut(task), **FAST)
        first = life.forget(rm.Request(classes=[3]), by="salun")
        again = life.forget(rm.Request(classes=[3]), by="salun", verify={"retrain": {"seeds": 2}})
        assert again.number != first.number and again.evidence and not first.evidence


def test_bare_examples_have_no_strangers_among_themselves() -> None:
    with rm.Life(net()) as life:
        life.learn(cut(TASKS[0]).train, **FAST)
        assert sum(len(part) for part in split(life, "report")) == 0


def test_a_limit_needs_something_to_look_at() -> None:
    data = Examples({"x": torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), "y": torch.zeros(40)}, "rows")
    with rm.Life(rm.models.mlp(3, [4], 1), problem="regression") as life:
        life.learn(data, **FAST)
        with pytest.raises(EventFailed, match="limit"):
            life.forget(rm.Request(ids=[0, 1]), by="gradient-ascent", limit=0.1)


def test_soft_labels_are_refused_before_the_head_grows() -> None:
    data = Examples({"x": torch.zeros(8, 64), "y": torch.full((8, 2), 0.5)}, "soft")
    with rm.Life(net()) as life, pytest.raises(BadInput, match="integer labels"):
        life.learn(data)


def test_a_where_is_refused_where_nothing_is_trained() -> None:
    with rm.Life(net()) as life:
        life.learn(cut(TASKS[0]), **FAST)
        for by in ("ssd", "retrain"):
            with pytest.raises(BadInput, match="trains nothing"):
                life.forget(rm.Request(ids=[int(TASKS[0].train.id[0])]), by=by, where="saliency")


def test_carrying_over_to_another_optimizer_begins_anew() -> None:
    def last(carry: bool) -> torch.Tensor:
        with rm.Life(net()) as life:
            life.learn(cut(TASKS[0]), **FAST, optimizer={"sgd": {"momentum": 0.9}}, lr=0.05, carry=True)
            life.learn(cut(TASKS[1]), **FAST, optimizer="adamw", carry=carry)
            return life.model.head.weight.detach().clone()  # type: ignore[union-attr, operator, return-value]

    assert torch.equal(last(True), last(False))


@pytest.mark.parametrize("fixed", [False, True])
def test_who_is_new_is_told_by_the_data(fixed: bool) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    class Looks(Finetune):
        def learn(self, u: Any) -> None:
            seen.append((u.classes.new.tolist(), u.classes.old.tolist()))

    model = rm.models.mlp(64, [8], 10) if fixed else rm.models.mlp(64, [8])
    problem = Classification(classes=list(range(10))) if fixed else Classification()
    with rm.Life(model, problem=problem, learner=Looks()) as life:
        for task in TASKS[:3]:
            life.learn(cut(task))
    assert seen == [([0, 1], []), ([2, 3], [0, 1]), ([4, 5], [0, 1, 2, 3])]


def test_new_columns_only_bear_a_task_that_brings_old_classes() -> None:
    both = Examples({"x": TASKS[0].train["x"][:20], "y": torch.arange(20) % 3}, "mixed", ids=range(10**6, 10**6 + 20))
    with rm.Life(net(), learner=Finetune(compete="new")) as life:
        life.learn(cut(TASKS[0]), **FAST)
        life.learn(both, **FAST)  # classes 0 and 1 are old, 2 is new: an infinite loss would fail the event


def test_a_metric_in_the_loop_is_called_once_per_step_under_accumulation() -> None:
    steps: list[int] = []

    class Counts(Metric):
        every: int = 1

        def value(self, c: Context) -> dict[str, float]:
            if hasattr(c, "step"):
                steps.append(c.step)
            return {}

    with rm.Life(net(), measure=[Counts()]) as life:
        life.learn(cut(TASKS[0], 60), epochs=1, batch_size=10, accumulate=3)
    assert steps == [1, 2]


def test_reservoirs_see_every_example_under_view_batch() -> None:
    keep = [
        rm.keep.Replay(policy="reservoir", capacity=20),
        rm.keep.ViewBatch(views=4, consistency=0.0),
        FPF(capacity=20, k=0),
    ]
    with rm.Life(net(), keep=keep) as life:
        life.learn(cut(TASKS[0], 60), epochs=4, batch_size=12)
        assert life._state.keepers[0].buffer.offered == 60  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ewc_is_anchored_where_the_event_ends_whatever_stands_first(order: tuple[int, int]) -> None:
    parts = [EWC(strength=1.0), FPF(steps=5, capacity=30)]
    with rm.Life(net(), keep=[parts[i] for i in order]) as life:
        life.learn(cut(TASKS[0]), **FAST)
        anchor = next(k for k in life._state.keepers if isinstance(k, EWC)).anchor.anchor
        assert all(torch.equal(value, anchor[name]) for name, value in life.model.named_parameters())


def test_weights_that_a_keeper_moves_are_traced_with_a_learner_that_moves_none() -> None:
    model = rm.models.mlp(64, [], 10)
    with rm.Life(model, learner="nmc", keep=[{"refresh-learning": {"delta": 0.01}}]) as life:
        life.learn(cut(TASKS[0]), epochs=1, batch_size=30)
        assert "weights" in {row.holder for row in life.trace(TASKS[0].train.id[:3].tolist())}


def test_the_report_names_kept_references(tmp_path: Path) -> None:
    with rm.Life(net, home=tmp_path / "home", references=tmp_path / "refs") as life:
        life.learn(cut(TASKS[0]), **FAST)
        life.forget(rm.Request(ids=TASKS[0].train.id[:3].tolist()), by="catastrophic", verify={"retrain": {"seeds": 2}})
        life.report()
    holders = {h["name"]: h["bytes"] for h in json.loads((tmp_path / "home" / "report.json").read_text())["holders"]}
    assert holders["references"] > 0


def test_delete_leaves_what_is_not_the_lifes(tmp_path: Path) -> None:
    from remanence.life.home import delete

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text("precious")
    (tmp_path / "notes.txt").write_text("precious")
    with rm.Life(net(), home=tmp_path) as life:
        life.learn(cut(TASKS[0]), **FAST)
        life.report()
    gone = delete(tmp_path)
    assert {"ledger.db", "snapshots", "report.html"} <= set(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "src"]
    assert (tmp_path / "src" / "mine.py").read_text() == "precious"


def test_a_mended_plan_begins_anew_where_nothing_had_happened(tmp_path: Path) -> None:
    plan = tmp_path / "p.yaml"
    text = "threads: 1\nmodel: {mlp: {hidden: [8]}}\nstream: split-digits\ntrain: {batch_size: 64, lr: RATE, optimizer: sgd}\nevents: [{learn: 0}]\n"
    plan.write_text(text.replace("RATE", "1.0e+30"))
    with pytest.raises(EventFailed):
        run_plan(plan, tmp_path / "home")
    plan.write_text(text.replace("RATE", "0.1"))
    with run_plan(plan, tmp_path / "home") as life:
        assert len(life.events) == 1
    plan.write_text(text.replace("RATE", "0.2"))
    with pytest.raises(Refused, match="another life"):
        run_plan(plan, tmp_path / "home")


def test_redaction_does_not_bring_a_forgotten_class_back_into_the_figures() -> None:
    with rm.Life(net()) as life:
        for task in TASKS[:2]:
            life.learn(cut(task), **FAST)
        life.forget(rm.Request(classes=[3]), by="retrain")
        before = life.measure()["tasks"]
        assert life.redact() == ["request 1 redacted"]
        assert life.measure()["tasks"] == before


def test_a_stream_is_learned_task_by_task() -> None:
    with rm.Life(net()) as life, pytest.raises(BadInput, match=r"stream\[0\]"):
        life.learn(rm.data.split_digits())  # type: ignore[arg-type]
