"""Permuted, rotated and blurry streams, in Python and in plans."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput, PlanError, UnknownName
from remanence.core.rng import generator
from remanence.data import Examples, blurry, digits, permuted, rotated, split_classes
from remanence.data.streams import SOURCES, STREAMS, examples_of
from remanence.life.plan import parse_plan
from remanence.life.run import build_stream


def table(n: int = 120, classes: int = 6, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n, 4, 4)).astype("f4"))
    return Examples(
        {"x": x, "y": torch.arange(n) % classes, "who": [f"w{i}" for i in range(n)]}, "table", ids=range(7, n + 7)
    )


def test_permuted_tasks_are_one_fixed_order_of_the_same_rows() -> None:
    examples = table()
    stream = permuted(examples, tasks=3, seed=5)
    first = stream[0]
    assert stream.scenario == "domain" and [task.classes for task in stream] == [tuple(range(6))] * 3
    assert torch.equal(torch.cat([first.train.id, first.test.id]).sort().values, examples.id)
    orders = []
    for task in stream:
        order = torch.randperm(16, generator=generator(5, "permuted", task.id)) if task.id else torch.arange(16)
        orders.append(order.tolist())
        for part, base in ((task.train, first.train), (task.test, first.test)):
            for row in range(len(part)):  # the naive way: one value after the other
                plain = base["x"][row].flatten().tolist()
                assert part["x"][row].flatten().tolist() == [plain[i] for i in order]
            assert torch.equal(part["y"], base["y"]) and part.columns["who"] == base.columns["who"]
            assert torch.equal(part["original"], base.id) and torch.equal(part.id, base.id + task.id * 2**32)
    assert len({tuple(order) for order in orders}) == 3
    known = {int(i): row for i, row in zip(examples.id, examples["x"], strict=True)}
    assert all(torch.equal(row, known[int(i)]) for i, row in zip(first.train.id, first.train["x"], strict=True))
    longer = permuted(examples, tasks=5, seed=5)  # another number of tasks changes none of them
    assert [task.fingerprint() for task in longer][:3] == [task.fingerprint() for task in stream]
    assert permuted(examples, tasks=3, seed=6)[1].train["x"].ne(stream[1].train["x"]).any()


def naive_rotation(image: np.ndarray, degrees: float) -> np.ndarray:
    """Every output pixel looked up in the input by bilinear interpolation; outside is 0, at the image's own edge too."""
    height, width = image.shape
    found = np.zeros_like(image)
    angle = math.radians(degrees)
    for row in range(height):
        for col in range(width):
            dy, dx = row - (height - 1) / 2, col - (width - 1) / 2
            at = (height - 1) / 2 + math.cos(angle) * dy + math.sin(angle) * dx
            on = (width - 1) / 2 - math.sin(angle) * dy + math.cos(angle) * dx
            if -1e-9 <= at <= height - 1 + 1e-9 and -1e-9 <= on <= width - 1 + 1e-9:
                at, on = min(max(at, 0), height - 1), min(max(on, 0), width - 1)
                up, left = int(at), int(on)
                down, right = min(up + 1, height - 1), min(left + 1, width - 1)
                a, b = at - up, on - left
                found[row, col] = (1 - a) * ((1 - b) * image[up, left] + b * image[up, right]) + a * (
                    (1 - b) * image[down, left] + b * image[down, right]
                )
    return found


def test_rotated_tasks_turn_the_same_images() -> None:
    examples = table(24)
    stream = rotated(examples, tasks=[0, 90, 37.5, -90, 360], seed=1)
    first = stream[0].train
    assert all(torch.equal(stream[0].train["x"][i], examples["x"][int(id) - 7]) for i, id in enumerate(first.id))
    torch.testing.assert_close(stream[1].train["x"], torch.rot90(first["x"], 1, (1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(stream[3].train["x"], torch.rot90(first["x"], -1, (1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(stream[4].train["x"], first["x"], atol=1e-5, rtol=0)
    expected = np.stack([naive_rotation(image, 37.5) for image in first["x"].numpy()])
    np.testing.assert_allclose(stream[2].train["x"].numpy(), expected, atol=1e-5)
    assert torch.equal(stream[2].train.id, first.id + 2 * 2**32) and torch.equal(stream[2].train["original"], first.id)
    counted = rotated(examples, tasks=4, seed=1)
    assert len(counted) == 4 and torch.equal(counted[2].test["x"], rotated(examples, tasks=[90.0], seed=1)[0].test["x"])


def test_images_of_every_shape_turn_alike() -> None:
    x = table(24)["x"]
    shaped = {"rows": x.reshape(24, 16), "images": x, "channels": torch.stack([x, x + 1], 1)}
    ends = {
        name: rotated(Examples({"x": value, "y": torch.arange(24) % 2}, name), tasks=[30])[0].train["x"]
        for name, value in shaped.items()
    }
    assert torch.equal(ends["rows"].reshape(-1, 4, 4), ends["images"]) and ends["rows"].shape[1:] == (16,)
    assert torch.equal(ends["channels"][:, 0], ends["images"]) and ends["channels"].shape[1:] == (2, 4, 4)


@pytest.mark.parametrize("tasks", [2, 3, 6, [[0, 1, 2, 3], [4], [5]], [[5, 2], [0, 3, 4]]])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_blurry_stream_gives_every_row_once_and_every_task_its_share(tasks: Any, share: float, seed: int) -> None:
    examples = table(360)
    clear = split_classes(examples, tasks, test_share=0.25, seed=seed)
    stream = blurry(examples, tasks, share, seed=seed)
    rows = [i for task in stream for i in task.train.id.tolist()]
    assert len(rows) == len(set(rows)) and set(rows) == {i for task in clear for i in task.train.id.tolist()}
    sizes = [len(task.train) for task in clear]
    for mine, task, size in zip(stream, clear, sizes, strict=True):
        assert len(mine.train) == size and mine.test.fingerprint() == task.test.fingerprint()
        foreign = int((~torch.isin(mine.train["y"], torch.tensor(task.classes))).sum())
        assert foreign == min(round(share * size), *([sum(round(share * n) for n in sizes) - round(share * size)]))
        assert mine.classes == tuple(sorted(set(mine.train["y"].tolist())))
        plain = {
            int(i): (int(y), who) for i, y, who in zip(examples.id, examples["y"], examples.columns["who"], strict=True)
        }
        for i, y, who in zip(mine.train.id, mine.train["y"], mine.train.columns["who"], strict=True):
            assert plain[int(i)] == (int(y), who)
    if not share:
        assert stream.fingerprint() == clear.fingerprint()


def test_foreign_rows_come_from_all_other_tasks_about_equally() -> None:
    examples = Examples({"x": torch.zeros(4000, 1), "y": torch.arange(4000) % 4}, "many")
    stream = blurry(examples, 4, 0.5)
    for task in stream:
        counts = Counter(task.train["y"].tolist())
        assert counts.pop(task.id) == 375
        assert sum(counts.values()) == 375 and all(95 <= n <= 155 for n in counts.values())  # 125 each, in the mean
    test = examples.select(torch.arange(8))  # no split to draw: what differs is the mixing
    mixed = {blurry(examples, 4, 0.5, test, seed=seed).fingerprint() for seed in (0, 1, 1)}
    assert len(mixed) == 2


def test_given_test_rows_are_used_and_tables_without_labels_are_split() -> None:
    examples, test = table(), table(12, seed=1)
    for stream in (permuted(examples, 2, test), rotated(examples, 2, test), blurry(examples, 2, 0.2, test)):
        assert sum(len(task.train) for task in stream) in (120, 240)
        assert {len(task.test) for task in stream} <= {6, 12}
    values = Examples({"x": torch.randn(40, 3), "y": torch.randn(40)}, "regression")
    stream = permuted(values, 2, test_share=0.1)
    assert [len(stream[1].train), len(stream[1].test), stream[1].classes] == [36, 4, ()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: permuted(table(), 0), "tasks=0"),
        (lambda: rotated(table(), []), "finite angles"),
        (lambda: rotated(table(), [0, math.nan]), "finite angles"),
        (lambda: rotated(Examples({"x": torch.zeros(4, 3), "y": torch.zeros(4)}, "t"), 2), "no images"),
        (lambda: permuted(Examples({"x": torch.zeros(4, 3)}, "t", ids=[1, 2, 3, 2**32]), 2, test_share=0.5), "below 2"),
        (lambda: blurry(table(), 2, 1.0), "share=1.0"),
        (lambda: blurry(table(), 2, -0.1), "share=-0.1"),
        (lambda: blurry(table(), 1, 0.1), "at least 2 tasks"),
        (lambda: blurry(table(), 4, 0.1), "cannot be cut into 4"),
        (lambda: permuted(table(), 2, test_share=1.5), "between 0 and 1"),
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


def test_fingerprints_in_another_process() -> None:
    code = """
import torch
from remanence.data import Examples, blurry, permuted, rotated
x = torch.arange(1440.0).reshape(90, 4, 4).sin()
examples = Examples({"x": x, "y": torch.arange(90) % 6}, "table")
made = [s.fingerprint() for s in (permuted(examples, 2), rotated(examples, [30]), blurry(examples, 3, 0.2))]
"""
    seen = subprocess.run(
        [sys.executable, "-c", code + "print(*made)"], capture_output=True, text=True, check=True
    ).stdout
    x = torch.arange(1440.0).reshape(90, 4, 4).sin()
    examples = Examples({"x": x, "y": torch.arange(90) % 6}, "table")
    streams = permuted(examples, 2), rotated(examples, [30]), blurry(examples, 3, 0.2)
    assert seen.split() == [stream.fingerprint() for stream in streams]


PLAN = "model: mlp\nstream: {%s}\nevents: [{learn: 0}]\n"


def planned(stream: str) -> Any:
    return build_stream(parse_plan(PLAN % stream, "plan"))


def test_plans_name_streams_over_sources(tmp_path: Path) -> None:
    d = digits()
    pairs = {
        "blurry: {source: digits, tasks: 5, share: 0.2}": blurry(d, 5, 0.2),
        "blurry: {source: {digits: {}}, tasks: [[0, 1], [2, 9]], share: 0, seed: 4}": blurry(
            d, [[0, 1], [2, 9]], 0.0, seed=4
        ),
        "permuted: {source: {digits: }, tasks: 2}": permuted(d, 2),
        "rotated: {source: digits, tasks: [0, 45.5]}": rotated(d, [0, 45.5]),
        "split-classes: {source: digits, test: digits}": split_classes(d, 5, d),
    }
    for text, expected in pairs.items():
        assert planned(text).fingerprint() == expected.fingerprint(), text
    np.savez(tmp_path / "a.npz", pixels=d["x"].numpy(), y=d["y"].numpy())
    np.save(tmp_path / "x.npy", d["x"].numpy())
    np.save(tmp_path / "y.npy", d["y"].numpy())
    rows = [",".join(map(repr, [*map(float, x), int(y)])) for x, y in zip(d["x"], d["y"], strict=True)]
    (tmp_path / "a.csv").write_text("\n".join([",".join([*(f"p{i}" for i in range(64)), "digit"]), *rows]))
    for source in (
        f"npz: {{path: {tmp_path}/a.npz, columns: {{x: pixels, y: y}}}}",
        f"csv: {{path: {tmp_path}/a.csv, label: digit}}",
        f"memmap: {{x: {tmp_path}/x.npy, y: {tmp_path}/y.npy}}",
    ):
        found = planned(f"split-classes: {{source: {{{source}}}}}")
        assert found.fingerprint() == split_classes(d).fingerprint(), source
    assert set(STREAMS) == {"split-digits", "split-idx", "split-classes", "blurry", "permuted", "rotated", "corrupted",
                            "si-blurry", "recurring", "power-law", "long-tail", "label-noise", "core50", "nevis", "few-shot",
                            "instance-incremental", "people", "text", "styled"}  # fmt: skip


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("blury: {source: digits}", "did you mean 'blurry'"),
        ("blurry: {}", "blurry needs source"),
        ("blurry: {source: digits, shar: 0.1}", "no knob 'shar'; did you mean 'share'"),
        ("blurry: {source: digits, share: a}", "wrong type"),
        ("blurry: {source: {digit: {}}}", r"wrong type; expected .*'digits', 'idx', 'csv', 'npz', 'images', 'memmap'"),
        ("permuted: {source: digit}", r"wrong type; expected .*'digits'"),
        ("rotated: {source: digits, tasks: [a]}", "wrong type"),
        ("permuted: {source: [digits]}", "wrong type"),
    ],
)
def test_a_plan_that_names_no_stream_is_refused_before_it_runs(stream: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(PLAN % stream, "plan")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"digit": {}}, UnknownName, "did you mean 'digits'"),
        ({"csv": {"pth": "a"}}, UnknownName, "source csv has no knob 'pth'; did you mean 'path'"),
        ({"csv": {}}, BadInput, r"source csv needs path; write source: \{csv: \{path: ...\}\}"),
        ({"digits": {"n": 1}}, UnknownName, "has no knobs"),
        ({}, BadInput, "one name"),
        ({"digits": {}, "csv": {}}, BadInput, "one name"),
        ({"csv": {"path": "nowhere.csv"}}, BadInput, "does not exist"),
    ],
)
def test_wrong_sources(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        examples_of(source)
    assert set(SOURCES) == {"digits", "idx", "csv", "npz", "images", "memmap", "cifar10", "cifar100", "tiny-imagenet",
                            "imagenet-r", "core50", "omniglot", "people", "general-text", "text", "tofu", "muse", "rwku",
                            "wmdp"}  # fmt: skip
