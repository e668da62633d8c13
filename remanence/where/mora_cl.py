"""Write into new ranks at every event; each input picks, among all ranks, those that answer to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.rng import generator
from remanence.nn.adapters import linear_names
from remanence.nn.anatomy import replace_module
from remanence.nn.experts import MixtureOfRanks
from remanence.train.roles import Where
from remanence.train.update import Update
from remanence.where.base import head_parameters


@dataclass
class MoRA(Where):
    """A growing mixture of ranks: every event adds some and freezes those before; their keys say which of them an input uses.

        y = W x + b + sum_i w_i B_i (A_i x)        i over the ranks of all events
        s_i = A_i x / sqrt(sum_j (A_j x)^2),  w = softmax(s / tau),  w_i = 0 but for the k largest s_i
        outside training, where `threshold` is given: w_i = 0 where s_i < threshold

    There is no router: a rank's key A_i (drawn uniformly in +-1/sqrt(in), then trained) is its own gate, and the sign counts. Old ranks
    keep their bits, and an old input that finds no new key closer than its own gets its old answer but for the softmax and the norm,
    which run over all ranks. The head stays trainable and may grow, but for a language model's. In a forget run no rank is added
    and all of them may move.

    Pick it for a stream of tasks on a large model, where no old data may be kept and ranks of earlier tasks may help later ones.
    Needs: borders; linear layers. It grows by `rank` ranks in every layer and event, and cannot be merged into W.
    Reference: "Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning", arXiv 2506.21035, not
    to be confused with the MoRA of arXiv 2405.12130. Reconstructed from descriptions of the paper, without its code: tau, k and the
    threshold are to be tuned. Ours: `reserve`, `renormalise`, and that outside training ranks whose value is still zero are
    left out of norm and softmax, so that adding ranks changes no answer until they are trained.
    """

    rank: int = knob(16, "ranks that an event adds to every layer", low=1)
    k: int = knob(16, "ranks of all events that an input uses, at most", low=1)
    tau: float = knob(0.1, "temperature of the choice; the lower, the fewer ranks matter", low=1e-6)
    threshold: float | None = knob(
        0.0, "ranks with a smaller score are left out when it answers; null: none is", low=-1, high=1
    )  # fmt: skip
    reserve: int = knob(0, "of the k, at least so many of the event's own ranks, in training", low=0)
    renormalise: bool = knob(False, "whether the weights of the ranks that are used add up to 1")
    targets: str | list[str] = knob(
        "all-linear", "ends of the names of the linear layers to adapt; all-linear: all but the head"
    )

    def structure(self, u: Update) -> dict[str, Any]:
        names = list(_mixtures(u.model)) or linear_names(u.model, self.targets, "mora-cl")
        return {"names": names, "rank": self.rank, "seed": u.seed_of("mora-cl")}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        for name in structure["names"]:
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear):
                layer = MixtureOfRanks(layer).train(layer.training)
                model = replace_module(model, name, layer)
            assert isinstance(layer, MixtureOfRanks)
            layer.choose(self.tau, self.k, self.reserve, self.threshold, self.renormalise)
            layer.append(int(structure["rank"]), generator(int(structure["seed"]), "ranks", name))
        return model

    def trainable(self, u: Update) -> list[str]:
        mixtures = _mixtures(u.model)
        if not mixtures:  # a forget run attaches nothing
            raise BadInput("mora-cl: this model has no ranks; learn with where=mora-cl before, or leave it out here")
        ranks = [
            f"{name}.{part}.{block}"
            for name, layer in mixtures.items()
            for block in range(len(layer.down))
            if block == len(layer.down) - 1 or u.kind == "forget"
            for part in ("down", "up")
        ]
        return ranks + head_parameters(u)


def _mixtures(model: nn.Module) -> dict[str, MixtureOfRanks]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfRanks)}
