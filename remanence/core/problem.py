"""What being right means: forward, per-example losses and scores of a task family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import check_knobs, knob

Batch = dict[str, Tensor]


@dataclass(slots=True)
class Out:
    """What a forward gave: `logits` (B, C) or values (B, ...); `features` (B, D), the head's input, if asked for. Of a text: one row
    for each of its targets, see `CausalLM`."""

    logits: Tensor
    features: Tensor | None = None


@dataclass
class Problem:
    """Base of all problems; `forward`, `losses` and `score` define one. `main` is the score that stands for it in tables."""

    main: ClassVar[str] = "accuracy"

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

    def compact(self, batch: Batch) -> Batch:
        """`batch` without what no row of it needs, such as padding; called on gathered rows, before they go to the device."""
        return batch

    def spec(self) -> dict[str, Any]:
        """``{name: knobs}``, from which `problem_of` builds an equal one."""
        return {NAMES[type(self)]: {f.name: getattr(self, f.name) for f in fields(self)}}


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

    main: ClassVar[str] = "mse"

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


@dataclass
class CausalLM(Problem):
    """The next token of a text. Batches have `input_ids` (B, L), padded on the right, `attention_mask` (B, L), True where there is a
    token, and `labels` (B, L): the token itself where it is to be predicted from what stands before it, -100 elsewhere.

    `Out.logits` are (M, V): one row for each of the batch's M targets, row by row of the batch, and `features` (M, D) are what the head
    saw there; the head is not computed anywhere else. `losses` (B,) are means over a row's targets, in nats per token; `loss` is the
    mean over all targets of the batch, each weighted as its row. Scores per row: `accuracy`, the share of targets that would be
    predicted; `exact`, whether all of them would (then greedy decoding gives the answer word for word); `loss`.

    How a text becomes rows is told by the knobs; every row has `context` places, of which a batch uses as many as its longest row does.

    The model is called as ``model(input_ids=...)``, gives logits (B, L, V) or an object with them as `logits` (as transformers' do), and
    looks backwards only.
    """

    context: int = knob(512, "most tokens of a row", low=2)
    long: str = knob(
        "refuse",
        "what becomes of a longer document: an error; several rows; its beginning",
        choices=("refuse", "split", "cut"),
    )
    answers: bool = knob(True, "whether, of a document with a prompt, only the answer is to be predicted")
    packing: bool = knob(False, "whether short rows share one row in the forward; needs a model of transformers")

    def compact(self, batch: Batch) -> Batch:
        length = int(batch["attention_mask"].sum(1).max()) if len(batch["id"]) else 0
        return {name: c[:, :length] if name in TOKENS else c for name, c in batch.items()}

    def forward(self, model: nn.Module, batch: Batch, head: nn.Module | None = None) -> Out:
        target = batch["labels"][:, 1:] != -100
        options: dict[str, Any] = {"use_cache": False} if hasattr(model, "config") else {}
        chosen: Tensor | tuple[Tensor, ...]
        if self.packing:
            from remanence.core.packing import packed

            ids, chosen, more = packed(batch, target)
            options |= more
        else:
            # Padding stands on the right, where no token looks: it needs no mask.
            ids, chosen = batch["input_ids"], target.nonzero(as_tuple=True)
        taken: list[Tensor] = []

        def choose(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if inputs[0].dim() == 3:  # (B, L, D): only what is a target goes on
                taken.append(inputs[0][chosen])
            return (taken[-1], *inputs[1:])

        hook = (head or output_layer(model)).register_forward_pre_hook(choose)
        try:
            made = model(input_ids=ids.long(), **options)
        finally:
            hook.remove()
        if not taken:
            raise BadInput(
                "the model never called its head on (B, L, D) states; name the output layer by a `head` attribute"
            )
        return Out(made if isinstance(made, Tensor) else made.logits, taken[0] if head is not None else None)

    def losses(self, out: Out, batch: Batch, classes: Tensor | None = None) -> Tensor:
        rows, y = targets(batch)
        return _row_mean(F.cross_entropy(out.logits, y, reduction="none"), rows, len(batch["labels"]))

    def loss(self, out: Out, batch: Batch, classes: Tensor | None = None) -> Tensor:
        rows, y = targets(batch)
        if "weight" not in batch:
            return F.cross_entropy(out.logits, y)
        weight = batch["weight"][rows]
        return (F.cross_entropy(out.logits, y, reduction="none") * weight).sum() / weight.sum()

    def score(self, out: Out, batch: Batch, classes: Tensor | None = None) -> dict[str, Tensor]:
        rows, y = targets(batch)
        right = _row_mean((out.logits.argmax(1) == y).to(torch.float32), rows, len(batch["labels"]))
        return {"accuracy": right, "exact": (right > 1 - 1e-6).to(torch.float32), "loss": self.losses(out, batch)}


#: Columns of one value per token.
TOKENS = ("input_ids", "attention_mask", "labels")


def padded(name: str, column: Tensor, width: int) -> Tensor:
    """A column of one value per token, (B, L), as (B, width): what is added is no target."""
    return F.pad(column, (0, width - column.shape[1]), value=-100 if name == "labels" else 0)


def targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the M targets of a batch of text, row by row: the row of each (M,), and the token that is right there (M,)."""
    labels = batch["labels"][:, 1:]
    rows, places = (labels != -100).nonzero(as_tuple=True)
    return rows, labels[rows, places].long()


def target_counts(rows: Batch) -> Tensor:
    """How many answers each row asks for (B,), float32: its targets, of a text; else one."""
    if TOKENS[0] in rows:
        return (rows["labels"][:, 1:] != -100).sum(1).to(torch.float32)
    return torch.ones(len(rows["id"]), device=rows["id"].device)


def _row_mean(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """The mean of `values` (M,) in each of `count` rows; 0 where a row has none."""
    sums = values.new_zeros(count).index_add(0, rows, values)
    return sums / values.new_zeros(count).index_add(0, rows, torch.ones_like(values)).clamp(min=1)


def output_layer(model: nn.Module) -> nn.Module:
    """The layer that gives the logits: transformers' output embeddings, else the attribute `head` or `lm_head`.

    Raises:
        BadInput: there is none.
    """
    offered: Any = getattr(model, "get_output_embeddings", None)
    found = offered() if offered is not None else None
    found = found or getattr(model, "head", None) or getattr(model, "lm_head", None)
    if not isinstance(found, nn.Module):
        raise BadInput(f"{type(model).__name__} has no output layer that is known; name it by a `head` attribute")
    return found


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "classification": Classification,
    "regression": Regression,
    "causal-lm": CausalLM,
}
NAMES = {made: name for name, made in PROBLEMS.items()}


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
