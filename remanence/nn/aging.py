"""Sparse layers whose units age: who is free, which connections there are, how they are moved, and whose weights are frozen.

A unit is a row of a linear layer or a channel of a convolution. `born` says in which event it was taken, from 1 on;
-1: free; 0: given from the start. A connection is a
weight of a linear layer or a whole kernel of a convolution. Both are buffers of the layer, so they are saved with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.nn.anatomy import features, head, replace_module


class SparseLinear(nn.Linear):
    """A linear layer of which only the weights in `kept` (units, inputs) are there."""

    kept: Tensor
    born: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.kept, self.bias)


class SparseConv2d(nn.Conv2d):
    """A convolution of which only the kernels in `kept` (units, inputs) are there."""

    kept: Tensor
    born: Tensor

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(x, self.weight * self.kept[:, :, None, None], self.bias)
        return found


Sparse = SparseLinear | SparseConv2d
_PASSING = (nn.Flatten, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity)


@dataclass
class Link:
    """One hidden layer of a chain: its weights, its batch norms and its ReLU, by dotted name; `inputs`: how many units it reads (0: it
    reads the network's input)."""

    name: str
    layer: nn.Linear | nn.Conv2d
    inputs: int
    norms: dict[str, nn.Module] = field(default_factory=dict)
    relu: str = ""

    @property
    def units(self) -> int:
        return len(self.layer.weight)

    @property
    def sparse(self) -> Sparse:
        assert isinstance(self.layer, SparseLinear | SparseConv2d)
        return self.layer


def chain(model: nn.Module) -> list[Link]:
    """The hidden layers of a network that is a chain: linear layers or convolutions, each read by the next one only, each followed by at
    most batch norm, pooling and dropout beside its ReLU, then a linear head.

    Raises:
        BadInput: the network is none; names the module where that shows.
    """
    last, links = head(model), list[Link]()
    for name, module in model.named_modules():
        inside = module is last or next(module.children(), None) is not None
        if inside or isinstance(module, _PASSING):
            continue
        if type(module) in (nn.Linear, nn.Conv2d, SparseLinear, SparseConv2d) and (not links or links[-1].relu):
            assert isinstance(module, nn.Linear | nn.Conv2d)
            links.append(Link(name, module, links[-1].units if links else 0))
        elif links and isinstance(module, nn.modules.batchnorm._BatchNorm):
            links[-1].norms[name] = module
        elif links and isinstance(module, nn.ReLU) and not links[-1].relu:
            links[-1].relu = name
        else:
            raise BadInput(f"{name} ({type(module).__name__}) does not fit in a chain of layers with a ReLU each")
    reads: list[tuple[str, nn.Module, int]] = [(link.name, link.layer, link.inputs) for link in links[1:]]
    reads += [("the head", last, links[-1].units)] if links else []
    for name, module, before in reads:
        width = module.in_features if isinstance(module, nn.Linear) else getattr(module, "in_channels", 0)
        fits = width % before == 0 if isinstance(module, nn.Linear) else width == before and module.groups == 1
        if not fits:
            raise BadInput(f"{name} reads {width} values, which are not those of the {before} units before it")
    if not links or not links[-1].relu:
        raise BadInput("there is no hidden layer with a ReLU, or the last one has none")
    return links


def is_sparse(links: Sequence[Link]) -> bool:
    return all(isinstance(link.layer, SparseLinear | SparseConv2d) for link in links)


def sparsify(model: nn.Module, pruned: float, seed: int) -> None:
    """Give every hidden layer of a chain `kept` and `born`, in place: the share `pruned` of its connections, drawn by `seed`, goes, and
    all units are free. A convolution that reads the network's input is left whole. A layer whose weights need no gradient is left whole as
    well, and its units are given from the start."""
    for number, link in enumerate(chain(model)):
        made, given = _as_sparse(link.layer), not link.layer.weight.requires_grad
        whole, count = given or (number == 0 and isinstance(link.layer, nn.Conv2d)), made.kept.numel()
        gone = torch.randperm(count, generator=generator(seed, link.name))[: 0 if whole else round(pruned * count)]
        with torch.no_grad():
            made.kept.view(-1)[gone.to(made.kept.device)] = False
        made.born.fill_(0 if given else -1)
        _clear(made, ~made.kept)
        replace_module(model, link.name, made)


def _as_sparse(old: nn.Linear | nn.Conv2d) -> Sparse:
    """The layer with the same parameters, and room to leave some out."""
    shape: dict[str, Any] = {"bias": old.bias is not None, "device": "meta"}  # where nothing is drawn
    made: Sparse
    if isinstance(old, nn.Linear):
        made = SparseLinear(old.in_features, old.out_features, **shape)
    else:
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        made = SparseConv2d(**{name: getattr(old, name) for name in names}, **shape)
    made.weight, made.bias = old.weight, old.bias
    made.register_buffer("kept", torch.ones(old.weight.shape[:2], dtype=torch.bool, device=old.weight.device))
    made.register_buffer("born", torch.zeros(len(old.weight), dtype=torch.int64, device=old.weight.device))
    return made.train(old.training)


def spread(units: Tensor, columns: int) -> Tensor:
    """A value per unit (U,), for each of the `columns` that a layer reads: flattening puts those of one unit side by side."""
    return units.repeat_interleave(columns // len(units))


def top_units(activity: Tensor, share: float) -> Tensor:
    """(U,) bool: the most active units, as few as give `share` of the sum of activity (U,) >= 0, one at least."""
    order = activity.double().argsort(descending=True, stable=True)
    reached = activity.double()[order].cumsum(0)
    count = int((reached < share * reached[-1]).sum()) + 1
    found = torch.zeros(len(activity), dtype=torch.bool, device=activity.device)
    found[order[:count]] = True
    return found


def take(links: Sequence[Link], activity: Sequence[Tensor], share: float, now: int) -> None:
    """Let the `top_units` of every layer belong to the event `now`, as far as they belong to no earlier one; others that it had taken
    are free again."""
    for link, active in zip(links, activity, strict=True):
        born = link.sparse.born
        ours = (born < 0) | (born == now)
        born[ours] = torch.where(top_units(active, share).to(born.device), now, -1)[ours]


@torch.no_grad()
def rewire(links: Sequence[Link], rng: torch.Generator) -> int:
    """Drop every connection from a free unit into one that is not, and grow as many in the same layer, from anywhere into free units, drawn
    from those that are not there, with weight 0. Returns how many were not grown because there was no place left."""
    lacking = 0
    for before, link in zip([None, *links], links, strict=False):
        layer = link.sparse
        free, kept = layer.born < 0, layer.kept
        idle = spread(before.sparse.born < 0, kept.shape[1]) if before is not None else torch.zeros_like(kept[0])
        dropped = kept & ~free[:, None] & idle
        places = (~kept & free[:, None]).flatten().nonzero()[:, 0]
        count = int(dropped.sum())
        grown = torch.zeros_like(kept)
        grown.view(-1)[places[torch.randperm(len(places), generator=rng)[:count].to(places.device)]] = True
        kept.copy_(kept & ~dropped | grown)
        _clear(layer, dropped | grown)
        lacking += max(0, count - len(places))
    return lacking


@torch.no_grad()
def redraw(links: Sequence[Link], rng: torch.Generator) -> None:
    """Draw the incoming weights of free units anew, normal with variance 2 / fan-in; biases 0."""
    for link in links:
        layer = link.sparse
        free = layer.born < 0
        drawn = torch.randn(layer.weight.shape, generator=rng).to(layer.weight) * (2 / layer.weight[0].numel()) ** 0.5
        layer.weight[free] = drawn[free]
        _clear(layer, ~layer.kept)
        if layer.bias is not None:
            layer.bias[free] = 0


def older(link: Link, event: int) -> Tensor:
    """(U,) bool: units that were taken before `event`."""
    born = link.sparse.born
    return (born >= 0) & (born < event)


def open_entries(links: Sequence[Link], frozen: Sequence[Tensor]) -> dict[str, Tensor]:
    """{parameter: bool tensor}, False where an entry makes the output of a `frozen` unit (U,): what comes in, bias and batch norm."""
    masks = {}
    for link, units in zip(links, frozen, strict=True):
        for name, module in {link.name: link.layer, **link.norms}.items():
            for kind, p in module.named_parameters(recurse=False):
                masks[f"{name}.{kind}"] = ~units.view(-1, *[1] * (p.dim() - 1)).expand_as(p)
    return masks


def through(model: nn.Module, number: int, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the hidden layer `number` of a chain reads for x (B, ...); and the head's input (B + R, D) for x and, after it, for `rows`
    (R, ...), which this layer reads beside the others."""
    taken: list[Tensor] = []

    def join(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        taken.append(inputs[0])
        return inputs[0] if rows is None else torch.cat([inputs[0], rows.to(inputs[0])])

    hook = chain(model)[number].layer.register_forward_pre_hook(join)
    try:
        h = features(model, x)
    finally:
        hook.remove()
    return taken[0], h


def _clear(layer: Sparse, connections: Tensor) -> None:
    with torch.no_grad():
        layer.weight[connections] = 0
