"""What the command says, and how: exit codes, errors, tables, and ids in a few characters."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import typer

from remanence.core.errors import BadInput, EventFailed, PlanError, RemanenceError

if TYPE_CHECKING:
    from rich.console import Console

    from remanence.core.ids import Ids

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130

P = ParamSpec("P")
R = TypeVar("R")


def plain(command: Callable[P, R]) -> Callable[P, R]:
    """Every error raised on purpose becomes one message on stderr and an exit code; all others keep their traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RemanenceError as error:
            fail(error, FAILED if isinstance(error, EventFailed) else UNUSABLE)
        except KeyboardInterrupt:
            say_error("Stopped. A life is as it was after its last event; remanence resume HOME goes on with it.")
            raise typer.Exit(INTERRUPTED) from None

    return run


def fail(error: RemanenceError, code: int) -> NoReturn:
    # The lines of a plan's errors begin with file:line, which editors follow.
    say_error(str(error) if isinstance(error, PlanError) else f"remanence: {error}")
    raise typer.Exit(code) from None


def say_error(text: str) -> None:
    typer.echo(text, err=True)


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    # Into a file or pipe: wide enough that a row of a table is a line.
    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() or "COLUMNS" in os.environ else 160
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def say(what: Any = "") -> None:
    console().print(what, soft_wrap=isinstance(what, str))


def make_table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in columns:
        table.add_column(name, justify="right" if name == "examples" else "left", overflow="fold")
    return table


def cells(*words: str) -> list[Any]:
    """Text as it is, without rich's markup."""
    from rich.text import Text

    return [Text(word) for word in words]


def ids_of(text: str) -> Ids:
    """``1,2,10-20`` as ids, both ends of a range included."""
    from remanence.core.ids import Ids
    from remanence.life.plan import MAX_IDS

    found = Ids()
    for word in text.split(","):
        span = re.fullmatch(r"\s*(-?\d{1,18})(?:\s*-\s*(-?\d{1,18}))?\s*", word)
        if span is None:
            raise BadInput(
                f"--ids {word.strip()[:40]!r} is no id; expected whole numbers and ranges such as 1,2,10-20 (both ends included)"
            )
        first = int(span[1])
        last = int(span[2]) if span[2] is not None else first
        if last < first:
            raise BadInput(f"--ids {word.strip()!r} runs backwards; write the smaller number first")
        if last - first >= MAX_IDS:
            raise BadInput(f"--ids {word.strip()!r} is more than {MAX_IDS} ids; ask for less at once")
        found = found | Ids.range(first, last + 1)
    return found


def numbers_of(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise BadInput(f"--classes {text[:40]!r}: expected whole numbers such as 3 or 3,7") from None


def in_short(ids: Ids, most: int | None = 8) -> str:
    """Ids in short: ``1, 2, 10-20``, at most so many of them."""
    found: list[tuple[int, int]] = []
    for value in ids:
        if found and value == found[-1][1] + 1:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in found[:most]]
    return ", ".join([*shown, *(["..."] if len(found) > len(shown) else [])])
