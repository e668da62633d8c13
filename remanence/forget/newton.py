"""One Newton step of the head on what is retained; the features stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Out
from remanence.data import Request
from remanence.nn.anatomy import evaluating, features, head
from remanence.nn.influence import conjugate_gradients
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update

#: Up to so many weights the Hessian is written out and factored; beyond, conjugate gradients.
DENSE = 2048


@dataclass
class Newton(Forgetter):
    """Newton's step on the last layer: its weights go to the minimum of the retained loss, as its curvature there shows it.

        L_r(theta) = mean over D_r of loss(theta f(x), y) + l2 / 2 * |theta|^2        theta: the head, bias included; f frozen
        theta <- theta - H_r^{-1} grad L_r(theta)        H_r = second derivative of L_r at theta

    At the minimum of the same loss over all data the gradients of the forgotten and of the retained cancel, and the step is the
    paper's theta + H_r^{-1} (sum over D_f of grad loss). With squared loss it IS the head retrained on these features; with cross-entropy
    one step nearly is, and more `iterations` converge to it. A step that would raise L_r is halved until it does not. Only rows of classes
    seen move. The notes say how far the gradient of L_r fell: the residual that the paper's certificate bounds.

    A whole class takes several `iterations`: one takes about one nat off its outputs (digits: 91 % of a class left after one, 0 % after
    six). What the features know of the request stays, and a new head could read it again: for random examples of a network
    that was trained on them whole, even the retrained head answers them like data it learned. With features that never saw them (a
    pretrained backbone) it takes away all that was trained. A network trained without weight decay is far from the minimum of L_r;
    the step then goes there first, which moves more than the request.

    Pick it for linear models and heads on a pretrained backbone. Needs: labels or targets, retained data, whose features are kept in float64
    while it runs. Reference: Guo et al. 2020, "Certified Data Removal from Machine Learning Models", arXiv 1911.03030. Deviations: no
    noise is added to the training objective, so nothing is certified; examples go in one step, in the code one by one; all classes at
    once, there one against the rest (as with ``link: sigmoid`` here, whose losses are averaged over classes instead of summed);
    features are not normalised; l2 is 1e-6 in the code, too little for features that are not.
    """

    trains: ClassVar[bool] = False

    l2: float = knob(1e-4, "weight decay of the head in the loss: the one it was trained with, or more", low=0)
    iterations: int = knob(1, "Newton steps; 0: nothing moves", low=0)

    def forget(self, u: Update, request: Request) -> Outcome:
        layer = head(u.model)
        if type(layer) is not nn.Linear:  # a subclass may answer otherwise
            raise BadInput(f"the head is a {type(layer).__name__}; newton needs a linear one")
        if not len(u.data("retain")):
            raise BadInput("newton goes to the minimum of the retained loss, and nothing is retained")
        parts = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
        rows = u.classes.seen if u.columns else torch.arange(layer.out_features, device=u.device)
        theta = torch.cat(parts, dim=1).detach().double()[rows]
        loss = _HeadLoss(u, layer, rows, self.l2)
        u.extra_bytes += loss.phi.nbytes
        sizes = [loss.gradient(theta).norm()]
        for _ in range(self.iterations):
            before, theta = theta, loss.lower(theta, loss.step(theta))
            sizes.append(loss.gradient(theta).norm())
            if torch.equal(before, theta):  # the minimum, to rounding
                break
        with torch.no_grad():
            if self.iterations:
                layer.weight[rows] = theta[:, : layer.in_features].to(layer.weight)
                if layer.bias is not None:
                    layer.bias[rows] = theta[:, -1].to(layer.bias)
        return Outcome(notes=[f"gradient of the retained loss by the head: {sizes[0]:.1e} -> {sizes[-1]:.1e}"])


class _HeadLoss:
    """L_r as a function of theta (C, D): float64, features computed once."""

    def __init__(self, u: Update, layer: nn.Linear, rows: Tensor, l2: float) -> None:
        self.problem, self.rows, self.l2, self.out = u.problem, rows, l2, layer.out_features
        self.classes = u.classes.seen if u.columns else None
        phi, y, weight = [], [], []
        with evaluating(u.model):
            for batch in u.batches(u.data("retain")):
                phi.append(features(u.model, batch["x"]).double())
                y.append(batch["y"])
                weight.append(batch.get("weight", torch.ones(len(batch["id"]), device=u.device)).double())
        self.phi, self.y, share = torch.cat(phi), torch.cat(y), torch.cat(weight)
        if layer.bias is not None:
            self.phi = torch.cat([self.phi, self.phi.new_ones(len(self.phi), 1)], dim=1)
        self.share = share / share.sum()

    def value(self, theta: Tensor) -> Tensor:
        return self._losses(self.phi @ theta.T) + self.l2 / 2 * theta.square().sum()

    def gradient(self, theta: Tensor) -> Tensor:
        return self._slope(self.phi @ theta.T)[0].T @ self.phi + self.l2 * theta

    def step(self, theta: Tensor) -> Tensor:
        """-H^{-1} gradient."""
        slope, bent = self._slope(self.phi @ theta.T)
        down = -(slope.T @ self.phi + self.l2 * theta)
        if theta.numel() > DENSE:
            found, _ = conjugate_gradients(
                lambda v: (bent(self.phi @ v.view_as(theta).T).T @ self.phi).reshape(-1) + self.l2 * v,
                down.reshape(-1), steps=theta.numel(), tolerance=1e-10,
            )  # fmt: skip
            return found.view_as(theta)
        factor, info = torch.linalg.cholesky_ex(self._hessian(theta, bent))
        if int(info):
            raise BadInput(f"the loss of the head has no curvature in some direction with l2={self.l2}; raise l2")
        return torch.cholesky_solve(down.reshape(-1, 1), factor).view_as(theta)

    def lower(self, theta: Tensor, step: Tensor) -> Tensor:
        """theta + step, the step halved until the loss is not higher; theta where only rounding would be left."""
        before = self.value(theta)
        for halvings in range(40):
            moved = theta + step * 0.5**halvings
            if bool(self.value(moved) <= before):
                return moved
        return theta

    def _hessian(self, theta: Tensor, bent: Callable[[Tensor], Tensor]) -> Tensor:
        """(C D, C D): the block of classes c and k is sum_i s_i d2 loss_i / d z_c d z_k phi_i phi_i'."""
        count, dim = theta.shape
        blocks = theta.new_zeros(count, dim, count, dim)
        for k in range(count):
            one = theta.new_zeros(count)
            one[k] = 1
            curve = bent(one.expand(len(self.phi), count))
            for c in range(k + 1):
                blocks[c, :, k] = blocks[k, :, c] = (self.phi * curve[:, c : c + 1]).T @ self.phi
        dense = blocks.view(count * dim, count * dim)
        dense.diagonal().add_(self.l2)
        return dense

    def _losses(self, z: Tensor) -> Tensor:
        """The weighted mean of the problem's losses for outputs z (N, C) in the columns that compete."""
        full = z.new_zeros(len(z), self.out).index_copy(1, self.rows, z)
        return (self.share * self.problem.losses(Out(full), {"y": self.y}, self.classes)).sum()

    def _slope(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The derivative (N, C) of `_losses` by z, and the map from a change of z to the change of that."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._losses(z), z, create_graph=True)

        def bent(change: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(slope, z, change, retain_graph=True)
            return found

        return slope.detach(), bent
