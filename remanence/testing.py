"""The contract of a part, executable: `check` runs a part through a small life on real digits and says which rule it breaks."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from remanence import catalogue
from remanence.core.errors import BadInput, RemanenceError, UnknownName, nearest
from remanence.core.ids import Ids
from remanence.core.knobs import build
from remanence.core.part import Part
from remanence.data import Request, Stream, Task, digits, split_classes
from remanence.life.life import Life
from remanence.life.snapshots import weights_sha256
from remanence.life.tracing import records_held
from remanence.models import mlp
from remanence.train.resolve import know
from remanence.train.roles import Benchmark, Forgetter, Keeper, Learner, Method, Metric, Where

__all__ = ["ContractError", "check"]


class ContractError(RemanenceError):
    """A part breaks a rule of the contract. `rule` is the rule's name; the message says how to see it."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


def check(
    part: Part | str | type[Method],
    knobs: Mapping[str, Any] | None = None,
    *,
    inert: Mapping[str, Any] | None = None,
    model: Callable[[], nn.Module] | None = None,
    rules: Sequence[str] | None = None,
) -> list[str]:
    """Check that `part` keeps the contract, as scikit-learn's `check_estimator` does for estimators.

    Every rule runs the part in lives of two or three tasks on 240 real digits, some seconds in all: it runs; twice gives the
    same weights; a crash between and inside events changes no bit; after a forget no copy of a record is left, and a keeper
    does not teach a forgotten class back; bytes are counted; wrong knobs and NaN are refused before a weight moves; no global
    state is touched; without strength it changes no bit; docstring and knobs are documented.

    Args:
        part: a `Part`, its name (``"keep/ewc"``, ``"ewc"``) or a class (which need not be in the catalogue).
        knobs: the knobs to check it with, where its defaults do not suit so small a problem; every other is its default.
        inert: knobs with which it can have no effect; None: ``strength=0`` if it has a knob `strength`, else the rule is left out.
        model: builds the network, which takes rows of 64 numbers; None: a perceptron with 16 hidden units and dropout. A part that needs
            a regression gets the digits as numbers to be told, and a network of one output.
        rules: only these rules.

    Returns:
        The names of the rules that ran, in order.

    Raises:
        ContractError: the first rule that is broken, and how to see it.
        UnknownName: no such part or rule.
        BadInput: a class that is no part, or a name that several verbs have.
    """
    cls = _load(part)
    role = next((r for r in RULES if isinstance(cls, type) and issubclass(cls, r)), None)
    if role is None:
        raise BadInput(f"{cls!r} is neither of {', '.join(r.__name__ for r in RULES)}; check takes these roles")
    mine = {rule.__name__.removeprefix("_"): rule for rule in (*EVERY, *RULES[role])}
    for name in rules or ():
        if name not in mine:
            raise UnknownName(f"{role.__name__} has no rule {name!r}{nearest(name, mine)} (it has {', '.join(mine)})")
    if inert is None and "strength" in {f.name for f in dataclasses.fields(cls)}:
        inert = {"strength": 0}
    ran = []
    with tempfile.TemporaryDirectory(prefix="remanence-check-") as folder:
        numbers = any(
            "regression" in p.needs for p in catalogue.every() if (p.module, p.name) == (cls.__module__, cls.__name__)
        )
        network = model or (_regressor if numbers else _perceptron)
        case = _Case(cls, role, dict(knobs or {}), inert, network, Path(folder), numbers)
        for name, rule in mine.items():
            if (rules is None or name in rules) and not (rule is _strength_0_changes_nothing and inert is None):
                with case.rule(name):
                    rule(case)
                ran.append(name)
    return ran


def _load(part: Part | str | type[Method]) -> type[Any]:
    if isinstance(part, str):
        found = catalogue.named(part)
        if len(found) > 1:
            raise BadInput(f"{part!r} is a part of {', '.join(p.verb for p in found)}; say verb/{part}")
        part = found[0]
    return part.load() if isinstance(part, Part) else part


def _perceptron() -> nn.Module:
    return mlp(64, [16], dropout=0.1)


def _regressor() -> nn.Module:
    return mlp(64, [16], 1, dropout=0.1)


def _told(task: Task) -> Task:
    """The task with its labels as real targets."""
    train, test = (part.replace(y=part["y"].float()[:, None]) for part in (task.train, task.test))
    return Task(train, test, (), (), task.id)


@cache
def _stream() -> Stream:
    """Forty examples of each of six digits, as three tasks; ten of each are held out."""
    data = digits()
    rows = torch.cat([(data["y"] == label).nonzero()[:40, 0] for label in range(6)])
    return split_classes(data.select(rows), tasks=3, name="contract")


class _Crash(KeyboardInterrupt):
    """A life that is cut off: nothing catches it."""


@dataclasses.dataclass
class _Case:
    """One part under check: how to build it, and the lives it is put in."""

    cls: type[Any]
    role: type[Method]
    knobs: dict[str, Any]
    inert: Mapping[str, Any] | None
    model: Callable[[], nn.Module]
    folder: Path
    numbers: bool = False

    def __post_init__(self) -> None:
        self.name, self._lives = "", 0
        self.tasks = [_told(task) if self.numbers else task for task in _stream()]
        self.everyone = self.tasks[0].train.ids | self.tasks[1].train.ids
        know(self.cls)

    @contextmanager
    def rule(self, name: str) -> Iterator[None]:
        """Whatever goes wrong inside becomes a `ContractError` of this rule."""
        self.name = name
        try:
            yield
        except ContractError:
            raise
        except Exception as error:
            raise ContractError(name, f"{self.cls.__name__} raised {type(error).__name__}: {error}") from error

    def holds(self, truth: Any, message: str) -> None:
        if not truth:
            raise ContractError(self.name, f"{self.cls.__name__} {message}")

    def make(self, **knobs: Any) -> Any:
        return self.cls(**{**self.knobs, **knobs})

    @contextmanager
    def life(self, part: Any = "make", home: Path | None = None) -> Iterator[Life]:
        """A new life with the part (None: without it), or the one at `home`, resumed."""
        part = self.make() if part == "make" else part
        if home is not None:
            life = Life.resume(home, self.model(), data=self.tasks, parts=[self.cls])
        else:
            self._lives += 1
            place = {Learner: "learner", Keeper: "keep", Where: "where", Metric: "measure"}.get(self.role, "")
            given: dict[str, Any] = {} if part is None or not place else {place: part if place == "learner" else [part]}
            if getattr(self.cls, "learner", ""):  # a forgetter that works through one
                given["learner"] = self.cls.learner
            given = {"measure": ["accuracy"], "problem": "regression" if self.numbers else None, **given}
            life = Life(self.model(), home=self.folder / str(self._lives), seed=7, **given)
        try:
            yield life
        finally:
            life.close()

    def learn(self, life: Life, *tasks: int | Task, **settings: Any) -> None:
        for task in tasks:
            chosen = self.tasks[task] if isinstance(task, int) else task
            life.learn(chosen, **{"epochs": 4, "batch_size": 15, "lr": 0.01, **settings})

    def forget(self, life: Life, part: Any = "make", **request: Any) -> Any:
        request = request or ({"targets": [0, 0]} if self.numbers else {"classes": [0]})
        return life.forget(Request(**request), by=self.make() if part == "make" else part)

    def live(self, life: Life) -> None:
        """What a part of this role is there for: two tasks, and for a forgetter a request."""
        self.learn(life, 0, 1)
        if self.role is Forgetter:
            self.forget(life)

    @cached_property
    def straight(self) -> _Seen:
        """A life without a crash."""
        _plain(self.model, self.numbers)  # lazy imports have their own side effects: they are over after it
        return self._seen()

    @cached_property
    def again(self) -> _Seen:
        return self._seen()

    def _seen(self) -> _Seen:
        before = _global_state()
        with self.life() as life:
            self.live(life)
            after, bits = _global_state(), _bits(life)
            part = next((m for m in (life._state.learner, *life._state.keepers) if type(m) is self.cls), self.make())
            figures = [metric.value(life._context()) for metric in life.metrics if type(metric) is self.cls]
            changed = [name for name, value in after.items() if value != before[name]]
            held = part.holds(self.everyone | Ids([10**9]))
            return _Seen(bits, changed, part.bytes(), sum(_sizes(part.state_dict())), held, figures)

    @cached_property
    def forgotten(self) -> tuple[list[str], list[float]]:
        """A life with two forgets: what was left that should not be, and how much of a forgotten class is answered rightly
        among the classes of its time, after the request and one task later."""
        said, shares = list[str](), list[float]()
        with self.life() as life:
            self.learn(life, 0, 1, epochs=8)
            if life._books.consumed:  # else the weights were never moved, and there is nothing in them to approximate
                by: dict[str, Any] = {"by": "random-label", "epochs": 15, "optimizer": "adamw", "lr": 0.01}
                said += _left(life, life.forget(Request(classes=[2]), **by))
                shares.append(_share(life))
            self.learn(life, 2, epochs=12)
            shares.append(_share(life))
            receipt = life.forget(Request(ids=Ids(self.tasks[0].train.id[::7].numpy()), classes=[2]), by="retrain")
            said += _left(life, receipt)
            said += [f"after retraining, leaves a trace: {t}" for t in life.trace(receipt.ids) if t.state != "deleted"]
        return said, shares


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a life came to: its bits, the global state it changed, bytes as the part says and as it saves, the
    examples it says it holds, its figures."""

    bits: str
    changed: list[str]
    said: Any
    stored: int
    holds: Ids
    figures: list[Any]


@cache
def _plain(model: Callable[[], nn.Module], numbers: bool) -> str:
    """The weights after two tasks without any part."""
    with tempfile.TemporaryDirectory(prefix="remanence-check-") as folder:
        case = _Case(Metric, Metric, {}, None, model, Path(folder), numbers)
        with case.life(None) as life:
            case.learn(life, 0, 1)
            return weights_sha256(life.model.state_dict())


def _bits(life: Life) -> str:
    """Weights, learner, keepers and metrics to the last bit."""
    return json.dumps(life._snapshots.save(life._state.pack()), sort_keys=True)


def _global_state() -> dict[str, Any]:
    return {
        "torch's random numbers": torch.get_rng_state().numpy().tobytes(),
        "numpy's random numbers": str(np.random.get_state()),
        "Python's random numbers": random.getstate(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's threads": torch.get_num_threads(),
        "torch's modes": (torch.is_grad_enabled(), torch.get_deterministic_debug_mode()),
        "numpy's error handling": np.geterr(),
        "the warnings filters": [f for f in warnings.filters if f[3] is None],  # libraries add some for themselves
    }


def _sizes(state: Any) -> Iterator[int]:
    """Bytes of every tensor, array and number in a nested state."""
    if isinstance(state, torch.Tensor | np.ndarray):
        yield state.nbytes
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _sizes(value)
    elif isinstance(state, int | float) and not isinstance(state, bool):
        yield 8


def _ids(label: int) -> Ids:
    data = _stream()[label // 2].train
    return data.select((data["y"] == label).nonzero()[:, 0]).ids


def _left(life: Life, receipt: Any) -> list[str]:
    """Records of forgotten examples, and claims that are not true."""
    said = []
    for name, method in life._state.holders().items():
        records = records_held(method, receipt.ids)
        made_up = method.holds(receipt.ids) - records - life._books.holding()
        if records:
            said.append(f"keeps records of {len(records)} forgotten examples in {name}: purge must drop them")
        if made_up:
            said.append(f"says that {name} holds {len(made_up)} examples of which no trace is left")
    rows = [t for t in life.trace(receipt.ids) if t.state == "holds" and t.holder != "weights" and not t.inputs]
    return said + [f"leaves a trace: {row}" for row in rows]


def _share(life: Life) -> float:
    """How many of class 2 are answered rightly among the classes 0 to 3."""
    gone, c = _stream()[1].train.only(_ids(2)), life._context()
    columns = [life._state.labels.index(label) for label in range(4)]
    best = c.outputs(c.mapped(gone))[:, columns].argmax(1)
    return float((best == 2).float().mean())


# ------------------------------------------------------------------------------------------------- rules for every role


def _documented(case: _Case) -> None:
    text = inspect.getdoc(case.cls) or ""
    if "head of this file" in text.replace("\n", " "):  # a long formula may stand there
        text += f"\n{sys.modules[case.cls.__module__].__doc__}"
    for what, pattern in SAID.items():
        case.holds(re.search(pattern, text), f"does not say {what} in its docstring")
    for field in dataclasses.fields(case.cls):
        case.holds(field.metadata.get("doc"), f"has a knob {field.name!r} without a sentence: knob(default, doc, ...)")


SAID = {
    "its formula, on an indented line of its own,": r"(?m)^ {2,}\S.*([=<>+~]|->)",
    "when to pick it ('Pick it ...')": r"\bPick it\b",
    "what it needs ('Needs: ...')": r"\bNeeds:",
    "its source ('Reference: ...')": r"\b(References?|Source):|arXiv",
}


def _can_be_written_down(case: _Case) -> None:
    spec = json.loads(json.dumps(case.make().spec()))
    again = build(case.cls, next(iter(spec.values())), case.cls.__name__)
    case.holds(again.spec() == case.make().spec(), f"is not the same after its knobs went through JSON: {spec}")


def _wrong_knobs_are_refused(case: _Case) -> None:
    wrong: list[dict[str, Any]] = [{"no_such_knob": 1}]
    for field in dataclasses.fields(case.cls):
        low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
        wrong += [{field.name: object()}] if "Any" not in str(field.type) else []
        wrong += [{field.name: math.nan}] if "float" in str(field.type) else []
        wrong += [{field.name: low - 1}] if low is not None else []
        wrong += [{field.name: high + 1}] if high is not None else []
        wrong += [{field.name: "no such choice"}] if choices else []
    for given in wrong:
        try:
            build(case.cls, {**case.knobs, **given}, case.cls.__name__)
        except BadInput:
            continue
        case.holds(False, f"accepts {given}; BadInput was due (UnknownName for a knob it lacks)")


def _runs(case: _Case) -> None:
    case.holds(case.straight.bits, "did not run")


def _twice_the_same(case: _Case) -> None:
    case.holds(case.again.bits == case.straight.bits, "gives other bits when run twice: draw from u.rng(name) only")


def _touches_nothing_global(case: _Case) -> None:
    changed = case.straight.changed
    case.holds(not changed, f"changed {', '.join(changed)}: they belong to the user's process")


def _survives_a_crash(case: _Case) -> None:
    """Killed between two events and again inside the next one, the life ends as if nothing had been."""
    forgets = case.role is Forgetter
    act, events = (case.forget, 3) if forgets else (lambda life: case.learn(life, 1, snapshot_every=2), 2)
    with case.life() as life:
        case.learn(life, *range(events - 1))
        home = life.home
    with case.life(home=home) as life, _cut_off(life, 6):
        act(life)
    with case.life(home=home) as life:
        if len(life.events) < events:  # an accepted request has gone on by itself
            act(life)
        same = _bits(life) == case.straight.bits
        case.holds(same, "ends with other bits after a crash: is all it remembers in state_dict?")


@contextmanager
def _cut_off(life: Life, forwards: int) -> Iterator[None]:
    """The process dies at so many forwards of the network, if there are so many."""
    left = [forwards]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise _Crash

    hook = life.model.register_forward_hook(count)
    try:
        yield
    except _Crash:
        pass
    finally:
        hook.remove()


def _nan_is_refused(case: _Case) -> None:
    task = case.tasks[1]
    x = task.train["x"].clone()
    x[3, 5] = math.nan
    with case.life() as life:
        case.learn(life, 0)
        before = _bits(life)
        try:
            life.learn(Task(task.train.replace(x=x), task.test, task.classes, task.names, 1))
        except BadInput:
            case.holds(_bits(life) == before, "moved something before NaN in the data was refused")
        else:
            case.holds(False, "learned from data with NaN; BadInput was due")


def _strength_0_changes_nothing(case: _Case) -> None:
    part = case.make(**(case.inert or {}))
    with case.life(part) as life:
        case.learn(life, 0, 1)
        if case.role is Forgetter:
            case.forget(life, part)
        same = weights_sha256(life.model.state_dict()) == _plain(case.model, case.numbers)
        case.holds(same, f"with {dict(case.inert or {})} gives other weights than a life without it")


# ------------------------------------------------------------------------------------------ learners, keepers and wheres


def _counts_its_bytes(case: _Case) -> None:
    said, stored, empty = case.straight.said, case.straight.stored, case.make()
    case.holds(isinstance(said, int), f"counts bytes as {type(said).__name__}, not int")
    case.holds(stored / 2 - 64 <= said <= 2 * stored + 4096, f"says {said} bytes and saves {stored} in state_dict")
    grew = stored > sum(_sizes(empty.state_dict()))
    case.holds(said > empty.bytes() or not grew, "stores something and says no byte more")


def _says_what_it_holds(case: _Case) -> None:
    seen, everyone = case.straight, case.everyone
    case.holds(seen.holds or not seen.said, f"remembers {seen.said} bytes and says that it holds no example")
    case.holds(seen.holds <= everyone, "says that it holds examples which it never saw")


def _lets_go(case: _Case) -> None:
    """After a forget, by approximation and by retraining, no record is left, and nothing claims more than was earned."""
    for complaint in case.forgotten[0]:
        case.holds(False, complaint)


def _does_not_teach_back(case: _Case) -> None:
    """A class forgotten from the weights stays forgotten when another task is learned under the keeper."""
    after, later = case.forgotten[1]
    case.holds(after <= 0.2, f"answers {after:.0%} of a class right after it was forgotten; check it with other knobs")
    how = "rebuild or drop in `forgot` what the old weights computed"
    case.holds(later <= 0.2, f"answers {later:.0%} of a forgotten class one task later: {how}")


# --------------------------------------------------------------------------------------------------- forgetters, metrics


def _says_what_is_true(case: _Case) -> None:
    """Its receipt claims *deleted* only where the weights equal, to the last bit, a life that never had the data."""
    gone = _ids(0)
    with case.life() as life, case.life() as never:
        case.learn(life, 0, 1)
        receipt = case.forget(life)
        case.holds(receipt.ids == gone, "leads to a receipt on other examples than the request's")
        for task in case.tasks[:2]:
            case.learn(never, dataclasses.replace(task, train=task.train.without(gone), classes=(), names=()))
        same = weights_sha256(life.model.state_dict()) == weights_sha256(never.model.state_dict())
        states = {row.state for row in life.trace(gone) if row.holder == "weights"}
        case.holds(same or "deleted" not in states, "says *deleted*, but a life without the examples has other weights")
        case.holds("unlearned" not in states, "says *unlearned* where nothing was measured against retraining")


def _gives_figures(case: _Case) -> None:
    figures = case.straight.figures[0]
    case.holds(figures, "gives no figure after two tasks")
    for name, value in figures.items():
        fine = isinstance(name, str) and isinstance(value, float | int) and math.isfinite(value)
        case.holds(fine, f"gives {name!r}: {value!r}; a figure is a finite number (leave out what is not defined)")


def _looks_without_a_trace(case: _Case) -> None:
    with case.life() as life:
        case.learn(life, 0, 1)
        same = weights_sha256(life.model.state_dict()) == _plain(case.model, case.numbers)
        case.holds(same, "moves the weights it measures: look in `with c.aside():` or by c.evaluate and c.outputs")
        before = [module.training for module in life.model.modules()]
        life.measure()
        case.holds(before == [module.training for module in life.model.modules()], "leaves train or eval flags changed")


# ------------------------------------------------------------------------------------------------------------ benchmarks


def _remembers_nothing(case: _Case) -> None:
    part = case.make()
    case.holds(
        not part.remembered() and not part.bytes() and not part.state_dict(),
        "remembers something; a protocol has knobs only",
    )


Rule = Callable[[_Case], None]

EVERY: tuple[Rule, ...] = (_documented, _can_be_written_down, _wrong_knobs_are_refused)
#: For every role that has a place in a life; a benchmark is asked by its user and has none.
LIVED: tuple[Rule, ...] = (
    _runs, _twice_the_same, _survives_a_crash, _touches_nothing_global, _strength_0_changes_nothing,
)  # fmt: skip
RULES: dict[type[Method], tuple[Rule, ...]] = {
    Learner: (*LIVED, _nan_is_refused, _counts_its_bytes, _says_what_it_holds, _lets_go),
    Keeper: (*LIVED, _nan_is_refused, _counts_its_bytes, _says_what_it_holds, _lets_go, _does_not_teach_back),
    Where: (*LIVED, _nan_is_refused, _lets_go),
    Forgetter: (*LIVED, _says_what_is_true),
    Metric: (*LIVED, _gives_figures, _looks_without_a_trace),
    Benchmark: (_remembers_nothing,),
}
