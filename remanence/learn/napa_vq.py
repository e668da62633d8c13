"""One coding vector per class, a graph of classes that are confused, and old classes imitated between neighbouring means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.data.transformed import side_of
from remanence.learn.frozen import check_labels
from remanence.nn.anatomy import evaluating, features, head
from remanence.nn.statistics import ClassStatistics
from remanence.train.roles import Learner
from remanence.train.update import Update

#: Temperature of the distances, the spread of the neighbours' weights, and the weights of the two terms for old classes.
TEMPERATURE, SPREAD, PROTOTYPES, DISTILL = 0.1, 0.001, 10.0, 10.0


@dataclass
class NAPAVQ(Learner):
    """Classes are told by the nearest coding vector; a Neural-Gas graph says which are neighbours, and keeps these apart.

        L = dce(h, y) + margin(h, y)    and after the first event    + 10 dce(p, c) + margin(p, c) + 10 |f(X) - f0(X)|_F
        dce = CE(-|h - m_j| / 0.1, y)    margin = max(0, |h - m_y|^2 - sum_j w_j |h - m_j|^2)    w ~ exp(-0.001 |h - m_j|^2), fixed
        p = g mu_c + (1 - g) mu_n    c an old class, n a neighbour of c in the graph, g uniform in (1/2, 1)

    h = f(x) is the head's input, m the coding vectors, mu the mean feature of each class, j the neighbours of y, f0 the network
    of the event's start. With ``rotate`` every image is four, turned by 90 degrees each, of four classes; the answer looks at unturned
    ones. Graph: the `neighbours` vectors nearest to h are joined to the nearest one; its other edges shrink by `decay`, and go when
    below decay^10. Old coding vectors do not move. The head's rows become m / |m| at the end of the event, so that the network answers
    with the nearest vector after both were normalised. After a forget means are counted afresh, and become the coding vectors.

    Pick it where no old example may be kept, and the first event is large. Needs: labels, borders; for ``rotate`` square images, also
    as rows. Keepers that look at logits see the head, which the event does not train. Reference: Malepathirana et al. 2023, "NAPA-VQ:
    Neighborhood Aware Prototype Augmentation with Vector Quantization for Continual Learning", ICCV 2023. Deviations: the
    network trains as the life's settings say (there Adam with steps); the rate of coding vectors has no steps; all rows count in
    the means, where the code drops the last partial batch.
    """

    neighbours: int = knob(15, "coding vectors that a sample joins to the nearest one", low=1)
    decay: float = knob(0.9, "of an edge, for every win without it", low=1e-9, high=1)
    code_lr: float = knob(5.0, "rate of the coding vectors, by plain SGD; a tenth of it after the first event", low=0)
    old: float = knob(1.0, "weight of both terms for old classes; 0: neither", low=0)
    rotate: bool = knob(True, "learn four rotations of every image as classes of their own")

    def setup(self) -> None:
        self.statistics = ClassStatistics()  # its labels: turns * column + turn
        self.codes, self.edges = torch.zeros(0, 0), torch.zeros(0, 0)

    @property
    def turns(self) -> int:
        return 4 if self.rotate else 1

    def begin(self, u: Update) -> None:
        check_labels(u, "napa-vq")
        layer, count = head(u.model), self.turns * u.columns
        assert isinstance(layer, nn.Linear)
        start, device = len(self.codes), layer.weight.device
        fresh = torch.randn(count - start, layer.in_features, generator=generator(u.seed_of("napa-vq"))).to(device)
        self.codes = torch.cat([self.codes.to(device).reshape(start, layer.in_features), fresh]).requires_grad_()
        edges = torch.eye(count, device=device)
        edges[:start, :start] = self.edges
        self.edges = edges
        task = u.data("task")
        self._new = self._rows(task["y"].unique().to(device))
        self._old = torch.tensor(sorted(set(self.statistics.labels) - set(self._new.tolist())), dtype=torch.int64)
        self._alive = torch.zeros(count, dtype=torch.bool, device=device)
        self._alive[torch.cat([self._new, self._old.to(device)])] = True
        self._means = torch.zeros_like(self.codes)
        if len(self._old) and self.old:
            self._reference = u.reference()
            means = ClassStatistics()
            self._count(u, task, means)
            self._means[means.labels] = means.means().to(fresh)
            self._means[self._old] = self.statistics.means(self._old.tolist()).to(fresh)
            u.extra_bytes += self._means.nbytes

    def parameters(self, u: Update) -> list[dict[str, Any]]:
        rate = self.code_lr if not len(self._old) else 0.1 * self.code_lr
        return [{"params": [self.codes], "lr": rate, "optimizer": "sgd", "name": "codes"}]

    def learn(self, u: Update) -> None:
        u.run()
        self.codes = self.codes.detach()
        for label in self._new.tolist():
            self.statistics.drop(label)
        self._count(u, u.data("task"), self.statistics)
        layer = head(u.model)
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            upright = self._alive[:: self.turns]
            layer.weight.copy_(F.normalize(self.codes[:: self.turns], dim=1) * upright[:, None])
            if layer.bias is not None:
                layer.bias.copy_(torch.where(upright, 0.0, -1e3))

    def objective(self, u: Update, batch: Batch) -> Tensor:
        x, y = self._turned(batch)
        z = features(u.model, x)
        squares = self._squares(z)
        self._join(squares.detach())
        loss = self._dce(squares, y) + self._margin(squares, y)
        if len(self._old) and self.old:
            with torch.no_grad():
                before = features(self._reference, x)
            p, c = self._between(u, len(batch["id"]))
            near = self._squares(p)
            moved = ((z - before).square().sum() + 1e-12).sqrt()
            loss = loss + self._margin(near, c) + self.old * (PROTOTYPES * self._dce(near, c) + DISTILL * moved)
        return loss

    def gradient(self, u: Update) -> None:
        if self.codes.grad is not None:
            new = torch.zeros(len(self.codes), 1, device=self.codes.device)
            new[self._new] = 1
            self.codes.grad *= new

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "codes": self.codes.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        codes = self.codes
        super().load_state_dict(state)
        if codes.requires_grad and codes.shape == self.codes.shape:  # inside an event the optimizer holds them
            self.codes = codes
            self.codes.data.copy_(state["codes"])

    def forgot(self, u: Update, ids: Ids) -> None:
        self.statistics = ClassStatistics()
        for examples in u.history() if len(self.codes) else ():
            if len(examples):
                self._count(u, examples, self.statistics)
        if not len(self.codes):
            return
        labels, start = self.statistics.labels, len(self.edges)
        made = self.codes.new_zeros(self.turns * u.columns, self.codes.shape[1])
        made[labels] = self.statistics.means().to(made)
        edges = torch.eye(len(made), device=made.device)
        edges[:start, :start] = self.edges
        gone = torch.ones(len(made), dtype=torch.bool, device=made.device)
        gone[labels] = False
        self.codes, self.edges = made, edges.masked_fill(gone[:, None] | gone, 0)

    def _rows(self, columns: Tensor) -> Tensor:
        """The coding vectors of head columns, all turns."""
        return (self.turns * columns[:, None] + torch.arange(self.turns, device=columns.device)).flatten()

    def _turned(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every row in all turns, and its coding vector's number."""
        x, y = batch["x"], batch["y"]
        if not self.rotate:
            return x, y
        side = side_of(x)
        pictures = x.reshape(len(x), side, side) if side else x
        if pictures.shape[-1] != pictures.shape[-2]:
            raise BadInput(f"napa-vq turns square images, not {tuple(x.shape[1:])}; pass rotate=False")
        turned = [torch.rot90(pictures, k, (-2, -1)).reshape(x.shape) for k in range(4)]
        return torch.cat(turned), torch.cat([4 * y + k for k in range(4)])

    def _count(self, u: Update, examples: Examples, into: ClassStatistics) -> None:
        with evaluating(u.model):
            for batch in u.batches(examples, 64):
                x, y = self._turned(batch)
                into.add(features(u.model, x), y, batch["id"].repeat(self.turns))

    def _squares(self, z: Tensor) -> Tensor:
        """(B, rows) squared distances to the coding vectors."""
        return (z[:, None] - self.codes).square().sum(2)

    def _dce(self, squares: Tensor, y: Tensor) -> Tensor:
        distances = (squares + 1e-12).sqrt().masked_fill(~self._alive, torch.inf)
        return F.cross_entropy(-distances / TEMPERATURE, y)

    def _margin(self, squares: Tensor, y: Tensor) -> Tensor:
        beside = (self.edges[y] > 0) & self._alive
        beside[torch.arange(len(y)), y] = False
        near = (-SPREAD * squares.detach()).masked_fill(~beside, -torch.inf)
        some = beside.any(1)
        weight = torch.where(some[:, None], near, 0.0).softmax(1)
        short = squares[torch.arange(len(y)), y] - (weight * squares).sum(1)
        return (short.clamp(min=0) * some).mean()

    def _join(self, squares: Tensor) -> None:
        """Neural gas: edges of the winners to what is near them are made, their others shrink."""
        near = squares.masked_fill(~self._alive, torch.inf)
        count = min(self.neighbours, int(len(self._new) + len(self._old)))
        listed = torch.zeros_like(near).scatter(1, near.topk(count, 1, largest=False).indices, 1.0)
        won = F.one_hot(near.argmin(1), near.shape[1]).to(near)
        wins, hits = won.sum(0), won.T @ listed
        edges = torch.maximum(self.edges, (hits > 0).to(near)) * self.decay ** (wins[:, None] - hits).clamp(min=0)
        edges = edges.masked_fill(edges < self.decay**10, 0)
        self.edges = (edges + edges.T) / 2

    def _between(self, u: Update, count: int) -> tuple[Tensor, Tensor]:
        """Pseudo-features (count, D) of old unturned classes, and their coding vectors' numbers."""
        rng = u.rng("napa-vq")
        upright = self._old[self._old % self.turns == 0].to(self.codes.device)
        c = upright[torch.randint(len(upright), (count,), generator=rng).to(upright.device)]
        beside = ((self.edges[c] > 0) & self._alive).to(torch.float64)
        beside[torch.arange(count), c] = 1
        n = (beside.cumsum(1) > (torch.rand(count, 1, generator=rng).to(c.device) * beside.sum(1, keepdim=True))).int()
        g = 0.5 + 0.5 * torch.rand(count, 1, generator=rng).to(self._means)
        return g * self._means[c] + (1 - g) * self._means[n.argmax(1)], c
