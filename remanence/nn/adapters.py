"""Low-rank adapters on linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remanence.core.rng import generator
from remanence.nn.anatomy import replace_module


class LowRank(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.down.T @ self.up.T)  # type: ignore[no-any-return]

    def merged(self) -> nn.Linear:
        """The same function as one linear layer."""
        with torch.no_grad():
            self.base.weight += self.scale * self.up @ self.down
        return self.base


def add_low_rank(model: nn.Module, names: list[str], rank: int, alpha: float, seed: int) -> nn.Module:
    """Wrap the linear layers `names`; each draws by its own name."""
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model = replace_module(model, name, LowRank(base, rank, alpha, generator(seed, "low-rank", name)))
    return model
