"""A model of n-grams over tokens: how usual a text is beside those that it was made of."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.core.errors import BadInput


class NGrams:
    """Probabilities of the next token from counts, each length of context falling back on the next shorter one.

        p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h))

    c counts, t(h) is how many different tokens came after h, h' is h without its first token, and below the empty context every token
    is as likely as any other (Witten and Bell 1991, interpolated). A context that never came leaves it to the shorter one. Texts are rows
    of tokens (N, L), padded on the right; the first tokens have as much context as there is.
    """

    def __init__(self, vocab: int, order: int = 3) -> None:
        if vocab < 1 or order < 1:
            raise BadInput(f"vocab={vocab} and order={order} must be at least 1")
        self.vocab, self.order = vocab, order
        #: Of every length: the n-grams that came, as (number of the context) * vocab + token, ascending; and of each its count, of each
        #: context its count and how many tokens came after it.
        self.keys: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.totals: list[Tensor] = []
        self.kinds: list[Tensor] = []

    def fit(self, ids: Tensor, mask: Tensor) -> NGrams:
        """Count the texts `ids` (N, L), whose tokens stand where `mask` (N, L) is True."""
        ids = self._checked(ids, mask)
        self.keys, self.counts, self.totals, self.kinds = [], [], [], []
        context, contexts = torch.where(mask, 0, -1), 1
        for _ in range(self.order):
            key = torch.where(context >= 0, context * self.vocab + ids, -1)
            found, counts = key[key >= 0].unique(return_counts=True)
            of = found // self.vocab
            self.totals.append(torch.zeros(contexts, dtype=torch.int64).index_add_(0, of, counts))
            self.kinds.append(of.bincount(minlength=contexts))
            self.keys.append(found)
            self.counts.append(counts)
            context, contexts = self._next(key, found, mask), len(found)
        return self

    def losses(self, ids: Tensor, mask: Tensor) -> Tensor:
        """-log p (N,) of each text, in nats per token; 0 for one without tokens."""
        ids = self._checked(ids, mask)
        p = torch.full(ids.shape, 1 / self.vocab, dtype=torch.float64)
        context = torch.where(mask, 0, -1)
        for keys, counts, totals, kinds in zip(self.keys, self.counts, self.totals, self.kinds, strict=True):
            known = context >= 0
            key = torch.where(known, context * self.vocab + ids, -1)
            place = _find(keys, key)
            count = torch.where(place >= 0, _at(counts, place), 0)
            total, kind = _at(totals, context), _at(kinds, context)
            p = torch.where(known & (total > 0), (count + kind * p) / (total + kind).clamp(min=1), p)
            context = self._next(key, keys, mask)
        return -(p.log() * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _next(self, key: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """The number of the context that each place has after one token more: that of the n-gram which ends before it."""
        ended = _find(keys, key)
        shifted = torch.full_like(ended, -1)
        shifted[:, 1:] = ended[:, :-1]
        return torch.where(mask, shifted, -1)

    def _checked(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids = torch.where(mask, ids.long().cpu(), 0)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            raise BadInput(f"tokens lie in [{int(ids.min())}, {int(ids.max())}], the vocabulary has {self.vocab}")
        return ids


def _find(keys: Tensor, wanted: Tensor) -> Tensor:
    """The place of each of `wanted` in the ascending `keys`, -1 where there is none."""
    if not len(keys):
        return torch.full_like(wanted, -1)
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == wanted, place, -1)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """``values[places]``, 0 where a place is -1."""
    return torch.where(places >= 0, values[places.clamp(min=0)], 0) if len(values) else torch.zeros_like(places)
