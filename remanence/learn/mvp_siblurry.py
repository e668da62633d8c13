"""Prompts picked by key for a frozen transformer, with masks on the logits, and a loss for streams without borders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Classification, Out
from remanence.learn.frozen import check_labels
from remanence.nn.pool import Prompted
from remanence.train.roles import Learner, Step, head_rows
from remanence.train.update import Update


@dataclass
class MVP(Learner):
    """Trains a pool of prompts, a mask on the logits for each of its keys, and the head; the transformer is frozen.

        k = argmin_p (1 - cos(q, K_p)) (n_p + 1)        h = body(x with tokens g and e_k)        logits = (W h + b) * 2 sigmoid(mask_k)
        L = mean_i ((1 - alpha) CE_i + alpha s_i^gamma CE_i) + L_key        CE_i on the logits of h_i / c_i
        s_i = 1 - cos(g_i, G_{y_i})        c_i = 1 - cos(W_{y_i}, h_i) + margin
        L_key = -log(A / (N + A) + 1e-6)        A = mean exp((1 - cos(K_k, K_p)) / (n_k + 1)),  N = mean exp((1 - cos(q, K_k)) / (n_k + 1))

    q is the head's input without prompts, n_p how often key p was picked in training; answers pick the nearest key, without n. g_i is
    the gradient of CE_i (without c) by W_{y_i}, which points along -h_i, and G that of the batch's mean: s is large for rows whose
    own direction the batch overrules. c makes long what already lies along its class. Each is a flag; with all flags off this is a
    prompt pool trained by cross-entropy, L_key being the mean of 1 - cos(q, K_k).

    Pick it for one pass over a stream without borders, such as `data.si_blurry`, on a transformer pretrained on something near.
    Needs: labels, a pretrained vision transformer with at least as many blocks as the prompts name. The published training is
    Adam at 0.005, batches of 64; without a memory, but rows that keepers replay join the loss.
    Where a block reads few tokens of its own keep prompts short: they are drawn at random and disturb it first. On Si-Blurry digits with
    5 tokens and a body that knows digits the flags gain 0.04 (0.78 to 0.82), but the head alone, as often updated, comes to 0.93; with
    one token in one block all three come to 0.93 to 0.94.
    Reference: Moon et al. 2023, "Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask and Visual Prompt
    Tuning", ICCV, arXiv 2308.09303. Deviations from the code: there the batch's mean of s^gamma multiplies its mean loss, here
    each row's its own; there the masses n + 1 in L_key are those of all rows of the batch, crossed, here a row's own;
    there answers pick by n, too; the query is taken after the last norm and may be a mean of tokens; the batch is the same in all of
    its updates (there it is augmented anew).
    """

    size: int = knob(10, "keys, each with prompts and a mask of its own", low=1)
    shared_blocks: list[int] = knob([0, 1], "blocks that read the prompt g, which all inputs share")
    shared_length: int = knob(5, "tokens of g in each block", low=1)
    own_blocks: list[int] = knob([2, 3, 4], "blocks that read the prompt e of the input's key")
    own_length: int = knob(20, "tokens of e in each block", low=1)
    updates: int = knob(3, "optimizer steps for each batch", low=1)
    mask: bool = knob(True, "a mask on the logits for each key")
    contrast: bool = knob(True, "keys are picked by use, too, and pushed apart")
    focal: bool = knob(True, "rows against the batch's gradient weigh more")
    scaling: bool = knob(True, "features of rows that lie along their class are made longer")
    alpha: float = knob(0.5, "share of the loss that is weighted by s", low=0, high=1)
    gamma: float = knob(2.0, "power of s", low=0)
    margin: float = knob(0.5, "smallest divisor of the features", low=1e-3)

    def structure(self, u: Update) -> dict[str, Any]:
        if not u.columns:
            return {}
        grown = super().structure(u)
        return grown if isinstance(u.model, MaskedPrompts) else {**grown, "pool": u.seed_of("pool")}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        if "pool" in structure:
            shared, own = (self.shared_blocks, self.shared_length), (self.own_blocks, self.own_length)
            model = MaskedPrompts(model, self.size, shared, own, int(structure["pool"]), masked=self.mask)
        if "rows" in structure:
            model = super().attach(model, structure)
        assert isinstance(model, MaskedPrompts)
        model.grow_table(head_rows(model))
        return model

    def begin(self, u: Update) -> None:
        check_labels(u, self.slug)
        if u.data("task")["y"].is_floating_point():
            raise BadInput(f"{self.slug} needs one label for each example, not shares")
        u.ask_features()
        self._total: int | None = None

    def learn(self, u: Update) -> None:
        model = _prompted(u)
        names = [name for name, _ in model.named_parameters() if not name.startswith("body.")]
        with model.balancing() if self.contrast else nullcontext():
            u.run(trainable=names)

    def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
        model = _prompted(u)
        if u.total is not None and self._total is None:  # the loop counts one step for each batch
            self._total = u.total = u.total * self.updates
        queries = model.query(batch["x"])  # frozen, so the same in all updates
        for _ in range(self.updates):
            chosen = model.choose(queries)
            yield Step(self._loss(u, batch, queries, chosen))
            model.pool.count(chosen)

    def objective(self, u: Update, batch: Batch) -> Tensor:
        queries = _prompted(u).query(batch["x"])
        return self._loss(u, batch, queries, _prompted(u).choose(queries))

    def _loss(self, u: Update, batch: Batch, queries: Tensor, chosen: Tensor) -> Tensor:
        model, y = _prompted(u), batch["y"]
        out = u.out(batch, features=True)
        assert out.features is not None
        h, factors = out.features.to(model.head.weight.dtype), model.factors(chosen)
        logits = out.logits
        if self.scaling:
            directions = model.head.weight.detach()[y]
            c = 1 - F.cosine_similarity(directions, h.detach(), dim=1) + self.margin
            logits = model.head(h / c[:, None]) * factors
        losses = u.problem.losses(Out(logits), batch, u.classes.seen)
        if self.focal:
            assert isinstance(u.problem, Classification)
            p = _shares(u.problem, out.logits.detach(), u.classes.seen)
            s = overruled(h.detach(), (p - F.one_hot(y, p.shape[1])) * factors.detach(), y)
            losses = (1 - self.alpha) * losses + self.alpha * s**self.gamma * losses
        weight = batch.get("weight")
        loss = losses.mean() if weight is None else (losses * weight).sum() / weight.sum()
        return loss + self._key_loss(model, queries, chosen)

    def _key_loss(self, model: Prompted, queries: Tensor, chosen: Tensor) -> Tensor:
        pool = model.pool
        near = pool.distances(queries).gather(1, chosen)
        if not self.contrast:
            return near.mean()
        return key_contrast(near, pool.distances(pool.keys)[chosen[:, 0]], pool.mass()[chosen])


class MaskedPrompts(Prompted):
    """A prompted network whose logits are multiplied by ``2 sigmoid(table_k)``, table (P, C) drawn as -1, k the input's key."""

    def __init__(self, *given: Any, masked: bool) -> None:
        super().__init__(*given)
        self.table = _Table(len(self.pool.keys), self.pool.keys.detach()) if masked else None

    def grow_table(self, columns: int) -> None:
        """As many columns as the head has; old ones keep their bits."""
        if self.table is not None and self.table.values.shape[1] < columns:
            self.table.values = nn.Parameter(self.table.widened(columns))

    def factors(self, chosen: Tensor) -> Tensor:
        """(B, C) for the logits."""
        columns = head_rows(self)
        if self.table is None:
            return torch.ones(len(chosen), columns, device=chosen.device)
        return 2 * self.table.widened(columns)[chosen].mean(1).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.choose(self.query(x))
        return self.head(self.features(x, chosen)) * self.factors(chosen)  # type: ignore[no-any-return]


class _Table(nn.Module):
    def __init__(self, rows: int, like: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(like.new_empty(rows, 0))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.values.fill_(-1)

    def widened(self, columns: int) -> Tensor:
        return F.pad(self.values, (0, columns - self.values.shape[1]), value=-1.0)


def overruled(h: Tensor, slopes: Tensor, y: Tensor) -> Tensor:
    """s (B,): 1 - cos(g_i, G_{y_i}) for a linear head with inputs h (B, D) and slopes dCE_i / d(W h + b) (B, C), in closed form:
    g_i = slopes_{i, y_i} h_i, whose direction is -h_i, and G = mean_i slopes_i h_i'."""
    batch = slopes.T @ h / len(h)
    return (1 + F.cosine_similarity(h, batch[y], dim=1)).clamp(min=0)


def key_contrast(near: Tensor, apart: Tensor, mass: Tensor) -> Tensor:
    """L_key of the distances `near` (B, 1) of queries to their keys, of those `apart` (B, P) of these to all keys, and mass (B, 1)."""
    pulled, pushed = (near / mass).exp().mean(), (apart / mass).exp().mean()
    return -(pushed / (pulled + pushed) + 1e-6).log()


def _shares(problem: Classification, logits: Tensor, seen: Tensor) -> Tensor:
    """The probabilities (B, C) that cross-entropy compares with the labels; 0 for columns that do not compete."""
    barred = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    barred[seen] = False
    logits = logits.masked_fill(barred, -torch.inf)
    return logits.sigmoid() if problem.link == "sigmoid" else logits.softmax(1)


def _prompted(u: Update) -> MaskedPrompts:
    assert isinstance(u.model, MaskedPrompts)
    return u.model
