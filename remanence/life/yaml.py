"""Reading YAML that a stranger wrote: plain data only, bounded, and every value knows the line it stands on.

What is refused, because a plan never needs it: files over 1 MiB (looked at before parsing), anchors and aliases (and with
them alias bombs), duplicate keys, keys that are not text, tags other than the core ones (so nothing is ever constructed),
several documents, more than 50 levels, numbers that are not finite or do not fit into 64 bits.

Scalars mean what YAML 1.2's core schema says, not what YAML 1.1 said:

    written                    here               in YAML 1.1
    yes no on off y n          text               booleans; only true and false are booleans here
    012                        12                 10 (octal); write 0o12 for octal
    1:30                       text               90 (base 60)
    1e-3                       0.001              text, in PyYAML
    1_000                      text               1000
    2024-01-01                 text               a date
    <<                         a key like others  merges a mapping
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from remanence.core.errors import PlanError, nearest

MAX_BYTES = 1 << 20
MAX_DEPTH = 50

#: A value's address: mapping keys and list positions from the top, such as ``("events", 3, "forget", "by")``.
Place = tuple[str | int, ...]

# The C parser is ten times faster where PyYAML was built with it. Only its events are used: nothing is constructed.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE = "tag:yaml.org,2002:"
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_KINDS = {"null": type(None), "bool": bool, "int": int, "float": float}


@dataclass(frozen=True)
class Document:
    """Plain data with its places.

    `places` maps the address of every value to its (line, column), both from 1; `keys` does so for the keys of mappings.
    """

    data: Any
    name: str
    text: str
    places: dict[Place, tuple[int, int]] = field(repr=False)
    keys: dict[Place, tuple[int, int]] = field(repr=False)

    def at(self, place: Place, key: bool = False) -> tuple[int, int]:
        """(line, column) of the value at `place`, of its `key`, or of the nearest thing around it that was written."""
        if key and place in self.keys:
            return self.keys[place]
        while place and place not in self.places:
            place = place[:-1]
        return self.places.get(place, (1, 1))

    def error(self, place: Place, message: str, key: bool = False) -> PlanError:
        """A `PlanError` that begins ``file:line:``."""
        return PlanError(f"{self.name}:{self.at(place, key)[0]}: {message}")


def shown(value: Any, most: int = 60) -> str:
    """`value` as it can stand in a message: one line, not long."""
    words = repr(value[: 2 * most] if isinstance(value, str | list) else value)
    return words if len(words) <= most else f"{words[: most - 3]}..."


def read(path: str | Path) -> Document:
    """The data of the YAML file at `path`, and where each value stands.

    Raises:
        PlanError: no such file, not text, too large, or not the YAML described above; the message begins ``file:line:``.
    """
    path = Path(path)
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise PlanError(f"{name}:1: there is no such file{_sibling(path)}; give the path of a plan") from None
    except IsADirectoryError:
        raise PlanError(f"{name}:1: this is a folder; give the path of a plan inside it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlanError(f"{name}:1: the file cannot be read ({reason}); check its path and permissions") from None
    if len(raw) > MAX_BYTES:
        raise _too_large(name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PlanError(f"{name}:{line}: this is not UTF-8 text; a plan is a YAML file saved as UTF-8") from None
    return parse(text, name)


def parse(text: str, name: str = "plan.yaml") -> Document:
    """Like `read`, for text; `name` stands for the file in messages.

    Raises:
        PlanError: see `read`.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise PlanError(f"{name}:{line}: this is not UTF-8 text; a plan is a YAML file saved as UTF-8") from None
    if size > MAX_BYTES:
        raise _too_large(name)
    try:
        return _Composer(text, name).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context or "this is not YAML")
        lines = text.splitlines() or [""]
        # What is never closed is noticed after the end of the text; the last line is the one to look at.
        number, column = (min(mark.line, len(lines) - 1), mark.column) if mark else (0, 0)
        tab = lines[number][column : column + 1] == "\t"
        hint = "indent with spaces, not tabs" if tab else "check indentation, colons, quotes and brackets here"
        raise PlanError(f"{name}:{number + 1}: {problem}; {hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0) + 1
        raise PlanError(f"{name}:{line}: a control character stands here; a plan is plain text, so remove it") from None
    except yaml.YAMLError as error:
        raise PlanError(f"{name}:1: this is not YAML ({shown(str(error))}); check the file") from None


class _Composer:
    """Turns parser events into plain data. Aliases never reach it, so what it builds is as large as the text, no larger."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.places: dict[Place, tuple[int, int]] = {}
        self.keys: dict[Place, tuple[int, int]] = {}
        self.events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)

    def document(self) -> Document:
        next(self.events)  # the stream's start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise PlanError(f"{self.name}:1: the file is empty; write at least model, stream and events")
        data = self.value((), next(self.events))
        next(self.events)  # the document's end
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self.error(
                after, "a second document begins here; a plan is one document, so remove it and the line '---'"
            )
        return Document(data, self.name, self.text, self.places, self.keys)

    def value(self, place: Place, event: Any) -> Any:
        self.places[place] = (event.start_mark.line + 1, event.start_mark.column + 1)
        self.refuse_references(event)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if len(place) >= MAX_DEPTH:
            raise self.error(event, f"more than {MAX_DEPTH} levels of nesting; a plan needs fewer than ten")
        wanted = _CORE + ("seq" if isinstance(event, yaml.SequenceStartEvent) else "map")
        if event.tag not in (None, wanted):
            raise self.error(event, f"the tag {shown(event.tag)} is not allowed; remove it, a plan is plain data")
        return self.sequence(place) if isinstance(event, yaml.SequenceStartEvent) else self.mapping(place)

    def sequence(self, place: Place) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            found.append(self.value((*place, len(found)), event))
        return found

    def mapping(self, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            self.refuse_references(event)
            key = self.scalar(event) if isinstance(event, yaml.ScalarEvent) else None
            if not isinstance(key, str):
                given = f"{event.value!r} is" if isinstance(event, yaml.ScalarEvent) and event.value else "this is"
                raise self.error(
                    event, f"{given} not a name; the keys of a plan are text (put a number in quotes if it is a name)"
                )
            if key in found:
                first = self.keys[(*place, key)][0]
                raise self.error(event, f"the key {shown(key)} was given before, in line {first}; keep one of the two")
            self.keys[(*place, key)] = (event.start_mark.line + 1, event.start_mark.column + 1)
            found[key] = self.value((*place, key), next(self.events))
        return found

    def scalar(self, event: Any) -> Any:
        text, tag = event.value, event.tag
        if tag is None:
            return self.plain(event, text) if event.implicit[0] else text
        kind = tag.removeprefix(_CORE)
        if kind == "str":
            return text
        if kind not in _KINDS or not tag.startswith(_CORE):
            raise self.error(event, f"the tag {shown(tag)} is not allowed; remove it, a plan is plain data")
        found = self.plain(event, text)
        if kind == "float" and type(found) is int:
            return float(found)
        if type(found) is not _KINDS[kind]:
            raise self.error(event, f"{shown(text)} is not of the kind its tag !!{kind} says; remove the tag")
        return found

    def plain(self, event: Any, text: str) -> Any:
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text[0] in "tT"
        if _INT.fullmatch(text):
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            digits = text[2:] if base != 10 else text
            # Python refuses to convert thousands of digits; 64 bits need at most 20 and a sign.
            number = int(digits, base) if len(digits) <= 24 else 1 << 64
            if not -(1 << 63) <= number < 1 << 63:
                raise self.error(event, f"the number {shown(text)} does not fit into 64 bits; write a smaller one")
            return number
        if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and math.isinf(float(text))):
            raise self.error(event, f"{shown(text)} is not a finite number; write a finite one")
        return float(text) if _FLOAT.fullmatch(text) else text

    def refuse_references(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise self.error(event, f"the alias *{shown(event.anchor)[1:-1]} is not allowed; write the value out")
        if event.anchor is not None:
            raise self.error(
                event, f"the anchor &{shown(event.anchor)[1:-1]} is not allowed; write the value out where it is needed"
            )

    def error(self, event: Any, message: str) -> PlanError:
        return PlanError(f"{self.name}:{event.start_mark.line + 1}: {message}")


def _too_large(name: str) -> PlanError:
    return PlanError(
        f"{name}:1: the file is larger than {MAX_BYTES >> 20} MiB; write long lists of ids as ranges such as '10-20'"
    )


def _sibling(path: Path) -> str:
    """The nearest file name beside `path`, for a mistyped one."""
    try:
        names = [
            p.name for _, p in zip(range(1000), path.parent.iterdir(), strict=False) if p.suffix in (".yaml", ".yml")
        ]
    except OSError:
        return ""
    return nearest(path.name, names)
