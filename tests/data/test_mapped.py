"""Columns that stay in their files: equal to columns in memory, at a fraction of the memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput, Corrupt, DataChanged
from remanence.core.ids import Ids
from remanence.data import Examples, cat, memmap, split_classes
from remanence.data.rows import Rows


def values(n: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 3, 2)).astype("f4"))


def pair(folder: Path, n: int = 40, seed: int = 0) -> tuple[Examples, Examples]:
    """The same table in a file and in memory."""
    x = values(n, seed)
    path = folder / f"x{seed}.npy"
    np.save(path, x.numpy())
    y, ids = np.arange(n) % 4, np.arange(n) * 3 + 1000 * seed
    return memmap(path, y, ids), Examples({"x": x, "y": torch.from_numpy(y)}, "memory", ids)


def test_every_way_of_reading_equals_the_column_in_memory(tmp_path: Path) -> None:
    (one, same), (two, also) = pair(tmp_path), pair(tmp_path, 9, 1)
    index = torch.tensor([7, 0, 39, 7, 21])
    cases = {
        "whole": (one, same),
        "chosen": (one.select(index), same.select(index)),
        "chosen twice": (one.select(index).select(index[:2] // 10), same.select(index).select(index[:2] // 10)),
        "none": (one.select(index[:0]), same.select(index[:0])),
        "only": (one.only(Ids([3, 9, 1])), same.only(Ids([3, 9, 1]))),
        "without": (one.without(Ids([3, 9, 1])), same.without(Ids([3, 9, 1]))),
        "two files": (cat([two, one.select(index)]), cat([also, same.select(index)])),
        "files again": (cat([cat([one, two]), two.select(index[1:2]), one]), cat([cat([same, also]), also.select(index[1:2]), same])),
    }  # fmt: skip
    for name, (found, expected) in cases.items():
        x, plain = found["x"], expected["x"]
        assert isinstance(x, Rows) and x.shape == plain.shape and x.dtype == plain.dtype and len(x) == len(plain), name
        assert found.fingerprint() == expected.fingerprint(), name
        assert (
            torch.equal(x[:], plain) and torch.equal(found["y"], expected["y"]) and torch.equal(found.id, expected.id)
        )
        if not len(plain):
            continue
        rows = torch.randint(0, len(plain), (11,), generator=torch.Generator().manual_seed(0))
        batch, wanted = found.batch(rows), expected.batch(rows)
        assert batch.keys() == wanted.keys() and all(torch.equal(batch[key], wanted[key]) for key in batch), name
        assert type(batch["x"]) is torch.Tensor
        for at in (0, -1, slice(1, 4), slice(None, None, 2), plain[:, 0, 0] > 0, (slice(None), 1), rows.reshape(-1, 1)):
            assert torch.equal(x[at], plain[at]), (name, at)
        for other in (x.flatten(1), x.reshape(len(x), -1)):  # what is not a choice of rows reads the whole
            assert type(other) is torch.Tensor and torch.equal(other, plain.flatten(1))
        assert float(x.mean()) == float(plain.mean()) and x.tolist() == plain.tolist()
        assert np.array_equal(x.numpy(), plain.numpy()) and torch.equal(
            torch.cat([x, plain]), torch.cat([plain, plain])
        )


def test_streams_of_a_mapped_column_stay_mapped(tmp_path: Path) -> None:
    one, same = pair(tmp_path)
    stream, plain = split_classes(one, tasks=2), split_classes(same, tasks=2)
    assert stream.fingerprint() == plain.fingerprint() and isinstance(stream[1].test["x"], Rows)


def test_arrays_raw_files_and_bytes(tmp_path: Path) -> None:
    raw = np.arange(24, dtype=">i2").reshape(4, 6)
    raw.tofile(tmp_path / "raw")
    found = memmap(tmp_path / "raw", dtype=">i2", shape=[4, 6])["x"]
    assert found.dtype == torch.int16 and found.tolist() == raw.tolist()
    opened = np.memmap(tmp_path / "raw", ">i2", "r", 12, (3, 6))  # an offset of its own
    assert memmap(opened, y=[1, 2, 3], columns={"document": ["a", "b", "c"]})["x"].tolist() == raw[1:].tolist()
    for view in (opened[1:], opened.T, opened.reshape(9, 2)):
        with pytest.raises(BadInput, match="as it was opened"):
            memmap(view)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 3, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "y.npy", np.arange(5, dtype=np.uint8))
    scaled = memmap(tmp_path / "pixels.npy", tmp_path / "y.npy", scale=1 / 255)
    torch.testing.assert_close(scaled["x"][:], torch.from_numpy(pixels).float() / 255)
    assert scaled["x"].dtype == torch.float32 and scaled["y"].tolist() == [0, 1, 2, 3, 4]
    assert memmap(tmp_path / "pixels.npy")["x"].dtype == torch.uint8


def test_a_written_map_is_seen_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    array = np.memmap(tmp_path / "a", "f4", "w+", shape=(6, 2))
    array[:] = 5
    examples = memmap(array)
    assert examples["x"][2].tolist() == [5, 5]
    chosen = examples.select(torch.tensor([1]))
    path = tmp_path / "a"
    for change in (
        lambda: path.write_bytes(path.read_bytes()[:-8]),  # truncated: a mapped read would kill the process
        lambda: os.replace(_copy(path), path),
        path.unlink,
    ):
        change()
        for broken in (examples, chosen):
            with pytest.raises(DataChanged, match="a was changed, replaced or removed"):
                broken.batch(torch.tensor([0]))


def _copy(path: Path) -> Path:
    other = path.with_suffix(".copy")
    other.write_bytes(bytes(48))
    return other


def test_bad_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.npy"
    np.save(good, np.ones((4, 3), "f4"))
    whole, bad = good.read_bytes(), tmp_path / "bad.npy"
    for size in [*range(0, 128, 9), 128, len(whole) - 1]:
        bad.write_bytes(whole[:size])
        with pytest.raises(Corrupt, match="cannot be mapped"):
            memmap(bad)
    np.save(bad, np.array([{"run": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(Corrupt, match=r"(?i)object"):
        memmap(bad)
    np.save(bad, np.array(["a", "b"]))
    with pytest.raises(BadInput, match="must be numbers"):
        memmap(bad)
    np.save(bad, np.asfortranarray(np.ones((4, 3))))
    with pytest.raises(BadInput, match="C order"):
        memmap(bad)
    np.save(bad, np.float32(1))
    with pytest.raises(BadInput, match="single value"):
        memmap(bad)
    with pytest.raises(BadInput, match="does not exist"):
        memmap(tmp_path / "nowhere.npy")
    with pytest.raises(BadInput, match="both dtype and shape"):
        memmap(good, dtype="f4")
    with pytest.raises(Corrupt, match="take 4000000000000"):
        memmap(good, dtype="f4", shape=[10**12])
    with pytest.raises(BadInput, match="differ in length"):
        memmap(good, [1, 2, 3])
    np.save(bad, np.array([[1, np.nan], [2, 3], [np.inf, 0]], "f4"))
    with pytest.raises(BadInput, match="'x' has NaN or infinite values in 2 rows"):
        memmap(bad).check()


def test_pieces_leave_no_row_out(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3000, 1024)).astype("f4")  # 12 MB: pieces of 2048 and 952 rows
    np.save(tmp_path / "x.npy", x)
    digest = hashlib.sha256(np.arange(3000).tobytes() + b"|x|torch.float32(3000, 1024)" + x.tobytes()).hexdigest()
    for examples in (memmap(tmp_path / "x.npy"), Examples({"x": torch.from_numpy(x)}, "memory")):
        assert examples.fingerprint() == digest
    x[[0, 900, 2047, 2048, 2999], [0, 7, 1023, 0, 1023]] = np.nan
    np.save(tmp_path / "y.npy", x)
    for examples in (memmap(tmp_path / "y.npy"), Examples({"x": torch.from_numpy(x)}, "memory")):
        with pytest.raises(BadInput, match="in 5 rows"):
            examples.check()


def test_a_column_too_large_to_load_says_so(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(5 * 2**30)
    huge = memmap(tmp_path / "huge", dtype="f4", shape=[5 * 2**18, 1024])
    assert huge["x"][-1].sum() == 0 and huge.select(torch.arange(3))["x"].flatten(1).shape == (3, 1024)
    with pytest.raises(BadInput, match="whole of a memory-mapped column"):
        huge["x"].mean()


def test_a_column_of_200_mb_takes_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "big", "wb") as file:
        file.truncate(200 * 2**20)
    code = """
import resource, sys, torch
import remanence as rm
examples = rm.data.memmap(sys.argv[1], dtype="f4", shape=[51200, 1024])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
examples.check()
examples.fingerprint()
rows = torch.randperm(51200, generator=torch.Generator().manual_seed(0))
for index in rows.split(1024):
    examples.batch(index)
half = examples.select(rows[::2])
half.fingerprint()
rm.data.cat([half, examples]).fingerprint()
print(peak() - before)
"""
    seen = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    assert float(seen.stdout) < 60


def test_a_life_learns_from_a_file_as_from_memory(tmp_path: Path) -> None:
    import remanence as rm

    x, y = values(120).flatten(1), torch.arange(120) % 4
    np.save(tmp_path / "x.npy", x.numpy())
    same = Examples({"x": x, "y": y}, "memmap")
    ends = []
    for examples, home in ((memmap(tmp_path / "x.npy", y), "file"), (same, "memory")):
        stream = split_classes(examples, tasks=2)
        life = rm.Life(torch.nn.Linear(6, 4), keep=[rm.keep.Replay(per_class=5)], home=tmp_path / home, seed=1)
        with torch.no_grad():
            for p in life.model.parameters():
                p.zero_()
        for task in stream:
            life.learn(task)
        life.forget(rm.Request(ids=stream[0].train.id[:20]), by="gradient-ascent")
        ends.append([p.detach().clone() for p in life.model.parameters()])
        life.close()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
