"""A stream in which every task brings new instances of the same classes."""

from __future__ import annotations

import torch

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.data.digits import hold_out
from remanence.data.examples import Examples
from remanence.data.stream import Stream, Task
from remanence.data.transformed import drawn


def instance_incremental(
    examples: Examples, tasks: int = 5, test: Examples | None = None, test_share: float = 0.25, seed: int = 0
) -> Stream:
    """Every task has all classes and rows of its own: the training rows of each class are dealt to the tasks at random, one after the
    other (scenario ``domain``, the new instances of Lomonaco and Maltoni 2017, arXiv 1705.03550). Every task is measured on all test
    rows, as there.

    Tasks differ in size by at most 1, and so do the rows of a class. Rows are alike but for chance, so little is forgotten: what it
    shows is what a method loses by never seeing all rows at once. Where instances differ in kind, as films of an object do, take a
    stream that knows the kinds, such as `core50`.

    Args:
        tasks: how many, at least 1.
        test: held-out rows; None takes `test_share` of every class, drawn by `seed`.

    Raises:
        BadInput: no integer labels, fewer than 1 task, a class with fewer training rows than tasks, or too few to be split.
    """
    y = examples["y"]
    if y.is_floating_point() or y.dim() != 1:
        raise BadInput(f"this stream needs integer labels y of shape (N,), not {y.dtype} {tuple(y.shape)}")
    if isinstance(tasks, bool) or tasks < 1:
        raise BadInput(f"tasks={tasks}: a stream has at least 1 task")
    pool, held = hold_out(examples, test, test_share, seed)
    known, counts = pool["y"].unique(return_counts=True)
    if not len(known) or int(counts.min()) < tasks:
        few = f"class {int(known[counts.argmin()])} has {int(counts.min())}" if len(known) else "there are no"
        raise BadInput(f"{tasks} tasks need {tasks} training rows of every class, but {few} rows; ask for fewer tasks")
    dealt = torch.cat(
        [
            drawn(rows, len(rows), generator(seed, "instance-incremental", label))
            for label in known.tolist()
            for rows in [(pool["y"] == label).nonzero()[:, 0]]
        ]
    )
    classes = tuple(known.tolist())
    made = [
        Task(pool.select(dealt[number::tasks].sort().values), held, classes, tuple(map(str, classes)), number)
        for number in range(tasks)
    ]
    return Stream(tuple(made), "domain", name="instance-incremental")
