"""Columns larger than memory: rows of files, read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from remanence.core.errors import BadInput, DataChanged
from remanence.data.values import LIMIT, fits

_MAPPED = 2**24  # bytes of a file that one read may map
_AROUND = 2**16  # bytes that the system may map for one row, however small
_FACTS = {
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__),  # type: ignore[attr-defined]
    *(Tensor.requires_grad.__get__, Tensor.itemsize.__get__, Tensor.nbytes.__get__),  # type: ignore[attr-defined]
    *(Tensor.__len__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
}


class Mapped:
    """An array in a file. Nothing stays mapped between reads, so what was read never counts as this process's memory."""

    def __init__(self, array: np.memmap[Any, Any], scale: float | None) -> None:
        if array.filename is None or not array.flags.c_contiguous or isinstance(array.base, np.ndarray):
            raise BadInput(
                "give the memory-mapped array as it was opened, in C order: no slice, view or transpose of it"
            )
        try:
            torch.from_numpy(np.empty(0, array.dtype.newbyteorder("=")))
        except TypeError:
            raise BadInput(f"an array of {array.dtype} cannot be a column; its values must be numbers") from None
        array.flush()
        self.path, self.offset = Path(array.filename).resolve(), int(array.offset)
        self.dtype, self.shape, self.scale = array.dtype, tuple(array.shape), scale
        self._stamp = _stamp(os.stat(self.path))

    def read(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """A copy of the rows (n,) in memory.

        Raises:
            DataChanged: the file was changed, replaced or removed since it was opened.
        """
        found = np.empty((len(rows), *self.shape[1:]), self.dtype.newbyteorder("="))
        size = found[:1].nbytes
        step = max(1, _MAPPED // max(size, _AROUND))
        for at in range(0, len(rows), step):
            found[at : at + step] = self._array()[rows[at : at + step]]
        made = torch.from_numpy(found)
        return made if self.scale is None else made.to(torch.float32).mul_(self.scale)

    def _array(self) -> np.ndarray[Any, Any]:
        try:
            with open(self.path, "rb") as file:
                if _stamp(os.fstat(file.fileno())) == self._stamp:
                    return np.memmap(file, self.dtype, "r", self.offset, self.shape)
        except FileNotFoundError:
            pass
        raise DataChanged(f"{self.path.name} was changed, replaced or removed since it was opened; open it again")


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class Rows(Tensor):
    """A tensor (N, ...) whose rows lie in files.

    ``rows[index]`` with a whole number, a slice or an index or mask (N,) reads these rows only and gives a plain tensor; `at`
    and ``torch.cat`` give `Rows` and read nothing. Whatever else is done with it first reads the whole column.

    Raises:
        BadInput: (later) the whole column is asked for and is larger than 4 GiB.
        DataChanged: (later) a file was changed since it was opened.
    """

    _files: tuple[Mapped, ...]
    _rows: Tensor

    @staticmethod
    def __new__(cls: type[Rows], files: Sequence[Mapped], rows: Tensor | None = None) -> Rows:
        counts = [file.shape[0] for file in files]
        rows = torch.arange(sum(counts)) if rows is None else rows
        dtype = files[0].read(np.arange(0)).dtype
        made: Rows = Tensor._make_wrapper_subclass(cls, (len(rows), *files[0].shape[1:]), dtype=dtype)
        made._files, made._rows = tuple(files), rows  # rows are counted through all files
        return made

    def __init__(self, files: Sequence[Mapped], rows: Tensor | None = None) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Rows({tuple(self.shape)}, {self.dtype}, files={[file.path.name for file in self._files]})"

    def at(self, index: Tensor) -> Rows:
        """The rows at `index` (n,), in that order; nothing is read."""
        return Rows(self._files, self._rows[index])

    def read(self, index: Any) -> Tensor:
        """A copy of the rows at `index` in memory."""
        rows = self._rows[index]
        if rows.dim() == 0:
            return self.read(torch.as_tensor(index).reshape(1))[0]
        if len(self._files) == 1:
            return self._files[0].read(rows.numpy())
        ends = torch.tensor([file.shape[0] for file in self._files]).cumsum(0)
        which = torch.bucketize(rows.contiguous(), ends, right=True)
        found = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for number, file in enumerate(self._files):
            here = which == number
            if here.any():
                found[here] = file.read((rows[here] - ends[number] + file.shape[0]).numpy())
        return found

    def whole(self) -> Tensor:
        """Every row, in memory."""
        fits(self.nbytes, LIMIT, "this step needs the whole of a memory-mapped column, which")
        return self.read(slice(None))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.__getitem__ and isinstance(args[0], Rows) and _one(args[1]):
            return args[0].read(args[1])
        if func is torch.cat and len(args) == 1 and not kwargs and all(isinstance(part, Rows) for part in args[0]):
            return _join(args[0])
        args, kwargs = tree_map(lambda item: item.whole() if isinstance(item, Rows) else item, (tuple(args), kwargs))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # torch's own code comes by this way


def _one(index: Any) -> bool:
    """Whether an index chooses rows and nothing else."""
    return isinstance(index, slice | int) or (type(index) is Tensor and index.dim() <= 1)


def _join(parts: Sequence[Rows]) -> Rows:
    """Parts one after the other, each file once."""
    first = parts[0]
    if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype for part in parts):
        raise RuntimeError("memory-mapped columns of unequal shape or type cannot be joined")
    files = list(dict.fromkeys(file for part in parts for file in part._files))
    starts = dict(zip(files, np.cumsum([0, *(file.shape[0] for file in files)]).tolist(), strict=False))
    rows = []
    for part in parts:
        ends = torch.tensor([file.shape[0] for file in part._files]).cumsum(0)
        shift = torch.tensor([starts[file] for file in part._files]) - ends.roll(1).index_fill(0, torch.tensor(0), 0)
        rows.append(part._rows + shift[torch.bucketize(part._rows.contiguous(), ends, right=True)])
    return Rows(files, torch.cat(rows))
