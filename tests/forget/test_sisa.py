"""A whole life that learns by shards: what is asked for is gone, in bits, whenever it is asked."""

from __future__ import annotations

import pytest
import torch

from remanence.core.errors import BadInput, Refused
from remanence.core.ids import Ids
from remanence.data import Request, Task
from remanence.forget.sisa import SISA
from remanence.life.life import Life
from remanence.models import mlp
from tests.forget.helpers import forgotten
from tests.life.helpers import FAST, again, network, of_class, stream, tree

LEARNER = {"sisa": {"shards": 3, "slices": 2}}
TASKS = list(stream())[:3]
GONE = Ids(torch.cat([TASKS[0].train.id[::9], TASKS[1].train.id[::13]]))


def without(task, ids):
    return Task(task.train.without(ids), task.test, task.classes, task.names, task.id)


def life(home=None, tasks=TASKS, **options):
    made = Life(network, home=home, name="small", **{"learner": LEARNER, **options})
    for task in tasks:
        made.learn(task, **FAST)
    return made


def shards(made):
    return tree(made._state.learner.saved)


@pytest.mark.fidelity(
    "forget/sisa",
    check="a life of three tasks with requests in between and at the end against one that never had the data",
    measured="every saved tensor of every shard equal in bits, snapshots and resumed lives included",
    paper="exact by construction",
    differs="a class that is gone keeps its column unless the problem fixes its classes",
)
def test_a_life_that_forgot_equals_one_that_never_had_them(tmp_path):
    made = life(tmp_path / "a", tasks=[])
    made.learn(TASKS[0], **FAST)
    made.learn(TASKS[1], **FAST)
    first, second = GONE & TASKS[0].train.ids, GONE & TASKS[1].train.ids
    receipt = made.forget(Request(ids=first), by="sisa", verify={"retrain": {"seeds": 1}})
    assert receipt.status == "done" and receipt.ids == first and receipt.evidence
    assert receipt.states["learn/sisa"] == "deleted"
    made.learn(TASKS[2], **FAST)
    assert made.forget(Request(ids=second), by="sisa").status == "done"
    never = life(tmp_path / "b", [without(task, GONE) for task in TASKS])
    assert shards(made) == shards(never) and made._state.learner.book.cells == never._state.learner.book.cells
    rows = made.trace(GONE)
    assert {row.state for row in rows} == {"deleted"} and "learn/sisa" in {row.holder for row in rows}
    assert {row.state for row in made.trace(TASKS[2].train.ids)} == {"holds"}
    digest, kept = made.content_digest(), shards(made)
    made.close()
    resumed = again(tmp_path / "a")
    assert resumed.content_digest() == digest and shards(resumed) == kept
    assert resumed.forget(Request(ids=Ids(TASKS[2].train.id[:1])), by="sisa").status == "done"
    resumed.close()
    never.close()


def test_it_equals_retraining():
    """Lived again or taken out: the same shards. A second request for the same is already met."""
    taken, lived = life(), life()
    taken.forget(Request(ids=GONE), by="sisa")
    lived.forget(Request(ids=GONE), by="retrain")
    assert shards(taken) == shards(lived)
    assert taken.forget(Request(ids=GONE), by="sisa").number == 1


def test_a_whole_class_where_the_classes_are_fixed():
    fixed = {"problem": {"classification": {"classes": list(range(6))}}}
    gone = of_class(TASKS[1], 2)
    made, never = life(**fixed), life(tasks=[TASKS[0], without(TASKS[1], gone), TASKS[2]], **fixed)
    made.forget(Request(classes=[2]), by="sisa")
    assert shards(made) == shards(never)
    c = made._context()
    answers = c.outputs(c.mapped(TASKS[1].train.only(gone))).argmax(1)
    assert float((answers == 2).float().mean()) == 0


def test_untouched_shards_keep_their_bits_and_the_receipt_says_how():
    made, one = life(), Ids(TASKS[1].train.id[:1])
    before, (cell,) = shards(made), made._state.learner.book.touched(one)
    shard, part = divmod(cell - 6, 2)
    receipt = made.forget(Request(ids=one), by="sisa")
    after = shards(made)
    assert [a == b for a, b in zip(before, after, strict=True)] == [k != shard for k in range(3)]
    assert before[shard][: 2 + part] == after[shard][: 2 + part]
    why = made._ledger.rows("forget")[-1].body["why"]
    assert why.startswith(f"shard {shard} of 3 went back and trained {4 - part} of 18 slices again")
    assert receipt.status == "done"


def test_it_is_refused_elsewhere():
    other = Life(network, name="small")
    other.learn(TASKS[0], **FAST)
    with pytest.raises(Refused, match="works through the learner 'sisa'"):
        other.forget(Request(classes=[0]), by="sisa")
    with pytest.raises(BadInput, match="no learner"):
        forgotten(network(0), SISA(), TASKS[0].train, Ids(TASKS[0].train.id[:1]), labels=list(TASKS[0].classes))
    with pytest.raises(Refused, match="trains no weights"):
        life(tasks=TASKS[:1]).forget(Request(classes=[0]), by="ssd")


def test_a_life_with_keepers_is_refused_when_it_learns():
    made = Life(network, name="small", learner=LEARNER, keep=["l2"])
    with pytest.raises(BadInput, match="l2 cannot act"):
        made.learn(TASKS[0], **FAST)


def test_a_network_that_another_method_moves_is_answered_by_retraining():
    """The shards began at weights that had learned the first task: a forget that moves these would leave them standing on the old ones."""
    made = Life(lambda seed: mlp(64, [12], 6, seed=seed), name="small", learner=LEARNER)
    made.learn(TASKS[0], learner="finetune", **FAST)
    made.learn(TASKS[1], **FAST)
    before = shards(made)
    with pytest.raises(BadInput, match=r"has been moved.*by='retrain'"):
        made.forget(Request(classes=[0]), by="gradient-ascent")
    assert shards(made) == before
    assert made.forget(Request(ids=Ids(TASKS[1].train.id[:1])), by="sisa").status == "done"
    assert shards(made) != before
    assert made.forget(Request(classes=[0]), by="retrain").status == "done"
    with pytest.raises(Refused, match=r"too; ask by='retrain'"):
        made.forget(Request(classes=[1]), by="sisa")
