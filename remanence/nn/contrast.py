"""Contrastive losses, each written once, and what they are taken on: a cosine head and a projection.

The losses return one value per anchor, shape (n,), in nats; the caller takes the mean. Where no anchor has a positive that is not
itself the loss is 0 and has no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.nn.anatomy import head, head_name, replace_module

EPS = 1e-6  # below this norm a vector has no direction


def unit(z: Tensor) -> Tensor:
    """Rows (n, D) of norm 1; zeros stay zeros."""
    return F.normalize(z, dim=1, eps=EPS)


def info_nce(logits: Tensor, positive: Tensor, among: Tensor | None = None) -> Tensor:
    """``-1/|P_i| sum_{j in P_i} (s_ij - log sum_{k in A_i} exp s_ik)``, with P_i inside A_i.

    logits s (n, m), divided by the temperature. positive (n, m) bool: P. among (n, m) bool: A, who competes; None: everyone. Returns
    (n,); 0 where P_i is empty.
    """
    if logits.shape != positive.shape or (among is not None and among.shape != logits.shape):
        raise BadInput(f"logits and masks must have one shape, got {tuple(logits.shape)} and {tuple(positive.shape)}")
    if among is not None:
        logits = logits.masked_fill(~among, -torch.inf)
    gain = logits.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    some = positive.any(1)
    total = logits.masked_fill(~some[:, None], 0.0).logsumexp(1)  # a row without competitors has no logarithm
    return torch.where(some, total - gain, torch.zeros_like(gain))


def supervised_contrast(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Every row is drawn to the others of its label and away from the rest, itself left out (Khosla et al. 2020, L_out).

    z (n, D) unit rows, labels (n,). Returns (n,). With labels 0..n/2-1 twice it is SimCLR's NT-Xent.
    """
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return info_nce(z @ z.T / temperature, (labels[:, None] == labels) & others, others)


def proxy_contrast(z: Tensor, proxies: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Every row against the proxies of all rows' labels, one for each row:
    ``log sum_j exp(z_i.v_{y_j} / T) - z_i.v_{y_i} / T``.

    z (n, D) and proxies v (C, D) unit rows, labels (n,) in range(C). A label that n_c rows have competes n_c times, one that no row
    has not at all: its proxy gets no gradient. Returns (n,).
    """
    counts = torch.bincount(labels, minlength=len(proxies)).to(z.dtype)
    logits = z @ proxies.T / temperature
    return (logits + counts.log()).logsumexp(1) - logits.gather(1, labels[:, None]).squeeze(1)


def class_means(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The labels (K,) that occur, ascending, and the mean (K, D) of each one's rows."""
    labels, place, counts = y.unique(return_inverse=True, return_counts=True)
    return labels, z.new_zeros(len(labels), z.shape[1]).index_add(0, place, z) / counts[:, None]


def prototype_contrast(first: Tensor, second: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Every class's mean in one view is drawn to its mean in the other and away from all other means (OnPro's OPE).

    first, second (n, D) unit rows of the same examples, labels y (n,). Means are made unit rows again. Returns (2 K,).
    """
    p = torch.cat([unit(class_means(z, y)[1]) for z in (first, second)])
    others = ~torch.eye(len(p), dtype=torch.bool, device=p.device)
    return info_nce(p @ p.T / temperature, (~others).roll(len(p) // 2, 1), others)


def neighbours(z: Tensor, temperature: float) -> Tensor:
    """Similarities ``z_i.z_j / T`` of every row to all others. z (n, D) unit rows; returns (n, n - 1), the diagonal left out."""
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (z @ z.T / temperature)[others].view(len(z), -1)


class CosineLinear(nn.Linear):
    """``cos(x, w_c) / temperature`` for each row w_c of the weight; no bias."""

    def __init__(self, inputs: int, outputs: int, temperature: float, device: object = None, dtype: object = None):
        super().__init__(inputs, outputs, bias=False, device=device, dtype=dtype)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        return unit(x) @ unit(self.weight).T / self.temperature


def cosine_head(model: nn.Module, temperature: float) -> nn.Module:
    """Let the model's linear head answer by the cosine: the same rows, a bias is dropped."""
    old = head(model)
    if not isinstance(old, nn.Linear):
        raise BadInput(f"the head is a {type(old).__name__}; only a linear one has rows to compare with")
    made: CosineLinear = nn.utils.skip_init(
        CosineLinear, old.in_features, old.out_features, temperature, device=old.weight.device, dtype=old.weight.dtype
    )
    with torch.no_grad():
        made.weight.copy_(old.weight).requires_grad_(old.weight.requires_grad)
    return replace_module(model, head_name(model), made.train(old.training))


class Projection(nn.Module):
    """A linear map of the head's input that no answer depends on. Not an `nn.Linear`, for which a head may be taken."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        bound = self.weight.shape[1] ** -0.5
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=rng))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def add_projection(model: nn.Module, outputs: int, seed: int) -> None:
    """Hang a projection, drawn by `seed` as torch draws a linear layer, on the model's head, where it is called `projection`."""
    layer = head(model)
    if not isinstance(layer, nn.Linear):
        raise BadInput(f"the head is a {type(layer).__name__}; give the model a linear head")
    made = Projection(layer.in_features, outputs)
    made.reset_parameters(generator(seed, "projection"))
    layer.projection = made.to(layer.weight)
