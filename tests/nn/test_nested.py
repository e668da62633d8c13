"""A nested state in one file comes back as it was, or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from remanence.core.errors import BadInput, Corrupt
from remanence.nn.nested import read, write


def test_everything_comes_back_with_its_type_and_bits(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "tensors": [shared, shared.T, shared[:0], torch.tensor(3), torch.tensor([1.5, math.nan], dtype=torch.bfloat16)],
        "flags": torch.tensor([True, False]),
        "numbers": {0: 1, -2: 2.5, 7: None},
        "words": {"a": "b", "": True, "empty": {}, "list": []},
        "odd": [math.inf, -math.inf],
    }
    write(tmp_path / "deep" / "state.safetensors", state)
    found = read(tmp_path / "deep" / "state.safetensors")
    for a, b in zip(state["tensors"], found["tensors"], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    assert torch.equal(found["flags"], state["flags"])
    assert {name: found[name] for name in ("numbers", "words", "odd")} == {
        name: state[name] for name in ("numbers", "words", "odd")
    }
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["state.safetensors"]
    found["tensors"][0].zero_()
    assert found["tensors"][1].any()  # each has memory of its own


def test_nan_comes_back_as_nan(tmp_path: Path) -> None:
    write(tmp_path / "state", {"value": math.nan})
    assert math.isnan(read(tmp_path / "state")["value"])


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": [0, object()]}}, r"state\.a\.b\[1\] is a object"),
        ({"$tensor": 1}, "begin with a"),
        ({"a": {"x": 1, 2: 3}}, r"state\.a has keys"),
        ({"a": {1, 2}}, "is a set"),
    ],
)
def test_what_cannot_be_written_is_said_and_the_old_file_stays(tmp_path: Path, state: dict, words: str) -> None:
    write(tmp_path / "state", {"old": 1})
    with pytest.raises(BadInput, match=words):
        write(tmp_path / "state", state)
    assert read(tmp_path / "state") == {"old": 1}


def test_damage_is_found(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no saved state"):
        read(tmp_path / "state")
    write(tmp_path / "state", {"value": torch.arange(100)})
    whole = (tmp_path / "state").read_bytes()
    for data in (whole[:-7], whole[:20], b"", whole.replace(b"remanence", b"remanent_"), b"\x80\x04pickle"):
        (tmp_path / "state").write_bytes(data)
        with pytest.raises(Corrupt, match="damaged"):
            read(tmp_path / "state")
