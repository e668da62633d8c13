"""A life: one model's events over a stream of tasks, in order, measured after each one, written to a ledger, resumable."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence import catalogue
from remanence.core.errors import (
    BadInput,
    Corrupt,
    DataChanged,
    Drift,
    EventFailed,
    NotFinite,
    Refused,
    RemanenceError,
    StorageError,
)
from remanence.core.ids import Ids
from remanence.core.problem import Classification, Problem, problem_of
from remanence.data import Examples, Request, Stream, Task
from remanence.life.books import Books
from remanence.life.events import Recipe, learn_event, without
from remanence.life.files import canonical, empty, plain_errors
from remanence.life.ledger import Ledger, Row
from remanence.life.lock import Lock
from remanence.life.references import References, code_sha256
from remanence.life.snapshots import Snapshots, weights_sha256
from remanence.life.state import State, state_bytes
from remanence.train.loop import position
from remanence.train.resolve import check_keepers, resolve, resolve_all
from remanence.train.roles import Keeper, Learner, Method, Metric, Where
from remanence.train.settings import Settings
from remanence.train.update import Consumed, Context, Progress, Update

MEASURES = ("accuracy", "forgetting", "bytes")
EVENTS = ("learn", "forget")  # kinds of rows that are events of the life


@dataclass(frozen=True)
class Event:
    """What became of one event."""

    number: int
    kind: str
    label: str
    status: str
    measures: dict[str, float]
    accuracy: dict[int, float]
    steps: int
    seconds: float


@dataclass(frozen=True)
class Trace:
    """Where `ids` live: a holder, what became of them there (`state`), through which `inputs`, and why."""

    holder: str
    ids: Ids
    state: str
    inputs: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.holder}: {len(self.ids)} {self.state} ({self.reason})"


@dataclass
class Learned:
    """A learn event as the life remembers it: how, from which task (None: its data cannot be reached) and which ids."""

    recipe: Recipe
    task: Task | None
    ids: Ids
    about: dict[str, Any]

    def retained(self, gone: Ids) -> Task | None:
        """The task with the rows consumed then that are not in `gone`; None where nothing is left or reachable."""
        if self.task is None:
            return None
        kept = without(self.task, self.task.train.ids - (self.ids - gone))
        return kept if len(kept.train) else None


class Life:
    """One model's lifetime.

    Args:
        model: a torch module, trained in place; or a function of a seed that builds one (then references can start afresh).
        problem: what being right means; default: `Classification`.
        tokenizer: for language models.
        learner: how events learn; default: ``finetune``.
        keep: what protects the old: slugs, ``{slug: knobs}`` or keepers.
        where: where events may write.
        home: the life's folder; None: a temporary one, gone with the object.
        seed: every random number of the life is addressed from it.
        device: where the model lives; default: where it is.
        ledger: a database URL; default: ``ledger.db`` in the home.
        measure: metrics taken after each event; None: accuracy, forgetting (where there are classes) and bytes.
        references: a folder in which models retrained for evidence are kept and shared with other lives; None: they are dropped
            after the event.

    Raises:
        BadInput, UnknownName: something cannot be used; nothing was written.
        Refused: the home already holds a life.
        Locked: another process writes to it.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[int], nn.Module],
        *,
        problem: Problem | str | Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        learner: Any = None,
        keep: Any = (),
        where: Any = None,
        home: str | Path | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        ledger: str | None = None,
        measure: Sequence[Any] | None = None,
        name: str | None = None,
        plan: str | None = None,
        progress: Progress | None = None,
        references: str | Path | None = None,
    ) -> None:
        if tokenizer is not None:
            raise BadInput(
                "a tokenizer belongs to a language problem; this version knows classification and regression"
            )
        if measure is None:
            measure = [
                name for name in MEASURES if name != "forgetting" or isinstance(problem_of(problem), Classification)
            ]
        self._prepare(model, problem, learner, keep, where, seed, device, measure, progress)
        self._temporary = tempfile.TemporaryDirectory(prefix="remanence-") if home is None else None
        self.home = Path(self._temporary.name if self._temporary else home or "").resolve()
        self._plan = plan
        self._store = References(references) if references is not None else None
        self._open(ledger, new=True)
        try:
            if self._ledger.rows():
                raise Refused(
                    f"{self.home} already holds a life; go on with Life.resume({str(self.home)!r}) or choose another home"
                )
            body = {
                "name": name or (self.home.name if home is not None else "life"),
                "seed": seed,
                "problem": _spec(self.problem),
                "learner": self._state.learner.spec(),
                "keep": [keeper.spec() for keeper in self._state.keepers],
                "where": self._where,
                "measure": self._metric_specs,
                "weights_sha256": weights_sha256(self.model.state_dict()),
            }
            manifest = self._snapshots.save(self._state.pack())
            if plan is not None:
                self._write("plan.yaml", plan.encode())
            with self._ledger.begin() as tx:
                row = tx.append("born", body, {"versions": versions(), "at": time.time()})
                tx.set_current("snapshots", [{"seq": row.seq, "event": 0, "manifest": manifest}])
            self._born = row
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ opening, resuming, closing

    def _prepare(
        self,
        model: Any,
        problem: Any,
        learner: Any,
        keep: Any,
        where: Any,
        seed: int,
        device: Any,
        measure: Sequence[Any],
        progress: Progress | None,
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise BadInput(f"seed={seed!r} must be an integer")
        self.problem, self.seed = problem_of(problem), seed
        self._factory = None if isinstance(model, nn.Module) else model
        built = model if isinstance(model, nn.Module) or not callable(model) else model(seed)
        if not isinstance(built, nn.Module):
            raise BadInput(
                f"model must be a torch module or a function of a seed that builds one, not {type(model).__name__}"
            )
        if any(not bool(torch.isfinite(p.sum())) for p in built.parameters()):
            raise BadInput("the model has NaN or infinite weights")
        first = next(built.parameters(), None)
        self.device = (
            torch.device(device) if device is not None else (first.device if first is not None else torch.device("cpu"))
        )
        _check_device(self.device)
        self._blank = copy.deepcopy(built).cpu()
        self._keep_specs = [keeper.spec() for keeper in resolve_all("keep", keep, Keeper)]
        self._learner_spec = resolve("learn", learner or "finetune", Learner).spec()
        self._where = [w.spec() for w in resolve_all("where", where, Where)]
        self._metric_specs = [metric.spec() for metric in resolve_all("measure", list(measure), Metric)]
        self._progress = progress
        self._state = self._fresh_state(built.to(self.device))
        check_keepers(self._state.keepers)
        self._learned: list[Learned] = []
        self._given: dict[str, Task] = {}  # the data of learn events by fingerprint, as it was given
        self._books = Books()
        self._references: dict[tuple[str, int], State] = {}
        self._rows: list[Row] = []

    def _fresh_state(self, model: nn.Module, metrics: bool = True) -> State:
        """A state that has learned nothing; references are not watched by `metrics`."""
        return State(
            model,
            resolve("learn", self._learner_spec, Learner),
            resolve_all("keep", self._keep_specs, Keeper),
            resolve_all("measure", self._metric_specs, Metric) if metrics else [],
        )

    def _open(self, ledger: str | None, new: bool) -> None:
        with plain_errors(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.home)
        try:
            for folder in ("work", "snapshots", "receipts"):
                with plain_errors(self.home / folder):
                    (self.home / folder).mkdir(exist_ok=True)
            empty(self.home / "work")
            self._ledger = Ledger(ledger or self.home / "ledger.db", create=new)
            self._snapshots = Snapshots(self.home)
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def resume(
        cls,
        home: str | Path,
        model: Any = None,
        data: Stream | Sequence[Task | Examples] | None = None,
        *,
        parts: Sequence[type[Method]] = (),
        allow_drift: bool = False,
        ledger: str | None = None,
        progress: Progress | None = None,
        references: str | Path | None = None,
    ) -> Life:
        """Go on with the life in `home` from its last committed event.

        Args:
            model: the initial network, as it was given then; a life run from a plan builds it itself.
            data: the tasks learned so far (a stream, or tasks in order); a life run from a plan makes them itself.
                Without them the life can answer and be traced, but not retrain or rebuild statistics.
            parts: classes of your own that the life uses and that are in no catalogue.
            allow_drift: go on although versions, threads or the processor differ; it is recorded that results are not exact.

        Raises:
            Corrupt: the ledger or a snapshot is damaged.
            DataChanged: a source is not what it was.
            Drift: the surroundings differ and `allow_drift` is False.
        """
        from remanence.life.run import model_and_data
        from remanence.train.resolve import know

        for part in parts:
            know(part)
        home = Path(home).resolve()
        if not (home / "ledger.db").exists() and ledger is None:
            raise BadInput(f"{home} holds no life (no ledger.db)")
        life = cls.__new__(cls)
        life.home, life._temporary, life._plan = home, None, None
        life._store = References(references) if references is not None else None
        life._open_existing(ledger)
        try:
            born = life._ledger.rows("born")
            if not born:
                raise Corrupt(
                    f"{home} has a ledger but no life in it: it was stopped before it began; delete the folder and run again"
                )
            life._born = born[0]
            body = born[0].body
            if (home / "plan.yaml").exists():
                life._plan = (home / "plan.yaml").read_text()
                made, stream = model_and_data(home / "plan.yaml") if model is None or data is None else (model, data)
                model, data = (made if model is None else model), (stream if data is None else data)
            if model is None:
                raise BadInput("this life was not run from a plan: give the initial model, resume(home, model=...)")
            life._prepare(
                model,
                body["problem"],
                body["learner"],
                body["keep"],
                body["where"],
                body["seed"],
                None,
                body["measure"],
                progress,
            )
            if not (weights_sha256(life._blank.state_dict()) == body["weights_sha256"] or life._begin_from_snapshot()):
                raise DataChanged(
                    "the model given is not the one this life began with; give it with its initial weights"
                )
            life._check_drift(allow_drift)
            for task in data if data is not None else ():
                made = _as_task(task, -1)
                life._given[made.fingerprint()] = made
            life._replay_rows()
            life._load_current()
            life._finish_owed()
            life._sweep()
            life._continue_request()
        except BaseException:
            life.close()
            raise
        return life

    def _open_existing(self, ledger: str | None) -> None:
        self._open(ledger, new=False)

    def _begin_from_snapshot(self) -> bool:
        """The initial weights from the snapshot kept at birth, for a model given with other values."""
        for entry in self._ledger.get_current("snapshots", []):
            if entry["event"] == 0:
                packed = self._snapshots.load(entry["manifest"])
                try:
                    self._blank.load_state_dict(packed["weights"])
                except RuntimeError:
                    return False
                return bool(weights_sha256(self._blank.state_dict()) == self._born.body["weights_sha256"])
        return False

    def _check_drift(self, allow: bool) -> None:
        then, now = self._born.extra["versions"], versions()
        for row in self._ledger.rows("drift"):
            then = row.extra["versions"]
        changed = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
        if not changed:
            return
        said = "; ".join(f"{key} was {then.get(key)}, is {now.get(key)}" for key in changed)
        if not allow:
            raise Drift(
                f"this life cannot be continued with the same bits: {said}. Restore them, or go on with allow_drift (--allow-drift)"
            )
        with self._ledger.begin() as tx:
            tx.append("drift", {}, {"versions": now, "changed": said})

    def close(self) -> None:
        """Release the life; a temporary home is removed."""
        if hasattr(self, "_ledger"):
            self._ledger.close()
        if hasattr(self, "_lock"):
            self._lock.release()
        if getattr(self, "_temporary", None) is not None:
            assert self._temporary is not None
            self._temporary.cleanup()

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replay_rows(self) -> None:
        """Books and history from the rows. Data is known by what is in it, as it was given, so tasks may share an id."""
        ids_given = {task.id for task in self._given.values()}
        self._books, self._learned, self._rows = Books(), [], []
        for row in self._ledger.rows(EVENTS):
            if row.kind == "learn":
                about, ids = row.body["task"], self._ids(row.body["new"])
                task = self._given.get(about["fingerprint"])
                if task is None and about["id"] in ids_given:
                    raise DataChanged(
                        f"task {about['id']} of {about['source']} has changed since this life learned it; restore the source as it was "
                        "(ids by position would point to other examples)"
                    )
                if task is not None:
                    task = replace(task, id=about["id"])
                    if row.body["skipped_forgotten"]:
                        task = without(task, task.train.ids - ids)
                self._learned.append(Learned(Recipe(**row.body["recipe"]), task, ids, about))
            self._enter(row)

    def _enter(self, row: Row) -> None:
        """A committed row goes into the books and the list of events."""
        apply_row(self._books, row, self._ids)
        self._rows.append(row)

    def _ids(self, digest: str) -> Ids:
        return self._ledger.lineage.get(digest)

    def _load_current(self) -> None:
        entry = self._ledger.get_current("snapshots")[-1]
        state = self._fresh_state(self.model)
        state.load(self._snapshots.load(entry["manifest"]), copy.deepcopy(self._blank))
        self._state = state
        self._settle_inputs()

    def _sweep(self) -> None:
        keep = [entry["manifest"] for entry in self._ledger.get_current("snapshots", [])]
        checkpoint = self._ledger.get_current("checkpoint")
        self._snapshots.sweep([*keep, *([checkpoint["manifest"]] if checkpoint else [])])

    def _settle_inputs(self) -> None:
        """Values computed by the weights hold what the weights hold."""
        for method in self._state.holders().values():
            method.inputs = self._books.holding()

    # ------------------------------------------------------------------ what a user sees

    @property
    def model(self) -> nn.Module:
        """The network as it is now. A forget by retraining puts another object in its place."""
        return self._state.model

    @property
    def metrics(self) -> list[Metric]:
        """The metrics taken after each event."""
        return self._state.metrics

    @property
    def holders(self) -> dict[str, Any]:
        """Everything in the life that remembers, by name, with its bytes."""
        return {**state_bytes(self._state), "snapshots": self._snapshot_bytes(), **self._reference_bytes()}

    @property
    def events(self) -> list[Event]:
        """The committed events, in order."""
        return [self._event(row) for row in self._rows]

    @property
    def receipts(self) -> list[Any]:
        """The receipts so far, in order."""
        from remanence.life.forgetting import receipt_from

        return [receipt_from(self, row) for row in self._ledger.rows("receipt")]

    def learn(
        self,
        task: Task | Examples,
        *,
        epochs: int = 1,
        batch_size: int = 64,
        optimizer: Any = "adamw",
        lr: float = 1e-3,
        schedule: Any = "constant",
        learner: Any = None,
        keep: Any = None,
        where: Any = None,
        carry: bool = False,
        clip: float | None = None,
        accumulate: int = 1,
        precision: str = "float32",
        compile: bool = False,
        patience: int | None = None,
        validation: float = 0.1,
        snapshot_every: int | None = None,
        allow_forgotten: bool = False,
    ) -> Event:
        """Take new data in.

        Args:
            task: what to learn, with held-out data; bare `Examples` are measured on themselves.
            epochs, batch_size, optimizer, lr, schedule, clip, accumulate, precision, compile, patience, validation: see `Settings`.
            learner, keep, where: for this event only, in place of the life's; ``[]`` is none. Given by name or knobs they
                are built anew and not kept after the event.
            carry: begin with the optimizer state of the event before.
            snapshot_every: optimizer steps between snapshots inside the event, from which a killed event goes on.
            allow_forgotten: learn ids again that were forgotten.

        Raises:
            BadInput: the data or a knob cannot be used; nothing moved.
            Refused: nothing is left to learn.
            EventFailed: a loss became NaN or infinite; the life is as it was.
        """
        self._writable()
        settings = Settings(
            epochs, batch_size, optimizer, lr, schedule, clip, accumulate, precision, compile, patience, validation
        )
        task = _as_task(task, max([len(self._learned), *(item.about["id"] + 1 for item in self._learned)]))
        recipe = Recipe(
            ordinal=len(self._learned),
            settings={name: getattr(settings, name) for name in settings.__dataclass_fields__},
            learner=None if learner is None else resolve("learn", learner, Learner).spec(),
            keep=None if keep is None else [keeper.spec() for keeper in resolve_all("keep", keep, Keeper)],
            where=self._where if where is None else [w.spec() for w in resolve_all("where", where, Where)],
            carry=carry,
        )
        if keep is not None:
            check_keepers(resolve_all("keep", recipe.keep, Keeper))
        canonical(recipe.as_json())  # refuses what cannot be written down
        self._check_task(task)
        fingerprint = task.fingerprint()
        self._given[fingerprint] = task
        gone = task.train.ids & self._books.tombstones
        if gone and not allow_forgotten:
            if len(gone) == len(task.train):
                raise Refused(
                    "all of these examples were forgotten on request; learning them again must be asked for: allow_forgotten=True"
                )
            task = without(task, gone)
        label = f"learn task {task.id}"
        with self._ledger.begin() as tx:
            tx.append("attempt", {"kind": "learn", "label": label}, {"at": time.time()})
        start = time.perf_counter()
        try:
            u, consumed = self._learn(task, recipe, snapshot_every)
            self._finite()
            measured = self._measured([*self._learned, Learned(recipe, task, consumed.new, {"id": task.id})])
            row = self._commit_learn(
                task,
                fingerprint,
                recipe,
                u,
                consumed,
                measured,
                len(gone) if not allow_forgotten else 0,
                time.perf_counter() - start,
            )
        except BaseException as error:
            self._roll_back(error, label)
            if isinstance(error, NotFinite):
                raise EventFailed(f"{label} failed and the life is as it was before: {error}") from error
            raise
        with contextlib.suppress(StorageError):  # what is left of older snapshots is swept again at the next open
            self._sweep()
        return self._event(row)

    def _check_task(self, task: Task) -> None:
        """Refuse data that cannot be told apart or learned from, before anything moves."""
        task.train.check()
        if task.test is not task.train:
            task.test.check()
        if "y" not in task.train.columns:
            raise BadInput(f"{task.train.source}: classification and regression need a column 'y'")
        if (
            isinstance(self.problem, Classification)
            and task.train["y"].dim() == 1
            and task.train["y"].is_floating_point()
        ):
            raise BadInput(
                f"{task.train.source}: y has type {task.train['y'].dtype}; classification needs integer labels (or use problem='regression')"
            )
        if not len(task.train):
            raise BadInput(f"task {task.id} has no training examples")
        fingerprint = task.fingerprint()
        for learned in self._learned:
            same = learned.about.get("source") == task.train.source
            shared = bool(task.train.ids & learned.ids)
            if (
                shared
                and learned.about.get("fingerprint") != fingerprint
                and (not same or task.train.positional)
                and self._differs(learned, task)
            ):
                raise DataChanged(
                    f"{task.train.source} uses ids that {learned.about['source']} used for other examples; give ids that are distinct over all "
                    "sources: Examples(..., ids=...)"
                )

    @staticmethod
    def _differs(learned: Learned, task: Task) -> bool:
        """Whether a shared id stands for other content than when it was learned."""
        if learned.task is None:
            return learned.about.get("source") != task.train.source
        shared = task.train.ids & learned.task.train.ids
        return bool(shared) and _content(learned.task.train, shared) != _content(task.train, shared)

    def _learn(self, task: Task, recipe: Recipe, snapshot_every: int | None) -> tuple[Update, Consumed]:
        saved = self._ledger.get_current("checkpoint")
        key = hashlib.sha256(canonical([recipe.as_json(), task.fingerprint()]).encode()).hexdigest()
        at = saved if saved is not None and saved["key"] == key else None

        def before(u: Update) -> None:
            if at is not None:
                packed = self._snapshots.load(at["manifest"])
                u.resume_at = {**packed["position"], "load": lambda: _load_into(u, packed)}

        def checkpoint(u: Update, _source: Any, index: Any, count: int) -> None:
            due = snapshot_every and u.step and u.step % snapshot_every == 0
            if due and not u._pending and not isinstance(index, list):
                holders = {str(i): part.state_dict() for i, part in enumerate(_stateful(u))}
                manifest = self._snapshots.save(
                    {"position": position(u, index, count), "weights": dict(u.model.state_dict()), "holders": holders}
                )
                with self._ledger.begin() as tx:
                    tx.set_current("checkpoint", {"key": key, "manifest": manifest})
                self._sweep()

        return learn_event(
            self._state,
            task,
            recipe,
            problem=self.problem,
            seed=self.seed,
            history=self._history(),
            tasks=self._tasks(),
            device=self.device,
            before=before,
            retrain=None,
            metrics=self.metrics,
            progress=self._progress,
            checkpoint=checkpoint if snapshot_every else None,
        )

    def _commit_learn(
        self,
        task: Task,
        fingerprint: str,
        recipe: Recipe,
        u: Update,
        consumed: Consumed,
        measured: dict[str, Any],
        skipped: int,
        seconds: float,
    ) -> Row:
        manifest = self._snapshots.save(self._state.pack())
        entries = self._ledger.get_current("snapshots")
        kept = [entry for entry in entries if entry["event"] == 0] + [entry for entry in entries if entry["event"]][-1:]
        body = {
            "event": len(self._rows) + 1,
            "label": f"learn task {task.id}",
            "task": {
                "id": task.id,
                "classes": [int(c) for c in task.classes],
                "names": list(task.names),
                "fingerprint": fingerprint,
                "source": task.train.source,
                "train": len(task.train),
                "test": len(task.test),
            },
            "recipe": recipe.as_json(),
            "learner": next(iter(u.owner.spec())),
            "keep": [part.slug for part in u.parts if isinstance(part, Keeper)],
            "where": [part.slug for part in u.parts if isinstance(part, Where)],
            "moves_weights": getattr(u.owner, "moves_weights", True),
            "steps": u.steps_done,
            "skipped_forgotten": skipped,
            "labels": list(self._state.labels),
            "holders": state_bytes(self._state),
            "extra_bytes": u.extra_bytes,
            "weights_sha256": weights_sha256(self.model.state_dict()),
            **measured,
        }
        with self._ledger.begin() as tx:
            body["new"] = self._ledger.lineage.put(consumed.new)
            body["replayed"] = self._ledger.lineage.put(consumed.replayed)
            body["consumed"] = {"new": len(consumed.new), "replayed": len(consumed.replayed)}
            future = {"seq": len(self._ledger), "event": body["event"], "manifest": manifest}
            erased = self._snapshots.sweep([e["manifest"] for e in [*kept, future]], dry=True)
            row = tx.append("learn", body, {"seconds": seconds, "at": time.time(), "erased": erased})
            tx.set_current("snapshots", [*kept, future])
            tx.set_current("checkpoint", None)
        self._learned.append(Learned(recipe, task, consumed.new, body["task"]))
        self._enter(row)
        self._settle_inputs()
        self._references.clear()
        return row

    def forget(
        self,
        request: Request,
        *,
        by: Any,
        keep: Any = (),
        where: Any = None,
        verify: Any = None,
        retain: str = "lineage",
        epochs: int | None = None,
        batch_size: int | None = None,
        optimizer: Any = None,
        lr: float | None = None,
        schedule: Any = None,
        limit: float | None = None,
    ) -> Any:
        """Remove a request, with evidence.

        Args:
            request: what to forget.
            by: the forgetter: a slug, ``{slug: knobs}`` or an object.
            keep, where: keepers and wheres of this run; by default none.
            verify: ``"retrain"`` or ``{"retrain": {"seeds": n}}``: measure against n models retrained without the request.
            retain: what counts as retained data: ``lineage``, everything the life learned and was not asked to forget.
            epochs, batch_size, optimizer, lr, schedule: None means the method's own `defaults`.
            limit: the largest drop of held-out accuracy that is accepted (0 to 1); more fails the event.

        Returns:
            The signed receipt.

        Raises:
            Refused: the request is not possible; nothing moved.
            EventFailed: the method failed; the life is as it was.
        """
        from remanence.life.forgetting import forget

        given = {"epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr, "schedule": schedule}
        return forget(
            self,
            request,
            by=by,
            keep=keep,
            where=where,
            verify=verify,
            retain=retain,
            settings={k: v for k, v in given.items() if v is not None},
            limit=limit,
        )

    def measure(self, tasks: Sequence[int] | None = None) -> dict[str, Any]:
        """Every metric on the life as it is now, and the held-out accuracy of each learned task (or of `tasks`, by id)."""
        measured = self._measured(self._learned, copy.deepcopy(self.metrics))  # looking leaves no trace
        wanted = {str(task) for task in tasks} if tasks is not None else None
        accuracy = {int(k): v for k, v in measured["accuracy"].items() if wanted is None or k in wanted}
        return {**measured["measures"], "tasks": accuracy}

    def predict(self, x: Tensor, task: int | None = None) -> Tensor:
        """Answers for `x` (B, ...): labels (B,) of a classifier, values of a regressor. `task` restricts classes to that task's."""
        if not bool(torch.isfinite(x.float().sum())):
            raise BadInput("x has NaN or infinite values")
        c = self._context()
        with c.aside():
            out = c.owner.predict(c, {"x": x.to(self.device), "id": torch.arange(len(x))})
        if not isinstance(self.problem, Classification):
            return out.logits
        labels = torch.tensor(self._state.labels)
        logits = out.logits[:, : len(labels)].cpu()
        if task is not None:
            known = [learned.about["classes"] for learned in self._learned if learned.about["id"] == task]
            if not known:
                raise BadInput(
                    f"this life has learned tasks {sorted({item.about['id'] for item in self._learned})}, not {task}"
                )
            logits = logits.masked_fill(~torch.isin(labels, torch.tensor(known[0])), -torch.inf)
        return labels[logits.argmax(1)]

    def trace(self, ids: Any) -> list[Trace]:
        """Every holder in which any of `ids` lives or lived, worst state first.

        Raises:
            BadInput: no ids.
        """
        from remanence.life.tracing import trace

        wanted = ids if isinstance(ids, Ids) else Ids(ids)
        if not len(wanted):
            raise BadInput("trace needs at least one id")
        return trace(self, wanted)

    def report(self, path: str | Path | None = None) -> Path:
        """Write ``report.html`` and ``report.json`` into the home (or the page to `path`); returns the page's path."""
        from remanence.life.report import render_html
        from remanence.life.summary import summary

        data = summary(self)
        self._write("report.json", (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
        page = render_html(data).encode()
        if path is None:
            return self._write("report.html", page)
        from remanence.life.files import write_atomic

        write_atomic(Path(path), page)
        return Path(path)

    def content_digest(self) -> str:
        """SHA-256 of everything the ledger says but times, salts, signatures and attempts: equal lives have equal digests."""
        return self._ledger.content_digest()

    def redact(self) -> list[str]:
        """Remove request texts, salts and ids of every request whose ids are deleted everywhere; the chain stays whole."""
        from remanence.life.forgetting import redact

        return redact(self)

    # ------------------------------------------------------------------ shared with forgetting

    def _writable(self) -> None:
        """Nothing new begins before what was begun is done: an erasure or a receipt's file that is owed, a request that was
        interrupted."""
        from remanence.life.forgetting import copy_receipts

        if self._ledger.get_current("owed"):
            self._finish_owed()
        copy_receipts(self)
        self._continue_request()

    def _finish_owed(self) -> None:
        from remanence.life.forgetting import finish

        finish(self)

    def _continue_request(self) -> None:
        from remanence.life.forgetting import continue_request

        continue_request(self)

    def _context(self, state: State | None = None) -> Context:
        return (state or self._state).context(self.problem, self._tasks(), self.device)

    def _history(self, gone: Ids | None = None) -> list[Examples]:
        kept = [learned.retained(self._books.tombstones if gone is None else gone) for learned in self._learned]
        return [task.train for task in kept if task is not None]

    def _tasks(self, learned: Sequence[Learned] | None = None) -> list[Task]:
        """The tasks learned so far, each once, tests without classes that are wholly forgotten."""
        lost = self._lost_labels(learned)
        found: dict[int, Task] = {}
        for item in self._learned if learned is None else learned:
            task = item.task
            if task is not None and len(task.test):
                test = task.test
                if lost and isinstance(self.problem, Classification):
                    test = test.select((~torch.isin(test["y"], torch.tensor(lost))).nonzero()[:, 0])
                found[task.id] = Task(task.train, test, task.classes, task.names, task.id)
        return list(found.values())

    def _lost_labels(self, learned: Sequence[Learned] | None = None) -> list[int]:
        """Labels of which every example ever learned was forgotten."""
        if not isinstance(self.problem, Classification) or not self._books.tombstones:
            return []
        ever: set[int] = set()
        left: set[int] = set()
        for item in self._learned if learned is None else learned:
            if item.task is not None:
                y, ids = item.task.train["y"], item.task.train.id.numpy()
                mine = item.ids.isin(ids)
                ever.update(y[torch.from_numpy(mine)].unique().tolist())
                left.update(y[torch.from_numpy(mine & ~self._books.tombstones.isin(ids))].unique().tolist())
        return sorted(ever - left)

    def _measured(self, learned: Sequence[Learned], metrics: Sequence[Metric] | None = None) -> dict[str, Any]:
        """Held-out score per task and of each wholly forgotten class, and the metrics' values."""
        c = self._context()
        tasks = self._tasks(learned)
        main = "accuracy" if isinstance(self.problem, Classification) else "mse"
        scores = {str(task.id): _rounded(c.evaluate(task.test)[main]) for task in tasks if len(task.test)}
        lost = {}
        for label in self._lost_labels(learned):
            tests = [item.task.test for item in learned if item.task is not None and label in item.task.test["y"]]
            if tests:
                test = tests[0].select((tests[0]["y"] == label).nonzero()[:, 0])
                lost[str(label)] = _rounded(c.evaluate(test)["accuracy"])
        c.tasks = tasks
        table = [*[row.body["accuracy"] for row in self._rows], scores]
        order = list(dict.fromkeys(str(item.about["id"]) for item in learned))
        c.matrix = [[row.get(task, math.nan) for task in order] for row in table]
        c.learned = [next((i for i, row in enumerate(table) if task in row), len(table)) for task in order]
        c.holders, c.forgotten = state_bytes(self._state), self._books.tombstones
        values: dict[str, float] = {}
        wanted = self.metrics if metrics is None else metrics
        for metric in wanted if order else ():  # where nothing was learned there is nothing to measure
            values.update({name: _rounded(value) for name, value in metric.value(c).items()})
        return {"accuracy": scores, "lost": lost, "measures": values}

    def _finite(self) -> None:
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise NotFinite(f"the weights {name!r} became NaN or infinite; try a smaller lr or clip=1.0")

    def _roll_back(self, error: BaseException, label: str) -> None:
        """The life as it was at its last commit, and a row that says why."""
        self._load_current()
        self._replay_rows()
        self._settle_inputs()
        if not isinstance(error, KeyboardInterrupt | SystemExit):
            try:
                with self._ledger.begin() as tx:
                    tx.append(
                        "failed", {"label": label}, {"reason": f"{type(error).__name__}: {error}", "at": time.time()}
                    )
                self._sweep()
            except RemanenceError:  # a full disk must not hide the error that matters
                pass

    def _initial(self, seed: int) -> nn.Module:
        """The network at birth; built afresh for another seed where the life knows how."""
        if seed != self.seed and self._factory is not None:
            built = self._factory(seed)
            assert isinstance(built, nn.Module)
            return built.to(self.device)
        return copy.deepcopy(self._blank).to(self.device)

    def _live_again(self, gone: Ids, seed: int) -> State:
        """A fresh life of the same learn events without `gone`: buffers, statistics and keepers built anew."""
        key = (gone.digest(), seed)
        if key not in self._references:
            if any(learned.task is None for learned in self._learned):
                raise Refused("retraining needs the data of every event; give it: Life.resume(home, model, data=...)")
            tasks = [(learned.recipe, learned.retained(gone)) for learned in self._learned]
            left = [(recipe, task) for recipe, task in tasks if task is not None]
            state = self._fresh_state(self._initial(seed), metrics=False)
            name = self._reference_key(state, left, seed) if self._store is not None else ""
            packed = self._store.get(name) if self._store is not None else None
            if packed is not None:
                state.load(packed, copy.deepcopy(state.model))
            else:
                history: list[Examples] = []
                for recipe, task in left:
                    learn_event(
                        state, task, recipe, problem=self.problem, seed=seed, history=history, device=self.device, progress=self._progress
                    )  # fmt: skip
                    history.append(task.train)
            if self._store is not None:
                self._store.put(name, state.pack())
                self._register_reference(name, [task for _, task in left])
            self._references[key] = state
        return self._references[key]

    def _reference_key(self, fresh: State, left: Sequence[tuple[Recipe, Task]], seed: int) -> str:
        """The hash of all that makes a reference: two lives that would retrain the same model find the same one."""
        methods = [fresh.learner, *fresh.keepers, *resolve_all("where", self._where, Where)]
        about = {
            "weights": weights_sha256(fresh.model.state_dict()),
            "problem": _spec(self.problem),
            "methods": [method.spec() for method in methods],
            "seed": seed,
            "events": [[recipe.as_json(), task.fingerprint(), task.train.ids.digest()] for recipe, task in left],
            "code": code_sha256(
                [part for method in methods for part in catalogue.every() if part.module == type(method).__module__]
            ),
            "versions": versions(),
        }
        return hashlib.sha256(canonical(about).encode()).hexdigest()

    def _register_reference(self, key: str, tasks: Sequence[Task]) -> None:
        """A reference is a holder of what it was trained on, and the life answers for it."""
        known = self._ledger.get_current("references", [])
        if key not in [entry["key"] for entry in known]:
            ids = Ids()
            for task in tasks:
                ids = ids | task.train.ids
            with self._ledger.begin() as tx:
                tx.set_current("references", [*known, {"key": key, "ids": self._ledger.lineage.put(ids)}])

    def _reference_bytes(self) -> dict[str, int]:
        entries = self._ledger.get_current("references", []) if self._store is not None else []
        return (
            {"references": sum(self._store.bytes(entry["key"]) for entry in entries)} if entries and self._store else {}
        )

    def _snapshot_bytes(self) -> int:
        return sum(self._snapshots.bytes(entry["manifest"]) for entry in self._ledger.get_current("snapshots", []))

    def _event(self, row: Row) -> Event:
        body = row.body
        return Event(
            body["event"],
            row.kind,
            body["label"],
            body.get("status", "done"),
            body["measures"],
            {int(k): v for k, v in body["accuracy"].items()},
            body.get("steps", 0),
            row.extra.get("seconds", 0.0),
        )

    def _write(self, name: str, data: bytes) -> Path:
        from remanence.life.files import write_atomic

        write_atomic(self.home / name, data, work=self.home / "work")
        return self.home / name


def _check_device(device: torch.device) -> None:
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type)
    if there is not None and not there():
        raise BadInput(f"device={str(device)!r}: torch finds no such device here; use 'cpu', or a torch built for it")


def apply_row(books: Books, row: Row, ids_of: Callable[[str], Ids]) -> None:
    """Enter one committed row into the books."""
    if row.kind == "learn":
        books.learned(ids_of(row.body["new"]) | ids_of(row.body["replayed"]), row.body["moves_weights"])
    elif row.kind == "forget" and row.body["status"] != "nothing held":
        books.forgotten(ids_of(row.body["ids"]), row.body["weights_state"], row.body["why"], row.body["exact"])


def versions() -> dict[str, Any]:
    """What equal bits depend on beside plan and data."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    for package in ("remanence", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def _stateful(u: Update) -> list[Method]:
    """Everything in a run that remembers beside the weights."""
    return [u.owner, *u.parts, *u.metrics]


def _load_into(u: Update, packed: Mapping[str, Any]) -> None:
    u.model.load_state_dict(packed["weights"])
    for i, part in enumerate(_stateful(u)):
        part.load_state_dict(packed["holders"][str(i)])


def _spec(problem: Problem) -> dict[str, Any]:
    name = type(problem).__name__.lower()
    return {name: {key: getattr(problem, key) for key in problem.__dataclass_fields__}}


def _as_task(data: Task | Examples, number: int) -> Task:
    """Bare examples as a task that is measured on itself."""
    if not isinstance(data, Examples):
        return data
    labels = _labels(data)
    return Task(data, data, tuple(labels), tuple(map(str, labels)), number)


def _labels(examples: Examples) -> list[int]:
    y = examples.columns.get("y")
    return [int(v) for v in y.unique()] if isinstance(y, Tensor) and not y.is_floating_point() else []


def _content(examples: Examples, ids: Ids) -> str:
    part = examples.only(ids)
    return part.select(torch.argsort(part.id)).fingerprint()


def _rounded(value: float) -> float:
    """Six digits: what a float32 mean is good for."""
    return float(f"{float(value):.6g}")
