"""A store of example rows with a limit: reservoir or class-balanced, drawn from, evicted from, and purged without stale
bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import TOKENS, padded

POLICIES = ("reservoir", "class-balanced")


class Buffer:
    """Holder of records: rows of named columns (``x``, ``y`` raw integer label, ``id``, any extra such as ``logits``)
    in preallocated tensors.

    policy ``reservoir``: at most ``capacity`` rows, a uniform sample of every row ever offered (Vitter's algorithm R,
    1985).
    policy ``class-balanced``: a reservoir per label; its share is ``per_class`` rows, or ``capacity`` split evenly over
    the labels seen (shares differ by at most one), or the smaller of the two where both are given. When a new label
    arrives the others give up rows, drawn uniformly.

    A row whose id is in the buffer is not added twice and not counted as offered again. Rows taken out by :meth:`evict`
    or :meth:`purge` free room, which the next rows offered fill at once: until then the sample leans toward what comes
    next, and the count of rows offered is scaled down in proportion.

    Every draw depends on the generator passed in and on nothing else. Columns live on the device of the first rows
    added. Rows are written in place, and a row that leaves is overwritten with zeros, so no byte of it stays in the
    storage.
    """

    def __init__(self, capacity: int | None = None, per_class: int | None = None, policy: str = "reservoir") -> None:
        if policy not in POLICIES:
            raise BadInput(f"policy must be one of {POLICIES}, got {policy!r}")
        if any(size is not None and size < 0 for size in (capacity, per_class)):
            raise BadInput(f"capacity and per_class must be at least 0, got {capacity} and {per_class}")
        if policy == "reservoir" and (capacity is None or per_class is not None):
            raise BadInput("a reservoir needs capacity and takes no per_class; use policy='class-balanced'")
        if capacity is None and per_class is None:
            raise BadInput("a class-balanced buffer needs capacity, per_class or both")
        self.capacity, self.per_class, self.policy = capacity, per_class, policy
        self._columns: dict[str, Tensor] = {}  # (rows allocated, ...) each; rows 0 .. len - 1 are live
        self._size = 0
        self._offered: dict[int, int] = {}  # rows offered per group: per label, or all of them under group 0
        self._even: _Even | None = None  # for balanced draws; made anew after rows came or went

    # -- writing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, columns: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Offer B rows, in order. columns: {name: (B, ...)} with at least ``id`` (and ``y`` where the policy looks at it), the
        same names, dtypes and row shapes every time; rows of text may differ in length, and are kept as wide as the longest.

        Returns (B,) bool, True for the rows that are in the buffer now because of this call. Raises BadInput.
        """
        columns = self._fitted(columns)
        rows = self._check(columns)
        kept = torch.zeros(rows, dtype=torch.bool)
        fresh = self._fresh(columns["id"].cpu())
        if not len(fresh):
            return kept
        groups = (
            columns["y"].cpu()[fresh] if self.policy == "class-balanced" else torch.zeros(len(fresh), dtype=torch.int64)
        )
        labels = sorted(set(groups.tolist()))
        if self.policy == "class-balanced":
            for label in labels:
                self._offered.setdefault(label, 0)
            self._shrink(generator)
        targets = torch.full(
            (len(fresh),), -1, dtype=torch.int64
        )  # the live row each offered row goes to; beyond the live rows: appended
        grown = self._size
        home = self._groups()
        for label in labels:
            mine = torch.nonzero(groups == label).squeeze(1)
            here = torch.nonzero(home == label).squeeze(1)
            slots, taken = self._reservoir(label, len(mine), len(here), generator)
            table = torch.cat([here, torch.arange(grown, grown + taken)])
            grown += taken
            targets[mine] = torch.where(slots >= 0, table[slots.clamp(min=0)], slots) if len(table) else slots
        source, target = _last_wins(targets)
        self._allocate(columns, grown)
        device = self._columns["id"].device
        for name, column in self._columns.items():
            value = columns[name].detach()
            column[target.to(device)] = value[fresh[source].to(value.device)].to(device)
        self._size, self._even = grown, None
        kept[fresh[source]] = True
        return kept

    def evict(self, ids: Ids) -> None:
        """Take the rows of these ids out. The last live rows move into the gaps; the rows left behind are overwritten
        with zeros."""
        if self._size:
            self._remove(torch.from_numpy(ids.isin(self._columns["id"][: self._size].cpu().numpy())), scale=True)

    def replace(self, name: str, values: Tensor) -> None:
        """Set a column of all live rows, in their present order: (len, ...) of any row shape (stored logits after the
        head grew, or made anew by new weights).
        The old column is overwritten with zeros."""
        if name in ("id", "y"):
            raise BadInput(f"column {name!r} says which row is which and cannot be replaced")
        if len(values) != self._size:
            raise BadInput(f"column {name!r} needs {self._size} rows, got {len(values)}")
        if not self._columns:
            return
        column = torch.zeros(self.allocated, *values.shape[1:], dtype=values.dtype, device=self._columns["id"].device)
        column[: self._size] = values.detach()
        if name in self._columns:
            self._columns[name].zero_()
        self._columns[name] = column

    # -- reading -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._size

    @property
    def allocated(self) -> int:
        """Rows for which there is storage."""
        return len(self._columns["id"]) if self._columns else 0

    @property
    def columns(self) -> dict[str, Tensor]:
        """All live rows: {name: (len, ...)}, views that change with the buffer. Do not write to them."""
        return {name: column[: self._size] for name, column in self._columns.items()}

    @property
    def offered(self) -> int:
        """How many rows were offered so far, less the share of those taken out."""
        return sum(self._offered.values())

    def draw(self, n: int, generator: torch.Generator, balanced: bool = False) -> dict[str, Tensor]:
        """min(n, len) rows without replacement, uniform, in random order; an empty dict from an empty buffer.

        balanced: as equal a number of rows per label as there are rows for; which labels get one more is drawn, and the
        rows come in random order too.
        """
        if not self._columns:
            return {}
        rows = self.rows(n, generator, balanced)
        return {name: column[rows.to(column.device)] for name, column in self._columns.items()}

    def rows(self, n: int, generator: torch.Generator, balanced: bool = False) -> Tensor:
        """The numbers (min(n, len),) of the rows that :meth:`draw` gives."""
        if n < 0:
            raise BadInput(f"cannot draw {n} rows")
        n = min(n, self._size)
        if balanced and n:
            if self._even is None:
                self._even = _Even(self._columns["y"][: self._size])
            return self._even.draw(n, generator)
        return _sample(n, self._size, generator)

    # -- holder --------------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> Ids:
        """Ids of the live rows."""
        return Ids(self._columns["id"][: self._size]) if self._columns else Ids(None)

    def holds(self, ids: Ids) -> Ids:
        """Which of these have a row here."""
        return self.ids & ids

    def purge(self, ids: Ids) -> None:
        """As :meth:`evict`: no byte of the rows stays in the storage. Which other rows were chosen may still depend on
        them."""
        self.evict(ids)

    def bytes(self) -> int:
        """Bytes of the storage really allocated, live or not."""
        return sum(column.untyped_storage().nbytes() for column in self._columns.values())

    def state_dict(self) -> dict[str, Any]:
        """Live rows, how many are allocated, and the counts of rows offered."""
        labels = list(self._offered)
        return {
            "columns": {name: column[: self._size].clone() for name, column in self._columns.items()},
            "allocated": self.allocated,
            "groups": labels,
            "offered": [self._offered[label] for label in labels],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; the buffer then goes on as the saved one would have."""
        allocated, self._columns, self._size, self._even = int(state["allocated"]), {}, 0, None
        for name, rows in state["columns"].items():
            if len(rows) > allocated:
                raise BadInput(f"column {name!r} has {len(rows)} rows where {allocated} are allocated")
            column = torch.zeros(allocated, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
            column[: len(rows)] = rows
            self._columns[name], self._size = column, len(rows)
        self._offered = {int(label): int(count) for label, count in zip(state["groups"], state["offered"], strict=True)}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _fitted(self, columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`columns` with rows of text as wide as those here, which are widened where they are narrower."""
        shared = [name for name in TOKENS if name in columns and name in self._columns]
        if not shared:
            return columns
        made = dict(columns)
        for name in shared:
            old, new = self._columns[name], columns[name]
            if old.shape[1] < new.shape[1]:
                self._columns[name] = padded(name, old, new.shape[1])
                self._columns[name][self._size :] = 0  # storage without a row is zeros, whatever padding is
                old.zero_()
            elif old.shape[1] > new.shape[1]:
                made[name] = padded(name, new, old.shape[1])
        return made

    def _check(self, columns: Mapping[str, Tensor]) -> int:
        needed = ("id",) if self.policy == "reservoir" else ("y", "id")  # a reservoir looks at no label
        if not set(needed) <= columns.keys():
            raise BadInput(
                f"rows need the columns {' and '.join(map(repr, needed))}, got {sorted(columns)}"
                + ("; texts have no classes: use policy='reservoir' with a capacity" if "input_ids" in columns else "")
            )
        rows = len(columns["id"])
        for name in needed:
            if columns[name].dim() != 1 or columns[name].dtype.is_floating_point:
                raise BadInput(
                    f"column {name!r} must be (B,) integers, got {columns[name].dtype} {tuple(columns[name].shape)}"
                )
        if self._columns and columns.keys() != self._columns.keys():
            raise BadInput(f"the buffer has columns {sorted(self._columns)}, got {sorted(columns)}")
        for name, value in columns.items():
            if len(value) != rows:
                raise BadInput(f"column {name!r} has {len(value)} rows, 'id' has {rows}")
            old = self._columns.get(name)
            if old is not None and (old.shape[1:] != value.shape[1:] or old.dtype != value.dtype):
                raise BadInput(
                    f"column {name!r} is {old.dtype} {tuple(old.shape[1:])} per row, "
                    f"got {value.dtype} {tuple(value.shape[1:])}"
                )
        return rows

    def _fresh(self, ids: Tensor) -> Tensor:
        """Positions, ascending, of the first row of every id that has no row here."""
        first = _first(ids)
        if self._size:
            live = self._columns["id"][: self._size].cpu()
            known = live[
                torch.from_numpy(Ids(ids).isin(live.numpy()))
            ]  # few offered in many live: the cheaper way round
            if len(known):
                first = first[~torch.isin(ids[first], known)]
        return first

    def _groups(self) -> Tensor:
        """(len,) the group of each live row."""
        if self.policy == "reservoir" or not self._size:
            return torch.zeros(self._size, dtype=torch.int64)
        return self._columns["y"][: self._size].cpu().to(torch.int64)

    def _share(self, label: int) -> int:
        """The most rows this group may have."""
        if self.policy == "reservoir":
            return self.capacity or 0
        if self.capacity is None:
            return self.per_class or 0
        order = list(self._offered).index(label)  # labels seen first get the odd rows
        share = self.capacity // len(self._offered) + (order < self.capacity % len(self._offered))
        return share if self.per_class is None else min(share, self.per_class)

    def _reservoir(self, label: int, count: int, live: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """Algorithm R for ``count`` rows offered in order to a group with ``live`` rows: (count,) the group's slot each
        goes to (-1: none), and the slots taken anew."""
        share = self._share(label)
        free = min(max(share - live, 0), count)
        slots = torch.full((count,), -1, dtype=torch.int64)
        slots[:free] = torch.arange(live, live + free)
        if count > free:
            # Row number t (from 1) takes a slot drawn from t; it is kept if the slot exists, which happens with
            # probability share / t.
            # t exceeds the share even where rows were taken out and the count scaled down.
            number = torch.arange(free + 1, count + 1, dtype=torch.float64) + max(self._offered.get(label, 0), live)
            drawn = (
                torch.rand(count - free, generator=generator, dtype=torch.float64, device=generator.device).cpu()
                * number
            ).floor()
            drawn = drawn.to(torch.int64)
            slots[free:] = torch.where(drawn < share, drawn, -1)
        self._offered[label] = max(self._offered.get(label, 0), live) + count
        return slots, free

    def _shrink(self, generator: torch.Generator) -> None:
        """Bring every label down to its share; which rows go is drawn."""
        if self.capacity is None or not self._size:
            return
        home, gone = self._groups(), torch.zeros(self._size, dtype=torch.bool)
        for label in self._offered:
            here = torch.nonzero(home == label).squeeze(1)
            surplus = len(here) - self._share(label)
            if surplus > 0:
                gone[here[_sample(surplus, len(here), generator)]] = True
        self._remove(
            gone, scale=False
        )  # the rows that stay are a uniform sample of all that were offered: the count stands

    def _remove(self, gone: Tensor, scale: bool) -> None:
        """Take out the live rows marked in gone (len,) bool."""
        if not bool(gone.any()):
            return
        if scale:
            home = self._groups()
            for label in set(home[gone].tolist()):
                here, out = int((home == label).sum()), int((gone & (home == label)).sum())
                self._offered[label] = round(max(self._offered[label], here) * (here - out) / here)
                if here == out:  # a label without rows gives its share back
                    del self._offered[label]
        left = self._size - int(gone.sum())
        holes = torch.nonzero(gone[:left]).squeeze(1)
        movers = torch.nonzero(~gone[left:]).squeeze(1) + left
        for column in self._columns.values():
            column[holes.to(column.device)] = column[movers.to(column.device)]
            column[left : self._size] = 0
        self._size, self._even = left, None

    def _allocate(self, columns: Mapping[str, Tensor], rows: int) -> None:
        """Storage for so many rows: the whole capacity at once, or, where only per_class is given, per_class rows per
        label seen."""
        if self.per_class is None:
            rows = self.capacity or 0
        else:
            wanted = self.per_class * len(self._offered)
            rows = max(rows, wanted if self.capacity is None else min(self.capacity, wanted))
        if self._columns and rows <= self.allocated:
            return
        device = (self._columns or columns)["id"].device
        for name, value in columns.items():
            new = torch.zeros(rows, *value.shape[1:], dtype=value.dtype, device=device)
            if name in self._columns:
                new[: self._size] = self._columns[name][: self._size]
                self._columns[name].zero_()  # the freed block must not keep the rows either
            self._columns[name] = new


def _first(values: Tensor) -> Tensor:
    """Positions, ascending, of the first occurrence of every value."""
    ordered, order = torch.sort(values, stable=True)
    new = torch.ones(len(values), dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new].sort().values


def _last_wins(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows that go to one slot the last stays, as if written one after the other: (positions, their slots), slots
    unique; -1 goes nowhere."""
    ordered, order = torch.sort(targets, stable=True)
    last = torch.ones(len(targets), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    last &= ordered >= 0
    return order[last], ordered[last]


def _sample(n: int, size: int, generator: torch.Generator) -> Tensor:
    """n of range(size) without replacement, in random order. Linear in n, not in size, where n is a small part."""
    device = generator.device
    if size <= 4096 or n * 16 > size:
        return torch.randperm(size, generator=generator, device=device)[:n].cpu()
    # The first n distinct values of independent uniform draws; 2 n draws hardly ever fall short.
    while True:
        drawn = torch.randint(size, (2 * n + 8,), generator=generator, device=device).cpu()
        distinct = drawn[_first(drawn)]
        if len(distinct) >= n:
            return distinct[:n]


class _Even:
    """Draws with labels as even as their rows allow: every label's rows are shuffled, then all first rows are taken, all
    second rows, and so on. What depends on the labels (n,) alone is computed once; numpy, as draws are small and many."""

    def __init__(self, labels: Tensor) -> None:
        present, self._group, counts = np.unique(labels.cpu().numpy(), return_inverse=True, return_counts=True)
        self._labels = len(present)
        self._rounds = np.concatenate([np.arange(count) for count in counts])  # of the rows in order of their labels

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        shuffled = _permutation(len(self._group), generator)
        group = self._group[shuffled]
        rank = np.empty_like(shuffled)
        rank[np.argsort(group, kind="stable")] = self._rounds
        turn = _permutation(self._labels, generator)  # who comes first within a round
        chosen = shuffled[np.argsort(rank * self._labels + turn[group])[:n]]
        return torch.from_numpy(chosen[_permutation(n, generator)])


def _permutation(n: int, generator: torch.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    return torch.randperm(n, generator=generator, device=generator.device).cpu().numpy()
