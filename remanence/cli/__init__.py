"""The command ``remanence``. Nothing heavy is imported before a command needs it: help and lists answer at once."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated

import typer

from remanence import __version__, catalogue
from remanence.cli.lives import REPEATED, Bar, go_on, living, open_life, say_closing, say_event
from remanence.cli.parts import explain, line_of, list_by
from remanence.cli.words import (
    FAILED,
    INTERRUPTED,
    UNUSABLE,
    cells,
    ids_of,
    in_short,
    make_table,
    numbers_of,
    plain,
    say,
    say_error,
)
from remanence.core.errors import BadInput

CODES = (
    "Exit codes: 0 done; 1 an event failed or was refused, and what was done before it stays (also: a question was answered "
    "with no, or the reader of the output went away); 2 something given cannot be used, and nothing was done with it; "
    "130 interrupted."
)
VERIFY_CODES = "Exit codes: 0 consistent; 1 altered; 2 unknown signer, or the receipt could not be read."

app = typer.Typer(
    name="remanence",
    help="Keep the books on what a neural network remembers: learn, keep, forget, recall, budget, measure.",
    epilog=CODES,
    no_args_is_help=True,
    add_completion=False,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own arguments); returns the exit code."""
    try:
        typer.main.get_command(app)(args=argv, prog_name="remanence")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    return 0  # pragma: no cover (the command always ends by SystemExit)


# -- what many commands take ---------------------------------------------------------------------------------------------

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


# -- commands ------------------------------------------------------------------------------------------------------------


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
@plain
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

    bar = Bar(quiet)
    life, made, stream = open_plan(plan, home, allow_code, progress=bar)
    go_on(life, bar, quiet, made, stream)


@app.command(epilog=CODES)
@plain
def resume(home: HomeArgument, allow_drift: Drift = False, quiet: Quiet = False) -> None:
    """Go on with a life that was stopped, from its last finished event, with the same result."""
    bar = Bar(quiet)
    go_on(open_life(home, allow_drift=allow_drift, progress=bar), bar, quiet)


@app.command(epilog=CODES)
@plain
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
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Budgets such as 200KB,500KB,1MB: every variant with each, stores as large as fit.",
            show_default=False,
        ),
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

    bar = Bar(quiet)

    try:
        made, folder = comparing.compare(
            plan,
            learn=learn,
            keep=keep,
            where=where,
            forget=forget,
            memory=memory,
            seeds=seeds,
            jobs=jobs,
            references=references,
            klom=klom,
            folder=home,
            told=bar.lives,
        )
    except KeyboardInterrupt:
        bar.clear()
        say_error("Stopped. What was lived stays; the same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        bar.clear()
    page = compare_report.write(folder, made)
    if not quiet:
        say(compare_report.render(made))
    say(f"{page} (beside it comparison.json, .csv and .md)")
    if any(not compare_report.refused(entry["error"]) for entry in made["failed"]):
        raise typer.Exit(FAILED)


@app.command()
@plain
def trace(home: HomeArgument, ids: IdsOption = None, as_json: Json = False) -> None:
    """Say where examples live: every holder, and what became of them there."""
    from remanence.core.ids import Ids

    if ids is None:
        raise BadInput("say which examples: --ids 1,2,10-20")
    wanted = ids_of(ids)
    with open_life(home, look=True) as life:
        rows = life.trace(wanted)
    if as_json:
        found = [
            {"holder": r.holder, "state": r.state, "ids": [int(i) for i in r.ids], "inputs": list(r.inputs), "reason": r.reason}
            for r in rows
        ]  # fmt: skip
        typer.echo(json.dumps(found, indent=1))
        return
    table = make_table("state", "holder", "examples", "ids", "why")
    seen = Ids()
    for r in rows:
        seen = seen | r.ids
        why = r.reason + (f" (from {', '.join(r.inputs)})" if r.inputs else "")
        table.add_row(*cells(r.state, r.holder, str(len(r.ids)), in_short(r.ids), why))
    if rows:
        say(table)
    if unseen := wanted - seen:
        say(f"No holder of this life has had {in_short(unseen)}.")


@app.command(epilog=VERIFY_CODES)
@plain
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
    say(f"{receipt}: {verdict.word}")
    for reason in verdict.reasons:
        say(f"  {reason}")
    say(f"  checked: {', '.join(verdict.checked) or 'the signature; as it fails, nothing else'}")
    if verdict.checked and "ledger" not in verdict.checked:
        say("  not checked: its place in the ledger and the files (say where the life is: --home DIR)")
    if verdict.signer:
        say(f"  signed by {verdict.signer}")
    for name, state in sorted(verdict.files.items()):
        say(f"  {state}: {name}")
    raise typer.Exit({"consistent": 0, "altered": FAILED}.get(verdict.word, UNUSABLE))


@app.command()
@plain
def report(home: HomeArgument, quiet: Quiet = False) -> None:
    """Write report.html and report.json anew, and print the table."""
    with open_life(home, look=True) as life:
        life.report()
        say_closing(life, quiet)


@app.command(epilog=CODES)
@plain
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
        ids=None if ids is None else ids_of(ids),
        classes=None if classes is None else numbers_of(classes),
        targets=targets,
    )
    bar = Bar(quiet)
    life = open_life(home, allow_drift=allow_drift, progress=bar)
    with life, living(home, bar):
        if left := len(remaining(life, load_plan(life.home / "plan.yaml"))):
            raise BadInput(f"{left} events of the plan have not happened yet; first: remanence resume {home}")
        count = len(life.events)
        bar.begin(f"forget {request.plain()} by {by}")
        life.forget(
            request, by=parse(by, "--by").data, verify={"retrain": {"seeds": references}} if references else None
        )
        bar.clear()
        if not quiet:
            say_event(life, len(life.events)) if len(life.events) > count else say(REPEATED)
        life.report()
        say_closing(life, quiet)


@app.command()
@plain
def hardest(
    home: HomeArgument,
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="How many examples.", show_default=False)],
    easiest: Annotated[bool, typer.Option("--easiest", help="Those that are forgotten most easily instead.")] = False,
    as_json: Json = False,
) -> None:
    """Name the learned examples that are hardest to forget, as --ids takes them."""
    with open_life(home, look=True) as life:
        found = life.hardest(n, easiest=easiest)
    typer.echo(json.dumps([int(i) for i in found]) if as_json else in_short(found, None).replace(" ", ""))


@app.command()
@plain
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

    bar = Bar(quiet or as_json)
    with open_life(home, look=True, progress=bar) as life:
        bar.begin("audit")
        try:
            data = life.audit(receipt, references=references, shadows=shadows)
        finally:
            bar.clear()
        if as_json:
            typer.echo(json.dumps(data, indent=1))
            return
        if not quiet:
            say(render(data))
        typer.echo(f"Audit: {life.home / 'audit.html'} (beside it audit.json)")


@app.command()
@plain
def redact(home: HomeArgument, yes: Yes = False, allow_drift: Drift = False) -> None:
    """Remove ids, texts and salts of requests that are deleted everywhere; the chain stays whole."""
    if not yes:
        typer.confirm(
            "Who was forgotten cannot be looked up afterwards, nor known again if it comes in with later data, and the ids in the "
            "plan are blanked with them. Go on?",
            abort=True,
        )
    with open_life(home, allow_drift=allow_drift) as life:
        for line in life.redact() or ["there is nothing to redact"]:
            say(line)


@app.command()
@plain
def delete(home: HomeArgument, yes: Yes = False) -> None:
    """Delete a life with everything it remembers."""
    from remanence.life.home import delete as remove

    if not yes and (home / "ledger.db").is_file():
        typer.confirm(f"Delete the life in {home} with its ledger, snapshots, receipts and reports?", abort=True)
    names = remove(home)
    left = sorted(path.name for path in home.iterdir()) if home.is_dir() else []
    say(f"Deleted {', '.join(names)} in {home}. Copies, backups and references kept elsewhere are not reached.")
    if left:
        say(f"Left, for it is not of this life: {', '.join(left)}.")


@app.command()
@plain
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
    taxonomy: Annotated[
        str | None,
        typer.Option(
            metavar="SURVEY",
            help="Group learners, keepers and wheres as a survey does: wang, parisi or llm.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods and other parts there are."""
    found = catalogue.parts(verb, kind, family, without)
    if as_json:
        typer.echo(json.dumps([line_of(part) for part in found], indent=1, ensure_ascii=False))
        return
    if taxonomy is not None:
        list_by(taxonomy, found)
        return
    table = make_table("verb", "slug", "kind", "family", "needs", "checked against")
    for part in found:
        table.add_row(
            *cells(part.verb, part.slug, part.kind, part.family, ", ".join(part.needs), catalogue.fidelity(part))
        )
    say(table)


@app.command()
@plain
def show(
    slug: Annotated[str, typer.Argument(help="Such as ssd, or verb/slug.", show_default=False)],
) -> None:
    """Explain a part: its formula, its knobs, what it needs, its paper, what it was checked against."""
    for part in catalogue.named(slug):
        explain(part)


streams = typer.Typer(no_args_is_help=True)
app.add_typer(streams, name="stream", help="Look at the streams that plans can name.")


@streams.command("show", epilog=CODES)
@plain
def stream_show(
    name: Annotated[str, typer.Argument(help="Such as si-blurry.", show_default=False)],
    knobs: Annotated[
        str,
        typer.Argument(
            help="Its knobs as in a plan, such as '{source: digits, tasks: 4}'; without a source, digits.",
            show_default=False,
        ),
    ] = "{}",
    tasks: Annotated[int | None, typer.Option(min=1, help="Short for the knob.", show_default=False)] = None,
    save: Annotated[
        Path | None, typer.Option(help="Where to draw it instead of printing it; FILE.svg.", show_default=False)
    ] = None,
) -> None:
    """Show which classes come when."""
    from remanence.life.yaml import parse

    given = parse(knobs, "KNOBS").data
    if not isinstance(given, dict | None):
        raise BadInput(f"the knobs of stream {name} are {{knob: value}}, not {knobs[:40]!r}")
    if save is not None and save.suffix != ".svg":
        raise BadInput(f"--save {save}: pictures are SVG; name a file that ends in .svg")

    from remanence.data.streams import STREAMS, stream_of
    from remanence.taxonomy import SCENARIOS, scenarios

    given = {**(given or {}), **({} if tasks is None else {"tasks": tasks})}
    if name in STREAMS and "source" in inspect.signature(STREAMS[name]).parameters:
        given.setdefault("source", "digits")
    found = stream_of({name: given})
    if save is None:
        typer.echo(found.table())
        letters = scenarios(found.scenario, found.borders, [set(task.classes) for task in found])
        for each in letters:
            typer.echo(f"{each}: {SCENARIOS[each]}")
        return
    try:
        save.write_text(found.picture(), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--save {save}: {error.strerror}") from None
    typer.echo(f"Picture: {save}")
