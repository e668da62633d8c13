"""A tiny transformer with unfused matrices, and runs of single wheres without a life."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.problem import Classification
from remanence.data import Examples
from remanence.learn.finetune import Finetune
from remanence.models.small import seeded
from remanence.train.loop import learn
from remanence.train.roles import Method
from remanence.train.settings import Settings
from remanence.train.update import Context, Update


class Block(nn.Module):
    """Pre-norm self-attention and a gated feed-forward, every matrix a module of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        x = x + self.o_proj(F.scaled_dot_product_attention(self.q_proj(z), self.k_proj(z), self.v_proj(z)))
        z = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))


class Transformer(nn.Module):
    """Tokens (B, L) to logits (B, outputs) of the mean of the last states."""

    def __init__(self, tokens: int, layers: int, width: int, outputs: int, length: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Block(width, 2 * width) for _ in range(layers))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place.weight[: x.shape[1]]
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


def transformer(tokens: int = 9, layers: int = 4, width: int = 16, outputs: int = 7, seed: int = 0) -> nn.Module:
    return seeded(seed, lambda: Transformer(tokens, layers, width, outputs))


def update(
    model: nn.Module,
    data: Examples,
    parts: list[Method],
    event: str = "learn/0",
    labels: list[int] | None = None,
    new: list[int] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Update:
    """A learn event on `data`, whose labels are head columns already; all parts' structures are attached."""
    labels = sorted(set(data["y"].tolist())) if labels is None else labels
    u = Update(model=model, problem=Classification(), owner=Finetune(), settings=Settings(**settings), data=lambda _: data,
               parts=parts, labels=labels, new_labels=labels if new is None else new, seed=seed, event=event)  # fmt: skip
    for part in [u.owner, *parts]:
        if hasattr(part, "structure"):
            gained = part.structure(u)
            if gained:
                u.model = part.attach(u.model, gained)
    return u


def trained(model: nn.Module, data: Examples, parts: list[Method], **kw: Any) -> nn.Module:
    """The model after the event; changed in place, but for structures that wrap it."""
    u = update(model, data, parts, **kw)
    learn(u)
    return u.model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the tensors of which any bit changed."""
    return {n for n, v in model.state_dict().items() if not torch.equal(before[n].view(-1).view(torch.int32), v.contiguous().view(-1).view(torch.int32))}  # fmt: skip


def accuracy(model: nn.Module, data: Examples, labels: list[int]) -> float:
    return Context(model, Classification(), Finetune(), labels).evaluate(data)["accuracy"]


def table(kind: str, modulus: int = 7) -> Examples:
    """All pairs (a, b) of a table modulo `modulus`, after a token that names the table; `y` the entry."""
    a, b = (torch.arange(modulus).repeat_interleave(modulus), torch.arange(modulus).repeat(modulus))
    y = {"sum": a + b, "difference": a - b + modulus, "shifted": a + b + 3}[kind] % modulus
    name = modulus + (0 if kind == "sum" else 1)
    return Examples({"x": torch.stack([torch.full_like(a, name), a, b], 1), "y": y}, kind)
