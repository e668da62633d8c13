"""The report: all that it promises, and nothing that it must not carry."""

from __future__ import annotations

import html
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from remanence.core.errors import EventFailed, Refused
from remanence.core.ids import Ids
from remanence.data import Examples, Request, Task
from remanence.life.life import Life
from remanence.life.report import render_html, render_table
from remanence.life.report_words import number
from remanence.life.snapshots import weights_sha256
from remanence.models import mlp
from tests.life.helpers import (
    FAST,
    REPLAY,
    SECRET_IDS,
    SECRET_KEEP,
    SECRET_PLAN,
    again,
    forms,
    id_forms,
    lived,
    network,
    of_class,
    secret_stream,
    stream,
)

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\x1b[31m\u202e"


class Page(HTMLParser):
    """Collects what a page would act on."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.styles = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles += data
        else:
            self.words.append(data)


def check_page(text: str) -> Page:
    """No request to anywhere, nothing that runs."""
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "img", "video", "audio"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
                assert value and re.match(r"(#|data:,$|receipts/[\w.-]+$)", value), (tag, name, value)
            if value and name not in ("xmlns", "xmlns:xlink"):
                assert "javascript:" not in value and "url(http" not in value
        assert not (tag == "meta" and "http-equiv" in attributes and "refresh" in str(attributes).lower())
    assert "@import" not in page.styles and not re.search(r"url\(\s*['\"]?(?!data:|#)", page.styles)
    return page


def data_of(life: Life) -> dict[str, Any]:
    life.report()
    found: dict[str, Any] = json.loads(
        (life.home / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word)
    )
    return found


def table_of(data: dict[str, Any], width: int) -> str:
    stream_ = io.StringIO()
    Console(file=stream_, width=width, force_terminal=False, color_system=None).print(render_table(data))
    return stream_.getvalue()


def test_what_report_json_holds(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        receipt = life.forget(Request(classes=[3]), by="salun", verify={"retrain": {"seeds": 2}})
        life.learn(stream()[2], **FAST)
        data = data_of(life)
        assert data["weights_sha256"] == weights_sha256(life.model.state_dict())
        assert data["content_digest"] == life.content_digest()
        assert [(e["kind"], e["by"]) for e in data["events"]] == [
            ("learn", "finetune"),
            ("learn", "finetune"),
            ("forget", "salun"),
            ("learn", "finetune"),
        ]
        assert [len(row) for row in data["matrix"]] == [3] * 4 and data["matrix"][0][1:] == [None, None]
        measured = life.measure()["tasks"]
        assert data["matrix"][-1] == [measured[task] for task in (0, 1, 2)]
        (told,) = data["receipts"]
        assert told["n"] == len(receipt.ids) and told["by"] == "salun" and told["status"] == receipt.status
        assert told["not_covered"] and told["evidence"] and told["asked_plain"] == "class 3"
        assert {"weights", "keep/replay", "snapshots"} <= {holder["name"] for holder in data["holders"]}
        assert {holder["name"]: holder["bytes"] for holder in data["holders"]} == life.holders
        assert {"python", "torch", "numpy", "threads", "cpu", "remanence"} <= set(data["versions"])
        assert data["forgotten"][0]["label"] == "3" and len(data["forgotten"][0]["series"]) == 4
        assert data["state"] == "complete" and data["summary"]["average_accuracy"]["value"] is not None


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        life.forget(Request(classes=[3]), by="salun", verify={"retrain": {"seeds": 2}})
        page = check_page(life.report().read_text())
        words = " ".join(page.words).lower()
        assert "class 3" in words and "what pretraining saw" in words
        other = life.report(tmp_path / "elsewhere" / "page.html")
        assert other.read_text() == (tmp_path / "report.html").read_text()


def test_hostile_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    task = stream()[0]
    named = replace(task, names=(HOSTILE, "zero"), train=task.train.replace(client=[HOSTILE] * len(task.train)))
    with Life(network, home=tmp_path, name=HOSTILE, keep=REPLAY) as life:
        life.learn(named, **FAST)
        life.learn(stream()[1], **FAST)
        life.forget(Request(client=HOSTILE), by="ssd")
        text = life.report().read_text()
        page = check_page(text)
        assert html.escape("<script>alert(1)</script>") in text and "<script>alert" not in text
        assert "<script>alert(1)</script>" in "".join(page.words)
        assert "\x1b" not in text and "\u202e" not in text
        for width in (60, 200):
            shown = table_of(data_of(life), width)
            assert "\x1b" not in shown and "\u202e" not in shown and "alert" in shown


def test_a_report_carries_no_example_and_no_id(tmp_path: Path) -> None:
    with Life(network, keep=SECRET_KEEP, home=tmp_path, plan=SECRET_PLAN) as life:
        for task in secret_stream()[:2]:
            life.learn(task, **FAST)
        life.forget(Request(ids=list(SECRET_IDS)), by="ssd", verify={"retrain": {"seeds": 2}})
        life.report()
        for name in ("report.html", "report.json"):
            text = (tmp_path / name).read_bytes()
            for needles in {**forms(), **id_forms()}.values():
                assert not any(needle in text for needle in needles)
        assert "ids: [...]" in json.loads((tmp_path / "report.json").read_text())["plan"]
        assert "2 given examples" in (tmp_path / "report.html").read_text()


def test_figures_speak_of_a_request_as_a_whole(tmp_path: Path) -> None:
    """The report does not grow with the number of examples asked for."""

    def numbers(value: Any) -> int:
        if isinstance(value, dict):
            return sum(map(numbers, value.values()))
        if isinstance(value, list):
            return sum(map(numbers, value))
        return isinstance(value, int | float) and not isinstance(value, bool)

    counts = []
    for n in (22, 50):
        with lived(tmp_path / str(n)) as life:
            life.forget(
                Request(ids=Ids(stream()[0].train.id.numpy()[:n])), by="salun", verify={"retrain": {"seeds": 2}}
            )
            counts.append(numbers(data_of(life)))
    assert abs(counts[1] - counts[0]) < 6  # one more figure may be defined, but none is added per example


@pytest.mark.parametrize("width", [60, 200])
def test_lives_of_every_kind_are_shown(width: int, tmp_path: Path) -> None:
    with Life(network, home=tmp_path / "none") as life:
        data = data_of(life)
        assert data["events"] == [] and data["matrix"] == [] and data["receipts"] == []
        check_page((life.home / "report.html").read_text())
        assert all(len(line) <= width for line in table_of(data, width).splitlines())
    with lived(tmp_path / "some") as life:
        with pytest.raises(EventFailed):
            life.learn(stream()[2], **{**FAST, "lr": 1e30})
        with pytest.raises(Refused):
            life.forget(Request(classes=[0, 1, 2, 3]), by="retrain")
        data = data_of(life)  # failed and refused: no event of the life
        assert len(data["events"]) == 2
        check_page((life.home / "report.html").read_text())
        life.forget(Request(ids=of_class(stream()[1], 3)), by="retrain")
        life.forget(Request(ids=[10**9]), by="retrain")
        assert life.redact()
        data = data_of(life)
        assert "request 1 (redacted)" in json.dumps(data) and data["receipts"][1]["status"] == "nothing held"
        check_page((life.home / "report.html").read_text())
        shown = table_of(data, width)
        assert all(len(line) <= width for line in shown.splitlines()) and "redacted" in shown
    with again(tmp_path / "some") as life:
        assert data_of(life) == data


def test_the_same_life_gives_the_same_bytes_and_a_table_of_everything(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        life.forget(Request(classes=[3]), by="retrain")
        data = data_of(life)
        page = (tmp_path / "report.html").read_text()
        assert render_html(data) == page == render_html(json.loads(json.dumps(data)))
        for width in (60, 200):
            shown = table_of(data, width)
            assert all(len(line) <= width for line in shown.splitlines())
            for word in ("learn task 0", "class 3", "retrain", "deleted"):
                assert word in re.sub(r"\s+", " ", shown) or width == 60, (word, width)


def test_a_regression_life_has_a_report(tmp_path: Path) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    examples = Examples({"x": x, "y": x[:, :1]}, "line", range(500, 540))
    task = Task(examples, examples)
    with Life(lambda seed: mlp(64, [8], 1, seed=seed), problem="regression", home=tmp_path) as life:
        life.learn(task, **FAST)
        life.forget(Request(ids=range(500, 505)), by="retrain")
        data = data_of(life)
        assert len(data["events"]) == 2 and data["receipts"][0]["status"] == "done"
        assert data["events"][0]["measures"]["mse"] > 0
        assert data["score"] == "mse" and data["summary"] == {}  # a squared error is no accuracy
        assert [row for (row,) in data["matrix"]] == [event["measures"]["mse"] for event in data["events"]]
        page = (tmp_path / "report.html").read_text()
        check_page(page)
        shown = number(data["matrix"][0][0])
        assert "Mean squared error of each task" in page and shown in page and "Accuracy" not in page
        assert shown in table_of(data, 80) and "mse, task 0" in table_of(data, 80)
