"""The likelihood-ratio attack: an example's own difficulty is taken out by models that learned it and models that did not.

Scores are logit-scaled confidences (`attacks.log_odds`; for a regression ``attacks.squared_error``), one per model and example.
Carlini et al. 2022, "Membership Inference Attacks From First Principles", arXiv 2112.03570. Pure numpy. Deviations: one
query per example, no augmented ones; the shared variance is pooled within examples with its degrees of freedom, where the paper's code
takes one spread over all examples together, their difficulty included; the offline score is z, of which the paper's probability is a
rising function that rounds to 1 for many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remanence.core.errors import BadInput

Floats = NDArray[np.float64]
#: From so many shadow models on, each example has a variance of its own; below, all share one (Carlini et al. 2022, section VI-B).
ENOUGH = 64


def halves(n: int, shadows: int, seed: int) -> NDArray[np.bool_]:
    """Which of `n` examples each shadow model learns, (shadows, n): halves drawn at random, the second of each pair the complement of
    the first, so that every example is in half of the models.

    Raises:
        BadInput: `shadows` is odd or below 4 (an example needs two models on either side), or there are fewer than 2 examples.
    """
    if shadows < 4 or shadows % 2 or n < 2:
        raise BadInput(
            f"give an even number of shadow models, 4 or more, and 2 examples or more; got {shadows} and {n}"
        )
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(n) < n // 2 for _ in range(shadows // 2)]
    return np.stack([side for inside in drawn for side in (inside, ~inside)])


def online(scores: ArrayLike, shadows: ArrayLike, inside: ArrayLike, shared: bool | None = None) -> Floats:
    """``log N(score; mu_in, s_in) - log N(score; mu_out, s_out)``, (N,): above 0, the model looks like one that learned the example.

    Args:
        scores: (N,) under the attacked model.
        shadows: (K, N) under the shadow models.
        inside: (K, N), whether the shadow model learned the example.
        shared: one variance for all examples; None: where there are fewer than 64 shadow models.

    Raises:
        BadInput: shapes that do not fit, NaN, or an example without a shadow model on either side (or, with a variance of its own,
            without two).
    """
    x, s, learned = _arrays(scores, shadows, inside)
    few = len(s) < ENOUGH if shared is None else shared
    (mu_in, var_in), (mu_out, var_out) = _moments(s, learned, few), _moments(s, ~learned, few)
    gap = (x - mu_out) ** 2 / var_out - (x - mu_in) ** 2 / var_in
    return np.asarray(0.5 * (gap + np.log(var_out) - np.log(var_in)))


def offline(
    scores: ArrayLike, shadows: ArrayLike, inside: ArrayLike | None = None, shared: bool | None = None
) -> Floats:
    """``(score - mu_out) / s_out``, (N,): how far above the models that never learned the example. The paper's ``1 - P(Z > score)`` is
    its normal distribution function. Arguments and errors as for `online`; `inside` None: no shadow model learned any."""
    x, s, learned = _arrays(scores, shadows, np.zeros(np.shape(shadows), dtype=bool) if inside is None else inside)
    mean, variance = _moments(s, ~learned, len(s) < ENOUGH if shared is None else shared)
    return np.asarray((x - mean) / np.sqrt(variance))


def _arrays(scores: Any, shadows: Any, inside: Any) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    x, s = np.asarray(scores, dtype=np.float64), np.asarray(shadows, dtype=np.float64)
    learned = np.asarray(inside, dtype=bool)
    if x.ndim != 1 or s.ndim != 2 or s.shape[1] != len(x) or learned.shape != s.shape:
        raise BadInput(f"scores (N,), shadows (K, N) and inside (K, N), got {x.shape}, {s.shape} and {learned.shape}")
    if not bool(np.isfinite(x).all() and np.isfinite(s).all()):
        raise BadInput("NaN or infinite values among the scores")
    return x, s, learned


def _moments(s: Floats, chosen: NDArray[np.bool_], shared: bool) -> tuple[Floats, Floats]:
    """Mean and variance of each example (N,) over the chosen models."""
    count = chosen.sum(axis=0)
    free = count.sum() - len(count)
    if bool((count < (1 if shared else 2)).any()) or (shared and free < 1):
        raise BadInput("an example has too few shadow models that learned it, or that did not; make more of them")
    mean = np.where(chosen, s, 0.0).sum(axis=0) / count
    square = np.where(chosen, (s - mean) ** 2, 0.0).sum(axis=0)
    variance = np.full(len(count), square.sum() / free) if shared else square / (count - 1)
    return mean, np.maximum(variance, 1e-12)
