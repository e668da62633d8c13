"""A slow copy of weights, which follows the network's at a distance, and the straight line between two sets of weights.

slow <- slow + share * (weights - slow)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.ids import Ids


class SlowCopy:
    """Holder of a second set of weights, by parameter name, in float32 (float64 where the network is).

    `params` is everywhere a mapping of names to the network's parameters. Those that are not followed are left alone, and so is
    what is followed and not among them.
    """

    #: Computed by weights, so it holds what they held; a keeper that has one must have `forgot`.
    derived = True

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def fit(self, params: Mapping[str, Tensor]) -> None:
        """Make it fit a network that changed: names that it no longer has are dropped, new rows are the network's own.

        Raises:
            BadInput: a parameter is smaller than its slow copy.
        """
        for name, slow in list(self.values.items()):
            if name not in params:
                del self.values[name]
                continue
            value = self.values[name] = slow.to(params[name].device)
            if value.shape != params[name].shape:
                self.values[name] = _copy(params[name])
                _leading(name, self.values[name], value).copy_(value)

    @torch.no_grad()
    def track(self, params: Mapping[str, Tensor]) -> None:
        """Follow these, too: those not followed yet start as copies, the others come to the network's device (after a resume)."""
        for name, p in params.items():
            self.values[name] = self.values[name].to(p.device) if name in self.values else _copy(p)

    @torch.no_grad()
    def follow(self, params: Mapping[str, Tensor], share: float | Mapping[str, Tensor]) -> None:
        """Go `share` of the way to the network's weights: 0 stays, 1 arrives exactly; one share for all, or a scalar tensor each."""
        names = [name for name in params if name in self.values]
        if not names:
            return
        slow = [self.values[name] for name in names]
        to = [params[name].detach().to(value.dtype) for name, value in zip(names, slow, strict=True)]
        if isinstance(share, Mapping):
            torch._foreach_lerp_(slow, to, [share[name].to(v.dtype) for name, v in zip(names, slow, strict=True)])
        else:
            torch._foreach_lerp_(slow, to, share)

    @torch.no_grad()
    def put(self, params: Mapping[str, Tensor]) -> None:
        """Write the slow weights into the network."""
        for name, value in self.values.items():
            if name in params:
                params[name].copy_(value)

    @torch.no_grad()
    def swap(self, params: Mapping[str, Tensor]) -> None:
        """Write the slow weights into the network, and hold the network's instead."""
        for name, value in self.values.items():
            if name in params:
                own = _copy(params[name])
                params[name].copy_(value)
                self.values[name] = own

    @contextmanager
    def lent(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """The network has the slow weights meanwhile; nothing is copied. For a forward, never for a step."""
        own = {name: params[name].data for name in self.values if name in params}
        try:
            for name, data in own.items():
                params[name].data = self.values[name].to(data.dtype)
            yield
        finally:
            for name, data in own.items():
                params[name].data = data

    def clear(self) -> None:
        """Follow nothing."""
        self.values = {}

    def holds(self, ids: Ids) -> Ids:
        """None as a record: which ids the weights held when they were copied, the life knows."""
        return Ids()

    def purge(self, ids: Ids) -> None:
        """Nothing: weights cannot be unmixed. A keeper's ``forgot`` drops the copy or makes it anew."""

    def bytes(self) -> int:
        """Bytes of all copies."""
        return sum(value.nbytes for value in self.values.values())

    def state_dict(self) -> dict[str, Any]:
        """The copies by name."""
        return {"values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; tensors are copied."""
        self.values = {name: value.detach().clone() for name, value in state["values"].items()}


def interpolated(a: Mapping[str, Tensor], b: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """``(1 - share) a + share b`` for every name: `a` at 0 and `b` at 1, to the last bit.

    The probe of linear mode connectivity (Frankle et al. 2020, arXiv 1912.05671): a loss along the line that never rises above the
    line between its ends says that both lie in one valley. The factors of a low-rank adapter are interpolated each by itself, which is
    not the interpolation of their product.

    Raises:
        BadInput: names or shapes differ.
    """
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        raise BadInput("only weights of the same names and shapes can be interpolated")
    return {name: torch.lerp(a[name].detach(), b[name].detach(), share) for name in a}


def _copy(p: Tensor) -> Tensor:
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)


def _leading(name: str, tensor: Tensor, old: Tensor) -> Tensor:
    """The block of `tensor` that has the shape of `old` (a view)."""
    if tensor.dim() != old.dim() or any(now < then for now, then in zip(tensor.shape, old.shape, strict=True)):
        raise BadInput(f"{name!r} is now {tuple(tensor.shape)}, smaller than its slow copy {tuple(old.shape)}")
    return tensor[tuple(slice(0, size) for size in old.shape)]
