"""Old classes imitated by features of new ones, moved to the old class means: a linear head without a single old example."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.data import Examples
from remanence.learn.frozen import check_alone, check_labels, featured
from remanence.nn.anatomy import features, head, head_name, replace_module
from remanence.nn.statistics import ClassStatistics
from remanence.train.roles import Learner
from remanence.train.update import Consumed, Context, Update


@dataclass
class FeTrIL(Learner):
    """The network stays as its first event left it; the head is fitted anew at each event, to real features of the event's classes
    and to pseudo-features of all others.

        z_p = f(x) - mean_n + mu_p    for all x of class n, the one of the event's classes whose mean is nearest to mu_p
        w_c = argmin 1/2 |w|^2 + C sum_i max(0, 1 - y_ic w.(z_i / |z_i|, 1))^2        y_ic = +-1: one class against all others

    f is the head's input in eval mode; mu_p, the mean of f over class p, is all that is kept of it. The optimum is found to the last
    digits (Newton's method in float64), so neither the order of the rows nor a seed has a say. What the life answers are the scores
    on z / |z|; a method that trains the network itself sees the same head on z. After a forget the means are counted afresh with the
    network as it is then; the head stays as the forgetter left it, and a class without a mean is not imitated in the next event.

    Pick it where old examples may not be kept and the network is pretrained, or the first event is large: stronger than `nmc` for the
    same memory. Where an event brings one single class all others copy its shape, and `nmc` can be better. Needs: labels, borders;
    keepers have nothing to do after the first event. Reference: Petit et al. 2023, "FeTrIL: Feature Translation for
    Exemplar-Free Class-Incremental Learning", arXiv 2211.13131. Deviations: the paper's first event (ResNet-18, cosine head, long
    fine-tuning with AugMix) is the life's own training; the source is always the nearest class, its best choice; scores
    are not probabilities. As in LIBLINEAR, which the paper uses, the intercept is a weight like the others.
    """

    first: str = knob(
        "train", "what the first event does to the network: train it, or leave it as it is", choices=("train", "frozen")
    )
    cost: float = knob(1.0, "C: what an error costs beside |w|^2", low=1e-9)
    normalise: bool = knob(True, "divide every feature by its norm, after it was moved")

    def setup(self) -> None:
        self.statistics = ClassStatistics()

    def begin(self, u: Update) -> None:
        check_labels(u, self.slug)
        self._trains = self.first == "train" and not self.statistics.labels
        if not self._trains:
            check_alone(u, self.slug)

    def learn(self, u: Update) -> None:
        if self._trains:
            u.run()
        task = u.data("task")
        u.consumed = Consumed(task.ids, u.consumed.settle().replayed)
        rows = featured(u, task)
        self.statistics.add(rows["x"], rows["y"], rows.id)
        z, y = self._imitated(rows)
        u.extra_bytes += z.nbytes
        z = F.normalize(z, dim=1) if self.normalise else z
        layer = head(u.model)
        assert isinstance(layer, nn.Linear)
        z = z if layer.bias is None else torch.cat([z, z.new_ones(len(z), 1)], 1)
        with torch.no_grad():
            whole = curvature(z, self.cost)
            for column in range(layer.out_features):
                w = squared_hinge(z, torch.where(y == column, 1.0, -1.0).to(z), self.cost, whole)
                layer.weight[column] = w[: layer.in_features]
                if layer.bias is not None:
                    layer.bias[column] = w[-1]

    def predict(self, c: Context, batch: Batch) -> Out:
        z = features(c.model, batch["x"])
        return Out(head(c.model)(F.normalize(z, dim=1) if self.normalise else z))

    def export(self, model: nn.Module) -> nn.Module:
        if not self.normalise:
            return model
        return replace_module(copy.deepcopy(model), head_name(model), nn.Sequential(_Unit(), head(model)))

    def derived(self) -> bool:
        """The means hold what the network held that gave the features, beside the rows that they count."""
        return bool(self.statistics.labels)

    def forgot(self, u: Update, ids: Ids) -> None:
        self.statistics = ClassStatistics()
        for examples in u.history():
            if len(examples):
                rows = featured(u, examples)
                self.statistics.add(rows["x"], rows["y"], rows.id)

    def _imitated(self, rows: Examples) -> tuple[Tensor, Tensor]:
        """The rows of this event (n, D), and pseudo-features of every class that has none; float64, with head columns (n,)."""
        z, y = rows["x"].to(torch.float64), rows["y"]
        here, found = y.unique(), [(z, y)]
        means = torch.stack([z[y == column].mean(0) for column in here])
        for column in sorted(set(self.statistics.labels) - set(here.tolist())):
            mu = self.statistics.means([column]).to(z)
            source = int(torch.cdist(mu, means).argmin())
            moved = z[y == here[source]] - means[source] + mu
            found.append((moved, y.new_full((len(moved),), column)))
        return torch.cat([z for z, _ in found]), torch.cat([y for _, y in found])


class _Unit(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)


def squared_hinge(z: Tensor, sign: Tensor, cost: float, whole: Tensor | None = None) -> Tensor:
    """The w (D,) with the least ``1/2 |w|^2 + cost sum_i max(0, 1 - sign_i w.z_i)^2``, by Newton's method: the loss is quadratic as
    long as the same rows are inside the margin, so that it ends, after some ten steps, at the optimum itself. `whole`: `curvature` of z,
    which all classes share."""
    w = z.new_zeros(z.shape[1])
    whole = curvature(z, cost) if whole is None else whole

    def at(w: Tensor) -> tuple[float, Tensor]:
        short = (1 - sign * (z @ w)).clamp(min=0)
        return float(0.5 * w @ w + cost * short @ short), short

    value, short = at(w)
    for _ in range(100):
        slope = w - 2 * cost * (z.T @ (sign * short))
        step = _newton_step(z[short > 0], slope, cost, whole)
        share, drop = 1.0, float(slope @ step)
        while (found := at(w - share * step))[0] > value - 1e-4 * share * drop and share > 1e-9:
            share /= 2
        if drop <= 1e-14 * value or share <= 1e-9:
            break
        w, (value, short) = w - share * step, found
    return w


def curvature(z: Tensor, cost: float) -> Tensor:
    """The Cholesky factor (D, D) of ``I + 2 cost z'z``: the loss's second derivative where all rows are inside the margin."""
    found: Tensor = torch.linalg.cholesky(torch.eye(z.shape[1]).to(z) + 2 * cost * z.T @ z)
    return found


def _newton_step(inside: Tensor, slope: Tensor, cost: float, whole: Tensor) -> Tensor:
    """``(I + 2 cost a'a)^-1 slope`` for the rows a inside the margin: in their own space where they are few; else by conjugate gradients
    that `whole` preconditions, which takes some ten products while a good part of all rows is inside."""
    count, width = inside.shape
    step: Tensor
    if count <= width:
        inner = torch.eye(count).to(inside) / (2 * cost) + inside @ inside.T
        step = slope - inside.T @ torch.linalg.solve(inner, inside @ slope)
        return step
    step, left = torch.zeros_like(slope), slope
    near = torch.cholesky_solve(left[:, None], whole)[:, 0]
    along, size = near, left @ near
    for _ in range(200):
        pushed = along + 2 * cost * (inside.T @ (inside @ along))
        share = size / (along @ pushed)
        step, left = step + share * along, left - share * pushed
        if float(left.norm()) <= 1e-12 * float(slope.norm()):
            return step
        near = torch.cholesky_solve(left[:, None], whole)[:, 0]
        last, size = size, left @ near
        along = near + size / last * along
    step = torch.linalg.solve(torch.eye(width).to(inside) + 2 * cost * inside.T @ inside, slope)
    return step
