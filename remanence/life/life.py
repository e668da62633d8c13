"""A life: one model's events over a stream of tasks, in order, measured after each one, written to a ledger, resumable."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remanence.core.errors import (
    BadInput,
    Corrupt,
    DataChanged,
    Drift,
    NotFinite,
    Refused,
    RemanenceError,
)
from remanence.core.ids import Ids
from remanence.core.problem import CausalLM, Classification, Problem, problem_of
from remanence.data import Examples, Request, Stream, Task
from remanence.data.tokens import fingerprint_of
from remanence.life import learning
from remanence.life.books import Books
from remanence.life.events import Recipe, without
from remanence.life.files import empty, plain_errors
from remanence.life.language import check_language, complete, entities, unforgotten
from remanence.life.ledger import Ledger, Row
from remanence.life.lock import Lock
from remanence.life.record import Event, Learned, Trace, apply_row
from remanence.life.references import References, kept_bytes
from remanence.life.snapshots import Snapshots, weights_sha256
from remanence.life.state import State, state_bytes
from remanence.life.surroundings import check_device, versions
from remanence.train.parallel import main, world
from remanence.train.resolve import check_fits, check_keepers, resolve, resolve_all
from remanence.train.roles import Keeper, Learner, Method, Metric, Where
from remanence.train.settings import Settings
from remanence.train.update import Context, Progress

MEASURES = ("accuracy", "forgetting", "bytes")
EVENTS = ("learn", "forget")  # kinds of rows that are events of the life


class Life:
    """One model's lifetime.

    Args:
        model: a torch module, trained in place; or a function of a seed that builds one (then references can start afresh).
        problem: what being right means; default: `Classification`.
        tokenizer: for language models: cuts the texts that the life learns, see `CausalLM`. Without `problem` it means ``causal-lm``.
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

    Under ``torchrun`` or ``accelerate launch`` every process lives the same life, and each goes through its share of every batch; the first
    alone writes the home. All must call every event.

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
        if problem is None and tokenizer is not None:
            problem = "causal-lm"
        if measure is None:
            measure = [name for name in MEASURES if name != "forgetting" or problem_of(problem).main == "accuracy"]
        self.tokenizer = tokenizer
        self._prepare(model, problem, learner, keep, where, seed, device, measure, progress)
        if not main():  # of several processes that live this life, the first writes it down
            home = references = ledger = None
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
                "problem": self.problem.spec(),
                "learner": self._state.learner.spec(),
                "keep": [keeper.spec() for keeper in self._state.keepers],
                "where": self._where,
                "measure": self._metric_specs,
                "weights_sha256": weights_sha256(self.model.state_dict()),
                **({} if tokenizer is None else {"tokenizer": fingerprint_of(tokenizer)}),
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
        check_device(self.device)
        check_language(built, self.problem, self.tokenizer)
        self._blank = copy.deepcopy(built).cpu()
        self._keep_specs = [keeper.spec() for keeper in resolve_all("keep", keep, Keeper)]
        self._learner_spec = resolve("learn", learner or "finetune", Learner).spec()
        self._where = [w.spec() for w in resolve_all("where", where, Where)]
        self._metric_specs = [metric.spec() for metric in resolve_all("measure", list(measure), Metric)]
        self._progress = progress
        self._state = self._fresh_state(built.to(self.device))
        check_keepers(self._state.keepers)
        check_fits([self._state.learner, *self._state.keepers, *resolve_all("where", self._where, Where)], self.problem)
        self._learned: list[Learned] = []
        self._given: dict[str, Task] = {}  # the data of learn events by fingerprint, as it was given
        self._books = Books()
        self._references: dict[tuple[str, int], State] = {}
        self._retraining: dict[tuple[str, int], float] = {}  # seconds
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
        tokenizer: Any = None,
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
            tokenizer: as it was given then; a life run from a plan makes it itself.
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
        if world()[1] > 1:
            raise Refused("a life is not resumed by several processes; resume it by one, which gives the same numbers")
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
                if model is None or data is None:
                    made, stream, cut = model_and_data(home / "plan.yaml")
                    model, data = (made if model is None else model), (stream if data is None else data)
                    tokenizer = cut if tokenizer is None else tokenizer
            if model is None:
                raise BadInput("this life was not run from a plan: give the initial model, resume(home, model=...)")
            life.tokenizer = tokenizer
            if body.get("tokenizer") and (tokenizer is None or fingerprint_of(tokenizer) != body["tokenizer"]):
                said = (
                    "is not the one given"
                    if tokenizer is not None
                    else "is needed: resume(home, model, data, tokenizer=...)"
                )
                raise DataChanged(
                    f"the tokenizer that this life began with {said}; other tokens would be other examples"
                )
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
                known = learning.as_task(task, -1, life)
                life._given[known.fingerprint()] = known
            life._replay_rows()
            life._load_current()
            life._finish_owed()
            life._sweep()
            life._continue_request(opening=True)
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
        return {**state_bytes(self._state), "snapshots": self._snapshot_bytes(), **kept_bytes(self)}

    @property
    def events(self) -> list[Event]:
        """The committed events, in order."""
        return [self._event(row) for row in self._rows]

    @property
    def receipts(self) -> list[Any]:
        """The receipts so far, in order."""
        from remanence.life.erasing import receipt_from

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
        checkpointing: bool = False,
        snapshot_every: int | None = None,
        allow_forgotten: bool = False,
    ) -> Event:
        """Take new data in.

        Args:
            task: what to learn, with held-out data; bare `Examples` are measured on themselves. With ``epochs=0`` it is only shown: the
                weights stay, keepers look at it, and the books count it as learned. So a life is told what a pretrained network knows. What the
                network learned of such rows before its life no receipt covers.
            epochs, batch_size, optimizer, lr, schedule, clip, accumulate, precision, compile, patience, validation, checkpointing: see `Settings`.
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
        settings = Settings(
            epochs,
            batch_size,
            optimizer,
            lr,
            schedule,
            clip,
            accumulate,
            precision,
            compile,
            patience,
            validation,
            checkpointing,
        )
        row = learning.learn(
            self,
            task,
            settings,
            learner=learner,
            keep=keep,
            where=where,
            carry=carry,
            snapshot_every=snapshot_every,
            allow_forgotten=allow_forgotten,
        )
        return self._event(row)

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

    def predict(self, x: Any, task: int | None = None, *, tokens: int = 32) -> Any:
        """Answers for `x` (B, ...): labels (B,) of a classifier, values of a regressor. `task` restricts classes to that task's. Of a
        language model: `x` is a prompt or a list of prompts, and the answers are text, decoded greedily, of at most `tokens` tokens."""
        if isinstance(self.problem, CausalLM):
            return complete(self.model, self.tokenizer, x, tokens, self.problem)
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

    def audit(
        self, number: int | None = None, *, references: int = 3, shadows: int = 0, protocol: Any = None
    ) -> dict[str, Any]:
        """Attack what was forgotten, and write ``audit.json`` and ``audit.html`` into the home. The life itself stays as it is.

        For each request: membership attacks, and the checks of `measure.OpenProblems`, each beside the same figure of models retrained
        without all that was forgotten and of one retrained as if the request had not been made. That one, and the shadow models, learn
        forgotten data again; they are in memory only, and dropped.

        Args:
            number: of the receipt; None: every request that can still be tested. The data must be reachable, as for `forget`.
            references: models retrained, 2 or more.
            shadows: shadow models for the likelihood-ratio attack: 0, or an even number of 4 or more.
            protocol: an `OpenProblems` with knobs of your own.

        Returns:
            What is in ``audit.json``.

        Raises:
            BadInput: there is no such receipt, or a number that cannot be used.
            Refused: the data of an event cannot be reached.
        """
        from remanence.life.audit import audit

        return audit(self, number, references=references, shadows=shadows, protocol=protocol)

    def hardest(self, n: int, **knobs: Any) -> Ids:
        """The `n` learned examples that are hardest to forget, to ask for instead of random ones; nothing moves.

        Args:
            knobs: of `measure.WorstCaseForget`, such as ``easiest=True``.

        Raises:
            BadInput: n is not between 1 and what the life has learned, or an unknown knob.
            Refused: the data of an event cannot be reached.
        """
        from remanence.core.knobs import build
        from remanence.data import cat
        from remanence.measure.benchmarks.worst_case_forget import WorstCaseForget

        by = build(WorstCaseForget, knobs, "worst-case-forget")
        history = self._history()
        if not history:
            raise Refused(
                "this life has no learned data that can be reached; give it: Life.resume(home, model, data=...)"
            )
        chosen: Ids = by.select(self._context(), cat(history), n, self.seed)
        return chosen

    def content_digest(self) -> str:
        """SHA-256 of everything the ledger says but times, salts, signatures and attempts: equal lives have equal digests."""
        return self._ledger.content_digest()

    def redact(self) -> list[str]:
        """Remove request texts, salts and ids of every request whose ids are deleted everywhere; the chain stays whole."""
        from remanence.life.erasing import redact

        return redact(self)

    # ------------------------------------------------------------------ shared with forgetting

    def _writable(self) -> None:
        """Nothing new begins before what was begun is done: an erasure or a receipt's file that is owed, a request that was
        interrupted."""
        from remanence.life.erasing import copy_receipts

        if self._ledger.get_current("owed"):
            self._finish_owed()
        copy_receipts(self)
        self._continue_request()

    def _finish_owed(self) -> None:
        from remanence.life.erasing import finish

        finish(self)

    def _continue_request(self, opening: bool = False) -> None:
        from remanence.life.forgetting import continue_request

        continue_request(self, opening)

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
                elif self._books.tombstones:
                    test = unforgotten(test, *self._entities(learned))
                found[task.id] = replace(task, test=test)
        return list(found.values())

    def _entities(self, learned: Sequence[Learned] | None = None) -> tuple[set[Any], set[Any]]:
        """Of texts: whom (or, where the data names nobody, which documents) the life ever learned of, and of whom something is left."""
        ever: set[Any] = set()
        left: set[Any] = set()
        for item in self._learned if learned is None else learned:
            if item.task is not None:
                train = item.task.train.only(item.ids)
                ever.update(entities(train))
                left.update(entities(train.without(self._books.tombstones)))
        return ever, left

    def _lost_labels(self, learned: Sequence[Learned] | None = None) -> list[int]:
        """Labels of which every example ever learned was forgotten."""
        asked = bool(self._books.tombstones) or any(row.kind == "forget" and row.body["n"] for row in self._rows)
        if not isinstance(self.problem, Classification) or not asked:
            return []
        ever: set[int] = set()
        left: set[int] = set()
        for item in self._learned if learned is None else learned:
            if item.task is not None:
                y, ids = item.task.train["y"], item.task.train.id.numpy()
                mine = item.ids.isin(ids)
                ever.update(y.unique().tolist())  # of redacted rows nobody knows any more that they were learned
                left.update(y[torch.from_numpy(mine & ~self._books.tombstones.isin(ids))].unique().tolist())
        return sorted(ever - left)

    def _measured(self, learned: Sequence[Learned], metrics: Sequence[Metric] | None = None) -> dict[str, Any]:
        """Held-out score per task and of each wholly forgotten class, and the metrics' values."""
        c = self._context()
        c.found = {}  # metrics ask for the same sets
        tasks = self._tasks(learned)
        main = self.problem.main
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
        self._references.clear()
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


def _rounded(value: float) -> float:
    """Six digits: what a float32 mean is good for."""
    return float(f"{float(value):.6g}")
