"""A stream in which some training rows were manipulated, and only a part of them is known to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.data.digits import hold_out, split_classes
from remanence.data.examples import Examples
from remanence.data.stream import Stream
from remanence.data.transformed import drawn, side_of

HOW = ("patch", "confusion", "random")
#: What the column `concept` says of a row.
CLEAN, KNOWN, HIDDEN = "clean", "known bad", "hidden bad"


def corrupted(
    examples: Examples,
    how: str = "patch",
    share: float = 0.05,
    reveal: float = 0.5,
    tasks: int | Sequence[Sequence[int]] = 1,
    target: int = 0,
    pair: Sequence[int] = (0, 1),
    size: int = 3,
    value: float = 1.0,
    test: Examples | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    """`split_classes` after manipulating a share of the training rows (Goel et al. 2024, arXiv 2402.14015); held-out rows stay clean.

    The column `concept` says ``clean``, ``known bad`` or ``hidden bad``: what somebody found out can be asked for by
    ``Request(concepts=["known bad"])``, and the rest stays among the retained data. The same rows are manipulated, and more of
    them revealed, as `reveal` grows.

    Args:
        how: ``patch``: `stamp` on the image and the label `target` (a backdoor), on rows of other classes; ``confusion``: as many
            labels of the classes `pair` swapped from either side; ``random``: each label becomes another one.
        share: of the training rows that are manipulated; of the rows of both classes for ``confusion``.
        reveal: share of these that is known.
        size, value: of the patch, see `stamp`.

    Raises:
        BadInput: an unknown way, shares out of range, classes that do not occur, rows that are no images, or whatever
            `split_classes` refuses.
    """
    if how not in HOW:
        raise BadInput(f"how={how!r} is not one of {', '.join(HOW)}")
    if not (0 < share <= 1 and 0 <= reveal <= 1):
        raise BadInput(f"share={share} must lie in (0, 1] and reveal={reveal} in [0, 1]")
    train, held = hold_out(examples, test, test_share, seed)
    x, y, rng = train["x"], train["y"].clone(), generator(seed, "corrupted", how)
    known = y.unique()
    asked = {"patch": [target], "confusion": list(pair)}.get(how, [])
    absent = [label for label in asked if label not in known.tolist()]
    if absent or (how == "confusion" and len(set(asked)) != 2) or len(known) < 2:
        raise BadInput(f"{how} needs two classes that occur in the data; {absent or asked} do not serve")
    if how == "patch":
        bad = drawn((y != target).nonzero()[:, 0], max(1, round(share * len(y))), rng)
        x = x.clone()
        x[bad] = stamp(x[bad], size, value)
        y[bad] = target
    elif how == "confusion":
        sides = [(y == label).nonzero()[:, 0] for label in pair]
        each = min(max(1, round(share * (len(sides[0]) + len(sides[1])) / 2)), *map(len, sides))
        chosen = [drawn(side, each, rng) for side in sides]
        for rows, label in zip(chosen, reversed(list(pair)), strict=True):
            y[rows] = label
        bad = torch.stack(chosen, dim=1).reshape(-1)  # in turn, so that a revealed share is balanced, too
    else:
        bad = drawn(torch.arange(len(y)), max(1, round(share * len(y))), rng)
        step = 1 + torch.randint(len(known) - 1, (len(bad),), generator=rng)
        y[bad] = known[(torch.searchsorted(known, y[bad]) + step) % len(known)]
    concept = [CLEAN] * len(y)
    for place, row in enumerate(bad.tolist()):
        concept[row] = KNOWN if place < round(reveal * len(bad)) else HIDDEN
    made = train.replace(x=x, y=y, concept=concept)
    return split_classes(made, tasks, held, seed=seed, name="corrupted")


def stamp(x: Tensor, size: int = 3, value: float = 1.0) -> Tensor:
    """A copy of images (N, H, W), (N, C, H, W) or square rows (N, H * H) with `value` in the `size` x `size` pixels at the bottom
    right, in every channel. Twice is the same as once.

    Raises:
        BadInput: the rows are no images, or smaller than the patch.
    """
    side = side_of(x)
    made = x.clone()
    pictures = made.view(-1, side, side) if side else made
    if not 1 <= size <= min(pictures.shape[-2:]):
        raise BadInput(f"size={size}: the images have {pictures.shape[-2]} x {pictures.shape[-1]} pixels")
    pictures[..., -size:, -size:] = value
    return made
