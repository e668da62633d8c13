"""What a fine-tuning changed, entry by entry: stored, taken off and put on again, alone or together with others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.ids import Ids

_GAPS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def encode(positions: Tensor) -> Tensor:
    """Ascending positions (k,) int64 as the first and the gaps between neighbours, in the smallest integers that hold them."""
    gaps = positions.diff(prepend=positions.new_zeros(1)) if len(positions) else positions
    largest = int(gaps.max()) if len(gaps) else 0
    return gaps.to(next(kind for kind in _GAPS if largest <= torch.iinfo(kind).max))


def decode(gaps: Tensor) -> Tensor:
    """The positions (k,) int64 that `encode` was given."""
    return gaps.to(torch.int64).cumsum(0)


class SparseDelta:
    """The entries of parameters that differ between two moments, with both values: the change itself is their difference.

    With both values kept, what is put on weights that are as they were is copied, bit for bit, and so is what is taken off;
    a sum in floating point would be neither. Positions are row-major, so a head that has grown rows since is still right.
    """

    def __init__(self) -> None:
        self.gaps: dict[str, Tensor] = {}
        self.old: dict[str, Tensor] = {}
        self.new: dict[str, Tensor] = {}

    @classmethod
    @torch.no_grad()
    def between(cls, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> SparseDelta:
        """What became of `before` in `after`, which has the same names and shapes."""
        made = cls()
        for name, old in before.items():
            old, new = old.detach().reshape(-1), after[name].detach().reshape(-1)
            at = ((old != new) | (old.signbit() != new.signbit())).nonzero().squeeze(1)
            if len(at):
                made.gaps[name], made.old[name], made.new[name] = encode(at), old[at], new[at]
        return made

    def __len__(self) -> int:
        """The number of entries."""
        return sum(len(values) for values in self.new.values())

    @torch.no_grad()
    def put_on(self, params: Mapping[str, Tensor]) -> None:
        """Change `params` in place: entries that have the old value get the new one, others have the difference added."""
        for name, flat, at in self._places(params):
            now, old, new = flat[at], self.old[name].to(flat), self.new[name].to(flat)
            flat[at] = torch.where(now == old, new, now + (new - old))

    @torch.no_grad()
    def take_off(self, params: Mapping[str, Tensor]) -> None:
        """Give every entry of the delta its old value, in place, whatever it is now."""
        for name, flat, at in self._places(params):
            flat[at] = self.old[name].to(flat)

    def _places(self, params: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Tensor]]:
        for name, gaps in self.gaps.items():
            at = decode(gaps)
            if name not in params or params[name].numel() <= int(at[-1]):
                raise BadInput(f"a sparse delta changes {name!r}, which is not there, or smaller than it was")
            param = params[name]
            flat = param.detach().reshape(-1)
            yield name, flat, at.to(flat.device)
            if flat.data_ptr() != param.data_ptr():  # not contiguous: that was a copy
                param.copy_(flat.view(param.shape))

    def bytes(self) -> int:
        """Bytes of positions and values."""
        return sum(t.nbytes for part in (self.gaps, self.old, self.new) for t in part.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors."""
        return {"gaps": dict(self.gaps), "old": dict(self.old), "new": dict(self.new)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; tensors are copied."""
        for name in ("gaps", "old", "new"):
            setattr(self, name, {key: value.detach().clone() for key, value in state[name].items()})


class Skills:
    """Holder of the sparse deltas of a network, by name, in the order in which they were learned.

    The network without any of them is the base. Values of deltas were computed by weights, so this holds what those held.
    """

    #: A part that has one must have `forgot`.
    derived = True

    def __init__(self) -> None:
        self.deltas: dict[str, SparseDelta] = {}

    def take_off(self, params: Mapping[str, Tensor]) -> None:
        """Make `params`, on which all skills are, those of the base: the same bits, if nothing else has moved them."""
        for delta in reversed(self.deltas.values()):
            delta.take_off(params)

    def put_on(self, params: Mapping[str, Tensor], names: Iterable[str] | None = None) -> None:
        """Add the skills `names` (None: all) to the base, in the order of learning.

        Raises:
            UnknownName: there is no such skill.
        """
        wanted = set(self.deltas if names is None else names)
        for name in sorted(wanted - set(self.deltas)):
            raise UnknownName(
                f"no skill is called {name!r}{nearest(name, self.deltas)} (there is {', '.join(self.deltas)})"
            )
        for name, delta in self.deltas.items():
            if name in wanted:
                delta.put_on(params)

    def holds(self, ids: Ids) -> Ids:
        """No record; see `derived`."""
        return Ids()

    def purge(self, ids: Ids) -> None:
        """Nothing: values cannot be unmixed; `forgot` drops them."""

    def bytes(self) -> int:
        """Bytes of all deltas."""
        return sum(delta.bytes() for delta in self.deltas.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors and JSON values."""
        return {"names": list(self.deltas), "deltas": [delta.state_dict() for delta in self.deltas.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; tensors are copied."""
        self.deltas = {}
        for name, saved in zip(state["names"], state["deltas"], strict=True):
            self.deltas[name] = SparseDelta()
            self.deltas[name].load_state_dict(saved)
