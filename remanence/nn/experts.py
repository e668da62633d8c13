"""Adapters of several parts, of which every input uses its own: low-rank experts behind a router, and ranks that choose themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.rng import generator
from remanence.nn.adapters import Adapter
from remanence.nn.anatomy import replace_module


class Router(nn.Module):
    """The share of each expert in an input: ``softmax(x G')`` (..., N), in float32 at least."""

    def __init__(self, inputs: int, experts: int, rng: torch.Generator, like: Tensor) -> None:
        super().__init__()
        drawn = torch.empty(experts, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=rng)
        self.weight = nn.Parameter(drawn.to(like))

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight)
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class LowRankExperts(Adapter):
    """``base(x) + (alpha / rank) sum_i w_i(x) B_i A_i dropout(x)`` over N experts that all run, with w of a `Router`.

    A_i (rank, in) is drawn at random and B_i (out, rank) is zero: at first, no change. They lie one after the other in `down`
    (N rank, in) and `up` (out, N rank). Dou et al. 2024, LoRAMoE, arXiv 2312.09979.
    """

    def __init__(
        self, base: nn.Linear, experts: int, rank: int, alpha: float, dropout: float, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.base, self.rank, self.scale = base, rank, alpha / rank
        self.dropout = nn.Dropout(dropout)
        bound = base.in_features**-0.5
        down = torch.empty(experts * rank, base.in_features).uniform_(-bound, bound, generator=rng)
        self.down = nn.Parameter(down.to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, experts * rank))
        self.router = Router(base.in_features, experts, rng, base.weight)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).to(x.dtype).repeat_interleave(self.rank, -1)
        hidden = share * (self.dropout(x) @ self.down.T)
        return self.base(x) + self.scale * (hidden @ self.up.T)  # type: ignore[no-any-return]


def add_experts(
    model: nn.Module, names: list[str], experts: int, rank: int, alpha: float, dropout: float, seed: int
) -> nn.Module:
    """Wrap the linear layers `names`; each draws by its own name."""
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        made = LowRankExperts(base, experts, rank, alpha, dropout, generator(seed, "experts", name))
        model = replace_module(model, name, made.train(base.training))
    return model


@contextmanager
def routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict that gets the shares, still in the graph, that the routers give in the next forward with gradients, by layer. Further forwards
    (a replayed batch, a recomputation of checkpointed layers) leave it as it is until it is cleared."""
    taken: dict[str, Tensor] = {}

    def taker(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def take(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and name not in taken:
                taken[name] = output

        return take

    hooks = [
        module.register_forward_hook(taker(name))
        for name, module in model.named_modules()
        if isinstance(module, Router)
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def row_shares(shares: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean share of each expert in each row (B, N), of shares (B, ..., N); with a mask (B, L), over the tokens where it is True."""
    if mask is None or shares.dim() != 3:
        return shares.flatten(1, -2).mean(1) if shares.dim() > 2 else shares
    counted = mask.to(shares)[:, :, None]
    return (shares * counted).sum(1) / counted.sum(1).clamp(min=1)


def localized_balance(shares: Tensor, group: Tensor, delta: float) -> Tensor:
    """``var(Z) / mean(Z)^2`` of ``Z = I * Q``, Q the shares (B, N) and I = 1 - delta where the expert is of the row's group, else
    1 + delta. The first half of the experts is of group 0, the second of group 1; group: (B,) of 0 and 1.

    It is least, 0, where the row's own half takes (1 + delta) / 2 of it, in equal parts: what is made equal is Z, so that the smaller
    factor stands before the larger share.
    """
    second = torch.arange(shares.shape[1], device=shares.device) >= shares.shape[1] // 2
    own = group[:, None].bool() == second
    z = shares * (1 + delta * (1 - 2 * own.to(shares)))
    return z.var() / (z.mean().square() + 1e-10)


class MixtureOfRanks(Adapter):
    """``base(x) + sum_i w_i(x) B_i (A_i x)``: every rank is a key A_i and a value B_i, and the keys alone say who answers (MoRA,
    arXiv 2506.21035).

        s_i = A_i x / sqrt(sum_j (A_j x)^2),  w = softmax(s / tau),  w_i = 0 but for the k largest s

    Ranks are appended in blocks, `down[t]` (rank, in) and `up[t]` (out, rank), which start at B = 0.

    Args of the choice, which may be set anew at any time:
        tau: temperature; the lower, the fewer ranks matter.
        k: ranks that take part, at most.
        reserve: of these, in training, at least so many of the newest block.
        threshold: outside training, ranks with a smaller s_i take no part; None: all may.
        renormalise: whether the weights that are left are made to add up to 1.
        skip_empty: outside training, whether ranks with B_i = 0 are left out of the sums over ranks, too.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        self.choose(tau=0.1, k=16)

    def choose(
        self,
        tau: float,
        k: int,
        reserve: int = 0,
        threshold: float | None = None,
        renormalise: bool = False,
        skip_empty: bool = True,
    ) -> None:
        self.tau, self.k, self.reserve, self.threshold = tau, k, reserve, threshold
        self.renormalise, self.skip_empty = renormalise, skip_empty

    def append(self, rank: int, rng: torch.Generator) -> None:
        """New ranks, with keys drawn at random and values zero."""
        bound = self.base.in_features**-0.5
        down = torch.empty(rank, self.base.in_features).uniform_(-bound, bound, generator=rng)
        self.down.append(nn.Parameter(down.to(self.base.weight)))
        self.up.append(nn.Parameter(self.base.weight.new_zeros(self.base.out_features, rank)))

    def forward(self, x: Tensor) -> Tensor:
        up = torch.cat(list(self.up), 1)
        response = x @ torch.cat(list(self.down)).T
        return self.base(x) + (self.weights(response, up) * response) @ up.T  # type: ignore[no-any-return]

    def weights(self, response: Tensor, up: Tensor) -> Tensor:
        """w (..., R) of the responses ``A x`` (..., R)."""
        lowest = torch.finfo(response.dtype).min
        counted = response
        empty = None if self.training or not self.skip_empty else ~up.any(0)
        if empty is not None:
            counted = response.masked_fill(empty, 0.0)
        score = counted / (counted.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        sharp = score / self.tau
        if empty is not None:
            score, sharp = score.masked_fill(empty, -2.0), sharp.masked_fill(empty, lowest)
        w = sharp.softmax(-1)
        keep = self._kept(score.detach())
        w = w * keep
        return w / w.sum(-1, keepdim=True).clamp(min=1e-12) if self.renormalise else w

    def _kept(self, score: Tensor) -> Tensor:
        """Who takes part, (..., R): constants for the gradient."""
        keep = torch.ones_like(score)
        if self.k < score.shape[-1]:
            if self.training and self.reserve:
                newest = score[..., -self.down[-1].shape[0] :]
                first = (
                    newest.topk(min(self.reserve, newest.shape[-1]), -1).indices + score.shape[-1] - newest.shape[-1]
                )
                score = score.scatter_add(-1, first, torch.full_like(first, 4, dtype=score.dtype))
            keep = torch.zeros_like(score).scatter(-1, score.topk(self.k, -1).indices, 1.0)
        if not self.training and self.threshold is not None:
            keep = keep * (score >= self.threshold)
        return keep
