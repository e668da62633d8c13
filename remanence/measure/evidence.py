"""From measurements to words: is a forget request's result closer to retraining than doing nothing was?

Three things are measured alike: the references (models retrained without the request, one value each), the model
after the method, and the model with nothing done. The references' spread over seeds is what tells a difference from
luck; with one reference there is none, and nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from remanence.core.errors import BadInput

Verdict = Literal[
    "indistinguishable from retraining",
    "closer than doing nothing",
    "no closer",
    "farther",
    "this request cannot tell",
    "spread unknown",
]
#: `nearest`: the nearer to the references the better, from either side. `lower`: the values are distances to the references.
Direction = Literal["nearest", "lower"]

_TINY = 1e-12  # differences below this are rounding


@dataclass(frozen=True)
class Cell:
    """One row of a receipt's table. `ci95` is the half width of the 95 % interval of the references' mean, None with
    one reference."""

    metric: str
    after: float
    nothing: float
    reference_mean: float | None
    reference_sd: float | None
    n: int
    ci95: float | None
    direction: Direction
    verdict: Verdict


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % interval, ``t_{.975, n-1} s / sqrt(n)``; the half width is None for a single
    value.

    Raises:
        BadInput: no values, or one that is not finite.
    """
    x = _finite("values", values)
    half = None if len(x) == 1 else _t(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()), half


def prediction_half(values: Sequence[float]) -> float:
    """Half width of the 95 % interval in which one more reference would lie: ``t_{.975, n-1} s sqrt(1 + 1/n)``.

    Raises:
        BadInput: fewer than two values.
    """
    x = _finite("values", values)
    if len(x) < 2:
        raise BadInput("one reference has no spread; make at least two, better three")
    return _t(len(x) - 1) * float(x.std(ddof=1)) * math.sqrt(1 + 1 / len(x))


def compare(metric: str, references: Sequence[float], after: float, nothing: float, margin: float = 0.0) -> Cell:
    """The cell of a figure that each model has by itself: an accuracy, an attack's AUC, a mean loss.

    Distance is two-sided: an accuracy or AUC below the references' tells an attacker as much as one above. In order:

    - One reference: ``spread unknown``.
    - Doing nothing lies within the references' prediction interval, so the request has nothing to show: ``this request
      cannot tell``. But if the model left that interval and went away from the references, it is ``farther``: a wrecked
      model is not to be taken for a hard question.
    - The model lies within it: ``indistinguishable from retraining``.
    - Else by the 95 % t-interval of the paired differences ``|nothing - ref_i| - |after - ref_i|``: all above `margin`,
      ``closer than doing nothing``; all below ``-margin``, ``farther``; else ``no closer``.

    Args:
        metric: its name, for the table.
        references: (n,) the figure of each reference.
        after: the figure after the method.
        nothing: the figure of the model as it was.
        margin: the smallest change of distance that counts, in the figure's own unit. The t-interval knows the spread
            over seeds only; where both models lie on one side of all references its width is 0, and any change counts.

    Raises:
        BadInput: no reference, or a value that is not finite.
    """
    refs = _finite(metric, references)
    _finite(metric, [after, nothing])
    gain = np.abs(nothing - refs) - np.abs(after - refs)
    limit = math.inf if len(refs) == 1 else prediction_half(refs.tolist()) + _TINY
    mean = float(refs.mean())
    verdict = _verdict(len(refs), abs(nothing - mean) <= limit, abs(after - mean) <= limit, gain, margin)
    return _cell(metric, refs, after, nothing, "nearest", verdict)


def compare_distances(
    metric: str,
    after: Sequence[float],
    nothing: Sequence[float],
    between: Sequence[float] | None = None,
    margin: float = 0.0,
) -> Cell:
    """The cell of a divergence: `after` and `nothing` (n,) are the two models' distances to each reference, such as
    mean KL.

    `between` (n,) says how far the references are from each other: for each, its mean distance to the others
    (`leave_one_out`). A model is indistinguishable from retraining if its mean distance is at most the upper end of
    their prediction interval. Without `between` nobody can be. `reference_mean` and `reference_sd` are those of
    `between`, None without it.

    Raises:
        BadInput: no reference, unequal lengths, or a value that is not finite.
    """
    x, y = _finite(metric, after), _finite(metric, nothing)
    if len(x) != len(y):
        raise BadInput(f"{metric}: {len(x)} distances after and {len(y)} of doing nothing; give one per reference")
    if between is None or len(x) == 1:
        own, limit = np.array([], dtype=np.float64), -math.inf
    else:
        own = _finite(metric, between)
        if len(own) != len(x):
            raise BadInput(
                f"{metric}: {len(own)} distances between references for {len(x)} references; see leave_one_out"
            )
        limit = float(own.mean()) + prediction_half(own.tolist()) + _TINY
    verdict = _verdict(len(x), float(y.mean()) <= limit, float(x.mean()) <= limit, y - x, margin)
    if not len(own):
        return Cell(metric, float(x.mean()), float(y.mean()), None, None, len(x), None, "lower", verdict)
    return _cell(metric, own, float(x.mean()), float(y.mean()), "lower", verdict)


def leave_one_out(distances: Sequence[Sequence[float]]) -> list[float]:
    """From distances[i][j] between references (n, n), the mean distance of each to the others, diagonal left out;
    needs n >= 2."""
    d = np.asarray(distances, dtype=np.float64)
    if d.ndim != 2 or d.shape[0] != d.shape[1] or len(d) < 2:
        raise BadInput(f"distances between references must be (n, n) with n >= 2, got {d.shape}")
    rest = ~np.eye(len(d), dtype=bool)
    return [float(d[i, rest[i]].mean()) for i in range(len(d))]


def earned_unlearned(cells: Iterable[Cell]) -> tuple[bool, str]:
    """Whether the word *unlearned* was earned, and why (not).

    It is if at least one cell got measurably closer to retraining (or reached it, where doing nothing had not) and
    none got farther.
    """
    table = list(cells)
    if not table:
        return False, "nothing was measured"
    if any(cell.n == 1 for cell in table):
        return False, "one reference: spread unknown"
    worse = [cell.metric for cell in table if cell.verdict == "farther"]
    if worse:
        return False, f"farther from retraining than doing nothing: {', '.join(worse)}"
    good = ("closer than doing nothing", "indistinguishable from retraining")
    better = [cell.metric for cell in table if cell.verdict in good]
    if better:
        return True, f"closer to retraining than doing nothing: {', '.join(better)}"
    if all(cell.verdict == "this request cannot tell" for cell in table):
        return False, "this request cannot tell: doing nothing already looks like retraining"
    return False, "no figure is closer to retraining than doing nothing"


def _verdict(n: int, nothing_inside: bool, after_inside: bool, gain: NDArray[np.float64], margin: float) -> Verdict:
    if n == 1:
        return "spread unknown"
    mean, half = interval(gain.tolist())
    assert half is not None
    farther = mean + half < -margin - _TINY
    if nothing_inside:
        return "farther" if farther and not after_inside else "this request cannot tell"
    if after_inside:
        return "indistinguishable from retraining"
    if mean - half > margin + _TINY:
        return "closer than doing nothing"
    return "farther" if farther else "no closer"


def _cell(
    metric: str, refs: NDArray[np.float64], after: float, nothing: float, direction: Direction, verdict: Verdict
) -> Cell:
    n = len(refs)
    sd = None if n == 1 else float(refs.std(ddof=1))
    half = None if sd is None else _t(n - 1) * sd / math.sqrt(n)
    return Cell(metric, float(after), float(nothing), float(refs.mean()), sd, n, half, direction, verdict)


def _finite(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not bool(np.isfinite(x).all()):
        raise BadInput(f"{name}: needs at least one value, all finite, got {list(values)[:5]}")
    return x


def _t(freedom: int) -> float:
    """The .975 quantile of Student's t."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, 0.975))
