"""CIFAR-10 and CIFAR-100 from their binary versions."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from remanence.core.errors import BadInput, Corrupt
from remanence.data.examples import Examples
from remanence.data.folders import inside
from remanence.data.values import LIMIT, fits

_PIXELS = 3 * 32 * 32
_UNPACKED = 2**28  # bytes; the archives unpack to 184 MB


def cifar10(folder: str | Path, train: bool = True, max_bytes: int = LIMIT) -> Examples:
    """CIFAR-10 from a local copy of its binary version: `x` (N, 3, 32, 32) in [0, 1], `y` (N,), and `name`, the word for the label.

    Args:
        folder: the folder ``cifar-10-batches-bin``, one that holds it, or the archive ``cifar-10-binary.tar.gz``, of which nothing is
            unpacked to the disk.
        train: the rows of ``data_batch_1.bin`` to ``data_batch_5.bin``, or those of ``test_batch.bin``. Ids are row numbers.
        max_bytes: of all images together in memory, 4 bytes per value.

    Raises:
        BadInput: no such folder or file; the python or matlab version; images beyond the limit.
        Corrupt: a file that is truncated or of another format; names it.
    """
    files = [f"data_batch_{k}.bin" for k in range(1, 6)] if train else ["test_batch.bin"]
    found = _read(Path(folder), "cifar-10-batches-bin", "cifar-10-binary.tar.gz", [*files, "batches.meta.txt"])
    x, (y,) = _images(found, files, (10,), max_bytes)
    names = _names(found, "batches.meta.txt", 10)
    return Examples({"x": x, "y": y, "name": [names[c] for c in y.tolist()]}, "cifar10")


def cifar100(folder: str | Path, train: bool = True, coarse: bool = False, max_bytes: int = LIMIT) -> Examples:
    """CIFAR-100 from a local copy of its binary version: `x` (N, 3, 32, 32) in [0, 1], `y` (N,), the other label of a row as the
    column `coarse` (or `fine`), and `name`, the word for `y`.

    Args:
        folder: the folder ``cifar-100-binary``, one that holds it, or the archive ``cifar-100-binary.tar.gz``, of which nothing is
            unpacked to the disk.
        train: the rows of ``train.bin`` or those of ``test.bin``. Ids are row numbers.
        coarse: label by the 20 superclasses instead of the 100 classes.
        max_bytes: of all images together in memory, 4 bytes per value.

    Raises:
        BadInput, Corrupt: as `cifar10`.
    """
    file, words = "train.bin" if train else "test.bin", f"{'coarse' if coarse else 'fine'}_label_names.txt"
    found = _read(Path(folder), "cifar-100-binary", "cifar-100-binary.tar.gz", [file, words])
    x, labels = _images(found, [file], (20, 100), max_bytes)
    y, other = labels if coarse else labels[::-1]
    names = _names(found, words, 20 if coarse else 100)
    columns: dict[str, Any] = {
        "x": x,
        "y": y,
        "fine" if coarse else "coarse": other,
        "name": [names[c] for c in y.tolist()],
    }
    return Examples(columns, "cifar100")


def _read(root: Path, within: str, archive: str, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of the files `names`, which lie in the folder `within`."""
    if root.is_dir():
        root = root / within if (root / within).is_dir() else root
        there = {name for name in names if inside(root, name).is_file()}
        found = {}
        for name in sorted(there):
            if (root / name).stat().st_size > _UNPACKED:
                raise Corrupt(f"{root / name} is larger than the whole of {archive}; fetch it again")
            found[name] = (root / name).read_bytes()
        others = {path.name for path in root.iterdir()}
    elif root.is_file():
        found, others = _unpacked(root, {f"{within}/{name}": name for name in names})
    else:
        raise BadInput(f"{root} does not exist; give the unpacked {archive}, or the archive itself")
    lacking = [name for name in names if name not in found]
    python = {"data_batch_1", "cifar-10-batches-py", "cifar-100-python"} & others or {"train", "test", "meta"} <= others
    if lacking and (python or any(name.endswith(".mat") for name in others)):
        raise BadInput(
            f"{root} is the python or matlab version, made of pickles that could run code; take the binary version, {archive}"
        )
    if lacking:
        raise BadInput(f"{root} has no {lacking[0]}; give the unpacked {archive}, or the archive itself")
    return found


def _unpacked(path: Path, wanted: dict[str, str]) -> tuple[dict[str, bytes], set[str]]:
    """The wanted files of an archive, and the names of the first folders and files in it. Nothing is written, no link is followed."""
    found, others = dict[str, bytes](), set[str]()
    try:
        with open(path, "rb") as file:
            inflated: Any = _Inflated(file)
            archive = tarfile.open(fileobj=inflated, mode="r|")  # noqa: SIM115  # it owns nothing but the open file
            for member in archive:
                parts = member.name.removeprefix("./").split("/")
                others.add(parts[0])
                name = wanted.get("/".join(parts))
                inner = archive.extractfile(member) if name is not None and member.isfile() else None
                if name is not None and inner is not None:
                    found[name] = inner.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error, UnicodeError) as error:
        raise Corrupt(f"{path} cannot be read as a .tar.gz archive ({error}); fetch it again") from None
    return found, others


class _Inflated:
    """A gzip file as a stream of at most `_UNPACKED` bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._inflate, self._made = file, zlib.decompressobj(31), 0

    def read(self, size: int) -> bytes:
        made = b""
        while len(made) < size and not self._inflate.eof:
            raw = self._inflate.unconsumed_tail or self._file.read(2**16)
            if not raw:
                raise EOFError("it ends too soon")
            made += self._inflate.decompress(raw, size - len(made))
        self._made += len(made)
        if self._made > _UNPACKED:
            raise EOFError(f"it unpacks to more than {_UNPACKED} bytes")
        return made


def _images(
    found: dict[str, bytes], files: Sequence[str], classes: Sequence[int], max_bytes: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Images and, for each byte before them, a label below that number of `classes`."""
    length = len(classes) + _PIXELS
    for name in files:
        if not found[name] or len(found[name]) % length:
            raise Corrupt(
                f"{name} has {len(found[name])} bytes, no whole number of records of {length}; it is truncated or of another format"
            )
    count = sum(len(found[name]) // length for name in files)
    fits(count * _PIXELS * 4, max_bytes, f"{count} images")
    x, labels, at = torch.empty(count, 3, 32, 32), torch.empty(len(classes), count, dtype=torch.int64), 0
    for name in files:
        rows: np.ndarray[Any, Any] = np.frombuffer(found[name], np.uint8).reshape(-1, length)
        for k, most in enumerate(classes):
            if int(rows[:, k].max()) >= most:
                raise Corrupt(
                    f"{name} has a label {rows[:, k].max()} where there are {most} classes; it is another file"
                )
        here = slice(at, at + len(rows))
        labels[:, here] = torch.from_numpy(rows[:, : len(classes)].T.astype(np.int64))
        x[here] = torch.from_numpy(rows[:, len(classes) :].reshape(-1, 3, 32, 32).astype(np.float32))
        at += len(rows)
    return x.div_(255), list(labels)


def _names(found: dict[str, bytes], name: str, count: int) -> list[str]:
    names = found[name].decode("ascii", "replace").split()
    if len(names) != count:
        raise Corrupt(f"{name} has {len(names)} names where there are {count} classes; fetch it again")
    return names
