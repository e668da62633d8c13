"""Examples: whole columns with ids, gathered by index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import TOKENS, padded
from remanence.data.rows import Rows

View = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Examples:
    """A table of examples: named columns of equal length and one int64 id per row.

    Args:
        columns: tensors (N, ...) or lists of length N. ``x`` is the input and ``y`` the label or target by convention;
            any other column (``document``, ``client``, ``group``) can be named in a request. A column that `memmap` made
            stays in its file through every method here but `replace`.
        source: a label for where the rows come from (never a path).
        ids: (N,) distinct non-negative integers. None: row numbers, bound to the fingerprint of this source, so that a
            later change of the source is noticed.
        views: named transforms of whole batches, such as ``{"weak": f, "strong": g}``.

    Raises:
        BadInput: columns of unequal length, NaN or infinite inputs, repeated or negative ids.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor | Sequence[Any]],
        source: str,
        ids: Any = None,
        views: Mapping[str, View] | None = None,
        *,
        positional: bool | None = None,
    ) -> None:
        if not columns:
            raise BadInput("Examples need at least one column")
        self.columns: dict[str, Tensor | list[Any]] = {
            name: column if isinstance(column, Tensor) else list(column) for name, column in columns.items()
        }
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise BadInput(f"columns differ in length: {lengths}")
        if "id" in self.columns:
            raise BadInput("a column may not be called 'id'; pass it as ids=")
        self.source = source
        self.views = dict(views or {})
        self.positional = ids is None if positional is None else positional
        count = next(iter(lengths.values()))
        self.id = torch.arange(count) if ids is None else _ids(ids, count)
        self._fingerprint: str | None = None
        self._order: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.id)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {_shape(column)}" for name, column in self.columns.items())
        return f"Examples({len(self)} of {self.source}: {shapes})"

    def __getitem__(self, name: str) -> Tensor:
        column = self.columns.get(name)
        if not isinstance(column, Tensor):
            raise BadInput(f"there is no tensor column {name!r}; the columns are {', '.join(self.columns)}")
        return column

    @property
    def ids(self) -> Ids:
        return Ids(self.id.numpy())

    def check(self) -> None:
        """Refuse NaN and infinite values and repeated ids, before anything learns from them.

        Raises:
            BadInput: names the column and the number of bad rows.
        """
        if len(self.ids) != len(self):
            raise BadInput(
                f"{self.source}: {len(self) - len(self.ids)} ids are repeated; every example needs an id of its own"
            )
        for name, column in self.columns.items():
            if isinstance(column, Tensor) and column.is_floating_point():
                bad = 0
                for part in _chunks(column):
                    if not bool(torch.isfinite(part.sum())):
                        bad += int((~torch.isfinite(part)).reshape(len(part), -1).any(1).sum())
                if bad:
                    raise BadInput(
                        f"{self.source}: column {name!r} has NaN or infinite values in {bad} rows; clean or drop them"
                    )

    def rows(self, ids: Ids) -> Tensor:
        """Row numbers of those of `ids` that are here, in the order of the rows."""
        return torch.from_numpy(np.flatnonzero(ids.isin(self.id.numpy())))

    def select(self, rows: Tensor) -> Examples:
        """The examples at `rows` (n,), in that order."""
        index = rows.tolist() if any(isinstance(column, list) for column in self.columns.values()) else []
        columns: dict[str, Any] = {
            name: column.at(rows)
            if isinstance(column, Rows)
            else column[rows]
            if isinstance(column, Tensor)
            else [column[i] for i in index]
            for name, column in self.columns.items()
        }
        return Examples(columns, self.source, self.id[rows], self.views, positional=self.positional)

    def only(self, ids: Ids) -> Examples:
        """Those examples whose id is in `ids`."""
        return self.select(self.rows(ids))

    def without(self, ids: Ids) -> Examples:
        """Those examples whose id is not in `ids`; itself if none is."""
        gone = ids.isin(self.id.numpy())
        return self.select(torch.from_numpy(np.flatnonzero(~gone))) if gone.any() else self

    def replace(self, **columns: Tensor | list[Any]) -> Examples:
        """The same rows with some columns replaced or added."""
        return Examples({**self.columns, **columns}, self.source, self.id, self.views, positional=self.positional)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The tensor columns at `rows` (B,), gathered, with ``id``."""
        gathered = {name: column[rows] for name, column in self.columns.items() if isinstance(column, Tensor)}
        gathered["id"] = self.id[rows]
        return gathered

    def fingerprint(self) -> str:
        """SHA-256 over ids and columns: equal data gives an equal fingerprint in every process."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self.id.numpy().tobytes())
            for name in sorted(self.columns):
                column = self.columns[name]
                digest.update(f"|{name}|".encode())
                if isinstance(column, Tensor):
                    digest.update(f"{column.dtype}{tuple(column.shape)}".encode())
                    for part in _chunks(column):
                        digest.update(part.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
                else:
                    for item in column:
                        digest.update(repr(item).encode() + b"\x1f")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def cat(parts: Sequence[Examples], source: str | None = None) -> Examples:
    """One table of several; columns that are not in all of them are left out.

    Raises:
        BadInput: no parts, or rows of unequal shape.
    """
    if not parts:
        raise BadInput("there are no examples to join")
    if len(parts) == 1:
        return parts[0]
    shared = [name for name in parts[0].columns if all(name in part.columns for part in parts)]
    columns: dict[str, Any] = {}
    for name in shared:
        values = [part.columns[name] for part in parts]
        if all(isinstance(value, Tensor) for value in values):
            try:
                columns[name] = torch.cat(values)  # type: ignore[arg-type]
            except RuntimeError:
                shapes = ", ".join(_shape(value) for value in values)
                raise BadInput(f"column {name!r} cannot be joined: its parts have shapes {shapes}") from None
        else:
            columns[name] = [item for value in values for item in value]
    label = source or "+".join(dict.fromkeys(part.source for part in parts))
    ids = torch.cat([part.id for part in parts])
    return Examples(columns, label, ids, parts[0].views, positional=any(part.positional for part in parts))


def cat_batches(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of `second` after the rows of `first`; columns that are not in both are left out, ``weight`` is filled with ones, and
    rows of text are padded to the longer."""
    joined = {}
    for name in first:
        if name in second:
            other = second[name]
            if name in TOKENS and first[name].shape[1:] != other.shape[1:]:
                width = max(first[name].shape[1], other.shape[1])
                joined[name] = torch.cat([padded(name, first[name], width), padded(name, other, width)])
                continue
            if first[name].shape[1:] != other.shape[1:]:
                raise BadInput(
                    f"column {name!r}: rows of shape {tuple(first[name].shape[1:])} and {tuple(other.shape[1:])}"
                )
            joined[name] = torch.cat([first[name], other.to(first[name].dtype)])
    if "weight" in first or "weight" in second:
        ones = [
            batch.get("weight", torch.ones(len(batch["id"]), device=batch["id"].device)) for batch in (first, second)
        ]
        joined["weight"] = torch.cat(ones)
    return joined


def _chunks(column: Tensor) -> Iterator[Tensor]:
    """The column in order, about 8 MiB at a time."""
    step = max(1, 2**23 // max(1, column.nbytes // max(1, len(column))))
    for at in range(0, len(column), step):
        yield column[at : at + step]


def _ids(ids: Any, count: int) -> Tensor:
    tensor = torch.as_tensor(ids.array if isinstance(ids, Ids) else ids)
    if tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
        raise BadInput(f"ids must be integers, not {tensor.dtype}")
    if tensor.shape != (count,):
        raise BadInput(f"ids have shape {tuple(tensor.shape)} for {count} rows; give one id per row")
    if count and int(tensor.min()) < 0:
        raise BadInput("ids must not be negative")
    return tensor.to(torch.int64)


def _shape(column: Tensor | Sequence[Any]) -> str:
    return f"{tuple(column.shape)} {str(column.dtype)[6:]}" if isinstance(column, Tensor) else f"list of {len(column)}"
