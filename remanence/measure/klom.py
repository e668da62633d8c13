"""KL of margins (KLoM): how far many unlearned networks are from many retrained ones, example by example, as distributions.

Everything else that is measured here asks one network at a time; KLoM asks whether the *spread* of answers over seeds is that of
retraining. It takes N unlearned networks whose seeds differ and M oracles, retrained without the request; the margins of an example x in
both are two samples, and KLoM(x) = KL(unlearned || oracles), in nats; lower is nearer, 0 where the two are alike. Look at the mean and the 95th
percentile over examples, never at one example: with few networks a single figure says nothing, and it would speak of one person.

Both estimators are biased upwards, the more so the fewer networks. Only the *floor* tells how much: the same figure for oracles against
other oracles, in samples of the same sizes.

Source: Georgiev et al. 2025, "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", arXiv 2410.23232 (N = M = 100).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remanence.core.errors import BadInput

Floats = NDArray[np.float64]

BINS, CLIP, EPSILON = 20, 100.0, 1e-5
#: From so many networks on each side, the paper's number, the histogram is the default. Its floor for samples of equal normals is then
#: 0.36 nats (50: 0.89; 10: 5.6), that of the Gaussian estimator 0.02 (50: 0.04; 10: 0.28).
ENOUGH = 100


def margins(logits: Any, labels: Any) -> Floats:
    """``z_y - log sum over c != y of exp z_c = log(p_y / (1 - p_y))``: (..., N) from logits (..., N, C) and columns (N,)."""
    z = np.asarray(logits.detach().cpu().numpy() if hasattr(logits, "detach") else logits, dtype=np.float64)
    y = np.asarray(labels)
    if z.ndim < 2 or z.shape[-2:-1] != y.shape or z.shape[-1] < 2:
        raise BadInput(
            f"margins need logits (..., N, C) of two classes or more and N labels, got {z.shape} and {y.shape}"
        )
    if not np.isfinite(z).all() or (y < 0).any() or (y >= z.shape[-1]).any():
        raise BadInput("NaN or infinity among the logits, or a label that is no column")
    at = np.broadcast_to(y[:, None], (*z.shape[:-1], 1))
    own, rest = np.take_along_axis(z, at, -1), z.copy()
    np.put_along_axis(rest, at, -np.inf, -1)
    top = rest.max(-1, keepdims=True)
    return np.asarray((own - top - np.log(np.exp(rest - top).sum(-1, keepdims=True)))[..., 0])


def klom(unlearned: ArrayLike, oracles: ArrayLike, estimator: str | None = None, edge: str = "closed") -> Floats:
    """KLoM of every example, (n,), from margins (N, n) of unlearned networks and (M, n) of oracles.

    Args:
        estimator: ``histogram``: margins are clipped to [-100, 100] and counted in 20 equal bins over the range of both samples, and
            empty bins of the oracles hold 1e-5; at most ln(1e5) = 11.5. ``gaussian``: the KL of two normals with the samples' means and
            variances, ``ln(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2``, cut off at ln(1e5) too, so that a class which no oracle knows
            does not drown the mean. None: histogram if both sides have `ENOUGH` networks, else gaussian.
        edge: ``closed``: the last bin holds the largest margin, too. ``open``: the published code's convention, which drops every sample
            at the upper end of the range and takes the rest for all.

    Raises:
        BadInput: shapes that do not fit, NaN, fewer than two networks on a side, or an unknown word.
    """
    p, q = (np.clip(np.asarray(side, dtype=np.float64), -CLIP, CLIP) for side in (unlearned, oracles))
    if p.ndim != 2 or q.ndim != 2 or p.shape[1] != q.shape[1] or min(len(p), len(q)) < 2:
        raise BadInput(f"KLoM needs margins (N, n) and (M, n) of two networks or more, got {p.shape} and {q.shape}")
    if np.isnan(p).any() or np.isnan(q).any():
        raise BadInput("NaN among the margins")
    if estimator is None:
        estimator = default_estimator(len(p), len(q))
    if estimator == "gaussian":
        return _gaussian(p, q)
    if estimator != "histogram" or edge not in ("closed", "open"):
        raise BadInput(f"estimator={estimator!r}, edge={edge!r}: there is histogram and gaussian, closed and open")
    return _histogram(p, q, edge == "closed")


def default_estimator(unlearned: int, oracles: int) -> str:
    """``gaussian`` for fewer than `ENOUGH` networks on either side, else ``histogram``."""
    return "histogram" if min(unlearned, oracles) >= ENOUGH else "gaussian"


def said(values: ArrayLike) -> dict[str, float]:
    """Mean and 95th percentile over examples: all of a request's KLoM that may be kept."""
    found = np.asarray(values, dtype=np.float64)
    if not found.size:
        raise BadInput("there are no examples to take the mean of")
    return {"mean": float(found.mean()), "p95": float(np.percentile(found, 95))}


def _gaussian(p: Floats, q: Floats) -> Floats:
    # A spread of a billionth of a nat stands for none: two constant samples are alike if they are equal.
    (m, v), (n, w) = ((x.mean(0), np.maximum(x.var(0, ddof=1), 1e-18)) for x in (p, q))
    found = 0.5 * (np.log(w / v) + (v + np.square(m - n)) / w - 1.0)
    return np.asarray(np.clip(found, 0.0, -math.log(EPSILON)))


def _histogram(p: Floats, q: Floats, closed: bool) -> Floats:
    low = np.minimum(p.min(0), q.min(0))
    high = np.maximum(p.max(0), q.max(0))
    high = np.where(low >= high, low + 1.0, high)
    edges = np.linspace(low, high, BINS + 1)
    found = np.zeros(p.shape[1])
    for column in range(p.shape[1]):
        counts = []
        for sample in (p[:, column], q[:, column]):
            place = np.searchsorted(edges[:, column], sample, side="right") - 1
            if closed:
                place = np.minimum(place, BINS - 1)
            count = np.bincount(place[place < BINS], minlength=BINS).astype(np.float64)
            counts.append(count / max(count.sum(), 1.0))
        a, b = counts
        full = a > 0
        found[column] = (a[full] * np.log(a[full] / np.maximum(b[full], EPSILON))).sum()
    return found


__all__ = ["BINS", "CLIP", "ENOUGH", "EPSILON", "default_estimator", "klom", "margins", "said"]
