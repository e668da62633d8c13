"""Whole data sets as a stream, in the order of their dates."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.core.errors import BadInput, Corrupt
from remanence.data.digits import hold_out, idx
from remanence.data.examples import Examples
from remanence.data.folders import images
from remanence.data.stream import Stream, Task
from remanence.data.tables import npz
from remanence.data.values import LIMIT, fits

Date = tuple[int, int, int]
_DATE = r"(\d{4})(?:-(0[1-9]|1[0-2])(?:-(0[1-9]|[12]\d|3[01]))?)?"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's


def dated(
    sets: str | Path | Sequence[Mapping[str, Any]],
    size: int | Sequence[int] = 64,
    gray: bool = False,
    test_share: float = 0.25,
    seed: int = 0,
    max_bytes: int = LIMIT,
) -> Stream:
    """Data sets as tasks in the order of their dates, each with classes of its own: the protocol of NEVIS'22 (Bornschein et al. 2023,
    arXiv 2211.11747), whose 106 public data sets nobody may pass on, over those that you have.

    The labels of a task are 0, 1, ... after those of the tasks before it; its words are ``<set>/<label or class folder>``. Ids are row
    numbers of the whole stream, and the column `document` is ``<set>/<file or row number>``. Pictures get one shape (bilinear with
    antialiasing) and stay in [0, 1]; nothing is computed over a data set, such as a mean to subtract, so that none tells of a later one.
    Repeated pictures are handled by `distinct`; how many rows were left out stands in the stream's name.

    Args:
        sets: a folder with one subfolder for each data set, called by date and name, such as ``1998-mnist`` or ``1998-11-mnist``. In a
            subfolder lie class folders of images (see `images`), or one ``.npz`` file with arrays `x` and `y`, or one idx file called
            ``*images*`` and one called ``*labels*``. With a file ``stream.json``, a list of ``{"source": subfolder, "date": "1998-11",
            "name": "mnist"}``, these subfolders may be called anything, and others are left out. Or such a list, with `Examples` (or
            the path of a subfolder) as `source`. A date is a year, year-month or year-month-day; a month that is not told comes first,
            and sets of one date come by name.
        size: of all pictures: pixels, or (height, width). Rows without a shape are taken as square pictures.
        gray: one channel instead of three.
        test_share: share of every class that is held out, drawn by `seed`.
        max_bytes: of all pictures together in memory.

    Raises:
        BadInput: no data set, one without a date, of another kind, with pixels outside [0, 1], with too few rows to hold some out, or
            of which nothing is left because other sets have it; a name that comes twice; a link out of the folder; or the limit.
        Corrupt: a damaged file.
    """
    shape = (size, size) if isinstance(size, int) else tuple(int(n) for n in size)
    if len(shape) != 2 or min(shape) < 1:
        raise BadInput(f"size={size!r} must be a positive number of pixels, or (height, width)")
    entries = _listed(Path(sets)) if isinstance(sets, str | Path) else [_entry(each, f"{each}") for each in sets]
    names = [name for _, name, _ in entries]
    if not entries or len(set(names)) < len(names):
        raise BadInput(
            f"the data sets are called {', '.join(names) or 'nothing'}; give one or more, each a name of its own"
        )
    made: list[Task] = []
    rows = labels = used = 0
    for _, name, source in sorted(entries, key=lambda entry: entry[:2]):
        found, words = _read(source, shape, max_bytes) if isinstance(source, Path) else (source, None)
        y = found["y"]
        if y.is_floating_point() or y.dim() != 1 or not len(found):
            raise BadInput(f"{name} needs integer labels y of shape (N,), not {y.dtype} {tuple(y.shape)}")
        used += len(found) * (1 if gray else 3) * math.prod(shape) * 4
        fits(used, max_bytes, f"the pictures up to {name}")
        known, column = y.unique(return_inverse=True)
        files = found.columns.get("document", range(len(found)))
        examples = Examples(
            {
                "x": _shaped(found["x"], shape, gray, name),
                "y": column + labels,
                "document": [f"{name}/{file}" for file in files],
            },
            name,
            torch.arange(rows, rows + len(found)),
            positional=True,
        )
        try:
            train, test = hold_out(examples, None, test_share, seed)
        except BadInput as error:
            raise BadInput(f"{name}: {error} (labels are counted over the stream)") from None
        told = [f"{name}/{words[label] if words else label}" for label in known.tolist()]
        made.append(Task(train, test, tuple(range(labels, labels + len(known))), tuple(told), len(made)))
        rows, labels = rows + len(found), labels + len(known)
    tasks, lost = distinct(made)
    gone = sum(train + test for train, test in lost)
    return Stream(tuple(tasks), "task", name=f"nevis, {gone} repeated rows left out" if gone else "nevis")


def distinct(tasks: Sequence[Task]) -> tuple[list[Task], list[tuple[int, int]]]:
    """The tasks such that no picture of any test set is in any training set, and how many rows each has lost, (train, test).

    A training row goes where an earlier task tests on its picture, a test row where its task or an earlier one trains on it. Two
    pictures are the same if all their values are, to 1/255; one that was scaled or compressed differently is another. A picture that
    two tasks train on stays in both.

    Raises:
        BadInput: a task of which no training or no test row is left.
    """
    trained: set[bytes] = set()
    tested: set[bytes] = set()
    made, lost = [], []
    for task in tasks:
        train, keys = _unless(task.train, tested)
        trained |= keys
        test, keys = _unless(task.test, trained)
        tested |= keys
        left = train["y"].unique()
        test = test.select(torch.isin(test["y"], left).nonzero()[:, 0])
        if not len(train) or not len(test):
            kind = "test" if len(train) else "training"
            raise BadInput(f"{task.train.source} has no {kind} picture that other data sets do not have; leave it out")
        words = [pair for pair in zip(task.classes, task.names, strict=True) if pair[0] in set(left.tolist())]
        made.append(Task(train, test, tuple(c for c, _ in words), tuple(word for _, word in words), task.id))
        lost.append((len(task.train) - len(train), len(task.test) - len(test)))
    return made, lost


def _unless(examples: Examples, taken: set[bytes]) -> tuple[Examples, set[bytes]]:
    """The rows whose picture is not `taken`, and their pictures, as one short key each."""
    keys = [
        hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        for part in examples["x"].split(1024)
        for row in part.mul(255).round().to(torch.uint8).flatten(1).numpy()
    ]
    free = [row for row, key in enumerate(keys) if key not in taken]
    return examples.select(torch.tensor(free, dtype=torch.int64)), {keys[row] for row in free}


def _listed(root: Path) -> list[tuple[Date, str, Path]]:
    """Date, name and folder of every data set in `root`."""
    if not root.is_dir():
        raise BadInput(f"{root} is no folder; give one that has a subfolder for each data set")
    index = root / "stream.json"
    if index.is_file():
        try:
            told = json.loads(index.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{index} is not JSON ({error})") from None
        if not isinstance(told, list):
            raise BadInput(f"{index} must be a list of {{source, date, name}}")
        found = [_entry(each, f"{index}: {each}") for each in told]
        entries = [(date, name, root / str(source)) for date, name, source in found]
    else:
        entries = []
        for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            match = re.fullmatch(_DATE + "-(.+)", folder.name)
            if match is None:
                raise BadInput(f"{folder.name!r} tells no date; call it such as 1998-{folder.name}, or write {index}")
            entries.append((_date(folder.name[: match.start(4) - 1], folder.name), match[4], folder))
    for _, _, folder in entries:
        if not folder.resolve().is_relative_to(root.resolve()):
            raise BadInput(f"{folder.name} leads out of {root}; copy the data set into it instead")
    return entries


def _entry(entry: Any, where: str) -> tuple[Date, str, Any]:
    if not isinstance(entry, Mapping) or set(entry) != {"source", "date", "name"}:
        raise BadInput(f"{where}: a data set is {{source, date, name}}")
    source = entry["source"]
    return _date(entry["date"], where), str(entry["name"]), Path(source) if isinstance(source, str) else source


def _date(value: Any, where: str) -> Date:
    match = re.fullmatch(_DATE, str(value))
    if match is None:
        raise BadInput(f"{where}: the date {value!r} is no year, year-month or year-month-day, such as 1998-11")
    return int(match[1]), int(match[2] or 0), int(match[3] or 0)


def _read(folder: Path, shape: tuple[int, ...], max_bytes: int) -> tuple[Examples, list[str] | None]:
    """The examples of one data set, and the words for its labels where they are class folders."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder")
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise BadInput(f"{file.name} is a link that leads out of {folder}; copy the file instead")
    tables = [f for f in files if f.suffix.lower() == ".npz"]
    pixels = [f for f in files if "idx" in f.name and "images" in f.name]
    labels = [f for f in files if "idx" in f.name and "labels" in f.name]
    if len(tables) == 1 and not pixels:
        return npz(tables[0], {"x": "x", "y": "y"}, max_bytes), None
    if len(pixels) == len(labels) == 1 and not tables:
        return idx(pixels[0], labels[0], max_bytes=max_bytes), None
    if tables or pixels or labels:
        raise BadInput(
            f"{folder} has {len(tables)} .npz files, {len(pixels)} idx files of images and {len(labels)} of labels; "
            "a data set is one .npz file, or one idx file of each, or class folders"
        )
    found = images(folder, shape, max_bytes=max_bytes)
    return found, sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _shaped(x: Tensor, shape: tuple[int, ...], gray: bool, name: str) -> Tensor:
    """Pictures (N, 1 or 3, *shape), from rows, (N, H, W) or (N, C, H, W)."""
    if x.dim() == 2 and (side := math.isqrt(x.shape[1])) ** 2 == x.shape[1]:
        x = x.reshape(len(x), 1, side, side)
    x = x[:, None] if x.dim() == 3 else x
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise BadInput(f"{name}: x of shape {tuple(x.shape)} is no picture of one or three channels")
    x = x.to(torch.float32)
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise BadInput(
            f"{name}: pixels must lie in [0, 1]; those of x lie in [{float(x.min()):.6g}, {float(x.max()):.6g}]"
        )
    if gray and x.shape[1] == 3:
        x = (x * torch.tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    if tuple(x.shape[2:]) != shape:
        x = F.interpolate(x, list(shape), mode="bilinear", antialias=True, align_corners=False).clamp_(0, 1)
    return x if gray else x.expand(-1, 3, -1, -1).contiguous()
