"""Fisher matrices of language models against a loop over rows written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.problem import CausalLM
from remanence.nn import fisher
from remanence.nn.adapters import add_low_rank
from remanence.nn.fisher import absolute_gradient, absolute_sensitivity, diagonal_fisher
from tests.lm import facts, tiny


def rows(count: int = 5) -> dict[str, Tensor]:
    """Rows with 4, 1, 3, 4 and no targets."""
    batch = facts(count, 1).batch(torch.arange(count))
    batch["labels"][1, 6:] = -100
    batch["labels"][2, 5] = -100
    batch["labels"][4] = -100
    return {**batch, "weight": torch.rand(count, generator=torch.Generator().manual_seed(0))}


def written_out(model: nn.Module, batch: dict[str, Tensor], names: list[str], value: Any) -> list[dict[str, Tensor]]:
    """The gradient of `value` of the logits and targets of each row, from the model's own forward."""
    params = dict(model.named_parameters())
    found = []
    for ids, there, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(there.sum())
        at = (labels[1:length] != -100).nonzero().flatten()
        if not len(at):
            found.append({name: torch.zeros_like(params[name]) for name in names})
            continue
        logits = model(input_ids=ids[:length].long()[None]).logits[0, at]
        grads = torch.autograd.grad(value(logits, labels[at + 1].long()), [params[n] for n in names], allow_unused=True)
        found.append({n: torch.zeros_like(params[n]) if g is None else g for n, g in zip(names, grads, strict=True)})
    return found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_empirical_fisher_of_every_weight(packing: bool, size: int) -> None:
    model, batch = tiny().double().eval(), rows()
    params = dict(model.named_parameters())
    gradients = written_out(model, batch, list(params), lambda logits, y: F.cross_entropy(logits, y))
    batches = [{n: c[at : at + size] for n, c in batch.items()} for at in range(0, 5, size)]
    found = diagonal_fisher(model, CausalLM(packing=packing), batches, params)
    weighted = diagonal_fisher(model, CausalLM(packing=packing), batches, params, weight_by="weight")
    for name in params:
        squares = torch.stack([g[name].square() for g in gradients])
        torch.testing.assert_close(found[name], squares.mean(0), rtol=1e-6, atol=1e-12)
        weight = batch["weight"].double().reshape(-1, *[1] * (squares.dim() - 1))
        expected = (squares * weight).sum(0) / weight.sum()
        torch.testing.assert_close(weighted[name], expected, rtol=1e-5, atol=1e-12)
    assert all(p.grad is None and p.requires_grad for p in params.values())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_a_batch_of_text_takes_one_backward(size: int, tie: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, RMS norms and the head included, whether or not embeddings and head share a matrix."""
    from remanence.models.language import llama

    model, batch = llama(64, 48, 1, 4, context=12, tie=tie).double().eval(), rows()
    batch = {name: column.flip(0) for name, column in batch.items()}  # the first row has no target
    batch["input_ids"][:, 2] = batch["input_ids"][:, 6]  # a token that comes twice, and is a target
    params = dict(model.named_parameters())
    assert ("lm_head.weight" in params) != tie
    batches = [{n: c[at : at + size] for n, c in batch.items()} for at in range(0, 5, size)]
    expected = diagonal_fisher(model, CausalLM(), batches, params, engine="rows")
    sensitive = absolute_sensitivity(model, CausalLM(), batches, params, engine="rows")

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(fisher, "_by_rows", never)
    for found, wanted in (
        (diagonal_fisher(model, CausalLM(), batches, params), expected),
        (absolute_sensitivity(model, CausalLM(), batches, params), sensitive),
    ):
        for name in params:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-12)


def test_as_many_targets_as_rows_are_not_taken_for_one_target_in_each_row() -> None:
    """The head then sees (B, D), but row 1 twice and row 2 never; row 0, on which the rules are tried, looks as if they held."""
    from remanence.models.language import llama

    model = llama(64, 48, 1, 4, context=12, tie=False).double().eval()
    batch = facts(3, 1).batch(torch.arange(3))
    batch["labels"][0, 6:] = -100
    batch["labels"][1, 7:] = -100
    batch["labels"][2] = -100
    params = {"lm_head.weight": model.lm_head.weight}
    gradients = written_out(model, batch, list(params), lambda logits, y: F.cross_entropy(logits, y))
    found = diagonal_fisher(model, CausalLM(), [batch], params)
    expected = torch.stack([g["lm_head.weight"].square() for g in gradients]).mean(0)
    torch.testing.assert_close(found["lm_head.weight"], expected, rtol=1e-6, atol=1e-12)


def test_low_rank_adapters_have_one_too() -> None:
    model = add_low_rank(tiny(), ["model.layers.0.mlp.up_proj"], 2, 4.0, 0).double().eval()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.up").normal_()
    batch = rows()
    params = {name: p for name, p in model.named_parameters() if name.endswith((".up", ".down"))}
    gradients = written_out(model, batch, list(params), lambda logits, y: F.cross_entropy(logits, y))
    found = diagonal_fisher(model, CausalLM(), [batch], params)
    assert len(found) == 2
    for name in params:
        expected = torch.stack([g[name].square() for g in gradients]).mean(0)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-12)


def test_sensitivities_read_no_label_but_where_the_targets_are() -> None:
    model, batch = tiny().double().eval(), rows()
    params = dict(model.named_parameters())
    gradients = written_out(model, batch, list(params), lambda logits, y: logits.square().sum())
    other = {**batch, "labels": torch.where(batch["labels"] == -100, -100, 7)}
    for rows_ in (batch, other):
        found = absolute_sensitivity(model, CausalLM(), [rows_], params)
        alone = absolute_gradient(model, CausalLM(), [{n: c[:1] for n, c in rows_.items()}], params)
        for name in params:
            expected = torch.stack([g[name].abs() for g in gradients]).mean(0)
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(alone[name], gradients[0][name].abs() / 4, rtol=1e-6, atol=1e-12)


def test_the_exact_fisher_is_refused() -> None:
    model = tiny()
    with pytest.raises(BadInput, match="empirical"):
        diagonal_fisher(model, CausalLM(), [rows()], dict(model.named_parameters()), kind="exact")
