"""Tasks and streams."""

from __future__ import annotations

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.data import Examples, Stream, split_classes
from remanence.data.stream import groups_of


def labelled(n: int = 60, classes: int = 6) -> Examples:
    return Examples(
        {"x": torch.arange(float(n))[:, None], "y": torch.arange(n) % classes}, "labelled", ids=range(100, 100 + n)
    )


def test_every_row_lies_in_one_task_on_one_side() -> None:
    stream = split_classes(labelled(), tasks=3, test_share=0.3)
    everything = Ids()
    for number, task in enumerate(stream):
        assert task.classes == (2 * number, 2 * number + 1) and task.names == (str(2 * number), str(2 * number + 1))
        assert task.id == number and set(task.train["y"].tolist()) == set(task.test["y"].tolist()) == set(task.classes)
        for side, rows in ((task.train, 7), (task.test, 3)):  # 30 % of each class's ten rows
            assert side["y"].bincount(minlength=6)[list(task.classes)].tolist() == [rows, rows]
            assert everything.isdisjoint(side.ids)
            everything = everything | side.ids
            assert torch.equal(side["x"][:, 0].long() + 100, side.id)  # rows keep their content
    assert everything == labelled().ids and len(stream) == 3 and stream.scenario == "class" and stream.borders


def test_the_held_out_rows_are_addressed_by_seed_and_class_alone() -> None:
    first, again = split_classes(labelled(), 3, seed=1), split_classes(labelled(), 2, seed=1)
    tests = [
        {int(i) for task in stream for i in task.test.id}
        for stream in (first, again, split_classes(labelled(), 3, seed=2))
    ]
    assert tests[0] == tests[1] != tests[2]
    fewer = labelled().select((labelled()["y"] != 0).nonzero()[:, 0])
    kept = {int(i) for task in split_classes(fewer, [[1, 2, 3, 4, 5]], seed=1) for i in task.test.id}
    assert kept == {i for i in tests[0] if (i - 100) % 6}


def test_named_groups_and_given_test_rows() -> None:
    test = labelled(12)
    stream = split_classes(labelled(), [[5, 0], [3]], test=test, name="mine")
    assert [task.classes for task in stream] == [(5, 0), (3,)] and stream.name == "mine"
    assert stream[0].train.ids == labelled().select((labelled()["y"] % 5 == 0).nonzero()[:, 0]).ids
    assert stream[1].test.id.tolist() == [103, 109] and stream[-1] is stream[1]


def test_fingerprints_tell_streams_apart() -> None:
    prints = {split_classes(labelled(), n, seed=s).fingerprint() for n in (2, 3) for s in (0, 1)}
    assert len(prints) == 4 and split_classes(labelled(), 2).fingerprint() in prints


def test_wrong_cuts_are_refused() -> None:
    assert groups_of([4, 5, 6, 7], 2) == [[4, 5], [6, 7]]
    for tasks, message in ((4, r"tasks may be \[1, 2, 3, 6\]"), (0, "equal tasks"), ([[0, 9]], r"unknown: \[9\]"), ([[0], [0]], "each class once"),
                           ([[0], []], "needs classes")):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            split_classes(labelled(), tasks)
    for share in (0.0, 1.0):
        with pytest.raises(BadInput, match="between 0 and 1"):
            split_classes(labelled(), 3, test_share=share)
    with pytest.raises(BadInput, match="class 0 has 1 rows"):
        split_classes(labelled(6), 3)
    with pytest.raises(BadInput, match="integer labels"):
        split_classes(labelled().replace(y=torch.rand(60)), 3)
    stream = split_classes(labelled(), 3)
    for index in (3, -4):
        with pytest.raises(BadInput, match="tasks 0 to 2"):
            stream[index]
    with pytest.raises(BadInput, match="scenario"):
        Stream((), "klass")
