"""Go in one step to where the optimum lies without the request."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.data import Examples, Request
from remanence.nn.influence import (
    conjugate_gradients,
    curvature,
    example_gradients,
    flat,
    sherman_morrison,
    unflat,
    woodfisher,
)
from remanence.nn.saliency import mean_gradient
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class Influence(Forgetter):
    """Influence unlearning: one step of the whole network along the inverse curvature of what is retained. Nothing is trained.

        v = 1/N sum over D_f of grad loss - n_f / (N n_r) sum over D_r of grad loss        N = n_f + n_r examples
        theta <- theta + alpha * (C + damping I)^{-1} v        C: curvature of the mean loss over D_r

    v is the gradient over all data minus the gradient over D_r, so what training left undone is not done here. At an optimum of
    the mean loss + damping / 2 |theta|^2 the step with alpha = 1 is Newton's on the retained objective: for a linear model with
    squared loss it IS retraining. (With the curvature of all data instead it is off by the order of (n_f / N)^2.) A network at
    low loss has almost no curvature, so there the damping decides how far it goes: on digits 0.01 brings single examples near to
    where retraining has them, and a whole class, which is too far for a first-order step, takes 0.001.

    ``cg``: conjugate gradients; each product with C is a pass over D_r. ``sherman-morrison``: exact for the empirical
    Fisher matrix of `samples` retained examples, which must all be kept at once (count: samples x weights). ``woodfisher``: the
    released recursion, a heuristic that does not invert: its step is v plus a multiple of the gradient of ONE retained example;
    it reads neither `damping` nor `curvature`, and so its alpha is of another size.

    Pick it for few examples, and as the yardstick of cheaper influence methods. Needs: labels or targets, retained data.
    References: Koh & Liang 2017, "Understanding Black-box Predictions via Influence Functions", arXiv 1703.04730; v and woodfisher:
    Jia et al. 2023, "Model Sparsity Can Simplify Machine Unlearning", arXiv 2304.04934. Deviations: `cg` and `sherman-morrison` are
    not in the latter's code; it takes examples as they lie, here the samples are drawn, because data lie in the order of tasks.
    """

    trains: ClassVar[bool] = False

    alpha: float = knob(1.0, "length of the step; 1 is Newton's", low=0)
    solver: str = knob("cg", "how H^{-1} v is found", choices=("cg", "sherman-morrison", "woodfisher"))
    damping: float = knob(0.01, "added to the curvature; the weight decay that training used, or more", low=0)
    curvature: str = knob(
        "gauss-newton", "cg: which matrix; the Hessian may not be positive", choices=("gauss-newton", "hessian")
    )
    products: int = knob(50, "cg: passes over D_r at most", low=1)
    tolerance: float = knob(1e-4, "cg: relative residual that is small enough", low=0)
    samples: int = knob(1000, "other solvers: retained examples that make the matrix", low=1)

    def forget(self, u: Update, request: Request) -> Outcome:
        gone, kept = u.data("forget"), u.data("retain")
        if not len(kept):
            raise BadInput(
                "influence needs the curvature of retained data, and none can be reached; use gradient-ascent"
            )
        params, classes = u.parameters, u.classes.seen if u.columns else None
        forget, retain = (
            flat(mean_gradient(u.model, u.problem, u.batches(examples), params, classes)) for examples in (gone, kept)
        )
        v = len(gone) / (len(gone) + len(kept)) * (forget - retain)
        step, note = self._solved(u, kept, v)
        with torch.no_grad():
            for name, change in unflat(self.alpha * step, params).items():
                params[name].add_(change)
        return Outcome(notes=[note])

    def _solved(self, u: Update, kept: Examples, v: Tensor) -> tuple[Tensor, str]:
        params, classes = u.parameters, u.classes.seen if u.columns else None
        if self.solver == "cg":
            u.extra_bytes += 6 * v.nbytes
            product = curvature(
                u.model, u.problem, lambda: u.batches(kept), params, classes, self.curvature, self.damping
            )
            step, left = conjugate_gradients(product, v, self.products, self.tolerance)
            return step, f"conjugate gradients left {left:.1e} of the right side unsolved"
        count = min(self.samples, len(kept))
        u.extra_bytes += (count if self.solver == "sherman-morrison" else 4) * v.nbytes
        drawn = kept.select(torch.randperm(len(kept), generator=u.rng("influence"))[:count])
        gradients = islice(example_gradients(u.model, u.problem, u.batches(drawn), params, classes), count)
        if self.solver == "woodfisher":
            return woodfisher(gradients, v, self.samples), f"the released recursion over {count} examples"
        return sherman_morrison(gradients, v, count, self.damping), f"the Fisher matrix of {count} examples, inverted"
