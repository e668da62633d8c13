"""Low-rank adapters on linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.rng import generator
from remanence.nn.anatomy import head_name, replace_module


class Adapter(nn.Module):
    """A linear layer, `base`, with something small beside it that learns in its stead."""

    base: nn.Linear


class LowRank(Adapter):
    """``base(x) + (alpha / rank) * x A' B'`` with A (rank, in) drawn at random and B (out, rank) zero: at first, no change.

    Hu et al. 2021, LoRA, arXiv 2106.09685.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, rng: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        bound = base.in_features**-0.5
        down = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=rng)
        self.down = nn.Parameter(down.to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        #: What A and what B gives passes through these, for whoever wants to look.
        self.after_down, self.after_up = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        low = self.after_down(x @ self.down.T)
        return self.base(x) + self.scale * self.after_up(low @ self.up.T)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same function as one linear layer."""
        self.base.weight += self.scale * self.up @ self.down
        return self.base

    @torch.no_grad()
    def restart(self, rng: torch.Generator) -> None:
        """Merge, and begin again beside the merged weight as at first: the same function, a new A, B zero."""
        self.merged()
        bound = self.base.in_features**-0.5
        self.down.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=rng))
        self.up.zero_()


def add_low_rank(model: nn.Module, names: list[str], rank: int, alpha: float, seed: int) -> nn.Module:
    """Wrap the linear layers `names`; each draws by its own name."""
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model = replace_module(model, name, LowRank(base, rank, alpha, generator(seed, "low-rank", name)))
    return model


def linear_names(model: nn.Module, targets: str | list[str], part: str) -> list[str]:
    """Names of the linear layers that `part` is to adapt: ``all-linear`` (all but the head), or those whose names end in one of `targets`.

    Raises:
        UnknownName: no layer has such a name.
        BadInput: there is nothing to adapt, a name is the head's, or there are adapters already.
    """
    there = next((name for name, module in model.named_modules() if isinstance(module, Adapter)), None)
    if there is not None:
        kind = type(model.get_submodule(there)).__name__
        raise BadInput(f"{part}: {there} is a {kind} already; a network has adapters of one kind, so leave {part} out")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = head_name(model)
    if targets == "all-linear":
        names = [name for name in linear if name != head]
        if not names:
            raise BadInput(f"{part}: the model has no linear layer but its head, so there is nothing to adapt")
        return names
    wanted = [targets] if isinstance(targets, str) else list(targets)
    found = {want: [name for name in linear if name == want or name.endswith("." + want)] for want in wanted}
    for want, names in found.items():
        if not names:
            raise UnknownName(f"{part}: no linear layer is called {want!r}{nearest(want, linear)}")
        if head in names:
            raise BadInput(f"{part}: {want!r} names the head, which is trained as it is and may grow; leave it out")
    return [name for name in linear if any(name in names for names in found.values())]


@torch.no_grad()
def restart_beside(layer: LowRank, rows: Tensor) -> None:
    """Let the layer stay the function it is, and its change start where the inputs `rows` (n, in) have least energy (KORE, arXiv 2510.19316).

    W = base + scale B A;  P = U U', U the right singular vectors of `rows` with the r smallest singular values;
    W P = U* S* V*';  scale B = U* sqrt(S*), A = sqrt(S*) V*';  base = W - scale B A = W (I - P). All of it in float64.
    """
    weight = layer.base.weight.double() + layer.scale * layer.up.double() @ layer.down.double()
    rank = len(layer.down)
    # The right singular vectors of the rows are those of their Gram matrix, with twice the digits.
    least = torch.linalg.svd(rows.to(weight), full_matrices=True).Vh[-rank:].T
    u, s, vh = torch.linalg.svd(weight @ least, full_matrices=False)
    found = len(s)  # of a layer with fewer outputs than ranks, the rest stays zero
    up, down = torch.zeros_like(layer.up).double(), torch.zeros_like(layer.down).double()
    up[:, :found], down[:found] = u * s.sqrt() / layer.scale, s.sqrt()[:, None] * (vh @ least.T)
    layer.up.copy_(up)
    layer.down.copy_(down)
    layer.base.weight.copy_(weight - layer.scale * layer.up.double() @ layer.down.double())
