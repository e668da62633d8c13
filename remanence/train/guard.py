"""Keepers in anybody's own training loop: ``rm.guard`` gives it the `u` that our loop gives to its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput, Corrupt
from remanence.core.ids import Ids
from remanence.core.problem import TOKENS, Batch, Classification, problem_of
from remanence.data import Examples, Task
from remanence.nn import nested
from remanence.train.loop import _end
from remanence.train.resolve import check_keepers, named, resolve_all
from remanence.train.roles import Keeper, Learner, Where
from remanence.train.settings import Settings
from remanence.train.update import Classes, Update, hooks

_FILE = "keepers.safetensors"


def guard(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: Any = (), *, problem: Any = None, seed: int = 0, **settings: Any
) -> OwnLoop:  # fmt: skip
    """Put keepers into a plain PyTorch loop, which stays the owner of data order, loss and optimizer::

        u = rm.guard(model, optimizer, keep=["replay", {"l2": {"strength": 0.1}}, "gpm"])
        for examples in tasks:
            with u.learn(examples):
                for u.epoch in range(epochs):
                    for rows in torch.randperm(len(examples)).split(64):
                        batch = u.prepare(examples.batch(rows))
                        loss = F.cross_entropy(model(batch["x"]), batch["y"]) + u.loss(batch)
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()  # keepers edit the gradient before, and the step after

    With the same seed, order, loss and optimizer (ours is ``fused=True``) it gives the same bits as `Life.learn`.

    Args:
        optimizer: its step takes no closure; with a gradient scaler call ``scaler.unscale_`` before it.
        keep: slugs, ``{slug: knobs}`` or keepers.
        problem: as for `Life`; the head's columns are the labels themselves.
        seed: of the keepers' own draws.
        settings: `Settings` of phases that a keeper runs itself; the rate is by default the optimizer's. ``clip`` also limits
            your own steps, what keepers add included: use it in place of clipping before ``optimizer.step()``.

    Raises:
        UnknownName, BadInput: a keeper that does not exist, or that needs to own the data's order or the parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BadInput(f"guard needs the loop's torch optimizer, not {type(optimizer).__name__}")
    made = Settings(**{"lr": float(optimizer.param_groups[0]["lr"]), **settings})
    return OwnLoop(model, optimizer, resolve_all("keep", keep, Keeper), problem_of(problem), seed, made)


class OwnLoop(Update):
    """The update of a loop that somebody else owns; made by `guard`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        keepers: list[Keeper],
        problem: Any,
        seed: int,
        settings: Settings,
        wheres: Sequence[Where] = (),
    ) -> None:
        check_keepers(keepers)
        for part, name in ((part, name) for part in (*keepers, *wheres) for name in ("order", "structure", "parameters")):  # fmt: skip
            if hasattr(type(part), name) and not (name == "structure" and isinstance(part, Where)):
                raise BadInput(f"{part.slug} has a hook {name!r}, but your own loop owns that; use Life.learn")
        self._optimizer, self._tasks, self._open, self._handles = optimizer, 0, False, list[Any]()
        self._fixed = {
            "model": model,
            "problem": problem,
            "parts": [*keepers, *wheres],
            "seed": seed,
            "settings": settings,
        }
        self._fixed |= {"owner": Learner(), "device": next(model.parameters(), torch.empty(0)).device}
        self._begin([], [], None, 0, Ids())

    def _begin(self, labels: list[int], new: list[int], task: Task | None, step: int, ids: Ids) -> None:
        """Be a fresh update; labels are columns. `ids`: of the examples learned before."""
        super().__init__(**self._fixed, data=self._pick, labels=labels, new_labels=new, task=task, event=f"learn/{self._tasks}", life_step=step)  # fmt: skip
        seen, fresh = (torch.tensor(columns, dtype=torch.int64, device=self.device) for columns in (labels, new))
        self.classes = Classes(seen, fresh, seen[~torch.isin(seen, fresh)])
        self.optimizers, self._rows, self.ids = {"main": self._optimizer}, 0, ids
        self._unfinished: int | None = None
        for part in self.parts:
            part.inputs = ids

    def _pick(self, name: str) -> Examples:
        if name != "task" or self.task is None:
            raise BadInput(f"your own loop offers no data {name!r}: it knows 'task', if begun by u.learn(examples)")
        return self.task.train

    def mapped(self, examples: Examples) -> Examples:
        """Labels are columns here already."""
        return examples

    @contextmanager
    def learn(
        self, data: Examples | Sequence[int], optimizer: torch.optim.Optimizer | None = None
    ) -> Iterator[OwnLoop]:
        """A task, from border to border. `data`: its training examples, or only its labels for keepers that look at no data at
        a border. `optimizer`: the new one, where every task has its own."""
        if self._open:
            raise BadInput("the task before is still open; leave its `with u.learn(...)` first")
        task: Task | None = None
        labels: Any = data
        if isinstance(data, Examples):
            data.check()
            task, labels = Task(data, data, id=self._tasks), data.columns.get("y", [])
        if isinstance(labels, tuple | list) and any(getattr(label, "ndim", 0) or not hasattr(label, "__index__") for label in labels):  # fmt: skip
            raise BadInput("u.learn takes rm.data.Examples, or the task's labels such as [0, 1]")
        given = sorted({int(label) for label in labels}) if isinstance(self.problem, Classification) else []
        self._optimizer = optimizer or self._optimizer
        with self._between_borders(given, task, data.ids if isinstance(data, Examples) else Ids()):
            yield self

    @contextmanager
    def _between_borders(self, given: list[int], task: Task | None, ids: Ids) -> Iterator[None]:
        """A task with the labels `given` and the examples `ids`: every part's `begin`, what is done inside, every part's `end`."""
        new = [label for label in given if label not in self.labels]
        before, self._open = list(self.labels), True
        self._begin([*self.labels, *new], new, task, self.life_step + self.steps_done, self.ids)
        self._do = SimpleNamespace(**{name: hooks(self.parts, name) for name in ("prepare", "loss", "gradient", "project", "after")})  # fmt: skip
        try:
            with self._exit:
                self._first()
                self.epoch = 0
                self._listen()
                yield
                self._finish()
                _end(self)
            self._tasks += 1
            self._begin(self.labels, [], None, self.life_step + self.steps_done, self.ids | ids)
        except BaseException:  # the task was not learned: its classes are still new
            self._begin(before, [], None, self.life_step + self.steps_done, self.ids)
            raise
        finally:
            self._open = False
            self._deafen()

    def _first(self) -> None:
        """What comes before the first batch of a task."""
        for begin in hooks(self.parts, "begin"):
            begin(self)

    def prepare(self, batch: Batch) -> Batch:
        """The batch as keepers want it: a dict with ``x`` and ``y``, or with the columns of a text (see `CausalLM`), and ``id`` where
        a keeper stores its rows. Epochs are counted by rows, or said by ``for u.epoch in ...``."""
        self._inside("prepare")
        if not isinstance(batch, dict) or not ("x" in batch or batch.keys() >= set(TOKENS)):
            found = f"a dict with {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
            raise BadInput(
                "u.prepare takes a dict with 'x' and 'y', or with 'input_ids', 'attention_mask' and 'labels' (and 'id'), such as "
                f"{{'x': x, 'y': y}}, not {found}"
            )
        self._finish()
        count = len(batch["x"] if "x" in batch else batch["input_ids"])
        if self.task is not None:
            self.epoch = max(self.epoch, self._rows // len(self.task.train))
        self._rows, self._unfinished = self._rows + count, self.epoch
        self.batch = {"origin": torch.zeros(count, dtype=torch.int64, device=self.device), **batch}
        for prepare in self._do.prepare:
            self.batch = prepare(self, self.batch)
        return self.batch

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the keepers' terms, a scalar. They share your forward if you write ``u.out(batch).logits`` for
        ``model(batch["x"])``."""
        self._inside("loss")
        terms = [term(self, batch) for term in self._do.loss]
        return sum((term for term in terms if term is not None), torch.zeros((), device=self.device))

    def _inside(self, what: str) -> None:
        if not self._open:
            raise BadInput(f"there is no task: call u.{what} inside `with u.learn(examples):`")

    def lookahead(self) -> list[Tensor]:
        self._deafen()
        change = super().lookahead()
        self._listen()
        return change

    def _listen(self) -> None:
        hear = (self._optimizer.register_step_pre_hook, self._before_step), (self._optimizer.register_step_post_hook, self._after_step)  # fmt: skip
        self._handles = [register(hook) for register, hook in hear]

    def _deafen(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise BadInput("step(closure) computes the gradient after the keepers acted on it; step without a closure")
        self.lr = float(self._optimizer.param_groups[0]["lr"])
        for gradient in self._do.gradient:
            gradient(self)
        self.before_step(self._do.project)

    def _after_step(self, *_: Any) -> None:
        self.after_step(self._do.project)
        self._finish()

    def _finish(self) -> None:
        """A batch ends after its step, or before the next batch where steps are accumulated; in its own epoch."""
        if self._unfinished is not None:
            now, self.epoch, self._unfinished = self.epoch, self._unfinished, None
            for after in self._do.after:
                after(self, self.batch)
            self._outs.clear()
            self.epoch = now

    def state_dict(self) -> dict[str, Any]:
        """What the keepers remember, as nested dicts of tensors and JSON values; take it between two tasks. Model and optimizer
        are yours to save. `save` writes it to a folder."""
        if self._open:
            raise BadInput("a task is open; save between two tasks")
        keep = {name: part.state_dict() for name, part in named(self.keepers, "keep").items()}
        about = {"labels": list(self.labels), "tasks": self._tasks, "steps": self.life_step}
        return {"keep": keep, **about, "ids": torch.from_numpy(self.ids.array.copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, with equal keepers.

        Raises:
            Corrupt: it was saved with other keepers.
        """
        mine = named(self.keepers, "keep")
        if not {"keep", "labels", "tasks", "steps", "ids"} <= set(state):
            raise Corrupt("this is no state of a guarded loop; give what u.state_dict() returned")
        if set(mine) != set(state["keep"]):
            raise Corrupt(f"the state is of the keepers {sorted(state['keep'])}, these are {sorted(mine)}")
        for name, part in mine.items():
            part.load_state_dict(_on(state["keep"][name], self.device))
        self._tasks = int(state["tasks"])
        self._begin([int(y) for y in state["labels"]], [], None, int(state["steps"]), Ids(state["ids"]))

    def save(self, folder: str | Path) -> None:
        """Write `state_dict` into the folder, as one file of safetensors and JSON."""
        nested.write(Path(folder) / _FILE, self.state_dict())

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            BadInput: nothing was saved there.
            Corrupt: the file is damaged, or was saved with other keepers.
        """
        self.load_state_dict(nested.read(Path(folder) / _FILE))


def _on(value: Any, device: torch.device) -> Any:
    """A nested state with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _on(item, device) for key, item in value.items()}
    return [_on(item, device) for item in value] if isinstance(value, list) else value
