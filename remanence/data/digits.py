"""Real data that needs no network: scikit-learn's handwritten digits, and idx files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remanence.core.errors import BadInput, Corrupt
from remanence.core.rng import generator
from remanence.data.examples import Examples
from remanence.data.stream import Stream, Task, groups_of
from remanence.data.values import LIMIT, fits


def digits() -> Examples:
    """scikit-learn's 1,797 real handwritten digits: `x` (1797, 64) in [0, 1], `y` 0 to 9, ids 0 to 1796."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.data.astype(np.float32)) / 16
    return Examples({"x": x, "y": torch.from_numpy(bunch.target.astype(np.int64))}, "digits")


def split_digits(tasks: int = 5, test_share: float = 0.25, seed: int = 0) -> Stream:
    """`digits` cut into `tasks` tasks of equally many classes, in the order of the digits."""
    return split_classes(digits(), tasks=tasks, test_share=test_share, seed=seed, name="split-digits")


def split_classes(
    examples: Examples,
    tasks: int | Sequence[Sequence[int]] = 5,
    test: Examples | None = None,
    test_share: float = 0.25,
    seed: int = 0,
    name: str = "split-classes",
) -> Stream:
    """A class-incremental stream.

    Args:
        examples: rows with a label column ``y``.
        tasks: how many tasks of equally many classes, in the order of the labels; or the labels of each task.
        test: held-out rows; None takes `test_share` of every class, drawn by `seed`.

    Raises:
        BadInput: classes that cannot be cut evenly, that repeat, or that have too few rows to be split.
    """
    labels = examples["y"]
    if labels.is_floating_point() or labels.dim() != 1:
        raise BadInput(f"split_classes needs integer labels y of shape (N,), not {labels.dtype} {tuple(labels.shape)}")
    known = [int(label) for label in labels.unique()]
    groups = groups_of(known, tasks) if isinstance(tasks, int) else [[int(c) for c in group] for group in tasks]
    flat = [c for group in groups for c in group]
    unknown = sorted(set(flat) - set(known))
    if unknown or len(set(flat)) < len(flat) or not all(groups):
        raise BadInput(
            f"tasks={groups}: every task needs classes, each class once, out of {known}"
            + (f"; unknown: {unknown}" if unknown else "")
        )
    examples, test = hold_out(examples, test, test_share, seed)
    made = []
    for number, group in enumerate(groups):
        chosen = torch.tensor(group)
        parts = [part.select(torch.isin(part["y"], chosen).nonzero()[:, 0]) for part in (examples, test)]
        made.append(Task(parts[0], parts[1], tuple(group), words_of(examples, group), number))
    return Stream(tuple(made), "class", name=name)


def words_of(examples: Examples, classes: Sequence[int]) -> tuple[str, ...]:
    """A word for each class: what the column `name` says of its first row, else the label."""
    words, y = examples.columns.get("name"), examples["y"]
    if words is None or isinstance(words, torch.Tensor):
        return tuple(map(str, classes))
    return tuple(str(words[int((y == label).nonzero()[0, 0])]) for label in classes)


def hold_out(examples: Examples, test: Examples | None, share: float, seed: int) -> tuple[Examples, Examples]:
    """Train and test rows: `test` where it is given, else `share` of every class (of all rows where `y` is no label), drawn by `seed`.

    Raises:
        BadInput: a share that is not between 0 and 1, or too few rows to be split.
    """
    if test is not None:
        return examples, test
    if not 0 < share < 1:
        raise BadInput(f"test_share={share} must lie between 0 and 1")
    y = examples.columns.get("y")
    labelled = isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point()
    held = _held_out(y if labelled else torch.zeros(len(examples), dtype=torch.int64), share, seed)  # type: ignore[arg-type]
    return examples.select((~held).nonzero()[:, 0]), examples.select(held.nonzero()[:, 0])


def _held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        count = round(share * len(rows))
        if not 0 < count < len(rows):
            raise BadInput(f"class {label} has {len(rows)} rows, too few to hold out a share of {share}")
        held[rows[torch.randperm(len(rows), generator=generator(seed, "split", int(label)))[:count]]] = True
    return held


_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path, max_bytes: int = LIMIT) -> np.ndarray:
    """An array from an idx file (the MNIST format), gzipped or not.

    Raises:
        Corrupt: not an idx file, or truncated.
        BadInput: no such file, or values of more than `max_bytes`.
    """
    path = Path(path)
    try:
        with open(path, "rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        # deflate cannot pack more than 1032 bytes into one
        most = path.stat().st_size * (1032 if zipped else 1)
        with gzip.open(path) if zipped else open(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES:
                raise Corrupt(f"{path} is not an idx file: its first bytes are {head.hex()}")
            kind, sizes = np.dtype(_IDX_TYPES[head[2]]), file.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise Corrupt(f"{path} ends inside its header; fetch it again")
            shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
            expected = int(np.prod(shape, dtype=object)) * kind.itemsize
            if expected <= most:
                fits(expected, max_bytes, f"{path}")
            raw = file.read(min(expected, most) + 1)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; give the path of an idx file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise Corrupt(f"{path} cannot be read as an idx file ({error}); fetch it again") from None
    if len(raw) != expected:
        has = f"more than {expected}" if len(raw) > expected else str(len(raw))
        raise Corrupt(f"{path} has {has} bytes of values where its header promises {expected}; fetch it again")
    return np.frombuffer(raw, kind).reshape(shape).astype(kind.newbyteorder("="))


def idx(images: str | Path, labels: str | Path, source: str = "idx", max_bytes: int = LIMIT) -> Examples:
    """Images (N, 1, H, W) in [0, 1] and labels (N,) from two idx files (MNIST, Fashion-MNIST and their like).

    Raises:
        Corrupt: a file is not idx or truncated.
        BadInput: a missing file, files of different length, or one whose values take more than `max_bytes`.
    """
    pixels, targets = read_idx(images, max_bytes), read_idx(labels, max_bytes)
    if pixels.ndim < 2 or targets.ndim != 1 or len(pixels) != len(targets):
        raise BadInput(f"images of shape {pixels.shape} and labels of shape {targets.shape} do not belong together")
    x = torch.from_numpy(pixels.astype(np.float32)) / (255 if pixels.dtype == np.uint8 else 1)
    x = x[:, None] if x.dim() == 3 else x
    return Examples({"x": x, "y": torch.from_numpy(targets.astype(np.int64))}, source)


def split_idx(
    images: str, labels: str, tasks: int = 5, test_share: float = 0.25, seed: int = 0, flat: bool = False
) -> Stream:
    """`idx` files cut into tasks of equally many classes; `flat` turns images into rows."""
    examples = idx(images, labels)
    if flat:
        examples = examples.replace(x=examples["x"].flatten(1))
    return split_classes(examples, tasks=tasks, test_share=test_share, seed=seed, name="split-idx")
