"""One figure for how well new knowledge went in and how well the old stayed (KORE, arXiv 2510.19316)."""

from __future__ import annotations

from remanence.core.errors import BadInput


def hars(adapted_before: float, retained_before: float, adapted: float, retained: float) -> float:
    """The harmonic mean of what was gained and what was kept, each relative to the model before and on a scale of 0 to 100.

        G_A = 100 (adapted - adapted_before) / adapted_before,  f_A = 100 G_A / (G_A + 100)
        f_R = 100 retained / retained_before,                   2 f_A f_R / (f_A + f_R)

    Gains run into f_A = 100 from below: twice the score gives 50, ten times 90. With nothing gained it is 0, with less than before
    negative.

    Args:
        adapted_before, adapted: the score on the new knowledge before and after; in the paper the mean of two scores, whether the answer
            contains the right words, and its word F1.
        retained_before, retained: the score on what was known.

    Raises:
        BadInput: a score before that is not above 0, or scores to which no mean can be given.
    """
    if adapted_before <= 0 or retained_before <= 0:
        raise BadInput(
            f"hars is relative to the scores before, which must be above 0: {adapted_before}, {retained_before}"
        )
    gain = 100 * (adapted - adapted_before) / adapted_before
    kept = 100 * retained / retained_before
    if gain <= -100 or (gained := 100 * gain / (gain + 100)) + kept == 0:
        raise BadInput(f"hars has no value for a gain of {gain:.3g} % and {kept:.3g} % kept")
    return 2 * gained * kept / (gained + kept)
