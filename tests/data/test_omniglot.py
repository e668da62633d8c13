"""Omniglot: small copies in the official layout, read back to the pixel; the real one where it lies at hand."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput, Corrupt
from remanence.data import Request, split_classes
from remanence.data.omniglot import omniglot
from remanence.data.streams import examples_of

image = pytest.importorskip("PIL.Image", reason="images need Pillow")
CHARACTERS = [("Greek", 2), ("Greek", 1), ("Latin", 1)]


def drawn(root: Path, drawers: int = 4) -> dict[str, np.ndarray]:
    """A folder as the official archive unpacks; ink by document."""
    made = {}
    for number, (alphabet, character) in enumerate(CHARACTERS):
        for drawer in range(1, drawers + 1):
            ink = np.random.default_rng([number, drawer]).random((105, 105)) < 0.2
            name = f"{alphabet}/character{character:02}/{700 - number:04}_{drawer:02}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(~ink).convert("1").save(root / name)
            made[name] = ink
    return made


def packed(path: Path, root: Path, **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in sorted(root.rglob("*"), reverse=True):  # in no order that matters
            archive.write(each, Path(root.name) / each.relative_to(root))
        archive.writestr("__MACOSX/images/Greek/character01/._0699_01.png", b"a fork")
        for name, raw in extra.items():
            archive.writestr(name.replace("__", "/") + ".png", raw)
    return path


def test_read_to_the_pixel(tmp_path: Path) -> None:
    root = tmp_path / "images_background"
    made = drawn(root)
    data = omniglot(root, size=None)
    assert data["x"].shape == (12, 1, 105, 105) and data.positional and data.id.tolist() == list(range(12))
    for x, name in zip(data["x"], data.columns["document"], strict=True):
        assert torch.equal(x[0], torch.from_numpy(made[name].astype(np.float32)))  # 1 is ink
    assert data["y"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and data["drawer"].tolist() == [1, 2, 3, 4] * 3
    assert data.columns["alphabet"] == ["Greek"] * 8 + ["Latin"] * 4
    assert data.columns["name"][::4] == ["Greek/character01", "Greek/character02", "Latin/character01"]
    small = omniglot(root)
    assert small["x"].shape == (12, 1, 28, 28) and small["x"].min() >= 0 and small["x"].max() <= 1
    torch.testing.assert_close(small["x"].mean((1, 2, 3)), data["x"].mean((1, 2, 3)), atol=0.01, rtol=0)  # antialiased


def test_archives_and_folders_are_alike_and_nothing_is_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "images_background"
    drawn(root)
    archive = packed(tmp_path / "a.zip", root)
    before = sorted(tmp_path.rglob("*"))
    zipped = omniglot(archive)
    assert sorted(tmp_path.rglob("*")) == before
    for other in (omniglot(root), examples_of({"omniglot": {"path": str(root)}})):
        assert torch.equal(zipped["x"], other["x"]) and torch.equal(zipped["y"], other["y"])
        assert [f"images_background/{name}" for name in other.columns["document"]] == zipped.columns["document"]
    archive.rename(tmp_path / "images_background" / "a.zip")
    assert omniglot(tmp_path).fingerprint() == zipped.fingerprint()  # the folder above it
    asked = Request(documents=[zipped.columns["document"][3]])
    assert asked.asked() == {"documents": ["images_background/Greek/character01/0699_04.png"]}


def test_what_is_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "images_background"
    drawn(root)
    with pytest.raises(BadInput, match="does not exist"):
        omniglot(tmp_path / "none.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="has no images such as Greek"):
        omniglot(tmp_path / "empty")
    with pytest.raises(BadInput, match=r"12 images of this size would take"):
        omniglot(root, max_bytes=12 * 28 * 28 * 4 - 1)
    twice = packed(tmp_path / "twice.zip", root, other__Greek__character01__0001_02=b"")
    with pytest.raises(BadInput, match="are the same character and drawer"):
        omniglot(twice)
    raw = packed(tmp_path / "a.zip", root).read_bytes()
    for name, bad in (
        ("half", raw[: len(raw) // 2]),
        ("text", b"no archive"),
        ("flipped", raw[:300] + b"\x55" * 60 + raw[360:]),
    ):
        path = tmp_path / f"{name}.zip"
        path.write_bytes(bad)
        with pytest.raises(Corrupt, match="cannot be read"):
            omniglot(path)
    for name, bad in (("Greek__character09__0001_01", b"no image"), ("Greek__character09__0001_02", bytes(2**20 + 1))):
        path = packed(tmp_path / "b.zip", root, **{name: bad})
        with pytest.raises(
            Corrupt, match=r"character09/0001_0. (cannot|unpacks)|character09/0001_0.\.png (cannot|unpacks)"
        ):
            omniglot(path)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "images_background"
    drawn(root)
    here = root / "Latin/character01/0698_01.png"
    here.rename(tmp_path / "elsewhere.png")
    here.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(BadInput, match="leads out"):
        omniglot(root)


def test_the_real_one_is_a_stream_of_fifty_tasks() -> None:
    path = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "omniglot" / "images_background_small1.zip"
    if not path.is_file():
        pytest.skip("no images_background_small1.zip in ../shared/data/omniglot")
    data = omniglot(path)
    characters = len(data["y"].unique())
    assert len(data) == 20 * characters and characters >= 106
    assert torch.bincount(data["y"]).tolist() == [20] * characters
    assert torch.bincount(data["drawer"]).tolist() == [0, *[characters] * 20]
    assert data["x"].min() == 0 and data["x"].max() <= 1 and 0.02 < float(data["x"].mean()) < 0.2  # ink is rare
    stream = split_classes(data, [[2 * k, 2 * k + 1] for k in range(50)], test_share=0.25)
    assert len(stream) == 50 and all((len(task.train), len(task.test)) == (30, 10) for task in stream)
    stream.tasks[0].train.check()
