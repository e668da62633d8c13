"""Subspaces of a layer's inputs: the basis store of gradient projection memory (GPM) and its kin, providers of inputs,
and projecting out.

A layer with weight W (out, d_in) answers x with W x. If an update dW has no component in the span of the inputs of old
tasks, dW x = 0 for every old x: the old answers stay. A basis M (d_in, k) with orthonormal columns spans (most of)
those inputs, and ``dW - dW M M'`` is the part of the update that may stand.
Convolutions are the same with patches for inputs, W being flattened to (out, C * kh * kw).

Biases: they act on every input alike, so a bias that moves moves old answers. Either give inputs with a column of ones
(``layer_inputs(..., bias=True)``): then weight and bias are projected together and old answers stay, or
:meth:`Subspace.project_out` sets the bias's update to zero as soon as the layer has a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput, NotFinite
from remanence.core.ids import Ids
from remanence.nn.anatomy import evaluating, weighted_modules
from remanence.nn.fisher import unfold


class Subspace:
    """Holder of one orthonormal basis M (d_in, k) per layer, grown task by task.

    Every :meth:`extend` is a segment with the ids that had a part in it. Columns of a segment depend on the segments
    before it, so :meth:`purge` cuts the store off at the first segment that holds one of the ids. dtype: of the stored
    bases; they are computed in float64.
    """

    #: Computed by weights, so it holds what they held; a keeper that has one must have `forgot`.
    derived = True

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.bases: dict[str, Tensor] = {}
        self._segments: list[tuple[Ids, dict[str, int]]] = []  # ids, and the rank of each layer after the segment

    @torch.no_grad()
    def extend(
        self, inputs: Mapping[str, Tensor], threshold: float | Mapping[str, float], ids: Ids | None = None
    ) -> dict[str, int]:
        """Add the directions that these inputs need (Saha et al., ICLR 2021, eq. 8-9).

        inputs: {layer: R (n, d_in)}, one input per row. threshold: share of the energy to explain, in (0, 1], one for
        all or per layer.
        With the residual ``E = R - R M M' = U S V'`` and the energy ``||R||_F^2``, the leading k right singular vectors
        of E join M, k the smallest number with ``||R M||_F^2 + sum_{i <= k} S_i^2 >= threshold * ||R||_F^2``: what M
        explains already counts.
        Returns {layer: columns added}. Raises BadInput for a wrong shape or threshold, NotFinite for inputs that are
        not finite; nothing has changed then.
        """
        new: dict[str, tuple[Tensor, int]] = {}
        for name, rows in inputs.items():
            share = threshold if isinstance(threshold, int | float) else threshold[name]
            if not 0 < share <= 1:
                raise BadInput(f"threshold must be in (0, 1], got {share}")
            new[name] = self._grown(name, rows, float(share))
        for name, (basis, _) in new.items():
            self.bases[name] = basis
        self._segments.append(
            (Ids(None) if ids is None else ids, {name: basis.shape[1] for name, basis in self.bases.items()})
        )
        return {name: added for name, (_, added) in new.items()}

    def rank(self, name: str) -> int:
        """Columns of the layer's basis, 0 without one."""
        return self.bases[name].shape[1] if name in self.bases else 0

    def coordinates(self, name: str, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Where an update, a gradient or the weights themselves lie in the layer's basis: ``W M``, (out, k), in the graph.

        weight and bias as in :meth:`project_out`; a layer without a basis gives (out, 0).
        """
        if not self.rank(name):
            return weight.new_zeros(weight.shape[0], 0)
        flat, basis, _ = self._fitted(name, weight, bias)
        return flat @ basis

    def inside(self, name: str, coordinates: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight, of the shape of ``weight``, and the bias with these coordinates and nothing outside the basis: ``C M'``.
        The bias is None with a basis of d_in. The reverse of :meth:`coordinates`."""
        flat = coordinates @ self.bases[name].to(coordinates.device, coordinates.dtype).T
        joint = flat.shape[1] == weight[0].numel() + 1
        return (flat[:, :-1] if joint else flat).reshape(weight.shape), flat[:, -1] if joint else None

    @torch.no_grad()
    def project_out(
        self, name: str, weight: Tensor, bias: Tensor | None = None, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The part of an update (or gradient) of the layer that leaves old inputs alone: ``dW - (dW M) M'``.

        weight (out, ...) flattened to (out, d_in); bias (out,) or None. With a basis of d_in + 1 (inputs with a column
        of ones) weight and bias are projected together, and bias must be given; with a basis of d_in the bias's update
        becomes zero. Without a basis both come back as they are. columns: (k,), 1 for each column of M that is taken out and 0 for
        those that may stand; None: all of them.
        Returns new tensors. Raises BadInput where the basis does not fit.
        """
        if not self.rank(name):
            return weight, bias
        flat, basis, joint = self._fitted(name, weight, bias)
        if columns is None and basis.shape[1] == basis.shape[0]:  # nothing is free: exactly zero, not a rounding error
            return torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        inner = flat @ basis
        kept = flat - (inner if columns is None else inner * columns) @ basis.T
        if joint:
            return kept[:, :-1].reshape(weight.shape), kept[:, -1]
        return kept.reshape(weight.shape), None if bias is None else torch.zeros_like(bias)

    def _fitted(self, name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Weight (and bias) as (out, d), the basis beside it, and whether the bias is in."""
        basis, flat = self.bases[name], weight.reshape(weight.shape[0], -1)
        joint = basis.shape[0] == flat.shape[1] + 1
        if (joint and bias is None) or (not joint and basis.shape[0] != flat.shape[1]):
            raise BadInput(
                f"layer {name!r}: a basis of {basis.shape[0]} does not fit an update of {flat.shape[1]}"
                + (" without its bias" if joint else "")
            )
        basis = basis.to(flat.device, flat.dtype)
        if joint and bias is not None:
            flat = torch.cat([flat, bias.unsqueeze(1)], dim=1)
        return flat, basis, joint

    @property
    def ids(self) -> Ids:
        """Every id that had a part in a basis."""
        total = Ids(None)
        for ids, _ in self._segments:
            total = total | ids
        return total

    def holds(self, ids: Ids) -> Ids:
        """Which of these had a part in a basis, or in the weights that computed its inputs."""
        return self.ids & ids

    def purge(self, ids: Ids) -> None:
        """Drop the first segment that holds any of these and all after it; earlier ones never saw the ids and stay."""
        cut = next((at for at, (mine, _) in enumerate(self._segments) if mine & ids), None)
        if cut is None:
            return
        self._segments = self._segments[:cut]
        ranks = self._segments[-1][1] if cut else {}
        self.bases = {name: basis[:, : ranks[name]].clone() for name, basis in self.bases.items() if name in ranks}

    def bytes(self) -> int:
        """Bytes of the bases."""
        return sum(basis.numel() * basis.element_size() for basis in self.bases.values())

    def state_dict(self) -> dict[str, Any]:
        """Bases and segments as tensors and JSON values."""
        return {
            "bases": dict(self.bases),
            "segments": {
                str(at): {"ids": torch.from_numpy(ids.array.copy()), "ranks": dict(ranks)}
                for at, (ids, ranks) in enumerate(self._segments)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave; tensors are copied."""
        self.bases = {name: basis.clone() for name, basis in state["bases"].items()}
        ordered = [state["segments"][str(at)] for at in range(len(state["segments"]))]
        self._segments = [
            (Ids(segment["ids"]), {name: int(rank) for name, rank in segment["ranks"].items()}) for segment in ordered
        ]

    def _grown(self, name: str, rows: Tensor, share: float) -> tuple[Tensor, int]:
        old = self.bases.get(name)
        if rows.dim() != 2 or (old is not None and rows.shape[1] != old.shape[0]):
            raise BadInput(
                f"layer {name!r}: inputs must be (n, {'d_in' if old is None else old.shape[0]}), "
                f"got {tuple(rows.shape)}"
            )
        r = rows.detach().to(torch.float64)
        if not bool(torch.isfinite(r).all()):
            raise NotFinite(f"layer {name!r}: an input is NaN or infinite")
        d = r.shape[1]
        m = r.new_zeros(d, 0) if old is None else old.to(r.device, torch.float64)
        total = float(r.square().sum())
        residual = r - (r @ m) @ m.T
        explained = total - float(residual.square().sum())
        needed = share * total * (1 - 1e-12)  # rounding must not ask for one more direction
        if total == 0.0 or explained >= needed or m.shape[1] == d:
            return m.to(self.dtype), 0
        _, s, vt = torch.linalg.svd(compress(residual), full_matrices=False)
        energy = explained + torch.cumsum(s.square(), dim=0)
        k = min(int((energy < needed).sum()) + 1, len(s), d - m.shape[1])
        v = vt[:k].T
        v = torch.linalg.qr(v - m @ (m.T @ v)).Q  # a second pass: orthonormal to rounding also after many tasks
        return torch.cat([m, v], dim=1).to(self.dtype), k


def projected_layers(model: nn.Module, by: str) -> dict[str, dict[str, str]]:
    """What a keeper that projects has to do with: {module with parameters: {``weight`` or ``bias``: the parameter's name}}.

    Raises BadInput, in the name of the keeper ``by``, for trainable matrices of which no inputs can be taken.
    """
    layers: dict[str, dict[str, str]] = {}
    for name, module in weighted_modules(model).items():
        own = dict(module.named_parameters(recurse=False))
        if not has_inputs(module) and any(p.dim() > 1 and p.requires_grad for p in own.values()):
            raise BadInput(
                f"{by}: {name} is a {type(module).__name__}; only linear layers and convolutions without groups can "
                f"be projected: freeze it, or leave {by} out"
            )
        layers[name] = {kind: f"{name}.{kind}" if name else kind for kind in own}
    return layers


@torch.no_grad()
def step_outside(
    subspace: Subspace,
    layers: Mapping[str, Mapping[str, str]],
    params: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    columns: Mapping[str, Tensor] | None = None,
) -> None:
    """Take the step ``params - before`` out of the bases, in place, layer by layer (of :func:`projected_layers`).

    What has no basis, or is trainable only in part, goes back to where it was. columns: as in :meth:`Subspace.project_out`, by
    layer, where not all are taken out.
    """
    for name, own in layers.items():
        if name in subspace.bases and all(full in params for full in own.values()):
            change = {kind: params[full] - before[full] for kind, full in own.items()}
            kept = subspace.project_out(name, change["weight"], change.get("bias"), (columns or {}).get(name))
            for kind, part in zip(("weight", "bias"), kept, strict=True):
                if part is not None:
                    params[own[kind]].copy_(before[own[kind]] + part)
        else:
            for full in own.values():
                if full in params:
                    params[full].copy_(before[full])


def has_inputs(module: nn.Module) -> bool:
    """Whether it is a layer whose inputs :func:`layer_inputs` can take."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def fewest_columns(energy: Tensor, added: int, needed: float) -> Tensor:
    """One task's part of a basis that others share: the last ``added`` columns and, of those before, the fewest that bring the
    energy of its inputs to what is needed. energy: (k,), ``|R m_i|^2`` of each column. Returns (k,) bool."""
    first = energy.clone()
    first[len(energy) - added :] = torch.inf
    order = first.argsort(descending=True, stable=True)
    count = max(added, int((energy[order].cumsum(0) < needed * (1 - 1e-6)).sum()) + 1)  # bases are kept in float32
    uses = torch.zeros(len(energy), dtype=torch.bool, device=energy.device)
    uses[order[:count]] = True
    return uses


def compress(rows: Tensor) -> Tensor:
    """At most d rows with the same Gram matrix R' R, hence the same singular values and right singular vectors. rows
    (n, d). Returns (min(n, d), d)."""
    return rows if rows.shape[0] <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


def layer_inputs(
    model: nn.Module,
    forward: Callable[[dict[str, Any]], Any],
    batches: Iterable[dict[str, Any]],
    names: Iterable[str] | None = None,
    bias: bool = False,
    max_rows: int | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    """What the named Linear and Conv2d layers of ``model`` (None: all of them) see while ``forward(batch)`` runs, in eval mode,
    without gradients.

    bias: a column of ones is added to layers that have a bias (see the module's docstring). max_rows: at most so many
    evenly spaced rows per layer and batch (a convolution has one row per output position); None: all. Rows beyond 2
    d_in are compressed (:func:`compress`), so memory is bounded; whole: they are not, and n is their number.
    Returns {name: (n, d_in or d_in + 1)} float64 with the Gram matrix of all rows kept. Raises BadInput for another
    kind of layer, a grouped convolution, or a layer that is never called.
    """
    if names is None:
        names = [name for name, module in weighted_modules(model).items() if has_inputs(module)]
    layers = {name: model.get_submodule(name) for name in names}
    found: dict[str, Tensor] = {}

    def taker(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = _rows(module, args[0].detach())
            if max_rows is not None and len(rows) > max_rows:
                rows = rows[
                    torch.linspace(0, len(rows) - 1, max_rows, dtype=torch.float64, device=rows.device)
                    .round()
                    .to(torch.int64)
                ]
            rows = rows.to(torch.float64)
            if bias and module.bias is not None:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            rows = rows if name not in found else torch.cat([found[name], rows])
            found[name] = rows if whole or rows.shape[0] <= 2 * rows.shape[1] else compress(rows)

        return take

    for name, layer in layers.items():
        if not has_inputs(layer):
            raise BadInput(
                f"layer {name!r} is a {type(layer).__name__}; inputs are taken of Linear and of Conv2d without groups"
            )
    handles = [layer.register_forward_pre_hook(taker(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in batches:
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(layers) - found.keys())
    if missing:
        raise BadInput(f"layer {missing[0]!r} was not called: no inputs to take")
    return found


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """(n, d_in) inputs of a layer, in the order of its flattened weight."""
    if isinstance(module, nn.Conv2d):
        patches = unfold(module, x if x.dim() == 4 else x.unsqueeze(0))
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1])
