"""The catalogue in the words of two surveys, and the names of scenarios."""

from __future__ import annotations

import json

import pytest

from remanence import catalogue, taxonomy
from remanence.cli import main


@pytest.mark.parametrize("part", [p for verb in taxonomy.VERBS for p in catalogue.parts(verb)], ids=lambda p: p.slug)
def test_every_family_of_learning_has_its_place(part):
    place = taxonomy.of(part)
    assert place["wang"] in taxonomy.WANG and place["parisi"] in taxonomy.PARISI
    assert ("wang_kind" in place) == (place["wang"] != taxonomy.OUTSIDE)


def test_what_the_surveys_name_stands_where_they_name_it():
    """The examples of the surveys themselves."""
    wang = {part.slug: taxonomy.of(part) for verb in taxonomy.VERBS for part in catalogue.parts(verb)}
    for slug in ("ewc", "si", "mas", "l2"):
        assert (wang[slug]["wang"], wang[slug]["wang_kind"]) == ("regularization", "weight")
    assert (wang["lwf"]["wang"], wang["lwf"]["wang_kind"]) == ("regularization", "function")
    assert wang["replay"]["wang"] == wang["der"]["wang"] == "replay"
    assert (wang["gpm"]["wang"], wang["gpm"]["wang_kind"]) == ("optimization", "gradient projection")
    assert wang["lora"]["wang"] == "representation"
    assert {wang[slug]["parisi"] for slug in ("lwf", "ewc", "si")} == {"regularization"}
    assert wang["replay"]["parisi"] == "complementary learning systems and replay"


def test_what_the_surveys_do_not_speak_of_has_no_place():
    assert {len(taxonomy.of(part)) for verb in ("forget", "measure") for part in catalogue.parts(verb)} == {0}


@pytest.mark.parametrize("survey", taxonomy.NAMES)
def test_the_list_is_grouped(survey, capsys):
    assert main(["methods", "--taxonomy", survey]) == 0
    rows = capsys.readouterr().out
    at = [rows.index(f" {slug} ") for slug in ("ewc", "replay")]
    assert at == sorted(at) or survey == "parisi"
    assert "ssd" not in rows and "lora" in rows


def test_it_is_in_the_json_and_asked_for_by_its_name(capsys):
    assert main(["methods", "--verb", "keep", "--json"]) == 0
    lines = {line["slug"]: line["taxonomy"] for line in json.loads(capsys.readouterr().out)}
    assert lines["gpm"] == {"wang": "optimization", "wang_kind": "gradient projection", "parisi": "regularization"}
    assert main(["methods", "--taxonomy", "wong"]) == 2
    assert "'wang'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "scenario, borders, classes, found",
    [
        ("class", True, [{0, 1}, {2, 3}], ["CIL"]),
        ("class", False, [{0, 1}, {2, 3}], ["CIL", "TFCL"]),
        ("class", True, [{0, 1}, {1, 2}], ["BBCL"]),
        ("class", False, [{0, 1}, {1, 2}], ["BBCL", "TFCL"]),
        ("task", True, [{0, 1}, {0, 1}], ["TIL"]),
        ("domain", True, [{0, 1}, {0, 1}], ["DIL"]),
        ("class", True, [{0, 1}, {0, 1}], ["IIL"]),
        ("none", False, [set()], ["TFCL"]),
        ("none", True, [set(), set()], []),
    ],
)
def test_scenarios(scenario, borders, classes, found):
    assert taxonomy.scenarios(scenario, borders, classes) == found
    assert set(found) <= set(taxonomy.SCENARIOS)


@pytest.mark.parametrize(
    "name, knobs, letters",
    [
        ("split-digits", "{}", "CIL"),
        ("si-blurry", "{source: digits, tasks: 3}", "BBCL"),
        ("rotated", "{source: digits, tasks: 2}", "DIL"),
    ],
)
def test_our_streams_say_their_names(name, knobs, letters, capsys):
    assert main(["stream", "show", name, knobs]) == 0
    assert f"\n{letters}: " in capsys.readouterr().out


def test_the_survey_of_language_models_groups_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--taxonomy", "llm"]) == 0
    said = capsys.readouterr().out
    assert "gere" in said and "CPT" in said and "lwf" not in said  # which needs classes
