"""Streams in which classes come back: borders blurred at random, classes drawn again and again, old tasks rehearsed.

A row that comes again is the same record and keeps its id, so a request for it means every time it came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.data.digits import hold_out, split_classes
from remanence.data.examples import Examples, cat
from remanence.data.stream import Stream, Task
from remanence.data.transformed import drawn


def si_blurry(
    examples: Examples,
    tasks: int = 5,
    disjoint: float = 0.5,
    share: float = 0.1,
    test: Examples | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    """A class-incremental stream with stochastic borders: some classes belong to one task alone, the others are blurred over all;
    each row is learned exactly once (the Si-Blurry setting of Moon et al. 2023, arXiv 2308.09303).

    Classes in random order; the first ``round(disjoint * C)`` are disjoint. Either kind is cut at random places into `tasks` groups,
    so tasks have any number of classes. Of all rows of blurry classes ``round(share * n)`` are pooled, shuffled, and dealt to the
    tasks in numbers that random cuts say. A task to which nothing falls is left out, so there may be fewer than `tasks`. The test
    rows of a class stand in the task that learns most of it, in the first of these if there are several.

    Deviations from the published sampler: there, a task gives as many rows to the pool as it gets back, from its front, and all it
    has where that is less, which leaves a part unblurred at a share of 1; and remainders of classes that `tasks` does not divide are
    dropped. Here the pool is a sample of all blurry rows, and no class is dropped.

    Args:
        disjoint: share of the classes that come in one task only.
        share: share of the rows of the other classes that leave their task.

    Raises:
        BadInput: no integer labels, fewer than 1 task, or shares out of [0, 1].
    """
    if isinstance(tasks, bool) or tasks < 1 or not 0 <= disjoint <= 1 or not 0 <= share <= 1:
        raise BadInput(f"tasks={tasks} must be at least 1, disjoint={disjoint} and share={share} must lie in [0, 1]")
    known, pool, held = _parts(examples, test, test_share, seed)
    rng = generator(seed, "si-blurry")
    order = known[torch.randperm(len(known), generator=rng)]
    first = round(disjoint * len(known))
    home = torch.empty(len(known), dtype=torch.int64)  # the task of each class, in the order of the labels
    for kind in (order[:first], order[first:]):
        home[torch.searchsorted(known, kind)] = _dealt(len(kind), tasks, rng)
    place = home[torch.searchsorted(known, pool["y"])]
    loose = torch.isin(pool["y"], order[first:]).nonzero()[:, 0]
    loose = drawn(loose, round(share * len(loose)), rng)
    place[loose] = _dealt(len(loose), tasks, rng)
    counts = torch.stack([((pool["y"] == c)[:, None] & (place[:, None] == torch.arange(tasks))).sum(0) for c in known])
    where = counts.argmax(1)[torch.searchsorted(known, held["y"])]
    kept = [k for k in range(tasks) if bool((place == k).any())]
    made = [
        _task(pool.select((place == k).nonzero()[:, 0]), held.select((where == k).nonzero()[:, 0]), number)
        for number, k in enumerate(kept)
    ]
    return Stream(tuple(made), "class", borders=False, name="si-blurry")


def recurring(
    examples: Examples,
    tasks: int = 100,
    classes: int = 2,
    skew: float = 0.0,
    reduction: float = 1.0,
    test: Examples | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    """Many short tasks, each with all training rows of a few classes drawn anew, so that every class comes back now and then (SCoLe,
    Lesort et al. 2023, arXiv 2207.04543). What is learned is measured on all test rows in every task, as there: the classes that
    have not come yet count as wrong, so the figure rises as knowledge accumulates.

        p_c ~ (1 + c)^-skew      c = 0, 1, ... in the order of the labels; after a draw  p_c <- p_c / reduction  of those drawn

    The sequence comes from `seed` alone, and a longer stream begins as a shorter one does. One epoch a task is the paper's; what it
    calls group masking is a learner's business. Measuring T tasks after each of T events takes T^2 evaluations of the test rows:
    give a small `test` where T is large. Deviations: no rows are held out for validation; the form of the paper's skewed
    distribution was not seen, this one is Zipf's.

    Args:
        classes: in a task; at most as many as there are.
        skew: 0 to 20; at 0 all classes come equally often.
        reduction: 1 to 1e6; above 1 a class that came is less likely to come again soon.

    Raises:
        BadInput: no integer labels, or a knob out of its range.
    """
    known, pool, held = _parts(examples, test, test_share, seed)
    if isinstance(tasks, bool) or tasks < 1 or not 1 <= classes <= len(known):
        raise BadInput(f"tasks={tasks} must be at least 1, and classes={classes} at least 1 and at most {len(known)}")
    if not (0 <= skew <= 20 and 1 <= reduction <= 1e6):  # beyond, a chance would be rounded to 0
        raise BadInput(f"skew={skew} must lie in [0, 20] and reduction={reduction} in [1, 1e6]")
    rng = generator(seed, "recurring")
    chance = torch.arange(1, len(known) + 1, dtype=torch.float64) ** -skew
    made = []
    for number in range(tasks):
        chosen = torch.multinomial(chance, classes, generator=rng).sort().values
        chance[chosen] /= reduction
        chance /= chance.sum()
        rows = torch.isin(pool["y"], known[chosen]).nonzero()[:, 0]
        made.append(_task(pool.select(rows), held, number))
    return Stream(tuple(made), "class", name="recurring")


def power_law(
    examples: Examples,
    tasks: int | Sequence[Sequence[int]] = 5,
    share: float = 0.3,
    law: str = "power",
    rate: float = 1.0,
    test: Examples | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    """`split_classes` in which old tasks come back, the longer ago the less (Gandhi et al. 2024, arXiv 2401.10393).

        r_kj = share * n_k * w(k - j) / sum_{i<k} w(k - i)      rows of task j < k that task k learns beside its own n_k
        w(t) = t^-rate  (power)   or   exp(-rate * t)  (exponential)

    Whole numbers by largest remainders, at most all rows of a task; drawn without replacement within a task and anew for each. The
    total does not depend on law and rate, so schedules can be compared; a rate of 0 is uniform under both, a great one rehearses the
    last task only, ``share=0`` is `split_classes`. Test rows stand in the task that brings their class.

    This is rehearsal with all old data at hand: a lower bound for methods that do better than an environment in which things come
    back by themselves, and no method without memory. Reconstructed from the abstract: exponent and amounts of the paper were not
    seen. Deviation: age counts from when a task was new, and seeing it again does not make it younger.

    Args:
        share: rehearsed rows over new rows, at least 0.
        law: ``power`` or ``exponential``.
        rate: at least 0.

    Raises:
        BadInput: as in `split_classes`; an unknown law; share or rate out of range.
    """
    if law not in ("power", "exponential"):
        raise BadInput(f"law={law!r} is not one of power, exponential")
    if not (0 <= share < math.inf and 0 <= rate < math.inf):
        raise BadInput(f"share={share} and rate={rate} must be finite and at least 0")
    clear = split_classes(examples, tasks, test, test_share, seed, "power-law")
    made = []
    for task in clear:
        old = [each.train for each in clear.tasks[: task.id]]
        ages = [task.id - j for j in range(len(old))]
        # relative to the youngest, so that a great rate leaves it its weight
        weights = [age**-rate if law == "power" else math.exp(-rate * (age - 1)) for age in ages]
        counts = apportioned(round(share * len(task.train)), weights, [len(train) for train in old])
        again = [
            train.select(drawn(torch.arange(len(train)), n, generator(seed, "power-law", task.id, j)).sort().values)
            for j, (train, n) in enumerate(zip(old, counts, strict=True))
            if n
        ]
        made.append(_task(cat([task.train, *again]), task.test, task.id))
    return Stream(tuple(made), "class", name="power-law")


def apportioned(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """`total` as whole numbers in proportion to `weights`, none above its `most`, by largest remainders (the first of equal ones);
    what a full one cannot take goes to the others. Less than `total` where all that have a weight are full."""
    counts = [0] * len(weights)
    open_ = [i for i, weight in enumerate(weights) if weight > 0]
    rest = total
    while open_:
        whole = sum(weights[i] for i in open_)
        quota = {i: rest * weights[i] / whole for i in open_}
        full = [i for i in open_ if quota[i] >= most[i]]
        if not full:
            for i in open_:
                counts[i] = int(quota[i])
            left = rest - sum(counts[i] for i in open_)
            for i in sorted(open_, key=lambda i: (counts[i] - quota[i], i))[:left]:
                counts[i] += 1
            break
        for i in full:
            counts[i] = most[i]
            rest -= most[i]
            open_.remove(i)
    return counts


def _dealt(count: int, tasks: int, rng: torch.Generator) -> Tensor:
    """The task of each of `count` things in order: `tasks` runs, cut at random places."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    cuts = torch.randint(count, (tasks - 1,), generator=rng).sort().values
    return torch.searchsorted(cuts, torch.arange(count), right=True)


def _parts(examples: Examples, test: Examples | None, share: float, seed: int) -> tuple[Tensor, Examples, Examples]:
    """The labels, ascending; training rows; test rows of these labels."""
    y = examples["y"]
    if y.is_floating_point() or y.dim() != 1 or not len(y):
        raise BadInput(f"this stream needs integer labels y of shape (N,), not {y.dtype} {tuple(y.shape)}")
    known = y.unique()
    train, held = hold_out(examples, test, share, seed)
    return known, train, held.select(torch.isin(held["y"], known).nonzero()[:, 0])


def _task(train: Examples, test: Examples, number: int) -> Task:
    known = tuple(int(c) for c in train["y"].unique())
    return Task(train, test, known, tuple(map(str, known)), number)
