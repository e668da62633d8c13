"""Lives that learn with `acu` and are asked to forget: the books, the sums and the answers of a life that never had the examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from remanence.core.errors import BadInput, Refused
from remanence.core.ids import Ids
from remanence.data import Request, Stream, digits, split_classes
from remanence.forget.acu import ACU
from remanence.learn.acu import ACU as Learner
from remanence.life.life import Life
from remanence.models import identity, mlp
from tests.forget.helpers import digits_model, forget_update, split

LEARN = {"acu": {"width": 150}}


def stream() -> Stream:
    """Forty examples of each of six digits, as three tasks."""
    data = digits()
    rows = torch.cat([(data["y"] == label).nonzero()[:40, 0] for label in range(6)])
    return split_classes(data.select(rows), tasks=3, name="small")


TASKS = list(stream())


def network(seed):
    return mlp(64, [24], norm=True, dropout=0.3, seed=seed)


def born(home=None, model=network, seed=0, **options):
    return Life(model, home=home, seed=seed, name="small", **{"learner": LEARN, **options})


def of_class(label):
    data = TASKS[label // 2].train
    return data.select((data["y"] == label).nonzero()[:, 0]).ids


def without(task, gone):
    train = task.train.without(gone)
    left = tuple(c for c in task.classes if (train["y"] == c).any())
    return replace(task, train=train, classes=left, names=tuple(map(str, left)))


def head(life):
    """W with its columns by label."""
    ridge, labels = life._state.learner.ridge, life._state.labels
    order = sorted(range(len(ridge.labels)), key=lambda at: labels[ridge.labels[at]])
    return ridge.weights()[:, order]


def scores(life, examples, labels):
    """Answers in the columns of `labels`."""
    return life._context().outputs(examples)[:, [life._state.labels.index(label) for label in labels]]


@pytest.mark.fidelity(
    "forget/acu",
    check="a life of three tasks that forgets a class and single examples in between, beside one that never had them, three seeds",
    measured="the ridge solutions differ by less than 1e-12; class accuracy 0; every holder *deleted*",
    paper="- (only the abstract was read: exact for samples and classes, in any order)",
    differs="the sums are subtracted; the paper updates R and W, which agrees to 1e-12 (tests/nn/test_ridge.py)",
)
@pytest.mark.parametrize("seed", range(3))
def test_a_life_that_forgets_equals_one_that_never_knew(tmp_path, seed):
    three = of_class(3)
    some = TASKS[0].train.ids.sample(9, torch.Generator().manual_seed(seed)) | TASKS[2].train.ids.sample(
        5, torch.Generator().manual_seed(seed)
    )
    early = some & TASKS[0].train.ids
    with born(tmp_path / "a", seed=seed) as life, born(tmp_path / "b", seed=seed) as never:
        weights = {name: value.clone() for name, value in life.model.state_dict().items()}
        life.learn(TASKS[0], batch_size=32)
        first = life.forget(Request(ids=early), by="acu")
        life.learn(TASKS[1], batch_size=7)
        second = life.forget(Request(classes=[3]), by="acu")
        life.learn(TASKS[2], batch_size=64, epochs=2)
        third = life.forget(Request(ids=some), by="acu")
        for task in TASKS:
            never.learn(without(task, some | three), batch_size=16)
        assert third.ids == some & TASKS[2].train.ids, "what is deleted already is not asked again"
        for receipt in (first, second, third):
            assert receipt.status == "done" and receipt.by == "acu" and receipt.states["learn/acu"] == "deleted"
        assert {t.state for t in life.trace(some | three)} == {"deleted"}
        assert "learn/acu" in {t.holder for t in life.trace(some | three)}
        kept = TASKS[2].train.ids - some
        assert [t.state for t in life.trace(kept) if t.holder == "learn/acu"] == ["holds"]
        assert life._state.learner.ridge.ids == never._state.learner.ridge.ids
        assert float((head(life) - head(never)).abs().max()) < 1e-8
        gram, other = life._state.learner.ridge.gram(), never._state.learner.ridge.gram()
        assert float((gram - other).abs().max()) < 1e-8
        labels = [0, 1, 2, 4, 5]
        for task in TASKS:
            torch.testing.assert_close(
                scores(life, task.test, labels), scores(never, task.test, labels), rtol=0, atol=1e-6
            )
        wanted = life._context().outputs(TASKS[1].test).argmax(1)
        assert (wanted != life._state.labels.index(3)).all()
        assert all(torch.equal(value, weights[name]) for name, value in life.model.state_dict().items())


def test_a_forgotten_class_is_not_taught_back_and_can_be_learned_again(tmp_path):
    with born(tmp_path) as life:
        life.learn(TASKS[0])
        life.learn(TASKS[1])
        before = head(life)
        life.forget(Request(classes=[2]), by="acu")
        life.learn(TASKS[2])
        assert (
            life._context().evaluate(TASKS[1].test.select((TASKS[1].test["y"] == 2).nonzero()[:, 0]))["accuracy"] == 0
        )
        life.forget(Request(classes=[4, 5]), by="acu")
        life.learn(TASKS[1], allow_forgotten=True)
        assert float((head(life) - before).abs().max()) < 1e-8


def test_evidence_by_retraining(tmp_path):
    """The references are other draws of network and random layer; the life retrained with its own is the life itself."""
    with born(tmp_path) as life:
        for task in TASKS:
            life.learn(task)
        receipt = life.forget(Request(classes=[1]), by="acu", verify={"retrain": {"seeds": 3}})
        assert receipt.states["learn/acu"] == "deleted" and receipt.content["references"] == 3
        verdicts = {cell["metric"]: cell["verdict"] for cell in receipt.evidence}
        assert verdicts["forget accuracy"] == "indistinguishable from retraining"
        assert verdicts["KL from references"] != "farther"
        assert "in closed form: equal to a life without them to" in life._rows[-1].body["why"]
        from remanence.life.references import live_again

        again = live_again(life, receipt.ids, life.seed)
        assert torch.allclose(again.learner.ridge.gram(), life._state.learner.ridge.gram(), rtol=0, atol=1e-8)


def test_on_one_frozen_network_all_references_say_the_same(tmp_path):
    with born(tmp_path, model=identity(64), learner={"acu": {"width": 0}}) as life:
        life.learn(TASKS[0])
        life.learn(TASKS[1])
        receipt = life.forget(Request(classes=[1]), by="acu", verify={"retrain": {"seeds": 2}})
        found = {c["metric"]: c for c in receipt.evidence}
        assert found["KL from references"]["after"] < 1e-10
        assert found["forget accuracy"]["after"] == found["forget accuracy"]["reference_mean"] == 0
        assert found["forget accuracy"]["nothing"] > 0.9


def test_an_example_learned_in_two_tasks_counts_once(tmp_path):
    with born(tmp_path / "a") as life, born(tmp_path / "b") as never:
        life.learn(TASKS[0])
        life.learn(TASKS[1])
        life.learn(replace(TASKS[0], id=7))
        gone = TASKS[0].train.ids.sample(10, torch.Generator().manual_seed(0))
        life.forget(Request(ids=gone), by="acu")
        for task in TASKS[:2]:
            never.learn(without(task, gone))
        assert float((head(life) - head(never)).abs().max()) < 1e-8


def test_only_the_forgotten_data_need_be_reached(tmp_path):
    with born(tmp_path / "a") as life:
        life.learn(TASKS[0])
        life.learn(TASKS[1])
    with Life.resume(tmp_path / "a", network, TASKS[:1]) as life:
        with pytest.raises(Refused, match="5 of the examples cannot be reached"):
            life.forget(Request(ids=of_class(0) | Ids(of_class(2).array[:5])), by="acu")
        life.forget(Request(ids=of_class(0)), by="acu")
        kept = head(life), life._state.learner.ridge.ids
    with born(tmp_path / "never") as never:
        never.learn(without(TASKS[0], of_class(0)))
        never.learn(TASKS[1])
        assert float((kept[0] - head(never)).abs().max()) < 1e-8 and kept[1] == never._state.learner.ridge.ids


def test_it_is_refused_where_the_learner_did_not_do_it_all(tmp_path):
    with born(tmp_path / "finetune", learner="finetune") as life:
        life.learn(TASKS[0], epochs=1)
        with pytest.raises(Refused, match="works through the learner 'acu'"):
            life.forget(Request(classes=[0]), by="acu")
    with born(tmp_path / "nmc", learner="nmc") as life:
        life.learn(TASKS[0])
        with pytest.raises(Refused, match="learns with nmc"):
            life.forget(Request(classes=[0]), by="acu")
    with born(tmp_path / "replay", keep=[{"replay": {"per_class": 3}}]) as life:
        life.learn(TASKS[0])
        with pytest.raises(Refused, match="keepers: replay"):
            life.forget(Request(classes=[0]), by="acu")


def test_a_backbone_that_another_event_trained_is_found_out(tmp_path):
    """Its features are no longer those that were counted, and nothing may be called exact."""
    with born(tmp_path) as life:
        life.learn(TASKS[0])
        life.learn(TASKS[1], learner="finetune", epochs=1)
        kept = head(life)
        with pytest.raises(BadInput, match="backbone that no event trains"):
            life.forget(Request(classes=[0]), by="acu")
        assert torch.equal(head(life), kept) and life._state.learner.holds(of_class(0)) == of_class(0)


def test_without_a_life_it_says_so():
    train = split()[0]
    u = forget_update(digits_model(), ACU(), train, train.ids.sample(5, torch.Generator().manual_seed(0)))
    with pytest.raises(BadInput, match="no life"):
        ACU().forget(u, Request(classes=[0]))


def test_ids_without_their_rows_are_refused():
    train = split()[0]
    u = forget_update(digits_model(), ACU(), train, Ids(train.id[:5]))
    learner = Learner(width=20)
    learner.begin(u)
    for batch in u.batches(train):
        learner._add(u, batch)
    with pytest.raises(BadInput, match="3 of the examples"):
        learner.unlearn(u, Ids(train.id[2:8]))
    assert learner.holds(Ids(train.id[2:8])) == Ids(train.id[2:8])
    assert "closed form" in learner.unlearn(u, Ids(train.id[:5]))
