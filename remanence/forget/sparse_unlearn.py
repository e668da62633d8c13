"""Forget with fewer weights: fine-tune under an l1 penalty, or prune first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request
from remanence.forget.base import RandomLabels
from remanence.nn.anatomy import module_bytes
from remanence.nn.prune import cut, magnitude, prunable, synflow
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update

CAP = 5.0  # nats beyond which ascent pushes an example no further, as in gradient-ascent


@dataclass
class SparseUnlearn(Forgetter):
    """Sparsity-aware unlearning: what has no room is forgotten.

        l1:     L = mean over D_r of loss(f(x), y) + gamma_t * sum_j |theta_j|        gamma_t = gamma * (1 - t / T) in epoch t of T
        prune:  theta <- m * theta, m = 0 for the share `ratio` of weights; from then on only m * theta moves
                finetune:         L = mean over D_r of loss
                gradient-ascent:  finetune, then L = mean over D_r of loss - mean over D_f of min(loss, 5)
                random-label:     finetune, then L = mean over D_r of loss + mean over D_f of loss(f(x), y'), y' != y

    The penalty is over all trainable parameters, biases and norm scales too; without gamma it is catastrophic, step for step. The
    last `free` epochs have no penalty, and T counts the others. Pruned weights are exactly 0 whatever momentum and weight decay
    do; a later event may move them again.

    Pick it as the simplest baseline that goes beyond catastrophic. A class that fine-tuning keeps is gone under a larger gamma, or
    from a pruned network; there synflow costs small networks far less accuracy than magnitude. Of single examples both forget
    little: on small networks most of the confidence that l1 takes from the forget set it takes from all other data, too, so compare
    with held-out examples. Needs: labels, retained data.
    Reference: Jia et al. 2023, "Model Sparsity Can Simplify Machine Unlearning", arXiv 2304.04934. Deviations: there the network is
    pruned when it is made, and trained again on all data before anybody asks; here at the request, and only retained data helps it
    recover. There ascent sees the forget set only and has no bound, and convolutions alone are pruned; here all matrices and
    kernels are, the head's too. Iterative magnitude pruning is left out: it rewinds to early weights, which no life keeps.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 10,
        "batch_size": 256,
        "optimizer": {"sgd": {"momentum": 0.9, "weight_decay": 5e-4}},
        "lr": 0.01,
        "schedule": "constant",
    }

    mode: str = knob("l1", "penalise the weights, or prune first", choices=("l1", "prune"))
    gamma: float = knob(5e-4, "l1: weight of the penalty in the first epoch", low=0)
    free: int = knob(0, "l1: last epochs without penalty", low=0)
    ratio: float = knob(0.95, "prune: share of weights that go", low=0, high=1)
    scores: str = knob("magnitude", "prune: what a weight is worth", choices=("magnitude", "synflow"))
    then: str = knob("finetune", "prune: what follows", choices=("finetune", "gradient-ascent", "random-label"))

    def forget(self, u: Update, request: Request) -> Outcome:
        if not len(u.data("retain")):
            raise BadInput("no retained data can be reached, and without it nothing holds a sparse network together")
        self._stage, self._labels = self.mode, None
        if self.mode == "l1":
            u.run(drive="retain")
            return Outcome()
        if self.then == "random-label":
            self._labels = RandomLabels.of(u, "auto", 1.0)
        kept = self._support(u)
        cut(prunable(u.model), kept)
        u.run(drive="retain", mask=kept)
        self._stage = self.then
        if self.then != "finetune":
            u.run(drive=self._labels.drive if self._labels else "forget", mask=kept)
        left, count = (sum(int(f(m)) for m in kept.values()) for f in (Tensor.sum, Tensor.numel))
        return Outcome(notes=[f"{left} of {count} weights are left"])

    def _support(self, u: Update) -> dict[str, Tensor]:
        if self.scores == "magnitude":
            return magnitude(prunable(u.model), self.ratio)
        u.extra_bytes += 2 * module_bytes(u.model)
        return synflow(u.model, u.data("retain")["x"][:1].to(u.device), self.ratio)

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        if self._labels is not None and self._stage == "random-label":
            return self._labels.objective(u, forget, retain)
        if retain is None:
            return None
        classes = u.classes.seen if u.columns else None
        loss = u.problem.loss(u.out(retain), retain, classes)
        if self._stage == "gradient-ascent" and forget is not None:
            return loss - u.problem.losses(u.out(forget), forget, classes).clamp(max=CAP).mean()
        gamma = self.at(u.epoch, u.settings.epochs) if self._stage == "l1" else 0.0
        return loss + gamma * sum(p.abs().sum() for p in u.parameters.values()) if gamma else loss

    def at(self, epoch: int, epochs: int) -> float:
        """gamma_t."""
        penalised = epochs - self.free
        return self.gamma * (1 - epoch / penalised) if epoch < penalised else 0.0
