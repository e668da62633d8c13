"""The roles a method can have and the hooks it may define. An absent hook is simply not there and costs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from remanence import catalogue
from remanence.core.errors import BadInput, Corrupt
from remanence.core.holder import Holder
from remanence.core.ids import Ids
from remanence.core.knobs import check_knobs
from remanence.core.problem import Batch, Out
from remanence.nn.anatomy import tensor_bytes
from remanence.nn.heads import grow_head

if TYPE_CHECKING:
    from remanence.data import Request
    from remanence.train.update import Context, Update

#: Every hook of the loop, by how often it is called.
HOOKS = ("begin", "order", "prepare", "loss", "gradient", "project", "after", "end", "forgot")


@dataclass
class Method:
    """Base of all roles. Fields are knobs. What a method remembers is its other attributes that are tensors, modules,
    holders of `nn/`, numbers or containers of these; from them `state_dict`, `bytes`, `holds` and `purge` are derived.
    Attributes that begin with an underscore are scratch: made in `begin`, gone after the event.
    """

    #: The catalogue's verb for this role.
    verb: ClassVar[str] = ""
    #: The knob that says how many examples are stored, if there is one; then the knobs that must be None for it to be the only limit.
    stores: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_knobs(self)
        #: The ids whose weights made this method's computed values; kept by the life.
        self.inputs = Ids()
        self.setup()

    def setup(self) -> None:
        """Create empty holders here."""

    @property
    def slug(self) -> str:
        return catalogue.slug_of(type(self))

    @property
    def inert(self) -> bool:
        """Whether the method can have no effect (its `strength` is 0): then the loop never calls it."""
        return getattr(self, "strength", 1.0) == 0

    def spec(self) -> dict[str, Any]:
        """``{slug: knobs}``, from which an equal method can be built."""
        return {self.slug: {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    def remembered(self) -> dict[str, Any]:
        """The attributes that are memory, by name."""
        knobs = {f.name for f in dataclasses.fields(self)} | {"inputs"}
        return {name: value for name, value in vars(self).items() if name not in knobs and not name.startswith("_")}

    def computed(self) -> list[Tensor]:
        """Tensors computed by weights, as against records kept in a holder of their own."""
        return [
            tensor
            for value in self.remembered().values()
            if not isinstance(value, Holder)
            for tensor in _tensors(value)
        ]

    def derived(self) -> bool:
        """Whether anything here was computed by weights, so that it holds what they held."""
        holders = [value for value in self.remembered().values() if isinstance(value, Holder)]
        return bool(self.computed()) or any(getattr(value, "derived", False) and value.bytes() for value in holders)

    def holds(self, ids: Ids) -> Ids:
        """Which of `ids` are in a record here, or were in the weights that computed a value here."""
        found = ids & self.inputs if self.derived() else Ids()
        for value in self.remembered().values():
            if isinstance(value, Holder):
                found = found | value.holds(ids)
        return found

    def purge(self, ids: Ids) -> None:
        """Drop the records of `ids`. Computed values are the business of `forgot`."""
        for value in self.remembered().values():
            if isinstance(value, Holder):
                value.purge(ids)

    def bytes(self) -> int:
        """Bytes of everything remembered."""
        held = sum(value.bytes() for value in self.remembered().values() if isinstance(value, Holder))
        return held + tensor_bytes(self.computed())

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as nested dicts of tensors and JSON values."""
        return {
            name: value.state_dict() if isinstance(value, Holder | nn.Module) else value
            for name, value in self.remembered().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            Corrupt: the state lacks a holder that this method has.
        """
        for name, value in self.remembered().items():
            if isinstance(value, Holder | nn.Module):
                if name not in state:
                    raise Corrupt(f"{self.slug}: the saved state has no {name!r}; it was saved by another version")
                value.load_state_dict(state[name])
            elif name not in state:
                delattr(self, name)
        for name, value in state.items():
            if not isinstance(getattr(self, name, None), Holder | nn.Module):
                setattr(self, name, value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict().values()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@dataclass(slots=True)
class Step:
    """One optimizer step: its loss (None: no step), and the optimizer it belongs to (None: all of them)."""

    loss: Tensor | None
    by: str | None = None


class Owner(Method):
    """What learners and forgetters share: one of them owns a run."""

    def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
        """The optimizer steps of a batch."""
        raise NotImplementedError

    def predict(self, c: Context, batch: Batch) -> Out:
        """The life's answer to a batch; never learns."""
        return c.problem.forward(c.model, batch)

    def export(self, model: nn.Module) -> nn.Module:
        """The answering network as a plain module."""
        return model


@dataclass
class Learner(Owner):
    """Takes new data in. The default learns by `objective` in the one loop and grows the head for new classes."""

    verb: ClassVar[str] = "learn"

    #: Whether learning moves the network's weights; where not, only the learner itself holds what was learned.
    moves_weights: ClassVar[bool] = True

    def structure(self, u: Update) -> dict[str, Any]:
        """Rows the head lacks for the classes seen now."""
        lacking = u.columns - head_rows(u.model) if u.columns else 0
        return {"rows": lacking, "seed": u.seed_of("head")} if lacking > 0 else {}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        return grow_head(model, int(structure["rows"]), int(structure["seed"]))

    def learn(self, u: Update) -> None:
        u.run()

    def objective(self, u: Update, batch: Batch) -> Tensor:
        return u.problem.loss(u.out(batch), batch, u.classes.seen)

    def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
        yield Step(self.objective(u, batch))

    def unlearn(self, u: Update, ids: Ids) -> str:
        """Take `ids` out of what this learner made, exactly, by what it knows about its own making; returns how exactly, in words
        for the receipt. In a forget run ``u.data("forget")`` and ``u.data("retain")`` are there.

        Raises:
            BadInput: this learner cannot.
        """
        raise BadInput(f"{self.slug} cannot take examples out of what it learned; ask by='retrain'")


def head_rows(model: nn.Module) -> int:
    """Outputs of the model's head."""
    from remanence.nn.anatomy import head

    found = head(model)
    if isinstance(found, nn.Linear):
        return found.out_features
    raise BadInput(f"the head is a {type(found).__name__}; give the model a linear head")


@dataclass
class Outcome:
    """What a forgetter achieved, in its own words; whether it is *unlearned* is decided by measurement.

    `exact`: `model` came from `u.retrain` and takes the place of the old one with everything that was retrained with it; or, without
    a model, the life's learner took the ids out by itself, and `how` says how exactly (see `Learner.unlearn`).
    """

    exact: bool = False
    model: nn.Module | None = None
    how: str = ""
    notes: list[str] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)


@dataclass
class Forgetter(Owner):
    """Removes a request from the weights."""

    verb: ClassVar[str] = "forget"
    #: Whether it trains by `u.run`, in which keepers and wheres act.
    trains: ClassVar[bool] = True
    #: The learner that does the work, in a life that learns with it and with nothing else; empty: any life will do.
    learner: ClassVar[str] = ""

    #: Training defaults of the method, used where the request names none.
    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 1,
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.01,
        "schedule": "constant",
    }

    def forget(self, u: Update, request: Request) -> Outcome:
        raise NotImplementedError

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        raise NotImplementedError

    def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
        yield Step(self.objective(u, u.forget, batch or None))


@dataclass
class Keeper(Method):
    """Protects the old while the new is learned. A keeper that stores computed values must have `forgot`."""

    verb: ClassVar[str] = "keep"
    #: Whether `end` moves the weights: then it comes before the `end` of all others, which look at them.
    moves_at_end: ClassVar[bool] = False


@dataclass
class Where(Method):
    """Says where a run may write: `trainable(u)` names, `mask(u)` of entries, or `project`."""

    verb: ClassVar[str] = "where"


@dataclass
class Guard(Method):
    """Hides without removing: a context manager `on(model)`; `flags(batch)` says for which rows."""

    def flags(self, batch: Batch) -> Tensor:
        return torch.ones(len(batch["id"]), dtype=torch.bool)


@dataclass
class Metric(Method):
    """A figure. With a knob `every` = k it is called after every k-th step of the loop, too."""

    verb: ClassVar[str] = "measure"

    def value(self, c: Context) -> dict[str, float]:
        raise NotImplementedError


@dataclass
class Benchmark(Method):
    """A protocol: what is asked of a life or its network, and how the answers are judged. Its knobs are the protocol's; what it does
    stands in its own docstring. It remembers nothing."""

    verb: ClassVar[str] = "measure"
