"""N-grams: against dictionaries that are counted by hand, as a distribution, and on texts whose words were shuffled."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.nn.ngrams import NGrams


def texts(count, length, vocab, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (count, length), generator=g)
    ends = torch.randint(0, length + 1, (count,), generator=g)
    return ids, torch.arange(length) < ends[:, None]


class Naive:
    """The same formula over dictionaries."""

    def __init__(self, ids, mask, vocab, order):
        self.vocab, self.order, self.after = vocab, order, {}
        for row, m in zip(ids.tolist(), mask.tolist(), strict=True):
            row = row[: sum(m)]
            for t in range(len(row)):
                for n in range(min(order, t + 1)):
                    self.after.setdefault(tuple(row[t - n : t]), Counter())[row[t]] += 1

    def p(self, word, context):
        lower = self.p(word, context[1:]) if context else 1 / self.vocab
        if context not in self.after:
            return lower
        seen = self.after[context]
        return (seen[word] + len(seen) * lower) / (sum(seen.values()) + len(seen))

    def loss(self, row):
        found = [-math.log(self.p(row[t], tuple(row[max(0, t - self.order + 1) : t]))) for t in range(len(row))]
        return sum(found) / max(1, len(found))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_against_dictionaries(order):
    ids, mask = texts(40, 12, 7, 0)
    model, naive = NGrams(7, order).fit(ids, mask), Naive(ids, mask, 7, order)
    other, at = texts(60, 12, 7, 1)
    for some, m in ((ids, mask), (other, at)):
        wanted = [naive.loss(row[: sum(k)]) for row, k in zip(some.tolist(), m.tolist(), strict=True)]
        torch.testing.assert_close(model.losses(some, m), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_probabilities_of_all_tokens_add_up_to_one():
    ids, mask = texts(30, 10, 9, 2)
    model = NGrams(9, 3).fit(ids, mask)
    for before in ([1, 2], [8, 8], []):
        n = len(before) + 1
        rows = torch.tensor([[*before, w] for w in range(9)])
        whole = n * model.losses(rows, torch.ones(9, n, dtype=torch.bool))
        head = model.losses(rows[:, :-1], torch.ones(9, n - 1, dtype=torch.bool)) * (n - 1)
        assert float((head - whole).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_padding_and_length_do_not_count():
    ids, mask = texts(30, 10, 9, 3)
    model = NGrams(9, 2).fit(ids, mask)
    noisy = torch.where(mask, ids, (ids + 3) % 9)
    assert torch.equal(model.losses(noisy, mask), model.losses(ids, mask))
    row = torch.tensor([[4, 4, 4, 4]])
    assert float(model.losses(row[:, :0], row[:, :0] > 0)) == 0
    once, twice = NGrams(9, 1).fit(row, row > 0).losses(row, row > 0), NGrams(9, 1).fit(ids, mask)
    assert float(once) < float(twice.losses(row, row > 0))  # per token: a text of one word is easy if the word is usual
    assert torch.allclose(twice.losses(row, row > 0), twice.losses(row[:, :1], row[:, :1] > 0))


def test_before_anything_was_counted_every_token_is_alike():
    none = torch.zeros(0, 4, dtype=torch.int64)
    for model in (NGrams(50), NGrams(50).fit(none, none > 0)):
        assert float(model.losses(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.bool))) == pytest.approx(
            math.log(50)
        )
    with pytest.raises(BadInput, match="vocabulary has 5"):
        NGrams(5).fit(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(BadInput, match="at least 1"):
        NGrams(0)


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_texts_are_less_usual(seed):
    """Texts of a chain in which every token has four followers; as many with their tokens in another order."""
    g = torch.Generator().manual_seed(seed)
    follows = torch.randint(40, (40, 4), generator=g)

    def chain(count, length=30):
        rows = torch.randint(40, (count, 1), generator=g)
        while rows.shape[1] < length:
            rows = torch.cat([rows, follows[rows[:, -1:], torch.randint(4, (count, 1), generator=g)]], 1)
        return rows

    trusted, clean = chain(100), chain(100)
    shuffled = torch.stack([row[torch.randperm(30, generator=g)] for row in chain(100)])
    model = NGrams(40, 3).fit(trusted, trusted >= 0)
    both = torch.cat([clean, shuffled])
    kept = model.losses(both, both >= 0).argsort()[:100]
    assert int((kept < 100).sum()) > 95
