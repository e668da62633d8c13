"""How far a model's answers are from a reference's, example by example.

Two lives may know different classes, in different orders. All functions on logits take the labels of both heads'
columns and look only at the classes
both know: their columns are aligned by label and renormalised by a softmax over those columns alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remanence.core.errors import BadInput

Floats = NDArray[np.float64]


def kl(
    reference: Any, model: Any, reference_labels: Sequence[int] | None = None, model_labels: Sequence[int] | None = None
) -> Floats:
    """``KL(reference || model) = sum_c p_c (log p_c - log q_c)`` over the classes both know.

    Args:
        reference, model: logits (N, C) and (N, D), arrays or tensors.
        reference_labels, model_labels: the label of each column, (C,) and (D,); None for both: the columns agree.

    Returns:
        (N,) nats, >= 0; 0 where the two agree. Lower is nearer. Take the mean over a whole request.

    Raises:
        BadInput: shapes or labels that do not fit, or fewer than two classes in common.
    """
    log_p, log_q = shared(reference, model, reference_labels, model_labels)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # -inf minus -inf of a barred column, which weighs nothing
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=1), 0.0))


def js(
    reference: Any, model: Any, reference_labels: Sequence[int] | None = None, model_labels: Sequence[int] | None = None
) -> Floats:
    """Jensen-Shannon divergence, ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``: (N,) nats in [0, ln 2],
    symmetric."""
    log_p, log_q = shared(reference, model, reference_labels, model_labels)
    middle = np.logaddexp(log_p, log_q) - np.log(2.0)
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - middle), 0.0) + np.where(q > 0, q * (log_q - middle), 0.0)
    return np.asarray(np.clip(0.5 * terms.sum(axis=1), 0.0, np.log(2.0)))


def agreement(
    reference: Any, model: Any, reference_labels: Sequence[int] | None = None, model_labels: Sequence[int] | None = None
) -> Floats:
    """1.0 where both give the same answer among the classes both know, else 0.0: (N,). Higher is nearer."""
    log_p, log_q = shared(reference, model, reference_labels, model_labels)
    return np.asarray(log_p.argmax(axis=1) == log_q.argmax(axis=1), dtype=np.float64)


def squared_difference(reference: Any, model: Any) -> Floats:
    """``||a - b||^2`` of two regressions' values (N,) or (N, K): (N,) in the target's unit squared."""
    a, b = _array(reference), _array(model)
    if a.shape != b.shape or a.ndim == 0:
        raise BadInput(f"values must have one shape (N, ...), got {a.shape} and {b.shape}")
    return np.asarray(np.square(a - b).reshape(len(a), -1).sum(axis=1))


def gaussian_kl(reference: Any, model: Any, sigma: float = 1.0) -> Floats:
    """KL of two Gaussians with these means (N, ...) and one variance: ``||a - b||^2 / (2 sigma^2)``, (N,) nats; sigma
    in the target's unit."""
    if not sigma > 0:
        raise BadInput(f"sigma must be above 0, got {sigma}")
    return squared_difference(reference, model) / (2.0 * sigma**2)


def wasserstein(reference: Any, model: Any) -> float:
    """Wasserstein-1 distance of the two sets of values (N,) or (N, 1) and (M,) or (M, 1), each as a distribution of its own: the
    integral of the difference of their distribution functions, in the target's unit. It does not ask which value belongs to which
    example: 0 where the values are the same in any order."""
    given = [_array(values) for values in (reference, model)]
    if any(not values.ndim or not values.size or values.size != len(values) for values in given):
        raise BadInput(f"values must be (N,) or (N, 1) with N > 0, got {given[0].shape} and {given[1].shape}")
    a, b = (np.sort(values.reshape(-1)) for values in given)
    every = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(side, every[:-1], side="right") / len(side) for side in (a, b)]
    return float((np.abs(below[0] - below[1]) * np.diff(every)).sum())


def shared(
    reference: Any, model: Any, reference_labels: Sequence[int] | None = None, model_labels: Sequence[int] | None = None
) -> tuple[Floats, Floats]:
    """Log-probabilities (N, S) of both over the S classes both know, in the reference's order."""
    a, b = _array(reference), _array(model)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise BadInput(f"logits must be (N, C) and (N, D) of the same examples, got {a.shape} and {b.shape}")
    if (reference_labels is None) != (model_labels is None):
        raise BadInput("give the labels of both heads' columns, or of neither")
    if reference_labels is None or model_labels is None:
        if a.shape != b.shape:
            raise BadInput(
                f"heads of {a.shape[1]} and {b.shape[1]} columns cannot be compared without the labels of their columns"
            )
    else:
        left, right = [int(label) for label in reference_labels], [int(label) for label in model_labels]
        if (
            len(left) != a.shape[1]
            or len(right) != b.shape[1]
            or len(set(left)) < len(left)
            or len(set(right)) < len(right)
        ):
            raise BadInput("labels must be distinct, one for each column")
        place = {label: column for column, label in enumerate(right)}
        common = [(column, place[label]) for column, label in enumerate(left) if label in place]
        a, b = a[:, [i for i, _ in common]], b[:, [j for _, j in common]]
    if a.shape[1] < 2:
        raise BadInput(f"the two models have {a.shape[1]} classes in common; a divergence needs two")
    return log_softmax(a), log_softmax(b)


def log_softmax(logits: Floats) -> Floats:
    """Stable log-probabilities (N, C) in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), dtype=np.float64)


def _array(values: Any) -> Floats:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    found = np.asarray(values, dtype=np.float64)
    if bool(np.isnan(found).any()):
        raise BadInput("NaN among the model's answers")
    return found
