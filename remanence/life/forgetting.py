"""The first four of the seven steps of a forget request: accept, work, stage, commit. `erasing` has the others."""

from __future__ import annotations

import copy
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remanence.core.errors import BadInput, EventFailed, NotFinite, Refused, UnknownName
from remanence.core.ids import Ids
from remanence.core.problem import Classification
from remanence.core.rng import seed_of
from remanence.data import Examples, Request, cat
from remanence.data.request import COLUMNS
from remanence.life import erasing, receipts
from remanence.life.erasing import Receipt
from remanence.life.evidence import Assessment, Assessor
from remanence.life.ledger import Row, commit
from remanence.life.references import live_again, seconds_of
from remanence.life.snapshots import weights_sha256
from remanence.life.state import load_weights, state_bytes
from remanence.life.tracing import consumed_by
from remanence.train.loop import forget as forget_run
from remanence.train.resolve import check_fits, check_keepers, resolve, resolve_all
from remanence.train.roles import Forgetter, Keeper, Outcome, Where
from remanence.train.settings import Settings
from remanence.train.update import Trial, Update, hooks

if TYPE_CHECKING:
    from remanence.life.life import Life

#: Verdicts of a figure that does not speak against being as good as retrained.
REACHED = ("indistinguishable from retraining", "this request cannot tell")


@dataclass
class _Asked:
    """An accepted request, all that is needed to carry it out or to carry it out again."""

    number: int
    request: Request
    ids: Ids
    unseen: int
    by: Forgetter
    keep: list[Keeper]
    where: list[Where]
    settings: Settings
    seeds: int
    limit: float | None


def forget(
    life: Life,
    request: Request,
    *,
    by: Any,
    keep: Any,
    where: Any,
    verify: Any,
    retain: str,
    settings: Mapping[str, Any],
    limit: float | None,
) -> Receipt:
    """See `Life.forget`."""
    life._writable()
    if not isinstance(request, Request):
        raise BadInput(f"forget needs a Request, such as Request(classes=[3]), not {type(request).__name__}")
    if retain != "lineage":
        raise BadInput(f"retain={retain!r}: only 'lineage' is known, everything learned and not asked to be forgotten")
    if limit is not None and not 0 <= limit <= 1:
        raise BadInput(f"limit={limit} is a drop of accuracy between 0 and 1")
    method = resolve("forget", by, Forgetter)
    keepers, wheres = resolve_all("keep", keep, Keeper), resolve_all("where", where, Where)
    check_keepers(keepers)
    check_fits([method, *keepers, *wheres], life.problem)
    if not method.trains and (keepers or wheres):
        raise BadInput(
            f"{method.slug} trains nothing in the request itself, so keep and where cannot act in it; leave them out"
        )
    made = Settings(**{**method.defaults, **settings})
    seeds = seeds_of(verify)
    try:
        ids, unseen = _resolve(life, request)
        asked = _Asked(0, request, ids, len(unseen), method, keepers, wheres, made, seeds, limit)
        repeated = _repeat(life, asked)
        if repeated is not None:
            return repeated
        asked.ids = asked.ids - (life._books.tombstones - life._books.holding())  # deleted by an earlier request
        _check(life, asked)
    except (Refused, UnknownName) as error:
        with life._ledger.begin() as tx:
            tx.append("refused", {"by": method.slug}, {"reason": str(error), "at": time.time()})
        raise
    _ask(life, asked, request)
    erasing.reached("accept")
    return _carry_out(life, asked)


def seeds_of(verify: Any) -> int:
    """How many references `verify` asks for: None is 0, ``"retrain"`` is 3, ``{"retrain": {"seeds": n}}`` is n.

    Raises:
        BadInput: anything else.
    """
    if verify is None:
        return 0
    name, knobs = next(iter(verify.items())) if isinstance(verify, Mapping) and len(verify) == 1 else (verify, {})
    seeds = (knobs or {}).get("seeds", 3) if isinstance(knobs or {}, Mapping) else None
    if (
        name != "retrain"
        or set(knobs or {}) - {"seeds"}
        or not isinstance(seeds, int)
        or isinstance(seeds, bool)
        or not 1 <= seeds <= 100
    ):
        raise BadInput(f"verify={verify!r}: give None, 'retrain' or {{'retrain': {{'seeds': 1 to 100}}}}")
    return seeds


# -- 1. accept --------------------------------------------------------------------------------------------------------


def _resolve(life: Life, request: Request) -> tuple[Ids, Ids]:
    """What the request covers: ids that the life has consumed; and the ids asked for that it never has."""
    if request.targets is not None and isinstance(life.problem, Classification):
        raise UnknownName(
            "a range of targets is asked of a regression, and this life has classes; ask by classes=[...]"
        )
    seen = [learned.task.train.only(learned.ids) for learned in life._learned if learned.task is not None]
    if request.ids is not None and not any(getattr(request, name) is not None for name in COLUMNS):
        return request.ids & life._books.touched, request.ids - life._books.touched
    if not seen:
        if life._learned:
            raise Refused(
                "the request must be resolved against the data, which cannot be reached; resume with data=..., or ask by ids"
            )
        return Ids(), request.ids or Ids()
    found, unseen = request.resolve(seen)
    if request.ids is not None:
        found = found | (request.ids & life._books.touched)
        unseen = unseen - life._books.touched
    return found, unseen


def _repeat(life: Life, asked: _Asked) -> Receipt | None:
    """The earlier receipt, if nothing of the request was consumed since and its result is at least as strong."""
    if not asked.ids or not asked.ids <= life._books.tombstones:
        return None
    rows = [row for row in life._ledger.rows("forget") if row.body["n"] and asked.ids <= life._ids(row.body["ids"])]
    if not rows:
        return None
    deleted = not (asked.ids & life._books.consumed) - life._books.states["deleted"]
    same = rows[-1].body["method"] == asked.by.spec() and rows[-1].body["settings"] == _jsonable(asked.settings)
    if not deleted and not (same and rows[-1].body["seeds"] >= asked.seeds):
        return None
    number = rows[-1].body["number"]
    return next((receipt for receipt in life.receipts if receipt.number == number), None)


def _check(life: Life, asked: _Asked) -> None:
    """Refuse what cannot be carried out, before anything moves; a signing key that is missing is a `StorageError`."""
    receipts.public_key(receipts.chain_key(life._ledger))
    if not asked.ids:
        return
    reachable = all(learned.task is not None for learned in life._learned)
    if not reachable and (asked.by.slug == "retrain" or asked.seeds):
        raise Refused("retraining needs the data of every event; give it: Life.resume(home, model, data=...)")
    if reachable and not life._history(life._books.tombstones | asked.ids):
        raise Refused(
            "the request would remove everything this life learned; delete the life instead (remanence delete HOME)"
        )
    if asked.by.learner:
        _check_learner(life, asked)
    elif not life._state.learner.moves_weights and not asked.ids & life._books.consumed and asked.by.slug != "retrain":
        raise Refused(
            f"{life._state.learner.slug} trains no weights, so {asked.by.slug} would find nothing in them; ask by='retrain', which "
            "counts the rest afresh"
        )
    if not any(learned.task is not None and learned.task.train.ids & asked.ids for learned in life._learned):
        raise Refused("the examples to forget cannot be reached, and every method needs them; resume with data=...")
    need = (
        2
        * max([life._snapshots.bytes(entry["manifest"]) for entry in life._ledger.get_current("snapshots")], default=0)
        + 2**20
    )
    free = shutil.disk_usage(life.home).free
    if free < need:
        raise Refused(
            f"the disk has {free} bytes free where this request may need {need}; free some space and ask again"
        )


def _check_learner(life: Life, asked: _Asked) -> None:
    """Refuse a method that works through the life's learner where that learner did not make everything that holds the examples."""
    by, has = asked.by, life._state.learner.slug
    if has != by.learner:
        raise Refused(
            f"{by.slug} works through the learner {by.learner!r}, and this life learns with {has}; ask by='retrain'"
        )
    if asked.ids & life._books.consumed:
        raise Refused(
            f"{by.slug} works through the learner {has!r}, and the weights learned these examples, too; ask by='retrain'"
        )
    lost = asked.ids
    for item in life._learned:
        lost = lost if item.task is None else lost - item.task.train.ids
    if lost:
        raise Refused(
            f"{len(lost)} of the examples cannot be reached, and {by.slug} needs each of them; resume with data=..."
        )
    keepers = [keeper for keeper in life._state.keepers if not keeper.inert]
    keepers += [k for item in life._learned for k in resolve_all("keep", item.recipe.keep, Keeper) if not k.inert]
    if keepers:
        names = ", ".join(sorted({keeper.slug for keeper in keepers}))
        raise Refused(
            f"{by.slug} is exact only where nothing else carries examples on, and this life has keepers: {names}; ask by='retrain'"
        )


def _ask(life: Life, asked: _Asked, request: Request) -> None:
    """The row `asked`; a request whose row is already open goes on under its number."""
    pending = open_request(life)
    settings = _jsonable(asked.settings)
    body = {
        "by": asked.by.spec(),
        "keep": [keeper.spec() for keeper in asked.keep],
        "where": [where.spec() for where in asked.where],
        "settings": settings,
        "seeds": asked.seeds,
        "limit": asked.limit,
        "n": len(asked.ids),
        "unseen": asked.unseen,
    }
    with life._ledger.begin() as tx:
        body["ids"] = life._ledger.lineage.put(asked.ids)
        if pending is not None and {k: v for k, v in pending.body.items() if k != "number"} == body:
            asked.number = pending.body["number"]
            return
        asked.number = len(life._ledger.rows("asked")) + 1
        salt = secrets.token_bytes(16)
        tx.put_private(
            f"request/{asked.number}", {"asked": request.asked(), "plain": request.plain(), "salt": salt.hex()}
        )
        tx.append("asked", {"number": asked.number, **body}, {"commitment": commit(asked.ids, salt), "at": time.time()})


def open_request(life: Life) -> Row | None:
    """The accepted request that was neither committed nor failed, if there is one."""
    asked = life._ledger.last("asked")
    if asked is None:
        return None
    later = [row for row in life._ledger.rows(("forget", "failed", "learn")) if row.seq > asked.seq]
    return None if later else asked


def continue_request(life: Life, opening: bool = False) -> None:
    """After a crash: carry out the request that was accepted but not committed, from its row and with the same seed."""
    row = open_request(life)
    if row is None:
        return
    if any(learned.task is None for learned in life._learned):
        if not opening:
            raise Refused(
                f"forget request {row.body['number']} was accepted and not carried out yet, which needs the data: "
                "Life.resume(home, model, data=...)"
            )
        return
    private = life._ledger.get_private(f"request/{row.body['number']}")
    body = row.body
    asked = _Asked(
        body["number"],
        Request(**private["asked"]),
        life._ids(body["ids"]),
        body["unseen"],
        resolve("forget", body["by"], Forgetter),
        resolve_all("keep", body["keep"], Keeper),
        resolve_all("where", body["where"], Where),
        Settings(**body["settings"]),
        body["seeds"],
        body["limit"],
    )
    _carry_out(life, asked)


# -- 2. work, 3. stage, 4. commit -------------------------------------------------------------------------------------


def _carry_out(life: Life, asked: _Asked) -> Receipt:
    start = time.perf_counter()
    label = f"forget request {asked.number}"
    try:
        work = _work(life, asked) if asked.ids else None
        if work is not None:
            life._books = copy.deepcopy(life._books)
            life._books.forgotten(asked.ids, work.state, work.why, work.whole)
        measured = life._measured(life._learned)
        erasing.reached("work")
        manifest = life._snapshots.save(life._state.pack())
        erasing.reached("stage")
        row = _commit(life, asked, work, measured, manifest, time.perf_counter() - start)
        life._enter(row)
        life._settle_inputs()
        life._references.clear()
    except BaseException as error:
        life._roll_back(error, label)
        if isinstance(error, NotFinite | EventFailed):
            raise EventFailed(f"{label} failed and the life is as it was before: {error}") from error
        raise
    erasing.reached("commit")
    erasing.finish(life)
    found: Receipt = next(receipt for receipt in life.receipts if receipt.number == asked.number)
    return found


@dataclass
class _Work:
    """What the work came to."""

    outcome: Outcome
    assessment: Assessment
    held: dict[str, int]
    state: str
    why: str
    seconds: dict[str, float]
    steps: int
    peak: int

    @property
    def whole(self) -> bool:
        """Whether the life was lived again, without everything forgotten so far."""
        return self.outcome.exact and self.outcome.model is not None


def _work(life: Life, asked: _Asked) -> _Work:
    """Run the method on the life's state (whose committed copy is on disk), purge the holders, measure."""
    gone = life._books.tombstones | asked.ids
    parts = [learned.task.train.only(asked.ids & learned.ids) for learned in life._learned if learned.task is not None]
    forget_set = cat([part for part in parts if len(part)])
    retained = life._history(gone)
    retain_set = cat(retained) if retained else forget_set.select(forget_set.id[:0])
    assessor = Assessor(life, forget_set, retain_set)
    again = asked.seeds > 0
    before = assessor.answers(life._state, again)
    held = _held(life, asked.ids)
    clock = time.perf_counter()
    for method in life._state.holders().values():
        method.purge(asked.ids)
    outcome, steps, peak = _run(life, asked, forget_set, retain_set, retained, gone)
    seconds = {"method": time.perf_counter() - clock}
    if outcome.exact and outcome.model is not None:  # found in a shared folder, it costs what it cost
        seconds["method"] = seconds_of(life, gone, life.seed) or seconds["method"]
    life._finite()
    after = assessor.answers(life._state, again)
    _limit(asked, before["figures"], after["figures"])
    seeds = [reference_seed(life.seed, k) for k in range(asked.seeds)]
    answers = [assessor.answers(live_again(life, gone, seed), again) for seed in seeds]
    seconds["references"] = sum(seconds_of(life, gone, seed) for seed in seeds)
    assessment = assessor.assess(before, after, answers)
    slug = asked.by.slug
    if outcome.exact:
        state, why = "deleted", outcome.how or "retrained: equal in bits to a life without them"
    elif outcome.guards:
        state, why = "suppressed", f"hidden by a guard of {slug}"
    elif assessment.earned:
        state, why = "unlearned", f"{slug}: {assessment.reason}"
    else:
        state, why = "holds", f"attempted: {slug}; {assessment.reason}"
    return _Work(outcome, assessment, held, state, why, seconds, steps, peak)


def reference_seed(seed: int, k: int) -> int:
    """The seed of the k-th reference of a life: never the life's own."""
    return seed_of(seed, "reference", k) % 2**31 + 1


def _run(
    life: Life, asked: _Asked, forget_set: Examples, retain_set: Examples, retained: Sequence[Examples], gone: Ids
) -> tuple[Outcome, int, int]:
    state = life._state
    sources = {
        "forget": lambda: forget_set,
        "retain": lambda: retain_set,
        "seen": lambda: cat([part for part in (retain_set, forget_set) if len(part)]),
        "task": lambda: retain_set,
    }

    def update(
        owner: Any, kind: str, parts: Sequence[Any], model: Any = None, settings: Settings | None = None
    ) -> Update:
        return Update(
            model=state.model if model is None else model,
            problem=life.problem,
            owner=owner,
            settings=settings or asked.settings,
            data=lambda name: _source(sources, name),
            parts=parts,
            labels=state.labels,
            old_labels=state.met,
            tasks=life._tasks(),
            device=life.device,
            seed=life.seed,
            event=f"forget/{asked.number}",
            kind=kind,
            progress=life._progress,
            life_step=state.steps,
            retrain=lambda ids, seed: live_again(life, gone | ids, seed).model,
            history=lambda: list(retained),
        )

    def trial(by: Forgetter, references: int) -> Trial:
        made = copy.deepcopy(state)
        clock = time.perf_counter()
        t = update(by, "forget", [], made.model, Settings(**by.defaults))
        t.learner, t.keepers = made.learner, made.keepers
        tried = forget_run(t, asked.request)
        seconds = time.perf_counter() - clock
        assessor = Assessor(life, forget_set, retain_set, "tune")
        after = assessor.answers(made)
        known = [live_again(life, gone, reference_seed(life.seed, k)) for k in range(references)]
        before, others = assessor.answers(state), [assessor.answers(s) for s in known]
        cells, same = assessor.assess(before, after, others).cells, assessor.assess(before, before, others).cells
        return Trial(
            by.slug,
            [cell["metric"] for cell in cells if cell["verdict"] not in REACHED],
            [cell["metric"] for cell in cells if cell["verdict"] == "farther"],
            [cell["metric"] for cell in cells if cell["verdict"] == "closer than doing nothing"],
            [cell["metric"] for cell in same if cell["verdict"] not in REACHED],
            seconds,
            tried.notes,
            lambda: load_weights(state.model, made.model.state_dict()),
        )

    u = update(asked.by, "forget", [*asked.keep, *asked.where])
    u.learner, u.keepers, u.trial = state.learner, state.keepers, trial
    outcome = forget_run(u, asked.request)
    if outcome.exact and outcome.model is None and not asked.by.learner:
        raise EventFailed(f"{asked.by.slug} says its result is exact, but neither retrained nor asked the learner")
    if outcome.exact and outcome.model is not None:
        made = next((s for s in life._references.values() if s.model is outcome.model), None)
        if made is None:
            raise EventFailed(f"{asked.by.slug} says its result is exact but did not retrain through the life")
        life._state = copy.deepcopy(made)
        life._state.metrics = state.metrics
    else:
        state.steps += u.steps_done
        state.optimizer = {}
        for forgot in hooks(list(state.holders().values()), "forgot"):
            again = update(state.learner, "forgot", [state.learner, *state.keepers])
            with again._exit:
                forgot(again, asked.ids)
    return outcome, u.steps_done, u.peak_bytes


def _source(sources: Mapping[str, Any], name: str) -> Examples:
    if name not in sources:
        raise BadInput(f"a forget run has no data called {name!r}; there is {', '.join(sources)}")
    found = sources[name]()
    assert isinstance(found, Examples)
    return found


def _held(life: Life, ids: Ids) -> dict[str, int]:
    """How many of `ids` each holder held before."""
    held = {"weights": len(ids & life._books.holding())}
    held.update({name: len(method.holds(ids)) for name, method in life._state.holders().items()})
    for entry in life._ledger.get_current("snapshots"):
        if entry["event"]:
            held[f"snapshots/{entry['event']}"] = len(ids & consumed_by(life, entry["event"]))
    for entry in life._ledger.get_current("references", []):
        held[f"references/{entry['key'][:8]}"] = len(ids & life._ids(entry["ids"]))
    return {name: n for name, n in held.items() if n}


def _limit(asked: _Asked, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    if asked.limit is None:
        return
    if "test accuracy" not in before:
        raise EventFailed("a limit is a drop of held-out accuracy, and this life has none to look at; leave it out")
    drop = before["test accuracy"] - after.get("test accuracy", 0.0)
    if drop > asked.limit:
        raise EventFailed(
            f"held-out accuracy fell by {drop:.3f}, more than the limit {asked.limit}; try a gentler setting of {asked.by.slug}"
        )


def _commit(
    life: Life, asked: _Asked, work: _Work | None, measured: dict[str, Any], manifest: dict[str, Any], seconds: float
) -> Row:
    entries = life._ledger.get_current("snapshots")
    kept = [entry for entry in entries if not entry["event"] or not asked.ids & consumed_by(life, entry["event"])]
    body: dict[str, Any] = {
        "event": len(life._rows) + 1,
        "label": f"forget request {asked.number}",
        "number": asked.number,
        "n": len(asked.ids),
        "unseen": asked.unseen,
        "by": asked.by.slug,
        "method": asked.by.spec(),
        "settings": _jsonable(asked.settings),
        "keep": [keeper.slug for keeper in asked.keep],
        "where": [where.slug for where in asked.where],
        "seeds": asked.seeds,
        "status": "done" if work is not None else "nothing held",
        "weights_state": work.state if work is not None else "deleted",
        "why": work.why if work is not None else "never consumed",
        "exact": work is not None and work.whole,
        "through": f"learn/{asked.by.learner}" if asked.by.learner else "",
        "held": work.held if work is not None else {},
        "notes": work.outcome.notes if work is not None else [],
        "evidence": work.assessment.cells if work is not None else [],
        "before": work.assessment.before if work is not None else {},
        "after": work.assessment.after if work is not None else {},
        "earned": work.assessment.reason if work is not None else "",
        "steps": work.steps if work is not None else 0,
        "peak_bytes": work.peak if work is not None else 0,
        "labels": list(life._state.labels),
        "holders": state_bytes(life._state),
        "weights_sha256": weights_sha256(life.model.state_dict()),
        **measured,
    }
    with life._ledger.begin() as tx:
        body["ids"] = life._ledger.lineage.put(asked.ids)
        entry = {"seq": len(life._ledger), "event": body["event"], "manifest": manifest}
        now = [*kept, entry] if work is not None else entries
        erase = life._snapshots.sweep([e["manifest"] for e in now], dry=True)
        row = tx.append(
            "forget", body, {"seconds": seconds, "parts": work.seconds if work is not None else {}, "at": time.time()}
        )
        tx.set_current("snapshots", now)
        tx.set_current("checkpoint", None)
        stale = [e["key"] for e in life._ledger.get_current("references", []) if asked.ids & life._ids(e["ids"])]
        tx.set_current("owed", {"number": asked.number, "erase": erase, "references": stale})
    return row


def _jsonable(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


__all__ = ["continue_request", "forget"]
