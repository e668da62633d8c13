"""Knobs: types, ranges and choices are checked, names are corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from remanence.core.errors import BadInput, UnknownName
from remanence.core.knobs import build, check_knobs, knob


@dataclass
class Oven:
    heat: float = knob(1.0, "how hot", low=0, high=10)
    trays: int = knob(2, "how many", low=1)
    mode: str = knob("air", "how", choices=("air", "grill"))
    names: list[str] = knob([], "whose")
    limit: int | None = knob(None, "at most", low=0)
    pair: tuple[float, float] = knob((0.5, 1.0), "a range")
    more: dict[str, Any] = knob({}, "anything")

    def __post_init__(self) -> None:
        check_knobs(self)


@pytest.mark.parametrize(
    "knobs",
    [{"heat": 10}, {"heat": 0.0}, {"trays": 1}, {"mode": "grill"}, {"names": ["a"]}, {"limit": 0}, {"limit": None}, {"pair": [1, 2.5]}, {"more": {"x": 1}}],
)  # fmt: skip
def test_values_within_bounds_are_taken_as_they_are(knobs: dict[str, Any]) -> None:
    made = build(Oven, knobs)
    assert {name: getattr(made, name) for name in knobs} == knobs


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"heat": -0.1}, r"oven|Oven.*heat=-0.1.*\[0, 10\]"),
        ({"heat": 10.1}, "outside its range"),
        ({"heat": float("nan")}, "outside its range"),
        ({"heat": "1"}, "expected float"),
        ({"heat": True}, "wrong type"),
        ({"trays": 1.0}, "expected int"),
        ({"trays": False}, "wrong type"),
        ({"trays": 0}, r"\[1, inf\]"),
        ({"mode": "grll"}, "did you mean 'grill'"),
        ({"names": "abc"}, "wrong type"),
        ({"names": [1]}, "wrong type"),
        ({"limit": -1}, "outside"),
        ({"limit": 1.5}, "wrong type"),
        ({"more": 3}, "wrong type"),
    ],
)
def test_others_are_refused_by_name_value_and_bound(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build(Oven, knobs)


def test_an_unknown_knob_comes_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"bakery has no knob 'tray'; did you mean 'trays'.*heat, trays"):
        build(Oven, {"tray": 3}, "bakery")
    with pytest.raises(UnknownName, match="its knobs are"):
        build(Oven, {"zzzzzz": 3})


def test_default_lists_are_not_shared_and_fields_know_their_meaning() -> None:
    Oven().names.append("x")
    assert Oven().names == []
    meta = Oven.__dataclass_fields__["mode"].metadata
    assert meta["doc"] == "how" and meta["choices"] == ("air", "grill")
