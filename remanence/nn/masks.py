"""Update masks: which entries of the weights may move, and the guarantee that the others do not.

Masking a gradient is not enough: momentum, Adam's moments and weight decay move a weight whose gradient is zero.
:class:`Restore` therefore puts the masked-out entries back after the optimizer step, bit for bit. Masks that are made
anew for every step do the same in two halves: :func:`mask_gradients` before the step, so that the optimizer's moments
see only what may move, and :func:`undo_masked` after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from remanence.core.errors import BadInput, NotFinite
from remanence.core.packing import packed
from remanence.core.problem import Batch, CausalLM, Problem


def top_fraction(scores: Mapping[str, Tensor], rho: float) -> dict[str, Tensor]:
    """The entries whose score is among the highest share ``rho`` of all entries of all tensors together.

    scores: {name: tensor of any shape} on one device; signed scores are ranked as they are (take ``abs`` first for
    saliency). rho in [0, 1].
    Returns {name: bool tensor of the same shape} with exactly ``int(rho * N)`` True, N the number of all entries. Among
    equal scores the earlier entry wins (order of the mapping, then row-major), so the result never depends on the sort.
    Raises BadInput, and NotFinite if a score is NaN.
    """
    if not 0.0 <= rho <= 1.0:
        raise BadInput(f"rho must be in [0, 1], got {rho}")
    return top_entries(scores, int(rho * sum(score.numel() for score in scores.values())))


def top_entries(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """:func:`top_fraction` with the number of entries in place of their share."""
    if not scores:
        return {}
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    if bool(torch.isnan(flat).any()):
        raise NotFinite("a score is NaN: no ranking exists")
    count = flat.numel()
    if not 0 <= keep <= count:
        raise BadInput(f"keep must be in [0, {count}], got {keep}")
    if keep in (0, count):
        chosen = torch.full((count,), keep > 0, dtype=torch.bool, device=flat.device)
    else:
        border = torch.kthvalue(flat, count - keep + 1).values  # the smallest score that is still in
        chosen = flat > border
        ties = torch.nonzero(flat == border).squeeze(1)
        chosen[ties[: keep - int(chosen.sum())]] = True
    parts = torch.split(chosen, [score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def above_quantile(scores: Tensor, tau: float) -> Tensor:
    """Which of `scores` (n,) are at least their `tau` quantile, tau in [0, 1]: (n,) bool; all that are equal to it are in.

    0 keeps all, 1 the largest. The same as comparing with an interpolated quantile, for no score lies between two that are
    neighbours; n is not limited.
    """
    at = math.ceil(tau * (scores.numel() - 1) - 1e-9)
    return scores >= torch.kthvalue(scores, at + 1).values


def token_places(problem: Problem, batch: Batch) -> Tensor | None:
    """Which places of the forward of a batch of text hold a token, and no padding: (rows, places) bool as the forward lays
    them out; None where there is no text."""
    if not isinstance(problem, CausalLM) or "attention_mask" not in batch:
        return None
    there = batch["attention_mask"]
    if not problem.packing:
        return there
    ids, at, _ = packed(batch, there)
    return torch.zeros(ids.shape, dtype=torch.bool, device=ids.device).index_put(at, there.new_ones(()))


@torch.no_grad()
def mask_gradients(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Make the gradient of masked-out entries zero, in place. masks: {name: bool tensor that broadcasts to the
    parameter}, True where the entry may move; parameters without one, or without a gradient, are left alone."""
    for name, mask in masks.items():
        param = params.get(name)
        if param is not None and param.grad is not None:
            param.grad.mul_(mask)


@torch.no_grad()
def undo_masked(params: Mapping[str, Tensor], before: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Give masked-out entries their value in `before` back, in place and bit for bit; masks as in
    :func:`mask_gradients`."""
    for name, mask in masks.items():
        if name in params:
            params[name].copy_(torch.where(mask, params[name], before[name]))


class Restore:
    """Keeps the masked-out entries of parameters bit-unchanged: ``save()`` before the optimizer step, ``restore()``
    after it.

    params: {name: parameter}; masks: {name: bool tensor of the parameter's shape}, True where the entry may move.
    Parameters without a mask move freely.
    The values are saved once on construction, so a loop in which nothing else moves the weights needs ``restore()``
    only.
    Only masked-out entries are kept (value and, where the mask is mixed, position).
    """

    def __init__(self, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        self._kept: list[
            tuple[Tensor, Tensor | None]
        ] = []  # the parameter; positions of the fixed entries in row-major order, None = all of them
        self._values: list[Tensor] = []
        for name, mask in masks.items():
            if name not in params:
                raise BadInput(f"a mask names {name!r}, which is no parameter here")
            param = params[name]
            if mask.shape != param.shape or mask.dtype != torch.bool:
                raise BadInput(
                    f"mask of {name!r} must be bool {tuple(param.shape)}, got {mask.dtype} {tuple(mask.shape)}"
                )
            fixed = torch.nonzero(~mask.to(param.device).reshape(-1)).squeeze(1)
            if fixed.numel():
                self._kept.append((param, None if fixed.numel() == param.numel() else fixed))
        self.save()

    @torch.no_grad()
    def save(self) -> None:
        """Take the masked-out entries as they are now for the values to keep."""
        self._values = [p.detach().clone() if at is None else p.detach().reshape(-1)[at] for p, at in self._kept]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the saved values back, in place. Entries with a True mask are not written."""
        for (param, at), value in zip(self._kept, self._values, strict=True):
            if at is None:
                param.copy_(value)
            elif param.is_contiguous():
                param.view(-1)[at] = value
            else:
                param.copy_(param.reshape(-1).index_copy(0, at, value).view(param.shape))

    def bytes(self) -> int:
        """Bytes of the saved values and their positions."""
        positions = sum(at.numel() * at.element_size() for _, at in self._kept if at is not None)
        return positions + sum(v.numel() * v.element_size() for v in self._values)
