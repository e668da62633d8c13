"""Omniglot: handwritten characters of many alphabets, twenty of each, from a local copy."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from remanence.core.errors import BadInput, Corrupt
from remanence.data.examples import Examples
from remanence.data.folders import decoded, inside
from remanence.data.values import LIMIT

_IMAGE = re.compile(r"(?:[^/]+/)*([^/]+)/(character\d+)/\d+_(\d+)\.png")
_LARGEST = 2**20  # bytes of one image; the real ones have some hundreds


def omniglot(path: str | Path, size: int | Sequence[int] | None = 28, max_bytes: int = LIMIT) -> Examples:
    """Omniglot (Lake et al. 2015, Science 350): `x` (N, 1, H, W), 1 where there is ink and 0 where there is none, `y` (N,), `drawer`
    1 to 20, `alphabet`, `name`, such as ``Greek/character01``, and `document`, the file's path inside the archive or folder. Label k is
    the k-th character by alphabet and number; ids are row numbers, by character and drawer. Needs Pillow
    (``pip install remanence[images]``).

    Args:
        path: an official archive, such as ``images_background.zip``, of which nothing is unpacked to the disk; or a folder in which it
            was unpacked. All characters found are taken, 964 in ``images_background``, 659 in ``images_evaluation``.
        size: resize to (size, size) or (height, width), bilinear with antialiasing. None: 105 by 105, as they are.
        max_bytes: of all images together in memory, 4 bytes per value: 97 MiB are all 32,460 at size 28.

    Raises:
        BadInput: no such path, no character in it or one that is there twice; a link out of the folder; images beyond the limit;
            Pillow is not installed.
        Corrupt: an archive or image that is damaged; names it.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist; give images_background.zip or the folder in which it was unpacked")
    if path.is_dir():
        return _read(path, path, [each.relative_to(path).as_posix() for each in path.rglob("*.png")], size, max_bytes)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, _Zipped(archive), archive.namelist(), size, max_bytes)
    except zipfile.BadZipFile as error:
        raise Corrupt(f"{path} cannot be read as a .zip archive ({error}); fetch it again") from None


def _read(path: Path, root: Any, names: Sequence[str], size: int | Sequence[int] | None, max_bytes: int) -> Examples:
    found: dict[tuple[str, str, int], str] = {}
    for name in names:
        if match := _IMAGE.fullmatch(name):
            key = (match[1], match[2], int(match[3]))
            if key in found:
                raise BadInput(
                    f"{name} and {found[key]} are the same character and drawer; give one of the two folders"
                )
            found[key] = name
    if not found:
        raise BadInput(f"{path} has no images such as Greek/character01/0394_01.png; give images_background.zip")
    keys = sorted(found)
    files = [found[key] for key in keys]
    if isinstance(root, Path):
        for name in files:
            inside(root, name)
    characters = [f"{alphabet}/{character}" for alphabet, character, _ in keys]
    label = {name: k for k, name in enumerate(dict.fromkeys(characters))}
    columns: dict[str, Any] = {
        "x": 1 - decoded(root, files, size, True, 2**20, max_bytes, "omniglot"),
        "y": torch.tensor([label[name] for name in characters]),
        "drawer": torch.tensor([drawer for _, _, drawer in keys]),
        "alphabet": [alphabet for alphabet, _, _ in keys],
        "name": characters,
        "document": files,
    }
    return Examples(columns, "omniglot")


class _Zipped:
    """An archive as the root of paths that can be decoded."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def __truediv__(self, name: str) -> _Member:
        info = self._archive.getinfo(name)
        if info.file_size > _LARGEST:
            raise Corrupt(f"{name} unpacks to {info.file_size} bytes, which is no character; fetch the archive again")
        try:
            with self._archive.open(info) as file:
                made = _Member(file.read(_LARGEST))
        except (OSError, EOFError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
            raise Corrupt(f"{name} cannot be read from the archive ({error}); fetch it again") from None
        made.suffix = ".png"
        return made


class _Member(io.BytesIO):
    """A file in memory with the suffix of its name."""

    suffix: str
