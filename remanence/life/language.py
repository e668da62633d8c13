"""What is special about a life of texts: a tokenizer that fits, whose words are left, and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import TOKENS, CausalLM, Problem, output_layer
from remanence.data import Examples, Task


def check_language(model: nn.Module, problem: Problem, tokenizer: Any) -> None:
    """Refuse what cannot speak.

    Raises:
        BadInput: a tokenizer without a language problem, or with more tokens than the model has embeddings; a context beyond the
            model's own; no output layer.
    """
    if not isinstance(problem, CausalLM):
        if tokenizer is not None:
            raise BadInput(
                f"a tokenizer belongs to a causal language model, and this problem is {next(iter(problem.spec()))}"
            )
        return
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "get_vocab")):
        raise BadInput(
            f"the tokenizer of a language model must be one of transformers', not {type(tokenizer).__name__}"
        )
    output_layer(model)
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and problem.context > most:
        raise BadInput(f"context={problem.context} is more than the {most} places that the model knows")
    if tokenizer is not None:
        rows = vocabulary(model)
        if rows is not None and len(tokenizer) > rows:
            raise BadInput(
                f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}: they do not belong together (or resize the "
                "model's embeddings)"
            )


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model embeds; None where that is not known."""
    offered: Any = getattr(model, "get_input_embeddings", None)
    found = None if offered is None else offered()
    return getattr(found, "num_embeddings", None) or getattr(getattr(model, "config", None), "vocab_size", None)


def check_text(task: Task, model: nn.Module) -> None:
    """Refuse rows that are no texts, before anything moves.

    Raises:
        BadInput: names the source and what is wrong with how many rows.
    """
    parts = {id(part): part for part in (task.train, task.test, task.strangers) if part is not None}
    for part in parts.values():
        lacking = [name for name in TOKENS if name not in part.columns]
        if lacking:
            raise BadInput(
                f"{part.source} has no {', '.join(lacking)}; give texts (columns text, or prompt and answer) and a tokenizer, or tokens"
            )
        rows = vocabulary(model)
        for at in range(0, len(part), 4096):
            ids, mask, labels = (part[name][at : at + 4096] for name in TOKENS)
            if ids.shape != mask.shape or ids.shape != labels.shape or ids.dim() != 2:
                raise BadInput(
                    f"{part.source}: the columns of tokens have shapes {[tuple(c.shape) for c in (ids, mask, labels)]}"
                )
            bad = {
                f"tokens beyond the {rows} that the model knows": (ids < 0) | (ids >= (rows or 2**31)),
                "padding that is not on the right": mask[:, 1:] & ~mask[:, :-1].bool(),
                "targets that are not their own tokens": (labels != -100) & ((labels != ids) | ~mask.bool()),
                "no target at all, or only at their first token": (labels[:, 1:] == -100).all(1, keepdim=True),
            }
            for what, where in bad.items():
                if bool(where.any()):
                    raise BadInput(f"{part.source}: {int(where.any(1).sum())} rows have {what}")


def entities(examples: Examples) -> list[Any]:
    """Whom each row is about: its entity where the data names one, else its document."""
    for name in ("entity", "document"):
        if name in examples.columns:
            column = examples.columns[name]
            return column if isinstance(column, list) else column.tolist()
    return examples.id.tolist()


def about(examples: Examples, wanted: set[Any]) -> torch.Tensor:
    """(N,) whether each row is about one of `wanted`."""
    return torch.tensor([each in wanted for each in entities(examples)], dtype=torch.bool)


def unforgotten(test: Examples, ever: set[Any], left: set[Any]) -> Examples:
    """`test` without rows about those who were learned of and are wholly forgotten."""
    gone = about(test, ever - left)
    return test.select((~gone).nonzero()[:, 0]) if bool(gone.any()) else test


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: Any, tokens: int, problem: CausalLM) -> Any:
    """The answer to a prompt, or to each of a list: greedy, up to the end token, `tokens` tokens or the end of the context.

    Raises:
        BadInput: no prompts, no tokenizer, or a model that cannot generate.
    """
    many = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(many, Sequence) or not many or not all(isinstance(p, str) and p for p in many):
        raise BadInput("predict takes a prompt, or a list of prompts, of a language model")
    if tokenizer is None or not hasattr(model, "generate"):
        raise BadInput("predict needs the life's tokenizer, and a model that can generate (transformers' can)")
    if tokens < 1:
        raise BadInput(f"tokens={tokens}: at least 1")
    device, start = next(model.parameters()).device, tokenizer.bos_token_id
    modes = model.training
    model.eval()
    found = []
    try:
        for prompt in many:
            ids = ([] if start is None else [start]) + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            room = min(tokens, problem.context - len(ids))
            if room < 1:
                raise BadInput(
                    f"a prompt of {len(ids)} tokens leaves no room for an answer in context={problem.context}"
                )
            given = torch.tensor([ids], device=device)
            made = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=room, do_sample=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            found.append(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip())
    finally:
        model.train(modes)
    return found[0] if isinstance(prompts, str) else found
