"""Contrast the class means of each batch across two views, and mix replayed rows of classes that are easily confused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.data import cat_batches
from remanence.nn.anatomy import head
from remanence.nn.buffer import Buffer
from remanence.nn.contrast import (
    Projection,
    add_projection,
    class_means,
    prototype_contrast,
    supervised_contrast,
    unit,
)
from remanence.train.roles import Learner, head_rows
from remanence.train.update import Update


@dataclass
class OnPro(Learner):
    """Batch means of classes are pushed apart, of new rows and of replayed rows by themselves; cross-entropy sees replayed rows only,
    some of them mixed from classes whose means are near.

        L = CE(mixed replayed rows) + sum over new and replayed rows of (prototypes * L_ope + instances * L_ins)
        L_ope = mean over p in {p_c, p'_c} of -log exp(p.p* / proto_t) / sum_{q != p} exp(p.q / proto_t)        p* = the class in the other view
        p_c = unit(mean_{y_i = c} z_i)        z = unit(projection of the head's input), z' the same of the view ``strong``
        L_ins = mean over the rows of both views of the supervised contrast of z at ins_t
        pairs (a, b) to mix: softmax(1 / |m_a - m_b|)        m_c = (mean z + mean z') / 2 of the last step's replayed rows

    In the first task cross-entropy is taken on the new rows. A share `base_rate` of the replayed rows is mixed with one another
    (with probability mixup_p, lambda from U(0, upper)), the rest are made of pairs (lambda from Beta(alpha, alpha)); labels are mixed
    alike. The projection hangs on the head, is trained with the network and has no part in answers. Without a view ``strong`` both
    views are the row itself, and L_ope only pushes classes apart. Rows that keepers add join the cross-entropy.

    Pick it for one pass over a stream of images with strong views and a small buffer. Needs: labels, borders, stores examples,
    inputs that can be averaged.
    On the digits, 27 batches per task and without views, it does not beat `finetune` with as many replayed rows (equal under SGD, worse
    under Adam): there the network is short of steps rather than of features, and new rows are judged once they are in the buffer only.
    Reference: Wei et al. 2023, "Online Prototype Learning for Online Continual Learning", ICCV, arXiv 2308.00301.
    Deviations from the code: no rotated copies and no random slice of features in L_ins (as in OCM, where both come from), which is plain
    supervised contrast, on new and on replayed rows before they are mixed; every row of a pair is mixed or not by itself (there:
    all rows of a pair); one forward for all rows, so that batch norm sees them together; where nothing can be replayed cross-entropy is
    taken on the new rows. Cross-entropy sees rows through the view, as there. The means of the last step are dropped after the event.
    """

    stores: ClassVar[tuple[str, ...]] = ("capacity",)

    capacity: int = knob(200, "examples in the reservoir", low=0)
    replay: int = knob(64, "rows replayed per batch, at most", low=0)
    per_class: int = knob(7, "rows replayed per batch and class seen, at most", low=0)
    width: int = knob(128, "outputs of the projection", low=1)
    proto_t: float = knob(0.5, "temperature between means", low=1e-3)
    ins_t: float = knob(0.07, "temperature between rows", low=1e-3)
    prototypes: float = knob(1.0, "weight of the contrast between means", low=0)
    instances: float = knob(1.0, "weight of the contrast between rows", low=0)
    base_rate: float = knob(0.75, "share of the replayed rows that is drawn evenly, not by pairs", low=0, high=1)
    mixup_p: float = knob(0.6, "probability that a replayed row is mixed", low=0, high=1)
    upper: float = knob(0.6, "greatest share of the partner in an evenly drawn row", low=0, high=1)
    alpha: float = knob(0.4, "of Beta(alpha, alpha), from which the partner's share in a pair comes", low=1e-3)

    def setup(self) -> None:
        self.buffer = Buffer(self.capacity)
        self.means: dict[str, Tensor] = {}  # of the last step of this event: labels (K,), values (K, width)

    def structure(self, u: Update) -> dict[str, Any]:
        rows = u.columns - head_rows(u.model) if u.columns else 0
        if rows <= 0 and (_projection(u.model) is not None or not u.columns):
            return {}
        return {"rows": max(0, rows), "seed": u.seed_of("head")}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        kept = _projection(model)
        if kept is not None:
            del head(model).projection  # a head that grows becomes a new module, and takes none along
        model = super().attach(model, structure) if structure["rows"] else model
        if kept is None:
            add_projection(model, self.width, int(structure["seed"]))
        else:
            head(model).projection = kept
        return model

    def begin(self, u: Update) -> None:
        if not u.columns:
            raise BadInput("onpro contrasts classes, and this problem has none; use finetune with replay")
        u.ask_features()

    def prepare(self, u: Update, batch: Batch) -> Batch:
        """New rows, replayed rows, then the first and the second rows of all pairs."""
        rng = u.rng("onpro")
        drawn = self.buffer.draw(min(self.replay, self.per_class * len(u.classes.seen)), rng)
        self._own, self._pairs = len(batch["id"]), 0
        self._drawn = len(drawn["id"]) if drawn else 0
        self._mix = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
        if not self._drawn:
            return batch
        if len(u.classes.old):
            pairs = self._pair(self._drawn - int(self._drawn * self.base_rate))
            self._pairs = len(pairs) // 2
            drawn = {name: torch.cat([c, self.buffer.columns[name][pairs.to(c.device)]]) for name, c in drawn.items()}
        return cat_batches(batch, {**drawn, "origin": torch.full_like(drawn["id"], 1 + len(u.parts))})

    def _pair(self, n: int) -> Tensor:
        """Numbers (2 n,) of rows in the buffer, the first and then the second ones of n pairs; none while there are no two means."""
        y = self.buffer.columns["y"].cpu().numpy()
        labels = self.means["labels"].cpu() if self.means else torch.zeros(0, dtype=torch.int64)
        there = torch.from_numpy(np.isin(labels.numpy(), y))
        if not n or int(there.sum()) < 2:
            return torch.zeros(0, dtype=torch.int64)
        counts = allot(pair_shares(self.means["values"].cpu()[there]), n, self._mix)
        pairs = torch.combinations(labels[there]).numpy().repeat(counts, axis=0)
        chosen = [self._mix.choice(np.flatnonzero(y == label)) for label in pairs.T.ravel()]
        return torch.from_numpy(np.array(chosen, dtype=np.int64))

    def objective(self, u: Update, batch: Batch) -> Tensor:
        own, drawn = self._own, self._drawn
        rows = {name: column[: own + drawn] for name, column in batch.items()}
        view, judged = u.view(rows, "strong"), self._judged(u, batch)
        views = [rows["x"]] if view is rows else [rows["x"], view["x"]]
        out = u.out({"x": torch.cat([*views, u.view(judged, "strong")["x"]])}, features=True)
        assert out.features is not None
        projection = _projection(u.model)
        assert projection is not None
        count = own + drawn
        z = unit(projection(out.features[: count * len(views)])).split(count)
        logits = Out(out.logits[count * len(views) :])
        loss = u.problem.losses(logits, judged, u.classes.seen).mean()
        for part in (slice(own), slice(own, None)) if drawn else (slice(own),):
            first, second, y = z[0][part], z[-1][part], rows["y"][part]
            if self.prototypes:
                loss = loss + self.prototypes * prototype_contrast(first, second, y, self.proto_t).mean()
            if self.instances:
                among = supervised_contrast(torch.cat([some[part] for some in z]), y.repeat(len(z)), self.ins_t)
                loss = loss + self.instances * among.mean()
        if drawn:
            labels, values = class_means((first + second).detach() / 2, y)
            self.means = {"labels": labels, "values": values}
        return loss

    def _judged(self, u: Update, batch: Batch) -> Batch:
        """The rows for the cross-entropy, mixed, with the classes' shares (n, C) as labels."""
        own, drawn, pairs = self._own, self._drawn, self._pairs
        y = F.one_hot(batch["y"], head_rows(u.model)).float()
        added = slice(own + drawn + 2 * pairs, None)
        if not drawn or not len(u.classes.old):
            which = torch.cat([torch.arange(own), torch.arange(len(y))[added]]).to(y.device)
            return {name: column[which] for name, column in {**batch, "y": y}.items()}
        even, at = torch.arange(own, own + drawn - pairs), torch.arange(pairs) + own + drawn
        alone = torch.arange(len(y))[added]
        first = torch.cat([even, at, alone])
        share = torch.zeros(len(first), dtype=torch.float64)
        second = torch.cat([even[torch.from_numpy(self._mix.permutation(len(even)))], at + pairs, alone])
        if self.means:
            mixed = torch.from_numpy(self._mix.random(drawn) < self.mixup_p)
            upper = self._mix.uniform(0, self.upper, len(even))
            near = self._mix.beta(self.alpha, self.alpha, pairs)
            share[:drawn] = torch.from_numpy(np.concatenate([upper, near])) * mixed
        share, first, second = share.to(y), first.to(y.device), second.to(y.device)
        found = {name: column[first] for name, column in batch.items()}
        for name, column in (("x", batch["x"]), ("y", y)):
            t = share.view(-1, *[1] * (column.dim() - 1))
            found[name] = (1 - t) * column[first] + t * column[second]
        return found

    def after(self, u: Update, batch: Batch) -> None:
        if u.epoch < u.sweep:
            own = {k: c[batch["origin"] == 0] for k, c in batch.items() if k not in ("origin", "weight")}
            self.buffer.add(own, u.rng("onpro-buffer"))

    def end(self, u: Update) -> None:
        self.means = {}


def _projection(model: nn.Module) -> Projection | None:
    found = getattr(head(model), "projection", None)
    return found if isinstance(found, Projection) else None


def pair_shares(means: Tensor) -> Tensor:
    """softmax(1 / distance) over all pairs of the K means (K, D), in the order of `torch.combinations`; float64."""
    return (1 / torch.pdist(means.double()).clamp(min=1e-6)).softmax(0)


def allot(shares: Tensor, n: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """n places by `shares`, rounded; where they are too few or too many, pairs drawn by `rng` get one more or one less."""
    counts = (shares * n).round().to(torch.int64).numpy()
    while missing := n - int(counts.sum()):
        open_to = np.arange(len(counts)) if missing > 0 else np.flatnonzero(counts)
        counts[rng.permutation(open_to)[: abs(missing)]] += 1 if missing > 0 else -1
    return counts
