"""Errors: one family, and the nearest valid name."""

from __future__ import annotations

import pytest

from remanence.core import errors


def test_every_error_is_one_of_ours_and_of_the_builtin_it_specialises() -> None:
    found = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, Exception)]
    assert len(found) == 12 and all(issubclass(cls, errors.RemanenceError) for cls in found)
    assert issubclass(errors.BadInput, ValueError) and issubclass(errors.StorageError, OSError)
    assert issubclass(errors.PlanError, errors.BadInput) and issubclass(errors.UnknownName, errors.BadInput)
    assert all(cls.__doc__ for cls in found)


@pytest.mark.parametrize(("name", "hint"), [("replai", "'replay'"), ("EWC", "'ewc'"), ("lw", "'lwf'")])
def test_the_nearest_name_is_offered(name: str, hint: str) -> None:
    assert errors.nearest(name, ["replay", "ewc", "lwf"]) == f"; did you mean {hint}?"


def test_nothing_is_offered_where_nothing_is_near() -> None:
    assert errors.nearest("zzz", ["replay", "ewc"]) == "" and errors.nearest("x", []) == ""
    assert errors.nearest("ssd", iter(["SSD"])) == "; did you mean 'SSD'?"  # spelled as the original is
