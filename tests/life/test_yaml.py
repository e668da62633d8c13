"""The YAML reader: YAML 1.2's meaning of scalars, places, and everything it must refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.core.errors import PlanError
from remanence.life import yaml as reader
from remanence.life.yaml import MAX_BYTES, Document, parse, read


@pytest.fixture(params=["C", "Python"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of PyYAML's parsers must behave alike."""
    if request.param == "C" and not hasattr(yaml, "CSafeLoader"):
        pytest.skip("PyYAML was built without the C parser")
    monkeypatch.setattr(reader, "_LOADER", yaml.CSafeLoader if request.param == "C" else yaml.SafeLoader)
    return str(request.param)


def refused(text: str, line: int, words: str) -> None:
    with pytest.raises(PlanError) as error:
        parse(text, "plan.yaml")
    assert str(error.value).startswith(f"plan.yaml:{line}: "), str(error.value)
    assert re.search(words, str(error.value)), str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("true", True), ("FALSE", False), ("tRue", "tRue"),
        ("012", 12), ("0o12", 10), ("0x1F", 31), ("-7", -7), ("+7", 7), ("1:30", "1:30"), ("1_000", "1_000"), ("1e-3", 0.001),
        ("1.", 1.0), (".5", 0.5), ("-1.5E+3", -1500.0), ("2024-01-01", "2024-01-01"), ("~", None), ("null", None), ("nULL", "nULL"),
        ("'12'", "12"), ('"true"', "true"), ("10-20", "10-20"), ("!!str 12", "12"), ("!!float 3", 3.0), ("!!int '3'", 3), ("=", "="),
        ("inf", "inf"), ("nan", "nan"), ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63)),
    ],
)  # fmt: skip
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    found = parse(f"a: {text}").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_places_of_values_and_keys() -> None:
    document = parse("a: 1\nevents:\n  - learn: 0\n  - forget:\n      by: {ssd: {selection: 3}}\n      none:\n", "p")
    assert document.places[()] == (1, 1)
    assert document.places[("events", 0, "learn")] == (3, 12)
    assert document.places[("events", 1, "forget")] == (5, 7)
    assert document.keys[("events", 1, "forget")] == (4, 5)
    assert document.places[("events", 1, "forget", "by", "ssd", "selection")] == (5, 29)
    assert document.at(("events", 1, "forget", "by", "ssd", "absent", 3)) == (5, 17)
    assert document.at(("absent",)) == (1, 1)
    assert str(document.error(("events", 0), "bad")) == "p:3: bad"
    assert document.data["events"][1]["forget"]["none"] is None


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "empty"),
        ("# only a comment\n", 1, "empty"),
        ("a: 1\nb: 2\na: 3\n", 3, "before, in line 1"),
        ("x:\n  {k: 1, 'k': 2}\n", 2, "before, in line 2"),
        ("a: &x [1]\nb: *x\n", 1, "anchor &x"),
        ("a: 1\nb: *x\n", 2, r"alias \*x"),
        ("a: 1\n*x : 2\n", 2, "alias"),
        ("a: !!python/object:os.system {}\n", 1, "tag .*python"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "tag .*python"),
        ("a: !!python/name:os.system\n", 1, "tag .*python"),
        ("a: !mine 3\n", 1, "tag"),
        ("a: ! 3\n", 1, "tag"),
        ("a: !!set {b}\n", 1, "tag"),
        ("a: !!binary aGk=\n", 1, "tag"),
        ("a: !!timestamp 2024-01-01\n", 1, "tag"),
        ("a: !!int x\n", 1, "not of the kind"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: 1\n...\n---\n", 3, "second document"),
        ("a: .nan\n", 1, "finite"),
        ("a:\n  - -.INF\n", 2, "finite"),
        ("a: 1e999\n", 1, "finite"),
        ("a: 9223372036854775808\n", 1, "64 bits"),
        ("a: 0x" + "f" * 1000 + "\n", 1, "64 bits"),
        ("a: " + "9" * 100_000 + "\n", 1, "64 bits"),
        ("1: a\n", 1, "not a name"),
        ("true: a\n", 1, "not a name"),
        ("? [a, b]\n: c\n", 1, "not a name"),
        ("? {a: b}\n: c\n", 1, "not a name"),
        ("a: [1,\n b\n", 2, "check"),
        ("a: 'open\n", 1, "check"),
        ("a:\n\t- 1\n", 2, "tabs"),
        ("a: 1\n b: 2\n", 2, "check"),
        ("a: \x00\n", 1, "control character"),
        ("a: 1\nb: \x07\n", 2, "control character"),
        ("a: \ud800\n", 1, "UTF-8"),
        ("%YAML 3.0\n---\na: 1\n", 1, "check"),
    ],
)
def test_refused_with_its_line(text: str, line: int, words: str) -> None:
    refused(text, line, words)


def test_alias_bomb() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    refused(bomb, 1, "anchor")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "\n".join(" " * i + "a:" for i in range(200)), "? " * 5000],
)
def test_deep_nesting(text: str) -> None:
    with pytest.raises(PlanError, match=r"plan\.yaml:\d+: (more than 50 levels|this is not a name|.*check)"):
        parse(text, "plan.yaml")


def test_fifty_levels_are_enough() -> None:
    assert parse("[" * 50 + "1" + "]" * 50).data
    refused("[" * 51 + "1" + "]" * 51, 1, "50 levels")


def test_large_files_are_refused_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"a: 1\n" + b"# long\n" * (MAX_BYTES // 7 + 1))
    monkeypatch.setattr(reader, "_Composer", None)
    with pytest.raises(PlanError, match=r"plan\.yaml:1: the file is larger than 1 MiB"):
        read(path)
    with pytest.raises(PlanError, match="larger"):
        parse("é" * (MAX_BYTES // 2 + 1))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    with pytest.raises(PlanError, match=r"plan\.yaml:1: there is no such file"):
        read(path)
    (tmp_path / "plans.yaml").write_text("a: 1")
    with pytest.raises(PlanError, match=r"did you mean 'plans\.yaml'"):
        read(path)
    with pytest.raises(PlanError, match=":1: this is a folder"):
        read(tmp_path)
    path.write_bytes(b"a: 1\nb: \xff\xfe\x00\n")
    with pytest.raises(PlanError, match=r"plan\.yaml:2: this is not UTF-8"):
        read(path)
    path.write_bytes(bytes(range(256)))
    with pytest.raises(PlanError, match=r"plan\.yaml:\d+: "):
        read(path)
    with pytest.raises(PlanError, match=":1: "):
        read("a\0b")
    with pytest.raises(PlanError, match=":1: "):
        read(path / "below-a-file")
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\r\nb: 2\r\n")
    document = read(path)
    assert document.data == {"a": "é", "b": 2}
    assert document.places[("b",)] == (2, 4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=st.sampled_from(list("ab:- \n\t{}[],&*!?|>'\"#%@`0.\x00é")), max_size=40))
def test_any_text_is_data_or_a_plan_error(text: str) -> None:
    for loader in (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        reader._LOADER, before = loader, reader._LOADER
        try:
            assert isinstance(parse(text, "plan.yaml"), Document)
        except PlanError as error:
            assert re.match(r"plan\.yaml:\d+: ", str(error))
        finally:
            reader._LOADER = before
