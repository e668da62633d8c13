"""The next token: only targets are answered, rows keep their own loss, and packing changes the layout and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.core.errors import BadInput
from remanence.core.packing import bins
from remanence.core.problem import CausalLM, output_layer, problem_of, targets
from tests.lm import VOCAB, tiny


def batch(rows: int = 9, length: int = 12, seed: int = 0, prompt: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(prompt + 1, length + 1, (rows,), generator=g)
    ids = torch.randint(4, VOCAB, (rows, length), generator=g, dtype=torch.int32)
    mask = torch.arange(length)[None] < lengths[:, None]
    labels = torch.where(mask, ids, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels, "id": torch.arange(rows)}


def naive(model: Any, rows: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(logits, right token) at every target, row by row, each row alone and without padding."""
    found = []
    for i in range(len(rows["id"])):
        n = int(rows["attention_mask"][i].sum())
        logits = model(input_ids=rows["input_ids"][i : i + 1, :n].long()).logits[0]
        labels = rows["labels"][i, :n].long()
        at = (labels[1:] != -100).nonzero()[:, 0]
        found.append((logits[at], labels[at + 1]))
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_answers_and_losses_are_those_of_every_row_alone(packing: bool) -> None:
    model, rows, problem = tiny(), batch(), CausalLM(packing=packing)
    out = problem.forward(model, rows)
    expected = naive(model, rows)
    torch.testing.assert_close(out.logits, torch.cat([z for z, _ in expected]), atol=2e-6, rtol=1e-5)
    assert torch.equal(targets(rows)[1], torch.cat([y for _, y in expected]))
    each = torch.stack([F.cross_entropy(z, y) for z, y in expected])
    torch.testing.assert_close(problem.losses(out, rows), each, atol=2e-6, rtol=1e-5)
    whole = torch.cat([F.cross_entropy(z, y, reduction="none") for z, y in expected])
    torch.testing.assert_close(problem.loss(out, rows), whole.mean(), atol=2e-6, rtol=1e-5)
    score = problem.score(out, rows)
    assert torch.equal(score["accuracy"], torch.stack([(z.argmax(1) == y).float().mean() for z, y in expected]))
    assert torch.equal(score["exact"], (score["accuracy"] == 1).float())


def test_the_loss_is_transformers_own_and_weights_are_of_rows() -> None:
    model, rows, problem = tiny(), batch(), CausalLM()
    labels = rows["labels"].long()
    theirs = model(input_ids=rows["input_ids"].long(), attention_mask=rows["attention_mask"].long(), labels=labels).loss
    torch.testing.assert_close(problem.loss(problem.forward(model, rows), rows), theirs, atol=2e-6, rtol=1e-5)
    out = problem.forward(model, rows)
    once = {**rows, "weight": torch.tensor([1.0] + [0.0] * 8)}
    torch.testing.assert_close(problem.loss(out, once), problem.losses(out, rows)[0])


def test_gradients_do_not_depend_on_the_layout() -> None:
    grads = []
    for packing in (False, True):
        model, problem = tiny(), CausalLM(packing=packing)
        problem.loss(problem.forward(model, batch()), batch()).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_compact_leaves_out_what_no_row_needs_and_changes_no_answer() -> None:
    model, rows, problem = tiny(), batch(length=12), CausalLM()
    short = {name: value[rows["attention_mask"].sum(1) <= 8] for name, value in rows.items()}
    made = problem.compact(short)
    assert made["input_ids"].shape[1] == int(short["attention_mask"].sum(1).max()) < 12
    torch.testing.assert_close(problem.forward(model, made).logits, problem.forward(model, short).logits)


def test_features_are_what_the_head_saw_at_the_targets() -> None:
    model, rows, problem = tiny(), batch(), CausalLM()
    out = problem.forward(model, rows, output_layer(model))
    assert out.features is not None and len(out.features) == len(out.logits)
    torch.testing.assert_close(F.linear(out.features, output_layer(model).weight), out.logits)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_bins_hold_every_row_once_and_none_too_much(lengths: list[int]) -> None:
    made = bins(lengths, 30)
    assert sorted(row for rows in made for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 30 for rows in made)
    assert len(made) <= 11 / 9 * -(-sum(lengths) // 30) * 2  # never near two half-empty ones for one


def test_packed_rows_are_fewer_and_no_row_sees_another() -> None:
    seen: list[torch.Size] = []
    model = tiny()
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    rows = batch(rows=16)
    rows["attention_mask"][1:, 4:] = False
    rows["labels"][1:, 4:] = -100
    out = CausalLM(packing=True).forward(model, rows)
    assert seen[-1][0] < 16
    changed = {**rows, "input_ids": rows["input_ids"].clone()}
    changed["input_ids"][2, :3] = 5  # another row's words
    again = CausalLM(packing=True).forward(model, changed)
    same = targets(rows)[0] != 2
    torch.testing.assert_close(out.logits[same], again.logits[same])


def test_it_is_named_and_built_again_from_its_knobs() -> None:
    made = problem_of({"causal-lm": {"context": 64, "packing": True}})
    assert made == CausalLM(context=64, packing=True) and problem_of(made.spec()) == made


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(BadInput, match="output layer"):
        output_layer(torch.nn.Sequential(torch.nn.Linear(2, 2)))
