"""Manipulated training data of which a part is known."""

from __future__ import annotations

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.data import Request, corrupted, digits, split_classes, stamp
from remanence.life.plan import parse_plan
from remanence.life.run import build_stream

CLEAN = split_classes(digits(), tasks=1)[0]


def bad(task, *words):
    return torch.tensor([said in words for said in task.train.columns["concept"]])


@pytest.mark.parametrize("shape", [(64,), (8, 8), (3, 8, 8)])
def test_a_stamp_changes_its_pixels_only_and_twice_is_once(shape):
    x = torch.rand(5, *shape) * 0.5
    before = x.clone()
    once = stamp(x, 3)
    assert torch.equal(x, before) and torch.equal(once, stamp(once, 3))
    assert int((once != x).sum()) == 5 * 9 * (3 if len(shape) == 3 else 1)
    assert (once[once != x] == 1).all()
    corner = once.reshape(5, -1, 8, 8)[..., -3:, -3:]
    assert (corner == 1).all()


def test_a_backdoor_changes_what_it_says_and_nothing_else():
    task = corrupted(digits(), share=0.05, reveal=0.5, size=2)[0]
    rows = bad(task, "known bad", "hidden bad")
    assert task.test.fingerprint() == CLEAN.test.fingerprint() and torch.equal(task.train.id, CLEAN.train.id)
    assert int(rows.sum()) == round(0.05 * len(task.train)) == 67
    assert int(bad(task, "known bad").sum()) == round(0.5 * 67)
    assert torch.equal(task.train["x"][~rows], CLEAN.train["x"][~rows])
    assert torch.equal(task.train["y"][~rows], CLEAN.train["y"][~rows])
    assert (CLEAN.train["y"][rows] != 0).all() and (task.train["y"][rows] == 0).all()
    assert torch.equal(task.train["x"][rows], stamp(CLEAN.train["x"][rows], 2))


def test_confusion_swaps_as_many_from_either_side_known_and_hidden():
    task = corrupted(digits(), how="confusion", share=0.5, reveal=0.5, pair=[3, 8])[0]
    for words in (["known bad"], ["known bad", "hidden bad"]):
        rows = bad(task, *words)
        true, said = CLEAN.train["y"][rows], task.train["y"][rows]
        assert torch.equal(said, 11 - true) and abs(int((true == 3).sum()) - int((true == 8).sum())) <= 1
    assert torch.equal(task.train["y"].bincount(), CLEAN.train["y"].bincount())
    assert torch.equal(task.train["x"], CLEAN.train["x"])


def test_random_labels_are_never_the_true_ones():
    task = corrupted(digits(), how="random", share=0.3)[0]
    rows = bad(task, "known bad", "hidden bad")
    assert (task.train["y"][rows] != CLEAN.train["y"][rows]).all()
    assert torch.equal(task.train["y"][~rows], CLEAN.train["y"][~rows])


def test_more_is_revealed_of_the_same_rows():
    known = []
    for reveal in (0.0, 0.2, 0.5, 1.0):
        task = corrupted(digits(), reveal=reveal)[0]
        known.append(Ids(task.train.id[bad(task, "known bad")].numpy()))
        whole = Ids(task.train.id[bad(task, "known bad", "hidden bad")].numpy())
    assert not known[0] and known[1] <= known[2] <= known[3] == whole and known[1] != known[2]
    found, unseen = Request(concepts=["known bad"]).resolve([corrupted(digits(), reveal=0.2)[0].train])
    assert found == known[1] and not unseen


def test_a_plan_names_it_and_wrong_values_are_refused():
    text = "model: mlp\nstream: {corrupted: {source: digits, how: confusion, share: 0.2, tasks: 2}}\nevents: [{learn: 0}]\n"
    made = build_stream(parse_plan(text, "plan"))
    assert made.fingerprint() == corrupted(digits(), "confusion", 0.2, tasks=2).fingerprint()
    for wrong, message in (
        ({"how": "patsch"}, "patch, confusion, random"),
        ({"share": 0.0}, "share"),
        ({"reveal": 1.1}, "reveal"),
        ({"target": 12}, "12"),
        ({"how": "confusion", "pair": [3, 3]}, "two classes"),
        ({"size": 9}, "8 x 8"),
    ):
        with pytest.raises(BadInput, match=message):
            corrupted(digits(), **wrong)
    with pytest.raises(BadInput, match="no images"):
        stamp(torch.rand(2, 63))
