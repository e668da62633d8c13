"""The one resolver: names, mappings and objects become methods; plans, Python calls and people's own loops go through it alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from remanence import catalogue
from remanence.core.errors import BadInput
from remanence.core.knobs import build
from remanence.core.part import Part
from remanence.core.problem import CausalLM, Classification, Problem, Regression
from remanence.train.roles import Keeper, Method

M = TypeVar("M", bound=Method)

#: Classes that the catalogue does not list, by verb and slug, from the objects that were given: a life builds its parts again
#: by name (for a reference, after a crash).
_given: dict[tuple[str, str], type[Method]] = {}


def resolve(verb: str, value: Any, role: type[M]) -> M:
    """A method from an instance, a slug, or ``{slug: knobs}``.

    Raises:
        UnknownName: no such method or knob, with the nearest valid spelling.
        BadInput: a knob out of range, or a method of another role.
    """
    if isinstance(value, Method):
        made: Any = value
        know(type(value))
    elif isinstance(value, str | Mapping):
        if isinstance(value, Mapping) and len(value) != 1:
            raise BadInput(f"{verb}: give one method as {{slug: knobs}}, not {len(value)} entries")
        slug, knobs = next(iter(value.items())) if isinstance(value, Mapping) else (value, {})
        if not isinstance(knobs or {}, Mapping):
            raise BadInput(f"{verb} {slug}: its knobs are a mapping such as {{strength: 1.0}}, not {knobs!r}")
        made = build(_class(verb, str(slug)), knobs or {}, str(slug))
    else:
        raise BadInput(f"{verb}: give a slug, {{slug: knobs}} or a method, not {type(value).__name__}")
    if not isinstance(made, role):
        raise BadInput(f"{verb}: {type(made).__name__} is no {role.__name__}")
    return made


def know(cls: type[Method]) -> None:
    """Remember a class for its slug, unless the catalogue lists it."""
    if not any(part.name == cls.__name__ and part.module == cls.__module__ for part in catalogue.every()):
        _given[cls.verb, catalogue.slug_of(cls)] = cls


def _class(verb: str, slug: str) -> type[Any]:
    listed = any(part.verb == verb and part.slug == slug for part in catalogue.every())
    return _given[verb, slug] if not listed and (verb, slug) in _given else catalogue.find(verb, slug).load()


def resolve_all(verb: str, values: Any, role: type[M]) -> list[M]:
    """Like `resolve` for a list, a single value or None."""
    if values is None:
        return []
    many = values if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    return [resolve(verb, value, role) for value in many]


def check_fits(methods: Sequence[Method], problem: Problem) -> None:
    """Refuse methods that this problem has nothing for.

    Raises:
        BadInput: a method that needs classes, and a problem without.
    """
    for method in methods:
        part = next(
            (p for p in catalogue.every() if p.name == type(method).__name__ and p.module == type(method).__module__),
            None,
        )
        what = None if part is None else _lacking(part, problem)
        if part is not None and what is not None:
            name = next(iter(problem.spec()))
            others = [p.slug for p in catalogue.parts(part.verb, part.kind) if _lacking(p, problem) is None]
            raise BadInput(f"{part.slug} needs {what}, and a {name} has none; there is {', '.join(others)}")


def _lacking(part: Part, problem: Problem) -> str | None:
    """What the part needs and the problem lacks, in words; None: nothing."""
    for need, kinds, what in (
        ("class-head", Classification, "classes"),
        ("regression", Regression, "real targets"),
        ("one-answer", Classification | Regression, "one answer per example"),
        ("causal-lm", CausalLM, "texts"),
    ):
        if need in part.needs and not isinstance(problem, kinds):
            return what
    return None


def check_keepers(keepers: Sequence[Keeper]) -> None:
    """Refuse keepers that would teach back.

    Raises:
        BadInput: a keeper stores values computed by weights and cannot rebuild them after a forget.
    """
    for keeper in keepers:
        stores = [v for v in vars(keeper).values() if getattr(v, "derived", False)]
        if (stores or keeper.computed()) and not hasattr(type(keeper), "forgot"):
            raise BadInput(
                f"{keeper.slug} stores values computed by the weights but has no `forgot`, so it would teach forgotten data back"
            )


def named(methods: Sequence[Method], verb: str) -> dict[str, Method]:
    """``{"keep/replay": method}``, a repeated slug numbered from 2."""
    found: dict[str, Method] = {}
    for method in methods:
        name, count = f"{verb}/{method.slug}", 1
        while (name if count == 1 else f"{name}#{count}") in found:
            count += 1
        found[name if count == 1 else f"{name}#{count}"] = method
    return found
