"""The command: what each says, its exit codes, and what it imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

import remanence
from remanence import catalogue, cli
from remanence.cli import lives

PLAN = """\
name: small
stream: {split-digits: {tasks: 5}}
model: {mlp: {hidden: [32]}}
keep: [{replay: {per_class: 5}}]
train: {epochs: 1, batch_size: 64}
events:
  - learn: 0
  - learn: 1
  - forget: {ids: [0, 1, 11, 30], by: retrain, verify: none}
"""
HEAVY = ("torch", "numpy", "scipy", "sklearn", "sqlalchemy", "matplotlib", "jinja2", "yaml", "remanence.life.life")
COMMANDS = [
    "run",
    "resume",
    "compare",
    "trace",
    "verify",
    "report",
    "forget",
    "hardest",
    "audit",
    "redact",
    "delete",
    "methods",
    "show",
]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def call(*words: Any, said: str | None = None) -> Answer:
    result = CliRunner().invoke(cli.app, [str(word) for word in words], input=said)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


def run_python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, **options)


@pytest.fixture(autouse=True, scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests' signing keys lie apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMANENCE_CONFIG", str(tmp_path_factory.mktemp("keys")))
        yield


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """A home with a whole life in it (do not change it), and what running it said."""
    folder = tmp_path_factory.mktemp("lived")
    (folder / "small.yaml").write_text(PLAN)
    answer = call("run", folder / "small.yaml", "--home", folder / "home")
    assert answer.code == 0, answer
    return folder / "home", answer


@pytest.fixture
def home(lived: tuple[Path, Answer], tmp_path: Path) -> Path:
    """A copy of that home, to be changed."""
    return Path(shutil.copytree(lived[0], tmp_path / "home"))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(PLAN)
    return path


# -- lists and help ------------------------------------------------------------------------------------------------------


def test_help_and_lists_import_nothing_heavy() -> None:
    lines = [["--help"], ["--version"], ["methods"], ["methods", "--json"], *[[name, "--help"] for name in COMMANDS]]
    code = (
        "import sys; from remanence.cli import main; assert 'pydantic' not in sys.modules\n"
        f"for words in {lines!r}:\n"
        f"    print(main(words), [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = run_python("-c", code)
    assert done.stderr.splitlines() == ["0 []"] * len(lines), done.stderr
    assert done.stdout.count("Usage: remanence") == 1 + len(COMMANDS)


def test_help_names_every_command_and_the_exit_codes() -> None:
    answer = call("--help")
    assert answer.code == 0
    assert all(name in answer.out for name in COMMANDS)
    assert "Exit codes" in answer.out and "130" in answer.out
    assert "altered" in call("verify", "--help").out
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == set(COMMANDS)


def test_version() -> None:
    assert call("--version") == (0, f"remanence {remanence.__version__}\n", "")


def test_python_m_is_the_command(tmp_path: Path) -> None:
    done = run_python("-m", "remanence", "run", "nowhere.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr and "nowhere.yaml" in done.stderr


def test_methods_as_json_is_the_catalogue() -> None:
    found = json.loads(call("methods", "--json").out)
    assert [(line["verb"], line["slug"]) for line in found] == [(part.verb, part.slug) for part in catalogue.every()]
    for line, part in zip(found, catalogue.every(), strict=True):
        told = {"slug", "verb", "kind", "family", "cards", "paper", "needs", "module", "fidelity", "taxonomy"}
        assert set(line) == told
        assert (line["needs"], line["module"], line["paper"]) == (list(part.needs), part.module, part.paper)


def test_methods_filters() -> None:
    found = json.loads(call("methods", "--verb", "forget", "--without", "retain-data,old-data", "--json").out)
    assert [line["slug"] for line in found] == ["gradient-ascent", "boundary", "acu", "s3t"]
    table = call("methods", "--kind", "metric").out
    assert "accuracy" in table and "ewc" not in table
    kinds = [f" {part.kind} " for part in catalogue.every()]
    listed = [line for line in call("methods").out.splitlines() if any(kind in line for kind in set(kinds))]
    assert len(listed) == len(kinds)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--verb", "forgit"], "'forget'"),
        (["--family", "reply"], "'replay'"),
        (["--without", "label"], "'labels'"),
    ],
)
def test_methods_knows_what_was_meant(words: list[str], hint: str) -> None:
    answer = call("methods", *words)
    assert (answer.code, answer.out) == (2, "")
    assert hint in answer.err and answer.err.count("\n") == 1


def test_show_explains_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    answer = call("show", "ssd")
    assert answer.code == 0
    for words in (
        "theta_j <- min(",
        "selection",
        "10.0",
        "batch | example | label-free",
        "0 .. inf",
        "2308.07707",
        "old-data",
    ):
        assert words in answer.out, words
    assert "by: {ssd: {selection: 10.0}}" in answer.out and "rm.forget.SSD()" in answer.out
    assert call("show", "keep/ewc").out == call("show", "EWC").out


def test_show_of_a_strange_name_names_the_nearest() -> None:
    answer = call("show", "sdd")
    assert (answer.code, answer.out) == (2, "")
    assert "'ssd'" in answer.err and "remanence methods" in answer.err


# -- lives ---------------------------------------------------------------------------------------------------------------


def test_run_says_what_happened(lived: tuple[Path, Answer]) -> None:
    home, answer = lived
    lines = answer.out.splitlines()
    assert [line[:3] for line in lines[1:4]] == ["1/3", "2/3", "3/3"]
    assert "learn task 0 · accuracy" in lines[1]
    assert "forget 4 given examples by retrain: done · weights deleted" in lines[3]
    data = json.loads((home / "report.json").read_text())
    assert data["state"] == "complete"
    assert f"{100 * data['summary']['average_accuracy']['value']:.1f} %" in answer.out
    assert "not covered: your source files" in answer.out
    assert any("deleted" in line and "snapshots/1" in line and "the file was erased" in line for line in lines)
    assert lines[-1] == f"Report: {home.resolve() / 'report.html'}" and (home / "report.html").is_file()
    assert answer.err == ""  # no bar where there is no terminal


def test_running_a_finished_plan_again_changes_nothing(home: Path, plan: Path) -> None:
    before = json.loads((home / "report.json").read_text())
    answer = call("run", plan, "--home", home, "--quiet")
    assert (answer.code, answer.out) == (0, f"Report: {home / 'report.html'}\n")
    assert json.loads((home / "report.json").read_text()) == before


def test_another_plan_does_not_touch_a_home(home: Path, plan: Path) -> None:
    plan.write_text(PLAN.replace("[32]", "[16]"))
    answer = call("run", plan, "--home", home)
    assert answer.code == 2 and "holds another life" in answer.err and "remanence delete" in answer.err


def test_an_interrupted_life_says_how_to_go_on_and_ends_the_same(
    lived: tuple[Path, Answer], plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remanence.life.life import Life

    learn = Life.learn

    def stopped(self: Life, *args: Any, **kwargs: Any) -> Any:
        if self.events:
            raise KeyboardInterrupt
        return learn(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Life, "learn", stopped)
        answer = call("run", plan, "--home", tmp_path / "home")
    assert answer.code == 130
    assert f"remanence resume {tmp_path / 'home'}" in answer.err and "Traceback" not in answer.err
    answer = call("resume", tmp_path / "home")
    assert answer.code == 0 and answer.out.splitlines()[1].startswith("2/3")
    mine, whole = (json.loads((h / "report.json").read_text()) for h in (tmp_path / "home", lived[0]))
    for key in ("weights_sha256", "content_digest", "matrix", "state"):
        assert mine[key] == whole[key], key


def test_a_failed_event_is_1_and_what_was_done_stays(tmp_path: Path) -> None:
    path, home = tmp_path / "bad.yaml", tmp_path / "home"
    path.write_text(PLAN.replace("  - learn: 1\n", "  - learn: {task: 1, optimizer: sgd, lr: 1.0e+30}\n"))
    answer = call("run", path, "--home", home)
    assert answer.code == 1 and "learn task 1 failed and the life is as it was before" in answer.err
    assert f"remanence resume {home}" in answer.err
    assert "1/3 ✓ learn task 0" in answer.out
    assert call("trace", home, "--ids", "0").code == 0


def test_a_repeated_request_of_a_plan_is_answered_once(tmp_path: Path) -> None:
    path, home = tmp_path / "twice.yaml", tmp_path / "home"
    again = PLAN.splitlines(keepends=True)[-1]
    path.write_text(PLAN + again + "  - learn: 2\n")
    answer = call("run", path, "--home", home)
    assert answer.code == 0 and answer.out.count("asked before") == 1 and "forget twice" not in answer.out
    report = (home / "report.json").read_text()
    data = json.loads(report)
    assert [event["kind"] for event in data["events"]] == ["learn", "learn", "forget", "learn"]
    assert data["state"] == "complete" and len(data["receipts"]) == 1
    assert call("resume", home, "--quiet").code == 0  # nothing is lived twice
    assert (home / "report.json").read_text() == report


def test_code_in_a_plan_runs_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\nfrom remanence.models import mlp\n"
        "def small(inputs, seed=0):\n    return mlp(inputs, (8,), seed=seed)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path, home = tmp_path / "own.yaml", tmp_path / "home"
    path.write_text(PLAN.replace("{mlp: {hidden: [32]}}", "own_nets:small"))
    refused = call("run", path, "--home", home)
    assert refused.code == 2 and "--allow-code" in refused.err and not home.exists()
    assert call("run", path, "--home", home, "--allow-code", "-q").code == 0
    assert call("run", path, "--home", home, "--allow-code", "-q").code == 0
    answer = call("resume", home)
    assert answer.code == 2 and f"remanence run PLAN --home {home} --allow-code" in answer.err


def test_trace_says_where_examples_live(lived: tuple[Path, Answer]) -> None:
    home = lived[0]
    answer = call("trace", home, "--ids", "0,1,36,100000-100002")
    assert answer.code == 0
    assert "No holder of this life has had 100000-100002." in answer.out
    rows = json.loads(call("trace", home, "--ids", "0,1,36", "--json").out)
    weights = {tuple(row["ids"]): row["state"] for row in rows if row["holder"] == "weights"}
    assert weights == {(0, 1): "deleted", (36,): "holds"}
    assert {tuple(row) for row in rows} == {("holder", "state", "ids", "inputs", "reason")}
    assert [row["state"] for row in rows] == sorted((row["state"] for row in rows), key=["holds", "deleted"].index)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ("1,x", "'x' is no id"),
        ("", "is no id"),
        ("20-10", "runs backwards"),
        ("0-99999999999", "ask for less"),
        ("1.5", "no id"),
    ],
)
def test_ids_that_are_no_ids(lived: tuple[Path, Answer], ids: str, said: str) -> None:
    answer = call("trace", lived[0], "--ids", ids)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err and answer.err.count("\n") == 1


def test_looking_changes_nothing_and_does_not_mind_other_threads(home: Path) -> None:
    from remanence.life.ledger import Ledger

    def rows() -> int:
        with Ledger(home / "ledger.db", create=False, read_only=True) as ledger:
            return len(ledger)

    before, threads = rows(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert call("trace", home, "--ids", "0").code == 0
        assert call("report", home, "--quiet").code == 0
        assert rows() == before
        refused = call("resume", home)
        assert refused.code == 2 and "threads was" in refused.err and "--allow-drift" in refused.err
        assert rows() == before
        allowed = call("resume", home, "--allow-drift")
        assert allowed.code == 0 and "Not exact" in allowed.out
    finally:
        torch.set_num_threads(threads)


def test_report_is_written_anew(home: Path) -> None:
    page, data = (home / "report.html").read_bytes(), (home / "report.json").read_bytes()
    (home / "report.html").unlink()
    (home / "report.json").unlink()
    answer = call("report", home)
    assert answer.code == 0 and "Average accuracy" in answer.out
    assert ((home / "report.html").read_bytes(), (home / "report.json").read_bytes()) == (page, data)


def test_forget_asks_a_finished_life(home: Path) -> None:
    answer = call("forget", home, "--classes", "1", "--by", "{ssd: {selection: 5}}", "--verify", "1")
    assert answer.code == 0 and "4/4" in answer.out and "forget class 1 by ssd" in answer.out
    receipt = json.loads((home / "receipts" / "0002.json").read_text())["receipt"]
    assert receipt["method"]["ssd"]["selection"] == 5 and receipt["references"] == 1
    assert call("verify", home / "receipts" / "0002.json").code == 0
    again = call("forget", home, "--ids", "0,1", "--by", "retrain", "--verify", "0")
    assert again.code == 0 and "the earlier receipt stands" in again.out


def test_a_range_of_targets_is_forgotten_from_a_regression(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{i % 7},{i % 5},{0.5 * i}" for i in range(80)]
    Path("people.csv").write_text("\n".join(["a,b,age", *rows]))
    Path("people.yaml").write_text(
        "model: {mlp: {hidden: [8], outputs: 1}}\nproblem: regression\n"
        "stream: {permuted: {source: {csv: {path: people.csv, label: age}}, tasks: 1}}\nevents: [{learn: 0}]\n"
    )
    assert call("run", "people.yaml", "--home", "ages").code == 0
    answer = call("forget", "ages", "--targets", "0", "10.5", "--by", "gaussian-amnesiac", "--verify", "0")
    assert answer.code == 0 and "forget targets from 0 to 10.5 by gaussian-amnesiac" in answer.out, answer
    receipt = json.loads(Path("ages/receipts/0001.json").read_text())["receipt"]
    assert 10 < receipt["n"] <= 22  # a quarter is held out
    assert "the smaller first" in call("forget", "ages", "--targets", "3", "1", "--by", "retrain").err
    assert "this life has classes" in call("forget", home, "--targets", "0", "1", "--by", "retrain").err


def test_forget_refuses_with_reason(home: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "say what to forget" in call("forget", home, "--by", "ssd").err
    unknown = call("forget", home, "--classes", "1", "--by", "sdd")
    assert unknown.code == 2 and "'ssd'" in unknown.err
    everything = call("forget", home, "--classes", "0,1,2,3", "--by", "retrain")
    assert everything.code == 1 and "remanence delete" in everything.err
    (home / "plan.yaml").write_text(PLAN + "  - learn: 2\n")
    early = call("forget", home, "--classes", "1", "--by", "ssd")
    assert early.code == 2 and "1 events of the plan" in early.err


def test_redact_removes_who_was_forgotten(home: Path) -> None:
    assert call("redact", home, said="n\n").code == 1
    answer = call("redact", home, "--yes")
    assert (answer.code, answer.out) == (0, "request 1 redacted\n")
    assert call("verify", home / "receipts" / "0001.json").code == 0
    assert call("trace", home, "--ids", "36").code == 0  # what is not personal stays readable
    assert "request 1 (redacted)" in call("report", home).out


# -- receipts ------------------------------------------------------------------------------------------------------------


def test_verify_says_what_was_checked(lived: tuple[Path, Answer], tmp_path: Path) -> None:
    receipt = lived[0] / "receipts" / "0001.json"
    answer = call("verify", receipt)
    assert answer.code == 0 and "consistent" in answer.out
    assert "checked: signature, ledger, files, signer" in answer.out and "present: snapshots/" in answer.out
    kept = shutil.copy(receipt, tmp_path / "kept.json")
    alone = call("verify", kept)
    assert alone.code == 0 and "not checked: its place in the ledger" in alone.out
    assert call("verify", kept, "--home", lived[0]).out.splitlines()[1:] == answer.out.splitlines()[1:]


def test_verify_of_a_tampered_receipt_is_1(home: Path) -> None:
    path = home / "receipts" / "0001.json"
    text = path.read_text()
    assert '"n":4' in text
    path.write_text(text.replace('"n":4', '"n":5'))
    answer = call("verify", path)
    assert answer.code == 1 and "altered" in answer.out and "signature does not fit" in answer.out
    assert "not checked" not in answer.out


def test_verify_of_an_altered_file_is_1_and_names_it(home: Path) -> None:
    receipt = json.loads((home / "receipts" / "0001.json").read_text())["receipt"]
    name = receipt["files"][0]["path"]
    (home / name).write_bytes(b"something else")
    answer = call("verify", home / "receipts" / "0001.json")
    assert answer.code == 1 and f"altered: {name}" in answer.out
    (home / name).unlink()
    answer = call("verify", home / "receipts" / "0001.json")
    assert answer.code == 1 and f"missing: {name}" in answer.out


def test_verify_of_an_unknown_signer_is_2(
    lived: tuple[Path, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = lived[0] / "receipts" / "0001.json"
    signer = json.loads(receipt.read_text())["key"]
    monkeypatch.setenv("REMANENCE_CONFIG", str(tmp_path / "nothing"))
    answer = call("verify", receipt)
    assert answer.code == 2 and "unknown signer" in answer.out and signer in answer.out
    assert call("verify", receipt, "--key", signer).code == 0
    assert call("verify", receipt, "--key", "0" * 64).code == 2
    wrong = call("verify", receipt, "--key", "mine")
    assert wrong.code == 2 and "64 hex digits" in wrong.err
    missing = call("verify", tmp_path / "no.json")
    assert missing.code == 2 and "does not exist" in missing.err


# -- what cannot be used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["resume"], ["trace", "--ids", "1"], ["report"], ["redact", "--yes"], ["delete", "--yes"]]
)
def test_a_folder_that_is_no_home(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    answer = call(command[0], tmp_path, *command[1:])
    assert answer.code == 2 and "no ledger.db" in answer.err and answer.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    answer = call("run", tmp_path / "plam.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert "plam.yaml" in answer.err


def test_a_broken_plan_names_every_line_and_nothing_is_written(plan: Path, tmp_path: Path) -> None:
    plan.write_text(PLAN.replace("replay", "reply").replace("epochs", "epoch"))
    answer = call("run", plan, "--home", tmp_path / "home")
    assert answer.code == 2 and not (tmp_path / "home").exists()
    lines = answer.err.splitlines()
    assert all("small.yaml:" in line for line in lines)
    assert any(":5:" in line and "epochs" in line for line in lines)


def test_a_locked_life(home: Path) -> None:
    from remanence.life.lock import Lock

    with Lock(home):
        for words in (["resume", home], ["trace", home, "--ids", "1"], ["delete", home, "--yes"]):
            answer = call(*words)
            assert answer.code == 2 and "already open" in answer.err, words
    assert (home / "ledger.db").exists()


def test_a_life_without_a_plan(home: Path) -> None:
    (home / "plan.yaml").unlink()
    answer = call("resume", home)
    assert answer.code == 2 and "not run from a plan" in answer.err and "Life.resume" in answer.err


def test_delete_asks_first(home: Path) -> None:
    refused = call("delete", home, said="n\n")
    assert refused.code == 1 and "ledger" in refused.out and (home / "ledger.db").exists()
    assert call("delete", home).code == 1  # nobody answers
    answer = call("delete", home, said="y\n")
    assert answer.code == 0 and not home.exists()


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ZeroDivisionError(name)

    monkeypatch.setattr(catalogue, "named", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["show", "ssd"])


def test_main_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "nothing-like-it"]) == 2
    assert cli.main(["shwo"]) == 2  # not a command
    assert cli.main(["--version"]) == 0
    assert f"remanence {remanence.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["methods", "methods --json", "--help"])
def test_a_closed_pipe_is_no_traceback(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "remanence", *words.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_bar_is_drawn_on_a_terminal_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO
    from types import SimpleNamespace

    from rich.console import Console

    screen = StringIO()
    monkeypatch.setattr(lives, "console", lambda stderr=False: Console(file=screen, force_terminal=True, width=100))
    bar = lives.Bar(quiet=False)
    bar.begin("forget class 3 by ssd")
    u: Any = SimpleNamespace(kind="learn", task=SimpleNamespace(id=7), total=30, step=12)
    bar(u, 0.25)
    bar._bar.refresh()
    assert "forget class 3 by ssd: retraining task 7" in screen.getvalue() and "12/30" in screen.getvalue()
    bar.clear()
    bar(u, 0.1)  # after the event: nothing is drawn
    assert screen.getvalue().endswith("\x1b[2K")
    quiet = lives.Bar(quiet=True)
    quiet.begin("learn task 0")
    assert quiet._bar is None


# -- comparing -----------------------------------------------------------------------------------------------------------


def test_compare_lives_variants_in_processes_of_their_own(tmp_path: Path, plan: Path) -> None:
    answer = call(
        "compare",
        plan,
        "--forget",
        "ssd, catastrophic",
        "--seeds",
        "1",
        "--references",
        "2",
        "--jobs",
        "2",
        "--home",
        tmp_path / "grid",
    )
    assert answer.code == 0, answer.err
    assert "do nothing" in answer.out and "catastrophic" in answer.out and "comparison.html" in answer.out
    assert {path.name for path in (tmp_path / "grid").glob("comparison.*")} == {
        f"comparison.{kind}" for kind in ("json", "csv", "md", "html")
    }
    again = call(
        "compare",
        plan,
        "--forget",
        "ssd, catastrophic",
        "--seeds",
        "1",
        "--references",
        "2",
        "--home",
        tmp_path / "grid",
        "--quiet",
    )
    assert again.code == 0 and "do nothing" not in again.out
    wrong = call("compare", plan, "--forget", "sdd", "--home", tmp_path / "other")
    assert (
        (wrong.code, wrong.out) == (2, "") and "did you mean 'ssd'" in wrong.err and not (tmp_path / "other").exists()
    )
