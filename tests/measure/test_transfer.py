"""Transfer: matrices written by hand, the papers' sums as loops, and a life."""

from __future__ import annotations

from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import remanence as rm
from remanence.core.errors import BadInput
from remanence.core.problem import Classification, Regression
from remanence.data import split_digits
from remanence.measure.metrics.transfer import Transfer
from remanence.models import mlp

#: Rows 0, 1 and 3 learn tasks 0, 1 and 2; row 2 is a forget request.
LIFE = [[0.9, nan, nan], [0.7, 0.8, nan], [0.6, 0.75, nan], [0.5, 0.85, 0.6]]


def measured(matrix: Any, learned: Any = None, problem: Any = None, **knobs: Any) -> dict[str, float]:
    c: Any = SimpleNamespace(matrix=matrix, learned=learned, problem=problem or Classification())
    return Transfer(**knobs).value(c)


@pytest.mark.fidelity(
    "measure/transfer",
    check="matrices by hand; both papers' double sums as loops over 50 random square matrices",
    measured="difference below 1e-12",
    paper="by the definitions",
    differs="rows that learn nothing count as rows",
)
def test_figures_by_hand() -> None:
    found = measured(LIFE, [0, 1, 3], alone=[0.95, 0.9, 0.8, 0.1])
    assert found == {
        "transfer/backward/gem": pytest.approx((-0.4 + 0.05) / 2),
        "transfer/backward/diaz": pytest.approx((-0.2 - 0.3 - 0.4 - 0.05 + 0.05) / 5),
        "transfer/remembering": pytest.approx(1 - 0.18),
        "transfer/forward/alone": pytest.approx((-0.1 - 0.2) / 2),
        "plasticity": pytest.approx((0.9 + 0.8 + 0.6) / 3),
        "plasticity/last": 0.6,
        "plasticity/last/lost": pytest.approx(0.2),
    }
    assert measured([[0.4]], [0]) == {"plasticity": 0.4, "plasticity/last": 0.4}
    assert measured(None) == measured([]) == measured([[]]) == {}
    gone = [row[:] for row in LIFE]
    gone[3][0] = nan  # forgotten on request: no row of it counts from there
    assert measured(gone, [0, 1, 3])["transfer/backward/gem"] == pytest.approx(0.05)
    assert measured(gone, [0, 1, 3])["transfer/backward/diaz"] == pytest.approx((-0.2 - 0.3 - 0.05 + 0.05) / 4)


@pytest.mark.parametrize("seed", range(50))
def test_against_the_sums_of_both_papers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    r, b = rng.random((n, n)), rng.random(n)
    found = measured(r.tolist(), random=b.tolist(), alone=b.tolist())
    gem_b = sum(r[n - 1][i] - r[i][i] for i in range(n - 1)) / (n - 1)
    gem_f = sum(r[i - 1][i] - b[i] for i in range(1, n)) / (n - 1)
    pairs = n * (n - 1) / 2
    diaz_b = sum(r[i][j] - r[j][j] for i in range(1, n) for j in range(i)) / pairs
    diaz_f = sum(r[i][j] for i in range(n) for j in range(i + 1, n)) / pairs
    expected = {
        "transfer/backward/gem": gem_b,
        "transfer/forward/gem": gem_f,
        "transfer/backward/diaz": diaz_b,
        "transfer/forward/diaz": diaz_f,
        "transfer/remembering": 1 - abs(min(diaz_b, 0)),
        "transfer/forward/alone": sum(r[i][i] - b[i] for i in range(1, n)) / (n - 1),
        "plasticity": sum(r[i][i] for i in range(n)) / n,
        "plasticity/last": r[n - 1][n - 1],
        "plasticity/last/lost": b[n - 1] - r[n - 1][n - 1],
    }
    assert found == {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()}
    if n == 2:  # one pair only: the conventions agree
        assert found["transfer/backward/gem"] == pytest.approx(found["transfer/backward/diaz"])


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="alone has 2 figures for 3 tasks"):
        measured(LIFE, [0, 1, 3], alone=[0.9, 0.9])
    with pytest.raises(BadInput, match="accuracy"):
        measured(LIFE, [0, 1, 3], problem=Regression())


@pytest.mark.parametrize("seed", range(3))
def test_purpose_a_life_says_what_it_forgets_and_that_it_still_learns(seed: int, tmp_path: Path) -> None:
    """Five pairs of digits: every task is learned (plasticity near 1) and lost to the next one. A network that is frozen after the
    first, here by a rate of 0, has nothing to lose and learns nothing: only plasticity tells."""
    stream = split_digits(seed=seed)

    def lived(name: str, lr: float) -> dict[str, float]:
        with rm.Life(
            mlp(64, [32], seed=seed), home=tmp_path / name, measure=[Transfer(alone=[1.0] * 5)], seed=seed
        ) as life:
            for task in stream:
                life.learn(task, epochs=10, lr=lr if task.id else 5e-3)
            return {k: v for k, v in life.events[-1].measures.items() if "plasticity" in k or "transfer" in k}

    plastic, stiff = lived("plastic", 5e-3), lived("stiff", 0.0)
    assert plastic["transfer/backward/gem"] < -0.8 and plastic["plasticity"] > 0.95
    assert plastic["transfer/backward/gem"] <= plastic["transfer/backward/diaz"] + 0.05
    assert stiff["transfer/backward/gem"] > -0.2 and stiff["plasticity"] < 0.4 and stiff["plasticity/last/lost"] > 0.8
