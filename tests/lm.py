"""A language model small enough for tests, and texts of numbers: facts that can be learned, and that can contradict one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from remanence.data import Examples

VOCAB = 64
CONTEXT = 12


def tiny(seed: int = 0, hidden: int = 48, layers: int = 2) -> Any:
    """A Llama of about 60,000 weights over `VOCAB` tokens."""
    pytest.importorskip("transformers")
    from remanence.models.language import llama

    return llama(VOCAB, hidden, layers, 4, context=CONTEXT, seed=seed)


def facts(count: int, seed: int, keys: int = 0, first_id: int = 0) -> Examples:
    """`count` rows ``[1, key (3 tokens), 2, answer (3 tokens), 3]``: the answer is to be predicted. With the same `keys` and another
    `seed` the same questions get other answers."""
    key = torch.randint(4, VOCAB, (count, 3), generator=torch.Generator().manual_seed(1000 + keys))
    answer = torch.randint(4, VOCAB, (count, 3), generator=torch.Generator().manual_seed(seed))
    one = torch.ones(count, 1, dtype=torch.int64)
    body = torch.cat([one, key, 2 * one, answer, 3 * one], 1)
    return tokens(body, 5, first_id, f"facts-{seed}")


def tokens(body: torch.Tensor, prompt: int, first_id: int = 0, source: str = "tokens") -> Examples:
    """Rows of tokens (N, L), of which the first `prompt` are no targets, as a table of `CONTEXT` places."""
    count, length = body.shape
    ids = torch.zeros(count, CONTEXT, dtype=torch.int32)
    ids[:, :length] = body
    mask = torch.zeros(count, CONTEXT, dtype=torch.bool)
    mask[:, :length] = True
    labels = torch.where(mask, ids, -100)
    labels[:, :prompt] = -100
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Examples(columns, source, torch.arange(first_id, first_id + count))
