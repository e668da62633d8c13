"""Snapshots: round trips of every kind of tensor, sharing, damage, sweeping."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.core.errors import BadInput, Corrupt, StorageError
from remanence.life import files
from remanence.life.snapshots import Snapshots, tensor_sha256, weights_sha256

torch.set_num_threads(1)


def same(a: Any, b: Any) -> bool:
    """Equal structure, and tensors equal in every bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and tensor_sha256(a) == tensor_sha256(b)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def big(value: float = 0.0) -> torch.Tensor:
    return torch.arange(20_000, dtype=torch.float32) + value


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    base = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    state = {
        "bf16": base.bfloat16(),
        "half": base[:3].half(),
        "double": base[:3].double(),
        "bool": base > 0,
        "int": torch.tensor([2**62, -1]),
        "byte": torch.Generator().manual_seed(3).get_state(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "turned": base.T,
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1, 5).expand(4, 5),
        "shared": [base, base.view(-1), base[:10]],
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "complex": torch.tensor([1 + 2j]).conj(),
        "json": {
            "a": [1, 2.5, None, True, "é", {}],
            "best": math.inf,
            "worst": -math.inf,
            "nan": math.nan,
            "big": 2**64 + 1,
            "none": {},
            "list": [],
        },
    }
    store = Snapshots(tmp_path)
    manifest = json.loads(json.dumps(store.save(state)))  # what the ledger keeps
    back = store.load(manifest)
    assert same({**state, "complex": state["complex"].resolve_conj()}, back)
    back["shared"][0].zero_()
    assert back["shared"][1].abs().sum() > 0
    assert all(tensor.is_contiguous() for tensor in (back["turned"], back["strided"]))
    assert not list((tmp_path / "work").iterdir())


def test_an_optimizer_and_a_model_go_on_with_the_same_bits(tmp_path: Path) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    store = Snapshots(tmp_path)
    manifest = store.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(model, optimizer)
    other = torch.nn.Linear(5, 3)
    again = torch.optim.AdamW(other.parameters())
    state = store.load(manifest)
    other.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    step(other, again)
    assert weights_sha256(other.state_dict()) == weights_sha256(model.state_dict())


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 255), max_size=6).map(lambda values: torch.tensor(values, dtype=torch.uint8)),
)
keys = st.text(max_size=4).filter(lambda key: not key.startswith("$"))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(keys, trees, max_size=3))
def test_any_state_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    store = Snapshots(tmp_path_factory.getbasetemp() / "any")
    back = store.load(json.loads(json.dumps(store.save(state))))
    assert same({key: state[key] for key in state}, back)


def test_what_did_not_change_is_stored_once(tmp_path: Path) -> None:
    store = Snapshots(tmp_path)
    first = store.save({"a": big(), "b": big(1), "small": torch.ones(3)})
    count = len(list(tmp_path.rglob("*.safetensors")))
    assert count == 3
    assert store.save({"b": big(1), "a": big(), "small": torch.ones(3)})["state"] == first["state"]
    assert len(list(tmp_path.rglob("*.safetensors"))) == count
    second = store.save({"a": big(), "b": big(2), "small": torch.zeros(3)})
    assert len(list(tmp_path.rglob("*.safetensors"))) == count + 2
    assert second["state"]["a"] == first["state"]["a"]
    assert store.bytes(first) == sum((tmp_path / name).stat().st_size for name in store.files(first)) > 160_000


def test_sweep_removes_what_nobody_names(tmp_path: Path) -> None:
    store = Snapshots(tmp_path)
    old = store.save({"a": big(), "b": big(1), "s": torch.tensor([1.0])})
    new = store.save({"a": big(), "b": big(2), "s": torch.tensor([2.0])})
    gone = sorted(set(store.files(old)) - set(store.files(new)))
    assert store.sweep([old, new]) == []
    assert store.sweep([new], dry=True) == gone and all((tmp_path / name).exists() for name in gone)
    assert store.sweep([new]) == gone and len(gone) == 2
    assert not any((tmp_path / name).exists() for name in gone)
    assert same(store.load(new)["b"], big(2))
    with pytest.raises(Corrupt, match="missing"):
        store.load(old)
    assert store.sweep([new]) == []
    store.sweep([])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nothing_swept_stays_in_a_pack(tmp_path: Path) -> None:
    store = Snapshots(tmp_path)
    secret = torch.tensor([0x5EC12E7], dtype=torch.int64)
    store.save({"buffer": secret, "kept": torch.ones(2)})
    keep = store.save({"buffer": torch.zeros(1, dtype=torch.int64), "kept": torch.ones(2)})
    store.sweep([keep])
    pattern = secret.numpy().tobytes()
    assert not any(pattern in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("which", ["big", "small"])
@pytest.mark.parametrize("how", ["cut", "empty", "gone", "longer", "flip", "other"])
def test_damage_is_named(tmp_path: Path, which: str, how: str) -> None:
    store = Snapshots(tmp_path)
    manifest = store.save({"big": big(), "small": torch.ones(3), "also": torch.zeros(2, 2)})
    node = manifest["state"][which]
    path = store._path(node.get("pack", node["tensor"]))
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "other":  # a good file of another tensor in its place
        other = store.save({"big": big(5), "small": torch.ones(4)})["state"][which]
        path.write_bytes(store._path(other.get("pack", other["tensor"])).read_bytes())
    else:
        path.write_bytes(
            {
                "cut": whole[:-7],
                "empty": b"",
                "longer": whole + b"x",
                "flip": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
            }[how]
        )
    with pytest.raises(Corrupt, match="restore") as caught:
        store.load(manifest)
    assert str(path) in str(caught.value)


def test_every_flipped_byte_is_found_or_harmless(tmp_path: Path) -> None:
    store = Snapshots(tmp_path)
    state = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    manifest = store.save(state)
    [path] = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert same(store.load(manifest), state), place
        except Corrupt as error:
            assert str(path) in str(error)


def test_an_altered_manifest(tmp_path: Path) -> None:
    store = Snapshots(tmp_path)
    manifest = store.save({"a": big()})
    for change in ({"format": "x"}, {"digest": "0" * 64}, {"state": {}}):
        with pytest.raises(Corrupt, match="manifest"):
            store.load({**manifest, **change})
    evil = {"a": {"tensor": "../../../etc/passwd", "dtype": "float32", "shape": [1]}}
    with pytest.raises(Corrupt, match="impossible"):
        store.load({**manifest, "state": evil, "digest": files.sha256(files.canonical(evil))})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"a": {"b": [object()]}}, r"state\.a\.b\[0\] is a object"),
        ({"a": torch.ones(2).to_sparse()}, r"state\.a .*sparse"),
        ({"a": torch.ones(2, device="meta")}, "meta"),
        ({"tensor": 1, "dtype": 2, "shape": 3}, "reserved"),
        ({"a": {"$ints": 1}}, "reserved"),
        ({"a": {1: 2, "b": 3}}, "neither all strings nor all integers"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, bad: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Snapshots(tmp_path).save(bad)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Snapshots(tmp_path)
    first = store.save({"a": big(), "s": torch.ones(2)})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        with pytest.raises(StorageError, match="disk is full"):
            store.save({"a": big(1), "s": torch.zeros(2)})
    assert not list((tmp_path / "work").iterdir())
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")) == store.files(first)
    assert same(store.load(first)["a"], big())


def test_weights_digest(tmp_path: Path) -> None:
    a, b = torch.ones(2, 3), torch.zeros(3)
    digest = weights_sha256({"a": a, "b": b})
    assert digest == weights_sha256({"b": b.clone(), "a": a.T.contiguous().T}) and len(digest) == 64
    others = [
        {"a": a},
        {"a": b, "b": a},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.half(), "b": b},
        {"a": a, "c": b},
        {"a": a, "b": -b},
    ]
    assert len({digest, *(weights_sha256(other) for other in others)}) == 7
