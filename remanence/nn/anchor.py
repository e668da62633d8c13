"""Anchored quadratic penalties: L2 toward earlier weights, EWC and its kin, with the gradient in closed form.

    penalty  = c * sum_j s_j (theta_j - theta*_j)^2          c = strength, or strength / 2 with ``half=True``
    gradient = 2 c s_j (theta_j - theta*_j)

One anchor and one stiffness stand for any number of tasks (:meth:`QuadraticAnchor.merge`), so a step costs the same
after ten tasks as after one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.ids import Ids


class QuadraticAnchor:
    """Holder of an anchor point and its stiffness.

    anchor: {name: tensor}, copied; empty (the default) anchors nothing. stiffness: {name: tensor of the anchor's
    shape}, copied; None means ones and costs no memory.
    strength: c above, >= 0. half: papers write EWC as ``lambda / 2 * sum F (..)^2`` (half=True) and plain L2 as
    ``lambda * sum (..)^2`` (half=False, the default).
    ids: the examples that made the weights of the anchor and the stiffness; kept up to date by the caller, who knows
    the lineage.

    A parameter that has grown since (new head rows) is anchored where the anchor has a value: the leading block of the
    anchor's shape. Anchored names that ``params`` lacks are skipped (a phase may train a part of the network). Raises
    BadInput where a parameter is smaller than its anchor.
    """

    #: Computed by weights, so it holds what they held; a keeper that has one must have `forgot`.
    derived = True

    def __init__(
        self,
        anchor: Mapping[str, Tensor] | None = None,
        stiffness: Mapping[str, Tensor] | None = None,
        strength: float = 1.0,
        half: bool = False,
        ids: Ids | None = None,
    ) -> None:
        if not strength >= 0:
            raise BadInput(f"strength must be at least 0, got {strength}")
        self.strength, self.half = float(strength), bool(half)
        self.anchor = {name: value.detach().clone() for name, value in (anchor or {}).items()}
        self.stiffness = (
            None if stiffness is None else {name: _stiff(stiffness, name, value) for name, value in self.anchor.items()}
        )
        self.ids = Ids(None) if ids is None else ids

    @property
    def factor(self) -> float:
        """c of the formula: strength, halved where asked."""
        return self.strength * 0.5 if self.half else self.strength

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor:
        """The penalty as a scalar (differentiable); zero where nothing is anchored. For reports: the loop should use
        :meth:`add_gradient`."""
        total: Tensor | None = None
        for name, param in params.items():
            if name in self.anchor:
                squared = (_old(name, param, self.anchor[name]) - self.anchor[name]).square()
                term = squared.sum() if self.stiffness is None else (squared * self.stiffness[name]).sum()
                total = term if total is None else total + term
        return torch.zeros(()) if total is None else total * self.factor

    @torch.no_grad()
    def add_gradient(self, params: Mapping[str, Tensor]) -> None:
        """Add the penalty's gradient to ``p.grad``, in place; a missing gradient starts from zero. Strength 0 writes
        nothing. Frozen parameters are left alone."""
        if self.strength == 0:
            return
        names = [name for name, param in params.items() if name in self.anchor and param.requires_grad]
        if not names:
            return
        grads: list[Tensor] = []
        for name in names:
            param = params[name]
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            grads.append(_old(name, param.grad, self.anchor[name]))
        away = torch._foreach_sub(
            [_old(name, params[name], self.anchor[name]) for name in names], [self.anchor[name] for name in names]
        )
        if self.stiffness is None:
            torch._foreach_mul_(away, 2.0 * self.factor)  # first, so that a stiffness of ones gives the bits of none
            torch._foreach_add_(grads, away)
        else:
            torch._foreach_addcmul_(grads, away, [self.stiffness[name] for name in names], value=2.0 * self.factor)

    def merge(
        self,
        params: Mapping[str, Tensor],
        stiffness: Mapping[str, Tensor] | None = None,
        decay: float = 1.0,
        ids: Ids | None = None,
    ) -> None:
        """Move the anchor to the values of ``params`` and make the stiffness ``decay * old + new`` (online EWC); rows
        and names that are new start from ``new``.

        Without ``stiffness`` the anchor moves and the old stiffness stays (zero for what is new). ``ids`` join those
        held.
        """
        old = self.stiffness
        anchor = {name: value.detach().clone() for name, value in params.items()}
        if stiffness is not None or old is not None:
            fresh = {
                n: torch.zeros_like(a) if stiffness is None else _stiff(stiffness, n, a) for n, a in anchor.items()
            }
            share = decay if stiffness is not None else 1.0
            for name, value in fresh.items():
                if name not in self.anchor:
                    continue
                block = _old(name, value, self.anchor[name])
                block.add_(torch.ones_like(block) if old is None else old[name], alpha=share)
            self.stiffness = fresh
        self.anchor = anchor
        if ids is not None:
            self.ids = self.ids | ids

    def holds(self, ids: Ids) -> Ids:
        """Which of these examples had a part in the weights that made this anchor."""
        return self.ids & ids

    def purge(self, ids: Ids) -> None:
        """If any of them did, drop everything: weights cannot be unmixed. A keeper's ``forgot`` then anchors at the new
        weights, without the ids."""
        if self.holds(ids):
            self.anchor, self.ids = {}, Ids(None)
            self.stiffness = None if self.stiffness is None else {}

    def bytes(self) -> int:
        """Bytes of anchor and stiffness."""
        tensors = [*self.anchor.values(), *(self.stiffness or {}).values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors and JSON values."""
        stiffness = None if self.stiffness is None else dict(self.stiffness)
        return {
            "anchor": dict(self.anchor),
            "stiffness": stiffness,
            "strength": self.strength,
            "half": self.half,
            "ids": torch.from_numpy(self.ids.array.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; tensors are copied."""
        self.anchor = {name: value.detach().clone() for name, value in state["anchor"].items()}
        self.stiffness = (
            None
            if state["stiffness"] is None
            else {name: value.detach().clone() for name, value in state["stiffness"].items()}
        )
        self.strength, self.half, self.ids = float(state["strength"]), bool(state["half"]), Ids(state["ids"])


def _stiff(stiffness: Mapping[str, Tensor], name: str, anchor: Tensor) -> Tensor:
    if name not in stiffness or stiffness[name].shape != anchor.shape:
        found = tuple(stiffness[name].shape) if name in stiffness else None
        raise BadInput(f"stiffness of {name!r} must have the anchor's shape {tuple(anchor.shape)}, got {found}")
    return stiffness[name].detach().to(anchor.dtype, copy=True)


def _old(name: str, param: Tensor, anchor: Tensor) -> Tensor:
    """The leading block of ``param`` that has the anchor's shape (a view)."""
    if param.shape == anchor.shape:
        return param
    if param.dim() != anchor.dim() or any(now < then for now, then in zip(param.shape, anchor.shape, strict=True)):
        raise BadInput(f"{name!r} is now {tuple(param.shape)}, smaller than its anchor {tuple(anchor.shape)}")
    return param[tuple(slice(0, size) for size in anchor.shape)]
