"""Contrast features with the head's rows of the classes at hand, and replay: nobody pushes absent classes down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import cat_batches
from remanence.nn.anatomy import head
from remanence.nn.buffer import Buffer
from remanence.nn.contrast import CosineLinear, cosine_head, neighbours, proxy_contrast, supervised_contrast, unit
from remanence.nn.distances import soft_cross_entropy
from remanence.train.roles import Learner, head_rows
from remanence.train.update import Update


@dataclass
class HPCR(Learner):
    """Each batch is joined by rows of a reservoir, and its features are drawn to the head's rows (proxies) of their own classes and
    away from those of the other classes in the batch.

        L = s * mean_i -log exp(cos(z_i, w_{y_i}) / T) / sum_j exp(cos(z_i, w_{y_j}) / T)        i, j over all rows of the batch
            + alpha * mean_{m, j} (o_{y_j}(x_m) - o*_{y_j}(x_m))^2        m over replayed rows, * when the row was stored
            + beta * mean_m CE(softmax_{k != m} z_m.z_k / T, softmax_{k != m} z*_m.z*_k / T)
        s = low + (high - low) (1 - cos(2 pi step / period)) / 2        o_c(x) = cos(z, w_c) / T: the network's answer

    The two distillations begin with the second task. ``holistic=False`` is PCR: the first line with s = 1, and nothing but examples
    is stored. ``pairs="all"`` is the contrast among features and proxies together, for large batches. The head becomes a cosine head
    without bias, so all that reads the network reads these answers; what takes a head for linear (`newton`) does not fit it.
    Where the data has a view ``strong`` each row is there twice, once through it. Rows that keepers add are rows like others.
    After a forget, what is stored beside the examples is made anew by the new weights.

    Pick it for one pass over a class-incremental stream with a small buffer. Needs: labels, stores examples.
    References: Lin et al. 2023, "PCR: Proxy-based Contrastive Replay for Online Class-Incremental Continual Learning", arXiv
    2304.04408; Lin et al. 2025, "HPCR: Holistic Proxy-based Contrastive Replay for Online Continual Learning", arXiv 2309.15038.
    Deviations from the code: one forward for new and replayed rows, so that batch norm sees both; the first batch of all is learned,
    and not only stored; no batch is dropped for being short; columns that the head had not yet when a row was stored are left out of
    the second line (the code's head is full from the start and holds answers for classes that nobody had met). With ten classes
    alpha = 0.1 harms: on the digits it costs 0.08 to 0.15 of accuracy.
    """

    stores: ClassVar[tuple[str, ...]] = ("capacity",)

    capacity: int = knob(1000, "examples in the reservoir", low=0)
    replay: int = knob(10, "rows drawn per batch", low=0)
    temperature: float = knob(0.09, "T, of cosines in the softmax and in the answers", low=1e-3)
    pairs: str = knob("proxy", "rows against proxies, or all of both against one another", choices=("proxy", "all"))
    holistic: bool = knob(True, "false: PCR, without the scale s and the two distillations")
    low: float = knob(0.5625, "least value of the scale s", low=0)
    high: float = knob(1.8, "greatest value of the scale s", low=0)
    period: int = knob(500, "steps from one least value to the next", low=1)
    alpha: float = knob(
        0.01, "weight of the distance to stored answers; in the paper 0.1 with 100 classes, 0.01 with ten", low=0
    )
    beta: float = knob(0.5, "weight of the distance to stored neighbourhoods", low=0)

    def setup(self) -> None:
        self.buffer = Buffer(self.capacity)

    def structure(self, u: Update) -> dict[str, Any]:
        rows = u.columns - head_rows(u.model) if u.columns else 0
        if rows <= 0 and (isinstance(head(u.model), CosineLinear) or not u.columns):
            return {}
        return {"rows": max(0, rows), "seed": u.seed_of("head")}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        model = super().attach(model, structure) if structure["rows"] else model
        return cosine_head(model, self.temperature)

    def derived(self) -> bool:
        return (
            self.holistic and bool(self.alpha or self.beta) and len(self.buffer) > 0
        )  # beside the rows, outputs of the weights

    def begin(self, u: Update) -> None:
        if not u.columns:
            raise BadInput("hpcr contrasts classes, and this problem has none; use finetune with replay")
        u.ask_features()

    def prepare(self, u: Update, batch: Batch) -> Batch:
        drawn = self.buffer.draw(self.replay, u.rng("hpcr"))
        self._drawn, self._own = drawn, len(batch["id"])
        if not drawn:
            return batch
        return cat_batches(batch, {**drawn, "origin": torch.full_like(drawn["id"], 1 + len(u.parts))})

    def objective(self, u: Update, batch: Batch) -> Tensor:
        view = u.view(batch, "strong")
        twice = batch if view is batch else cat_batches(batch, view)
        out = u.out(twice, features=True)
        assert out.features is not None
        self._out = out.logits.detach(), out.features.detach()
        proxies = head(u.model).weight
        assert isinstance(proxies, Tensor)
        z, y, proxies = unit(out.features), twice["y"], unit(proxies)
        if self.pairs == "proxy":
            loss = proxy_contrast(z, proxies, y, self.temperature).mean()
        else:
            loss = supervised_contrast(torch.cat([z, proxies[y]]), y.repeat(2), self.temperature).mean()
        if not self.holistic:
            return loss
        swing = (1 - math.cos(2 * math.pi * u.step / self.period)) / 2
        loss = (self.low + (self.high - self.low) * swing) * loss
        if self._drawn and len(u.classes.old):
            loss = loss + self._distilled(out.logits, z, y, len(batch["y"]))
        return loss

    def _distilled(self, logits: Tensor, z: Tensor, y: Tensor, rows: int) -> Tensor:
        """The last two lines, from logits, unit features and labels of all views of a batch of so many rows."""
        views, at = len(y) // rows, torch.arange(len(self._drawn["id"]), device=y.device) + self._own
        mine, loss = torch.cat([at + view * rows for view in range(views)]), logits.new_zeros(())
        if self.alpha:
            stored = F.pad(self._drawn["logits"], (0, logits.shape[1] - self._drawn["logits"].shape[1])).repeat(
                views, 1
            )
            there = y < self._drawn["width"].repeat(views)[:, None]
            square = (logits[mine][:, y] - stored[:, y]).square()
            loss = loss + self.alpha * (square * there).sum() / there.sum().clamp(min=1)
        if self.beta and len(mine) > 1:
            then = neighbours(unit(self._drawn["features"].repeat(views, 1)), self.temperature)
            loss = loss + self.beta * soft_cross_entropy(neighbours(z[mine], self.temperature), then.softmax(1)).mean()
        return loss

    def after(self, u: Update, batch: Batch) -> None:
        if u.epoch >= u.sweep:
            return
        own = batch["origin"] == 0
        logits, features = (found[: len(own)] for found in self._out)
        rows = {name: column[own] for name, column in {**batch, **self._computed(logits, features)}.items()}
        old = self.buffer.columns.get("logits")
        if old is not None and old.shape[1] < logits.shape[1]:  # the head has grown
            self.buffer.replace("logits", F.pad(old, (0, logits.shape[1] - old.shape[1])))
        self.buffer.add({k: c for k, c in rows.items() if k not in ("origin", "weight")}, u.rng("hpcr-buffer"))

    def _computed(self, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """What is stored beside an example."""
        found: dict[str, Tensor] = {}
        if self.holistic and self.alpha:
            width = torch.full((len(logits),), logits.shape[1], device=logits.device)
            found |= {"logits": logits.float(), "width": width}
        if self.holistic and self.beta:
            found["features"] = features.float()
        return found

    def forgot(self, u: Update, ids: Ids) -> None:
        if not self.derived():
            return
        made = []
        with u.aside():
            for x in self.buffer.columns["x"].split(256):
                out = u.problem.forward(u.model, {"x": x.to(u.device)}, head(u.model))
                assert out.features is not None
                made.append(self._computed(out.logits, out.features))
        for name in made[0]:
            self.buffer.replace(name, torch.cat([found[name] for found in made]))
