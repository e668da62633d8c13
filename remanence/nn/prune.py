"""Which weights a smaller network keeps: support masks, True where a weight stays."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.nn.masks import top_fraction


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that may be pruned, by name: matrices and kernels. Biases and norm scales are few and stay."""
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def magnitude(params: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """One shot: of all entries of `params` together the share `ratio` in [0, 1] with the least |theta| goes.

    Returns {name: bool tensor}. Among equal magnitudes the earlier entry stays.
    """
    return _keep({name: p.detach().abs() for name, p in params.items()}, ratio)


def synflow(model: nn.Module, x: Tensor, ratio: float, rounds: int = 100) -> dict[str, Tensor]:
    """Iterative synaptic flow: looks at no data, and cuts no layer off while others still have weights to give.

        R = sum of the outputs of the network with |theta|, for an input of ones        score_j = |theta_j dR/dtheta_j|
        after round k of K the share (1 - ratio)^(k/K) with the highest scores is left, of all `prunable` weights together

    `x` (1, ...) gives shape and dtype of an input. The scores come from a float64 copy in eval mode, in which running means are 0,
    so that without biases each layer's scores add up to R. The model itself is not touched.
    Reference: Tanaka et al. 2020, arXiv 2006.05467; their code takes |running mean| instead. Raises BadInput if rounds < 1.
    """
    if rounds < 1:
        raise BadInput(f"rounds must be at least 1, got {rounds}")
    flow = copy.deepcopy(model).double().eval()
    params = prunable(flow)
    ones = torch.ones_like(x, dtype=torch.float64 if x.is_floating_point() else x.dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.abs_().requires_grad_(True)
        for name, buffer in flow.named_buffers():
            if name.rpartition(".")[2] == "running_mean":
                buffer.zero_()
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    for k in range(1, rounds + 1):
        found = torch.autograd.grad(flow(ones).sum(), list(params.values()), allow_unused=True)
        scores = {
            name: (torch.zeros_like(p) if g is None else p * g).detach().abs().masked_fill(~kept[name], -1.0)
            for (name, p), g in zip(params.items(), found, strict=True)
        }
        kept = _keep(scores, 1 - (1 - ratio) ** (k / rounds))
        cut(params, kept)
    return kept


@torch.no_grad()
def cut(params: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Set the entries outside `kept` to exactly 0, in place."""
    for name, mask in kept.items():
        params[name].masked_fill_(~mask, 0.0)


def _keep(scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """The best of all but ``round(ratio * N)`` entries."""
    if not 0.0 <= ratio <= 1.0:
        raise BadInput(f"ratio must be in [0, 1], got {ratio}")
    count = sum(score.numel() for score in scores.values())
    left = count - round(ratio * count)
    return top_fraction(scores, min(1.0, (left + 0.5) / count) if count else 0.0)  # half a weight more than a share
