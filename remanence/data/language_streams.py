"""The two ways in which a language model goes on learning, as streams of texts: down, from the general to a task; and along, slice by slice.

After the axes of Shi et al. 2025, "Continual Learning of Large Language Models: A Comprehensive Survey", arXiv 2404.16789.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.data.digits import hold_out
from remanence.data.examples import Examples
from remanence.data.stream import Stream, Task
from remanence.data.text import numbered

#: What each event of a `vertical` stream is, in the survey's words: `remanence.llm_taxonomy` has the same letters.
STAGES = ("CPT", "DAP", "CFT")


def vertical(
    base: Examples,
    domain: Examples,
    task: Examples,
    tests: Sequence[Examples] | None = None,
    test_share: float = 0.1,
    seed: int = 0,
) -> Stream:
    """Three tasks, each with narrower data than the one before: general texts, texts of a domain, and examples of a task in it
    (scenario ``domain``). Later events say what is left of the general and of the domain's knowledge.

    Args:
        base, domain, task: texts or tokens. Row numbers as ids are counted for each by itself; ids of your own must differ.
        tests: three held-out tables; None takes `test_share` of each, drawn by `seed`.

    Raises:
        BadInput: not three tests, a table without rows or with too few to hold some out, or an id that comes twice.
    """
    parts = (base, domain, task)
    if tests is not None and len(tests) != len(parts):
        raise BadInput(f"vertical: {len(tests)} tests for {len(parts)} stages; give one for each")
    made = []
    for number, (part, stage) in enumerate(zip(parts, STAGES, strict=True)):
        if not len(part):
            raise BadInput(f"vertical: the stage {stage} ({part.source}) has no rows")
        test = None if tests is None else numbered(tests[number], 2 * number + 1)
        made.append(Task(*hold_out(numbered(part, 2 * number), test, test_share, seed), id=number))
    _distinct("vertical", made)
    return Stream(tuple(made), "domain", name="vertical")


def horizontal(
    examples: Examples,
    slices: int = 5,
    order: str = "shuffled",
    column: str = "date",
    budget: str = "documents",
    test: Examples | None = None,
    test_share: float = 0.1,
    seed: int = 0,
) -> Stream:
    """One stage, cut into slices of equal budget: every row is in exactly one of them, for training or held out (scenario ``domain``).

    Args:
        examples: texts or tokens.
        slices: how many tasks.
        order: ``shuffled`` by `seed`; or ``chronological``, by `column`, rows of the same date in the order of the table.
        column: numbers, or texts that sort as they should, such as dates written year first.
        budget: what is equal: ``documents``, to one row; or ``characters`` (of ``text``, ``prompt``, ``answer`` and what is said in
            ``messages``; of tokens their number), to half a row at each end.
        test: held-out rows on which every slice is measured; None takes `test_share` of each slice, drawn by `seed`.

    Raises:
        BadInput: an order, a budget or a column that does not exist, dates that cannot be sorted, or too few rows for so many slices.
    """
    if order not in ("shuffled", "chronological") or budget not in ("documents", "characters"):
        raise BadInput(
            f"horizontal: order={order!r} is shuffled or chronological, budget={budget!r} documents or characters"
        )
    if isinstance(slices, bool) or not 1 <= slices <= len(examples):
        raise BadInput(f"horizontal: {len(examples)} rows cannot be cut into {slices} slices")
    rows = torch.randperm(len(examples), generator=generator(seed, "horizontal"))
    if order == "chronological":
        rows = _by_date(examples, column)
    sizes = torch.ones(len(rows), dtype=torch.int64) if budget == "documents" else _sizes(examples)[rows]
    # A row goes where its middle falls, when all of them are laid out one after the other.
    middle = 2 * sizes.cumsum(0) - sizes
    place = (middle * slices).div(2 * sizes.sum(), rounding_mode="floor")
    made = []
    for number in range(slices):
        mine = rows[place == number]
        if not len(mine):
            raise BadInput(f"horizontal: slice {number} would have no rows; take fewer than {slices} slices")
        made.append(Task(*hold_out(examples.select(mine), test, test_share, seed), id=number))
    if test is None:
        _distinct("horizontal", made)
    return Stream(tuple(made), "domain", name=f"horizontal, {order}")


def _by_date(examples: Examples, column: str) -> Tensor:
    if column not in examples.columns:
        raise BadInput(
            f"horizontal: there is no column {column!r} to order by; the columns are {', '.join(examples.columns)}"
        )
    found = examples.columns[column]
    dates: list[Any] = found.tolist() if isinstance(found, Tensor) else found
    try:
        return torch.tensor(sorted(range(len(dates)), key=dates.__getitem__))
    except TypeError:
        raise BadInput(f"horizontal: column {column!r} has values that cannot be sorted with one another") from None


def _sizes(examples: Examples) -> Tensor:
    """Characters of each document, at least 1; tokens of a table of tokens."""
    if "attention_mask" in examples.columns:
        return examples["attention_mask"].sum(1).clamp(min=1)
    found = torch.zeros(len(examples), dtype=torch.int64)
    for name in ("text", "prompt", "answer", "messages"):
        for row, value in enumerate(examples.columns.get(name, ())):
            said = [value] if isinstance(value, str) else [each["content"] for each in value]
            found[row] += sum(map(len, said))
    if not bool(found.any()):
        raise BadInput("horizontal: budget='characters' needs texts or tokens")
    return found.clamp(min=1)


def _distinct(name: str, tasks: Sequence[Task]) -> None:
    ids = torch.cat([part.id for task in tasks for part in (task.train, task.test)])
    twice = len(ids) - len(ids.unique())
    if twice:
        raise BadInput(f"{name}: {twice} ids come more than once; every document needs an id of its own")
