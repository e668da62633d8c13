"""Small data, bit comparison and a bare PyTorch loop, against which our loop is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.problem import Classification
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.learn.finetune import Finetune
from remanence.models import mlp
from remanence.train.roles import Keeper, Learner, Method
from remanence.train.settings import Settings
from remanence.train.update import Update


def blobs(n: int = 90, classes: int = 3, seed: int = 0, first: int = 0, at: int = 0, width: int = 6) -> Examples:
    """`n` points around one centre for each of the labels `first` ...; ids from `at`."""
    rng = generator(seed, "blobs", first)
    y = torch.arange(n) % classes + first
    centres = torch.randn(classes + first, width, generator=rng)
    x = centres[y] + torch.randn(n, width, generator=rng)
    return Examples({"x": x, "y": y}, f"blobs-{first}", ids=torch.arange(at, at + n))


def network(outputs: int = 3, width: int = 6, **knobs: Any) -> nn.Module:
    return mlp(width, [8, 7], outputs, **knobs)


def update(
    model: nn.Module,
    data: Examples,
    parts: Sequence[Method] = (),
    owner: Learner | None = None,
    seed: int = 0,
    event: str = "learn/0",
    labels: Sequence[int] = (0, 1, 2),
    metrics: Sequence[Any] = (),
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Update:
    return Update(model=model, problem=Classification(), owner=owner or Finetune(), settings=Settings(**settings), data=lambda name: data,
                  parts=parts, labels=labels, new_labels=labels, seed=seed, event=event, metrics=metrics, **(more or {}))  # fmt: skip


def bare(
    model: nn.Module,
    data: Examples,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    event: str = "learn/0",
    clip: float | None = None,
    accumulate: int = 1,
    factor: Callable[[int, int], float] | None = None,
) -> int:
    """A training loop as anyone would write it, on our addresses of the data's order; returns its steps."""
    base = optimizer.param_groups[0]["lr"]
    total = epochs * max(1, -(-len(data) // batch_size) // accumulate)
    step = count = 0
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=generator(seed, event, "", "order", epoch))
        for rows in order.split(batch_size):
            loss = F.cross_entropy(model(data["x"][rows]), data["y"][rows])
            if count % accumulate == 0:
                optimizer.zero_grad()
            (loss / accumulate).backward()
            count += 1
            if count % accumulate:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if factor is not None:
                optimizer.param_groups[0]["lr"] = base * factor(step, total)
            optimizer.step()
            step += 1
    return step


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Bit for bit, nested dicts and lists too."""
    if isinstance(a, nn.Module):
        return same(a.state_dict(), b.state_dict())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    return bool(a == b)


@dataclass
class Spy(Keeper):
    """Writes down what the loop calls, and the ids it saw."""

    name: ClassVar[str] = "spy"

    draws: bool = False
    calls: list[str] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)

    def begin(self, u: Update) -> None:
        self.calls.append("begin")

    def end(self, u: Update) -> None:
        self.calls.append("end")

    def prepare(self, u: Update, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls.append("prepare")
        self.batches.append(batch["id"].tolist())
        if self.draws:
            self.drawn.append(float(torch.rand((), generator=u.rng(self.name))))
            torch.rand(5)  # a part that uses torch's own generator
        return batch

    def gradient(self, u: Update) -> None:
        self.calls.append("gradient")

    def project(self, u: Update, params: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        self.calls.append("project")

    def after(self, u: Update, batch: dict[str, Tensor]) -> None:
        self.calls.append("after")
