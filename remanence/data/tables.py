"""Tables in files: CSV and ``.npz``."""

from __future__ import annotations

import csv as standard
import zipfile
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.core.errors import BadInput, Corrupt, UnknownName, nearest
from remanence.data.examples import Examples
from remanence.data.values import LIMIT, column, fits, target


def csv(
    path: str | Path,
    label: str | None = None,
    id: str | None = None,
    features: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    delimiter: str = ",",
    max_bytes: int = LIMIT,
    source: str = "csv",
) -> Examples:
    """A CSV file with a header line, UTF-8 with or without byte order mark: `x` (N, features) float32 and `y` (N,).

    Args:
        label: the column that becomes `y`: whole numbers stay labels, real numbers become targets (float32), words become 0, 1, ... in
            the order of `classes` (None: of the alphabet). None: no `y`.
        id: the column of distinct whole numbers that becomes the ids. None: row numbers.
        features: the columns of `x`, all numbers; None: all that nothing else names.
        columns: further columns, kept as words under their names, so that requests can name them: ``document``, ``client``.
        max_bytes: of the file, and of the numbers in memory.

    Raises:
        UnknownName: a column that the header lacks, or a label that `classes` lacks.
        BadInput: an empty cell, NaN, a cell of the wrong type, a line of the wrong length, a repeated id, an empty or a huge file;
            names the line and the column.
        Corrupt: not UTF-8, or not CSV.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give the path of a CSV file")
    fits(path.stat().st_size, max_bytes, f"{path.name}")
    if len(delimiter) != 1:
        raise BadInput(f"delimiter={delimiter!r} must be one character, such as ',' or ';'")
    x, lines = array("f"), array("q")
    kept: dict[str, list[str]] = {name: [] for name in dict.fromkeys([label, id, *columns]) if name is not None}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = standard.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            used = _header(path.name, header, features, kept)
            places = [header.index(name) for name in used]
            others = [(values, header.index(name)) for name, values in kept.items()]
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise BadInput(
                        f"{path.name}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)}"
                    )
                try:
                    x.extend([float(cells[place]) for place in places])
                except ValueError:
                    for name, place in zip(used, places, strict=True):
                        _number(cells[place], f"{path.name}, line {reader.line_num}, column {name!r}")
                lines.append(reader.line_num)
                for values, place in others:
                    values.append(cells[place].strip())
                if not len(lines) % 4096:
                    fits(4 * len(x), max_bytes, f"{path.name}")
        except standard.Error as error:
            huge = " (is a quote left open?)" if "field larger" in str(error) else ""
            raise Corrupt(f"{path.name}, line {reader.line_num}: {error}{huge}; mend this line") from None
        except UnicodeDecodeError as error:
            raise Corrupt(
                f"{path.name} is not UTF-8 after line {reader.line_num} ({error.reason}); save it as UTF-8"
            ) from None
    if not lines:
        raise BadInput(f"{path.name} has no rows under its header")
    inputs = torch.from_numpy(np.frombuffer(x, np.float32).reshape(len(lines), -1).copy())
    bad = (~torch.isfinite(inputs)).nonzero()
    if len(bad):
        row, at = bad[0].tolist()
        raise BadInput(
            f"{path.name}, line {lines[row]}, column {used[at]!r}: NaN, infinite or beyond float32; fill or drop it ({len(bad)} such cells)"
        )
    made: dict[str, Any] = {"x": inputs} if used else {}
    if label is not None:
        made["y"] = _labels(path.name, label, kept[label], lines, classes)
    made.update({name: kept[name] for name in columns})
    return Examples(made, source, None if id is None else _identities(path.name, id, kept[id], lines))


def _header(file: str, header: list[str], features: Sequence[str] | None, named: Mapping[str, Any]) -> list[str]:
    """The columns of `x`, once the header has every name that is asked for, and none twice."""
    if not any(header):
        raise BadInput(f"{file} is empty; the first line must name the columns")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise BadInput(
            f"{file}: the header has {', '.join(map(repr, twice))} more than once; give each column its own name"
        )
    for name in [*named, *(features or ())]:
        if name not in header:
            raise UnknownName(f"{file} has no column {name!r}{nearest(name, header)} (it has {', '.join(header)})")
    return list(features) if features is not None else [name for name in header if name not in named]


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        given = "is empty; fill it or drop the line" if not cell.strip() else f"{cell[:40]!r} is no number"
        hint = "" if not cell.strip() else "; name it in columns= (or label=), or leave it out of features="
        raise BadInput(f"{where}: {given}{hint}") from None


def _labels(file: str, name: str, cells: list[str], lines: Any, classes: Sequence[str] | None) -> Tensor:
    for cell, line in zip(cells, lines, strict=True):
        if not cell:
            raise BadInput(f"{file}, line {line}, column {name!r}: the label is empty; fill it or drop the line")
    if classes is None:
        kinds = {cell: _kind(cell) for cell in dict.fromkeys(cells)}
        if "word" in kinds.values() and len(set(kinds.values())) > 1:
            word = next(cell for cell in cells if kinds[cell] == "word")
            raise BadInput(
                f"{file}, line {lines[cells.index(word)]}, column {name!r}: the label {word[:40]!r} is a word where others are numbers"
            )
        if set(kinds.values()) == {"whole"}:
            return torch.tensor(_int64(file, name, cells, lines))
        if "word" not in kinds.values():
            y = torch.tensor([float(cell) for cell in cells], dtype=torch.float32)
            if not bool(torch.isfinite(y).all()):
                row = int((~torch.isfinite(y)).nonzero()[0, 0])
                raise BadInput(
                    f"{file}, line {lines[row]}, column {name!r}: NaN, infinite or beyond float32; fill or drop it"
                )
            return y
    order = {word: number for number, word in enumerate(sorted(set(cells)) if classes is None else classes)}
    for cell, line in zip(cells, lines, strict=True):
        if cell not in order:
            raise UnknownName(
                f"{file}, line {line}, column {name!r}: {cell[:40]!r} is not among classes={list(order)}{nearest(cell[:99], order)}"
            )
    return torch.tensor([order[cell] for cell in cells])


def _kind(cell: str) -> str:
    for kind, read in (("whole", int), ("real", float)):
        try:
            read(cell)
            return kind
        except ValueError:
            pass
    return "word"


def _int64(file: str, name: str, cells: list[str], lines: Any) -> list[int]:
    numbers = []
    for cell, line in zip(cells, lines, strict=True):
        try:
            number = int(cell)
        except ValueError:
            raise BadInput(f"{file}, line {line}, column {name!r}: {cell[:40]!r} is no whole number") from None
        if not -(2**63) <= number < 2**63:
            raise BadInput(f"{file}, line {line}, column {name!r}: {cell[:40]} does not fit into 64 bits")
        numbers.append(number)
    return numbers


def _identities(file: str, name: str, cells: list[str], lines: Any) -> list[int]:
    found = _int64(file, name, cells, lines)
    seen: dict[int, int] = {}
    for number, line in zip(found, lines, strict=True):
        if number < 0 or number in seen:
            why = "is negative" if number < 0 else f"stands in line {seen[number]} already"
            raise BadInput(
                f"{file}, line {line}, column {name!r}: the id {number} {why}; ids are distinct and at least 0"
            )
        seen[number] = line
    return found


def npz(
    path: str | Path, columns: Mapping[str, str] | None = None, max_bytes: int = LIMIT, source: str = "npz"
) -> Examples:
    """Arrays of an ``.npz`` file as columns. No array of Python objects is ever read, and nothing is unpacked before its declared size
    has been looked at.

    Whole numbers and flags become int64, real numbers float32; `x` of uint8 becomes pixels in [0, 1], (N, H, W) of them
    (N, 1, H, W).

    Args:
        columns: our names to the file's, such as ``{"x": "images", "y": "labels", "id": "ids"}``; ``id`` gives the ids. None: all
            arrays by their own names.
        max_bytes: of the arrays that are read, in the file's types and in memory.

    Raises:
        UnknownName: an array that the file lacks.
        BadInput: arrays of unequal length, of objects or words, with NaN, or beyond the limit.
        Corrupt: a truncated or damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give the path of an .npz file")
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            wanted = dict(columns) if columns is not None else {name: name for name in members}
            for name in wanted.values():
                if name not in members:
                    raise UnknownName(
                        f"{path.name} has no array {name!r}{nearest(name, members)} (it has {', '.join(members)})"
                    )
            fits(sum(members[name].file_size for name in wanted.values()), max_bytes, f"{path.name}")
            made = {ours: _array(file, members[name], ours, path.name, max_bytes) for ours, name in wanted.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, BadInput):
            raise
        raise Corrupt(f"{path.name} cannot be read as .npz ({error}); write it again") from None
    ids = made.pop("id", None)
    if not made:
        raise BadInput(f"{path.name} has no arrays that could be columns")
    examples = Examples(made, source, ids)
    examples.check()
    return examples


def _array(file: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, where: str, max_bytes: int) -> Tensor:
    with file.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise Corrupt(f"{where}: {info.filename} has the unknown format version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(stream)
        if kind.hasobject:
            raise BadInput(
                f"{where}: {info.filename} holds Python objects, which can run code when read; save numbers only"
            )
        kept = target(name, kind, where)
        count = int(np.prod(shape, dtype=object))
        if count * kind.itemsize != info.file_size - stream.tell():
            raise Corrupt(
                f"{where}: {info.filename} promises {count * kind.itemsize} bytes and has {info.file_size - stream.tell()}"
            )
        fits(count * kept.itemsize, max_bytes, f"{where}: {info.filename}")
    with file.open(info) as stream:
        return column(name, np.lib.format.read_array(stream, allow_pickle=False), where)
