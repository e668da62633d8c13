"""Losses and distances that methods share, each written once.

All but :func:`linear_cka` return one value per row, shape (B,), in nats where they are logarithmic; the caller takes
the mean, the weighted mean or the sum.
Nothing here is multiplied by a strength or by T squared: a method's own formula says so where its paper does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.core.errors import BadInput


def soft_cross_entropy(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy against a distribution: ``-sum_c target_c * log softmax(logits / T)_c``.

    logits (B, C); target (B, C) probabilities, used as they are. Returns (B,) nats. Raises BadInput if the shapes
    differ or T <= 0.
    """
    _same(logits, target)
    return -(target * F.log_softmax(logits / _positive(temperature), dim=-1)).sum(dim=-1)


def kl_from_logits(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))``.

    student, teacher (B, C) logits. Returns (B,) nats, zero where the two agree up to a constant per row. The teacher is
    not detached here.
    A column that is -inf in the teacher has probability zero and adds nothing.
    """
    _same(student, teacher)
    temperature = _positive(temperature)
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(dim=-1)


def sigmoid_bce(logits: Tensor, target: Tensor, reduce: str = "mean") -> Tensor:
    """Binary cross-entropy of each column against a soft target in [0, 1].

    logits, target (B, C). Returns (B,) nats: the mean (default) or the sum over the columns.
    """
    _same(logits, target)
    return _reduce(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), reduce)


def mse(a: Tensor, b: Tensor, reduce: str = "mean") -> Tensor:
    """Squared difference. a, b (B, ...). Returns (B,): the mean (default) over everything but the row, or with
    ``reduce="sum"`` the squared L2 distance."""
    _same(a, b)
    return _reduce((a - b).square(), reduce)


def cosine_distance(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """``1 - cos(a, b)`` along the last axis. a, b (B, D). Returns (B,) in [0, 2]; 1 where either norm is zero."""
    _same(a, b)
    return 1.0 - F.cosine_similarity(a, b, dim=-1, eps=eps)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of two representations of the same n examples (Kornblith et al., ICML 2019).

    ``||Yc' Xc||_F^2 / (||Xc' Xc||_F ||Yc' Yc||_F)`` with column-centred X (n, d1), Y (n, d2). Returns a scalar in [0,
    1]: 1 for equal up to rotation and scale, 0 where one of the two is constant. Works on d x d or n x n products,
    whichever is smaller.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise BadInput(f"linear_cka needs (n, d1) and (n, d2), got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x - x.mean(dim=0, keepdim=True), y - y.mean(dim=0, keepdim=True)
    if x.shape[0] < max(x.shape[1], y.shape[1]):  # the same three norms from the n x n kernels
        k, m = x @ x.T, y @ y.T
        cross, xx, yy = (k * m).sum(), k.square().sum().sqrt(), m.square().sum().sqrt()
    else:
        cross = (y.T @ x).square().sum()
        xx, yy = (x.T @ x).square().sum().sqrt(), (y.T @ y).square().sum().sqrt()
    scale = xx * yy
    return torch.where(
        scale > 0, cross / torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)
    )


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise BadInput(f"the two sides must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise BadInput(f"temperature must be above 0, got {temperature}")
    return temperature


def _reduce(values: Tensor, reduce: str) -> Tensor:
    flat = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    if reduce == "mean":
        return flat.mean(dim=1)
    if reduce == "sum":
        return flat.sum(dim=1)
    raise BadInput(f"reduce must be 'mean' or 'sum', got {reduce!r}")
