"""A nested state in one file: tensors as safetensors, all the rest as JSON in the file's header. No pickle."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from remanence.core.errors import BadInput, Corrupt

_KEY, _TENSOR, _INTS, _FLOAT = "remanence", "$tensor", "$ints", "$float"


def write(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`, whole or not at all; missing folders are made.

    Args:
        state: nested dicts (str or int keys) and lists of tensors (any device) and JSON values; tuples come back as lists.

    Raises:
        BadInput: a value that is neither tensor nor JSON; names its place.
    """
    tensors: dict[str, Tensor] = {}
    tree = _packed(state, "state", tensors)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(save(tensors, metadata={_KEY: json.dumps(tree, allow_nan=False)}))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read(path: str | Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU.

    Raises:
        BadInput: there is no such file.
        Corrupt: it is truncated, or was not written by `write`.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no saved state at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            tree = json.loads(file.metadata()[_KEY])
            found: dict[str, Any] = _unpacked(tree, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} is no saved state, or is damaged ({error}); restore it from a copy") from None
    return found


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if value and all(isinstance(key, int) and not isinstance(key, bool) for key in value):
            return {_INTS: {str(key): _packed(item, f"{place}[{key}]", tensors) for key, item in value.items()}}
        if any(not isinstance(key, str) or key.startswith("$") for key in value):
            raise BadInput(f"{place} has keys that are neither all words nor all whole numbers, or begin with a $")
        return {key: _packed(item, f"{place}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(item, f"{place}[{at}]", tensors) for at, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is not None and not isinstance(value, str | bool | int | float):
        raise BadInput(f"{place} is a {type(value).__name__}; a saved state holds tensors and JSON values only")
    return value


def _unpacked(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpacked(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _INTS in tree:
        return {int(key): _unpacked(item, tensors) for key, item in tree[_INTS].items()}
    if _FLOAT in tree:
        return float(tree[_FLOAT])
    return {key: _unpacked(item, tensors) for key, item in tree.items()}
