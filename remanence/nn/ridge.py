"""A ridge head in closed form: rows go in and come out by adding and subtracting sums, and so exactly.

    W = argmin |Phi W - Y|^2 + gamma |W|^2 = R Phi'Y        R = (Phi'Phi + gamma I)^{-1}        Y one-hot

Two forms of the same numbers. :class:`RidgeHead`, the state, keeps the sums Phi'Phi and Phi'Y. :func:`taken_in` and
:func:`taken_out` move R and W themselves, block by block. The sums are the state because a row is added and taken off in
one rounding, whatever came before, and a column may come or go; R drifts with every update and can lose its
definiteness for good. Solving costs a Cholesky factor of (dim, dim) after a change; R saves that, where blocks are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.nn.anatomy import evaluating, features

#: Rows that go through the network, or into R, at a time.
FORWARD, BLOCK = 64, 512


class RidgeHead:
    """Holder of Phi'Phi (dim, dim) and Phi'Y (dim, labels) in float64, and of the ids behind every column.

    Sums are additive: order and chunks do not matter, and a row that is removed leaves what a head without it would have,
    to rounding (:meth:`rounding`). Every row has an id, which counts once: adding it again changes nothing, and an id that
    was never added cannot be removed. gamma: the ridge; it is added when solving and is no part of the state.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        if not gamma > 0:
            raise BadInput(f"gamma must be above 0, got {gamma}")
        self.gamma = float(gamma)
        self._ids: dict[int, Ids] = {}  # label -> ids, in the order of the columns
        self._gram: Tensor
        self._cross: Tensor
        self._solved: Tensor | None = None
        self._resize(0)

    # -- writing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Count rows in: features (B, dim), integer labels (B,), ids (B,) int64. A new label gets a column."""
        self._check(features, labels, ids)
        fresh = self._fresh(ids)
        features, labels, ids = features[fresh], labels[fresh], ids[fresh]
        if not len(labels):
            return
        if not self.dim:
            self._resize(features.shape[1], features.device)
        new = sorted(set(labels.tolist()) - self._ids.keys())
        if new:
            self._cross = torch.cat([self._cross, self._cross.new_zeros(self.dim, len(new))], dim=1)
            self._ids.update({label: Ids() for label in new})
        gram, cross = self._sums(features, labels)
        self._gram += gram
        self._cross += cross
        self._solved = None
        for label in set(labels.tolist()):
            self._ids[label] = self._ids[label] | Ids(ids[labels == label])

    @torch.no_grad()
    def remove(self, features: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Take out rows that were added with exactly these features; a column without rows is dropped.

        Raises:
            BadInput: an id was not added under this label, or is named twice; or the features are not those that were added:
                then what is left may have no positive definite Gram matrix, which is so just when the smallest eigenvalue of
                I - Phi_u R Phi_u' is not above 0. Nothing has changed then.
        """
        self._check(features, labels, ids)
        for label in set(labels.tolist()):
            mine = ids[labels == label]
            if len(Ids(mine)) < len(mine) or not Ids(mine) <= self._ids.get(label, Ids()):
                raise BadInput(f"label {label}: an id to remove was not added, or is named twice")
        if not len(labels):
            return
        left = {label: held - Ids(ids[labels == label]) for label, held in self._ids.items()}
        gram, cross = self._sums(features, labels)
        gram, cross = self._gram - gram, self._cross - cross
        if int(torch.linalg.cholesky_ex(self._ridged(gram)).info):
            raise BadInput("the rows to remove do not have the features with which they were added")
        self._gram.copy_(gram if any(left.values()) else torch.zeros_like(gram))  # in place: the old bytes go
        kept = [at for at, held in enumerate(left.values()) if held]
        self._cross.zero_()
        self._cross, self._ids = cross[:, kept], {label: held for label, held in left.items() if held}
        self._solved = None

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """Feature size; 0 before the first row."""
        return int(self._gram.shape[0])

    @property
    def labels(self) -> list[int]:
        """Labels with at least one row, in the order of the columns."""
        return list(self._ids)

    @property
    def ids(self) -> Ids:
        """Every id counted in."""
        total = Ids()
        for ids in self._ids.values():
            total = total | ids
        return total

    def counts(self) -> list[int]:
        """Rows of each label."""
        return [len(ids) for ids in self._ids.values()]

    def gram(self) -> Tensor:
        """(dim, dim) Phi'Phi + gamma I, whose inverse is R."""
        return self._ridged(self._gram)

    def cross(self) -> Tensor:
        """(dim, len(labels)) Phi'Y."""
        return self._cross.clone()

    @torch.no_grad()
    def weights(self) -> Tensor:
        """(dim, len(labels)) W, solved anew after a change; not to be written to."""
        if self._solved is None:
            self._solved = torch.cholesky_solve(self._cross, torch.linalg.cholesky(self.gram()))
        return self._solved

    def rounding(self) -> float:
        """About how far W is from exact arithmetic, relative to itself: eps times a bound on the condition number of the Gram
        matrix."""
        return float(torch.finfo(torch.float64).eps * (1 + self._gram.trace() / self.gamma))

    # -- holder --------------------------------------------------------------------------------------------------------

    def holds(self, ids: Ids) -> Ids:
        """Which of these are counted in."""
        return self.ids & ids

    def purge(self, ids: Ids) -> None:
        """If any of these are in it, drop everything: a sum cannot be unmixed without its rows, for which there is
        :meth:`remove`."""
        if self.holds(ids):
            self._gram.zero_()
            self._cross.zero_()
            self._ids, self._solved = {}, None
            self._resize(0)

    def bytes(self) -> int:
        """Bytes of the sums and ids."""
        return int(self._gram.nbytes + self._cross.nbytes) + sum(8 * len(ids) for ids in self._ids.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors and JSON values, labels in the order of the columns."""
        ids = {str(label): torch.from_numpy(held.array.copy()) for label, held in self._ids.items()}
        return {"labels": self.labels, "gram": self._gram, "cross": self._cross, "ids": ids}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; tensors are copied."""
        self._ids = {int(label): Ids(state["ids"][str(label)]) for label in state["labels"]}
        self._gram, self._cross, self._solved = state["gram"].clone(), state["cross"].clone(), None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _resize(self, dim: int, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._cross = torch.zeros(dim, 0, dtype=torch.float64, device=device)

    def _ridged(self, gram: Tensor) -> Tensor:
        ridged = gram.clone()
        ridged.diagonal().add_(self.gamma)
        return ridged

    def _sums(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Phi'Phi and Phi'Y of some rows, whose labels have columns."""
        phi = features.detach().to(self._gram.device, torch.float64)
        column = {label: at for at, label in enumerate(self._ids)}
        at = torch.tensor([column[label] for label in labels.tolist()], device=phi.device)
        # A product with the one-hot matrix, not a scatter: the same bits on every run, on GPUs too.
        return phi.T @ phi, phi.T @ torch.nn.functional.one_hot(at, len(column)).to(phi)

    def _fresh(self, ids: Tensor) -> Tensor:
        """(B,) True for the first row of every id that is not counted in yet."""
        numbers = ids.cpu().numpy()
        fresh = np.zeros(len(numbers), dtype=bool)
        fresh[np.unique(numbers, return_index=True)[1]] = True
        for held in self._ids.values():
            fresh &= ~held.isin(numbers)
        return torch.from_numpy(fresh).to(ids.device)

    def _check(self, features: Tensor, labels: Tensor, ids: Tensor) -> None:
        if features.dim() != 2 or self.dim not in (0, features.shape[1]):
            raise BadInput(f"features must be (B, {self.dim or 'dim'}), got {tuple(features.shape)}")
        if labels.shape != features.shape[:1] or labels.dtype.is_floating_point:
            raise BadInput(f"labels must be ({features.shape[0]},) integers, got {labels.dtype} {tuple(labels.shape)}")
        if ids.shape != labels.shape:
            raise BadInput(f"ids must be ({features.shape[0]},), got {tuple(ids.shape)}")


# -- R and W themselves ------------------------------------------------------------------------------------------------


@torch.no_grad()
def taken_in(inverse: Tensor, weights: Tensor, phi: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """R (dim, dim) and W (dim, C) after rows phi (n, dim) with targets (n, C) came in, by Woodbury, in blocks.

    R <- R - R Phi'(I + Phi R Phi')^{-1} Phi R;        W <- W + R_new Phi'(Y - Phi W)
    """
    for rows, y in zip(phi.split(BLOCK), targets.split(BLOCK), strict=True):
        spread = rows @ inverse
        inner = torch.eye(len(rows)).to(phi) + spread @ rows.T
        inverse = inverse - spread.T @ torch.linalg.solve(inner, spread)
        weights = weights + inverse @ rows.T @ (y - rows @ weights)
    return inverse, weights


@torch.no_grad()
def taken_out(inverse: Tensor, weights: Tensor, phi: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """R and W before rows phi with targets came in, whatever came since, in blocks.

    R <- R + R Phi'(I - Phi R Phi')^{-1} Phi R;        W <- W - R_new Phi'(Y - Phi W)

    Raises:
        BadInput: the smallest eigenvalue of I - Phi R Phi' is not above 0, so these rows were not in. A few rows that never were may
            pass: keep the ids.
    """
    for rows, y in zip(phi.split(BLOCK), targets.split(BLOCK), strict=True):
        spread = rows @ inverse
        inner = torch.eye(len(rows)).to(phi) - spread @ rows.T
        smallest = float(torch.linalg.eigvalsh(inner)[0])
        if not smallest > 0:
            raise BadInput(
                f"these rows were never taken in: the smallest eigenvalue of I - Phi R Phi' is {smallest:.3g}"
            )
        inverse = inverse + spread.T @ torch.linalg.solve(inner, spread)
        weights = weights - inverse @ rows.T @ (y - rows @ weights)
    return inverse, weights


# -- features that do not depend on their batch ------------------------------------------------------------------------


def steady_features(model: nn.Module, x: Tensor) -> Tensor:
    """`features` (B, D) of x (B, ...) in eval mode, the same bits for a row in whatever batch it comes: rows go through the network in
    batches of one fixed size, the last filled up. (Else float32 differs in its last digit with the size of the batch.)"""
    found = []
    with evaluating(model):
        for part in x.split(FORWARD):
            full = torch.cat([part, part.new_zeros(FORWARD - len(part), *part.shape[1:])])
            found.append(features(model, full)[: len(part)])
    return torch.cat(found)
