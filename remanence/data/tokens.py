"""Texts as rows of tokens: one row is (a part of) one document, so an id and a document survive whatever happens to rows later."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.problem import TOKENS, CausalLM
from remanence.data.examples import Examples, cat
from remanence.data.mapped import mapped
from remanence.data.stream import Stream, Task

#: With ``long="split"`` part k of document d has the id ``d * PARTS + k``.
PARTS = 2**16
_TEXT = ("messages", "prompt", "answer", "text")
_BLOCK = 1000  # documents given to the tokenizer at a time


def is_text(examples: Examples) -> bool:
    """Whether these are texts that a tokenizer has still to cut."""
    return (
        any(name in examples.columns for name in ("text", "answer", "messages")) and TOKENS[0] not in examples.columns
    )


def tokenised(examples: Examples, tokenizer: Any, problem: CausalLM) -> Examples:
    """A table of tokens of a table of texts.

    Args:
        examples: with a list column ``text``; or ``prompt`` and ``answer``; or ``messages``, each a list of ``{"role": ..., "content":
            ...}`` that the tokenizer has a chat template for. Other columns (``document``, ``entity``, ...) stay.
        tokenizer: of transformers.
        problem: its `context`, `long` and `answers` say how documents become rows.

    Returns:
        ``input_ids`` (N, context) int32, ``attention_mask`` bool, ``labels`` int32, and ``document`` (the document's id where the data
        names none). The end of every document is a token of its own, and a target.

    Raises:
        BadInput: an empty text or answer, a document longer than the context (unless ``long`` says what to do), no documents, or a
            tokenizer without an end token. Says which document.
    """
    if not len(examples):
        raise BadInput(f"{examples.source}: there are no documents; was everything filtered out?")
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise BadInput("the tokenizer has no end-of-text token (eos_token), so no answer would ever end; set one")
    sizes: list[int] = []
    prompts: list[int] = []
    tokens: list[list[int]] = []
    for at in range(0, len(examples), _BLOCK):
        for row, (prompt, whole) in enumerate(
            _encoded(examples, range(at, min(at + _BLOCK, len(examples))), tokenizer, end), at
        ):
            for begin, part in _parts(
                whole, len(prompt), problem, f"{examples.source}: document {_name(examples, row)}"
            ):
                sizes.append(row)
                prompts.append(max(0, len(prompt) - begin) if problem.answers else 0)
                tokens.append(part)
    return _table(examples, tokens, prompts, torch.tensor(sizes), problem)


def _encoded(examples: Examples, rows: Sequence[int], tokenizer: Any, end: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, prompt and answer and end) in tokens of each of the `rows`; the prompt of a plain text is empty."""

    def column(name: str) -> list[str]:
        return [_said(examples, name, row) for row in rows]

    def cut(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []

    first = getattr(tokenizer, "bos_token_id", None)
    start = [] if first is None else [int(first)]
    if "messages" in examples.columns:
        return [_chat(examples, row, tokenizer, end) for row in rows]
    if "answer" in examples.columns:
        prompts = cut(column("prompt")) if "prompt" in examples.columns else [[] for _ in rows]
        answers = cut([" " + text for text in column("answer")])
        return [([*start, *p], [*start, *p, *a, end]) for p, a in zip(prompts, answers, strict=True)]
    return [(start, [*start, *t, end]) for t in cut(column("text"))]


def _chat(examples: Examples, row: int, tokenizer: Any, end: int) -> tuple[list[int], list[int]]:
    """A conversation by the tokenizer's own template; what comes before the last message is the prompt."""
    messages, where = examples.columns["messages"][row], f"{examples.source}: document {_name(examples, row)}"
    if (
        not isinstance(messages, Sequence)
        or not messages
        or not all(isinstance(m, dict) and m.get("content") for m in messages)
    ):
        raise BadInput(f"{where}: messages are a list of {{role, content}} with some content")
    if getattr(tokenizer, "chat_template", None) is None:
        raise BadInput(
            f"{where} is a conversation, and the tokenizer has no chat_template; set one, or give prompt and answer"
        )
    options = {"tokenize": True, "return_dict": False}
    prompt = (
        list(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options))
        if len(messages) > 1
        else []
    )
    whole = list(tokenizer.apply_chat_template(messages, **options))
    if whole[: len(prompt)] != prompt:
        raise BadInput(f"{where}: the chat template writes the beginning of a conversation otherwise once it goes on")
    return prompt, whole if whole[-1] == end else [*whole, end]


def _said(examples: Examples, name: str, row: int) -> str:
    value = examples.columns[name][row]
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if isinstance(value, str) else f"is a {type(value).__name__}, not text"
        raise BadInput(f"{examples.source}: document {_name(examples, row)}: {name} {what}; fill it or drop the row")
    return value


def _name(examples: Examples, row: int) -> str:
    named = examples.columns.get("document")
    return repr(named[row]) if isinstance(named, list) else str(int(examples.id[row]))


def _parts(whole: list[int], prompt: int, problem: CausalLM, where: str) -> list[tuple[int, list[int]]]:
    """(where it begins, the tokens) of each row that a document becomes."""
    context = problem.context
    if len(whole) <= context:
        return [(0, whole)]
    if problem.long == "refuse":
        raise BadInput(
            f"{where} has {len(whole)} tokens, and a row has {context}: widen it (context=), or say what to do: long='split' or 'cut'"
        )
    if problem.long == "cut":
        if problem.answers and prompt >= context:
            raise BadInput(
                f"{where}: its prompt alone has {prompt} tokens, so nothing of the answer is left in {context}"
            )
        return [(0, whole[:context])]
    # A part begins with the last token of the one before, from which its own first is predicted.
    parts = [(at, whole[at : at + context]) for at in range(0, len(whole) - 1, context - 1)]
    if len(parts) > PARTS:
        raise BadInput(f"{where} would become {len(parts)} rows; at most {PARTS} have ids: cut the document")
    return parts if not problem.answers else [(at, part) for at, part in parts if at + len(part) > prompt]


def _table(
    examples: Examples, tokens: list[list[int]], prompts: list[int], rows: Tensor, problem: CausalLM
) -> Examples:
    """The token table; `rows` (R,) are the numbers of the documents that the rows come from."""
    shape = (len(tokens), problem.context)
    ids, mask, labels = np.zeros(shape, np.int32), np.zeros(shape, np.bool_), np.full(shape, -100, np.int32)
    for at, (part, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        ids[at, : len(part)] = part
        mask[at, : len(part)] = True
        labels[at, prompt : len(part)] = part[prompt:]
    others = {name: column for name, column in examples.columns.items() if name not in _TEXT}
    others.setdefault("document", examples.id.tolist())  # a list, so that it is in no batch
    kept = Examples(others, examples.source, examples.id).select(rows)
    numbers = kept.id
    if problem.long == "split":
        if int(numbers.max()) >= 2**63 // PARTS:
            raise BadInput(
                f"{examples.source}: ids beyond {2**63 // PARTS} leave no room for the parts of a split document"
            )
        numbers = numbers * PARTS + torch.arange(len(rows)) - torch.searchsorted(rows, rows)
    made = {name: torch.from_numpy(array) for name, array in zip(TOKENS, (ids, mask, labels), strict=True)}
    return Examples({**made, **kept.columns}, examples.source, numbers, positional=examples.positional)


def corpus(
    documents: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    problem: CausalLM,
    folder: str | Path,
    source: str = "corpus",
) -> Examples:
    """A token table of more documents than fit into memory: its rows are written into `folder`, and read from there whenever they are
    asked for. The files are copies of the documents, and yours to delete.

    Args:
        documents: with ``text``, or ``prompt`` and ``answer``, or ``messages``, and whatever else is in all of them, such as from
            `iterate`. ``id`` (a whole number) is a document's id; without it, its number.
        tokenizer, problem: as for `tokenised`.
        folder: empty, or not there yet.

    Raises:
        BadInput: as `tokenised`; or the folder has files in it. What was written by then is removed.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty; give a new folder for the rows of this corpus")
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.bin" for name in TOKENS}
    kept: list[Examples] = []
    seen = 0
    try:
        with contextlib.ExitStack() as stack:
            open_ = {name: stack.enter_context(path.open("wb")) for name, path in files.items()}
            for block in _blocks(documents):
                names = [name for name in block[0] if name != "id" and all(name in row for row in block)]
                ids = [int(row.get("id", seen + at)) for at, row in enumerate(block)]
                made = tokenised(
                    Examples({n: [row[n] for row in block] for n in names}, source, ids), tokenizer, problem
                )
                for name, file in open_.items():
                    file.write(made[name].numpy().tobytes())
                kept.append(Examples({n: c for n, c in made.columns.items() if n not in TOKENS}, source, made.id))
                seen += len(block)
        if not kept:
            raise BadInput(f"{source}: there are no documents; was everything filtered out?")
    except BaseException:
        for path in files.values():
            path.unlink(missing_ok=True)
        raise
    rest = cat(kept)
    shape = (len(rest), problem.context)
    kinds = {"input_ids": np.int32, "attention_mask": np.bool_, "labels": np.int32}
    columns = {name: mapped(np.memmap(path, kinds[name], "r", 0, shape)) for name, path in files.items()}
    return Examples({**columns, **rest.columns}, source, rest.id)


def _blocks(documents: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    items = iter(documents)
    while block := list(itertools.islice(items, _BLOCK)):
        yield block


def tokenised_task(task: Task, tokenizer: Any, problem: CausalLM) -> Task:
    """A task of texts as one of tokens; itself where it has tokens already."""
    done: dict[int, Examples] = {}

    def cut(part: Examples) -> Examples:
        if not is_text(part) or not len(part):
            return part
        if id(part) not in done:
            done[id(part)] = tokenised(part, tokenizer, problem)
        return done[id(part)]

    strangers = None if task.strangers is None else cut(task.strangers)
    return Task(cut(task.train), cut(task.test), task.classes, task.names, task.id, strangers)


def tokenised_stream(stream: Stream, tokenizer: Any, problem: CausalLM) -> Stream:
    """A stream of texts as one of tokens."""
    tasks = tuple(tokenised_task(task, tokenizer, problem) for task in stream)
    return Stream(tasks, stream.scenario, stream.borders, stream.name)


def fingerprint_of(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how a tokenizer cuts a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(
        f"{said}|{tokenizer.eos_token_id}|{getattr(tokenizer, 'chat_template', None)}".encode()
    ).hexdigest()
