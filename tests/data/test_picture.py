"""A stream as text and as a picture: every count is there, and nothing else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from remanence import cli
from remanence.data import Examples, Stream, Task, permuted, recurring, si_blurry, split_classes, split_digits
from remanence.data.streams import stream_of
from remanence.taxonomy import SCENARIOS

SVG = "{http://www.w3.org/2000/svg}"


def small(n: int = 60, classes: int = 3) -> Examples:
    return Examples({"x": torch.zeros(n, 1), "y": torch.arange(n) % classes}, "small")


def cells(stream: Stream) -> dict[tuple[str, str], tuple[int, float]]:
    """(task, class): the number that a cell says, and its shade."""
    root = ElementTree.fromstring(stream.picture())
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        said = re.fullmatch(r"task (\d+), (?:class )?(\S+): (\d+)", rect.find(f"{SVG}title").text)  # type: ignore[union-attr,arg-type]
        assert said is not None
        found[said[1], said[2]] = int(said[3]), float(rect.attrib["fill-opacity"])
    return found


def test_table_of_a_small_stream() -> None:
    one, two = small().select(torch.arange(30)), small().select(torch.arange(20, 50))
    two = two.select((two["y"] != 1).nonzero()[:, 0])
    stream = Stream((Task(one, two, (0, 1, 2), ("0", "1", "2"), 0), Task(two, one, (0, 2), ("0", "2"), 1)))
    lines = [line.split() for line in stream.table().splitlines()]
    assert lines[0] == ["task", "rows", "again", "test", "0", "1", "2"]
    assert lines[1] == ["0", "30", "0", "20", "10", "10", "10"]
    assert lines[2] == ["1", "20", "7", "30", "10", ".", "10"]  # rows 20 to 29 came before, but for those of class 1
    assert len({len(line) for line in stream.table().splitlines()}) == 1


@pytest.mark.parametrize("make", [split_digits, lambda: si_blurry(small(900, 9), 4, 0.3, 0.5),
                                  lambda: recurring(small(900, 30), 150, 4)])  # fmt: skip
def test_picture_has_a_cell_for_every_class_of_every_task(make: Callable[[], Stream]) -> None:
    stream = make()
    found = cells(stream)
    expected = {(str(t.id), str(c)): int((t.train["y"] == c).sum()) for t in stream for c in t.classes}
    assert {key: n for key, (n, _) in found.items()} == expected
    by_number = sorted(found.values())
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(by_number)) and by_number[-1][1] == 1.0


def test_many_classes_are_shades_and_none_are_rows() -> None:
    lines = recurring(small(900, 30), 60, 4).table().splitlines()
    assert lines[0].split() == ["task", "rows", "again", "test", "classes"] and len(lines) == 61
    for line in lines[1:]:
        shown = line.split()[-1]
        assert len(shown) == 30 and shown.count("█") == 4 and shown.count("·") == 26
    values = permuted(Examples({"x": torch.randn(40, 3), "y": torch.randn(40)}, "regression"), 2)
    assert values.table().splitlines()[1].split() == ["0", "30", "0", "10"]
    assert {key: n for key, (n, _) in cells(values).items()} == {("0", "rows"): 30, ("1", "rows"): 30}


def test_names_are_escaped_and_the_same_stream_gives_the_same_picture() -> None:
    stream = Stream(split_classes(small(), 3).tasks, name="<a & b>")
    assert ElementTree.fromstring(stream.picture()).find(f"{SVG}title").text == "<a & b>: 3 tasks, 3 classes"  # type: ignore[union-attr]
    assert stream.picture() == Stream(split_classes(small(), 3).tasks, name="<a & b>").picture()
    assert ElementTree.fromstring(Stream(()).picture()).tag == f"{SVG}svg" and len(Stream(()).table().splitlines()) == 1


def test_command(tmp_path: Path) -> None:
    def call(*words: object):
        return CliRunner().invoke(cli.app, ["stream", "show", *map(str, words)])

    knobs = "{source: digits, tasks: 4, seed: 1}"
    stream = stream_of({"si-blurry": {"source": "digits", "tasks": 4, "seed": 1}})
    shown = call("si-blurry", knobs)
    letters = "".join(f"{each}: {SCENARIOS[each]}\n" for each in ("BBCL", "TFCL"))  # blurred, and no borders told
    assert shown.exit_code == 0 and shown.stdout == stream.table() + "\n" + letters
    assert call("si-blurry", "{seed: 1}", "--tasks", 4).stdout == shown.stdout
    saved = call("si-blurry", knobs, "--save", tmp_path / "a.svg")
    assert saved.exit_code == 0 and (tmp_path / "a.svg").read_text() == stream.picture()
    assert call("split-digits").stdout == split_digits().table() + f"\nCIL: {SCENARIOS['CIL']}\n"
    for words, said in ((("split-digit",), "did you mean 'split-digits'"), (("long-tail",), "needs stream"),
                        (("split-digits", "{tasks: a}"), "wrong type"),
                        (("split-digits", "[3]"), "{knob: value}"), (("split-digits", "{tasks: 3}"), "cannot be cut"),
                        (("split-digits", "--save", tmp_path / "a.png"), "SVG"),
                        (("split-digits", "--save", tmp_path / "no" / "a.svg"), "No such file")):  # fmt: skip
        answer = call(*words)
        assert answer.exit_code == 2 and said in answer.stderr, (words, answer.stderr)
