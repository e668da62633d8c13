"""What the commands do with a life: open it, go on with it, show how far it is, and say what happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from remanence.cli.words import FAILED, INTERRUPTED, console, say, say_error
from remanence.core.errors import BadInput, PlanError, RemanenceError

if TYPE_CHECKING:
    from remanence.life.life import Life
    from remanence.train.update import Update

REPEATED = "    \u2013 asked before, and nothing of it came since: the earlier receipt stands"


class Bar:
    """A life's progress on stderr: one bar for the run going on, wiped when the event is over; none without a terminal."""

    def __init__(self, quiet: bool) -> None:
        self.shown = not quiet and console(stderr=True).is_terminal
        self.words = ""
        self._bar: Any = None

    def begin(self, words: str) -> None:
        """Show that the event `words` is going on."""
        if not self.shown:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.words = words
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bar.add_task(words, total=None, loss="")
        self._bar.start()

    def __call__(self, u: Update, loss: float) -> None:
        if self._bar is None:
            return
        what = self.words
        if what.startswith("forget") and u.kind == "learn":
            what += ": retraining" + (f" task {u.task.id}" if u.task is not None else "")
        self._bar.update(
            self._bar.task_ids[0], description=what, total=u.total, completed=u.step, loss=f"loss {loss:.3f}"
        )

    def lives(self, done: int, count: int, words: str) -> None:
        """Show how many lives of a comparison are done."""
        if self._bar is None:
            self.begin("lives")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=count, completed=done, loss=words)

    def clear(self) -> None:
        """Wipe the bar, so that lines can be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def living(home: Path, bar: Bar) -> Iterator[None]:
    """While events happen: what an error or an interruption means for the life."""
    try:
        yield
    except BadInput:
        raise
    except RemanenceError as error:
        bar.clear()
        say_error(f"remanence: {error}")
        say_error(f"What was done before stays. When the cause is mended: remanence resume {home}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        bar.clear()
        say_error(f"Stopped. The life is as it was after its last event; go on with: remanence resume {home}")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        bar.clear()


def open_life(home: Path, *, look: bool = False, allow_drift: bool = False, progress: Any = None) -> Life:
    """The life in a home that was run from a plan; with `look`, only to look at it.

    Raises:
        BadInput: there is no life, or none that the command can build again.
    """
    from remanence.life.life import Life
    from remanence.life.run import Reading

    plan = home / "plan.yaml"
    if (home / "ledger.db").exists() and not plan.exists():
        raise BadInput(
            f"{home} holds a life that was not run from a plan, so its network is known to your program only; "
            "open it there: remanence.Life.resume(home, model, data)"
        )
    try:
        return (Reading if look else Life).resume(home, allow_drift=allow_drift, progress=progress)
    except PlanError as error:
        if "--allow-code" not in str(error):
            raise
        raise BadInput(
            f"the plan of {home} names code, which is never run from a home; "
            f"go on from your own copy of it: remanence run PLAN --home {home} --allow-code"
        ) from None


def say_event(life: Life, total: int) -> None:
    """One line about the event that has just happened."""
    from remanence.life.report_words import STATUS_GLYPHS, duration, percent
    from remanence.life.summary import asked_plain

    event = life.events[-1]
    status, words = event.status, event.label
    parts = []
    if event.kind == "forget":
        receipt = life.receipts[-1]
        status = receipt.status
        words = f"forget {asked_plain(life, receipt.number)} by {receipt.by}: {status}"
        if "weights" in receipt.states:
            parts.append(f"weights {receipt.states['weights']}")
    if event.accuracy:
        mean = sum(event.accuracy.values()) / len(event.accuracy)
        parts.append(f"accuracy {percent(mean)}" if life.problem.main == "accuracy" else f"squared error {mean:.4g}")
    parts.append(duration(event.seconds))
    say(f"{event.number}/{total} {STATUS_GLYPHS.get(status, '?')} {' · '.join([words, *parts])}")


def say_closing(life: Life, quiet: bool = False) -> None:
    """The table, the receipts, where the forgotten is, and where the report lies."""
    from remanence.life.report_table import render_table

    page = life.home / "report.html"
    if not quiet:
        say()
        say(render_table(json.loads((life.home / "report.json").read_text(encoding="utf-8"))))
        say()
    typer.echo(f"Report: {page}")


def go_on(life: Life, bar: Bar, quiet: bool, plan: Any = None, stream: Any = None) -> None:
    """Live what is left of the plan, and say so."""
    from remanence.life.plan import load_plan
    from remanence.life.run import continue_plan, remaining

    with life, living(life.home, bar):
        plan = plan or load_plan(life.home / "plan.yaml")
        done = len(life.events)
        if not quiet:
            left = f"{len(remaining(life, plan))} {'more ' if done else ''}events"
            say(f"{plan.name}: {left}; the life's home is {life.home}")

        def after(life: Life) -> None:
            nonlocal done
            bar.clear()
            if quiet:
                return
            if len(life.events) == done:
                say(REPEATED)
            else:
                say_event(life, len(life.events) + len(remaining(life, plan)))
            done = len(life.events)

        continue_plan(life, after, plan, stream, before=bar.begin)
        bar.clear()
        say_closing(life, quiet)
