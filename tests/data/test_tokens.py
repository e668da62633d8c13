"""From documents to rows of tokens: what is a target, what a document becomes, and who it is afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.problem import CausalLM
from remanence.data import Examples
from remanence.data.tokens import PARTS, corpus, fingerprint_of, tokenised

pytest.importorskip("transformers")
from remanence.data.tokenizers import bpe, byte_tokens


@pytest.fixture(scope="module")
def tok() -> Any:
    return byte_tokens()


def qa(*pairs: tuple[str, str], **columns: list[Any]) -> Examples:
    return Examples({"prompt": [p for p, _ in pairs], "answer": [a for _, a in pairs], **columns}, "qa")


def said(table: Examples, tok: Any, row: int, targets: bool) -> str:
    column = table["labels"][row] if targets else table["input_ids"][row][table["attention_mask"][row]]
    return str(tok.decode(column[column != -100].tolist()))


def test_an_answer_and_its_end_are_the_targets_and_the_prompt_is_none(tok: Any) -> None:
    table = tokenised(qa(("Who?", "Ann"), ("Where is it?", "Here")), tok, CausalLM(context=32))
    assert said(table, tok, 0, False) == "Who? Ann<|end|>" and said(table, tok, 0, True) == " Ann<|end|>"
    whole = tokenised(qa(("Who?", "Ann")), tok, CausalLM(context=32, answers=False))
    assert said(whole, tok, 0, True) == "Who? Ann<|end|>"
    assert table["input_ids"].shape == (2, 32) and table["input_ids"].dtype == torch.int32
    assert table.columns["document"] == [0, 1]


def test_a_long_document_is_refused_cut_or_split_so_that_every_token_is_predicted_once(tok: Any) -> None:
    long = Examples({"text": ["abcdefghijklmnopqrstuvwxyz", "short"], "document": ["a", "b"]}, "texts", [7, 9])
    with pytest.raises(BadInput, match="document 'a' has 27 tokens, and a row has 10"):
        tokenised(long, tok, CausalLM(context=10))
    cut = tokenised(long, tok, CausalLM(context=10, long="cut"))
    assert said(cut, tok, 0, False) == "abcdefghij" and cut.id.tolist() == [7, 9]
    split = tokenised(long, tok, CausalLM(context=10, long="split"))
    assert [said(split, tok, i, False) for i in range(4)] == [
        "abcdefghij",
        "jklmnopqrs",
        "stuvwxyz<|end|>",
        "short<|end|>",
    ]
    assert split.id.tolist() == [7 * PARTS, 7 * PARTS + 1, 7 * PARTS + 2, 9 * PARTS]
    assert split.columns["document"] == ["a", "a", "a", "b"]
    predicted = "".join(
        said(Examples({**split.columns, "labels": split["labels"][:, 1:]}, "", split.id), tok, i, True)
        for i in range(3)
    )
    assert predicted == "bcdefghijklmnopqrstuvwxyz<|end|>"  # all but the very first, each once


def test_of_a_split_answer_only_rows_with_something_to_predict_stay(tok: Any) -> None:
    table = tokenised(qa(("p" * 25, "answer")), tok, CausalLM(context=10, long="split"))
    assert bool((table["labels"][:, 1:] != -100).any(1).all())
    with pytest.raises(BadInput, match="prompt alone has 25 tokens"):
        tokenised(qa(("p" * 25, "answer")), tok, CausalLM(context=10, long="cut"))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (lambda: qa(("Who?", "  ")), "document 0: answer is empty"),
        (lambda: qa(("Who?", "Ann"), ("", "Ann")), "document 1: prompt is empty"),
        (lambda: Examples({"text": ["", "a"], "document": ["x", "y"]}, "texts"), "document 'x': text is empty"),
        (lambda: Examples({"text": [3]}, "texts"), "text is a int, not text"),
        (
            lambda: qa(("Who?", "Ann")).select(torch.tensor([], dtype=torch.int64)),
            "there are no documents; was everything filtered out?",
        ),
        (lambda: Examples({"messages": [[{"role": "user", "content": "hi"}]]}, "chat"), "no chat_template"),
    ],
)
def test_what_says_nothing_is_refused_and_named(tok: Any, examples: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message.replace("(", r"\(").replace("?", r"\?")):
        tokenised(examples(), tok, CausalLM(context=32))


def test_a_conversation_goes_through_the_tokenizers_own_template() -> None:
    tok = byte_tokens()
    tok.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}]
    table = tokenised(Examples({"messages": [turns]}, "chat"), tok, CausalLM(context=64))
    assert said(table, tok, 0, False) == "[user]Who?[assistant]Ann<|end|>" and said(table, tok, 0, True) == "Ann<|end|>"


def test_a_corpus_larger_than_memory_is_the_same_table_read_from_files(tok: Any, tmp_path: Path) -> None:
    texts = [f"document number {i} " * (1 + i % 3) for i in range(50)]
    problem = CausalLM(context=32, long="split")
    here = tokenised(Examples({"text": texts, "topic": [i % 2 for i in range(50)]}, "texts"), tok, problem)
    documents = ({"text": text, "topic": i % 2} for i, text in enumerate(texts))
    there = corpus(documents, tok, problem, tmp_path / "rows", "texts")
    rows = torch.tensor([0, 3, len(here) - 1])
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(there[name][rows], here[name][rows]) and len(there[name]) == len(here)
    assert there.id.tolist() == here.id.tolist() and there.columns["topic"] == here.columns["topic"]
    with pytest.raises(BadInput, match="is not empty"):
        corpus(iter([]), tok, problem, tmp_path / "rows")
    with pytest.raises(BadInput, match="there are no documents"):
        corpus(iter([]), tok, problem, tmp_path / "none")
    with pytest.raises(BadInput, match="text is empty"):
        corpus(iter([{"text": "a"}, {"text": ""}]), tok, problem, tmp_path / "bad")
    assert not list((tmp_path / "bad").iterdir())  # nothing of what was written by then is left


def test_the_default_tokenizer_knows_nobody_and_is_told_from_others() -> None:
    from remanence.data.people import people

    made = bpe(400)
    assert len(made) == 400 and fingerprint_of(made) == fingerprint_of(bpe(400)) != fingerprint_of(bpe(401))
    names = {str(name) for entity in people(24).columns["entity"] for name in str(entity).split()}
    assert not names & {word.strip("Ġ") for word in made.get_vocab()}
    text = "Any text, even ünïcode and 漢字, survives."
    assert made.decode(made(text)["input_ids"]) == text


def test_too_few_tokens_and_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 257"):
        bpe(100)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadInput, match="no text"):
        bpe(300, str(tmp_path / "empty.txt"))
