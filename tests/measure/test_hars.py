"""The figure of KORE, from the numbers of its tables."""

from __future__ import annotations

import pytest

from remanence.core.errors import BadInput
from remanence.measure.hars import hars


@pytest.mark.parametrize(
    ("adapted", "retained", "published"),
    [(16.77, 33.47, 63.8), (14.67, 43.00, 66.0), (35.96, 40.00, 82.8), (36.19, 42.10, 84.9)],
    ids=["LoRA", "replay", "KORE 235", "KORE 256"],
)
def test_the_papers_figures(adapted: float, retained: float, published: float) -> None:
    assert hars(7.12, 46.74, adapted, retained) == pytest.approx(published, abs=0.1)


def test_its_ends() -> None:
    assert hars(10, 50, 10, 50) == 0
    assert hars(10, 50, 20, 50) == pytest.approx(2 * 50 * 100 / 150)
    assert hars(10, 50, 1e9, 50) == pytest.approx(100)
    assert hars(10, 50, 9, 50) < 0
    for before in ((0, 50), (10, 0)):
        with pytest.raises(BadInput, match="above 0"):
            hars(*before, 10, 50)
    with pytest.raises(BadInput, match="no value"):
        hars(10, 50, 0, 50)
