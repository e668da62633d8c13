"""Write into low-rank experts, of which one half is held to one kind of data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch, CausalLM
from remanence.nn.adapters import linear_names
from remanence.nn.experts import LowRankExperts, add_experts, localized_balance, routing, row_shares
from remanence.train.roles import Where
from remanence.train.update import Update
from remanence.where.base import head_parameters


@dataclass
class LoRAMoE(Where):
    """Frozen weights plus a mixture of low-rank experts behind a dense router, which a balance loss splits into two halves.

        y = W x + b + (alpha / rank) sum_i w_i B_i A_i dropout(x)        w = softmax(G x) over the N experts, per token
        L + balance * sum over layers of var(Z) / mean(Z)^2             Z_bi = I_bi Q_bi,  Q_bi: mean of w_i over row b's tokens
        I_bi = 1 - delta where expert i is of row b's half, else 1 + delta

    The loss is least where a row spends (1 + delta) / 2 of its shares on its own half. `group` names the column that says which: 0,
    the first N/2 experts, or 1, the others, so that, say, questions about world knowledge and the new task lean on different experts.
    Without a column there is no balance loss; with delta = 0 it asks for equal shares. Attached once, at the first event that has it;
    later events train the same experts. Until B moves, every output is the same number as before. The shares hang on the input, so
    the change cannot be merged into W.

    Pick it where one large set of mixed data is to be learned and what the model knew is to stay in use. Needs: linear layers;
    for the balance a column that tells two kinds of rows apart, and rows of both kinds in the data. N = 1 is LoRA.
    Reference: Dou et al. 2024, "LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in Language Model
    Alignment", arXiv 2312.09979, and its official code, whose type 0 and 1 are ours. There, as here, the factor 1 + delta makes
    shares smaller, for it is Z that is made equal. Deviations: Q is a mean over a row's tokens
    without padding (the code sums over all places, padding too, and longer rows would weigh more); the experts of a layer share one
    dropout mask; delta and balance are the paper's as recalled, the released script has 0 for both; 6 experts as in the paper, where
    the script has 8. The balance is not for packed rows. In a forget run the experts and the router are trained without it.
    """

    experts: int = knob(6, "N, experts of every layer; even where there is a balance", low=1)
    rank: int = knob(4, "rank of every expert", low=1)
    alpha: float = knob(32.0, "scale of the change, divided by the rank", low=0)
    dropout: float = knob(0.05, "dropout on the experts' inputs", low=0, high=0.99)
    targets: str | list[str] = knob(
        ["gate_proj", "up_proj", "down_proj"],
        "ends of the names of the linear layers to adapt; all-linear: all but the head",
    )
    group: str | None = knob(
        None, "column of 0 and 1: the half of the experts that a row leans on; null: no balance loss"
    )
    delta: float = knob(0.1, "how far the halves are to differ", low=0, high=1)
    balance: float = knob(0.1, "weight of the balance loss", low=0)

    def structure(self, u: Update) -> dict[str, Any]:
        if any(isinstance(module, LowRankExperts) for module in u.model.modules()):
            return {}
        names = linear_names(u.model, self.targets, "loramoe")
        shape = {"experts": self.experts, "rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        return {"names": names, **shape, "seed": u.seed_of("loramoe")}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        return add_experts(model, **structure)

    def begin(self, u: Update) -> None:
        self._shares: dict[str, Tensor] | None = None
        if self.group is None or not self.balance or u.kind != "learn":
            return
        column = u.data("task").columns.get(self.group)
        if not isinstance(column, Tensor) or not bool(((column == 0) | (column == 1)).all()):
            raise BadInput(f"loramoe: group={self.group!r} must be a column of 0 and 1 in {u.data('task').source}")
        first = next(module for module in u.model.modules() if isinstance(module, LowRankExperts))
        if len(first.router.weight) % 2:
            raise BadInput("loramoe: two halves need an even number of experts")
        if isinstance(u.problem, CausalLM) and u.problem.packing:
            raise BadInput("loramoe: the balance is counted row by row; take packing out, or group")
        if u.settings.compile:
            u.ask_features()  # a compiled forward calls no hooks
        self._shares = u.enter(routing(u.model))

    def trainable(self, u: Update) -> list[str]:
        experts = [
            f"{at}.{name}"
            for at, m in u.model.named_modules()
            if isinstance(m, LowRankExperts)
            for name in ("down", "up", "router.weight")
        ]
        if not experts:  # a forget run attaches nothing
            raise BadInput("loramoe: this model has no experts; learn with where=loramoe before, or leave it out here")
        return experts + head_parameters(u)

    def prepare(self, u: Update, batch: Batch) -> Batch:
        self._clear()
        return batch

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if self._shares is None or self.group is None:
            return None
        if self.group not in batch:
            raise BadInput(f"loramoe: rows that were added to the batch have no column {self.group!r}")
        if any(len(shares) != len(batch["id"]) for shares in self._shares.values()) or not self._shares:
            self._clear()  # the learner looked at something else first
            u.fresh_out()
            u.out(batch)
        mask = batch.get("attention_mask")
        terms = [
            localized_balance(row_shares(shares, mask), batch[self.group], self.delta)
            for shares in self._shares.values()
        ]
        return self.balance * torch.stack(terms).sum()

    def gradient(self, u: Update) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._shares is not None:
            self._shares.clear()
