"""Repair what forgets most: finetune a few modules on a small buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import UnknownName, nearest
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples
from remanence.nn.anatomy import head_name, norm_modules
from remanence.nn.buffer import Buffer
from remanence.train.roles import Keeper, Where
from remanence.train.update import Update


@dataclass
class FPF(Keeper):
    """Forgetting-prioritised finetuning: `k` times per event train what forgets most, and nothing else, on a buffer.

        every total / k steps, last at the event's end: `steps` steps on class-balanced batches of the buffer
            theta_M <- theta_M - lr_t * d/d theta_M [ L + alpha * |f(x) - o|^2 ]    M = norm layers and head, lr_t -> 0

    k = 1 is FPF after the event, k > 1 is k-FPF: plain training in between, no replay in the step. L is the learner's
    own loss. With ``objective="kd"`` o are the outputs that the training step gave when the row entered the buffer,
    and the distance is the mean of squares over the columns there were then. Modules outside M keep every bit,
    running statistics included: their norm layers stay in eval mode. The optimizer of each call is new; of the other
    parts only wheres act in it.

    Pick it as the cheapest repair where a buffer exists: before the call accuracy on old tasks may swing, so measure
    after it. Needs: labels, stores examples. After a forget, stored outputs are made anew by the new weights, in eval
    mode.
    Reference: Zhao et al. 2023, "Does Continual Learning Equally Forget All Parameters?", arXiv 2304.04158. The paper
    counts k over the whole stream, which nobody knows here. How modules are ranked is in `remanence.nn.sensitivity`;
    M is not chosen by it. Rate and steps are not the paper's but those that restore the digits in the tests.
    """

    moves_at_end: ClassVar[bool] = True
    stores: ClassVar[tuple[str, ...]] = ("capacity",)

    k: int = knob(1, "calls per event; 0: none", low=0)
    modules: str | list[str] = knob("norm+head", "what is trained: norm+head, or names of modules")
    capacity: int = knob(200, "examples in the reservoir", low=0)
    steps: int = knob(300, "optimizer steps per call", low=1)
    batch_size: int = knob(32, "rows per step", low=1)
    lr: float = knob(0.1, "rate of SGD with momentum, falling to 0 along a half cosine", low=0)
    momentum: float = knob(0.9, "momentum of the call's SGD", low=0, high=1)
    objective: str = knob("ce", "the learner's loss alone, or with stored outputs", choices=("ce", "kd"))
    alpha: float = knob(0.5, "weight of the distance to stored outputs", low=0)

    def setup(self) -> None:
        self.buffer = Buffer(self.capacity)
        self.called = 0  # step of this event's last call

    @property
    def inert(self) -> bool:
        return self.k == 0 or self.capacity == 0

    def derived(self) -> bool:
        return self.objective == "kd" and len(self.buffer) > 0  # beside the rows, outputs of the weights

    def begin(self, u: Update) -> None:
        self.called = 0

    def loss(self, u: Update, batch: Batch) -> None:
        """Adds nothing; takes this step's outputs for the rows that `after` may store."""
        if self.objective == "kd" and u.kind == "learn" and u.epoch < u.sweep:
            self._logits = u.out(batch).logits.detach()

    def after(self, u: Update, batch: Batch) -> None:
        if u.kind != "learn":
            return
        if u.epoch < u.sweep:
            self._add(u, batch)
        if u.total and u.step < u.total and u.step * self.k // u.total > self.called * self.k // u.total:
            self.called = u.step
            self.finetune(u)

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self.finetune(u)

    def finetune(self, u: Update) -> None:
        """One call. An empty buffer makes it none."""
        if not len(self.buffer):
            return
        chosen, frozen = self._modules(u.model)
        call = _Call(self.buffer, frozen, self.steps, self.batch_size, self.alpha if self.objective == "kd" else 0.0)
        names = [name for name in u.parameters if name.rpartition(".")[0] in chosen]
        parts = [call, *(part for part in u.parts if isinstance(part, Where))]
        u.run(data=_examples(self.buffer), parts=parts, trainable=names, replay=True, epochs=1,
              batch_size=self.batch_size, optimizer={"sgd": {"momentum": self.momentum}}, lr=self.lr,
              schedule="cosine", accumulate=1)  # fmt: skip

    def forgot(self, u: Update, ids: Ids) -> None:
        if self.derived():
            with u.aside():
                made = [u.problem.forward(u.model, batch).logits for batch in u.batches(_examples(self.buffer))]
            logits = torch.cat(made)
            self.buffer.replace("logits", logits)
            self.buffer.replace("width", torch.full((len(logits),), logits.shape[1]))

    def _add(self, u: Update, batch: Batch) -> None:
        columns = {name: column for name, column in batch.items() if name not in ("origin", "weight")}
        if self.objective == "kd":
            columns["logits"], width = self._logits, self._logits.shape[1]
            columns["width"] = torch.full_like(batch["id"], width)
            old = self.buffer.columns.get("logits")
            if old is not None and old.shape[1] < width:  # the head has grown
                self.buffer.replace("logits", F.pad(old, (0, width - old.shape[1])))
        self.buffer.add({name: column[batch["origin"] == 0] for name, column in columns.items()}, u.rng("fpf-buffer"))

    def _modules(self, model: nn.Module) -> tuple[set[str], list[nn.Module]]:
        """The names of the modules to train, those inside them included; and the norm layers outside."""
        every = dict(model.named_modules())
        auto = [head_name(model), *norm_modules(model)]
        named = [self.modules] if isinstance(self.modules, str) else self.modules
        wanted = auto if self.modules == "norm+head" else named
        for name in wanted:
            if name not in every:
                raise UnknownName(f"fpf: the model has no module {name!r}{nearest(name, every)}")
        chosen = {name for name in every if any(name == want or name.startswith(f"{want}.") for want in wanted)}
        return chosen, [module for name, module in norm_modules(model).items() if name not in chosen]


@dataclass
class _Call(Keeper):
    """What acts inside a call: balanced batches, norm layers outside in eval mode, the distance to stored outputs."""

    buffer: Buffer
    frozen: list[nn.Module]
    steps: int
    batch_size: int
    alpha: float

    def order(self, u: Update, index: Tensor) -> list[Tensor]:
        return [self.buffer.rows(self.batch_size, u.rng("fpf"), balanced=True) for _ in range(self.steps)]

    def prepare(self, u: Update, batch: Batch) -> Batch:
        for module in self.frozen:
            module.eval()
        return {**batch, "origin": torch.ones_like(batch["origin"])}  # none of these rows is the task's own

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if not self.alpha:
            return None
        stored = batch["logits"]
        known = torch.arange(stored.shape[1], device=stored.device) < batch["width"].unsqueeze(1)
        gap = (u.out(batch).logits[:, : stored.shape[1]] - stored).square()
        return self.alpha * (gap * known).sum() / known.sum()


def _examples(buffer: Buffer) -> Examples:
    columns = buffer.columns
    return Examples({name: c for name, c in columns.items() if name != "id"}, "buffer", columns["id"].cpu())
