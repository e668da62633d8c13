"""The second look at a plan: everything it names is found and built once, so that nothing is discovered after hours of running."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from remanence import catalogue
from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.problem import PROBLEMS, CausalLM, Classification, Problem, Regression, problem_of
from remanence.data.tokenizers import TOKENIZERS
from remanence.life.plan import Forget, Learn, Plan, Problems, _defaults, _function, _runs
from remanence.life.yaml import Document, Place, shown
from remanence.models import LANGUAGE
from remanence.train.resolve import check_fits, check_keepers
from remanence.train.roles import Forgetter, Keeper, Learner, Method, Metric, Where
from remanence.train.schedules import kind_of
from remanence.train.settings import Settings

_ROLES: dict[str, type[Method]] = {
    "learn": Learner,
    "keep": Keeper,
    "where": Where,
    "forget": Forgetter,
    "measure": Metric,
}
#: Given by the life, so they are no knobs of a plan's model.
_OURS = ("inputs", "vocab", "seed")
_NO_DEFAULT = inspect.Parameter.empty

Spec = dict[str, dict[str, Any]]


def check(plan: Plan, document: Document, problems: Problems, allow_code: bool) -> dict[str, Any]:
    """Add to `problems` whatever is wrong with what `plan` names; returns the plan with every default filled in."""
    return _Check(plan, document, problems, allow_code).plan()


class _Check:
    def __init__(self, plan: Plan, document: Document, problems: Problems, allow_code: bool) -> None:
        self.given, self.document, self.problems, self.allow_code = plan, document, problems, allow_code
        self.kind: Problem = Classification()
        name = next(iter(plan.problem or {}), "")
        if name in ("regression", "causal-lm"):
            self.kind = PROBLEMS[name]()

    def plan(self) -> dict[str, Any]:
        plan = self.given
        stream = self.built("stream", plan.stream)
        count = self.tasks(next(iter(stream.values())))
        train = self.settings(("train",), plan.train.given())
        return {
            "seed": plan.seed,
            "model": self.built("model", plan.model),
            "problem": self.problem(plan.problem or {"classification": {}}),
            **({} if plan.tokenizer is None else {"tokenizer": self.tokenizer(plan.tokenizer)}),
            "stream": stream,
            "learner": self.method("learn", ("learner",), plan.learner or {"finetune": {}})[0],
            "keep": self.methods("keep", ("keep",), plan.keep),
            "where": self.methods("where", ("where",), plan.where),
            "train": {
                **_defaults(Settings),
                "optimizer": {"adamw": {}},
                "schedule": self.schedule("constant", {}),
                **train,
            },
            "events": self.events(count),
            "measure": self.methods("measure", ("measure",), plan.measure),
            "device": plan.device,
            "threads": plan.threads,
        }

    # -- events

    def events(self, count: int | None) -> list[dict[str, Any]]:
        learned, found = False, []
        if not any(event.kind == "learn" for event in self.given.events):
            self.problems.add(
                ("events",),
                "there is no learn event; a life learns at least once, such as events: [{learn: 0}]",
                key=True,
            )
        for number, event in enumerate(self.given.events):
            place: Place = ("events", number, event.kind)
            if event.learn is not None:
                found.append({"learn": self.learn(place, event.learn, count)})
                learned = True
            elif event.forget is not None:
                found.append({"forget": self.forget(place, event.forget)})
                if not learned and any(other.kind == "learn" for other in self.given.events):
                    self.problems.add(
                        place,
                        "nothing has been learned before this forget event; put a learn event before it",
                        key=True,
                    )
        return found

    def learn(self, place: Place, event: Learn, count: int | None) -> dict[str, Any]:
        if count is not None and event.task >= count:
            self.problems.add(
                (*place, "task"),
                f"the stream has tasks 0 to {count - 1}, not {event.task}; learn one of them, or cut it into more tasks",
            )
        self.settings(place, event.given())
        plain = self.given.settings(event)
        for name in ("optimizer", "schedule"):
            if isinstance(plain[name], str):
                plain[name] = {plain[name]: {}}
        ((schedule, knobs),) = plain["schedule"].items()
        return {
            **{name: event.options()[name] for name in ("task", "carry", "allow_forgotten")},
            **plain,
            "schedule": self.schedule(schedule, knobs),
            "learner": None if event.learner is None else self.method("learn", (*place, "learner"), event.learner)[0],
            "keep": self.methods("keep", (*place, "keep"), event.keep),
            "where": self.methods("where", (*place, "where"), event.where),
            "snapshot_every": event.snapshot_every,
        }

    def forget(self, place: Place, event: Forget) -> dict[str, Any]:
        try:
            if not event.redacted:
                event.request()
        except BadInput as error:
            self.problems.add(place, str(error), key=True)
        if event.targets is not None and isinstance(self.kind, Classification):
            self.problems.add(
                (*place, "targets"),
                "targets are the numbers of a regression, and this problem has classes; write classes: [...]",
            )
        by, method = self.method("forget", (*place, "by"), event.by)
        given = self.settings(place, event.given())
        defaults = dict(method.defaults) if isinstance(method, Forgetter) else {}
        for name in ("optimizer", "schedule"):
            if isinstance(defaults.get(name), str):
                defaults[name] = {defaults[name]: {}}
        if isinstance(defaults.get("schedule"), dict):
            ((schedule, knobs),) = defaults["schedule"].items()
            defaults["schedule"] = self.schedule(schedule, knobs or {})
        return {
            **{name: value for name, value in event.asked().items() if name not in ("ids", "originals")},
            **({} if event.ids is None else {"ids": _runs(event.ids)}),
            **({} if event.originals is None else {"originals": _runs(event.originals)}),
            "by": by,
            "keep": self.methods("keep", (*place, "keep"), event.keep),
            "where": self.methods("where", (*place, "where"), event.where),
            "verify": event.verify or "none",
            "retain": event.retain,
            "limit": event.limit,
            **{name: _plain(value) for name, value in {**defaults, **given}.items() if name in Forget.model_fields},
        }

    # -- methods

    def methods(self, verb: str, place: Place, specs: Sequence[Spec] | None) -> list[Spec] | None:
        if specs is None:
            return None
        found, made = [], []
        for index, spec in enumerate(specs):
            # A single method may stand where a list is expected; then its knobs have no index in their address.
            here = (*place, index) if (*place, index) in self.document.places else place
            filled, method = self.method(verb, here, spec)
            found.append(filled)
            if isinstance(method, Keeper):
                made.append(method)
                self._said(here, spec, lambda method=method: check_keepers([method]))
        return found

    def method(self, verb: str, place: Place, spec: Spec) -> tuple[Spec, Any]:
        """The spec with every default, and the method it makes (None where it cannot be made)."""
        ((slug, knobs),) = spec.items()
        try:
            cls = catalogue.find(verb, slug).load()
        except UnknownName as error:
            known = [part.slug for part in catalogue.every() if part.verb == verb]
            hint = "" if ";" in str(error) else f" (there is {', '.join(known)})"
            self.problems.add(place, f"{shown(str(error), 200)[1:-1]}{hint}")
            return spec, None
        except Exception as error:  # an extra that is not installed, or a third party's module that fails
            self.problems.add(
                place, f"{verb} {slug} cannot be loaded ({type(error).__name__}: {error}); install what it needs"
            )
            return spec, None
        if not issubclass(cls, _ROLES[verb]):
            self.problems.add(place, f"{verb} {slug} is no {_ROLES[verb].__name__.lower()} and cannot stand here")
            return spec, None
        if not self.knobs((*place, slug), slug, knobs, [item.name for item in dataclasses.fields(cls) if item.init]):
            return spec, None
        made = self._said(place, spec, lambda: cls(**knobs))
        if made is not None:
            self._said(place, spec, lambda: check_fits([made], self.kind))
            if not isinstance(self.kind, Classification) and "class-balanced" in _policies(made):
                self.problems.add(
                    place,
                    f"{slug} shares its buffer out by classes, and a {next(iter(self.kind.spec()))} has none; write {{{slug}: {{policy: reservoir, capacity: 200}}}}",
                )
        return {slug: _filled(cls, knobs)}, made

    def knobs(self, place: Place, name: str, given: Mapping[str, Any], valid: Sequence[str]) -> bool:
        """Whether every knob given exists."""
        unknown = [knob for knob in given if knob not in valid]
        for knob in unknown:
            has = f"its knobs are {', '.join(valid)}" if valid else "it has no knobs"
            self.problems.add(
                (*place, knob), f"{name} has no knob {shown(knob)}{nearest(knob[:99], valid)} ({has})", key=True
            )
        return not unknown

    def _said(self, place: Place, spec: Spec, make: Any) -> Any:
        """What `make` returns; what it raises becomes a problem at the knob that its message names."""
        ((name, knobs),) = spec.items()
        try:
            return make()
        except BadInput as error:
            message = str(error)
        except Exception as error:  # constructors, torch's among them, raise anything for odd values
            message = f"{name} cannot be built with these knobs ({type(error).__name__}: {shown(str(error), 200)[1:-1]}); check their values"
        named = [knob for knob in knobs if re.search(rf"\b{re.escape(knob)}=|'{re.escape(knob)}'", message)]
        self.problems.add(
            (*place, name, named[0]) if named else place, shown(message, 300)[1:-1] if len(message) > 300 else message
        )
        return None

    # -- settings, problem

    def settings(self, place: Place, given: dict[str, Any]) -> dict[str, Any]:
        """Every setting tried by itself, so that a wrong one is found at its own line."""
        filled = dict(given)
        for name, value in given.items():
            spec = value if isinstance(value, dict) else {name: {}}
            here = (*place, name)
            made = self._settle(here, name, spec, value)
            if made and name == "schedule":
                ((slug, knobs),) = value.items()
                filled[name] = self.schedule(slug, knobs)
        return filled

    def _settle(self, here: Place, name: str, spec: Spec, value: Any) -> bool:
        before = len(self.problems.found)
        if not isinstance(value, dict):
            try:
                Settings(**{name: value})
            except BadInput as error:
                self.problems.add(here, str(error).removeprefix("Settings: "))
        else:
            self._said(here, spec, lambda: Settings(**{name: value}))  # type: ignore[arg-type]
        return len(self.problems.found) == before

    def schedule(self, slug: str, knobs: dict[str, Any]) -> Spec:
        try:
            return {slug: _filled(kind_of(slug), knobs)}
        except UnknownName:  # said where the settings are tried
            return {slug: knobs}

    def problem(self, spec: Spec) -> Spec:
        ((slug, knobs),) = spec.items()
        if slug not in PROBLEMS:
            self.problems.add(
                ("problem",),
                f"no problem is called {shown(slug)}{nearest(slug[:99], PROBLEMS)} (there is {', '.join(PROBLEMS)})",
            )
            return spec
        made = self._said(("problem",), spec, lambda: problem_of(spec))
        cls = type(made)
        return {slug: _filled(cls, knobs)} if made is not None and dataclasses.is_dataclass(cls) else spec

    def tokenizer(self, spec: Spec) -> Spec:
        ((name, knobs),) = spec.items()
        if name not in TOKENIZERS:
            self.problems.add(
                ("tokenizer",),
                f"no tokenizer is called {shown(name)}{nearest(name[:99], TOKENIZERS)} (there is {', '.join(TOKENIZERS)})",
            )
            return spec
        parameters = inspect.signature(TOKENIZERS[name]).parameters
        place: Place = ("tokenizer", name)
        if not self.knobs(place, name, knobs, list(parameters)) or not self._fits(place, name, TOKENIZERS[name], knobs):
            return spec
        lacking = [n for n, p in parameters.items() if p.default is _NO_DEFAULT and n not in knobs]
        if lacking:
            self.problems.add(
                ("tokenizer",), f"{name} needs {lacking[0]}; write tokenizer: {{{name}: {{{lacking[0]}: ...}}}}"
            )
            return spec
        filled = {n: p.default for n, p in parameters.items() if p.default is not _NO_DEFAULT}
        return {name: _plain({**filled, **knobs})}

    # -- models and streams

    def built(self, part: str, spec: Spec) -> Spec:
        """The model or stream, its arguments checked against the function's signature."""
        ((name, knobs),) = spec.items()
        place: Place = (part,)
        try:
            function = _function(part, name, self.allow_code)
            signature = inspect.signature(function)
        except BadInput as error:
            self.problems.add(place, str(error))
            return spec
        except (TypeError, ValueError):  # a callable without a readable signature: nothing can be checked
            return spec
        ours = _OURS if part == "model" else ()
        parameters = [
            p
            for p in signature.parameters.values()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ours
        ]
        for knob in (knob for knob in ours if knob in knobs):
            self.problems.add(
                (*place, name, knob),
                f"{knob} is no knob of a plan's model; the life gives it from the stream and the plan's seed",
                key=True,
            )
            return spec
        anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        if not anything and not self.knobs((*place, name), name, knobs, [p.name for p in parameters]):
            return spec
        for lacking in [p.name for p in parameters if p.default is _NO_DEFAULT and p.name not in knobs]:
            self.problems.add(place, f"{name} needs {lacking}; write {part}: {{{name}: {{{lacking}: ...}}}}")
            return spec
        if not self._fits((*place, name), name, function, knobs):
            return spec
        if part == "model" and ":" not in name:
            # On the meta device a network has shapes but no memory: a wrong width is found, a huge one costs nothing.
            def make() -> Any:
                with torch.device("meta"):
                    given = {"inputs": (1, 28, 28), "vocab": 64}
                    return function(**{n: v for n, v in given.items() if n in signature.parameters}, **knobs)

            if self._said(place, spec, make) is None:
                return spec
        filled = {p.name: p.default for p in parameters if p.default is not _NO_DEFAULT}
        if part == "model" and ":" not in name and (name in LANGUAGE) is not isinstance(self.kind, CausalLM):
            self.problems.add(
                place,
                f"{name} is a language model; write problem: causal-lm, a tokenizer and a stream of texts"
                if name in LANGUAGE
                else f"{name} is no language model; write one of {', '.join(LANGUAGE)}",
            )
        ours_empty = ":" not in name and {**filled, **knobs}.get("outputs") == 0
        if part == "model" and isinstance(self.kind, Regression) and ours_empty:
            self.problems.add(
                place,
                f"a regression's network needs its outputs from the start, for no class adds any; write model: {{{name}: {{outputs: 1}}}}",
            )
        return {name: _plain({**filled, **knobs})}

    def _fits(self, place: Place, name: str, function: Any, knobs: Mapping[str, Any]) -> bool:
        """Whether every value has the type that the function's signature asks for."""
        fits = True
        try:
            hints = typing.get_type_hints(function)
        except (
            NameError,
            TypeError,
            AttributeError,
            SyntaxError,
        ):  # annotations of the user's code that cannot be resolved
            return True
        for knob, value in knobs.items():
            if knob not in hints:
                continue
            try:
                adapter: TypeAdapter[Any] = TypeAdapter(hints[knob])
            except PydanticSchemaGenerationError:  # a type of the user's that pydantic knows nothing about
                continue
            try:
                # As JSON, where a list can be a tuple.
                adapter.validate_json(json.dumps(value), strict=True)
            except ValidationError:
                expected = inspect.formatannotation(hints[knob]).replace("collections.abc.", "").replace("typing.", "")
                self.problems.add(
                    (*place, knob), f"{name}: {knob}={shown(value)} has the wrong type; expected {expected}"
                )
                fits = False
        return fits

    def tasks(self, knobs: Mapping[str, Any]) -> int | None:
        """How many tasks the stream will have, where its knobs say so."""
        value = knobs.get("tasks")
        if isinstance(value, list):
            return len(value)
        if isinstance(value, bool) or not isinstance(value, int):
            return None
        if value < 1:
            self.problems.add(
                ("stream", next(iter(self.given.stream)), "tasks"), f"tasks={value}: a stream has at least 1 task"
            )
            return None
        return value


def _policies(method: Method) -> list[Any]:
    """By what rule each of the method's buffers says which rows stay."""
    return [getattr(value, "policy", None) for value in method.remembered().values()]


def _filled(cls: type[Any], knobs: Mapping[str, Any]) -> dict[str, Any]:
    """`knobs` with the defaults of the others; whole numbers where the knob is a real one become real ones."""
    hints = typing.get_type_hints(cls)
    result = {}
    for name, value in {**_defaults(cls), **knobs}.items():
        kinds = typing.get_args(hints.get(name)) or (hints.get(name),)
        real = float in kinds and int not in kinds and isinstance(value, int) and not isinstance(value, bool)
        result[name] = float(value) if real else value
    plain: dict[str, Any] = _plain(result)
    return plain


def _plain(value: Any) -> Any:
    """JSON values: tuples become lists, and what JSON does not know its text."""
    return json.loads(json.dumps(value, default=str))
