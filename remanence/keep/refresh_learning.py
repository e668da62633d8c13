"""Unlearn a little before every step, then learn again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples
from remanence.nn.anatomy import keeping_buffers
from remanence.nn.fisher import diagonal_fisher
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class RefreshLearning(Keeper):
    """Before each step every tensor w climbs the loss of the new rows a little, with noise; then comes the usual step.

        g = d/dw of mean over new rows of loss(f(x), y)
        w <- w + delta / (1 + damping * F_w) * (|w| / |g| * g + noise * N(0, I))        `inner` times
        end of an event:  F_w <- decay * F_w + mean_i p(y_i | x_i) (d log p(y_i | x_i) / dw)^2

    It acts like a penalty on the gradient's norm, and so leads to flatter minima. The climb is taken over the batch's
    own rows only, not over replayed ones, and leaves running statistics and the network's random numbers as they are.
    With accumulation it comes before every batch.

    Pick it to add about a point to replay methods, at twice the cost of a step. Needs: labels or targets. After a
    forget the Fisher is taken again from the new weights and the retained data.
    Reference: Wang et al. 2024, "A Unified and General Framework for Continual Learning", arXiv 2403.13249. The climb is
    the released code's, whose rate of the inner step (0.01) cancels in the norm matching; as in the paper it comes before
    the step (the code climbs after it, on the batch just learned) and the Fisher is taken in eval mode. The paper climbs
    the whole objective by gamma F^-1 grad with noise N(0, 2 gamma F^-1); that is not offered, as F^-1 has no bound. A
    tensor of zeros (a fresh bias) moves by the noise alone, and a batch of one row does not climb. Other keepers'
    `project` does not see the climb, only the step after it.
    """

    delta: float = knob(1e-5, "length of the climb, relative to each tensor's norm", low=0)
    inner: int = knob(1, "climbs before each step", low=1)
    noise: float = knob(0.001, "scale of the noise, relative to delta", low=0)
    damping: float = knob(0.001, "how much the Fisher shortens the climb", low=0)
    decay: float = knob(1e-5, "share of the old Fisher that stays when a task is added", low=0, high=1)

    def setup(self) -> None:
        self.fisher: dict[str, Tensor] = {}

    @property
    def inert(self) -> bool:
        return self.delta == 0

    def prepare(self, u: Update, batch: Batch) -> Batch:
        rows = {name: column[batch["origin"] == 0] for name, column in batch.items()}
        if u.kind != "learn" or len(rows["id"]) < 2:  # batch norm cannot take a single row
            return batch
        for _ in range(self.inner):
            self._climb(u, self._gradient(u, rows))
        u.fresh_out()
        return batch

    def _gradient(self, u: Update, rows: Batch) -> list[Tensor]:
        devices = [u.device] if u.device.type == "cuda" else []
        with keeping_buffers(u.model), torch.random.fork_rng(devices=devices):
            out = u.problem.forward(u.model, rows)
            return u.grad(u.problem.loss(out, rows, u.classes.seen if u.columns else None))

    @torch.no_grad()
    def _climb(self, u: Update, gradient: list[Tensor]) -> None:
        rng = u.rng("refresh-learning")
        for (name, w), g in zip(u.parameters.items(), gradient, strict=True):
            move = w.norm() / (g.norm() + 1e-20) * g
            if self.noise:
                move += self.noise * torch.randn(w.shape, generator=rng, dtype=w.dtype).to(w.device)
            if name in self.fisher:  # new head rows have no Fisher yet
                old = self.fisher[name]
                _leading(move, old).div_(1 + self.damping * old)
            w.add_(move, alpha=self.delta)

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self._consolidate(u, u.data("task"))

    def _consolidate(self, u: Update, examples: Examples) -> None:
        params, classes = dict(u.model.named_parameters()), u.classes.seen if u.columns else None
        mass = 0.0

        def weighted() -> Iterator[Batch]:
            nonlocal mass
            for batch in u.batches(examples):
                with u.aside():
                    p = u.problem.losses(u.problem.forward(u.model, batch), batch, classes).neg().exp()
                mass += float(p.sum())
                yield {**batch, "weight": p}

        fisher = diagonal_fisher(u.model, u.problem, weighted(), params, classes=classes, weight_by="weight")
        for name, f in fisher.items():
            f.mul_(mass / len(examples))  # the mean over examples, where the line above divides by the sum of p
            if name in self.fisher:
                _leading(f, self.fisher[name]).add_(self.fisher[name], alpha=self.decay)
        self.fisher = fisher

    def forgot(self, u: Update, ids: Ids) -> None:
        self.fisher = {}
        for examples in u.history():
            if len(examples):
                self._consolidate(u, examples)


def _leading(tensor: Tensor, old: Tensor) -> Tensor:
    """The block of `tensor` that has the shape of `old` (a view): a head that grew keeps its first rows."""
    return tensor[tuple(slice(0, size) for size in old.shape)]
