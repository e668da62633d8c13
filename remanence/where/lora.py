"""Write into low-rank adapters beside frozen weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.nn.adapters import LowRank, add_low_rank, linear_names
from remanence.nn.anatomy import replace_module
from remanence.train.roles import Where
from remanence.train.update import Update
from remanence.where.base import head_parameters


@dataclass
class LoRA(Where):
    """Frozen weights plus trained low-rank changes; the head stays trainable and may grow, but for a language model's.

        y = W x + b + (alpha / rank) B A x        A (rank, in) uniform in +-1/sqrt(in), B (out, rank) = 0

    Attached once, at the first event that has it; later events train the same adapters. Until B moves, every output is the same
    number as before (only a zero may change its sign).

    Pick it where the model is large and a small change must be stored, shipped or dropped. Needs: linear layers.
    Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. As in the official code, A is
    drawn uniformly (Kaiming with a = sqrt(5)), where the paper says Gaussian. No dropout on the adapters.
    """

    rank: int = knob(8, "rank of every change", low=1)
    alpha: float = knob(16.0, "scale of the change, divided by the rank", low=0)
    targets: str | list[str] = knob(
        "all-linear", "ends of the names of the linear layers to adapt; all-linear: all but the head"
    )

    def structure(self, u: Update) -> dict[str, Any]:
        if any(isinstance(module, LowRank) for module in u.model.modules()):
            return {}
        names = linear_names(u.model, self.targets, "lora")
        return {"names": names, "rank": self.rank, "alpha": self.alpha, "seed": u.seed_of("lora")}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        return add_low_rank(
            model, list(structure["names"]), int(structure["rank"]), float(structure["alpha"]), int(structure["seed"])
        )

    def trainable(self, u: Update) -> list[str]:
        adapters = [
            f"{at}.{name}" for at, m in u.model.named_modules() if isinstance(m, LowRank) for name in ("down", "up")
        ]
        if not adapters:  # a forget run attaches nothing
            raise BadInput("lora: this model has no adapters; learn with where=lora before, or leave it out here")
        return adapters + head_parameters(u)

    def merged(self, model: nn.Module) -> nn.Module:
        """A copy of `model` with every adapter added into its layer: the same function, without adapters."""
        model = copy.deepcopy(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, LowRank):
                model = replace_module(model, name, module.merged())
        return model
