"""Write only where the inputs of what is known already have no energy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples
from remanence.nn.adapters import LowRank, add_low_rank, linear_names, restart_beside
from remanence.nn.anatomy import head_name, norm_modules
from remanence.nn.subspace import layer_inputs
from remanence.train.roles import Where
from remanence.train.update import Update


@dataclass
class KORE(Where):
    """Low-rank changes that begin in the directions which old inputs use least, with the reading half frozen, so that old inputs
    hardly see them.

        X (in, tokens): what the layer sees of `samples` old examples        P = U U', U the `rank` singular vectors of X with the least values
        W P = U* S* V*',  B = U* sqrt(S*),  A = sqrt(S*) V*'        y = (W - B A) x + b + B A x;  B is trained, A is not

    At the event's start y is what it was. As A X is about 0, so is what any B does to an old input. `rank` is the size of the space that
    may be written to: the larger, the more is learned, and the more of it is in use already. Each event counts everything that the life
    learned before it as old: it adds the last event's change into W and begins anew. Old examples are drawn evenly from the events,
    without what was forgotten, and looked at without padding. In the life's first event nothing is old, and this part does nothing:
    all weights learn. What a pretrained model knows becomes old by a first event of examples of it with ``epochs=0``. Of the head only the
    rows of new classes learn, so that the scores of old classes stay, too; a language model's does not learn, and neither do biases,
    embeddings or norms, running statistics included. In a forget run the adapters' B moves, and nothing else.

    Pick it to inject new facts into a model that is not to lose others, where old examples may be looked at, but not trained on.
    Needs: borders; linear layers with more inputs than `rank`; some earlier data at hand.
    Reference: "KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented Augmentations and Constraints",
    arXiv 2510.19316. Deviations: U comes from X itself by a singular value decomposition in float64, not from X X', which has the
    same vectors at half the digits; there it is done once. The paper's other half, which rewrites every fact into dialogues and tasks
    (and brings most of its gain in what is learned), is a matter of the data and not here; `remanence.measure.hars` has its figure.
    """

    rank: int = knob(235, "size of the space that may be written to, in every layer", low=1)
    samples: int = knob(256, "old examples that are looked at", low=1)
    targets: str | list[str] = knob(
        "all-linear", "ends of the names of the linear layers to adapt; all-linear: all but the head"
    )

    def structure(self, u: Update) -> dict[str, Any]:
        if not _old(u) or any(isinstance(module, LowRank) for module in u.model.modules()):
            return {}
        names = linear_names(u.model, self.targets, "kore")
        for name in names:
            inputs = u.model.get_submodule(name).in_features
            if self.rank >= inputs:  # type: ignore[operator]
                raise BadInput(f"kore: {name} has {inputs} inputs; with rank={self.rank} nothing would be protected")
        return {"names": names, "rank": self.rank, "seed": u.seed_of("kore")}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        rank = int(structure["rank"])
        return add_low_rank(model, list(structure["names"]), rank, float(rank), int(structure["seed"]))

    def begin(self, u: Update) -> None:
        old = _old(u)
        self._protects = bool(old)
        self._norms = list(norm_modules(u.model).values())
        if not old:
            return
        layers = {f"{name}.base": m for name, m in u.model.named_modules() if isinstance(m, LowRank)}
        batches = self._drawn(u, old)
        with u.aside():
            inputs = layer_inputs(u.model, lambda batch: u.problem.forward(u.model, batch), batches, layers)
        for name, layer in layers.items():
            restart_beside(layer, inputs[name])

    def trainable(self, u: Update) -> list[str]:
        changes = [f"{name}.up" for name, module in u.model.named_modules() if isinstance(module, LowRank)]
        if changes:
            return changes + list(self._head(u))
        if u.kind == "learn":  # the first event
            return list(u.parameters)
        raise BadInput("kore: this model has no adapters; learn with where=kore before, or leave it out here")

    def mask(self, u: Update) -> dict[str, Tensor]:
        return self._head(u) if self._protects else {}

    def prepare(self, u: Update, batch: Batch) -> Batch:
        if self._protects:
            for module in self._norms:
                module.eval()
        return batch

    def _head(self, u: Update) -> dict[str, Tensor]:
        """The head's entries that may move: rows of new classes."""
        if u.kind != "learn" or not len(u.classes.new):
            return {}
        masks = {}
        for name, p in u.parameters.items():
            if name.rpartition(".")[0] == head_name(u.model):
                masks[name] = torch.zeros_like(p, dtype=torch.bool)
                masks[name][u.classes.new] = True
        return masks

    def _drawn(self, u: Update, old: list[Examples]) -> Iterator[Batch]:
        """As many of each earlier event, in batches of rows that are equally long."""
        for number, examples in enumerate(old):
            count = self.samples * (number + 1) // len(old) - self.samples * number // len(old)
            drawn = examples.select(torch.randperm(len(examples), generator=u.rng("kore"))[:count].sort().values)
            mask = drawn.columns.get("attention_mask")
            length = mask.sum(1) if isinstance(mask, Tensor) else torch.zeros(len(drawn))
            for same in length.unique():
                yield from u.batches(drawn.select((length == same).nonzero()[:, 0]), 64)


def _old(u: Update) -> list[Examples]:
    """The examples of the events before this one."""
    return [examples for examples in u.history()[:-1] if len(examples)] if u.kind == "learn" else []
