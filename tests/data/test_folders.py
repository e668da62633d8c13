"""Image folders: pixels, labels, sizes and damaged or hostile files."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput, Corrupt, RemanenceError, UnknownName
from remanence.data import images, split_classes

Image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")


def put(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def folder(root: Path) -> dict[str, np.ndarray]:
    """Two classes of five small images in several formats; the pixels by name."""
    rng = np.random.default_rng(0)
    made = {
        name: rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        for name in ("owl/b.png", "owl/a.bmp", "cat/10.png", "cat/2.tif", "cat/3.PPM")
    }
    for name, pixels in made.items():
        put(root / name, pixels)
    return made


def test_pixels_labels_and_names(tmp_path: Path) -> None:
    made = folder(tmp_path)
    found = images(tmp_path)
    names = ["cat/10.png", "cat/2.tif", "cat/3.PPM", "owl/a.bmp", "owl/b.png"]
    assert found.columns["document"] == names and found["y"].tolist() == [0, 0, 0, 1, 1]
    assert found["x"].shape == (5, 3, 4, 5) and found.positional and found.source == "images"
    expected = np.stack([made[name] for name in names]).transpose(0, 3, 1, 2).astype("f4") / 255
    assert np.array_equal(found["x"].numpy(), expected)
    gray = images(tmp_path, gray=True)["x"]
    luma = (torch.from_numpy(expected) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(gray, luma, atol=1 / 254, rtol=0)
    assert images(tmp_path, classes=["owl", "dog", "cat"])["y"].tolist() == [2, 2, 2, 0, 0]
    stream = split_classes(found, tasks=2, test_share=0.4)
    assert [len(task.train) for task in stream] == [2, 1]


def test_sizes(tmp_path: Path) -> None:
    folder(tmp_path)
    put(tmp_path / "owl" / "c.png", np.full((8, 10, 3), 51, np.uint8))
    with pytest.raises(BadInput, match=r"owl/c.png is 8 x 10 where cat/10.png is 4 x 5 .*give size="):
        images(tmp_path)
    small = images(tmp_path, size=(2, 3))["x"]
    assert small.shape == (6, 3, 2, 3) and images(tmp_path, size=6)["x"].shape == (6, 3, 6, 6)
    torch.testing.assert_close(small[5], torch.full((3, 2, 3), 0.2))
    for size in (0, (1, 2, 3), (0, 4)):
        with pytest.raises(BadInput, match="must be a positive number"):
            images(tmp_path, size=size)


def test_modes_become_three_channels(tmp_path: Path) -> None:
    put(tmp_path / "a" / "gray.png", np.full((2, 2), 102, np.uint8))
    put(tmp_path / "a" / "bits.png", np.array([[True, False], [False, True]]))
    Image.new("P", (2, 2)).save(tmp_path / "a" / "palette.gif")
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "a" / "with_alpha.png")
    bits, gray, palette, alpha = images(tmp_path)["x"]
    assert bits[0].tolist() == [[1, 0], [0, 1]] and palette.max() == 0 and alpha[:, 0, 0].tolist() == [1, 0, 0]
    torch.testing.assert_close(gray, torch.full((3, 2, 2), 0.4))
    put(tmp_path / "a" / "deep.png", np.full((2, 2), 40_000, np.uint16))
    with pytest.raises(BadInput, match=r"a/deep.png has more than 8 bits"):
        images(tmp_path)


def test_hidden_files_are_passed_over_and_strangers_are_not(tmp_path: Path) -> None:
    folder(tmp_path)
    before = images(tmp_path).fingerprint()
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    put(tmp_path / ".cache" / "a.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "README.md").write_text("about")
    assert images(tmp_path).fingerprint() == before
    (tmp_path / "cat" / "notes.txt").write_text("x")
    with pytest.raises(BadInput, match=r"cat/notes.txt is not known as an image \(.png"):
        images(tmp_path)
    (tmp_path / "cat" / "notes.txt").unlink()
    (tmp_path / "cat" / "inner").mkdir()
    with pytest.raises(BadInput, match="cat/inner is no file"):
        images(tmp_path)
    (tmp_path / "cat" / "inner").rmdir()
    (tmp_path / "dog").mkdir()
    with pytest.raises(BadInput, match="the class folder 'dog' has no images"):
        images(tmp_path)
    with pytest.raises(UnknownName, match=r"folder 'owl' that is not among .*did you mean 'owls'"):
        images(tmp_path, classes=["cat", "dog", "owls"])


def test_links_inside_are_followed_and_links_outside_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder(root)
    (root / "owl" / "again.png").symlink_to(root / "cat" / "10.png")
    assert len(images(root)) == 6
    secret = put(tmp_path / "secret" / "s.png", np.zeros((4, 5, 3), np.uint8))
    (root / "owl" / "s.png").symlink_to(secret)
    with pytest.raises(BadInput, match=r"owl/s.png is a link that leads out"):
        images(root)
    (root / "owl" / "s.png").unlink()
    (root / "dog").symlink_to(secret.parent)
    with pytest.raises(BadInput, match=r"dog/s.png is a link that leads out"):
        images(root)
    (root / "dog").unlink()
    (root / "owl" / "nowhere.png").symlink_to(root / "owl" / "missing.png")
    with pytest.raises(BadInput, match=r"nowhere.png is no file"):
        images(root)
    linked = tmp_path / "linked"
    (root / "owl" / "nowhere.png").unlink()
    linked.symlink_to(root)
    assert images(linked).fingerprint() == images(root).fingerprint()


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_damaged_images_are_named(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    path = put(tmp_path / "a" / f"x.{suffix}", rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    raw = path.read_bytes()
    for size in (0, 1, 8, len(raw) // 3, 2 * len(raw) // 3):
        path.write_bytes(raw[:size])
        with pytest.raises(Corrupt, match=rf"a/x.{suffix} cannot be read"):
            images(tmp_path)
    for at in rng.choice(
        len(raw), 40, replace=False
    ):  # whatever else is wrong: our error or an image, never another exception
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        with contextlib.suppress(RemanenceError):
            images(tmp_path, max_pixels=10_000)


def test_a_wrong_suffix_is_forgiven_and_an_odd_format_is_not(tmp_path: Path) -> None:
    pixels = np.full((4, 5, 3), 51, np.uint8)
    put(tmp_path / "a" / "x.jpg", pixels, format="PNG")
    torch.testing.assert_close(images(tmp_path)["x"], torch.full((1, 3, 4, 5), 0.2))
    put(tmp_path / "a" / "y.png", pixels, format="PCX")  # Pillow reads it, but fewer decoders are a smaller target
    with pytest.raises(Corrupt, match=r"a/y.png cannot be read"):
        images(tmp_path)


def test_bombs_and_limits(tmp_path: Path) -> None:
    path = put(tmp_path / "a" / "bomb.png", np.zeros((3000, 3000), np.uint8))
    assert path.stat().st_size < 20_000
    with pytest.raises(BadInput, match=r"a/bomb.png has 3000 x 3000 pixels, more than max_pixels=1000000"):
        images(tmp_path, size=8, max_pixels=1_000_000)
    assert images(tmp_path, size=8, gray=True)["x"].shape == (1, 1, 8, 8)
    with pytest.raises(BadInput, match=r"1 images of this size would take 103.0 MiB of memory where 1.0 MiB"):
        images(tmp_path, max_bytes=2**20)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a" / "bomb.png")  # beyond what Pillow itself accepts
    with pytest.raises(BadInput, match=r"a/bomb.png has more pixels"):
        images(tmp_path, size=8)


def test_no_folder_no_class_no_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="is no folder"):
        images(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="has no folders"):
        images(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BadInput, match=r"remanence\[images\]"):
        images(tmp_path)


def test_fingerprints_in_another_process(tmp_path: Path) -> None:
    folder(tmp_path)
    code = "import sys, remanence as rm; print(rm.data.images(sys.argv[1], size=3).fingerprint())"
    seen = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert seen.strip() == images(tmp_path, size=3).fingerprint()


def test_real_omniglot(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "omniglot" / "images_background_small1.zip"
    if not path.exists():
        pytest.skip("no images_background_small1.zip in ../shared/data/omniglot")
    with zipfile.ZipFile(path) as file:
        names = [name for name in file.namelist() if name.endswith(".png") and "__MACOSX" not in name]
        alphabet = names[0].split("/")[1]
        mine = [name for name in names if name.split("/")[1] == alphabet]
        file.extractall(tmp_path, mine)
    root = tmp_path / mine[0].split("/")[0] / alphabet
    found = images(root, gray=True)
    characters = len({name.split("/")[2] for name in mine})
    assert found["x"].shape == (20 * characters, 1, 105, 105) and found["y"].bincount().tolist() == [20] * characters
    assert found["x"].unique().tolist() == [0, 1] and 0.9 < float(found["x"].mean()) < 1  # black ink on white
    shutil.rmtree(root)
