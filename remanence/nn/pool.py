"""A pool of keys from which each input picks its own, and tokens that a frozen transformer reads beside the input's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.nn.anatomy import head_name, replace_module
from remanence.nn.heads import head_inputs


class KeyedPool(nn.Module):
    """Trainable keys (P, d), and how often each was picked. Queries (B, d) pick the keys at the smallest ``1 - cos(q, K_p)``; to use
    all keys alike, at the smallest ``(1 - cos(q, K_p)) * (counts_p + 1)``. Of equals the first is picked."""

    counts: Tensor

    def __init__(self, size: int, width: int, rng: torch.Generator, like: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(like.new_empty(size, width))
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64, device=like.device))
        self.reset_parameters(rng)

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Keys from N(0, 1), nothing picked yet."""
        _draw(self.keys, rng)
        self.counts.zero_()

    def distances(self, queries: Tensor) -> Tensor:
        """(B, P) one minus the cosine, never below 0."""
        return (1 - F.normalize(queries, dim=1) @ F.normalize(self.keys, dim=1).T).clamp(min=0)

    @torch.no_grad()
    def select(self, queries: Tensor, k: int = 1, balanced: bool = False) -> Tensor:
        """(B, k) numbers of the keys picked, nearest first. Rows of one call do not see each other's picks."""
        distances = self.distances(queries)
        if balanced:
            distances = distances * self.mass()
        return distances.sort(dim=1, stable=True).indices[:, :k]

    def mass(self) -> Tensor:
        """(P,) how often each key was picked, plus one."""
        return (self.counts + 1).to(self.keys.dtype)

    @torch.no_grad()
    def count(self, chosen: Tensor) -> None:
        """Note picks (B, k) down."""
        self.counts += chosen.flatten().bincount(minlength=len(self.counts))


class Prompts(nn.Module):
    """Trainable tokens (size, blocks, length, width): each of `size` entries has `length` tokens for each block number in `at`."""

    def __init__(
        self, size: int, at: Sequence[int], length: int, width: int, rng: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        self.at = list(at)
        self.values = nn.Parameter(like.new_empty(size, len(self.at), length, width))
        self.reset_parameters(rng)

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """From N(0, 1)."""
        _draw(self.values, rng)

    def forward(self, chosen: Tensor) -> dict[int, Tensor]:
        """Tokens (B, k * length, width) of the entries `chosen` (B, k), by block number."""
        picked = self.values[chosen]
        return {number: picked[:, :, i].flatten(1, 2) for i, number in enumerate(self.at)}


class Prompted(nn.Module):
    """A network whose transformer blocks read tokens beside the input's: some shared by all inputs, some of the key nearest to it.

        q = body(x)        k = the key of q        answer = head(body(x with tokens shared and e_k))

    `body` is the network without its head, always in eval mode; q has no gradient. While training inside `balancing` keys are used
    alike. The network must end in its linear head.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        shared: tuple[Sequence[int], int],
        own: tuple[Sequence[int], int],
        seed: int,
    ) -> None:
        """`shared` and `own`: the block numbers, and the tokens in each.

        Raises:
            BadInput: no transformer blocks, no linear head, or no block of such a number.
        """
        super().__init__()
        depth, width, name = len(token_blocks(model)), head_inputs(model), head_name(model)
        beyond = sorted({number for number in [*shared[0], *own[0]] if not 0 <= number < depth})
        if beyond:
            raise BadInput(f"prompts are asked for in blocks {beyond}, and the network has blocks 0 to {depth - 1}")
        head, like = model.get_submodule(name), next(model.parameters()).detach()
        assert isinstance(head, nn.Linear)
        self.pool = KeyedPool(size, width, generator(seed, "keys"), like)
        self.shared = Prompts(1, *shared, width, generator(seed, "shared"), like)
        self.own = Prompts(size, *own, width, generator(seed, "own"), like)
        self.body = replace_module(model, name, nn.Identity())
        self.head: nn.Linear = head
        self.balanced = False
        self.train(model.training)

    def train(self, mode: bool = True) -> Prompted:
        super().train(mode)
        self.body.eval()
        return self

    @contextmanager
    def balancing(self) -> Iterator[None]:
        """While training, use all keys alike."""
        self.balanced = True
        try:
            yield
        finally:
            self.balanced = False

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """(B, d) the head's input without prompts."""
        return self.body(x).flatten(1)  # type: ignore[no-any-return]

    def choose(self, queries: Tensor) -> Tensor:
        """(B, 1) the key of each query."""
        return self.pool.select(queries, balanced=self.balanced and self.training)

    def features(self, x: Tensor, chosen: Tensor) -> Tensor:
        """(B, d) the head's input with prompts."""
        tokens = self.own(chosen)
        for number, common in self.shared(torch.zeros_like(chosen[:, :1])).items():
            tokens[number] = torch.cat([common, tokens[number]], 1) if number in tokens else common
        with appended(token_blocks(self.body), tokens):
            return self.body(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x, self.choose(self.query(x))))  # type: ignore[no-any-return]


def token_blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer's blocks: the list of modules called ``blocks`` or ``layers``, else the only one.

    Raises:
        BadInput: there is none, or more than one that it could be.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    called = [module for name, module in lists.items() if name.rpartition(".")[2] in ("blocks", "layers")]
    found = called or list(lists.values())
    if len(found) != 1:
        raise BadInput(
            f"{type(model).__name__} has {len(found)} lists of blocks and prompts need one, a ModuleList called `blocks`: give a "
            "transformer such as models.vit"
        )
    return found[0]


@contextmanager
def appended(blocks: nn.ModuleList, tokens: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, block number n reads the tokens (B, L, d) after its input's (B, T, d), and gives T tokens again.

    Raises:
        BadInput: a block's tokens have another width; said in the forward.
    """
    handles = []
    for number, extra in tokens.items():
        handles.append(blocks[number].register_forward_pre_hook(_adding(extra)))
        handles.append(blocks[number].register_forward_hook(_cutting(extra.shape[1])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(extra: Tensor) -> Callable[..., Any]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        if x.dim() != 3 or x.shape[2] != extra.shape[2]:
            raise BadInput(f"prompts are {extra.shape[2]} wide, and a block reads {tuple(x.shape)}, not (B, T, width)")
        return (torch.cat([x, extra.to(x.dtype)], 1), *inputs[1:])

    return add


def _cutting(count: int) -> Callable[..., Any]:
    def cut(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[:, : output.shape[1] - count]

    return cut


def _draw(p: Tensor, rng: torch.Generator | None) -> None:
    """N(0, 1) into `p`, on whatever device: from `rng`, which is the CPU's, or else from the global generator."""
    p.copy_(torch.randn(p.shape, generator=rng))
