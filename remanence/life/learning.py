"""A learn event of a life: accept, work, stage, commit. What killed it in between is undone, or gone on with from a snapshot."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput, DataChanged, EventFailed, NotFinite, Refused, StorageError
from remanence.core.ids import Ids
from remanence.core.problem import CausalLM, Classification
from remanence.data import Examples, Task
from remanence.data.tokens import is_text, tokenised_task
from remanence.life.events import Recipe, learn_event, without
from remanence.life.files import canonical
from remanence.life.language import check_text
from remanence.life.ledger import Row
from remanence.life.record import Learned
from remanence.life.snapshots import weights_sha256
from remanence.life.state import state_bytes
from remanence.train.loop import position
from remanence.train.resolve import check_fits, check_keepers, resolve, resolve_all
from remanence.train.roles import Keeper, Learner, Method, Where
from remanence.train.schedules import spec_of
from remanence.train.settings import Settings
from remanence.train.update import Consumed, Update

if TYPE_CHECKING:
    from remanence.life.life import Life


def learn(
    life: Life,
    task: Task | Examples,
    settings: Settings,
    *,
    learner: Any,
    keep: Any,
    where: Any,
    carry: bool,
    snapshot_every: int | None,
    allow_forgotten: bool,
) -> Row:
    """See `Life.learn`; the committed row."""
    life._writable()
    task = as_task(task, max([len(life._learned), *(item.about["id"] + 1 for item in life._learned)]), life)
    recipe = Recipe(
        ordinal=len(life._learned),
        settings={
            **{name: getattr(settings, name) for name in settings.__dataclass_fields__},
            "schedule": spec_of(settings.schedule),
        },
        learner=None if learner is None else resolve("learn", learner, Learner).spec(),
        keep=None if keep is None else [keeper.spec() for keeper in resolve_all("keep", keep, Keeper)],
        where=life._where if where is None else [w.spec() for w in resolve_all("where", where, Where)],
        carry=carry,
    )
    if keep is not None:
        check_keepers(resolve_all("keep", recipe.keep, Keeper))
    own = resolve_all("keep", recipe.keep, Keeper) if recipe.keep is not None else []
    check_fits([*own, *resolve_all("where", recipe.where, Where)], life.problem)
    canonical(recipe.as_json())  # refuses what cannot be written down
    _check_task(life, task)
    fingerprint = task.fingerprint()
    given = task
    gone = task.train.ids & life._books.tombstones
    if gone and not allow_forgotten:
        if len(gone) == len(task.train):
            raise Refused(
                "all of these examples were forgotten on request; learning them again must be asked for: allow_forgotten=True"
            )
        task = without(task, gone)
    label = f"learn task {task.id}"
    with life._ledger.begin() as tx:
        tx.append("attempt", {"kind": "learn", "label": label}, {"at": time.time()})
    start = time.perf_counter()
    try:
        u, consumed = _run(life, task, recipe, snapshot_every)
        seconds = time.perf_counter() - start - u.measuring  # to look is no cost of learning
        life._finite()
        measured = life._measured([*life._learned, Learned(recipe, task, consumed.new, {"id": task.id})])
        row = _commit(
            life,
            task,
            fingerprint,
            given,
            recipe,
            u,
            consumed,
            measured,
            len(gone) if not allow_forgotten else 0,
            seconds,
        )
    except BaseException as error:
        life._roll_back(error, label)
        if isinstance(error, NotFinite):
            raise EventFailed(f"{label} failed and the life is as it was before: {error}") from error
        raise
    with contextlib.suppress(StorageError):  # what is left of older snapshots is swept again at the next open
        life._sweep()
    return row


def _check_task(life: Life, task: Task) -> None:
    """Refuse data that cannot be told apart or learned from, before anything moves."""
    task.train.check()
    if task.test is not task.train:
        task.test.check()
    if isinstance(life.problem, CausalLM):
        check_text(task, life.model)
    elif "y" not in task.train.columns:
        raise BadInput(f"{task.train.source}: classification and regression need a column 'y'")
    if isinstance(life.problem, Classification) and task.train["y"].is_floating_point():
        raise BadInput(
            f"{task.train.source}: y has type {task.train['y'].dtype}; a life of classification needs integer labels (N,) (or use problem='regression')"
        )
    if not len(task.train):
        raise BadInput(f"task {task.id} has no training examples")
    fingerprint = task.fingerprint()
    for learned in life._learned:
        same = learned.about.get("source") == task.train.source
        shared = bool(task.train.ids & learned.ids)
        if (
            shared
            and learned.about.get("fingerprint") != fingerprint
            and (not same or task.train.positional)
            and _differs(learned, task)
        ):
            raise DataChanged(
                f"{task.train.source} uses ids that {learned.about['source']} used for other examples; give ids that are distinct over all "
                "sources: Examples(..., ids=...), or text(..., start=...)"
            )


def _differs(learned: Learned, task: Task) -> bool:
    """Whether a shared id stands for other content than when it was learned."""
    if learned.task is None:
        return learned.about.get("source") != task.train.source
    shared = task.train.ids & learned.task.train.ids
    return bool(shared) and content(learned.task.train, shared) != content(task.train, shared)


def _run(life: Life, task: Task, recipe: Recipe, snapshot_every: int | None) -> tuple[Update, Consumed]:
    saved = life._ledger.get_current("checkpoint")
    key = hashlib.sha256(canonical([recipe.as_json(), task.fingerprint()]).encode()).hexdigest()
    at = saved if saved is not None and saved["key"] == key else None

    def before(u: Update) -> None:
        if at is not None:
            packed = life._snapshots.load(at["manifest"])
            u.resume_at = {**packed["position"], "load": lambda: _load_into(u, packed)}

    def checkpoint(u: Update, _source: Any, index: Any, count: int) -> None:
        due = snapshot_every and u.step and u.step % snapshot_every == 0
        if due and not u._pending:
            holders = {str(i): part.state_dict() for i, part in enumerate(_stateful(u))}
            manifest = life._snapshots.save(
                {"position": position(u, index, count), "weights": dict(u.model.state_dict()), "holders": holders}
            )
            with life._ledger.begin() as tx:
                tx.set_current("checkpoint", {"key": key, "manifest": manifest})
            life._sweep()

    return learn_event(
        life._state,
        task,
        recipe,
        problem=life.problem,
        seed=life.seed,
        history=life._history(),
        tasks=life._tasks(),
        device=life.device,
        before=before,
        retrain=None,
        metrics=life.metrics,
        progress=life._progress,
        checkpoint=checkpoint if snapshot_every else None,
    )


def _commit(
    life: Life,
    task: Task,
    fingerprint: str,
    given: Task,
    recipe: Recipe,
    u: Update,
    consumed: Consumed,
    measured: dict[str, Any],
    skipped: int,
    seconds: float,
) -> Row:
    manifest = life._snapshots.save(life._state.pack())
    before = (life._rows[-1] if life._rows else life._born).body["weights_sha256"]
    moved = weights_sha256(life.model.state_dict())  # a keeper may move them where the learner does not
    entries = life._ledger.get_current("snapshots")
    kept = [entry for entry in entries if entry["event"] == 0] + [entry for entry in entries if entry["event"]][-1:]
    body = {
        "event": len(life._rows) + 1,
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
        "moves_weights": getattr(u.owner, "moves_weights", True) or moved != before,
        "steps": u.steps_done,
        "skipped_forgotten": skipped,
        "labels": list(life._state.labels),
        "holders": state_bytes(life._state),
        "extra_bytes": u.extra_bytes,
        "weights_sha256": weights_sha256(life.model.state_dict()),
        **measured,
    }
    with life._ledger.begin() as tx:
        body["new"] = life._ledger.lineage.put(consumed.new)
        body["replayed"] = life._ledger.lineage.put(consumed.replayed)
        body["consumed"] = {"new": len(consumed.new), "replayed": len(consumed.replayed)}
        future = {"seq": len(life._ledger), "event": body["event"], "manifest": manifest}
        erased = life._snapshots.sweep([e["manifest"] for e in [*kept, future]], dry=True)
        row = tx.append("learn", body, {"seconds": seconds, "at": time.time(), "erased": erased})
        tx.set_current("snapshots", [*kept, future])
        tx.set_current("checkpoint", None)
    life._given[fingerprint] = given
    life._learned.append(Learned(recipe, task, consumed.new, body["task"]))
    life._enter(row)
    life._settle_inputs()
    life._references.clear()
    return row


def _stateful(u: Update) -> list[Method]:
    """Everything in a run that remembers beside the weights."""
    return [u.owner, *u.parts, *u.metrics]


def _load_into(u: Update, packed: Mapping[str, Any]) -> None:
    u.model.load_state_dict(packed["weights"])
    for i, part in enumerate(_stateful(u)):
        part.load_state_dict(packed["holders"][str(i)])


def as_task(data: Task | Examples, number: int, life: Life) -> Task:
    """Bare examples as a task that is measured on itself; texts are cut into tokens."""
    task = _task(data, number)
    if not isinstance(life.problem, CausalLM) or not any(map(is_text, (task.train, task.test))):
        return task
    if life.tokenizer is None:
        raise BadInput("these are texts, and this life has no tokenizer to cut them: Life(..., tokenizer=...)")
    return tokenised_task(task, life.tokenizer, life.problem)


def _task(data: Task | Examples, number: int) -> Task:
    if isinstance(data, Task):
        return data
    if not isinstance(data, Examples):
        hint = "; a stream is learned task by task: stream[0]" if hasattr(data, "tasks") else ""
        raise BadInput(f"learn takes a Task or Examples, not {type(data).__name__}{hint}")
    labels = _labels(data)
    return Task(data, data, tuple(labels), tuple(map(str, labels)), number)


def _labels(examples: Examples) -> list[int]:
    y = examples.columns.get("y")
    return [int(v) for v in y.unique()] if isinstance(y, Tensor) and not y.is_floating_point() else []


def content(examples: Examples, ids: Ids) -> str:
    """A fingerprint of the rows of `ids`, whatever order they stand in."""
    part = examples.only(ids)
    return part.select(torch.argsort(part.id)).fingerprint()
