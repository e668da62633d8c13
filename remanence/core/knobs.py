"""Hyper-parameters as dataclass fields that know their meaning, type and range."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from remanence.core.errors import BadInput, UnknownName, nearest


def knob(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A dataclass field with a default, a sentence, and the closed range or the choices it accepts."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": tuple(choices) if choices else None}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (tuple, list) or hint in (tuple, list):
        inner = [option for option in typing.get_args(hint) if option is not Ellipsis]
        return isinstance(value, tuple | list) and (not inner or all(_fits(item, inner[0]) for item in value))
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return isinstance(value, Mapping)
    return not isinstance(hint, type) or isinstance(value, hint)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_knobs(obj: Any) -> None:
    """Check every field of a dataclass instance against its type hint, range and choices.

    Raises:
        BadInput: names the knob, the value given and what is accepted.
    """
    name = getattr(obj, "slug", "") or type(obj).__name__
    hints = _hints(type(obj))  # type: ignore[arg-type]  # classes are hashable
    for field in dataclasses.fields(obj):
        value, meta = getattr(obj, field.name), field.metadata
        where = f"{name}: {field.name}={value!r}"
        if not _fits(value, hints[field.name]):
            raise BadInput(f"{where} has the wrong type; expected {_plain(hints[field.name])}")
        if meta.get("choices") and value not in meta["choices"]:
            hint = nearest(str(value), [str(choice) for choice in meta["choices"]])
            raise BadInput(f"{where} is not one of {', '.join(map(repr, meta['choices']))}{hint}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = meta.get("low"), meta.get("high")
            if math.isnan(value) or (low is not None and value < low) or (high is not None and value > high):
                span = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
                raise BadInput(f"{where} is outside its range {span}")


def build(cls: type[Any], knobs: Mapping[str, Any], name: str = "") -> Any:
    """Build `cls` from a mapping of knobs.

    Raises:
        UnknownName: a knob that `cls` does not have, with the nearest valid one.
        BadInput: a value of the wrong type or out of range.
    """
    valid = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in knobs:
        if key not in valid:
            has = f"its knobs are {', '.join(valid)}" if valid else "it has no knobs"
            raise UnknownName(f"{name or cls.__name__} has no knob {key!r}{nearest(str(key), valid)} ({has})")
    return cls(**knobs)


def _plain(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
