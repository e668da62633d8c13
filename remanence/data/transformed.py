"""Streams made from one table: permuted pixels, rotated images, blurred class borders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.data.digits import hold_out, split_classes
from remanence.data.examples import Examples
from remanence.data.stream import Stream, Task

#: The ids of task k's copies are k * SHIFT + the original id.
SHIFT = 2**32


def permuted(
    examples: Examples, tasks: int = 5, test: Examples | None = None, test_share: float = 0.25, seed: int = 0
) -> Stream:
    """A domain-incremental stream: every task has all rows, the values of `x` in an order of its own; task 0 is as it was
    (Goodfellow et al. 2013, arXiv 1312.6211).

    A transformed copy is another record: in task k the id of row i is ``k * 2**32 + i``, and the column `original` holds i, so a
    request that means a person's every copy must name all of them. Copies are in memory.

    Args:
        tasks: how many, at least 1; the permutation of each comes from `seed` and its number alone.
        test: held-out rows; None takes `test_share` of every class, the same rows in every task.

    Raises:
        BadInput: no tasks, or ids of 2**32 or more.
    """

    def change(x: Tensor, number: int) -> Tensor:
        flat = x.reshape(len(x), -1)
        return flat[:, torch.randperm(flat.shape[1], generator=generator(seed, "permuted", number))].reshape(x.shape)

    return _copies(examples, _whole(tasks), change, hold_out(examples, test, test_share, seed), "permuted")


def rotated(
    examples: Examples,
    tasks: int | Sequence[float] = 5,
    test: Examples | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    """A domain-incremental stream: every task has all images, turned counter-clockwise by an angle of its own (bilinear, corners that
    come from outside are 0). Ids and `original` as in `permuted`.

    Args:
        examples: images (N, H, W) or (N, C, H, W), or rows (N, H * H) of square ones.
        tasks: how many; task k is turned by ``k * 180 / tasks`` degrees. Or the angles in degrees; an angle of 0 leaves the images as
            they are.

    Raises:
        BadInput: no tasks, angles that are not finite, inputs that are no images, or ids of 2**32 or more.
    """
    angles = [180 * k / tasks for k in range(_whole(tasks))] if isinstance(tasks, int) else [float(a) for a in tasks]
    if not angles or not all(map(math.isfinite, angles)):
        raise BadInput(f"tasks={tasks!r} must be a number of tasks, or finite angles in degrees")
    shape, side = tuple(examples["x"].shape[1:]), side_of(examples["x"])

    def change(x: Tensor, number: int) -> Tensor:
        from scipy.ndimage import rotate

        if not angles[number] or not len(x):
            return x
        pictures = x.reshape(-1, side, side) if side else x.reshape(-1, *shape[-2:])
        turned = np.stack([rotate(picture, angles[number], reshape=False, order=1) for picture in pictures.numpy()])
        return torch.from_numpy(turned).reshape(x.shape)

    return _copies(examples, len(angles), change, hold_out(examples, test, test_share, seed), "rotated")


def side_of(x: Tensor) -> int:
    """The side of square images that stand as rows (N, H * H); 0 where `x` is (N, H, W) or (N, C, H, W).

    Raises:
        BadInput: the rows are no images.
    """
    shape = tuple(x.shape[1:])
    side = math.isqrt(shape[0]) if len(shape) == 1 else 0
    if not (len(shape) in (2, 3) or (side and side * side == shape[0])):
        raise BadInput(f"x has rows of shape {shape}, which are no images; give (H, W), (C, H, W) or square rows")
    return side


def _whole(tasks: int) -> int:
    if isinstance(tasks, bool) or tasks < 1:
        raise BadInput(f"tasks={tasks}: a stream has at least 1 task")
    return tasks


def _copies(
    examples: Examples, count: int, change: Callable[[Tensor, int], Tensor], parts: tuple[Examples, Examples], name: str
) -> Stream:
    """One task for each change of `x`; the first keeps its ids."""
    for part in parts:
        if len(part) and int(part.id.max()) >= SHIFT:
            raise BadInput(
                f"{name} copies need ids below 2**32 to give each copy an id of its own; number the rows anew"
            )
    known = tuple(int(c) for c in parts[0]["y"].unique()) if _labelled(parts[0]) else ()
    made = []
    for number in range(count):
        train, test = (
            Examples(
                {
                    **part.columns,
                    "x": change(part["x"], number) if name == "rotated" or number else part["x"],
                    "original": part.id,
                },
                part.source,
                part.id + number * SHIFT,
                part.views,
                positional=part.positional,
            )
            for part in parts
        )
        made.append(Task(train, test, known, tuple(map(str, known)), number))
    return Stream(tuple(made), "domain", name=name)


def _labelled(examples: Examples) -> bool:
    y = examples.columns.get("y")
    return isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point()


def blurry(
    examples: Examples,
    tasks: int | Sequence[Sequence[int]] = 5,
    share: float = 0.1,
    test: Examples | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    """`split_classes` with blurred borders: of every task's training rows the share `share` comes from the classes of other tasks; each
    row is still learned exactly once (the blurry setting of Bang et al. 2021, arXiv 2103.17230, with fixed shares).

    Each task gives away ``round(share * n)`` of its n rows and gets as many back, drawn by `seed` from what all the others give. Only
    where one task would give more than all others together does it give less. Test rows stay with their class's task.

    Args:
        share: 0 (`split_classes`) to below 1; at ``1 - 1 / tasks`` all tasks are alike.

    Raises:
        BadInput: as in `split_classes`; fewer than 2 tasks; a share out of its range.
    """
    if not 0 <= share < 1:
        raise BadInput(f"share={share} must be at least 0 and below 1")
    clear = split_classes(examples, tasks, test, test_share, seed, "blurry")
    if len(clear) < 2:
        raise BadInput("a blurry stream needs at least 2 tasks to mix")
    pool, _ = hold_out(examples, test, test_share, seed)
    owner = torch.full((len(pool),), -1)
    for task in clear:
        owner[torch.isin(pool["y"], torch.tensor(task.classes))] = task.id
    counts = [round(share * len(task.train)) for task in clear]
    most = max(range(len(counts)), key=counts.__getitem__)
    counts[most] = min(counts[most], sum(counts) - counts[most])
    rng = generator(seed, "blurry")
    given = torch.cat([drawn((owner == k).nonzero()[:, 0], n, rng) for k, n in enumerate(counts)])
    slots = owner[given]  # as many places in every task as it gives rows away
    given = given[torch.randperm(len(given), generator=rng)]
    for k in range(len(clear)):
        # Rows that came home change places with rows of others that lie in others: at least as many, as no task gives over half.
        home = ((owner[given] == k) & (slots == k)).nonzero()[:, 0]
        away = drawn(((owner[given] != k) & (slots != k)).nonzero()[:, 0], len(home), rng)
        given[home], given[away] = given[away], given[home]
    place = owner.clone()
    place[given] = slots
    made = []
    for task in clear:
        train = pool.select((place == task.id).nonzero()[:, 0])
        known = tuple(int(c) for c in train["y"].unique())
        made.append(Task(train, task.test, known, tuple(map(str, known)), task.id))
    return Stream(tuple(made), "class", name="blurry")


def drawn(rows: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` of `rows`, at most all, in random order."""
    return rows[torch.randperm(len(rows), generator=rng)[:count]]
