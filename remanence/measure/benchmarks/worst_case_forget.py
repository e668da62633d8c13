"""The examples that are hardest to forget, as a test bed for every method."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.train.roles import Benchmark
from remanence.train.update import Context


@dataclass
class WorstCaseForget(Benchmark):
    """The `n` training examples that a cheap unlearner forgets least: a bi-level choice.

        lower: theta_u(w) = sign-SGD from theta_o on sum_i (1 - w_i) loss_i(theta)
        upper: w <- P( w - w_lr * (loss(theta_u) + 2 gamma w) )        P: onto 0 <= w_i <= 1, sum_i w_i = n
        the n examples of the largest w; with ``easiest`` the upper step climbs

    Since d sign(.) / d w = 0 almost everywhere, theta_u has no derivative by w and the upper gradient is the loss itself, example by
    example. What is hard to forget is what the rest of the data says anyway: a retrained model answers it rightly too, so compare
    with retraining and never with 100 %.

    Pick it to see a method at its worst instead of on random examples. Needs: labels or targets, the training data.
    Reference: Fan et al. 2024, "Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning", arXiv 2403.07362.
    Deviation: the lower level is the fine-tuning variant only, and `w` is made binary once, at the end (the code does so every 20 rounds).
    """

    rounds: int = knob(8, "upper steps", low=1)
    epochs: int = knob(2, "passes of the lower level, each round from theta_o", low=1)
    lr: float = knob(1e-4, "step of sign-SGD", low=0)
    w_lr: float = knob(1.0, "step of the upper level", low=0)
    gamma: float = knob(0.0, "pull of w toward even values", low=0)
    batch_size: int = knob(64, "examples per lower step", low=1)
    easiest: bool = knob(False, "choose the examples that are forgotten most easily instead")

    def select(self, c: Context, examples: Examples, n: int, seed: int = 0) -> Ids:
        """The chosen ids among `examples` (the life's training data, with their own labels); `c.model` is not touched.

        Raises:
            BadInput: n is not between 1 and the number of examples less one.
        """
        if not 1 <= n < len(examples):
            raise BadInput(f"n={n} must be at least 1 and below the {len(examples)} examples there are to choose from")
        data = c.mapped(examples)
        w = torch.full((len(data),), n / len(data), dtype=torch.float64)
        sign = -1.0 if self.easiest else 1.0
        for number in range(self.rounds):
            losses = self.losses(c, self.lower(c, data, w, generator(seed, "worst-case", number)), data)
            w = project(w - self.w_lr * (sign * losses + 2 * self.gamma * w), n)
        chosen = torch.sort(w, descending=True, stable=True).indices[:n]
        return Ids(data.id[chosen].numpy())

    def lower(self, c: Context, data: Examples, w: Tensor, rng: torch.Generator) -> nn.Module:
        """theta_u(w): a copy of the network after `epochs` of sign-SGD on the weighted loss."""
        with torch.random.fork_rng(devices=[]):
            model = copy.deepcopy(c.model).train()
            torch.manual_seed(0)  # dropout, if there is any
            params = [p for p in model.parameters() if p.requires_grad]
            keep = (1 - w).to(torch.float32)
            for _ in range(self.epochs):
                for rows in torch.randperm(len(data), generator=rng).split(self.batch_size):
                    batch = _on(c, data.batch(rows))
                    losses = c.problem.losses(
                        c.problem.forward(model, batch), batch, c.classes.seen if c.columns else None
                    )
                    grads = torch.autograd.grad((keep[rows].to(losses) * losses).sum(), params, allow_unused=True)
                    with torch.no_grad():
                        for p, g in zip(params, grads, strict=True):
                            if g is not None:
                                p.sub_(g.sign(), alpha=self.lr)
        return model

    @staticmethod
    @torch.no_grad()
    def losses(c: Context, model: nn.Module, data: Examples) -> Tensor:
        """The loss (N,) of every example under `model`, in eval mode, float64."""
        model.eval()
        found = []
        for rows in torch.arange(len(data)).split(1024):
            batch = _on(c, data.batch(rows))
            found.append(
                c.problem.losses(c.problem.forward(model, batch), batch, c.classes.seen if c.columns else None)
            )
        return torch.cat(found).double().cpu()


def project(a: Tensor, n: float) -> Tensor:
    """The nearest point to `a` (N,) with 0 <= w_i <= 1 and sum w_i = n: clip(a - nu, 0, 1), nu by bisection.

    Raises:
        BadInput: n is not within [0, N].
    """
    if not 0 <= n <= len(a):
        raise BadInput(f"n={n} is not within 0 and {len(a)}")
    low, high = a.min() - 1, a.max()
    for _ in range(100):
        middle = (low + high) / 2
        if (a - middle).clamp(0, 1).sum() > n:
            low = middle
        else:
            high = middle
    return (a - (low + high) / 2).clamp(0, 1)


def _on(c: Context, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: column.to(c.device) for name, column in batch.items()}
