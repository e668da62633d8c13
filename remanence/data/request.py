"""A forget request and what it resolves to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.ids import Ids
from remanence.data.examples import Examples

#: Which column of the data each field of a request looks in.
COLUMNS = {
    "classes": "y",
    "documents": "document",
    "spans": "span",
    "entities": "entity",
    "concepts": "concept",
    "client": "client",
    "originals": "original",
    "targets": "y",
}


@dataclass(frozen=True)
class Request:
    """What to forget: everything seen that matches any of the fields given.

    `ids` names examples; every other field names values of a column of the data: `classes` of ``y``, `documents` of
    ``document``, `spans` of ``span``, `entities` of ``entity``, `concepts` of ``concept``, `client` of ``client``,
    `originals` of ``original``: every transformed copy of these examples (see `data.permuted`). `targets` = (low, high): every
    example of a regression whose target lies between the two, both ends included.
    A request covers what was seen when it is accepted.

    Raises:
        BadInput: nothing is asked for, or `targets` are no range.
    """

    ids: Any = None
    classes: Sequence[int] | None = None
    documents: Sequence[Any] | None = None
    spans: Sequence[Any] | None = None
    entities: Sequence[Any] | None = None
    concepts: Sequence[Any] | None = None
    client: Any = None
    originals: Sequence[int] | None = field(default=None, kw_only=True)
    targets: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.ids is not None and not isinstance(self.ids, Ids):
            object.__setattr__(self, "ids", Ids(self.ids))
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        for name, value in given.items():
            if name not in ("ids", "client") and (isinstance(value, str) or not isinstance(value, Iterable)):
                raise BadInput(f"Request({name}={value!r}): give a list")
        if not given or not any(len(value) if hasattr(value, "__len__") else True for value in given.values()):
            raise BadInput(
                "the request names nothing; give ids=[...] or classes=[...] (or another field that is not empty)"
            )
        if self.targets is not None:
            object.__setattr__(self, "targets", _range(self.targets))

    def asked(self) -> dict[str, Any]:
        """The fields given, as JSON values."""
        result: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                whole = f.name in ("ids", "classes", "originals")
                result[f.name] = [int(i) for i in value] if whole else value
        if self.targets is not None:
            result["targets"] = list(self.targets)
        return result

    def plain(self) -> str:
        """The request in words, without any id."""
        words = []
        if self.ids is not None:
            words.append(f"{len(self.ids)} given example{'s' if len(self.ids) != 1 else ''}")
        if self.originals is not None:
            words.append(f"every copy of {len(self.originals)} examples")
        if self.targets is not None:
            words.append("targets from {:.12g} to {:.12g}".format(*self.targets))
        for name in COLUMNS:
            value = getattr(self, name)
            if value is not None and name not in ("originals", "targets"):
                listed = [value] if name == "client" else list(value)
                noun = (
                    {"classes": "class", "entities": "entity"}.get(name, name.removesuffix("s"))
                    if len(listed) == 1
                    else name
                )
                words.append(f"{noun} {', '.join(map(str, listed))}")
        return " and ".join(words)

    def resolve(self, seen: Sequence[Examples]) -> tuple[Ids, Ids]:
        """Ids that match among `seen`, and the ids asked for that were never seen.

        Raises:
            UnknownName: the data has no such column, class or value.
        """
        universe = Ids()
        for examples in seen:
            universe = universe | examples.ids
        found = Ids()
        unseen = Ids()
        if self.ids is not None:
            found, unseen = self.ids & universe, self.ids - universe
        for name, column in COLUMNS.items():
            value = getattr(self, name)
            if value is None:
                continue
            wanted = [value] if name == "client" else list(value)
            if not any(column in examples.columns for examples in seen):
                raise UnknownName(
                    f"the request names {name}, but the data this life has seen has no column {column!r}; "
                    "ask by ids=, or learn from data that has the column"
                )
            known: set[Any] = set()
            for examples in seen:
                values = examples.columns.get(column)
                if values is None:
                    continue
                if name == "targets":
                    mask = _between(values, *wanted)
                elif isinstance(values, Tensor):
                    known.update(values.unique().tolist())
                    mask = torch.isin(values, torch.as_tensor(wanted, dtype=values.dtype))
                else:
                    known.update(values)
                    mask = torch.tensor([item in wanted for item in values], dtype=torch.bool)
                found = found | Ids(examples.id[mask].numpy())
            missing = [item for item in wanted if item not in known]
            if missing and name not in ("classes", "targets"):
                raise UnknownName(
                    f"this life has never seen {name} {missing}{nearest(str(missing[0]), map(str, known))}"
                )
        return found, unseen


def _range(value: Sequence[float]) -> tuple[float, float]:
    given = list(value)
    numbers = [v for v in given if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(given) != 2 or len(numbers) != 2 or not numbers[0] <= numbers[1]:
        raise BadInput(
            f"Request(targets={value!r}): give two numbers (low, high), the smaller first; both are included"
        )
    return float(numbers[0]), float(numbers[1])


def _between(y: Tensor | list[Any], low: float, high: float) -> Tensor:
    """(N,) whether each target lies in [low, high].

    Raises:
        UnknownName: the targets are not one number each.
    """
    if not isinstance(y, Tensor) or y.numel() != len(y):
        raise UnknownName(
            "the request names a range of targets, but this data has not one number per example; ask by ids="
        )
    return (y.reshape(-1) >= low) & (y.reshape(-1) <= high)
