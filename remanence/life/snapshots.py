"""Snapshots of a life's state as content-addressed safetensors files: what did not change between two snapshots lies on
the disk once.

    HOME/snapshots/ab34....safetensors

A tensor of 64 KiB or more is a file of its own, named by the sha256 of its dtype, shape and little-endian bytes. The
smaller ones of a snapshot share one file (a *pack*), so that a state of a hundred small
tensors does not wait for the disk a hundred times; a pack holds the tensors of one snapshot only, hence nothing older
than itself.
The *manifest* is JSON: the state's structure with each tensor replaced by {"tensor": sha256, "dtype": ..., "shape":
[...]} (and "pack").
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from remanence.core.errors import BadInput, Corrupt
from remanence.life.files import canonical, plain_errors, sha256, sync_folder, write_atomic

__all__ = ["Snapshots", "tensor_sha256", "weights_sha256"]

_FORMAT: Final = "remanence-snapshot-1"
_SMALL: Final = 64 * 1024  # bytes
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENSOR: Final = frozenset({"tensor", "dtype", "shape"})
_INTS: Final = "$ints"  # a dict with int keys, as optimizers have
_FLOAT: Final = "$float"  # nan, inf, -inf, which JSON lacks
_DTYPES: Final = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}


class Snapshots:
    """Saves, loads and sweeps the snapshots of a home.

    Args:
        home: the life's folder; files go to ``home/snapshots``, unfinished ones to ``home/work``.
    """

    def __init__(self, home: str | Path) -> None:
        self.home = Path(home)
        self.folder = self.home / "snapshots"
        self._work = self.home / "work"
        self._unsettled = False  # files were renamed into the folder and its entries not flushed yet

    def save(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a state and returns its manifest; when this returns, every file is on the disk.

        Args:
            state: nested dicts (str or int keys) and lists of tensors (any device) and JSON values; tuples come back as
                lists. Tensors that share memory come back as equal copies.

        Raises:
            BadInput: a value that is neither tensor nor JSON, or a tensor without plain memory (sparse, quantized,
                meta); names its place.
            StorageError: full, read-only or failing disk; files already written stay until the next `sweep`.
        """
        small: dict[str, Tensor] = {}
        nodes: list[dict[str, Any]] = []
        tree = self._store(state, "state", small, nodes)
        if small:
            pack = sha256("pack " + " ".join(sorted(small)))
            for node in nodes:
                node["pack"] = pack
            if not self._path(pack).exists():
                self._write(pack, {name: small[name] for name in sorted(small)})
        if self._unsettled:
            sync_folder(self.folder)
            self._unsettled = False
        return {"format": _FORMAT, "state": tree, "digest": sha256(canonical(tree))}

    def load(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The state, on the CPU; every tensor was checked against its hash.

        Raises:
            Corrupt: the manifest was altered, or a file is missing, truncated or altered; names it, and nothing is
                returned.
        """
        tree = self._tree(manifest)
        packs: dict[str, dict[str, Tensor]] = {}
        wanted: dict[str, set[str]] = {}
        for node in _tensors(tree):
            wanted.setdefault(node.get("pack", node["tensor"]), set()).add(node["tensor"])
        state = self._restore(tree, packs, wanted)
        assert isinstance(state, dict)
        return state

    def bytes(self, manifest: Mapping[str, Any]) -> int:
        """Bytes on the disk of all files of a snapshot, those that it shares with others included."""
        total = 0
        for name in _files(self._tree(manifest)):
            with plain_errors(self._path(name)):
                total += self._path(name).stat().st_size
        return total

    def files(self, manifest: Mapping[str, Any]) -> list[str]:
        """The snapshot's files, relative to the home, sorted."""
        return sorted(self._relative(name) for name in _files(self._tree(manifest)))

    def sweep(self, keep: list[dict[str, Any]], *, dry: bool = False) -> list[str]:
        """Deletes every snapshot file that none of the manifests names; returns them, relative to the home, sorted.

        Args:
            keep: manifests of the snapshots that stay.
            dry: only say what would be deleted.
        """
        wanted = {self._path(name) for manifest in keep for name in _files(self._tree(manifest))}
        with plain_errors(self.folder):
            dead = (
                [path for path in sorted(self.folder.iterdir()) if path not in wanted and not path.is_dir()]
                if self.folder.exists()
                else []
            )
            for path in [] if dry else dead:
                path.unlink()
            if dead and not dry:
                sync_folder(self.folder)
        return [path.relative_to(self.home).as_posix() for path in dead]

    # -- within --------------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """A file of a snapshot; all of them are settled together, for the disk takes as long for one flush as for many files."""
        write_atomic(self._path(name), safetensors_save(tensors), work=self._work, settle=False)
        self._unsettled = True

    def _relative(self, name: str) -> str:
        return self._path(name).relative_to(self.home).as_posix()

    def _tree(self, manifest: Mapping[str, Any]) -> Any:
        """The manifest's structure, looked through first, so that no name in it can lead out of the folder."""
        if manifest.get("format") != _FORMAT:
            raise Corrupt(f"not a snapshot's manifest: its format is {manifest.get('format')!r}, expected {_FORMAT!r}")
        tree = manifest.get("state")
        if sha256(canonical(tree)) != manifest.get("digest"):
            raise Corrupt(
                "the snapshot's manifest was altered; take another snapshot, or restore the ledger from a copy"
            )
        for node in _tensors(tree):
            names = [node["tensor"], node.get("pack", node["tensor"])]
            shape = node["shape"]
            if (
                not all(isinstance(name, str) and _DIGEST.fullmatch(name) for name in names)
                or node["dtype"] not in _DTYPES
                or not all(isinstance(size, int) and size >= 0 for size in shape)
            ):
                raise Corrupt("the snapshot's manifest names a tensor in an impossible way; take another snapshot")
        return tree

    def _store(self, value: Any, place: str, small: dict[str, Tensor], nodes: list[dict[str, Any]]) -> Any:
        if isinstance(value, Tensor):
            tensor = _plain_tensor(value, place)
            digest = tensor_sha256(tensor)
            node = {"tensor": digest, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            if tensor.numel() * tensor.element_size() < _SMALL:
                small[digest] = tensor
                nodes.append(node)
            elif not self._path(digest).exists():
                self._write(digest, {digest: tensor})
            return node
        if isinstance(value, Mapping):
            keys = list(value)
            if keys and all(isinstance(key, int) and not isinstance(key, bool) for key in keys):
                return {
                    _INTS: {str(key): self._store(item, f"{place}[{key}]", small, nodes) for key, item in value.items()}
                }
            if not all(isinstance(key, str) for key in keys):
                raise BadInput(f"{place} has keys that are neither all strings nor all integers")
            if set(keys) >= _TENSOR or _INTS in keys or _FLOAT in keys:
                raise BadInput(
                    f"{place} has keys that are reserved for snapshots: {', '.join(sorted(_TENSOR))}, {_INTS}, {_FLOAT}"
                )
            return {key: self._store(item, f"{place}.{key}", small, nodes) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._store(item, f"{place}[{at}]", small, nodes) for at, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            return {_FLOAT: repr(float(value))}
        try:
            canonical(value)
        except BadInput:
            raise BadInput(
                f"{place} is a {type(value).__name__}; a snapshot holds tensors and JSON values only"
            ) from None
        return value if value is None or isinstance(value, str | bool | int | float) else value.item()

    def _restore(self, tree: Any, packs: dict[str, dict[str, Tensor]], wanted: dict[str, set[str]]) -> Any:
        if isinstance(tree, list):
            return [self._restore(item, packs, wanted) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if set(tree) >= _TENSOR:
            return self._tensor(tree, packs, wanted)
        if _INTS in tree:
            return {int(key): self._restore(item, packs, wanted) for key, item in tree[_INTS].items()}
        if _FLOAT in tree:
            return float(tree[_FLOAT])
        return {key: self._restore(item, packs, wanted) for key, item in tree.items()}

    def _tensor(self, node: dict[str, Any], packs: dict[str, dict[str, Tensor]], wanted: dict[str, set[str]]) -> Tensor:
        file = node.get("pack", node["tensor"])
        if "pack" not in node:
            packs = {}  # a large tensor is not kept twice in memory
        if file not in packs:
            packs[file] = self._read(file, wanted[file])
        tensor = packs[file][node["tensor"]]
        if str(tensor.dtype) != f"torch.{node['dtype']}" or list(tensor.shape) != node["shape"]:
            raise Corrupt(
                f"{self._path(file)} holds a {tensor.dtype} of shape {list(tensor.shape)}, expected "
                f"{node['dtype']} {node['shape']}; {_ADVICE}"
            )
        # a pack's tensor may be asked for twice; each gets memory of its own
        return tensor.clone() if "pack" in node else tensor

    def _read(self, name: str, expected: set[str]) -> dict[str, Tensor]:
        path = self._path(name)
        try:
            with plain_errors(path):
                data = path.read_bytes()
        except OSError:
            if path.exists():
                raise
            raise Corrupt(f"{path} is missing; {_ADVICE}") from None
        try:
            tensors = safetensors_load(data)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise Corrupt(f"{path} is truncated or damaged ({error}); {_ADVICE}") from None
        if not expected <= set(tensors):
            raise Corrupt(f"{path} does not hold the tensors it should; {_ADVICE}")
        for digest in expected:
            if tensor_sha256(tensors[digest]) != digest:
                raise Corrupt(f"{path} was altered after it was written; {_ADVICE}")
        return tensors


_ADVICE = "restore it from a copy, or go back to an earlier snapshot"


def _tensors(tree: Any) -> Iterator[dict[str, Any]]:
    """All tensor nodes of a manifest's structure."""
    if isinstance(tree, dict):
        if set(tree) >= _TENSOR:
            yield tree
        else:
            for item in tree.values():
                yield from _tensors(item)
    elif isinstance(tree, list):
        for item in tree:
            yield from _tensors(item)


def _files(tree: Any) -> set[str]:
    return {node.get("pack", node["tensor"]) for node in _tensors(tree)}


def _plain_tensor(tensor: Tensor, place: str) -> Tensor:
    """A contiguous CPU tensor with the same values."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise BadInput(f"{place} is a tensor without plain memory (sparse, quantized or meta); convert it first")
    if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
        raise BadInput(
            f"{place} has the dtype {tensor.dtype}, which cannot be stored; use one of {', '.join(sorted(_DTYPES))}"
        )
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(canonical([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode() + b"\n")
    if tensor.numel():
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(raw.data)


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 (hex) over dtype, shape and the raw bytes in row-major order.

    (Tensors are little-endian on every machine torch runs on.)
    """
    digest = hashlib.sha256()
    _update(digest, _plain_tensor(tensor, "tensor"))
    return digest.hexdigest()


def weights_sha256(state_dict: Mapping[str, Any]) -> str:
    """sha256 (hex) over the tensors of a state dict in name order.

    Name, dtype, shape, bytes. Entries that are no tensors are left out.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name, value in state_dict.items() if isinstance(value, Tensor)):
        digest.update(canonical(name).encode() + b"\n")
        _update(digest, _plain_tensor(state_dict[name], name))
    return digest.hexdigest()
