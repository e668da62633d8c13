"""A small vision transformer that ends in a linear `head`, which may start with no rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.models.shape import image_shape
from remanence.nn.heads import empty_linear


class Tokens(nn.Module):
    """The learned position of every patch, and the class token where there is one."""

    def __init__(self, count: int, width: int, token: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, count + token, width))
        self.token: nn.Parameter | None = nn.Parameter(torch.empty(1, 1, width)) if token else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw anew, from a normal distribution cut off at two deviations of 0.02."""
        for p in self.parameters():
            nn.init.trunc_normal_(p, std=0.02, a=-0.04, b=0.04)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, count, width) to (B, count or 1 + count, width)."""
        if self.token is not None:
            patches = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1)
        return patches + self.position


class Attention(nn.Module):
    """Multi-head self-attention, each of its four maps a linear layer of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        shares = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)  # written out: one kernel has no rule for vmap
        mixed = shares @ v
        return self.o(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.ffn(self.norm2(x)))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Patches of `patch` x `patch` pixels as tokens, `depth` blocks, a norm, the mean of the tokens or the class token, a linear head.

    Takes images (B, C, H, W) or the same as rows (B, C H W). Sides that are no multiples of `patch` are filled up with zeros.
    Dosovitskiy et al. 2021, arXiv 2010.11929; the mean instead of a class token as in Beyer et al. 2022, arXiv 2205.01580.
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        ratio: int,
        outputs: int,
        pool: str,
        dropout: float,
    ) -> None:
        super().__init__()
        if min(patch, width, depth, heads, ratio) < 1 or width % heads:
            raise BadInput(
                f"a vit needs patch, width, depth, heads and ratio of at least 1 and a width that its heads divide, "
                f"not {patch}, {width}, {depth}, {heads}, {ratio}"
            )
        if pool not in ("mean", "token"):
            raise BadInput(f"a vit's pool is 'mean' or 'token', not {pool!r}")
        self.shape, self.pool = image_shape(inputs, "vit"), pool
        depth_of, height, width_of = self.shape
        self._fill = (0, -width_of % patch, 0, -height % patch)
        count = -(-height // patch) * -(-width_of // patch)
        self.patches = nn.Conv2d(depth_of, width, patch, stride=patch)
        self.tokens = Tokens(count, width, pool == "token")
        self.blocks = nn.ModuleList(Block(width, heads, ratio * width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs) if outputs else empty_linear(width, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.reshape(len(x), *self.shape), self._fill)
        x = self.tokens(self.patches(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.pool == "mean" else x[:, 0])  # type: ignore[no-any-return]
