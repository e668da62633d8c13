"""Data sets in date order: folders, indexes, shapes, and no picture both trained on and tested."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from remanence import Life, Request
from remanence.core.errors import BadInput, Corrupt
from remanence.data import Examples, digits
from remanence.data.nevis import dated, distinct
from remanence.data.stream import Task
from remanence.data.streams import stream_of
from remanence.models import mlp

RNG = np.random.default_rng(0)


def pictures(rows: int, classes: int, shape: tuple[int, ...] = (6, 6)) -> tuple[np.ndarray, np.ndarray]:
    x = RNG.integers(0, 256, (rows, *shape), dtype=np.uint8)
    return x, np.arange(rows) % classes


def put_npz(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    folder.mkdir(parents=True)
    np.savez(folder / "data.npz", x=x, y=y)


def put_idx(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for name, array in (("train-images-idx3-ubyte.gz", x), ("train-labels-idx1-ubyte.gz", y.astype(np.uint8))):
        head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / name).write_bytes(gzip.compress(head + array.tobytes()))


def put_images(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")
    for row, (pixels, label) in enumerate(zip(x, y, strict=True)):
        path = folder / f"kind{label}" / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(path)


def test_a_folder_becomes_tasks_in_the_order_of_dates(tmp_path: Path) -> None:
    a, b, c = pictures(20, 2), pictures(12, 3), pictures(16, 4, (6, 6, 3))
    put_npz(tmp_path / "1998-11-letters", *a)
    put_idx(tmp_path / "1998-plates", *b)
    put_images(tmp_path / "1987-02-03-leaves", *c)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "LICENCE.txt").write_text("mine")
    stream = dated(tmp_path, size=6)
    assert [task.train.source for task in stream] == ["leaves", "plates", "letters"]
    assert [task.classes for task in stream] == [(0, 1, 2, 3), (4, 5, 6), (7, 8)] and stream.scenario == "task"
    assert stream[0].names == tuple(f"leaves/kind{i}" for i in range(4)) and stream[2].names == (
        "letters/0",
        "letters/1",
    )
    assert [len(task.train) for task in stream] == [12, 9, 16] and [len(task.test) for task in stream] == [4, 3, 4]
    ids = torch.cat([part.id for task in stream for part in (task.train, task.test)])
    assert ids.sort().values.tolist() == list(range(48))
    for task, (x, y), start, offset in ((stream[0], c, 0, 0), (stream[1], b, 16, 4), (stream[2], a, 28, 7)):
        if task.id == 0:  # files are read class by class
            order = np.argsort(y, kind="stable")
            x, y = x[order].transpose(0, 3, 1, 2), y[order]
        else:
            x = np.repeat(x[:, None], 3, axis=1)
        for part in (task.train, task.test):
            rows = part.id.numpy() - start
            assert np.array_equal(part["y"].numpy(), y[rows] + offset)
            np.testing.assert_allclose(part["x"].numpy(), x[rows].astype("f4") / 255, atol=1e-6)
    assert stream[0].train.columns["document"][0].startswith("leaves/kind0/")
    assert dated(tmp_path, size=6).fingerprint() == stream.fingerprint()
    assert dated(tmp_path, size=6, seed=1).fingerprint() != stream.fingerprint()


def test_an_index_names_dates_and_leaves_others_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put_npz(tmp_path / name, *pictures(8, 2))
    with pytest.raises(BadInput, match=r"'a' tells no date; call it such as 1998-a"):
        dated(tmp_path)
    index = tmp_path / "stream.json"
    rows = [{"source": "b", "date": 2004, "name": "bees"}, {"source": "a", "date": "1998-11", "name": "ants"}]
    index.write_text(json.dumps(rows))
    assert [task.train.source for task in dated(tmp_path, size=6)] == ["ants", "bees"]
    for wrong, message in (
        ([{**rows[0], "date": "1998-13"}], "no year, year-month"),
        ([{**rows[0], "source": "../elsewhere"}], "leads out of"),
        ([rows[0], {**rows[1], "name": "bees"}], "a name of its own"),
        ([{"source": "b"}], "{source, date, name}"),
        ({}, "must be a list"),
        ([], "called nothing"),
    ):
        index.write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match=message):
            dated(tmp_path, size=6)
    index.write_text("[")
    with pytest.raises(Corrupt, match="is not JSON"):
        dated(tmp_path)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    put_npz(tmp_path / "two" / "1998-a", *pictures(8, 2))
    (tmp_path / "two" / "1998-a" / "more.npz").write_bytes(b"")
    with pytest.raises(BadInput, match=r"has 2 \.npz files"):
        dated(tmp_path / "two")
    put_npz(tmp_path / "few" / "1998-a", *pictures(4, 4))
    with pytest.raises(BadInput, match=r"^a: class 0 has 1 rows"):
        dated(tmp_path / "few")
    put_npz(tmp_path / "elsewhere", *pictures(8, 2))
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "1998-a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="leads out of"):
        dated(tmp_path / "link")
    with pytest.raises(BadInput, match="is no folder"):
        dated(tmp_path / "nowhere")
    y = torch.arange(8) % 2
    for x, message in (
        (torch.rand(8, 1, 6, 6) * 2, r"must lie in \[0, 1\]"),
        (torch.full((8, 36), torch.nan), r"must lie in \[0, 1\]"),
        (torch.rand(8, 35), "no picture"),
        (torch.rand(8, 2, 6, 6), "no picture"),
    ):
        with pytest.raises(BadInput, match=f"a: .*{message}"):
            dated([{"source": Examples({"x": x, "y": y}, "a"), "date": 1998, "name": "a"}])
    with pytest.raises(BadInput, match="integer labels"):
        dated([{"source": Examples({"x": torch.rand(8, 36), "y": y.float()}, "a"), "date": 1998, "name": "a"}])
    with pytest.raises(BadInput, match="would take"):
        dated([{"source": digits(), "date": 1998, "name": "a"}], max_bytes=1000)


def test_one_shape_for_all() -> None:
    """Gray of three equal channels and three channels of gray are the picture; scaled, it is torch's antialiased bilinear; dates of a
    list order it, and sets of one date come by name."""
    data = digits()
    colours = Examples({"x": data["x"].reshape(-1, 1, 8, 8).flip(3).expand(-1, 3, -1, -1), "y": data["y"]}, "c")
    sets = [
        {"source": colours, "date": "1998-02", "name": "z"},
        {"source": data, "date": "1998-02", "name": "b"},
        {"source": data.replace(x=1 - data["x"]), "date": "1998", "name": "last by name, first by date"},
    ]
    stream = dated(sets, size=8, gray=True)
    assert [task.train.source[0] for task in stream] == ["l", "b", "z"]
    for task, expected in zip(stream, (1 - data["x"], data["x"], data["x"].reshape(-1, 8, 8).flip(2)), strict=True):
        rows = task.test.id - task.id * len(data)
        torch.testing.assert_close(task.test["x"], expected.reshape(-1, 1, 8, 8)[rows], atol=1e-6, rtol=0)
    small = dated(sets[1:2], size=(4, 8))[0].train
    halves = data["x"].reshape(-1, 1, 8, 8)[small.id]
    expected = torch.nn.functional.interpolate(halves, (4, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(small["x"], expected.expand(-1, 3, -1, -1), atol=1e-6, rtol=0)


def keys(examples: Examples) -> set[bytes]:
    return {row.numpy().tobytes() for row in examples["x"]}


def test_no_picture_is_trained_on_and_tested() -> None:
    x, y = pictures(90, 3, (36,))
    x = x.astype("f4") / 255
    whole = [Examples({"x": torch.tensor(x[a:b]), "y": torch.tensor(y[a:b])}, "s") for a, b in ((0, 60), (30, 90))]
    third = Examples({"x": torch.cat([whole[0]["x"][:15]] * 2), "y": torch.cat([whole[0]["y"][:15]] * 2)}, "s")
    sets = [{"source": s, "date": 1990 + i, "name": f"s{i}"} for i, s in enumerate([*whole, third])]
    stream = dated(sets, size=6, gray=True)
    train, test = [keys(task.train) for task in stream], [keys(task.test) for task in stream]
    assert not any(a & b for a in train for b in test)
    left = sum(len(task.train) + len(task.test) for task in stream)
    assert stream.name == f"nevis, {150 - left} repeated rows left out" and 150 - left > 10
    again, lost = distinct(stream.tasks)
    assert lost == [(0, 0)] * 3 and [t.fingerprint() for t in again] == [t.fingerprint() for t in stream]
    assert len(train[0] & train[1])  # what two tasks train on stays in both
    assert len(stream[0].train) + len(stream[0].test) == 60  # the first task loses nothing


def test_a_data_set_that_is_all_repeated_is_refused() -> None:
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 2
    rows = Examples({"x": x, "y": y}, "first")
    other = Examples({"x": x, "y": y}, "second", torch.arange(20, 40))
    task = Task(rows.select(torch.arange(10)), rows.select(torch.arange(10, 20)), (0, 1), ("a", "b"), 0)
    with pytest.raises(BadInput, match="second has no test picture"):
        distinct([task, Task(other.select(torch.arange(5)), other.select(torch.arange(5, 10)), (0, 1), ("a", "b"), 1)])
    with pytest.raises(BadInput, match="second has no training picture"):
        distinct(
            [task, Task(other.select(torch.arange(10, 20)), other.select(torch.arange(10)), (0, 1), ("a", "b"), 1)]
        )
    only = torch.tensor([10, 12, 0, 1])  # of class 0 only repeated pictures are trained on
    made, lost = distinct(
        [task, Task(other.select(torch.cat([only[:2], torch.tensor([1, 3])])), _fresh(), (0, 1), ("a", "b"), 1)]
    )
    assert made[1].classes == (1,) and made[1].names == ("b",) and made[1].test["y"].tolist() == [1, 1]
    assert lost == [(0, 0), (2, 2)]


def _fresh() -> Examples:
    return Examples({"x": torch.rand(4, 1, 4, 4), "y": torch.arange(4) % 2}, "fresh", torch.arange(100, 104))


def test_a_plan_names_it_and_a_life_learns_it(tmp_path: Path) -> None:
    put_npz(tmp_path / "1998-a", *pictures(16, 2))
    put_npz(tmp_path / "1999-b", *pictures(16, 2))
    stream = stream_of({"nevis": {"sets": str(tmp_path), "size": 6, "gray": True}})
    listed = stream_of({"nevis": {"sets": [{"source": "digits", "date": "1998", "name": "digits"}], "size": 8}})
    assert len(stream) == 2 and listed[0].train["x"].shape[1:] == (3, 8, 8)
    with Life(mlp((1, 6, 6), [8]), home=tmp_path / "life") as life:
        for task in stream:
            event = life.learn(task, epochs=2)
        assert set(event.accuracy) == {0, 1}
        name = stream[0].train.columns["document"][0]
        receipt = life.forget(Request(documents=[name]), by="retrain")
        assert len(receipt.ids) == 1 and name.startswith("a/")
