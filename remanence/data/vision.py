"""Tiny ImageNet, ImageNet-R and CORe50 from local copies, as their makers lay them out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from remanence.core.errors import BadInput, Corrupt
from remanence.core.rng import generator
from remanence.data.digits import hold_out
from remanence.data.examples import Examples
from remanence.data.folders import decoded, inside
from remanence.data.stream import Stream, Task
from remanence.data.values import LIMIT

_MOST_PIXELS = 50_000_000
_TEST_SESSIONS = (3, 7, 10)
_CATEGORIES = (
    *("plug adapter", "mobile phone", "scissors", "light bulb", "can"),
    *("glasses", "ball", "marker", "cup", "remote control"),
)
_FRAME = re.compile(r"C_(\d\d)_(\d\d)_\d{3}\.png")


def tiny_imagenet(
    folder: str | Path,
    train: bool = True,
    size: int | Sequence[int] | None = None,
    max_bytes: int = LIMIT,
) -> Examples:
    """Tiny ImageNet (``tiny-imagenet-200``): `x` (N, 3, 64, 64) in [0, 1], `y` (N,), `document`, the file's path inside the folder,
    and `name`, the words for the label. Label k is line k of ``wnids.txt``. Needs Pillow (``pip install remanence[images]``).

    Args:
        folder: the one that holds ``wnids.txt``, ``words.txt``, ``train`` and ``val``.
        train: the images of ``train``, by class and file name, or those of ``val``, in the order of ``val_annotations.txt``; the
            images of ``test`` have no labels. Boxes are not read. Ids are row numbers.
        size: resize to (size, size) or (height, width), bilinear with antialiasing.
        max_bytes: of all images together in memory, 4 bytes per value: 2.3 GiB are all of ``train`` at full size.

    Raises:
        BadInput: no such folder or file; a link that leads out of the folder; images beyond the limit; Pillow is not installed.
        Corrupt: a file that is truncated or of another format; names it.
    """
    root = _folder(folder)
    wnids = [line.strip() for line in _lines(root, "wnids.txt")]
    label = {wnid: k for k, wnid in enumerate(wnids)}
    if len(label) != len(wnids):
        raise Corrupt(f"{root / 'wnids.txt'} names a class twice; fetch it again")
    words = dict(line.split("\t", 1) for line in _lines(root, "words.txt") if "\t" in line)
    if train:
        names = [name for wnid in wnids for name in _files(root, f"train/{wnid}/images")]
        y = [label[name.split("/")[1]] for name in names]
    else:
        rows = [line.split("\t") for line in _lines(root, "val/val_annotations.txt")]
        for number, row in enumerate(rows):
            if len(row) < 2 or row[1] not in label or "/" in row[0]:
                raise Corrupt(f"{root / 'val/val_annotations.txt'}, line {number + 1}: no image and class of wnids.txt")
        names, y = [f"val/images/{row[0]}" for row in rows], [label[row[1]] for row in rows]
        for name in names:
            if not inside(root, name).is_file():
                raise BadInput(f"{root} has no {name}, which val_annotations.txt names; unpack the archive again")
    x = decoded(root, names, size, False, _MOST_PIXELS, max_bytes, "tiny-imagenet")
    called = [words.get(wnid, wnid) for wnid in wnids]
    columns: dict[str, Any] = {"x": x, "y": torch.tensor(y), "document": names, "name": [called[c] for c in y]}
    return Examples(columns, "tiny-imagenet")


def imagenet_r(
    folder: str | Path,
    size: int | Sequence[int],
    train: bool = True,
    test_share: float = 0.2,
    seed: int = 0,
    max_bytes: int = LIMIT,
) -> Examples:
    """ImageNet-R: `x` (N, 3, H, W) in [0, 1], `y` (N,), `document`, the file's path inside the folder, and `name`, the word of
    ``README.txt`` for the label. It has no official split: a share of every class is held out. An image's id
    is its place in the whole by class and file name, so train and test have none in common. Needs Pillow (``pip install remanence[images]``).

    Args:
        folder: the one that holds a folder for each class (``n01443537`` ...); label k is the k-th of these by name.
        size: resize to (size, size) or (height, width), bilinear with antialiasing; the images are of all sizes. Nothing is cropped.
        train: the rows that are not held out, or the held-out ones.
        test_share: of every class, drawn by `seed`. 0.2 gives 24,000 and 6,000 images, as is common in continual learning.
        max_bytes: of all images together in memory, 4 bytes per value: 13.5 GiB are 24,000 images at size 224.

    Raises:
        BadInput, Corrupt: as `tiny_imagenet`.
    """
    root = _folder(folder)
    wnids = sorted(path.name for path in root.iterdir() if path.is_dir() and re.fullmatch(r"n\d{8}", path.name))
    if not wnids:
        raise BadInput(f"{root} has no class folders such as n01443537; give the unpacked imagenet-r")
    files = [(k, name) for k, wnid in enumerate(wnids) for name in _files(root, wnid)]
    whole = Examples({"y": torch.tensor([k for k, _ in files]), "document": [name for _, name in files]}, "imagenet-r")
    rows = hold_out(whole, None, test_share, seed)[0 if train else 1]
    names: Any = rows.columns["document"]
    read = _lines(root, "README.txt") if inside(root, "README.txt").is_file() else []
    words = dict(line.split(maxsplit=1) for line in read if re.fullmatch(r"n\d{8}\s+\S.*", line))
    x = decoded(root, names, size, False, _MOST_PIXELS, max_bytes, "imagenet-r")
    return rows.replace(x=x, name=[words.get(wnids[c], wnids[c]).strip() for c in rows["y"].tolist()])


def core50(
    folder: str | Path,
    train: bool | None = True,
    label: str = "object",
    size: int | Sequence[int] | None = None,
    max_bytes: int = LIMIT,
) -> Examples:
    """CORe50, 50 objects of 10 categories filmed in 11 sessions: `x` (N, 3, 128, 128) in [0, 1], `y` (N,), `session` 1 to 11,
    `object` 0 to 49, `document`, the file's path inside the folder, and `name`, the word for the category.
    Needs Pillow (``pip install remanence[images]``).

    Args:
        folder: ``core50_128x128``, with s1/o1/C_01_01_000.png and so on, or the one that holds it.
        train: the sessions but 3, 7 and 10, or these three (the official split), or, of None, all. Ids are row numbers in the whole,
            by session, object and frame.
        label: ``object``, or ``category``: object k is of category k // 5.
        size: resize to (size, size) or (height, width), bilinear with antialiasing.
        max_bytes: of all images together in memory, 4 bytes per value: 30 GiB are all 164,866 frames, 1.9 GiB at size 32.

    Raises:
        BadInput, Corrupt: as `tiny_imagenet`.
    """
    if label not in ("object", "category"):
        raise BadInput(f"label={label!r} is not one of object, category")
    root = _folder(folder)
    root = root / "core50_128x128" if (root / "core50_128x128").is_dir() else root
    found: list[tuple[int, int, str]] = []
    for session in range(1, 12):
        for thing in range(1, 51) if inside(root, f"s{session}").is_dir() else ():
            for name in _files(root, f"s{session}/o{thing}") if inside(root, f"s{session}/o{thing}").is_dir() else ():
                frame = _FRAME.fullmatch(name.rpartition("/")[2])
                if frame is None or (int(frame[1]), int(frame[2])) != (session, thing):
                    raise BadInput(
                        f"{name} is no frame of session {session} and object {thing}; unpack the archive again"
                    )
                found.append((session, thing - 1, name))
    rows = [k for k, row in enumerate(found) if train is None or (row[0] in _TEST_SESSIONS) is not train]
    if not rows:
        raise BadInput(f"{root} has no frames of these sessions, such as s1/o1/C_01_01_000.png; give core50_128x128")
    names = [found[k][2] for k in rows]
    sessions, things = torch.tensor([found[k][:2] for k in rows]).T.contiguous()
    columns = {
        "x": decoded(root, names, size, False, _MOST_PIXELS, max_bytes, "core50"),
        "y": things if label == "object" else things // 5,
        "session": sessions,
        "object": things.clone(),
        "document": names,
        "name": [_CATEGORIES[thing // 5] for thing in things.tolist()],
    }
    return Examples(columns, "core50", torch.tensor(rows), positional=True)


def core50_stream(
    folder: str | Path,
    scenario: str = "nc",
    label: str = "object",
    size: int | Sequence[int] | None = None,
    seed: int = 0,
    max_bytes: int = LIMIT,
) -> Stream:
    """CORe50 as a stream, in an order drawn by `seed` (the official ten orders are others).

    Args:
        scenario: ``ni``, new instances: a task for each training session, all of them measured on the whole test set; or ``nc``, new
            classes: a fifth of the classes in the first task, a tenth in each of eight more, measured on the test rows of these.
        folder, label, size, max_bytes: as `core50`; the limit is that of train and test together.

    Raises:
        BadInput: another scenario; for ``nc`` a number of classes that is no multiple of ten; or whatever `core50` refuses.
    """
    if scenario not in ("ni", "nc"):
        raise BadInput(f"scenario={scenario!r} is not one of ni, nc")
    whole = core50(folder, None, label, size, max_bytes)
    held = torch.isin(whole["session"], torch.tensor(_TEST_SESSIONS))
    if held.all() or not held.any():
        raise BadInput(
            f"{folder} has no {'training' if held.any() else 'test'} sessions; test sessions are 3, 7 and 10"
        )
    column = "y" if scenario == "nc" else "session"
    values = whole[column][~held].unique()
    values = values[torch.randperm(len(values), generator=generator(seed, "core50", scenario))]
    if scenario == "nc" and len(values) % 10:
        raise BadInput(f"{folder} has {len(values)} classes; the scenario nc needs a multiple of 10")
    tenth = len(values) // 10
    parts = values.split([2 * tenth] + 8 * [tenth]) if scenario == "nc" else values.split(1)
    tasks, test = [], whole.select(held.nonzero()[:, 0])
    for number, part in enumerate(parts):
        rows = whole.select((~held & torch.isin(whole[column], part)).nonzero()[:, 0])
        asked = test if scenario == "ni" else test.select(torch.isin(test["y"], part).nonzero()[:, 0])
        classes = tuple(rows["y"].unique().tolist())
        words = dict(zip(rows["y"].tolist(), rows.columns["name"], strict=True))
        called = [f"{words[c]} {c % 5 + 1}" if label == "object" else words[c] for c in classes]
        tasks.append(Task(rows, asked, classes, tuple(called), number))
    return Stream(tuple(tasks), "class" if scenario == "nc" else "domain", name=f"core50-{scenario}")


def _folder(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise BadInput(f"{root} is no folder; give the folder of the unpacked archive")
    return root


def _lines(root: Path, name: str) -> list[str]:
    """The lines of a small text file that are not empty."""
    path = inside(root, name)
    if not path.is_file():
        raise BadInput(f"{root} has no {name}; give the folder of the unpacked archive")
    if path.stat().st_size > 2**26:
        raise Corrupt(f"{path} is no list of names: it has {path.stat().st_size} bytes; fetch it again")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()]


def _files(root: Path, folder: str) -> list[str]:
    """The files of a folder by name, as paths inside `root`; hidden ones are passed over."""
    here = inside(root, folder)
    if not here.is_dir():
        raise BadInput(f"{root} has no folder {folder}; give the folder of the unpacked archive")
    found = [f"{folder}/{path.name}" for path in sorted(here.iterdir()) if not path.name.startswith(".")]
    for name in found:
        if not inside(root, name).is_file():
            raise BadInput(f"{name} is no file; it should hold images only")
    return found
