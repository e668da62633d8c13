"""CIFAR, Tiny ImageNet, ImageNet-R and CORe50: small copies in the official layouts, read back to the pixel."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput, Corrupt
from remanence.core.ids import Ids
from remanence.data import cifar as cifar_module
from remanence.data.cifar import cifar10, cifar100
from remanence.data.streams import examples_of, stream_of
from remanence.data.vision import core50, core50_stream, imagenet_r, tiny_imagenet

RNG = np.random.default_rng(0)
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def exact(x: torch.Tensor, pixels: np.ndarray) -> bool:
    """Whether (N, C, H, W) in [0, 1] are these bytes."""
    return torch.equal(x, torch.from_numpy(pixels.astype(np.float32)) / 255)


def put(path: Path, pixels: np.ndarray, **options: Any) -> None:
    image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(path, **options)


def records(labels: list[list[int]]) -> tuple[bytes, np.ndarray]:
    """Label bytes, then 3 x 32 x 32 pixels, for each row of labels."""
    pixels = RNG.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    return b"".join(bytes(row) + p.tobytes() for row, p in zip(labels, pixels, strict=True)), pixels


def ten(root: Path) -> dict[str, np.ndarray]:
    """A binary CIFAR-10 of two rows a file; pixels by file."""
    root.mkdir(parents=True, exist_ok=True)
    made = {}
    for k, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        raw, made[name] = records([[k], [9 - k]])
        (root / name).write_bytes(raw)
    (root / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return made


def hundred(root: Path) -> np.ndarray:
    """A binary CIFAR-100 whose test rows have superclasses 3 and 19 and classes 42 and 99."""
    root.mkdir(parents=True)
    raw, pixels = records([[3, 42], [19, 99]])
    (root / "test.bin").write_bytes(raw)
    (root / "train.bin").write_bytes(records([[0, 0]])[0])
    (root / "fine_label_names.txt").write_text("".join(f"fine_{k}\n" for k in range(100)))
    (root / "coarse_label_names.txt").write_text("".join(f"coarse_{k}\n" for k in range(20)))
    return pixels


def packed(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def test_cifar10(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    made = ten(folder)
    train = cifar10(folder)
    assert exact(train["x"], np.concatenate([made[f"data_batch_{k}.bin"] for k in range(1, 6)]))
    assert train["y"].tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and train["y"].dtype == torch.int64
    assert train.columns["name"] == [NAMES[c] for c in train["y"].tolist()] and train.positional
    test = cifar10(tmp_path, train=False)
    assert exact(test["x"], made["test_batch.bin"]) and test["y"].tolist() == [5, 4]
    archive = packed(tmp_path / "cifar-10-binary.tar.gz", folder)
    assert cifar10(archive).fingerprint() == train.fingerprint()
    assert examples_of({"cifar10": {"folder": str(archive), "train": False}}).fingerprint() == test.fingerprint()


def test_cifar100(tmp_path: Path) -> None:
    pixels = hundred(tmp_path / "cifar-100-binary")
    fine, coarse = (cifar100(tmp_path, train=False, coarse=coarse) for coarse in (False, True))
    assert exact(fine["x"], pixels) and torch.equal(fine["x"], coarse["x"])
    assert fine["y"].tolist() == coarse["fine"].tolist() == [42, 99]
    assert coarse["y"].tolist() == fine["coarse"].tolist() == [3, 19]
    assert fine.columns["name"] == ["fine_42", "fine_99"] and coarse.columns["name"] == ["coarse_3", "coarse_19"]
    archive = packed(tmp_path / "a.tar.gz", tmp_path / "cifar-100-binary")
    assert cifar100(archive, train=False).fingerprint() == fine.fingerprint()
    assert len(cifar100(tmp_path)) == 1


def test_cifar_damaged_and_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    ten(folder)
    with pytest.raises(BadInput, match=r"10 images would take 0.1 MiB"):
        cifar10(folder, max_bytes=1000)
    path, raw = folder / "data_batch_3.bin", (folder / "data_batch_3.bin").read_bytes()
    for size in (0, 1, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(Corrupt, match=rf"data_batch_3.bin has {size} bytes, no whole number of records of 3073"):
            cifar10(folder)
    path.write_bytes(bytes([10]) + raw[1:])
    with pytest.raises(Corrupt, match=r"data_batch_3.bin has a label 10 where there are 10 classes"):
        cifar10(folder)
    path.unlink()
    with pytest.raises(BadInput, match=r"has no data_batch_3.bin; give the unpacked cifar-10-binary.tar.gz"):
        cifar10(folder)
    (tmp_path / "elsewhere.bin").write_bytes(raw)
    path.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(BadInput, match=r"data_batch_3.bin is a link that leads out"):
        cifar10(folder)
    path.unlink()
    path.write_bytes(raw)
    archive = packed(tmp_path / "a.tar.gz", folder).read_bytes()
    for size in (0, 5, len(archive) // 2):
        (tmp_path / "a.tar.gz").write_bytes(archive[:size])
        with pytest.raises(Corrupt, match=r"cannot be read as a .tar.gz"):
            cifar10(tmp_path / "a.tar.gz")
    (tmp_path / "a.tar.gz").write_bytes(archive)
    monkeypatch.setattr(cifar_module, "_UNPACKED", 20_000)
    with pytest.raises(Corrupt, match="unpacks to more than 20000"):
        cifar10(tmp_path / "a.tar.gz")
    (folder / "batches.meta.txt").write_text("one\n")
    with pytest.raises(Corrupt, match=r"batches.meta.txt has 1 names where there are 10"):
        cifar10(folder)
    with pytest.raises(BadInput, match="does not exist"):
        cifar10(tmp_path / "nowhere")


def test_cifar_pickles_are_refused(tmp_path: Path) -> None:
    for name, load in (("cifar-10-batches-py", cifar10), ("cifar-100-python", cifar100)):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("data_batch_1", "train", "test", "meta"):
            (folder / file).write_bytes(b"\x80\x04.")
        for given in (folder, tmp_path, packed(tmp_path / f"{name}.tar.gz", folder)):
            with pytest.raises(BadInput, match=r"python or matlab version.* take the binary version, cifar-10"):
                load(given)


def test_a_link_in_an_archive_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    ten(folder)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for file in sorted(folder.iterdir()):
            if file.name == "test_batch.bin":
                link = tarfile.TarInfo(f"{folder.name}/test_batch.bin")
                link.type, link.linkname = tarfile.SYMTYPE, str(file)
                archive.addfile(link)
            else:
                archive.addfile(archive.gettarinfo(file, f"{folder.name}/{file.name}"), io.BytesIO(file.read_bytes()))
    assert len(cifar10(tmp_path / "a.tar.gz")) == 10
    with pytest.raises(BadInput, match=r"has no test_batch.bin"):
        cifar10(tmp_path / "a.tar.gz", train=False)


def tiny(root: Path) -> dict[str, np.ndarray]:
    """A Tiny ImageNet of three classes, not in the order of their names; its JPEGs are PNGs within, so that bytes are exact."""
    root.mkdir()
    (root / "wnids.txt").write_text("n02\nn03\nn01\n")
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn99\tentity\n")
    made = {f"train/{wnid}/images/{wnid}_{k}.JPEG": None for wnid in ("n01", "n02", "n03") for k in (0, 1, 10)}
    made |= {f"val/images/val_{k}.JPEG": None for k in range(4)}
    for name in made:
        made[name] = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        put(root / name, made[name], format="PNG")
    for wnid in ("n01", "n02", "n03"):
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (root / "val" / "val_annotations.txt").write_text(
        "val_2.JPEG\tn01\t0\t0\t9\t9\nval_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn03\t1\t1\t2\t2\n"
    )
    return made


def test_tiny_imagenet(tmp_path: Path) -> None:
    made = tiny(tmp_path / "t")
    train, test = tiny_imagenet(tmp_path / "t"), tiny_imagenet(tmp_path / "t", train=False)
    names = [f"train/{wnid}/images/{wnid}_{k}.JPEG" for wnid in ("n02", "n03", "n01") for k in (0, 1, 10)]
    assert train.columns["document"] == names and train["y"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert exact(train["x"], np.stack([made[name] for name in names]).transpose(0, 3, 1, 2))
    assert train.columns["name"][::3] == ["bullfrog", "n03", "goldfish, Carassius auratus"]
    assert test["y"].tolist() == [2, 0, 1]
    order = [f"val/images/val_{k}.JPEG" for k in (2, 0, 1)]
    assert exact(test["x"], np.stack([made[name] for name in order]).transpose(0, 3, 1, 2))
    assert tiny_imagenet(tmp_path / "t", size=8)["x"].shape == (9, 3, 8, 8)
    stream = stream_of(
        {"split-classes": {"source": {"tiny-imagenet": {"folder": str(tmp_path / "t"), "size": 8}}, "tasks": 3}}
    )
    assert [task.train["y"].unique().tolist() for task in stream] == [[0], [1], [2]]


def test_tiny_imagenet_damaged(tmp_path: Path) -> None:
    root = tmp_path / "t"
    tiny(root)
    with pytest.raises(BadInput, match=r"9 images of this size would take 0.4 MiB"):
        tiny_imagenet(root, max_bytes=1000)
    notes, text = root / "val" / "val_annotations.txt", (root / "val" / "val_annotations.txt").read_text()
    for line in ("val_3.JPEG\tn77\t0", "val_3.JPEG", "../../x.JPEG\tn01\t0"):
        notes.write_text(text + line + "\n")
        with pytest.raises(Corrupt, match=r"val_annotations.txt, line 4: no image and class"):
            tiny_imagenet(root, train=False)
    notes.write_text(text + "val_9.JPEG\tn01\t0\n")
    with pytest.raises(BadInput, match=r"has no val/images/val_9.JPEG"):
        tiny_imagenet(root, train=False)
    path = root / "train/n03/images/n03_1.JPEG"
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(Corrupt, match=r"train/n03/images/n03_1.JPEG cannot be read"):
        tiny_imagenet(root)
    path.unlink()
    put(tmp_path / "secret.png", np.zeros((64, 64, 3), np.uint8))
    path.symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadInput, match=r"n03_1.JPEG is a link that leads out"):
        tiny_imagenet(root)
    (root / "wnids.txt").write_text("n02\nn02\n")
    with pytest.raises(Corrupt, match="twice"):
        tiny_imagenet(root)
    (root / "wnids.txt").unlink()
    with pytest.raises(BadInput, match=r"has no wnids.txt"):
        tiny_imagenet(root)


def test_imagenet_r(tmp_path: Path) -> None:
    made = {}
    for wnid, count in (("n01443537", 10), ("n01484850", 5)):
        for k in range(count):
            name = f"{wnid}/art_{k}.jpg"
            made[name] = np.full((20 + k, 30, 3), RNG.integers(256), np.uint8)
            put(tmp_path / name, made[name], format="PNG")
    (tmp_path / "README.txt").write_text("ImageNet-R\n\nn01443537 goldfish\nn01484850 great white shark\n")
    train, test = (imagenet_r(tmp_path, size=(4, 6), train=train) for train in (True, False))
    assert (len(train), len(test)) == (12, 3) and test["y"].tolist() == [0, 0, 1] and train["x"].shape == (12, 3, 4, 6)
    assert not train.ids & test.ids and (train.ids | test.ids) == Ids(range(15))
    everything = sorted(made)
    for part in (train, test):
        assert part.columns["document"] == [everything[k] for k in part.id.tolist()]
        assert exact(part["x"][:, 0, 0, 0], np.array([made[name][0, 0, 0] for name in part.columns["document"]]))
    assert test.columns["name"] == ["goldfish", "goldfish", "great white shark"]
    other = imagenet_r(tmp_path, size=(4, 6), train=False, seed=1)
    assert other["y"].tolist() == [0, 0, 1] and other.ids != test.ids
    with pytest.raises(BadInput, match="no class folders such as n01443537"):
        imagenet_r(tmp_path / "n01443537", size=4)


def core(root: Path, objects: int, sessions: tuple[int, ...], frames: int = 1) -> dict[str, np.ndarray]:
    made = {}
    for s in sessions:
        for o in range(1, objects + 1):
            for f in range(frames):
                name = f"s{s}/o{o}/C_{s:02}_{o:02}_{f:03}.png"
                made[name] = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                put(root / name, made[name])
    return made


def test_core50(tmp_path: Path) -> None:
    made = core(tmp_path / "core50_128x128", 10, (1, 2, 3, 10, 11), frames=2)
    train, test = core50(tmp_path), core50(tmp_path / "core50_128x128", train=False, label="category")
    assert train["session"].unique().tolist() == [1, 2, 11] and test["session"].unique().tolist() == [3, 10]
    assert torch.equal(train["y"], train["object"]) and torch.equal(test["y"], test["object"] // 5)
    for part in (train, test):
        names = part.columns["document"]
        assert exact(part["x"], np.stack([made[name] for name in names]).transpose(0, 3, 1, 2))
        marks = [(int(name[1 : name.index("/")]), int(name.split("/o")[1].split("/")[0]) - 1) for name in names]
        assert list(zip(part["session"].tolist(), part["object"].tolist(), strict=True)) == marks
    assert not train.ids & test.ids and len(train) + len(test) == len(made) and train.positional
    assert set(test.columns["name"]) == {"plug adapter", "mobile phone"}


def test_core50_streams(tmp_path: Path) -> None:
    core(tmp_path, 10, (1, 2, 3, 11))
    ni = stream_of({"core50": {"folder": str(tmp_path), "scenario": "ni", "label": "category"}})
    sessions = [task.train["session"].unique().tolist() for task in ni]
    assert sorted(sessions) == [[1], [2], [11]] and ni.scenario == "domain"
    assert all(task.test["session"].unique().tolist() == [3] and task.classes == (0, 1) for task in ni)
    assert ni[0].names == ("plug adapter", "mobile phone")
    nc = core50_stream(tmp_path, "nc", seed=1)
    assert [len(task.classes) for task in nc] == [2, *8 * [1]] and nc.scenario == "class"
    assert sorted(c for task in nc for c in task.classes) == list(range(10))
    for task in nc:
        assert set(task.train["y"].tolist()) == set(task.test["y"].tolist()) == set(task.classes)
        assert task.train["session"].unique().tolist() == [1, 2, 11] and not task.train.ids & task.test.ids
    assert (
        nc.fingerprint() == core50_stream(tmp_path, "nc", seed=1).fingerprint() != core50_stream(tmp_path).fingerprint()
    )
    named = {c: name for task in nc for c, name in zip(task.classes, task.names, strict=True)}
    assert named[0] == "plug adapter 1" and named[9] == "mobile phone 5"
    with pytest.raises(BadInput, match=r"has 2 classes; the scenario nc"):
        core50_stream(tmp_path, "nc", label="category")


def test_core50_foreign(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no frames of these sessions"):
        core50(tmp_path)
    core(tmp_path, 2, (1,))
    with pytest.raises(BadInput, match="has no test sessions"):
        core50_stream(tmp_path)
    for wrong in ({"label": "animal"}, {"train": False}):
        with pytest.raises(BadInput, match=r"not one of object, category|no frames"):
            core50(tmp_path, **wrong)
    with pytest.raises(BadInput, match="not one of ni, nc"):
        core50_stream(tmp_path, "nic")
    (tmp_path / "s1/o2/C_01_02_000.png").rename(tmp_path / "s1/o2/C_01_03_000.png")
    with pytest.raises(BadInput, match=r"s1/o2/C_01_03_000.png is no frame of session 1 and object 2"):
        core50(tmp_path)
