"""Models retrained for evidence, kept on disk and shared: each lies under the hash of everything that made it.

    FOLDER/<key>/manifest.json, snapshots/

A reference is a holder of what it was trained on. Its life writes down the key and the ids; the folder knows neither lives nor ids.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence import catalogue
from remanence.core.errors import BadInput, Corrupt, Refused
from remanence.core.ids import Ids
from remanence.core.part import Part
from remanence.data import Examples, Task
from remanence.life.events import Recipe, learn_event
from remanence.life.files import canonical, plain_errors, sha256, sync_folder, write_atomic
from remanence.life.snapshots import Snapshots, weights_sha256
from remanence.life.state import State
from remanence.life.surroundings import versions
from remanence.train.resolve import resolve, resolve_all
from remanence.train.roles import Keeper, Learner, Method, Where

if TYPE_CHECKING:
    from remanence.life.life import Life

__all__ = ["References", "code_sha256", "kept_bytes", "live_again", "seconds_of"]

_KEY = re.compile(r"[0-9a-f]{64}")
#: What a result depends on beside the parts in use: the floors below them, and how a life runs and measures.
_SHARED = ("core", "nn", "models", "data", "train", "measure")
_LIFE = (
    "life",
    "learning",
    "forgetting",
    "erasing",
    "events",
    "state",
    "evidence",
    "books",
    "record",
    "references",
    "snapshots",
    "tracing",
    "summary",
    "run",
)


class References:
    """The references in a folder, by key (64 hex digits).

    Raises:
        StorageError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        with plain_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise BadInput(f"{key!r:.80} is no key of a reference; it has 64 hex digits")
        return self.folder / key

    def __contains__(self, key: str) -> bool:
        return (self._path(key) / "manifest.json").is_file()

    def get(self, key: str) -> dict[str, Any] | None:
        """The packed state under `key`, checked against its hashes; None if there is none. A damaged one is dropped: it can be made anew."""
        if key not in self:
            return None
        try:
            manifest = json.loads((self._path(key) / "manifest.json").read_text(encoding="utf-8"))
            return Snapshots(self._path(key)).load(manifest)
        except (Corrupt, OSError, ValueError):
            self.erase(key)
            return None

    def put(self, key: str, packed: Mapping[str, Any]) -> None:
        """Keep a state. Another process may do the same at the same time; they are equal, and one stays."""
        if key in self:
            return
        part = self.folder / f".{key[:16]}.{secrets.token_hex(4)}"
        try:
            manifest = Snapshots(part).save(packed)
            write_atomic(part / "manifest.json", canonical(manifest).encode(), work=part / "work")
            with plain_errors(part), contextlib.suppress(FileExistsError):
                shutil.rmtree(part / "work")
                if self._path(key).exists() and key not in self:  # half erased
                    shutil.rmtree(self._path(key))
                try:
                    os.rename(part, self._path(key))
                except OSError:
                    if key not in self:
                        raise
                sync_folder(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def erase(self, key: str) -> None:
        """Delete a reference; harmless when it is gone."""
        path = self._path(key)
        with plain_errors(path):
            (path / "manifest.json").unlink(missing_ok=True)
            for dead in [path, *self.folder.glob(f".{key[:16]}.*")]:  # what a killed `put` left, too
                if dead.exists():
                    shutil.rmtree(dead)
                    sync_folder(self.folder)

    def bytes(self, key: str) -> int:
        """Bytes on the disk."""
        path = self._path(key)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.exists() else 0


def code_sha256(parts: Iterable[Part]) -> str:
    """sha256 (hex) of the code that a result depends on: the shared floors, and the modules of the parts in use and no others."""
    own = {part.module: _module_sha256(part.module) for part in parts}
    return sha256(canonical([_shared_sha256(), sorted(own.items())]))


@cache
def _shared_sha256() -> str:
    root = Path(__file__).parents[1]
    files = [path for folder in _SHARED for path in sorted((root / folder).rglob("*.py"))]
    files += [root / "life" / f"{name}.py" for name in _LIFE] + sorted(root.glob("*/base.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def _module_sha256(module: str) -> str:
    from importlib.util import find_spec

    spec = find_spec(module)
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return sha256(origin.read_bytes()) if origin is not None and origin.is_file() else "no source"


# -- making them ---------------------------------------------------------------------------------------------------------


def live_again(life: Life, gone: Ids, seed: int) -> State:
    """A fresh life of the same learn events without `gone`: buffers, statistics and keepers built anew."""
    key = (gone.digest(), seed)
    if key not in life._references:
        if any(learned.task is None for learned in life._learned):
            raise Refused("retraining needs the data of every event; give it: Life.resume(home, model, data=...)")
        tasks = [(learned.recipe, learned.retained(gone)) for learned in life._learned]
        left = [(recipe, task) for recipe, task in tasks if task is not None]
        state = life._fresh_state(life._initial(seed), metrics=False)
        name = _key(life, state, left, seed) if life._store is not None else None
        kept = None
        if life._store is not None and name is not None:
            _register(
                life, name, [task for _, task in left]
            )  # first: a kill must not leave one that nobody answers for
            kept = life._store.get(name)
        if kept is not None:
            state.load(kept["state"], copy.deepcopy(state.model))
            seconds = float(kept["seconds"])
        else:
            clock = time.perf_counter()
            history: list[Examples] = []
            for recipe, task in left:
                learn_event(
                    state, task, recipe, problem=life.problem, seed=seed, history=history, device=life.device, progress=life._progress
                )  # fmt: skip
                history.append(task.train)
            seconds = time.perf_counter() - clock
        if life._store is not None and name is not None:
            life._store.put(name, {"state": state.pack(), "seconds": seconds})
        life._references[key], life._retraining[key] = state, seconds
    return life._references[key]


def seconds_of(life: Life, gone: Ids, seed: int) -> float:
    """What a reference that this life has made or found took to train, whenever that was."""
    return life._retraining.get((gone.digest(), seed), 0.0)


def _key(life: Life, fresh: State, left: Sequence[tuple[Recipe, Task]], seed: int) -> str | None:
    """The hash of all that makes a reference: two lives that would retrain the same model find the same one. None: it depends on
    code that is not ours, which no hash tells, so that it is not shared."""
    methods: list[Method] = [fresh.learner, *fresh.keepers, *resolve_all("where", life._where, Where)]
    for recipe, _ in left:
        methods += [] if recipe.learner is None else [resolve("learn", recipe.learner, Learner)]
        methods += [*resolve_all("keep", recipe.keep, Keeper), *resolve_all("where", recipe.where, Where)]
    kinds = {type(thing) for thing in [*methods, *fresh.model.modules()]}
    if any(kind.__module__.partition(".")[0] not in ("remanence", "torch") for kind in kinds):
        return None
    about = {
        "weights": weights_sha256(fresh.model.state_dict()),
        "model": repr(fresh.model),
        "device": str(life.device),
        "problem": life.problem.spec(),
        "methods": [method.spec() for method in methods],
        "seed": seed,
        "events": [[recipe.as_json(), task.fingerprint(), task.train.ids.digest()] for recipe, task in left],
        "code": code_sha256(
            [part for method in methods for part in catalogue.every() if part.module == type(method).__module__]
        ),
        "versions": versions(),
    }
    return hashlib.sha256(canonical(about).encode()).hexdigest()


def _register(life: Life, key: str, tasks: Sequence[Task]) -> None:
    """A reference is a holder of what it was trained on, and the life answers for it."""
    known = life._ledger.get_current("references", [])
    if key not in [entry["key"] for entry in known]:
        ids = Ids()
        for task in tasks:
            ids = ids | task.train.ids
        with life._ledger.begin() as tx:
            tx.set_current("references", [*known, {"key": key, "ids": life._ledger.lineage.put(ids)}])


def kept_bytes(life: Life) -> dict[str, int]:
    """Bytes of the references that a life keeps, as a holder; empty without any."""
    entries = life._ledger.get_current("references", []) if life._store is not None else []
    return {"references": sum(life._store.bytes(entry["key"]) for entry in entries)} if entries and life._store else {}
