"""The command ``remanence``. Nothing heavy is imported before a command needs it: help and lists answer at once."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from remanence import __version__, catalogue
from remanence.core.errors import BadInput, EventFailed, PlanError, RemanenceError

if TYPE_CHECKING:
    from rich.console import Console

    from remanence.core.ids import Ids
    from remanence.core.part import Part
    from remanence.life.life import Life
    from remanence.train.update import Update

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130
CODES = (
    "Exit codes: 0 done; 1 an event failed or was refused, and what was done before it stays (also: a question was answered "
    "with no, or the reader of the output went away); 2 something given cannot be used, and nothing was done with it; "
    "130 interrupted."
)
REPEATED = "    \u2013 asked before, and nothing of it came since: the earlier receipt stands"
VERIFY_CODES = "Exit codes: 0 consistent; 1 altered; 2 unknown signer, or the receipt could not be read."

app = typer.Typer(
    name="remanence",
    help="Keep the books on what a neural network remembers: learn, keep, forget, recall, budget, measure.",
    epilog=CODES,
    no_args_is_help=True,
    add_completion=False,
)

P = ParamSpec("P")
R = TypeVar("R")

# -- errors and output ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own arguments); returns the exit code."""
    try:
        typer.main.get_command(app)(args=argv, prog_name="remanence")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    return 0  # pragma: no cover (the command always ends by SystemExit)


def _plain(command: Callable[P, R]) -> Callable[P, R]:
    """Every error raised on purpose becomes one message on stderr and an exit code; all others keep their traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RemanenceError as error:
            _fail(error, FAILED if isinstance(error, EventFailed) else UNUSABLE)
        except KeyboardInterrupt:
            _say_error("Stopped. A life is as it was after its last event; remanence resume HOME goes on with it.")
            raise typer.Exit(INTERRUPTED) from None

    return run


def _fail(error: RemanenceError, code: int) -> NoReturn:
    # The lines of a plan's errors begin with file:line, which editors follow.
    _say_error(str(error) if isinstance(error, PlanError) else f"remanence: {error}")
    raise typer.Exit(code) from None


def _say_error(text: str) -> None:
    typer.echo(text, err=True)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    # Into a file or pipe: wide enough that a row of a table is a line.
    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() or "COLUMNS" in os.environ else 160
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def _print(what: Any = "") -> None:
    _console().print(what, soft_wrap=isinstance(what, str))


def _ids(text: str) -> Ids:
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


def _runs(ids: Ids, most: int | None = 8) -> str:
    """Ids in short: ``1, 2, 10-20``, at most so many of them."""
    found: list[tuple[int, int]] = []
    for value in ids:
        if found and value == found[-1][1] + 1:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in found[:most]]
    return ", ".join([*shown, *(["..."] if len(found) > len(shown) else [])])


# -- lives ---------------------------------------------------------------------------------------------------------------


class _Bar:
    """A life's progress on stderr: one bar for the run going on, wiped when the event is over; none without a terminal."""

    def __init__(self, quiet: bool) -> None:
        self.shown = not quiet and _console(stderr=True).is_terminal
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
            console=_console(stderr=True),
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

    def clear(self) -> None:
        """Wipe the bar, so that lines can be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def _living(home: Path, bar: _Bar) -> Iterator[None]:
    """While events happen: what an error or an interruption means for the life."""
    try:
        yield
    except BadInput:
        raise
    except RemanenceError as error:
        bar.clear()
        _say_error(f"remanence: {error}")
        _say_error(f"What was done before stays. When the cause is mended: remanence resume {home}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        bar.clear()
        _say_error(f"Stopped. The life is as it was after its last event; go on with: remanence resume {home}")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        bar.clear()


def _open(home: Path, *, look: bool = False, allow_drift: bool = False, progress: Any = None) -> Life:
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


def _after(life: Life, total: int) -> None:
    """One line about the event that has just happened."""
    from remanence.core.problem import Classification
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
        parts.append(
            f"accuracy {percent(mean)}" if isinstance(life.problem, Classification) else f"squared error {mean:.4g}"
        )
    parts.append(duration(event.seconds))
    _print(f"{event.number}/{total} {STATUS_GLYPHS.get(status, '?')} {' · '.join([words, *parts])}")


def _closing(life: Life, quiet: bool = False) -> None:
    """The table, the receipts, where the forgotten is, and where the report lies."""
    from remanence.life.report_table import render_table

    page = life.home / "report.html"
    if not quiet:
        _print()
        _print(render_table(json.loads((life.home / "report.json").read_text(encoding="utf-8"))))
        _print()
    typer.echo(f"Report: {page}")


def _go_on(life: Life, bar: _Bar, quiet: bool, plan: Any = None, stream: Any = None) -> None:
    """Live what is left of the plan, and say so."""
    from remanence.life.plan import load_plan
    from remanence.life.run import continue_plan, remaining

    with life, _living(life.home, bar):
        plan = plan or load_plan(life.home / "plan.yaml")
        done = len(life.events)
        if not quiet:
            left = f"{len(remaining(life, plan))} {'more ' if done else ''}events"
            _print(f"{plan.name}: {left}; the life's home is {life.home}")

        def after(life: Life) -> None:
            nonlocal done
            bar.clear()
            if quiet:
                return
            if len(life.events) == done:
                _print(REPEATED)
            else:
                _after(life, len(life.events) + len(remaining(life, plan)))
            done = len(life.events)

        continue_plan(life, after, plan, stream, before=bar.begin)
        bar.clear()
        _closing(life, quiet)


# -- commands ------------------------------------------------------------------------------------------------------------

HomeArgument = Annotated[Path, typer.Argument(help="The life's folder, such as runs/digits.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only where the report lies.")]
Drift = Annotated[
    bool,
    typer.Option(
        "--allow-drift", help="Go on although versions, threads or the processor differ; it is recorded as not exact."
    ),
]
IdsOption = Annotated[
    str | None, typer.Option("--ids", metavar="IDS", help="Such as 1,2,10-20 (both ends included).", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"remanence {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


@app.command(epilog=CODES)
@_plain
def run(
    plan: Annotated[Path, typer.Argument(help="A YAML file, such as examples/digits.yaml.", show_default=False)],
    home: Annotated[
        Path | None, typer.Option(help="The life's folder; default: the plan's, or runs/NAME.", show_default=False)
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let the plan name your own code as module:function.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Live the life that a plan describes; one that was stopped goes on where it was."""
    from remanence.life.yaml import read

    read(plan)  # a file that is missing or no YAML is said at once, before anything heavy is loaded

    from remanence.life.run import open_plan

    bar = _Bar(quiet)
    life, made, stream = open_plan(plan, home, allow_code, progress=bar)
    _go_on(life, bar, quiet, made, stream)


@app.command(epilog=CODES)
@_plain
def resume(home: HomeArgument, allow_drift: Drift = False, quiet: Quiet = False) -> None:
    """Go on with a life that was stopped, from its last finished event, with the same result."""
    bar = _Bar(quiet)
    _go_on(_open(home, allow_drift=allow_drift, progress=bar), bar, quiet)


@app.command(epilog=CODES)
@_plain
def compare(
    plan: Annotated[Path, typer.Argument(help="A YAML file, such as examples/digits.yaml.", show_default=False)],
    forget: Annotated[
        str | None, typer.Option(help="Forgetters to compare; 'all' is every one.", show_default=False)
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Keepers to compare: none, replay, \\[replay, ewc], {replay: {per_class: 5}}.", show_default=False
        ),
    ] = None,
    learn: Annotated[str | None, typer.Option(help="Learners to compare.", show_default=False)] = None,
    where: Annotated[
        str | None, typer.Option(help="Where to write: none, hft, {lora: {rank: 4}}.", show_default=False)
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many lives of each variant, counted from the plan's seed.")
    ] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    references: Annotated[int, typer.Option(min=2, help="Models retrained for each request.")] = 3,
    klom: Annotated[
        bool, typer.Option("--klom", help="Also compare distributions over seeds: KL of margins, with its floor.")
    ] = False,
    home: Annotated[
        Path | None, typer.Option(help="The folder; default: runs/NAME-compare.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Live a plan in many variants and seeds side by side; what was lived before is not lived again.

    Alternatives are separated by commas, in the syntax of plans: a name, {name: {knob: value}}, or a list of keepers that belong together.
    """
    from remanence.life.yaml import read

    read(plan)

    from remanence.life import compare as comparing
    from remanence.life import compare_report

    bar = _Bar(quiet)

    def told(done: int, count: int, words: str) -> None:
        if bar._bar is None:
            bar.begin("lives")
        if bar._bar is not None:
            bar._bar.update(bar._bar.task_ids[0], total=count, completed=done, loss=words)

    try:
        made, folder = comparing.compare(
            plan,
            learn=learn,
            keep=keep,
            where=where,
            forget=forget,
            seeds=seeds,
            jobs=jobs,
            references=references,
            klom=klom,
            folder=home,
            told=told,
        )
    except KeyboardInterrupt:
        bar.clear()
        _say_error("Stopped. What was lived stays; the same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        bar.clear()
    page = compare_report.write(folder, made)
    if not quiet:
        _print(compare_report.render(made))
    _print(f"{page} (beside it comparison.json, .csv and .md)")
    if made["failed"]:
        raise typer.Exit(FAILED)


@app.command()
@_plain
def trace(home: HomeArgument, ids: IdsOption = None, as_json: Json = False) -> None:
    """Say where examples live: every holder, and what became of them there."""
    from remanence.core.ids import Ids

    if ids is None:
        raise BadInput("say which examples: --ids 1,2,10-20")
    wanted = _ids(ids)
    with _open(home, look=True) as life:
        rows = life.trace(wanted)
    if as_json:
        found = [
            {"holder": r.holder, "state": r.state, "ids": [int(i) for i in r.ids], "inputs": list(r.inputs), "reason": r.reason}
            for r in rows
        ]  # fmt: skip
        typer.echo(json.dumps(found, indent=1))
        return
    table = _table("state", "holder", "examples", "ids", "why")
    seen = Ids()
    for r in rows:
        seen = seen | r.ids
        why = r.reason + (f" (from {', '.join(r.inputs)})" if r.inputs else "")
        table.add_row(*_cells(r.state, r.holder, str(len(r.ids)), _runs(r.ids), why))
    if rows:
        _print(table)
    if unseen := wanted - seen:
        _print(f"No holder of this life has had {_runs(unseen)}.")


@app.command(epilog=VERIFY_CODES)
@_plain
def verify(
    receipt: Annotated[Path, typer.Argument(help="The receipt's file, HOME/receipts/0001.json.", show_default=False)],
    home: Annotated[
        Path | None,
        typer.Option(
            help="The life's folder; default: where the receipt lies, if there is a ledger.", show_default=False
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="HEX", help="The public key that must have signed; default: your own.", show_default=False
        ),
    ] = None,
) -> None:
    """Check a receipt: its signature, its signer, its place in the ledger and the files it lists."""
    from remanence.life.receipts import verify as check

    verdict = check(receipt, home, key)
    _print(f"{receipt}: {verdict.word}")
    for reason in verdict.reasons:
        _print(f"  {reason}")
    _print(f"  checked: {', '.join(verdict.checked) or 'the signature; as it fails, nothing else'}")
    if verdict.checked and "ledger" not in verdict.checked:
        _print("  not checked: its place in the ledger and the files (say where the life is: --home DIR)")
    if verdict.signer:
        _print(f"  signed by {verdict.signer}")
    for name, state in sorted(verdict.files.items()):
        _print(f"  {state}: {name}")
    raise typer.Exit({"consistent": 0, "altered": FAILED}.get(verdict.word, UNUSABLE))


@app.command()
@_plain
def report(home: HomeArgument, quiet: Quiet = False) -> None:
    """Write report.html and report.json anew, and print the table."""
    with _open(home, look=True) as life:
        life.report()
        _closing(life, quiet)


@app.command(epilog=CODES)
@_plain
def forget(
    home: HomeArgument,
    by: Annotated[
        str,
        typer.Option(metavar="METHOD", help="Such as ssd, or with knobs '{ssd: {selection: 5}}'.", show_default=False),
    ],
    classes: Annotated[
        str | None, typer.Option(metavar="CLASSES", help="Such as 3 or 3,7.", show_default=False)
    ] = None,
    ids: IdsOption = None,
    targets: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH", help="A regression's targets in this range, such as 0 30.", show_default=False
        ),
    ] = None,
    references: Annotated[
        int,
        typer.Option("--verify", metavar="N", min=0, max=100, help="Retrained models to measure against; 0 is none."),
    ] = 3,
    allow_drift: Drift = False,
    quiet: Quiet = False,
) -> None:
    """Ask a finished life to forget classes, examples or a range of targets; ends in a signed receipt."""
    from remanence.data import Request
    from remanence.life.plan import load_plan
    from remanence.life.run import remaining
    from remanence.life.yaml import parse

    if classes is None and ids is None and targets is None:
        raise BadInput("say what to forget: --classes 3,7 or --ids 1,2,10-20 or --targets 0 30")
    request = Request(
        ids=None if ids is None else _ids(ids),
        classes=None if classes is None else _numbers(classes),
        targets=targets,
    )
    bar = _Bar(quiet)
    life = _open(home, allow_drift=allow_drift, progress=bar)
    with life, _living(home, bar):
        if left := len(remaining(life, load_plan(life.home / "plan.yaml"))):
            raise BadInput(f"{left} events of the plan have not happened yet; first: remanence resume {home}")
        count = len(life.events)
        bar.begin(f"forget {request.plain()} by {by}")
        life.forget(
            request, by=parse(by, "--by").data, verify={"retrain": {"seeds": references}} if references else None
        )
        bar.clear()
        if not quiet:
            _after(life, len(life.events)) if len(life.events) > count else _print(REPEATED)
        life.report()
        _closing(life, quiet)


@app.command()
@_plain
def hardest(
    home: HomeArgument,
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="How many examples.", show_default=False)],
    easiest: Annotated[bool, typer.Option("--easiest", help="Those that are forgotten most easily instead.")] = False,
    as_json: Json = False,
) -> None:
    """Name the learned examples that are hardest to forget, as --ids takes them."""
    with _open(home, look=True) as life:
        found = life.hardest(n, easiest=easiest)
    typer.echo(json.dumps([int(i) for i in found]) if as_json else _runs(found, None).replace(" ", ""))


@app.command()
@_plain
def audit(
    home: HomeArgument,
    receipt: Annotated[
        int | None, typer.Option(metavar="N", help="The receipt's number; default: every request.", show_default=False)
    ] = None,
    references: Annotated[int, typer.Option(min=2, max=100, help="Models retrained to measure against.")] = 3,
    shadows: Annotated[
        int, typer.Option(min=0, max=1000, help="Shadow models for the likelihood-ratio attack; an even number.")
    ] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack what was forgotten: is it gone, or only hidden? The life itself stays as it is."""
    from remanence.life.audit import render

    bar = _Bar(quiet or as_json)
    with _open(home, look=True, progress=bar) as life:
        bar.begin("audit")
        try:
            data = life.audit(receipt, references=references, shadows=shadows)
        finally:
            bar.clear()
        if as_json:
            typer.echo(json.dumps(data, indent=1))
            return
        if not quiet:
            _print(render(data))
        typer.echo(f"Audit: {life.home / 'audit.html'} (beside it audit.json)")


@app.command()
@_plain
def redact(home: HomeArgument, yes: Yes = False, allow_drift: Drift = False) -> None:
    """Remove ids, texts and salts of requests that are deleted everywhere; the chain stays whole."""
    if not yes:
        typer.confirm(
            "Who was forgotten cannot be looked up afterwards, nor known again if it comes in with later data, and the ids in the "
            "plan are blanked with them. Go on?",
            abort=True,
        )
    with _open(home, allow_drift=allow_drift) as life:
        for line in life.redact() or ["there is nothing to redact"]:
            _print(line)


@app.command()
@_plain
def delete(home: HomeArgument, yes: Yes = False) -> None:
    """Delete a life with everything it remembers."""
    from remanence.life.home import delete as remove

    if not yes and (home / "ledger.db").is_file():
        typer.confirm(f"Delete the life in {home} with its ledger, snapshots, receipts and reports?", abort=True)
    names = remove(home)
    left = sorted(path.name for path in home.iterdir()) if home.is_dir() else []
    _print(f"Deleted {', '.join(names)} in {home}. Copies, backups and references kept elsewhere are not reached.")
    if left:
        _print(f"Left, for it is not of this life: {', '.join(left)}.")


@app.command()
@_plain
def methods(
    verb: Annotated[str | None, typer.Option(help=f"One of {', '.join(catalogue.VERBS)}.", show_default=False)] = None,
    kind: Annotated[str | None, typer.Option(help="Such as method or metric.", show_default=False)] = None,
    family: Annotated[str | None, typer.Option(help="Such as replay or distillation.", show_default=False)] = None,
    without: Annotated[
        str | None,
        typer.Option(
            metavar="NEEDS", help="Leave out what needs these, such as retain-data,labels.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods and other parts there are."""
    found = catalogue.parts(verb, kind, family, without)
    if as_json:
        typer.echo(json.dumps([_line(part) for part in found], indent=1, ensure_ascii=False))
        return
    table = _table("verb", "slug", "kind", "family", "needs", "checked against")
    for part in found:
        table.add_row(
            *_cells(part.verb, part.slug, part.kind, part.family, ", ".join(part.needs), catalogue.fidelity(part))
        )
    _print(table)


@app.command()
@_plain
def show(
    slug: Annotated[str, typer.Argument(help="Such as ssd, or verb/slug.", show_default=False)],
) -> None:
    """Explain a part: its formula, its knobs, what it needs, its paper, what it was checked against."""
    for part in catalogue.named(slug):
        _show(part)


def _line(part: Part) -> dict[str, Any]:
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
    }


def _show(part: Part) -> None:
    import dataclasses
    import inspect

    try:
        cls = part.load()
    except ImportError as error:
        raise BadInput(f"{part.verb} {part.slug} cannot be loaded ({error}); install what it needs") from None
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or sys.modules[cls.__module__].__doc__ or "")
    _print(f"{part.slug}: {part.kind} to {part.verb} ({part.family})\n")
    _print(text + "\n")
    knobs = (
        [f for f in dataclasses.fields(cls) if f.init and f.metadata.get("doc")]
        if dataclasses.is_dataclass(cls)
        else []
    )
    if knobs:
        table = _table("knob", "type", "default", "range", "meaning")
        for f in knobs:
            table.add_row(*_cells(f.name, str(f.type), _default(f), _range(f.metadata), f.metadata["doc"]))
        _print(table)
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
        _print(f"{name + ':':17}{words}")


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


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise BadInput(f"--classes {text[:40]!r}: expected whole numbers such as 3 or 3,7") from None


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in columns:
        table.add_column(name, justify="right" if name == "examples" else "left", overflow="fold")
    return table


def _cells(*words: str) -> list[Any]:
    """Text as it is, without rich's markup."""
    from rich.text import Text

    return [Text(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
