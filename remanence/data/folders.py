"""Folders of images, one folder per class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remanence.core.errors import BadInput, Corrupt, UnknownName, nearest
from remanence.data.examples import Examples
from remanence.data.values import LIMIT, fits, watched

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no others are decoded, whatever a file is called


def images(
    folder: str | Path,
    size: int | Sequence[int] | None = None,
    gray: bool = False,
    classes: Sequence[str] | None = None,
    max_pixels: int = 50_000_000,
    max_bytes: int = LIMIT,
    source: str = "images",
) -> Examples:
    """Images of a folder that has one folder per class: `x` (N, 3, H, W) in [0, 1], `y` (N,), and `document`, the file's path
    inside the folder, by which a request can name it. Needs Pillow (``pip install remanence[images]``).

    Hidden files and folders are passed over; links that lead out of the folder are refused. Rows are in the order of class and file
    name, and ids are row numbers.

    Args:
        size: resize to (size, size) or (height, width), bilinear with antialiasing. None: all images must have the same size.
        gray: one channel instead of three.
        classes: the folders in the order of their labels 0, 1, ...; None: by name. Give it where train and test lie in two folders
            that need not have the same classes.
        max_pixels: of one image, before it is decoded.
        max_bytes: of all images together in memory, 4 bytes per value.

    Raises:
        BadInput: no folder, class or image; images of unequal size; an image or the whole beyond its limit; Pillow is not installed.
        UnknownName: a class folder that `classes` does not name.
        Corrupt: a file that is truncated or no image; names it.
    """
    _pillow()
    root = Path(folder)
    if not root.is_dir():
        raise BadInput(f"{root} is no folder; give a folder that has one folder of images per class")
    labels, files = _listed(root, classes)
    names = [name for _, name in files]
    x = decoded(root, names, size, gray, max_pixels, max_bytes, source)
    y = torch.tensor([labels[label] for label, _ in files])
    return Examples({"x": x, "y": y, "document": names}, source)


def decoded(
    root: Path,
    names: Sequence[str],
    size: int | Sequence[int] | None,
    gray: bool,
    max_pixels: int,
    max_bytes: int,
    source: str,
) -> torch.Tensor:
    """The images `names` inside `root`, in that order: (N, 3, H, W), or (N, 1, H, W) where `gray`, in [0, 1]. See `images`.

    Raises:
        BadInput: no positive size; images of unequal size; an image or the whole beyond its limit; no image by its suffix; no Pillow.
        Corrupt: a file that is truncated or no image; names it.
    """
    Image = _pillow()
    shape = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
    if shape is not None and (len(shape) != 2 or min(shape) < 1):
        raise BadInput(f"size={size!r} must be a positive number of pixels, or (height, width)")
    x: torch.Tensor | None = None
    for number in watched(len(names), f"reading {source}"):
        name = names[number]
        path = root / name
        if path.suffix.lower() not in _SUFFIXES:
            raise BadInput(f"{name} is not known as an image ({', '.join(_SUFFIXES)}); move it away or convert it")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of bombs, as max_pixels has a limit of its own, and of damage, which is an error here
                with Image.open(path, formats=_FORMATS) as image:
                    if image.width * image.height > max_pixels:
                        raise BadInput(
                            f"{name} has {image.width} x {image.height} pixels, more than max_pixels={max_pixels}; shrink it first"
                        )
                    if image.mode[0] in "IF":
                        raise BadInput(f"{name} has more than 8 bits per value ({image.mode}); convert it to 8 bits")
                    plain: Any = image.convert("L" if gray else "RGB")
        except Image.DecompressionBombError:
            raise BadInput(f"{name} has more pixels than can be decoded safely; shrink it first") from None
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:  # what decoders raise
            if isinstance(error, BadInput):
                raise
            raise Corrupt(f"{name} cannot be read as an image ({error}); replace or remove it") from None
        if shape is not None and plain.size != shape[::-1]:
            plain = plain.resize(shape[::-1], Image.Resampling.BILINEAR)
        values = np.asarray(plain)
        if x is None:
            channels, first = 1 if gray else 3, values.shape[:2]
            fits(len(names) * channels * first[0] * first[1] * 4, max_bytes, f"{len(names)} images of this size")
            x = torch.empty(len(names), channels, *first)
        if values.shape[:2] != first:
            raise BadInput(
                f"{name} is {values.shape[0]} x {values.shape[1]} where {names[0]} is {first[0]} x {first[1]} (height x width); "
                "give size= to make all images alike"
            )
        x[number] = torch.tensor(values).reshape(*first, channels).permute(2, 0, 1)
    assert x is not None
    return x.div_(255)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise BadInput("image folders need Pillow; install it by: pip install 'remanence[images]'") from None
    return Image


def inside(root: Path, name: str) -> Path:
    """The path of `name` in `root`, whether or not there is such a file.

    Raises:
        BadInput: a link that leads out of `root`.
    """
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise BadInput(f"{name} is a link that leads out of {root}; copy the file instead")
    return path


def _listed(root: Path, classes: Sequence[str] | None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Labels by class, and (class, path inside `root`) of every file, in order."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    names = list(folders if classes is None else classes)
    for folder in folders:
        if folder not in names:
            raise UnknownName(
                f"{root} has a folder {folder!r} that is not among classes={names}{nearest(folder, names)}"
            )
    files = []
    for folder in folders:
        found = sorted(entry.name for entry in os.scandir(root / folder) if not entry.name.startswith("."))
        if not found:
            raise BadInput(f"{root}: the class folder {folder!r} has no images; add some or remove it")
        for name in found:
            if not inside(root, f"{folder}/{name}").is_file():
                raise BadInput(f"{folder}/{name} is no file; class folders hold images only")
            files.append((folder, f"{folder}/{name}"))
    if not files:
        raise BadInput(f"{root} has no folders; put the images of each class into a folder of its own")
    return {name: number for number, name in enumerate(names)}, files
