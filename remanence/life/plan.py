"""A plan: a whole life in one YAML file, checked whole before anything runs.

    load_plan(path) -> Plan        parse_plan(text, name) -> Plan

Two passes. The first checks the shape (pydantic: types, missing and unknown keys), the second everything named in it:
methods, knobs and their values, optimizers, schedules, models, streams, task numbers, requests. All that is wrong is said at
once, one line each, ``file:line: what is wrong; what to do``, with the nearest valid spelling of a name.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from remanence.core.errors import BadInput, PlanError, nearest
from remanence.core.ids import Ids
from remanence.data import Request
from remanence.data.request import COLUMNS
from remanence.life.yaml import Document, Place, parse, read, shown
from remanence.train.settings import Settings

#: Ranges such as ``0-99999999999`` must not fill the memory before anything is checked.
MAX_IDS = 10_000_000
_RANGE = re.compile(r"\s*(-?\d{1,19})\s*-\s*(-?\d{1,19})\s*")
_NAME = re.compile(r"\w(?:[\w. -]{0,78}\w)?")
_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

# -- values --------------------------------------------------------------------------------------------------------------


def _wrong(message: str, **context: Any) -> PydanticCustomError:
    # The text goes through the context, for pydantic would read braces in it as a template.
    return PydanticCustomError("plan", "{text}", {"text": message, **context})


def _spec(value: Any) -> Any:
    """``slug`` and ``{slug: knobs}`` as ``{slug: {knob: value}}``."""
    if isinstance(value, str) and value:
        return {value: {}}
    if not isinstance(value, dict):
        raise _wrong(f"expected a name or {{name: {{knob: value}}}}, not {shown(value)}")
    if len(value) != 1:
        raise _wrong(
            f"expected one name as {{name: {{knob: value}}}}, not {len(value)} ({shown(', '.join(value))}); indent the knobs under their name"
        )
    name, knobs = next(iter(value.items()))
    if knobs is not None and not isinstance(knobs, dict):
        raise _wrong(f"the knobs of {shown(name)} are a mapping such as {{strength: 1.0}}, not {shown(knobs)}")
    return {name: knobs or {}}


def _many(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _verify(value: Any) -> Any:
    if value is None or value == "none":
        return None
    from remanence.life.forgetting import seeds_of

    try:
        return {"retrain": {"seeds": seeds_of(value)}}
    except (BadInput, TypeError):
        raise _wrong(f"verify is retrain, {{retrain: {{seeds: 1 to 100}}}} or none, not {shown(value)}") from None


#: What stands for the ids of a request that was redacted: ``ids: redacted``. Such an event has happened and cannot happen again.
REDACTED = Ids()
_LISTED = re.compile(r"""(\b(?:ids|originals)\s*:\s*)(\[[^\]]*\]|(?:\n\s*-\s*[\d"'-]+)+)""")


def without_ids(text: str, instead: str) -> str:
    """The text of a plan with every list of ids replaced."""
    return _LISTED.sub(lambda found: found[1] + instead, text)


def _ids(value: Any) -> Ids:
    if isinstance(value, Ids):
        return value
    if value == "redacted":
        return REDACTED
    blocks: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    total = 0
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        found = _RANGE.fullmatch(item) if isinstance(item, str) else None
        if found:
            first, last = int(found[1]), int(found[2])
        elif isinstance(item, int) and not isinstance(item, bool) and isinstance(value, list):
            first = last = item
        else:
            raise _wrong(
                f"ids are a list of whole numbers and ranges such as [3, '10-20'] (both ends included), not {shown(item)}",
                index=index,
            )
        total += max(0, last - first + 1)
        if last < first:
            raise _wrong(f"the range {shown(item)} runs backwards; write the smaller number first", index=index)
        if total > MAX_IDS or not -(2**63) <= first <= last < 2**63 - 1:
            raise _wrong(
                f"with {shown(item)} there are more than {MAX_IDS} ids; ask for classes or documents, or check the range",
                index=index,
            )
        blocks.append(np.arange(first, last + 1, dtype=np.int64))
    return Ids(np.concatenate(blocks)) if blocks else Ids()


def _runs(ids: Ids | None) -> list[int | str] | str | None:
    """Ids as they can stand in a plan, neighbours joined to ranges."""
    if ids is None or ids is REDACTED:
        return None if ids is None else "redacted"
    if not ids:
        return []
    array = ids.array
    starts = np.flatnonzero(np.diff(array, prepend=array[:1] - 2) != 1)
    ends = np.append(starts[1:], len(array)) - 1
    pairs = zip(array[starts].tolist(), array[ends].tolist(), strict=True)
    return [first if first == last else f"{first}-{last}" for first, last in pairs]


def _word(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _wrong(f"expected text or a whole number, not {shown(value)}")
    return value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise _wrong(f"{shown(value)} cannot name a folder; use letters, digits, '-', '_' and at most 80 characters")
    return value


def _device(value: str) -> str:
    import torch

    try:
        torch.device(value)
    except RuntimeError:
        raise _wrong(f"there is no kind of device {shown(value)}; write cpu, cuda, cuda:0 or mps") from None
    return value


def _no_null(value: Any) -> Any:
    return [] if value is None else value


def _null_word(value: Any) -> Any:
    return None if value == "none" else value


Spec = Annotated[dict[str, dict[str, Any]], BeforeValidator(_spec)]
Specs = Annotated[list[Spec], BeforeValidator(_many)]
Words = list[Annotated[Any, AfterValidator(_word)]]
Name = Annotated[str, AfterValidator(_name)]

# -- shape ---------------------------------------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class Train(_Part):
    """How learn events train; what is not given has the default of `Settings`. Ranges are checked there, too."""

    epochs: int | None = None
    batch_size: int | None = None
    optimizer: Spec | None = None
    lr: float | None = None
    schedule: Spec | None = None
    clip: Annotated[float | None, BeforeValidator(_null_word)] = None
    accumulate: int | None = None
    precision: str | None = None
    compile: bool | None = None
    patience: Annotated[int | None, BeforeValidator(_null_word)] = None
    validation: float | None = None
    checkpointing: bool | None = None

    def given(self) -> dict[str, Any]:
        """The settings named here. A null of `clip` or `patience` is one: it turns them off."""
        fields = [name for name in Train.model_fields if name in self.model_fields_set]
        return {
            name: getattr(self, name)
            for name in fields
            if getattr(self, name) is not None or name in ("clip", "patience")
        }


class Learn(Train):
    """A learn event; `keep` and `where` replace the life's, ``[]`` is none."""

    task: Annotated[int, Field(ge=0)]
    learner: Spec | None = None
    keep: Specs | None = None
    where: Specs | None = None
    carry: bool = False
    snapshot_every: Annotated[int | None, Field(ge=1)] = None
    allow_forgotten: bool = False

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, int) and not isinstance(value, bool) else value

    def options(self) -> dict[str, Any]:
        """``task`` (its number in the stream), and the keyword arguments of `Life.learn` that are given."""
        flags = {"task": self.task, "carry": self.carry, "allow_forgotten": self.allow_forgotten}
        rest = {name: getattr(self, name) for name in ("learner", "keep", "where", "snapshot_every")}
        return {**flags, **self.given(), **{name: value for name, value in rest.items() if value is not None}}


class Forget(_Part):
    """A forget event: a request, the method, and the evidence asked for (3 retrained references unless ``verify: none``)."""

    ids: Annotated[Ids, PlainValidator(_ids), PlainSerializer(_runs)] | None = None
    classes: list[int] | None = None
    documents: Words | None = None
    spans: Words | None = None
    entities: Words | None = None
    concepts: Words | None = None
    client: Annotated[Any, AfterValidator(_word)] = None
    originals: Annotated[Ids, PlainValidator(_ids), PlainSerializer(_runs)] | None = None
    targets: list[float] | None = None
    by: Spec
    keep: Annotated[Specs, BeforeValidator(_no_null)] = []
    where: Specs | None = None
    verify: Annotated[dict[str, dict[str, int]] | None, BeforeValidator(_verify)] = {"retrain": {"seeds": 3}}
    retain: Literal["lineage"] = "lineage"
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: Spec | None = None
    lr: float | None = None
    schedule: Spec | None = None
    limit: Annotated[float | None, Field(ge=0, le=1)] = None

    def asked(self) -> dict[str, Any]:
        """The keyword arguments of `Request`."""
        given = {name: getattr(self, name) for name in ("ids", *COLUMNS) if getattr(self, name) is not None}
        return {name: list(value) if name == "originals" else value for name, value in given.items()}

    @property
    def redacted(self) -> bool:
        """Whether the ids were taken out after the request was carried out."""
        return self.ids is REDACTED or self.originals is REDACTED

    def request(self) -> Request:
        """What to forget.

        Raises:
            BadInput: the request names nothing.
        """
        return Request(**self.asked())

    def given(self) -> dict[str, Any]:
        """The training settings named here; the others are the method's own."""
        fields = ("epochs", "batch_size", "optimizer", "lr", "schedule")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}

    def options(self) -> dict[str, Any]:
        """``request`` (keyword arguments of `Request`), and the keyword arguments of `Life.forget`."""
        rest = {name: getattr(self, name) for name in ("by", "keep", "where", "verify", "retain", "limit")}
        return {"request": self.asked(), **rest, **self.given()}


class Event(_Part):
    """One event: ``{learn: task}``, ``{learn: {task: ..., ...}}`` or ``{forget: {...}}``."""

    learn: Learn | None = None
    forget: Forget | None = None

    @model_validator(mode="after")
    def _one(self) -> Event:
        if (self.learn is None) == (self.forget is None):
            raise _wrong("an event is either {learn: task number} or {forget: {classes: [...], by: method}}")
        return self

    @property
    def kind(self) -> Literal["learn", "forget"]:
        return "learn" if self.learn is not None else "forget"

    def options(self) -> dict[str, Any]:
        """See `Learn.options` and `Forget.options`."""
        event = self.learn or self.forget
        assert event is not None
        return event.options()


class Plan(_Part):
    """A life to be lived. Method specs are held as ``{slug: {knob: value}}`` with the knobs given."""

    name: Name = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: Spec
    problem: Spec | None = None
    tokenizer: Spec | None = None
    stream: Spec
    learner: Spec | None = None
    keep: Annotated[Specs, BeforeValidator(_no_null)] = []
    where: Specs | None = None
    train: Train = Train()
    events: list[Event]
    measure: Annotated[Specs, BeforeValidator(_no_null)] = []
    device: Annotated[str, AfterValidator(_device)] | None = None
    home: Annotated[str, Field(min_length=1)] | None = None
    threads: Annotated[int | None, Field(ge=1, le=4096)] = None

    @model_validator(mode="before")
    @classmethod
    def _measures(cls, value: Any) -> Any:
        """A regression has no forgetting to measure."""
        if isinstance(value, dict) and "measure" not in value:
            problem = value.get("problem")
            regression = problem == "regression" or (isinstance(problem, dict) and "regression" in problem)
            return {**value, "measure": ["accuracy", "bytes"] if regression else ["accuracy", "forgetting", "bytes"]}
        return value

    _document: Document = PrivateAttr()
    _canonical: dict[str, Any] = PrivateAttr()
    _allow_code: bool = PrivateAttr(default=False)

    @property
    def source(self) -> str:
        """The text as it was written."""
        return self._document.text

    def canonical(self) -> dict[str, Any]:
        """The plan as JSON values with every default filled in, in which plans that mean the same are equal.

        It is itself a plan. `name` and `home` are left out, for they change no result.
        """
        copied: dict[str, Any] = json.loads(json.dumps(self._canonical))
        return copied

    def error(self, place: Place, message: str) -> PlanError:
        """A `PlanError` at the line of `place`, such as ``("stream",)``: for what shows only when a part is built."""
        return self._document.error(place, message)

    def settings(self, event: Learn) -> dict[str, Any]:
        """The training settings of a learn event: its own, then the plan's, then the defaults of `Settings`."""
        return {**_defaults(Settings), **self.train.given(), **event.given()}

    def factory(self, part: Literal["model", "stream"]) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function that builds the `part`, and its knobs: from our registry, or the user's where code is allowed.

        Raises:
            PlanError: it cannot be found.
        """
        name, knobs = next(iter(getattr(self, part).items()))
        try:
            return _function(part, name, self._allow_code), dict(knobs)
        except BadInput as error:
            raise self.error((part,), str(error)) from None


# -- reading -------------------------------------------------------------------------------------------------------------


def load_plan(path: str | Path, allow_code: bool = False) -> Plan:
    """The plan in a file.

    Args:
        path: a YAML file of at most 1 MiB.
        allow_code: whether ``model: "module:function"`` may name the user's own code. Checking the plan imports it.

    Raises:
        PlanError: the file cannot be read or the plan cannot be run; every line of the message begins ``file:line:``.
    """
    return _checked(read(path), Path(path).stem, allow_code)


def parse_plan(text: str, name: str = "plan.yaml", allow_code: bool = False) -> Plan:
    """Like `load_plan`, for text; `name` stands for the file in messages."""
    return _checked(parse(text, name), Path(name).stem, allow_code)


def _checked(document: Document, stem: str, allow_code: bool) -> Plan:
    if document.data is None:
        raise document.error((), "the plan is empty; write at least model, stream and events")
    problems = Problems(document)
    try:
        plan = Plan.model_validate(document.data)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            problems.add(*_explain(entry))
        raise problems.error() from None
    from remanence.life.plan_check import check

    plan = (
        plan
        if plan.name
        else plan.model_copy(update={"name": re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:80] or "plan"})
    )
    plan._document, plan._allow_code = document, allow_code
    plan._canonical = check(plan, document, problems, allow_code)
    if problems.found:
        raise problems.error()
    return plan


class Problems:
    """What is wrong with a plan, each with its line."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.found: list[tuple[int, str]] = []

    def add(self, place: Place, message: str, key: bool = False) -> None:
        line = self.document.at(place, key)[0]
        said = (line, f"{self.document.name}:{line}: {' '.join(message.split())}")
        if said not in self.found:
            self.found.append(said)

    def error(self, most: int = 20) -> PlanError:
        """All of them, in the order of the lines."""
        ordered = sorted(self.found)
        more = (
            [f"{self.document.name}:{ordered[most][0]}: and {len(ordered) - most} more"] if len(ordered) > most else []
        )
        return PlanError("\n".join([message for _, message in ordered[:most]] + more))


_EXPECTED = {
    "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false", "string_type": "text", "list_type": "a list",
    "dict_type": "a mapping", "model_type": "a mapping of keys to values", "model_attributes_type": "a mapping of keys to values",
    "literal_error": "one of the words it knows",
}  # fmt: skip
_MISSING = {
    "model": "write one, such as model: {mlp: {hidden: [256, 256]}}",
    "stream": "write one, such as stream: {split-digits: {tasks: 5}}",
    "events": "write some, such as events: [{learn: 0}]",
    "task": "say which task of the stream, such as {task: 0}",
    "by": "name the method, such as by: ssd",
}


def _explain(entry: Any) -> tuple[Place, str, bool]:
    """(place, message, whether it is about the key) of one pydantic error."""
    place, kind, value = tuple(entry["loc"]), entry["type"], entry.get("input")
    last = str(place[-1]) if place else "a plan"
    context = entry.get("ctx") or {}
    if kind == "extra_forbidden":
        known = _keys_at(place[:-1])
        inside = _dotted(place[:-1]) or "a plan"
        return place, f"{inside} has no key {shown(last)}{nearest(last, known)} (its keys are {', '.join(known)})", True
    if kind == "missing":
        return place[:-1], f"{_dotted(place)} is missing; {_MISSING.get(last, 'add it')}", True
    if kind == "plan":
        index = context.get("index")
        about = _dotted(place)
        return (
            (place if index is None else (*place, index)),
            f"{about}: {context['text']}" if about else context["text"],
            False,
        )
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return (
            place,
            f"{_dotted(place)} is one of {', '.join(choices)}, not {shown(value)}{nearest(str(value)[:99], choices)}",
            False,
        )
    if kind in _EXPECTED:
        hint = ""
        if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "on", "y", "no", "off", "n"):
            hint = f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
        elif (
            kind in ("int_type", "float_type")
            and isinstance(value, str)
            and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value)
        ):
            hint = f"; write {value[:20]} without quotes"
        elif kind == "list_type" and not isinstance(value, dict):
            hint = f"; write [{value}]" if isinstance(value, int) else "; write [...]"
        name = _dotted(place) or "a plan"
        return place, f"{name} must be {_EXPECTED[kind]}, not {shown(value)}{hint}", False
    return place, f"{_dotted(place)}={shown(value)}: {entry['msg'][:1].lower()}{entry['msg'][1:]}", False


def _keys_at(place: Place) -> list[str]:
    """The keys that may stand in the mapping at `place`."""
    model: type[BaseModel] = Plan
    if place[:1] == ("train",):
        model = Train
    elif place[:1] == ("events",):
        model = {2: Event, 3: Learn if place[-1] == "learn" else Forget}.get(len(place), Event)
    return list(model.model_fields)


def _dotted(place: Place) -> str:
    """``events[3].forget.by``"""
    words = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return shown(words.removeprefix("."), 80)[1:-1]


# -- what plan and plan_check share ----------------------------------------------------------------------------------------


def _defaults(cls: type[Any]) -> dict[str, Any]:
    """The default of every field of a dataclass that has one."""
    import dataclasses

    found = {}
    for item in dataclasses.fields(cls):
        if item.init and item.default is not dataclasses.MISSING:
            found[item.name] = item.default
        elif item.init and item.default_factory is not dataclasses.MISSING:
            found[item.name] = item.default_factory()
    return found


def _function(part: str, name: str, allow_code: bool) -> Callable[..., Any]:
    """The builder of a model or stream by its name, or ``module:function`` where code is allowed.

    Raises:
        BadInput: no such name; or code that is not allowed or cannot be imported.
    """
    from remanence.data.streams import STREAMS
    from remanence.models import MODELS

    known: dict[str, Callable[..., Any]] = MODELS if part == "model" else STREAMS
    if name in known:
        return known[name]
    if ":" not in name:
        raise BadInput(f"no {part} is called {shown(name)}{nearest(name[:99], known)} (there is {', '.join(known)})")
    if not allow_code:
        raise BadInput(
            f"{part} {shown(name)} is code, and a plan may not run code by itself; if you trust it, say --allow-code"
        )
    if not _CODE.fullmatch(name):
        raise BadInput(f"{part} {shown(name)} must be module:function, such as my_package.nets:small")
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise BadInput(
            f"{part} {shown(name)} cannot be imported ({type(error).__name__}: {error}); check the name and PYTHONPATH"
        ) from None
    if not callable(found):
        raise BadInput(f"{part} {shown(name)} is no function")
    made: Callable[..., Any] = found
    return made
