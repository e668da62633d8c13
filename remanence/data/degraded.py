"""Streams made worse on purpose: classes of unequal size, wrong labels. Test rows stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.rng import generator
from remanence.data.examples import Examples
from remanence.data.stream import Stream, Task
from remanence.data.transformed import drawn


def long_tail(stream: Stream, ratio: float = 0.01, shuffled: bool = False, seed: int = 0) -> Stream:
    """The same stream with fewer and fewer training rows from class to class (Cui et al. 2019, arXiv 1901.05555).

        n_c = n_max * ratio^(c / (C - 1))      c = 0, 1, ..., C - 1 in the order of the labels; at least 1, at most all

    n_max is the size of the largest class. A row that is dropped is dropped from every task in which it came. A task of which
    nothing is left, which a recurring stream may have, is left out.

    Args:
        ratio: smallest over largest class, above 0 and at most 1.
        shuffled: the classes in an order drawn by `seed` instead, so that size does not tell when a class comes.

    Raises:
        BadInput: no integer labels, or a ratio out of its range.
    """
    if not 0 < ratio <= 1:
        raise BadInput(f"ratio={ratio} must lie above 0 and be at most 1")
    ids, y, _ = _records(stream)
    known, counts = y.unique(return_counts=True)
    order = torch.randperm(len(known), generator=generator(seed, "long-tail")) if shuffled else torch.arange(len(known))
    kept = []
    for rank, c in enumerate(order.tolist()):
        wanted = max(1, round(int(counts.max()) * ratio ** (rank / max(1, len(known) - 1))))
        rows = (y == known[c]).nonzero()[:, 0]
        kept.append(ids[drawn(rows, wanted, generator(seed, "long-tail", int(known[c])))])
    left = Ids(torch.cat(kept).numpy())
    made = [_with(task, task.train.only(left)) for task in stream]
    return Stream(tuple(t for t in made if len(t.train)), stream.scenario, stream.borders, f"long-tail {stream.name}")


def label_noise(stream: Stream, share: float = 0.2, how: str = "symmetric", seed: int = 0) -> Stream:
    """The same stream with wrong labels on a share of the training rows of every class and task.

    ``round(share * n)`` of the n rows that a class has in the task in which they first come get another label of that task:
    ``symmetric``: any, equally likely; ``pair``: the next one in the order of the labels, the first after the last. So a task keeps
    its classes, and who learns it is not told of others. A row that comes again has the same wrong label again. The column `clean`
    holds the true labels; batches carry it, no method may look at it. The same rows are wrong, and more of them, as `share` grows.

    Unlike ``corrupted`` with ``how="random"``, it can be laid over any stream, and does not move rows between tasks. After the two
    kinds of noise of Han et al. 2018, arXiv 1804.06872, there over all classes of one data set.

    Args:
        share: at least 0 and below 1.

    Raises:
        BadInput: no integer labels, a share out of its range, an unknown kind, or a task of one class.
    """
    if how not in ("symmetric", "pair"):
        raise BadInput(f"how={how!r} is not one of symmetric, pair")
    if not 0 <= share < 1:
        raise BadInput(f"share={share} must be at least 0 and below 1")
    ids, y, first = _records(stream)
    noisy = y.clone()
    for number in first.unique().tolist():
        mine = first == number
        known = stream[number].train["y"].unique()
        if len(known) < 2 and share:
            raise BadInput(f"task {number} has one class only, so that no label of it can be wrong")
        for at, c in enumerate(known.tolist()):
            rng = generator(seed, "label-noise", number, c)
            rows = (mine & (y == c)).nonzero()[:, 0]  # none where all of them came before
            rows = rows[torch.randperm(len(rows), generator=rng)]
            step = 1 if how == "pair" else 1 + torch.randint(max(1, len(known) - 1), (len(rows),), generator=rng)
            wrong = known[(at + step * torch.ones_like(rows)) % len(known)]
            bad = round(share * len(rows))
            noisy[rows[:bad]] = wrong[:bad]
    made = []
    for task in stream:
        rows = torch.searchsorted(ids, task.train.id)
        made.append(_with(task, task.train.replace(y=noisy[rows], clean=task.train["y"])))
    return Stream(tuple(made), stream.scenario, stream.borders, f"label-noise {stream.name}")


def _records(stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """Every training record once, by ascending id: ids, labels, and the number of the task in which it first comes.

    Raises:
        BadInput: no labels, or an id that stands for several of them.
    """
    for task in stream:
        y = task.train["y"]
        if y.is_floating_point() or y.dim() != 1:
            raise BadInput(f"{stream.name} needs integer labels y of shape (N,), not {y.dtype} {tuple(y.shape)}")
    ids = torch.cat([task.train.id for task in stream])
    y = torch.cat([task.train["y"] for task in stream])
    number = torch.repeat_interleave(torch.arange(len(stream)), torch.tensor([len(task.train) for task in stream]))
    order = ids.argsort(stable=True)
    ids, y, number = ids[order], y[order], number[order]
    new = torch.ones(len(ids), dtype=torch.bool)
    new[1:] = ids[1:] != ids[:-1]
    if bool((y != y[new][new.cumsum(0) - 1]).any()):
        raise BadInput(f"{stream.name} gives one id several labels; every record needs one label")
    return ids[new], y[new], number[new]


def _with(task: Task, train: Examples) -> Task:
    """The task with other training rows; a label's word stays."""
    words = dict(zip(task.classes, task.names, strict=True))
    known = sorted(set(train["y"].tolist()), key=lambda c: (task.classes.index(c) if c in words else len(words), c))
    return Task(train, task.test, tuple(known), tuple(words.get(c, str(c)) for c in known), task.id)
