"""Streams that a plan can name; the keyword arguments of each are its knobs.

A stream over a user's own data names its `source`, and held-out rows as `test` or by `test_share`:

    stream: {blurry: {source: {csv: {path: people.csv, label: kind}}, tasks: 5, share: 0.2}}

What is laid over another stream names that as `stream`:

    stream: {long-tail: {stream: {si-blurry: {source: digits}}, ratio: 0.1}}

Paths are relative to the folder in which the command runs, as a life's home keeps a copy of its plan elsewhere.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.data.cifar import cifar10, cifar100
from remanence.data.corrupted import corrupted
from remanence.data.degraded import label_noise, long_tail
from remanence.data.digits import digits, idx, split_classes, split_digits, split_idx
from remanence.data.examples import Examples
from remanence.data.few_shot import few_shot
from remanence.data.folders import images
from remanence.data.instances import instance_incremental
from remanence.data.mapped import memmap
from remanence.data.nevis import dated
from remanence.data.omniglot import omniglot
from remanence.data.people import general_text, people, people_stream
from remanence.data.recurring import power_law, recurring, si_blurry
from remanence.data.stream import Stream, Task
from remanence.data.styles import styled
from remanence.data.tables import csv, npz
from remanence.data.text import text, text_stream
from remanence.data.transformed import blurry, permuted, rotated
from remanence.data.unlearning_sets import muse, rwku, tofu, wmdp
from remanence.data.vision import core50, core50_stream, imagenet_r, tiny_imagenet

T = TypeVar("T")

#: What a stream's `source` can be; the keyword arguments of each are its knobs.
SOURCES: dict[str, Callable[..., Examples]] = {
    "digits": digits,
    "idx": idx,
    "csv": csv,
    "npz": npz,
    "images": images,
    "memmap": memmap,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny-imagenet": tiny_imagenet,
    "imagenet-r": imagenet_r,
    "core50": core50,
    "omniglot": omniglot,
    "people": people,
    "general-text": general_text,
    "text": text,
    "tofu": tofu,
    "muse": muse,
    "rwku": rwku,
    "wmdp": wmdp,
}
_Vision = Literal["cifar10", "cifar100", "tiny-imagenet", "imagenet-r", "core50", "omniglot"]
_Text = Literal["people", "general-text", "text", "tofu", "muse", "rwku", "wmdp"]
Source = (
    Literal["digits", "people", "general-text"]
    | dict[Literal["digits", "idx", "csv", "npz", "images", "memmap"] | _Vision | _Text, dict[str, Any] | None]
)


def examples_of(source: Source) -> Examples:
    """The examples that ``{name: knobs}`` names.

    Raises:
        UnknownName: a source or a knob that does not exist.
        BadInput: not one name, a knob that is missing, or whatever the loader refuses.
    """
    return _made("source", source, SOURCES)


def stream_of(stream: str | Mapping[str, Any]) -> Stream:
    """The stream that ``{name: knobs}`` names.

    Raises:
        UnknownName: a stream or a knob that does not exist.
        BadInput: not one name, a knob that is missing, or whatever the stream refuses.
    """
    return _made("stream", stream, STREAMS)


def _made(what: str, given: str | Mapping[Any, Any], known: Mapping[str, Callable[..., T]]) -> T:
    """What ``{name: knobs}`` names among the `known`."""
    found: dict[Any, Any] = {given: None} if isinstance(given, str) else dict(given)
    if len(found) != 1:
        raise BadInput(
            f"a {what} is one name as {{name: {{knob: value}}}}, not {', '.join(map(str, found)) or 'nothing'}"
        )
    name, knobs = next(iter(found.items()))
    if name not in known:
        raise UnknownName(f"no {what} is called {name!r}{nearest(str(name), known)} (there is {', '.join(known)})")
    if not isinstance(knobs, Mapping | None):
        raise BadInput(f"the knobs of {what} {name} are {{knob: value}}, not {knobs!r}")
    parameters = inspect.signature(known[name]).parameters
    for knob in knobs or {}:
        if knob not in parameters:
            has = f"its knobs are {', '.join(parameters)}" if parameters else "it has no knobs"
            raise UnknownName(f"{what} {name} has no knob {knob!r}{nearest(str(knob), parameters)} ({has})")
    for lacking in [p.name for p in parameters.values() if p.default is p.empty and p.name not in (knobs or {})]:
        raise BadInput(f"{what} {name} needs {lacking}; write {what}: {{{name}: {{{lacking}: ...}}}}")
    for knob, value in (knobs or {}).items():
        _check_type(f"{what} {name}: {knob}", value, typing.get_type_hints(known[name])[knob])
    return known[name](**(knobs or {}))


def _check_type(where: str, value: Any, hint: Any) -> None:
    """Refuse a value of the wrong type, as a plan is checked; what JSON has no word for was given by a program and is its business."""
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError

    try:
        adapter, text = TypeAdapter(hint), json.dumps(value)
    except (PydanticSchemaGenerationError, TypeError):  # a type that pydantic knows nothing about, or no JSON
        return
    try:
        adapter.validate_json(text, strict=True)
    except ValidationError:
        expected = inspect.formatannotation(hint).replace("typing.", "")
        raise BadInput(f"{where}={value!r} has the wrong type; expected {expected}") from None


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


def _si_blurry(
    source: Source,
    tasks: int = 5,
    disjoint: float = 0.5,
    share: float = 0.1,
    test: Source | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    return si_blurry(examples_of(source), tasks, disjoint, share, _test(test), test_share, seed)


def _recurring(
    source: Source,
    tasks: int = 100,
    classes: int = 2,
    skew: float = 0.0,
    reduction: float = 1.0,
    test: Source | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    return recurring(examples_of(source), tasks, classes, skew, reduction, _test(test), test_share, seed)


def _power_law(
    source: Source,
    tasks: int | list[list[int]] = 5,
    share: float = 0.3,
    law: str = "power",
    rate: float = 1.0,
    test: Source | None = None,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    return power_law(examples_of(source), tasks, share, law, rate, _test(test), test_share, seed)


def _long_tail(
    stream: str | dict[str, dict[str, Any] | None], ratio: float = 0.01, shuffled: bool = False, seed: int = 0
) -> Stream:
    return long_tail(stream_of(stream), ratio, shuffled, seed)


def _label_noise(
    stream: str | dict[str, dict[str, Any] | None], share: float = 0.2, how: str = "symmetric", seed: int = 0
) -> Stream:
    return label_noise(stream_of(stream), share, how, seed)


def _styled(stream: str | dict[str, dict[str, Any] | None], share: float = 0.2, seed: int = 0) -> Stream:
    """Training rows in other styles; what a task is measured on stays."""
    plain = stream_of(stream)
    tasks = [
        Task(styled(task.train, share, seed), task.test, task.classes, task.names, task.id, task.strangers)
        for task in plain
    ]
    return Stream(tuple(tasks), plain.scenario, plain.borders, f"{plain.name}, styled")


def _nevis(
    sets: str | list[dict[str, Any]],
    size: int | list[int] = 64,
    gray: bool = False,
    test_share: float = 0.25,
    seed: int = 0,
) -> Stream:
    if not isinstance(sets, str):  # a `source` is what it is in every other stream
        sets = [{**each, "source": examples_of(each["source"])} if "source" in each else each for each in sets]
    return dated(sets, size, gray, test_share, seed)


def _few_shot(
    source: Source,
    sets: int = 5,
    interval: int = 1,
    ways: int = 5,
    shots: int = 1,
    targets: int = 5,
    overwrite: bool = False,
    instance: bool = False,
    corrupt: str = "noise",
    level: float = 0.0,
    seed: int = 0,
) -> Stream:
    return few_shot(
        examples_of(source), sets, interval, ways, shots, targets, overwrite, instance, corrupt, level, seed
    )


def _instances(
    source: Source, tasks: int = 5, test: Source | None = None, test_share: float = 0.25, seed: int = 0
) -> Stream:
    return instance_incremental(examples_of(source), tasks, _test(test), test_share, seed)


STREAMS: dict[str, Callable[..., Stream]] = {
    "split-digits": split_digits,
    "split-idx": split_idx,
    "split-classes": _split,
    "blurry": _blurry,
    "permuted": _permuted,
    "rotated": _rotated,
    "corrupted": _corrupted,
    "si-blurry": _si_blurry,
    "recurring": _recurring,
    "power-law": _power_law,
    "long-tail": _long_tail,
    "label-noise": _label_noise,
    "core50": core50_stream,
    "nevis": _nevis,
    "few-shot": _few_shot,
    "instance-incremental": _instances,
    "people": people_stream,
    "text": text_stream,
    "styled": _styled,
}
