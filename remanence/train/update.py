"""The update `u`: what a method sees of one run, and the few things it may do."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput, NotFinite
from remanence.core.ids import Ids
from remanence.core.problem import TOKENS, Batch, CausalLM, Classification, Out, Problem
from remanence.core.rng import generator, seed_of
from remanence.data import Examples, Task
from remanence.nn.anatomy import evaluating, head, module_bytes, reinitialised
from remanence.nn.masks import Restore
from remanence.train import parallel
from remanence.train.forward import Forward
from remanence.train.roles import HOOKS, Forgetter, Keeper, Learner, Method, Owner, Step
from remanence.train.schedules import Constant, schedule_of
from remanence.train.settings import Settings
from remanence.train.stopping import Stopping

Progress = Callable[["Update", float], None]
DRIVES = ("retain", "forget", "sequence", "mixed")
_WATCH = 64  # losses looked at together: one device sync for so many steps


@dataclass(frozen=True)
class Classes:
    """Head columns as int64 tensors: all `seen`, those `new` in this event, those `old` before it."""

    seen: Tensor
    new: Tensor
    old: Tensor


@dataclass(frozen=True)
class Trial:
    """What a forgetter achieved on a copy of the life's network, measured against retrained models on the `tune` share of the
    held-out data. `short`: the figures that are not yet like retraining's; `far`: those farther than doing nothing, `near`: those
    nearer; `idle`: the figures in which doing nothing falls short; `adopt`: make the copy's weights the network's; `seconds`: of the
    method alone."""

    slug: str
    short: list[str]
    far: list[str]
    near: list[str]
    idle: list[str]
    seconds: float
    notes: list[str]
    adopt: Callable[[], None]

    def __str__(self) -> str:
        if not self.short:
            return f"{self.slug}: like retraining in every figure ({self.seconds:.2g} s)"
        far = f"; farther than before: {', '.join(self.far)}" if self.far else ""
        return f"{self.slug}: not like retraining in {', '.join(self.short)}{far} ({self.seconds:.2g} s)"


class Context:
    """A model that answers: what metrics and `predict` see."""

    def __init__(
        self,
        model: nn.Module,
        problem: Problem,
        owner: Owner,
        labels: Sequence[int] = (),
        tasks: Sequence[Task] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.problem, self.owner = model, problem, owner
        self.labels, self.tasks, self.device = list(labels), list(tasks), torch.device(device)
        columns = torch.arange(len(self.labels))
        self.classes = Classes(columns, columns[:0], columns)
        #: What only a life knows, for its metrics: scores (events x tasks, NaN where there is none) and the row that learned each
        #: task, bytes by holder, ids forgotten on request.
        self.matrix: list[list[float]] | None = None
        self.learned: list[int] | None = None
        self.holders: dict[str, int] = {}
        self.forgotten = Ids()
        #: Scores found already, by identity of the examples, where the network stands still; None: it moves.
        self.found: dict[int, tuple[Examples, dict[str, float]]] | None = None

    @property
    def columns(self) -> int:
        """How many head columns the labels seen so far take; 0 where the problem has no classes."""
        return len(self.labels) if isinstance(self.problem, Classification) else 0

    def mapped(self, examples: Examples) -> Examples:
        """`examples` with labels turned into head columns; a label never seen becomes -1."""
        if not self.columns or "y" not in examples.columns or examples["y"].is_floating_point():
            return examples
        y = examples["y"]
        low, high = int(min(self.labels)), int(max(self.labels))
        if self.labels == list(range(len(self.labels))) and y.dtype == torch.int64 and len(y):
            smallest, largest = y.aminmax()
            if smallest >= 0 and largest <= high:
                return examples  # labels in the order of the columns are columns
        table = torch.full((high - low + 1,), -1, dtype=torch.int64)
        table[torch.tensor(self.labels) - low] = torch.arange(len(self.labels))
        known = (y >= low) & (y <= high)
        return examples.replace(y=torch.where(known, table[(y - low).clamp(0, high - low)], -1))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Look without leaving a trace in weights, buffers, flags or random numbers."""
        with torch.random.fork_rng(devices=_cuda(self.device)), evaluating(self.model):
            yield

    def batches(self, examples: Examples, batch_size: int = 256) -> Iterator[Batch]:
        """`examples` in order, in batches on the device; of texts in batches of at most 16,384 places."""
        if TOKENS[0] in examples.columns:
            batch_size = min(batch_size, max(1, 2**14 // examples[TOKENS[0]].shape[1]))
        for rows in torch.arange(len(examples)).split(batch_size):
            batch = self.problem.compact(examples.batch(rows))
            yield {name: column.to(self.device) for name, column in batch.items()}

    def outputs(self, examples: Examples, batch_size: int = 1024) -> Tensor:
        """The life's answers (N, C) to `examples`, whose `y` are head columns, in eval mode; (M, V) at the M targets of texts."""
        with self.aside():
            found = [self.owner.predict(self, batch).logits for batch in self.batches(examples, batch_size)]
        return torch.cat(found) if found else torch.empty(0, max(1, self.columns))

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """The mean of each of the problem's scores over `examples`, given with their own labels.

        Raises:
            BadInput: there are no examples.
        """
        if not len(examples):
            raise BadInput("there are no examples to measure on")
        if self.found is None:
            return self._scores(examples)
        if id(examples) not in self.found:
            self.found[id(examples)] = examples, self._scores(examples)
        return self.found[id(examples)][1]

    def scores(self, examples: Examples) -> dict[str, Tensor]:
        """Each of the problem's scores of each of `examples` (N,), whose `y` (if they have any) are head columns."""
        found: dict[str, list[Tensor]] = {}
        with self.aside():
            for batch in self.batches(examples, 1024):
                for name, value in self.problem.score(
                    self.owner.predict(self, batch), batch, self.classes.seen
                ).items():
                    found.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in found.items()}

    def _scores(self, examples: Examples) -> dict[str, float]:
        ready = self.mapped(examples)
        if "y" not in ready.columns:
            return {name: float(value.mean()) for name, value in self.scores(ready).items()}
        logits, y = self.outputs(ready), ready["y"].to(self.device)
        if not y.is_floating_point() and bool((y < 0).any()):  # a class never seen is never answered rightly
            known = y >= 0
            scores = self.problem.score(Out(logits[known]), {"y": y[known]}, self.classes.seen)
            accuracy = scores["accuracy"].sum() / len(y)
            return {"accuracy": float(accuracy)}
        return {
            name: float(value.mean())
            for name, value in self.problem.score(Out(logits), {"y": y}, self.classes.seen).items()
        }


@dataclass
class Consumed:
    """What a run took in: ids of the event's own data and ids replayed by keepers, nested runs included."""

    new: Ids = field(default_factory=Ids)
    replayed: Ids = field(default_factory=Ids)
    _rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def epoch(self, ids: Tensor, replayed: bool) -> None:
        found = Ids(ids.cpu().numpy())
        self.replayed, self.new = (self.replayed | found, self.new) if replayed else (self.replayed, self.new | found)

    def rows(self, batch: Batch) -> None:
        self._rows.append((batch["id"], batch["origin"]))
        if len(self._rows) >= 512:
            self.settle()

    def settle(self) -> Consumed:
        if self._rows:
            ids, origin = (torch.cat(parts).cpu() for parts in zip(*self._rows, strict=True))
            self.replayed = self.replayed | Ids(ids[origin > 0].numpy())
            self._rows.clear()
        return self


def hooks(parts: Sequence[Method], name: str) -> list[Any]:
    """The bound hooks called `name`, of those parts that define it and are not inert."""
    return [getattr(part, name) for part in parts if hasattr(type(part), name) and not part.inert]


class Update(Context):
    """One run: the owner's event, or a phase nested in it."""

    def __init__(
        self,
        *,
        model: nn.Module,
        problem: Problem,
        owner: Owner,
        settings: Settings,
        data: Callable[[str], Examples],
        parts: Sequence[Method] = (),
        labels: Sequence[int] = (),
        new_labels: Sequence[int] = (),
        old_labels: Sequence[int] | None = None,
        tasks: Sequence[Task] = (),
        task: Task | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        event: str = "learn/0",
        kind: str = "learn",
        metrics: Sequence[Any] = (),
        progress: Progress | None = None,
        life_step: int = 0,
        retrain: Callable[[Ids, int], nn.Module] | None = None,
        history: Callable[[], list[Examples]] = list,
        checkpoint: Callable[[Update, Any, Tensor, int], None] | None = None,
    ) -> None:
        super().__init__(model, problem, owner, labels, tasks, device)
        self.settings, self.parts, self.task = settings, list(parts), task
        #: The life's learner and keepers, which in a forget run stand outside the loop: what they remember may be looked at.
        self.learner: Learner | None = owner if isinstance(owner, Learner) else None
        #: Set by a life in a forget run: what another forgetter would achieve on a copy of the network, see `Trial`.
        self.trial: Callable[[Forgetter, int], Trial] | None = None
        self.keepers: list[Keeper] = [part for part in parts if isinstance(part, Keeper)]
        self.seed, self.event, self.kind = seed, event, kind
        self.metrics = [metric for metric in metrics if getattr(metric, "every", 0)]
        self.progress, self.life_step = progress, life_step
        #: All processes of this life, where there are several and the loop is ours.
        self.team: parallel.Team | None = None
        self._data, self._retrain, self._history, self.checkpoint = data, retrain, history, checkpoint
        fresh = set(new_labels)
        known = set(self.labels) - fresh if old_labels is None else set(old_labels)
        new, old = ([i for i, label in enumerate(self.labels) if label in found] for found in (fresh, known))
        columns = (
            torch.tensor(found, dtype=torch.int64, device=device) for found in (range(len(self.labels)), new, old)
        )
        self.classes = Classes(*columns)
        self.consumed, self.extra_bytes, self.steps_done, self.phase = Consumed(), 0, 0, ""
        self._shared: dict[str, Any] = {"reference": None, "initial": None, "phases": 0, "measuring": 0.0}
        #: Epochs in which the order of the data visits every example once; a part that changes the order sets it in `begin`.
        self.sweep = 1
        self._exit = ExitStack()
        self._features = False
        self._cache: dict[str, Examples] = {}
        #: Set by the life: where to go on from inside the event, and the optimizer state to begin with (None: do not carry).
        self.resume_at: dict[str, Any] | None = None
        self.carried: dict[str, Any] | None = None
        self._fresh()

    def _fresh(self) -> None:
        """State of one pass through the loop."""
        self.epoch, self.step, self.lr = -1, 0, self.settings.lr
        self.total: int | None = None
        self.batch: Batch = {}
        self.forget: Batch | None = None
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._rngs: dict[tuple[str, int], torch.Generator] = {}
        self._outs: dict[int, tuple[Batch, Out]] = {}
        self._losses: list[tuple[int, Tensor]] = []
        self._pending, self._next_report = 0, 0.0
        self._moving: list[nn.Parameter] = []  # what the optimizers hold
        self._forward: Forward | None = None  # None: plain
        self._stopping: Stopping | None = None
        self._restore: Restore | None = None
        self._before: list[Tensor] = []
        self._shares, self._weight = False, 1.0  # of several processes: see `share`
        self._parameters: dict[str, nn.Parameter] | None = None  # looked up once per loop, in which they are fixed

    # ------------------------------------------------------------------ what a method sees

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name; not to be written to."""
        if self._parameters is not None:
            return self._parameters
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def first(self) -> bool:
        """Whether this is the life's first learn event, before which there is nothing to protect."""
        return self.kind == "learn" and self.event == "learn/0" and not self.life_step

    def data(self, name: str) -> Examples:
        """``task`` (this event's), ``seen`` (all events' up to now), or in a forget run ``forget``, ``retain`` and ``seen`` (both):
        without what was forgotten earlier, labels as head columns."""
        if name not in self._cache:
            self._cache[name] = self.mapped(self._data(name))
        return self._cache[name]

    def history(self) -> list[Examples]:
        """The training data of every learn event so far, in order, without what was forgotten, as far as it can be reached."""
        return [self.mapped(examples) for examples in self._history()]

    def rng(self, name: str) -> torch.Generator:
        """The generator of the part `name` in this epoch of this event: nobody else's draws can move it."""
        key = (name, self.epoch)
        if key not in self._rngs:
            self._rngs[key] = generator(self.seed, self.event, self.phase, name, self.epoch)
        return self._rngs[key]

    def seed_of(self, name: str) -> int:
        """A seed addressed like `rng`, for draws that must be repeated from JSON."""
        return seed_of(self.seed, self.event, self.phase, name)

    def out(self, batch: Batch, features: bool = False) -> Out:
        """This step's forward of `batch`, made once and shared by all parts; `features` (B, D) once any part asked for them."""
        known = self._outs.get(id(batch))
        if known is not None and not (features and known[1].features is None):
            return known[1]
        self._features = self._features or features
        wanted = head(self.model) if self._features else None
        if self.team is None or self._shares:
            made = self._out(batch, wanted)
        else:
            made = self.team.out(self.problem, self.model, batch, lambda mine: self._out(mine, wanted))
        self._outs[id(batch)] = (batch, made)
        return made

    def _out(self, batch: Batch, wanted: nn.Module | None) -> Out:
        if self._forward is None:
            return self.problem.forward(self.model, batch, wanted)
        return self._forward(self.problem, self.model, batch, wanted)

    def ask_features(self) -> None:
        """From now on every forward of this run keeps its features. Ask in `begin`: asked for in a step, they cost one more forward."""
        self._features = True

    def fresh_out(self) -> None:
        """Forget this step's forwards: the weights have moved."""
        self._outs.clear()

    def grad(self, loss: Tensor) -> list[Tensor]:
        """The gradient of `loss` for each of `parameters`, zeros where it does not depend on one; ``p.grad`` is untouched."""
        params = list(self.parameters.values())
        found = torch.autograd.grad(loss, params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
        return grads if self.team is None else self.team.mean(grads)

    def reference(self) -> nn.Module:
        """The model as it was when the event began: frozen, in eval mode, one for all parts. Ask in `begin`."""
        if self._shared["reference"] is None:
            made = copy.deepcopy(self.model).eval().requires_grad_(False)
            self._shared["reference"] = made
            self.extra_bytes += module_bytes(made)
        made = self._shared["reference"]
        assert isinstance(made, nn.Module)
        return made

    def fresh(self, name: str) -> nn.Module:
        """A copy of the network with newly drawn weights: it knows nothing. `name` addresses the draw, as in `rng`."""
        made = reinitialised(self.model, self.seed_of(name))
        self.extra_bytes += module_bytes(made)
        return made

    def lookahead(self) -> list[Tensor]:
        """The change of each of `parameters` that the main optimizer would make now; nothing moves."""
        optimizer, params = self.optimizers["main"], list(self.parameters.values())
        before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        change = [p.detach() - old for p, old in zip(params, before, strict=True)]
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
        optimizer.load_state_dict(state)
        return change

    def view(self, batch: Batch, kind: str) -> Batch:
        """The batch through the data's view `kind`; itself where the data has none."""
        views = self._data("task" if self.kind == "learn" else "retain").views
        return views[kind](batch) if kind in views else batch

    def enter(self, manager: AbstractContextManager[Any]) -> Any:
        """Enter a context manager; it is left at the end of the event."""
        return self._exit.enter_context(manager)

    def retrain(self, without: Ids, seed: int) -> nn.Module:
        """A model that never saw `without`, from the lineage; made once for each seed.

        Raises:
            BadInput: this run has no lineage to retrain from.
        """
        if self._retrain is None:
            raise BadInput("this run belongs to no life, so there is no lineage to retrain from")
        return self._retrain(without, seed)

    # ------------------------------------------------------------------ what it may do

    def extend(self, batch: Batch, rows: Batch, part: Method) -> Batch:
        """`batch` with `rows` after it, marked as coming from `part`; the ids enter the lineage."""
        from remanence.data import cat_batches

        if not len(rows["id"]):
            return batch
        origin = torch.full_like(rows["id"], 1 + self.parts.index(part))
        return self.problem.compact(cat_batches(batch, {**rows, "origin": origin}))

    def run(
        self,
        drive: str | None = None,
        data: Examples | None = None,
        parts: Sequence[Method] | None = None,
        trainable: Iterable[str] | None = None,
        mask: Mapping[str, Tensor] | None = None,
        replay: bool = False,
        **settings: Any,
    ) -> None:
        """A phase of this event: the same loop over the same parts.

        Args:
            drive: in a forget run, what an epoch goes over: ``retain`` or ``forget`` (paired with batches of the other set),
                ``sequence`` (forget, then retain) or ``mixed`` (both, shuffled).
            data: other examples, labels as head columns; `replay` says that they count as replayed.
            parts: other parts than the event's, such as none.
            trainable: names of the only parameters that may move.
            mask: {name: bool tensor}: the entries that may move.
            settings: any of `Settings`' fields.
        """
        from remanence.train.loop import loop

        if drive is not None and drive not in DRIVES:
            raise BadInput(f"drive={drive!r} is not one of {', '.join(DRIVES)}")
        phase = copy.copy(self)
        self.resume_at = None
        if self.epoch >= 0 or self._shared["phases"]:
            settings = {"patience": None, **settings}  # a nested phase is as long as its part says
        phase.settings = replace(self.settings, **settings) if settings else self.settings
        phase.parts = self.parts if parts is None else list(parts)
        self._shared["phases"] += 1
        phase.phase = (
            f"{self.phase}/{self._shared['phases']}" if self.epoch >= 0 or self._shared["phases"] > 1 else self.phase
        )
        phase.metrics = self.metrics if self.epoch < 0 else []
        phase.checkpoint = self.checkpoint if self.epoch < 0 and self._shared["phases"] == 1 else None
        phase.carried = self.carried if self.epoch < 0 and self._shared["phases"] == 1 else None
        phase._fresh()
        loop(phase, drive, data, set(trainable) if trainable is not None else None, mask, replay)
        self.steps_done = phase.steps_done
        self.consumed = phase.consumed
        self.fresh_out()

    def fit(
        self, module: nn.Module, data: Examples, loss: Callable[[nn.Module, Batch], Tensor], **settings: Any
    ) -> nn.Module:
        """Train any other module on `data` by the same loop, without keepers."""
        from remanence.train.loop import loop

        @dataclass
        class Fit(Owner):
            def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
                yield Step(loss(u.model, batch))

        self._shared["phases"] += 1
        phase = copy.copy(self)
        phase.model, phase.owner, phase.parts, phase.metrics, phase.checkpoint = module, Fit(), [], [], None
        phase.settings = replace(self.settings, **{"patience": None, "checkpointing": False, **settings})
        if TOKENS[0] not in data.columns:
            phase.problem = Problem()  # what is not text has no padding to be cut off
        phase.phase = f"{self.phase}/{self._shared['phases']}"
        phase._fresh()
        loop(phase, None, data, None, None, False)
        self.consumed = phase.consumed
        return module

    # ------------------------------------------------------------------ the loop's own steps

    def prepare_optimizers(self) -> None:
        """One main optimizer; parameter groups of parts that name an optimizer of their own get it."""
        own: list[dict[str, Any]] = []
        grouped: set[int] = set()
        for add in hooks([self.owner, *self.parts], "parameters"):
            for group in add(self):
                group = {**group, "params": list(group["params"])}
                grouped.update(id(p) for p in group["params"])
                own.append(group)
        rest = [p for p in self.parameters.values() if id(p) not in grouped]
        main = [{"params": rest}] if rest else []
        for group in own:
            name, kind = group.pop("name", "main"), group.pop("optimizer", None)
            if name == "main" and kind is None:
                main.append(group)
            else:
                self.optimizers[name] = self.settings.build([group], optimizer=kind)
        if main:
            self.optimizers["main"] = self.settings.build(main)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["base"] = group["lr"]
        self._moving = [p for opt in self.optimizers.values() for group in opt.param_groups for p in group["params"]]
        if self.carried:
            self._take_carried(self.carried)
        self._schedule = schedule_of(self.settings.schedule)
        self._flat = isinstance(self._schedule, Constant) and not self._schedule.warmup

    def _take_carried(self, carried: Mapping[str, Any]) -> None:
        """Optimizer state of the event before, for parameters that still have their shape."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers.values():
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for p in params:
                state = carried.get(names.get(id(p), ""), {})
                mine = (
                    {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
                )
                if set(state) == mine and all(not v.dim() or v.shape == p.shape for v in state.values()):
                    optimizer.state[p] = {key: value.clone() for key, value in state.items()}
            if any("momentum_buffer" in state for state in optimizer.state.values()):
                for p in params:  # fused SGD takes momentum of all its parameters or of none
                    optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))

    @property
    def measuring(self) -> float:
        """Seconds that metrics took inside the loop so far."""
        return float(self._shared["measuring"])

    @property
    def peak_bytes(self) -> int:
        """Bytes that the run needed at once, activations aside: the network, what parts counted in `extra_bytes`, and the gradients and
        optimizer state of the phase that had most of them."""
        return module_bytes(self.model) + self.extra_bytes + int(self._shared.get("training", 0))

    def count_training(self) -> None:
        """Gradients and optimizer state of this phase, for `peak_bytes`."""
        states = [
            value
            for optimizer in self.optimizers.values()
            for state in optimizer.state.values()
            for value in state.values()
        ]
        held = sum(p.nbytes for p in self._moving) + sum(v.nbytes for v in states if isinstance(v, Tensor))
        self._shared["training"] = max(held, self._shared.get("training", 0))

    def keep_carried(self) -> None:
        """Write the optimizers' state, by parameter name, for the next event."""
        if self.carried is not None:
            names = {id(p): name for name, p in self.model.named_parameters()}
            states = [item for optimizer in self.optimizers.values() for item in optimizer.state.items()]
            self.carried.clear()
            self.carried.update(
                {
                    names[id(p)]: {k: v for k, v in s.items() if isinstance(v, Tensor)}
                    for p, s in states
                    if id(p) in names
                }
            )

    def join(self) -> None:
        """Train with the other processes of this life, where there are any; one reports."""
        self.team = parallel.team()
        if self.team is not None and self.team.rank:
            self.progress = None

    def shares(self, terms: bool) -> bool:
        """Whether each of several processes makes the objective of its own rows alone, see `Team`; `terms`: whether parts add any."""
        names = {"objective", "steps", "by_rows"}
        # Who writes an objective anew must say anew what it is.
        last = next((kind for kind in type(self.owner).__mro__ if names & set(vars(kind))), None)
        plain = last is Learner or (last is not None and vars(last).get("by_rows", False))
        return isinstance(self.problem, CausalLM) and not terms and plain

    def share(self, batch: Batch) -> Batch:
        """What this process makes the objective of: `batch`, or its own rows."""
        if self.team is None:
            return batch
        mine, self._weight = batch, 1 / self.team.size
        if self._shares and not parallel.watched(self.model):
            mine, self._weight = self.team.share(self.problem, batch)
        return mine

    def agree(self) -> None:
        """Where several processes live this life: compare their weights.

        Raises:
            EventFailed: they differ.
        """
        if self.team is not None:
            self.team.agree(self.model, self.event)

    def backward(self, step: Step, losses: Sequence[Any], batch: Batch) -> bool:
        """Sum the step's loss and the parts' terms on `batch` and go backward; whether an optimizer step is due."""
        loss = step.loss
        for term in losses if batch else ():
            extra = term(self, batch)
            if extra is not None:
                loss = extra if loss is None else loss + extra
        if loss is None or not loss.requires_grad:
            return False
        if not self._pending:
            self.drop_gradients()
        every = self.settings.accumulate
        if self.team is not None:
            loss = loss * self._weight
        share = loss if every == 1 else loss / every
        if self._forward is None:
            share.backward()
        else:
            self._forward.backward(share)
        self._losses.append((self.step, loss.detach()))
        self._pending = (self._pending + 1) % every
        if self.team is not None:
            self.team.level()
        if self._pending:
            return False
        if self.team is not None:
            self.team.add_up(self._moving)
        if self._forward is not None:
            self._forward.unscale(self._stepping(step))
        return True

    def _stepping(self, step: Step) -> list[torch.optim.Optimizer]:
        """The optimizers that this step moves."""
        return [optimizer for name, optimizer in self.optimizers.items() if step.by is None or step.by == name]

    def drop_gradients(self) -> None:
        """As the optimizers' ``zero_grad``. Done before a forward, its activations take the memory while it is warm."""
        for p in self._moving:
            p.grad = None

    def advance(self, step: Step, projections: Sequence[Any]) -> None:
        """Schedule, clip, step, then let projections edit the step and put masked entries back."""
        if not self._flat:
            factor = self._schedule.factor(self.step, self.total, self.life_step)
            self.lr = self.settings.lr * factor
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * factor
        self.before_step(projections)
        if self._forward is None:
            for optimizer in self._stepping(step):
                _step_of(optimizer)(optimizer)
        else:
            self._forward.step(self._stepping(step))
        self.after_step(projections)

    def before_step(self, projections: Sequence[Any]) -> None:
        """Clip the gradient, and remember the weights for projections."""
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        if projections:
            params: list[Tensor] = list(self.parameters.values())
            if not self._before:
                self._before = [torch.empty_like(p) for p in params]
            with torch.no_grad():
                torch._foreach_copy_(self._before, params)

    def after_step(self, projections: Sequence[Any]) -> None:
        """Projections, then masked entries, so that no projection moves one of these either."""
        if projections:
            with torch.no_grad():
                for project in projections:
                    project(self, self.parameters, dict(zip(self.parameters, self._before, strict=True)))
        if self._restore is not None:
            self._restore.restore()
        self._outs.clear()
        self.step += 1
        self.steps_done += 1

    def watch(self, last: bool = False) -> None:
        """Look at the losses now and then: one sync for many steps.

        Raises:
            NotFinite: a loss was NaN or infinite; names the first such step.
        """
        if len(self._losses) < _WATCH and not last:
            return
        if self._losses:
            losses = torch.stack([loss for _, loss in self._losses])
            losses = losses if self.team is None else self.team.sum(losses)
            # The sum of finite losses is finite, or has overflown.
            if not math.isfinite(losses.sum()) and not bool((finite := torch.isfinite(losses)).all()):
                first = int((~finite).int().argmax())
                raise NotFinite(
                    f"the loss became {float(losses[first])} at step {self._losses[first][0]} of {self.event}; try a smaller lr or clip=1.0"
                )
            now = time.monotonic()
            if self.progress is not None and (now >= self._next_report or last):
                self._next_report = now + 0.1
                self.progress(self, float(losses.mean()))
            self._losses.clear()


def _step_of(optimizer: torch.optim.Optimizer) -> Callable[[torch.optim.Optimizer], Any]:
    """The optimizer's step without the profiler's label and the hooks that torch puts around it: they take longer than a small
    step, and nobody can hang a hook on an optimizer that lives inside one loop."""
    step: Any = type(optimizer).step
    found: Callable[[torch.optim.Optimizer], Any] = step.__wrapped__ if getattr(step, "hooked", False) else step
    return found


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


__all__ = ["HOOKS", "Classes", "Consumed", "Context", "Progress", "Trial", "Update", "hooks"]
