"""Streams of a few examples at a time, asked about their classes or about the very same images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.data.examples import Examples
from remanence.data.stream import Stream, Task
from remanence.data.transformed import drawn, side_of

CORRUPT = ("noise", "circle", "box")


def few_shot(
    examples: Examples,
    sets: int = 5,
    interval: int = 1,
    ways: int = 5,
    shots: int = 1,
    targets: int = 5,
    overwrite: bool = False,
    instance: bool = False,
    corrupt: str = "noise",
    level: float = 0.0,
    seed: int = 0,
) -> Stream:
    """Small support sets, each a task: one episode of continual few-shot learning (Antoniou et al. 2020, arXiv 2004.11967), or of its
    extension to specific instances (Kowadlo et al. 2022, arXiv 2209.07863).

        group g = 0, 1, ..., sets / interval - 1:  `ways` classes, none in two groups
        each of its `interval` sets:  `shots` new rows of each class to learn, `targets` new rows of each to be asked (the test rows)

    Class test: the n-th class of group g is label ``g * ways + n``, or n alone with `overwrite`, so that a later group adds another
    meaning to an old label. Instance test: the i-th image to be learned is label i, counted over all sets, and the test rows are the
    same images. What is asked can be corrupted, see `disturbed`; a corrupted row is still a copy of its record and keeps the id.

    The column `label` is the label in `examples`, `set` the number of the set. Classes come from one generator, the rows of a class
    from one of its own: of one seed, more sets or shots leave earlier groups their classes (where as many classes have enough rows),
    and a class its rows.

    Deviations from the released generator of instance tests: there, all classes of a set get the same `shots` labels, which is right
    for one class in a set only, and only the first class of a set is corrupted; a row of a class test may come in two sets.

    Args:
        sets: how many support sets; a multiple of `interval`.
        interval: sets in a row with the same classes.
        targets: of each class and set; only of the class test.
        corrupt: ``noise``, ``circle`` or ``box``, of the rows that are asked.
        level: share of their pixels.

    Raises:
        BadInput: no integer labels, numbers out of range, too few classes that have enough rows; or whatever `disturbed` refuses.
    """
    y = examples["y"]
    if y.is_floating_point() or y.dim() != 1:
        raise BadInput(f"few_shot needs integer labels y of shape (N,), not {y.dtype} {tuple(y.shape)}")
    if corrupt not in CORRUPT or not 0 <= level <= 1:
        raise BadInput(f"corrupt={corrupt!r} is one of {', '.join(CORRUPT)}, and level={level} lies in [0, 1]")
    if min(sets, interval, ways, shots, targets) < 1 or sets % interval:
        raise BadInput(
            f"sets={sets}, interval={interval}, ways={ways}, shots={shots}, targets={targets} must be at least 1, and sets a "
            "multiple of interval"
        )
    groups, asked = sets // interval, 0 if instance else targets
    known, counts = y.unique(return_counts=True)
    able = known[counts >= interval * (shots + asked)]
    if len(able) < ways * groups:
        raise BadInput(
            f"{groups} groups of {ways} classes need {ways * groups} classes of at least {interval * (shots + asked)} rows, of which "
            f"{examples.source} has {len(able)}; ask for fewer ways, sets, shots or targets"
        )
    words = examples.columns.get("name", y)
    chosen = drawn(able, ways * groups, generator(seed, "few-shot", "classes")).reshape(groups, ways)
    made: list[Task] = []
    for number in range(sets):
        group, turn = divmod(number, interval)
        support, target, names = [], [], []
        for label in chosen[group].tolist():
            rows = (y == label).nonzero()[:, 0]
            word = words[int(rows[0])]
            names.append(str(int(word) if isinstance(word, Tensor) else word))
            rows = drawn(rows, len(rows), generator(seed, "few-shot", "rows", label))
            support.append(rows[turn * shots : (turn + 1) * shots])
            rest = rows.flip(0)  # from the other end, so that more shots leave the targets as they are
            target.append(rest[turn * asked : (turn + 1) * asked])
        first = 0 if overwrite else group * ways
        own = torch.arange(first, first + ways)
        train = _labelled(examples, torch.cat(support), own.repeat_interleave(shots), number)
        if instance:
            own = number * ways * shots + torch.arange(ways * shots)
            train = train.replace(y=own)
            names = [f"{names[n // shots]}/{i}" for n, i in enumerate(train.id.tolist())]
        test = train if instance else _labelled(examples, torch.cat(target), own.repeat_interleave(asked), number)
        if level:
            test = test.replace(x=disturbed(test["x"], corrupt, level, generator(seed, "few-shot", corrupt, number)))
        made.append(Task(train, test, tuple(own.tolist()), tuple(names), number))
    same = not instance and (groups == 1 or overwrite)
    return Stream(tuple(made), "domain" if same else "class", name="few-shot instances" if instance else "few-shot")


def disturbed(x: Tensor, how: str, level: float, rng: torch.Generator) -> Tensor:
    """A copy of the images `x` in which ``round(level * pixels)`` pixels of each are lost, drawn anew for each image.

    ``noise``: pixels anywhere become uniform random numbers between the least and the largest value of `x`; the pixels of a lower
    level are among those of a higher one from an equal `rng`, with equal values. ``circle`` and ``box``: the pixels nearest to a random
    centre become 0; up to where it fits, the shape lies inside the image, and a box has its proportions.

    Args:
        x: (N, H, W), (N, C, H, W) or square rows (N, H * H); for ``noise`` also other rows (N, D). All channels of a pixel go together.
        level: share of the pixels, 0 to 1.

    Raises:
        BadInput: another way or share; rows that are no images, for an occluder.
    """
    if how not in CORRUPT or not 0 <= level <= 1:
        raise BadInput(f"corrupt={how!r} is one of {', '.join(CORRUPT)}, and level={level} lies in [0, 1]")
    x = x[torch.arange(len(x))]
    if not len(x):
        return x
    if how == "noise":
        channels = x.shape[1] if x.dim() == 4 else 1
        flat = x.reshape(len(x), channels, -1)
        rank = torch.rand(len(x), flat.shape[2], generator=rng)
        values = torch.rand(flat.shape, generator=rng)
        values = x.min() + (x.max() - x.min()) * values
    else:
        side = side_of(x)
        height, width = (side, side) if side else x.shape[-2:]
        flat = x.reshape(len(x), -1, height * width)
        rank, values = _far(len(x), height, width, how, level, rng), torch.zeros(())
    count = round(level * flat.shape[2])
    lost = rank.argsort(dim=1, stable=True).argsort(dim=1) < count
    return torch.where(lost[:, None], values, flat).reshape(x.shape)


def _far(count: int, height: int, width: int, how: str, level: float, rng: torch.Generator) -> Tensor:
    """(count, height * width) how far each pixel lies from the centre of an occluder of that share, which is drawn for each image."""
    size = torch.tensor([height, width], dtype=torch.float64)
    if how == "box":
        half = math.sqrt(level) * size / 2
    else:
        half = torch.full((2,), math.sqrt(level * height * width / math.pi), dtype=torch.float64).minimum(size / 2)
    centre = half + torch.rand(count, 2, generator=rng, dtype=torch.float64) * (size - 2 * half)
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double() + 0.5
    away = (place - centre[:, None]).abs()
    return (away / size).amax(2) if how == "box" else away.square().sum(2)


def _labelled(examples: Examples, rows: Tensor, y: Tensor, number: int) -> Examples:
    found = examples.select(rows)
    return found.replace(y=y, label=found["y"], set=torch.full((len(rows),), number))
