"""Computed values that remember examples: per-class sums that can be taken back exactly, and a value that knows which
ids it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.ids import Ids

Value = Tensor | dict[str, Tensor]


class ClassStatistics:
    """Holder of n, sum and optionally the sum of outer products of features per label.

    Sums are additive, so the order and the chunks in which rows come do not matter (to rounding: 1e-12 relative in
    float64), and a row that is removed leaves what a life without it would have (to rounding). dim: feature size; None:
    that of the first rows added, or of a loaded state. second_order: keep (dim, dim) per label too. dtype: of the sums;
    features are cast to it.

    Rows come with ids or without. An id counts once per label: adding it again changes nothing. Rows without ids cannot
    be told apart later, so a class with such rows answers ``holds`` with every id asked for.
    ``source``: optional callable ``ids -> (features (n, dim), labels (n,))`` through which :meth:`purge` takes single
    rows back; it is not saved with the state.
    """

    def __init__(self, dim: int | None = None, second_order: bool = False, dtype: torch.dtype = torch.float64) -> None:
        if dim is not None and dim < 1:
            raise BadInput(f"dim must be at least 1, got {dim}")
        self.second_order, self.dtype, self._given = second_order, dtype, dim
        self.source: Callable[[Ids], tuple[Tensor, Tensor]] | None = None
        self._row: dict[int, int] = {}  # label -> row of the sums
        self._ids: dict[int, Ids] = {}
        self._n = torch.zeros(0, dtype=torch.int64)
        self._empty(dim or 0)

    @property
    def dim(self) -> int:
        """Feature size; 0 while it is not known yet."""
        return int(self._sum.shape[1])

    # -- writing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Count rows in. features (B, dim), labels (B,) raw integer labels, ids (B,) int64 or None."""
        if self.dim == 0 and features.dim() == 2:
            self._empty(features.shape[1])
        self._check(features, labels, ids)
        if ids is not None:
            fresh = self._fresh(labels, ids)
            features, labels, ids = features[fresh], labels[fresh], ids[fresh]
        if not len(labels):
            return
        self._grow(sorted(set(labels.tolist()) - self._row.keys()), features.device)
        self._move(features, labels, sign=1)
        if ids is not None:
            for label in set(labels.tolist()):
                self._ids[label] = self._ids[label] | Ids(ids[labels == label])

    @torch.no_grad()
    def remove(self, features: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Take rows back that were added with exactly these features; a class without rows left is dropped. Raises
        BadInput if more rows go than came, a label is unknown, or an id was never added."""
        self._check(features, labels, ids)
        for label in set(labels.tolist()):
            at = labels == label
            if label not in self._row or int(at.sum()) > int(self._n[self._row[label]]):
                raise BadInput(f"label {label}: more rows to remove than were added")
            if ids is not None and (len(Ids(ids[at])) < int(at.sum()) or not Ids(ids[at]) <= self._ids[label]):
                raise BadInput(f"label {label}: an id to remove was not added, or is named twice")
        if not len(labels):
            return
        self._move(features, labels, sign=-1)
        for label in set(labels.tolist()):
            if ids is not None:
                self._ids[label] = self._ids[label] - Ids(ids[labels == label])
            if int(self._n[self._row[label]]) == 0:
                self.drop(label)

    def drop(self, label: int) -> None:
        """Forget a class: its row is overwritten and taken out. Unknown labels are ignored."""
        row = self._row.pop(label, None)
        if row is None:
            return
        del self._ids[label]
        keep = [at for at in range(len(self._n)) if at != row]
        self._row = {name: at - (at > row) for name, at in self._row.items()}
        for name in ("_n", "_sum", "_outer"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, old[keep])  # a copy
                old.zero_()

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> list[int]:
        """Labels with at least one row, in the order in which they first came."""
        return list(self._row)

    def counts(self, labels: Sequence[int] | None = None) -> Tensor:
        """(len(labels),) int64 numbers of rows."""
        found: Tensor = self._n[self._rows(labels)]
        return found

    def sums(self, labels: Sequence[int] | None = None) -> Tensor:
        """(len(labels), dim) sums."""
        found: Tensor = self._sum[self._rows(labels)]
        return found

    def means(self, labels: Sequence[int] | None = None) -> Tensor:
        """(len(labels), dim) class means, in the order of ``labels`` (None: all). Raises BadInput for a label without
        rows."""
        rows = self._rows(labels)
        means: Tensor = self._sum[rows] / self._n[rows].to(self.dtype).unsqueeze(1)
        return means

    def outer(self, labels: Sequence[int] | None = None) -> Tensor:
        """(len(labels), dim, dim) sums of z z'. Raises BadInput unless ``second_order``."""
        if self._outer is None:
            raise BadInput("these statistics keep no second moments; pass second_order=True")
        found: Tensor = self._outer[self._rows(labels)]
        return found

    def covariances(self, labels: Sequence[int] | None = None) -> Tensor:
        """(len(labels), dim, dim) class covariances, divided by n (not n - 1)."""
        mean, n = self.means(labels), self.counts(labels).to(self.dtype)
        return self.outer(labels) / n[:, None, None] - mean.unsqueeze(2) * mean.unsqueeze(1)

    @property
    def ids(self) -> Ids:
        """Every id counted in."""
        total = Ids(None)
        for ids in self._ids.values():
            total = total | ids
        return total

    # -- holder --------------------------------------------------------------------------------------------------------

    def holds(self, ids: Ids) -> Ids:
        """Which of these are counted in; all of them if a class has rows without ids."""
        anonymous = any(int(self._n[row]) > len(self._ids[label]) for label, row in self._row.items())
        return ids if anonymous else self.ids & ids

    def purge(self, ids: Ids) -> None:
        """Take the rows of these ids back. A class all of whose rows go is dropped; others are reduced through
        ``source``, and without a source dropped too (a sum cannot be unmixed without its rows). Classes with rows
        without ids are dropped."""
        for label in self.labels:
            mine = self._ids[label] & ids
            anonymous = int(self._n[self._row[label]]) > len(self._ids[label])
            if (ids and anonymous) or (mine and (len(mine) == len(self._ids[label]) or self.source is None)):
                self.drop(label)
        left = self.ids & ids
        if left and self.source is not None:
            features, labels = self.source(left)
            self.remove(features, labels, torch.from_numpy(left.array.copy()))

    def bytes(self) -> int:
        """Bytes of the sums, counts and ids."""
        tensors = [self._n, self._sum] + ([] if self._outer is None else [self._outer])
        return int(sum(t.nbytes for t in tensors)) + sum(8 * len(ids) for ids in self._ids.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors and JSON values, labels in order of first arrival."""
        order = sorted(self._row, key=self._row.__getitem__)
        ids = {str(label): torch.from_numpy(self._ids[label].array.copy()) for label in order}
        state: dict[str, Any] = {"labels": order, "n": self._n, "sum": self._sum, "ids": ids}
        return state if self._outer is None else {**state, "outer": self._outer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; tensors are copied. Raises BadInput if the sizes do not fit."""
        if self._given not in (None, state["sum"].shape[1]) or ("outer" in state) != self.second_order:
            raise BadInput(
                f"state of dim {state['sum'].shape[1]} does not fit statistics of dim {self.dim}, "
                f"second_order={self.second_order}"
            )
        self._row = {int(label): row for row, label in enumerate(state["labels"])}
        self._ids = {int(label): Ids(ids) for label, ids in state["ids"].items()}
        self._n, self._sum = state["n"].clone(), state["sum"].to(self.dtype, copy=True)
        self._outer = state["outer"].to(self.dtype, copy=True) if self.second_order else None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _empty(self, dim: int) -> None:
        self._sum = torch.zeros(0, dim, dtype=self.dtype)
        self._outer = torch.zeros(0, dim, dim, dtype=self.dtype) if self.second_order else None

    def _check(self, features: Tensor, labels: Tensor, ids: Tensor | None) -> None:
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise BadInput(f"features must be (B, {self.dim}), got {tuple(features.shape)}")
        if labels.shape != features.shape[:1] or labels.dtype.is_floating_point:
            raise BadInput(f"labels must be ({features.shape[0]},) integers, got {labels.dtype} {tuple(labels.shape)}")
        if ids is not None and ids.shape != labels.shape:
            raise BadInput(f"ids must be ({features.shape[0]},), got {tuple(ids.shape)}")

    def _fresh(self, labels: Tensor, ids: Tensor) -> Tensor:
        """(B,) True for the first row of every (label, id) that is not counted in yet."""
        fresh = torch.zeros(len(ids), dtype=torch.bool)
        for label in set(labels.tolist()):
            rows = torch.nonzero(labels.cpu() == label).squeeze(1)
            _, inverse = torch.unique(ids.cpu()[rows], return_inverse=True)
            first = torch.full((int(inverse.max()) + 1,), len(ids)).scatter_reduce(0, inverse, rows, "amin")
            fresh[first] = True
            if label in self._ids:
                fresh[rows] &= ~torch.from_numpy(self._ids[label].isin(ids.cpu()[rows].numpy()))
        return fresh.to(labels.device)

    def _grow(self, labels: list[int], device: torch.device) -> None:
        for label in labels:
            self._row[label], self._ids[label] = len(self._row), Ids(None)
        if not labels:
            return
        for name in ("_n", "_sum", "_outer"):
            old = getattr(self, name)
            if old is not None:
                setattr(
                    self,
                    name,
                    torch.cat(
                        [old.to(device), torch.zeros(len(labels), *old.shape[1:], dtype=old.dtype, device=device)]
                    ),
                )
                old.zero_()

    def _move(self, features: Tensor, labels: Tensor, sign: int) -> None:
        z = features.detach().to(self._sum.device, self.dtype)
        present, inverse = torch.unique(labels.to(z.device), return_inverse=True)
        rows = torch.tensor([self._row[label] for label in present.tolist()], device=z.device)
        # A product with the one-hot matrix, not a scatter: the same bits on every run, on GPUs too.
        hot = torch.nn.functional.one_hot(inverse, len(present)).to(self.dtype)
        self._n[rows] += sign * hot.sum(dim=0).to(torch.int64)
        self._sum[rows] += sign * (hot.T @ z)
        if self._outer is not None:
            for at, row in enumerate(rows.tolist()):
                mine = z[inverse == at]
                self._outer[row] += sign * (mine.T @ mine)

    def _rows(self, labels: Sequence[int] | None) -> Tensor:
        wanted = self.labels if labels is None else [int(label) for label in labels]
        missing = [label for label in wanted if label not in self._row]
        if missing:
            raise BadInput(f"no rows of label {missing[0]} were counted in")
        return torch.tensor([self._row[label] for label in wanted], dtype=torch.int64, device=self._sum.device)


class Statistic:
    """Holder of one computed value and the ids it came from.

    value: a tensor, {name: tensor}, or None (nothing). ids: every example it depends on, also through the weights that
    computed it.
    recompute: optional callable ``remaining ids -> value``, used by :meth:`purge`; it is not saved with the state.
    """

    def __init__(
        self, value: Value | None = None, ids: Ids | None = None, recompute: Callable[[Ids], Value] | None = None
    ) -> None:
        self.value = value
        self.ids = Ids(None) if ids is None else ids
        self.recompute = recompute

    def holds(self, ids: Ids) -> Ids:
        """Which of these the value came from."""
        return self.ids & ids

    def purge(self, ids: Ids) -> None:
        """If any of these is in it: compute the value again from the ids that remain, or, without a ``recompute`` or
        with none left, drop it to None."""
        if not self.holds(ids):
            return
        left = self.ids - ids
        if left and self.recompute is not None:
            self.value, self.ids = self.recompute(left), left
        else:
            self.value, self.ids = None, Ids(None)

    def bytes(self) -> int:
        """Bytes of the tensors of the value."""
        tensors = (
            [] if self.value is None else [self.value] if isinstance(self.value, Tensor) else list(self.value.values())
        )
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Value and ids as tensors."""
        return {
            "value": dict(self.value) if isinstance(self.value, dict) else self.value,
            "ids": torch.from_numpy(self.ids.array.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; tensors are copied."""
        value = state["value"]
        self.value = (
            {k: v.clone() for k, v in value.items()}
            if isinstance(value, Mapping)
            else None
            if value is None
            else value.clone()
        )
        self.ids = Ids(state["ids"])
