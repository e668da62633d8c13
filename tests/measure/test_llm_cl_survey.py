"""The survey's protocol: a matrix worked by hand, what always holds, no division by nothing, and a life."""

from __future__ import annotations

from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import remanence as rm
from remanence.core.errors import BadInput
from remanence.core.problem import CausalLM, Classification, Regression
from remanence.data import Task, split_digits
from remanence.measure.metrics.llm_cl_survey import LLMSurvey, ability_delta, fuar, protocol
from remanence.models import mlp
from tests.lm import CONTEXT, facts, tiny

HAND = [[0.8, 0.2, 0.1, 0.3], [0.9, 0.7, 0.2, 0.3], [0.6, 0.5, 0.9, 0.1], [0.7, 0.4, 0.8, 0.6]]


@pytest.mark.fidelity(
    "measure/llm-cl-survey",
    check="a 4x4 matrix worked by hand; its sums as loops and F >= -BWT over 100 random matrices",
    measured="difference below 1e-12",
    paper="by the definitions",
    differs="rows that learn nothing count as rows",
)
def test_a_matrix_by_hand() -> None:
    """Tasks 0 to 2 at the end against the diagonal: -0.1, -0.3, -0.1; against the best before: 0.2, 0.3, 0.1."""
    found = protocol(HAND, [0.1, 0.1, 0.2, 0.2])
    assert found == {
        "op": pytest.approx((0.7 + 0.4 + 0.8 + 0.6) / 4),
        "bwt": pytest.approx(-0.5 / 3),
        "f": pytest.approx(0.6 / 3),
        "fwt": pytest.approx(((0.2 - 0.1) + (0.2 - 0.2) + (0.1 - 0.2)) / 3, abs=1e-12),
    }
    second = protocol(HAND, [0.1, 0.1, 0.2, 0.2], at=1)
    assert second == {
        "op": pytest.approx((0.9 + 0.7) / 2),
        "bwt": pytest.approx(0.1),
        "f": pytest.approx(-0.1),
        "fwt": pytest.approx(0.1),
    }
    alone = protocol(HAND, at=0)
    assert alone["op"] == 0.8 and isnan(alone["bwt"]) and isnan(alone["f"]) and isnan(alone["fwt"])


@pytest.mark.parametrize("seed", range(100))
def test_against_sums_as_loops_and_what_always_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    r, b = rng.random((n, n)), rng.random(n)
    t = n - 1
    expected = {
        "op": sum(r[t][i] for i in range(n)) / n,
        "bwt": sum(r[t][i] - r[i][i] for i in range(t)) / t,
        "f": sum(max(r[s][i] for s in range(i, t)) - r[t][i] for i in range(t)) / t,
        "fwt": sum(r[i - 1][i] - b[i] for i in range(1, n)) / t,
    }
    found = protocol(r, b)
    assert found == {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()}
    assert found["f"] >= -found["bwt"] - 1e-12
    error = protocol(1 - r, 1 - b, lower=True)  # the same life told in errors
    assert error["op"] == pytest.approx(1 - found["op"])
    assert {name: error[name] for name in ("bwt", "f", "fwt")} == {
        name: pytest.approx(found[name], abs=1e-12) for name in ("bwt", "f", "fwt")
    }


def test_where_nothing_changes_nothing_is_lost_and_there_is_no_gain() -> None:
    still = np.tile([0.5, 0.7, 0.9], (3, 1))
    found = protocol(still, still[0])
    assert found["bwt"] == found["f"] == found["fwt"] == ability_delta(still) == 0
    assert isnan(fuar((0.5, 0.5), (0.1, 0.1), (0.2, 0.2))) and isnan(fuar((0.5, 0.1), (0.3, 0.2)))


def test_ability_and_what_was_paid_for_a_fact() -> None:
    suites = [[0.6, 0.5, nan], [0.5, 0.5, 0.3], [0.2, 0.7, 0.9]]
    assert ability_delta(suites) == pytest.approx((-0.4 + 0.2) / 2)
    assert ability_delta(suites, at=1) == pytest.approx(-0.05)
    assert ability_delta(suites, lower=True) == pytest.approx(0.1)
    assert isnan(ability_delta([[nan], [0.5]]))
    assert fuar((0.8, 0.6), (0.1, 0.3), (0.0, 0.2)) == pytest.approx(0.5)
    assert fuar((0.8, 0.7), new=(0.0, 0.1)) == pytest.approx(1)  # one forgotten for each that is gained
    assert fuar((0.6, 0.8), (0.1, 0.3)) == 0  # nothing is forgotten
    stages = fuar([(0.8, 0.6), (0.7, 0.8)], [(0.1, 0.3), (0.3, 0.2)], [(0.0, 0.2), (0.1, 0.2)])
    assert stages == pytest.approx(0.2 / (0.2 + 0.3))  # what rises in F, and falls in U, counts for nothing
    assert fuar((20.0, 22.0), new=(50.0, 30.0), lower=True) == pytest.approx(0.1)


def test_bad_input() -> None:
    for made, match in (
        (lambda: protocol(HAND, [0.1]), "initial has 1 figures for 4 tasks"),
        (lambda: ability_delta([0.1, 0.2]), "stages"),
        (lambda: ability_delta([[0.1], [0.2]], at=2), "rows 0 to 1"),
        (lambda: fuar((0.1, 0.2, 0.3)), "invariant must be"),
    ):
        with pytest.raises(BadInput, match=match):
            made()


def measured(matrix: Any, learned: Any, problem: Any, **knobs: Any) -> dict[str, float]:
    c: Any = SimpleNamespace(matrix=matrix, learned=learned, problem=problem)
    return LLMSurvey(**knobs).value(c)


def test_what_is_not_defined_is_left_out_and_errors_are_turned() -> None:
    life = [[0.9, nan], [0.7, nan], [0.6, 0.8]]  # the second row is a forget request
    found = measured(life, [0, 2], CausalLM())
    assert found == {"llm/op": pytest.approx(0.7), "llm/bwt": pytest.approx(-0.3), "llm/f": pytest.approx(0.3)}
    error = measured(life, [0, 2], Regression())
    assert error == {"llm/op": pytest.approx(0.7), "llm/bwt": pytest.approx(0.3), "llm/f": pytest.approx(-0.1)}
    full = measured(HAND, [0, 1, 2, 3], Classification(), initial=[0.0] * 4)
    assert full["llm/fwt"] == pytest.approx(0.5 / 3)
    assert measured([[0.9]], [0], CausalLM()) == {"llm/op": 0.9} and measured(None, None, CausalLM()) == {}


@pytest.mark.parametrize("seed", range(3))
def test_purpose_a_life_of_facts_says_what_it_forgets(seed: int, tmp_path: Path) -> None:
    """The same questions get other answers: the old ones are gone. Other questions: a little more of them stays.
    Measured: forgetting 0.80 to 0.86, and 0.70 to 0.76."""
    old = facts(24, 0)
    found = {}
    for name, new in (("contradicted", facts(24, 1, first_id=100)), ("other", facts(24, 1, keys=1, first_id=100))):
        with rm.Life(
            tiny(seed, 32), problem=CausalLM(context=CONTEXT), home=tmp_path / name, measure=[LLMSurvey()], seed=seed
        ) as life:
            for number, data in enumerate((old, new)):
                life.learn(Task(data, data, id=number), epochs=30, lr=5e-3, batch_size=12)
            found[name] = {key: v for key, v in life.events[-1].measures.items() if key.startswith("llm/")}
    for figures in found.values():
        assert figures["llm/bwt"] == -figures["llm/f"] < -0.6 and 0.5 < figures["llm/op"] < 0.7
    assert found["contradicted"]["llm/f"] > found["other"]["llm/f"] + 0.02


def test_a_life_of_digits_agrees_with_its_own_matrix(tmp_path: Path) -> None:
    with rm.Life(mlp(64, [16]), home=tmp_path, measure=[LLMSurvey(), "forgetting"]) as life:
        for task in split_digits().tasks[:3]:
            life.learn(task, epochs=3, lr=5e-3)
        said = life.events[-1].measures
    assert said["llm/f"] == pytest.approx(said["forgetting"]) and said["llm/f"] > 0.2
    assert said["llm/bwt"] == pytest.approx(said["backward_transfer_gem"])
