"""The digits, and idx files: round trips, damage, and real MNIST where it lies beside the repository."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput, Corrupt
from remanence.data import digits, idx, read_idx, split_digits, split_idx
from remanence.data.streams import STREAMS

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def write_idx(path: Path, array: np.ndarray, zipped: bool = False) -> Path:
    """The format from its own page (LeCun): two zeros, type, rank, big-endian sizes and values."""
    code = CODES[array.dtype.str[1:]]
    raw = struct.pack(">BBBB", 0, 0, code, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    return path


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path: Path, kind: str, zipped: bool) -> None:
    array = (np.random.default_rng(0).normal(size=(5, 3, 2)) * 50).astype(kind)
    found = read_idx(write_idx(tmp_path / "a", array, zipped))
    assert found.dtype == array.dtype and np.array_equal(found, array)
    assert read_idx(write_idx(tmp_path / "empty", array[:0], zipped)).shape == (0, 3, 2)


def test_every_truncation_and_damage_is_named(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "a", np.arange(6, dtype="u1").reshape(2, 3))
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(Corrupt):
            read_idx(path)
    zipped = gzip.compress(raw)
    for damaged in (
        raw + b"x",
        b"\1" + raw[1:],
        raw[:2] + b"\7" + raw[3:],
        zipped[:-3],
        zipped[:12] + b"\xff\xff" + zipped[14:],
        b"\x1f\x8b",
        b"PNG",
    ):
        path.write_bytes(damaged)
        with pytest.raises(Corrupt):
            read_idx(path)
    path.write_bytes(struct.pack(">BBBB", 0, 0, 8, 3) + struct.pack(">3I", *[2**32 - 1] * 3))  # promises 2^96 bytes
    with pytest.raises(Corrupt, match="promises"):
        read_idx(path)
    with pytest.raises(BadInput, match="does not exist"):
        read_idx(tmp_path / "nowhere")


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(struct.pack(">BBBB", 0, 0, 8, 1) + struct.pack(">I", 5) + bytes(2**24)))
    with pytest.raises(Corrupt, match="more than 5 bytes of values where its header promises 5"):
        read_idx(path)
    path.write_bytes(gzip.compress(struct.pack(">BBBB", 0, 0, 8, 1) + struct.pack(">I", 2**24) + bytes(2**24)))
    assert len(read_idx(path)) == 2**24
    with pytest.raises(BadInput, match=r"16.0 MiB of memory where 1.0 MiB are allowed"):
        read_idx(path, max_bytes=2**20)


def test_idx_pairs_images_with_labels(tmp_path: Path) -> None:
    pixels = np.array([[[0, 255], [51, 102]]] * 4, dtype="u1")
    images, labels = write_idx(tmp_path / "x", pixels), write_idx(tmp_path / "y", np.array([3, 1, 3, 1], dtype="u1"))
    examples = idx(images, labels, "mine")
    assert examples["x"].shape == (4, 1, 2, 2) and examples["y"].tolist() == [3, 1, 3, 1] and examples.source == "mine"
    torch.testing.assert_close(examples["x"][0, 0], torch.tensor([[0.0, 1.0], [0.2, 0.4]]))
    stream = split_idx(str(images), str(labels), tasks=2, test_share=0.5, flat=True)
    assert [task.classes for task in stream] == [(1,), (3,)] and stream[0].train["x"].shape == (1, 4)
    with pytest.raises(BadInput, match="do not belong together"):
        idx(images, write_idx(tmp_path / "z", np.arange(3, dtype="u1")))
    with pytest.raises(BadInput, match="do not belong together"):
        idx(labels, labels)


def test_the_digits() -> None:
    examples = digits()
    assert examples["x"].shape == (1797, 64) and float(examples["x"].min()) == 0 and float(examples["x"].max()) == 1
    assert (
        examples["y"].bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180] and examples.positional
    )
    stream = split_digits(tasks=5)
    assert [task.classes for task in stream] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert sum(len(task.train) + len(task.test) for task in stream) == 1797
    assert STREAMS["split-digits"](tasks=5).fingerprint() == stream.fingerprint()


def test_real_mnist() -> None:
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "mnist"
    found = {part: next(iter(sorted(folder.rglob(f"t10k-{part}*"))), None) for part in ("images", "labels")}
    if None in found.values():
        pytest.skip("no MNIST idx files (t10k-images*, t10k-labels*) in ../shared/data/mnist")
    examples = idx(found["images"], found["labels"])  # type: ignore[arg-type]
    assert examples["x"].shape == (10000, 1, 28, 28)
    assert examples["y"].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert examples["y"][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert float(examples["x"].max()) == 1 and float(examples["x"].mean()) == pytest.approx(0.1325, abs=1e-3)
