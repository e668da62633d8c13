"""CSV and .npz: round trips, and every way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import csv as standard
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput, Corrupt, RemanenceError, UnknownName
from remanence.data import csv, npz

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_csv_round_trip_equals_a_naive_reading(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y, ids = rng.normal(size=(50, 3)).astype("f4"), rng.integers(-2, 5, 50), rng.permutation(1000)[:50]
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        writer = standard.writer(file)
        writer.writerow(["a", "key", "b", "who", "c", "y"])
        for row in range(50):
            writer.writerow([x[row, 0], ids[row], x[row, 1], f'he, "{row}"\n', x[row, 2], y[row]])
    found = csv(path, label="y", id="key", columns=["who"])
    assert found["x"].dtype == torch.float32 and np.array_equal(found["x"].numpy(), x)
    assert found["y"].tolist() == y.tolist() and found.id.tolist() == ids.tolist() and not found.positional
    assert found.columns["who"] == [f'he, "{row}"' for row in range(50)]
    chosen = csv(path, label="y", features=["c", "a"])
    assert np.array_equal(chosen["x"].numpy(), x[:, [2, 0]]) and chosen.positional and chosen.source == "csv"
    with_bom = write(tmp_path / "b.csv", b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n"))
    assert csv(with_bom, label="y", id="key", columns=["who"]).fingerprint() == found.fingerprint()
    assert csv(write(tmp_path / "d.csv", b"\xef\xbb\xbfy,a\n1,2\n"), label="y")["y"].tolist() == [1]
    semicolons = write(tmp_path / "c.csv", "a;y\n1.5;2\n\n-3e2; 1 \n")
    other = csv(semicolons, label="y", delimiter=";")
    assert other["x"].tolist() == [[1.5], [-300]] and other["y"].tolist() == [2, 1]


def test_labels_are_numbers_words_or_targets(tmp_path: Path) -> None:
    def labels(*cells: str, **knobs: Any) -> torch.Tensor:
        text = "a,y\n" + "".join(f"0,{cell}\n" for cell in cells)
        return csv(write(tmp_path / "a.csv", text), label="y", **knobs)["y"]

    assert labels("3", "1", "-3").tolist() == [3, 1, -3]
    targets = labels("3", "1.5", "-3")
    assert targets.dtype == torch.float32 and targets.tolist() == [3, 1.5, -3]
    assert labels("owl", "cat", "owl").tolist() == [1, 0, 1]
    assert labels("owl", "cat", "owl", classes=["ant", "owl", "cat"]).tolist() == [1, 2, 1]
    assert labels("2", "1", classes=["1", "2"]).tolist() == [1, 0]
    with pytest.raises(BadInput, match=r"line 3, column 'y': the label 'x' is a word where others are numbers"):
        labels("3", "x")
    with pytest.raises(BadInput, match=r"line 4, column 'y': the label is empty"):
        labels("3", "1", " ")
    with pytest.raises(BadInput, match=r"line 3, column 'y': NaN"):
        labels("3", "nan")
    with pytest.raises(BadInput, match=r"line 2, column 'y': 99999999999999999999 does not fit"):
        labels("99999999999999999999")
    with pytest.raises(UnknownName, match=r"line 3, column 'y': 'cot' is not among classes=.*did you mean 'cat'"):
        labels("owl", "cot", classes=["cat", "owl"])


@pytest.mark.parametrize(
    ("text", "knobs", "error", "message"),
    [
        ("", {}, BadInput, "is empty; the first line"),
        ("a,y\n", {}, BadInput, "no rows under its header"),
        ("a,b,a\n1,2,3\n", {}, BadInput, "has 'a' more than once"),
        ("age,y\n1,2\n", {"label": "Y"}, UnknownName, r"no column 'Y'; did you mean 'y'\? \(it has age, y\)"),
        ("age,y\n1,2\n", {"features": ["aeg"]}, UnknownName, "did you mean 'age'"),
        ("age,y\n1,2\n", {"id": "uid"}, UnknownName, "no column 'uid'"),
        ("a,y\n1,2\n1\n", {}, BadInput, "line 3: 1 cells where the header has 2"),
        ("a,y\n1,2\n1,2,3\n", {}, BadInput, "line 3: 3 cells"),
        ("a,y\n1,2\n,3\n", {}, BadInput, "line 3, column 'a': is empty"),
        ("a,y\n1,2\n\n'x',3\n", {}, BadInput, "line 4, column 'a': \"'x'\" is no number; name it in columns="),
        ("a,y\n1,2\n2,nan\n", {}, BadInput, "line 3, column 'y': NaN"),
        ("a,y\n1,2\n1e99,0\n", {}, BadInput, "line 3, column 'a': NaN, infinite or beyond float32"),
        ("a,i\n1,2\n1,2\n", {"id": "i"}, BadInput, "line 3, column 'i': the id 2 stands in line 2 already"),
        ("a,i\n1,-2\n", {"id": "i"}, BadInput, "line 2, column 'i': the id -2 is negative"),
        ("a,i\n1,2.0\n", {"id": "i"}, BadInput, "line 2, column 'i': '2.0' is no whole number"),
        (b"a,y\n1,2\n\xff,3\n", {}, Corrupt, "is not UTF-8"),
        ('a,y\n1,2\n"3,4\n', {}, Corrupt, "line 3: unexpected end"),
        ("a,y\n1,2\n" + "9" * 200_000 + ",1\n", {}, Corrupt, "line 3: field larger than field limit .*quote left open"),
        ("a,y\n1,2\n", {"max_bytes": 5}, BadInput, "are allowed"),
        ("a,y\n1,2\n", {"delimiter": ",,"}, BadInput, "must be one character"),
        (b"a,y\n\0,2\n", {}, RemanenceError, "line 2"),
    ],
)
def test_a_bad_csv_names_the_line(
    tmp_path: Path, text: str | bytes, knobs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        csv(write(tmp_path / "a.csv", text), **knobs)


def test_a_missing_csv(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        csv(tmp_path / "no.csv")
    with pytest.raises(BadInput, match="does not exist"):
        npz(tmp_path)


def test_real_hourly_data() -> None:
    path = SHARED / "ett" / "ETTh1.csv"
    if not path.exists():
        pytest.skip("no ETTh1.csv in ../shared/data/ett")
    found = csv(path, label="OT", columns=["date"])
    plain = np.genfromtxt(path, delimiter=",", skip_header=1, usecols=range(1, 8)).astype("f4")
    assert np.array_equal(found["x"].numpy(), plain[:, :6]) and np.array_equal(found["y"].numpy(), plain[:, 6])
    assert found.columns["date"][0] == "2016-07-01 00:00:00"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_round_trip(tmp_path: Path, save: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(6, 2, 3)),
        "y": rng.integers(0, 9, 6).astype(">u2"),
        "flag": rng.random(6) > 0.5,
        "tokens": np.asfortranarray(rng.integers(0, 99, (6, 4), dtype="i4")),
    }
    save(tmp_path / "a.npz", **arrays)
    found = npz(tmp_path / "a.npz")
    assert found["x"].dtype == torch.float32 and np.array_equal(found["x"].numpy(), arrays["x"].astype("f4"))
    for name in ("y", "flag", "tokens"):
        assert found[name].dtype == torch.int64 and found[name].tolist() == arrays[name].astype(int).tolist()
    save(
        tmp_path / "b.npz",
        images=np.full((3, 2, 2), 51, np.uint8),
        label=[5, 6, 7],
        key=[30, 10, 20],
        other=np.array(["w"]),
    )
    chosen = npz(tmp_path / "b.npz", columns={"x": "images", "y": "label", "id": "key"})
    torch.testing.assert_close(chosen["x"], torch.full((3, 1, 2, 2), 0.2))
    assert chosen["y"].tolist() == [5, 6, 7] and chosen.id.tolist() == [30, 10, 20] and not chosen.positional


def test_bad_npz_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def refused(error: type[Exception], message: str, **knobs: Any) -> None:
        with pytest.raises(error, match=message):
            npz(path, **knobs)

    np.savez(path, x=np.array([{"run": "code"}], dtype=object))
    refused(BadInput, "holds Python objects")
    np.savez(path, x=np.zeros((3, 2)), labels=np.zeros(3))
    refused(
        UnknownName, r"no array 'label'; did you mean 'labels'\? \(it has x, labels\)", columns={"x": "x", "y": "label"}
    )
    for array in (np.array(["a", "b"]), np.zeros(2, complex), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")])):
        np.savez(path, x=array)
        refused(BadInput, "holds values of type")
    np.savez(path, x=np.zeros(3), y=np.zeros(4))
    refused(BadInput, "differ in length")
    np.savez(path, x=np.array([1, np.nan]))
    refused(BadInput, "NaN or infinite values in 1 rows")
    np.savez(path, x=np.float64(3))
    refused(BadInput, "single value")
    np.savez(path, x=np.array([2**63], np.uint64))
    refused(BadInput, "64 bits")
    np.savez(path, x=np.zeros(2), id=np.array([0.5, 1]))
    refused(BadInput, "ids must be integers")
    np.savez(path, id=np.array([1, 2]))
    refused(BadInput, "no arrays")
    np.savez(path)
    refused(BadInput, "no arrays")
    write(path, b"PK\3\4 nonsense")
    refused(Corrupt, "cannot be read as .npz")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", b"no array")
    refused(Corrupt, "cannot be read as .npz")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros(2**24, np.uint8))
    assert path.stat().st_size < 2**16
    with pytest.raises(BadInput, match=r"16.0 MiB of memory where 1.0 MiB are allowed"):
        npz(path, max_bytes=2**20)
    with pytest.raises(BadInput, match=r"64.0 MiB of memory where 32.0 MiB are allowed"):  # bytes become float32
        npz(path, max_bytes=2**25)
    header = b"\x93NUMPY\1\0v\0" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }" % 10**15
    with zipfile.ZipFile(path, "w") as file:  # a small member whose header promises much
        file.writestr("x.npy", header.ljust(127) + b"\n" + bytes(80))
    with pytest.raises(Corrupt, match="promises 8000000000000000 bytes and has 80"):
        npz(path)


def test_no_damage_to_an_npz_goes_unnoticed_or_crashes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=rng.normal(size=(20, 3)), y=np.arange(20))
    raw, whole = path.read_bytes(), npz(path).fingerprint()
    for size in range(0, len(raw), 17):
        path.write_bytes(raw[:size])
        with pytest.raises(Corrupt):
            npz(path)
    for at in rng.choice(len(raw), 150, replace=False):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        with contextlib.suppress(RemanenceError):
            assert npz(path).fingerprint() == whole  # a byte that says nothing, such as a time


def test_real_fashion() -> None:
    path = SHARED / "fashion900" / "fashion900.npz"
    if not path.exists():
        pytest.skip("no fashion900.npz in ../shared/data/fashion900")
    found = npz(path)
    assert found["x"].shape == (900, 1, 28, 28) and found["y"].bincount().tolist() == [90] * 10
    assert np.array_equal((found["x"] * 255).round().numpy()[:, 0], np.load(path)["x"])


def test_fingerprints_in_another_process(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "a,y\n1,owl\n2,cat\n0.1,owl\n")
    np.savez(tmp_path / "a.npz", x=np.arange(6.0).reshape(3, 2))
    code = (
        "import sys, remanence as rm; "
        "print(rm.data.csv(sys.argv[1] + '/a.csv', label='y').fingerprint(), rm.data.npz(sys.argv[1] + '/a.npz').fingerprint())"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    expected = csv(tmp_path / "a.csv", label="y").fingerprint(), npz(tmp_path / "a.npz").fingerprint()
    assert seen.split() == list(expected)
