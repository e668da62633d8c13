"""What being right means: forward, per-example losses and scores of a task family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import check_knobs, knob

Batch = dict[str, Tensor]


@dataclass(slots=True)
class Out:
    """What a forward gave: `logits` (B, C) or values (B, ...); `features` (B, D), the head's input, if asked for."""

    logits: Tensor
    features: Tensor | None = None


@dataclass
class Problem:
    """Base of all problems; `forward`, `losses` and `score` define one."""

    def __post_init__(self) -> None:
        check_knobs(self)

    def forward(self, model: nn.Module, batch: Batch, head: nn.Module | None = None) -> Out:
        """Run `model` on ``batch["x"]``; with `head` given, its input is captured as `features`, flattened to (B, D)."""
        if head is None:
            return Out(model(batch["x"]))
        taken: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
        try:
            logits = model(batch["x"])
        finally:
            hook.remove()
        if not taken:
            raise BadInput(
                "the model never called its head, so it has no features to offer; name the head by a `head` attribute"
            )
        return Out(logits, taken[0].flatten(1))

    def losses(self, out: Out, batch: Batch, classes: Tensor | None = None) -> Tensor:
        """Per-example losses (B,)."""
        raise NotImplementedError

    def loss(self, out: Out, batch: Batch, classes: Tensor | None = None) -> Tensor:
        """The mean of `losses`, weighted by ``batch["weight"]`` (B,) where it is there."""
        losses = self.losses(out, batch, classes)
        weight = batch.get("weight")
        return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()

    def score(self, out: Out, batch: Batch, classes: Tensor | None = None) -> dict[str, Tensor]:
        """Per-example figures (B,) whose means describe how right the model is."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """``{name: knobs}``, from which `problem_of` builds an equal one."""
        return {type(self).__name__.lower(): {f.name: getattr(self, f.name) for f in fields(self)}}


@dataclass
class Classification(Problem):
    """One right class per example. `y` (B,) head columns, or (B, C) probabilities.

    ``softmax``: cross-entropy in nats over the competing columns. ``sigmoid``: the mean over the competing columns of the
    binary cross-entropy of each, so columns do not push one another (Smith et al. 2023, arXiv 2203.17269, L_c).
    """

    link: str = knob("softmax", "how logits become probabilities", choices=("softmax", "sigmoid"))
    classes: list[int] | None = knob(None, "labels of the head's columns, in order; None: in order of first sight")

    def losses(self, out: Out, batch: Batch, classes: Tensor | None = None) -> Tensor:
        logits, y = out.logits, batch["y"]
        if y.dtype.is_floating_point:
            y = y if classes is None else y[:, classes]
            logits = logits if classes is None else logits[:, classes]
        elif self.link == "sigmoid":
            y = F.one_hot(y, logits.shape[1]).to(logits.dtype)
            logits, y = (logits, y) if classes is None else (logits[:, classes], y[:, classes])
        elif classes is not None and len(classes) < logits.shape[1]:
            barred = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            barred[classes] = False
            logits = logits.masked_fill(barred, -torch.inf)
        if self.link == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)
        return F.cross_entropy(logits, y, reduction="none")

    def loss(self, out: Out, batch: Batch, classes: Tensor | None = None) -> Tensor:
        y = batch["y"]
        if (
            self.link == "softmax"
            and "weight" not in batch
            and not y.dtype.is_floating_point
            and (classes is None or len(classes) == out.logits.shape[1])
        ):
            return F.cross_entropy(out.logits, y)  # one fused kernel: the loop's hot path
        return super().loss(out, batch, classes)

    def score(self, out: Out, batch: Batch, classes: Tensor | None = None) -> dict[str, Tensor]:
        logits = out.logits
        if classes is not None and len(classes) < logits.shape[1]:
            keep = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            keep[classes] = True
            logits = logits.masked_fill(~keep, -torch.inf)
        return {"accuracy": (logits.argmax(1) == batch["y"]).to(torch.float32), "loss": self.losses(Out(logits), batch)}


@dataclass
class Regression(Problem):
    """Real targets `y` (B,) or (B, K); the loss is half the squared error summed over K, a unit-variance Gaussian's nats."""

    def losses(self, out: Out, batch: Batch, classes: Tensor | None = None) -> Tensor:
        y = batch["y"].to(out.logits.dtype)
        values = out.logits if y.dim() == out.logits.dim() else out.logits.squeeze(-1)
        if values.shape != y.shape:
            raise BadInput(
                f"the model gives values of shape {tuple(values.shape)} for targets of shape {tuple(y.shape)}"
            )
        return 0.5 * (values - y).square().reshape(len(y), -1).sum(1)

    def score(self, out: Out, batch: Batch, classes: Tensor | None = None) -> dict[str, Tensor]:
        losses = self.losses(out, batch)
        return {"mse": 2 * losses, "loss": losses}


PROBLEMS: dict[str, Callable[..., Problem]] = {"classification": Classification, "regression": Regression}


def problem_of(value: Any) -> Problem:
    """A Problem from a Problem, a name, or ``{name: knobs}``; None is classification."""
    from remanence.core.errors import UnknownName, nearest
    from remanence.core.knobs import build

    if isinstance(value, Problem):
        return value
    name, knobs = (value or "classification", {}) if not isinstance(value, dict) else next(iter(value.items()))
    if name not in PROBLEMS:
        raise UnknownName(f"no problem is called {name!r}{nearest(str(name), PROBLEMS)}")
    return build(PROBLEMS[name], knobs or {}, str(name))  # type: ignore[arg-type, no-any-return]
