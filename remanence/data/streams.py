"""Streams that a plan can name; the keyword arguments of each are its knobs.

A stream over a user's own data names its `source`, and held-out rows as `test` or by `test_share`:

    stream: {blurry: {source: {csv: {path: people.csv, label: kind}}, tasks: 5, share: 0.2}}

Paths are relative to the folder in which the command runs, as a life's home keeps a copy of its plan elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.data.corrupted import corrupted
from remanence.data.digits import digits, idx, split_classes, split_digits, split_idx
from remanence.data.examples import Examples
from remanence.data.folders import images
from remanence.data.mapped import memmap
from remanence.data.stream import Stream
from remanence.data.tables import csv, npz
from remanence.data.transformed import blurry, permuted, rotated

#: What a stream's `source` can be; the keyword arguments of each are its knobs.
SOURCES: dict[str, Callable[..., Examples]] = {
    "digits": digits,
    "idx": idx,
    "csv": csv,
    "npz": npz,
    "images": images,
    "memmap": memmap,
}
Source = Literal["digits"] | dict[Literal["digits", "idx", "csv", "npz", "images", "memmap"], dict[str, Any] | None]


def examples_of(source: Source) -> Examples:
    """The examples that ``{name: knobs}`` names.

    Raises:
        UnknownName: a source or a knob that does not exist.
        BadInput: not one name, a knob that is missing, or whatever the loader refuses.
    """
    given: dict[Any, Any] = {source: None} if isinstance(source, str) else dict(source)
    if len(given) != 1:
        raise BadInput(
            f"a source is one name as {{name: {{knob: value}}}}, not {', '.join(map(str, given)) or 'nothing'}"
        )
    name, knobs = next(iter(given.items()))
    if name not in SOURCES:
        raise UnknownName(f"no source is called {name!r}{nearest(str(name), SOURCES)} (there is {', '.join(SOURCES)})")
    parameters = inspect.signature(SOURCES[name]).parameters
    for knob in knobs or {}:
        if knob not in parameters:
            has = f"its knobs are {', '.join(parameters)}" if parameters else "it has no knobs"
            raise UnknownName(f"source {name} has no knob {knob!r}{nearest(str(knob), parameters)} ({has})")
    for lacking in [p.name for p in parameters.values() if p.default is p.empty and p.name not in (knobs or {})]:
        raise BadInput(f"source {name} needs {lacking}; write source: {{{name}: {{{lacking}: ...}}}}")
    return SOURCES[name](**(knobs or {}))


def _test(test: Source | None) -> Examples | None:
    return None if test is None else examples_of(test)


def _split(
    source: Source,
    tasks: int | list[list[int]] = 5,
    test: Source | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    return split_classes(examples_of(source), tasks, _test(test), test_share, seed)


def _blurry(
    source: Source,
    tasks: int | list[list[int]] = 5,
    share: float = 0.1,
    test: Source | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    return blurry(examples_of(source), tasks, share, _test(test), test_share, seed)


def _permuted(
    source: Source, tasks: int = 5, test: Source | None = None, test_share: float = 0.25, seed: int = 0
) -> Stream:
    return permuted(examples_of(source), tasks, _test(test), test_share, seed)


def _rotated(
    source: Source,
    tasks: int | list[float] = 5,
    test: Source | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    return rotated(examples_of(source), tasks, _test(test), test_share, seed)


def _corrupted(
    source: Source,
    how: str = "patch",
    share: float = 0.05,
    reveal: float = 0.5,
    tasks: int | list[list[int]] = 1,
    target: int = 0,
    pair: list[int] = [0, 1],  # noqa: B006  # a plan's default, never changed
    size: int = 3,
    value: float = 1.0,
    test: Source | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    return corrupted(
        examples_of(source), how, share, reveal, tasks, target, pair, size, value, _test(test), test_share, seed
    )


STREAMS: dict[str, Callable[..., Stream]] = {
    "split-digits": split_digits,
    "split-idx": split_idx,
    "split-classes": _split,
    "blurry": _blurry,
    "permuted": _permuted,
    "rotated": _rotated,
    "corrupted": _corrupted,
}
