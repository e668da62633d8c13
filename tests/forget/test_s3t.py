"""A whole life that learns by adapters on slices: what is asked for is switched off."""

from __future__ import annotations

import pytest

from remanence.core.errors import BadInput, Refused
from remanence.core.ids import Ids
from remanence.data import Request, Task
from remanence.learn.s3t import _path
from remanence.life.life import Life
from remanence.models import mlp
from tests.life.helpers import FAST, again, stream, tree

LEARNER = {"s3t": {"shards": 2, "slices": 3, "sequences": 2, "rank": 2}}
TASKS = list(stream())[:3]


def network(seed):
    return mlp(64, [12, 12, 12], seed=seed)


def without(task, ids):
    return Task(task.train.without(ids), task.test, task.classes, task.names, task.id)


def life(home=None, tasks=TASKS, **options):
    made = Life(network, home=home, name="small", **{"learner": LEARNER, **options})
    for task in tasks:
        made.learn(task, **FAST)
    return made


def paths(made):
    return [tree(shard) for shard in made._state.learner.trained]


@pytest.mark.fidelity(
    "forget/s3t",
    check="a life of three tasks with a request in between against one that never had the data",
    measured="every prefix that is left equal in bits; two orders of three slices: 5 and 4 of 6 prefixes of the touched shards switched off",
    paper="exact by construction",
    differs="a dead shard stays silent until the life is lived again",
)
def test_what_is_left_equals_a_life_that_never_had_them(tmp_path):
    made = life(tmp_path / "a", TASKS[:2])
    cells = list(made._state.learner.book.cells)
    gone = Ids(cells[1].array[:2]) | Ids(cells[9].array[:1])  # task 0, shard 0, slice 1; task 1, shard 1, slice 0
    receipt = made.forget(Request(ids=gone), by="s3t", verify={"retrain": {"seeds": 1}})
    assert receipt.status == "done" and receipt.states["learn/s3t"] == "deleted" and receipt.evidence
    made.learn(TASKS[2], **FAST)
    never = life(tmp_path / "b", [without(task, gone) for task in TASKS])
    lost = {0: 1, 3: 0}
    for at, (left, whole) in enumerate(zip(paths(made), paths(never), strict=True)):
        assert left == {key: value for key, value in whole.items() if lost.get(at) not in _path(key)}
    assert [len(left) for left in paths(made)] == [1, 6, 6, 2, 6, 6]
    rows = made.trace(gone)
    assert {row.state for row in rows} == {"deleted"} and "learn/s3t" in {row.holder for row in rows}
    digest, kept = made.content_digest(), paths(made)
    made.close()
    resumed = again(tmp_path / "a", model=network)
    assert resumed.content_digest() == digest and paths(resumed) == kept
    relived = resumed.forget(Request(ids=Ids(cells[4].array[:1])), by="retrain")
    assert relived.status == "done" and [len(left) for left in paths(resumed)] == [6] * 6
    resumed.close()
    never.close()


def test_what_would_leave_nothing_is_refused_before_anything_moves():
    made = life(tasks=TASKS[:1])
    before = paths(made)
    with pytest.raises(BadInput, match="ask by='retrain'"):
        made.forget(Request(classes=[0]), by="s3t")
    assert paths(made) == before and {row.state for row in made.trace(TASKS[0].train.ids)} == {"holds"}
    assert made.forget(Request(classes=[0]), by="retrain").status == "done"


def test_it_is_refused_elsewhere():
    other = Life(network, name="small")
    other.learn(TASKS[0], **FAST)
    with pytest.raises(Refused, match="works through the learner 's3t'"):
        other.forget(Request(classes=[0]), by="s3t")
    sharded = Life(network, name="small", learner="sisa")
    sharded.learn(TASKS[0], **FAST)
    with pytest.raises(Refused, match="this life learns with sisa"):
        sharded.forget(Request(classes=[0]), by="s3t")
