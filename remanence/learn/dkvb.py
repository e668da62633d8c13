"""Frozen keys, trainable values: a sample moves only the values that it fetches, so what others fetch stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.core.rng import generator, seed_of
from remanence.data import Examples
from remanence.learn.base import widened
from remanence.learn.frozen import check_alone, check_labels, featured
from remanence.nn.anatomy import features
from remanence.nn.statistics import Statistic
from remanence.train.roles import Learner
from remanence.train.update import Consumed, Context, Update


@dataclass
class DKVB(Learner):
    """Random projections of the frozen features fetch, from each codebook, the value of the nearest key; the fetched values vote.

        q_c = R_c f(x)        j_c = argmin_j |q_c - K_cj|        logits(x) = mean_c V_c[j_c]
        keys K: moving means of the queries nearest to them, over the first event's rows, whose labels are not read; then frozen
        values V: from 0, by cross-entropy with smoothed labels and plain SGD, which moves the fetched rows only

    f is the head's input in eval mode, never trained. R (key_dim, D) of each codebook is drawn once per life. An example changes the
    answers to those that share a key with it, and to no others in any bit. After a forget keys and values are
    made again from what is retained, event by event.

    Pick it for streams on a pretrained network, one class after the other and without borders, where a linear head trained the same
    way forgets. Its first event should be like what will come: keys far from later data are shared by all of it (digits, class by
    class: 0.95 after 20 rows of each class came first, 0.82 to 0.88 after five classes, 0.50 to 0.66 after one). Needs: labels, a
    backbone that no event trains; training settings of the event give epochs, batch size and schedule, the learning rate is a knob.
    Reference: Trauble et al. 2023, "Discrete Key-Value Bottleneck", arXiv 2207.11240. Deviations: keys come from the first event in
    place of a data set of their own; one value per book is fetched, and every key may be; a key is dead, and placed anew on a random
    query, where fewer queries than `dead` times its even share come to it (the threshold's scale is ours).
    """

    moves_weights: ClassVar[bool] = False

    codebooks: int = knob(256, "codebooks, each with a random projection of its own", low=1)
    pairs: int = knob(4096, "keys, and values, of each codebook", low=1)
    key_dim: int = knob(14, "numbers in a key", low=1)
    lr: float = knob(0.3, "learning rate of the values", low=0)
    smoothing: float = knob(0.1, "share of the target that is spread over all classes", low=0, high=1)
    clip: float | None = knob(1.0, "largest norm of the values' gradient; it ties the rows of a batch together", low=0)
    passes: int = knob(10, "passes over the first event that place the keys", low=0)
    decay: float = knob(0.95, "of the keys' moving means", low=0, high=1)
    dead: float = knob(0.1, "share of the even share below which a key is placed anew", low=0)

    def setup(self) -> None:
        #: Keys (codebooks, pairs, key_dim) and values (codebooks, pairs, columns).
        self.memory = Statistic()
        #: The address of R, and how the last event trained.
        self.draw, self.settings = 0, dict[str, Any]()

    def structure(self, u: Update) -> dict[str, Any]:
        return {}

    def begin(self, u: Update) -> None:
        check_labels(u, self.slug)
        check_alone(u, self.slug)

    def learn(self, u: Update) -> None:
        self.draw = seed_of(u.seed, "dkvb")
        self.settings = {name: getattr(u.settings, name) for name in ("epochs", "batch_size", "schedule")}
        task = u.data("task")
        self._take_in(u, task)
        u.consumed = Consumed(task.ids)

    def predict(self, c: Context, batch: Batch) -> Out:
        if self.memory.value is None:
            return Out(torch.zeros(len(batch["x"]), c.columns, device=batch["x"].device))
        values = self._held("values").to(batch["x"].device)
        return Out(widened(_voted(values, self._codes(features(c.model, batch["x"]))), c.columns))

    def derived(self) -> bool:
        """Keys and values hold what the network held that gave the features, beside the rows that made them."""
        return self.memory.value is not None

    def forgot(self, u: Update, ids: Ids) -> None:
        self.memory = Statistic()
        for examples in u.history():
            if len(examples):
                self._take_in(u, examples)

    def _held(self, name: str) -> Tensor:
        assert isinstance(self.memory.value, dict)
        found: Tensor = self.memory.value[name]
        return found

    def _take_in(self, u: Update, examples: Examples) -> None:
        rows = featured(u, examples)
        if self.memory.value is None:
            keys = self._placed(u, self._queries(rows["x"]))
            self.memory = Statistic({"keys": keys, "values": keys.new_zeros(self.codebooks, self.pairs, 0)})
        values = self._held("values")
        lacking = values.new_zeros(self.codebooks, self.pairs, u.columns - values.shape[2])
        table = _Values(torch.cat([values, lacking], 2))
        data = Examples({"codes": self._codes(rows["x"]), "y": rows["y"]}, examples.source, examples.id)

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(module(batch["codes"]), batch["y"], label_smoothing=self.smoothing)

        u.fit(table, data, loss, **self.settings, optimizer="sgd", lr=self.lr, clip=self.clip)
        held = {"keys": self._held("keys"), "values": table.values.detach()}
        self.memory = Statistic(held, self.memory.ids | examples.ids)
        u.extra_bytes = max(u.extra_bytes, 2 * table.values.nbytes)  # the table beside the old one, and its gradient

    def _queries(self, z: Tensor) -> Tensor:
        """(codebooks, N, key_dim) of features (N, D)."""
        address = (self.draw, z.shape[1])
        layer = vars(self).get("_layer")
        if layer is None or layer[0] != address:
            drawn = torch.randn(self.codebooks, z.shape[1], self.key_dim, generator=generator(*address))
            layer = self._layer = (address, drawn / z.shape[1] ** 0.5)
        projections: Tensor = layer[1].to(z.device)
        return z.to(torch.float32) @ projections

    def _codes(self, z: Tensor) -> Tensor:
        """(N, codebooks) the nearest key of each book."""
        keys = self._held("keys").to(z.device)
        return torch.stack([_nearest(q, k) for q, k in zip(self._queries(z), keys, strict=True)], 1)

    def _placed(self, u: Update, queries: Tensor) -> Tensor:
        """Keys by moving means over random batches of the queries (codebooks, N, key_dim)."""
        books, count, _ = queries.shape
        size, rng = min(256, count), u.rng("dkvb")

        def picked(rows: Tensor, n: int) -> Tensor:
            return rows[torch.randint(len(rows), (n,), generator=rng).to(rows.device)]

        start = torch.randperm(count, generator=rng)[: self.pairs].to(queries.device)
        extra = [picked(start, self.pairs - len(start))] if len(start) < self.pairs else []
        keys = queries[:, torch.cat([start, *extra])].clone()
        even = size / self.pairs  # the queries of a batch that come to a key where all are used alike
        mass = keys.new_full((books, self.pairs), even)
        total = keys * even
        for _ in range(self.passes):
            for rows in torch.randperm(count, generator=rng).to(queries.device).split(size):
                for book in range(books):
                    q = queries[book, rows]
                    hot = F.one_hot(_nearest(q, keys[book]), self.pairs).to(q)
                    mass[book].mul_(self.decay).add_((1 - self.decay) * hot.sum(0))
                    total[book].mul_(self.decay).add_((1 - self.decay) * (hot.T @ q))
                    dead = mass[book] < self.dead * even
                    anew = picked(q, self.pairs)[dead]
                    mass[book, dead], total[book, dead] = even, even * anew
                    smooth = (mass[book] + 1e-5) / (mass[book].sum() + self.pairs * 1e-5) * mass[book].sum()
                    keys[book] = total[book] / smooth[:, None]
        return keys


class _Values(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, codes: Tensor) -> Tensor:
        return _voted(self.values, codes)


def _voted(values: Tensor, codes: Tensor) -> Tensor:
    """(N, columns) the mean over the books of the values (books, pairs, columns) at codes (N, books)."""
    return values[torch.arange(values.shape[0], device=codes.device), codes].mean(1)


def _nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """(N,) the nearest of keys (J, d) to queries (N, d), the same in whatever batch a query comes."""
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
