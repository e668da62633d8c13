"""What the commands `methods` and `show` say of a part of the catalogue."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from remanence import catalogue, llm_taxonomy, taxonomy
from remanence.cli.words import cells, make_table, say
from remanence.core.errors import BadInput, UnknownName, nearest

if TYPE_CHECKING:
    from remanence.core.part import Part


def line_of(part: Part) -> dict[str, Any]:
    return {
        "slug": part.slug,
        "verb": part.verb,
        "kind": part.kind,
        "family": part.family,
        "cards": list(part.cards),
        "paper": part.paper,
        "needs": list(part.needs),
        "module": part.module,
        "fidelity": catalogue.fidelity(part),
        "taxonomy": {**taxonomy.of(part), **_llm(part)},
    }


def list_by(survey: str, found: list[Part]) -> None:
    """The parts that a survey speaks of, family by family, in its words.

    Raises:
        UnknownName: no such survey.
    """
    known = [*taxonomy.NAMES, "llm"]
    if survey not in known:
        raise UnknownName(f"no taxonomy is called {survey!r}{nearest(survey, known)} (there is {', '.join(known)})")
    if survey == "llm":
        table = make_table("stage", "technique", "verb", "slug", "family")
        tagged = [(tag, part) for part in found if (tag := llm_taxonomy.of(part)) is not None]
        for stages in dict.fromkeys(
            tag.stages for tag, _ in sorted(tagged, key=lambda pair: (len(pair[0].stages), pair[0].stages))
        ):
            for tag, part in tagged:
                if tag.stages == stages:
                    table.add_row(
                        *cells(", ".join(stages), ", ".join(tag.techniques), part.verb, part.slug, part.family)
                    )
        say(table)
        return
    table = (
        make_table(survey, "kind", "verb", "slug", "family")
        if survey == "wang"
        else make_table(survey, "verb", "slug", "family")
    )
    for family in taxonomy.NAMES[survey]:
        for part in found:
            place = taxonomy.of(part)
            if place.get(survey) == family:
                kind = [place.get("wang_kind", "")] if survey == "wang" else []
                table.add_row(*cells(family, *kind, part.verb, part.slug, part.family))
    say(table)


def _llm(part: Part) -> dict[str, Any]:
    tag = llm_taxonomy.of(part)
    return {} if tag is None else {"llm": {"stages": list(tag.stages), "techniques": list(tag.techniques)}}


def explain(part: Part) -> None:
    import dataclasses
    import inspect

    try:
        cls = part.load()
    except ImportError as error:
        raise BadInput(f"{part.verb} {part.slug} cannot be loaded ({error}); install what it needs") from None
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or sys.modules[cls.__module__].__doc__ or "")
    say(f"{part.slug}: {part.kind} to {part.verb} ({part.family})\n")
    say(text + "\n")
    knobs = (
        [f for f in dataclasses.fields(cls) if f.init and f.metadata.get("doc")]
        if dataclasses.is_dataclass(cls)
        else []
    )
    if knobs:
        table = make_table("knob", "type", "default", "range", "meaning")
        for f in knobs:
            table.add_row(*cells(f.name, str(f.type), _default(f), _range(f.metadata), f.metadata["doc"]))
        say(table)
    example = f"{{{part.slug}: {{{knobs[0].name}: {_default(knobs[0])}}}}}" if knobs else part.slug
    rows = [("in a plan", f"{'by' if part.verb == 'forget' else part.verb}: {example}")]
    if part.verb in ("learn", "keep", "forget", "where"):
        rows.append(("in Python", f"rm.{part.verb}.{part.name}()"))
    rows += [
        ("needs", ", ".join(part.needs) or "nothing special"),
        ("paper", part.paper),
        ("checked against", catalogue.fidelity(part)),
        ("file", part.module),
    ]
    for name, words in rows:
        say(f"{name + ':':17}{words}")


def _default(field: Any) -> str:
    import dataclasses

    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return json.dumps(value) if isinstance(value, bool | list | dict | None) else str(value)


def _range(meta: Any) -> str:
    if meta["choices"]:
        return " | ".join(map(str, meta["choices"]))
    low, high = meta["low"], meta["high"]
    if low is None and high is None:
        return ""
    return f"{'-inf' if low is None else f'{low:g}'} .. {'inf' if high is None else f'{high:g}'}"
