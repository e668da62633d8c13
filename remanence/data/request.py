"""A forget request and what it resolves to."""

from __future__ import annotations

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
}


@dataclass(frozen=True)
class Request:
    """What to forget: everything seen that matches any of the fields given.

    `ids` names examples; every other field names values of a column of the data: `classes` of ``y``, `documents` of
    ``document``, `spans` of ``span``, `entities` of ``entity``, `concepts` of ``concept``, `client` of ``client``,
    `originals` of ``original``: every transformed copy of these examples (see `data.permuted`).
    A request covers what was seen when it is accepted.

    Raises:
        BadInput: nothing is asked for.
    """

    ids: Any = None
    classes: Sequence[int] | None = None
    documents: Sequence[Any] | None = None
    spans: Sequence[Any] | None = None
    entities: Sequence[Any] | None = None
    concepts: Sequence[Any] | None = None
    client: Any = None
    originals: Sequence[int] | None = field(default=None, kw_only=True)

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

    def asked(self) -> dict[str, Any]:
        """The fields given, as JSON values."""
        result: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                result[f.name] = [int(i) for i in value] if f.name in ("ids", "classes", "originals") else value
        return result

    def plain(self) -> str:
        """The request in words, without any id."""
        words = []
        if self.ids is not None:
            words.append(f"{len(self.ids)} given example{'s' if len(self.ids) != 1 else ''}")
        if self.originals is not None:
            words.append(f"every copy of {len(self.originals)} examples")
        for name in COLUMNS:
            value = getattr(self, name)
            if value is not None and name != "originals":
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
                if isinstance(values, Tensor):
                    known.update(values.unique().tolist())
                    mask = torch.isin(values, torch.as_tensor(wanted, dtype=values.dtype))
                else:
                    known.update(values)
                    mask = torch.tensor([item in wanted for item in values], dtype=torch.bool)
                found = found | Ids(examples.id[mask].numpy())
            missing = [item for item in wanted if item not in known]
            if missing and name != "classes":
                raise UnknownName(
                    f"this life has never seen {name} {missing}{nearest(str(missing[0]), map(str, known))}"
                )
        return found, unseen
