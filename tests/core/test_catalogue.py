"""The catalogue: its lines are well formed, found by name, and cost nothing to read."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import remanence as rm
from remanence import catalogue
from remanence.core.errors import BadInput, UnknownName
from remanence.core.part import Part

GOOD = Part("own-part", "keep", "method", "replay", "their.module:Own", ("ssd",), "A paper, 2024", ("labels",))


def test_reading_the_catalogue_imports_nothing_heavy() -> None:
    code = "import remanence, sys; remanence.parts(); print([m for m in ('torch', 'numpy', 'scipy', 'pydantic', 'rich') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_every_line_is_well_formed_and_unique() -> None:
    catalogue.joined(catalogue.PARTS)
    assert len({(part.verb, part.slug) for part in catalogue.PARTS}) == len(catalogue.PARTS)


@pytest.mark.parametrize("part", catalogue.PARTS, ids=lambda part: f"{part.verb}-{part.slug}")
def test_every_line_names_a_dataclass_in_its_verbs_folder(part: Part) -> None:
    assert part.module.startswith(f"remanence.{part.verb}.")
    try:
        if importlib.util.find_spec(part.module) is None:
            pytest.skip(f"{part.module} is not written yet")
    except ModuleNotFoundError:
        pytest.skip(f"{part.module} is not written yet")
    cls = part.load()
    assert dataclasses.is_dataclass(cls) and cls.__name__ == part.name and cls.__doc__
    assert catalogue.slug_of(cls) == part.slug and catalogue.find(part.verb, part.slug) is part
    if part.kind == "method":
        assert getattr(getattr(rm, part.verb), part.name) is cls and part.name in dir(getattr(rm, part.verb))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slug": "Own"}, "lower-case"),
        ({"slug": "own--part"}, "single hyphens"),
        ({"verb": "kep"}, "did you mean 'keep'"),
        ({"kind": "methods"}, "did you mean 'method'"),
        ({"family": ""}, "family"),
        ({"cards": ("Bad Card",)}, "cards"),
        ({"needs": ("old data",)}, "needs"),
        ({"target": "module.Class"}, "module:Class"),
        ({"target": "../evil:Class"}, "module:Class"),
        ({"paper": " "}, "paper"),
    ],
)
def test_a_malformed_line_is_refused(change: dict[str, Any], message: str) -> None:
    catalogue.check(GOOD)
    with pytest.raises(BadInput, match=message):
        catalogue.check(replace(GOOD, **change))


def test_two_parts_may_not_take_one_name() -> None:
    for other in (replace(GOOD, target="their.module:Other"), replace(GOOD, slug="other")):
        with pytest.raises(BadInput, match="two parts of keep"):
            catalogue.joined([GOOD, other])
    catalogue.joined([GOOD, replace(GOOD, verb="forget")])


def test_selecting() -> None:
    keep = rm.parts(verb="keep")
    assert keep and all(part.verb == "keep" for part in keep)
    without = rm.parts(verb="forget", without="retain-data, labels")
    assert all(not {"retain-data", "labels"} & set(part.needs) for part in without)
    assert len(without) < len(rm.parts(verb="forget"))
    assert {part.slug for part in rm.parts(family="regularisation")} >= {"ewc", "l2"}
    for wrong, hint in (
        ({"verb": "forgets"}, "'forget'"),
        ({"without": "old-dat"}, "'old-data'"),
        ({"family": "replays"}, "'replay'"),
    ):
        with pytest.raises(UnknownName, match=f"did you mean {hint}"):
            rm.parts(**wrong)


def test_finding_by_slug_class_or_verb_and_slug() -> None:
    ewc = catalogue.find("keep", "ewc")
    assert catalogue.named("ewc") == catalogue.named("EWC") == catalogue.named("keep/ewc") == [ewc]
    with pytest.raises(UnknownName, match="'ewc' is a part of keep"):
        catalogue.find("forget", "ewc")
    with pytest.raises(UnknownName, match="did you mean 'replay'"):
        catalogue.find("keep", "replya")
    with pytest.raises(UnknownName, match="remanence methods"):
        catalogue.named("nothing-like-it")
    with pytest.raises(AttributeError, match="did you mean 'Replay'"):
        rm.keep.Replya  # noqa: B018
    assert catalogue.slug_of(type("Mine", (), {})) == "mine"


def test_parts_of_installed_packages_join_by_their_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def offer(*loaded: Any) -> None:
        made = [
            SimpleNamespace(name=f"e{i}", value="their:part", load=lambda x=x: x() if callable(x) else x)
            for i, x in enumerate(loaded)
        ]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: made if group == "remanence.parts" else [])
        catalogue.every.cache_clear()

    try:
        offer(GOOD, [replace(GOOD, slug="second", target="their.module:Second")])
        assert {"own-part", "second"} <= {part.slug for part in rm.parts(verb="keep")}
        offer("no part")
        with pytest.raises(BadInput, match="must name a Part"):
            rm.parts()
        offer(replace(GOOD, slug="ewc"))
        with pytest.raises(BadInput, match="slug 'ewc'"):
            rm.parts()

        def broken() -> Part:
            raise ImportError("no module named their")

        offer(broken)
        with pytest.raises(BadInput, match="mend or uninstall"):
            rm.parts()
    finally:
        monkeypatch.undo()
        catalogue.every.cache_clear()


def test_the_stubs_are_current() -> None:
    root = Path(catalogue.__file__).parents[1]
    spec = importlib.util.spec_from_file_location("stubs", root / "tools" / "stubs.py")
    assert spec is not None and spec.loader is not None
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    for package in stubs.PACKAGES:
        assert stubs.path_of(package).read_text(encoding="utf-8") == stubs.render(package), package


def test_fidelity_says_unverified_where_no_row_is() -> None:
    assert catalogue.fidelity(GOOD) == "unverified"
