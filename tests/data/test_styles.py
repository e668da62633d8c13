"""Answers in other styles say the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from remanence.core.errors import BadInput, UnknownName
from remanence.data import Examples, dialogues, people, people_stream, styled
from remanence.data.streams import stream_of
from remanence.data.styles import SHORT, STYLES


def table(count: int = 40) -> Examples:
    """Without other wordings: wrong answers are those of other rows."""
    columns = {"prompt": [f"Number {i}?" for i in range(count)], "answer": [f"word {i % 7}" for i in range(count)]}
    return Examples({**columns, "entity": [f"e{i}" for i in range(count)]}, "numbers", range(100, 100 + count))


def rows(examples: Examples) -> list[dict[str, Any]]:
    return [
        dict(zip(examples.columns, row, strict=True)) for row in zip(*map(list, examples.columns.values()), strict=True)
    ]


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_share_of_the_rows_is_dealt_to_the_styles_and_the_rest_stays(share: float) -> None:
    examples = people(6, 1)
    made = styled(examples, share, seed=4)
    assert made.ids == examples.ids and made.id.tolist() == examples.id.tolist()
    counts = Counter(made.columns["style"])
    changed = len(examples) - counts.pop("", 0)
    assert changed == round(share * len(examples)) and set(counts) == set(STYLES)
    assert max(counts.values()) - min(counts.values()) <= 1
    for new, old in zip(rows(made), rows(examples), strict=True):
        same = {name: value for name, value in new.items() if name != "style"}
        assert (same == old) == (not new["style"])
        assert all(same[name] == old[name] for name in ("entity", "document", "fact", "phrasing"))
    assert styled(examples, share, seed=4).fingerprint() == made.fingerprint()
    assert styled(examples, share, seed=5).fingerprint() != made.fingerprint()


def says(row: dict[str, Any], right: str, wrong: list[str]) -> None:
    """Whether the new answer, read as its style has it, is what the old one says."""
    style, prompt, answer = row["style"], row["prompt"].removesuffix(" " + STYLES[row["style"]]), row["answer"]
    assert prompt != row["prompt"]
    if style == "yes-no":
        claim = prompt.split('Is "')[1].removesuffix('" right?')
        assert answer == ("Yes" if claim == right else "No") and claim in {right, *wrong}
    elif style == "choice":
        options = dict(part.split(") ") for part in prompt.split("? ")[1].replace(" B)", "|B)").replace(" C)", "|C)")
                       .replace(" D)", "|D)").split("|"))  # fmt: skip
        assert options[answer] == right and len(options) == 4 == len(set(options.values()))
        assert set(options.values()) <= {right, *wrong}
    elif style == "sentence":
        assert answer == f"The answer is: {right}."
    elif style == "detailed":
        assert f"The answer is: {right}." in answer and len(answer.split()) > 2 * len(right.split())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_style_says_what_the_row_said(seed: int) -> None:
    examples = people(5, seed)
    seen: Counter[str] = Counter()
    for new, old in zip(rows(styled(examples, 1.0, seed)), rows(examples), strict=True):
        assert new["prompt"].startswith(old["prompt"]) and new["prompt"].endswith(STYLES[new["style"]])
        says(new, old["paraphrased_answer"], old["perturbed_answers"])
        if new["style"] == "short":
            assert (new["answer"], new["paraphrased_answer"]) == (old["answer"], old["paraphrased_answer"])
        else:
            assert new["paraphrased_answer"] == new["answer"]
        assert new["perturbed_answers"] and new["paraphrased_answer"] not in new["perturbed_answers"]
        seen[f"{new['style']} {new['answer']}" if len(new["answer"]) < 4 else new["style"]] += 1
    for answer in ("yes-no Yes", "yes-no No", *(f"choice {letter}" for letter in "ABCD")):
        assert seen[answer] >= 4, seen  # of 40 each: no answer is always right


def test_without_wrong_answers_they_are_those_of_other_rows() -> None:
    examples = table()
    made = rows(styled(examples, 1.0))
    for new, old in zip(made, rows(examples), strict=True):
        says(new, old["answer"], [f"word {i}" for i in range(7) if f"word {i}" != old["answer"]])
        assert "perturbed_answers" not in new and "paraphrased_answer" not in new
    long = table().replace(answer=[" ".join(["so"] * (SHORT + 1 + i % 2)) + f" {i}." for i in range(40)])
    styles = Counter(styled(long, 1.0).columns["style"])
    assert styles == {"yes-no": 8, "choice": 8, "sentence": 16, "detailed": 8}  # none is made short
    told = [row for row in rows(styled(long, 1.0)) if row["style"] == "sentence"]
    assert all(row["answer"] in long.columns["answer"] for row in told)  # what is a sentence stays one
    only = styled(table(), 0.5, styles=["yes-no"])
    assert Counter(only.columns["style"]) == {"": 20, "yes-no": 20}


@pytest.mark.parametrize("rounds", [1, 3, 6])
def test_dialogues_say_one_fact_in_many_ways(rounds: int) -> None:
    examples = people(3, 2)
    made = dialogues(examples, rounds, seed=1)
    assert made.id.tolist() == examples.id.tolist() and set(made.columns) == {
        "entity", "document", "fact", "phrasing", "messages"
    }  # fmt: skip
    last = Counter()
    for new, old in zip(rows(made), rows(examples), strict=True):
        messages = new["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * rounds
        pairs = [(messages[i]["content"], messages[i + 1]["content"]) for i in range(0, 2 * rounds, 2)]
        assert (old["prompt"], old["answer"]) in pairs and len({prompt for prompt, _ in pairs}) == rounds
        for prompt, answer in pairs:
            style = next((s for s, told in STYLES.items() if prompt.endswith(told)), None)
            if style is not None:
                says({"style": style, "prompt": prompt, "answer": answer}, old["paraphrased_answer"], old["perturbed_answers"])  # fmt: skip
        last[pairs[-1] == (old["prompt"], old["answer"])] += 1
    assert 0.5 / rounds < last[True] / len(examples) < 1.6 / rounds  # any round can be the last, the target
    assert dialogues(examples, rounds, seed=1).fingerprint() == made.fingerprint()
    assert (dialogues(examples, rounds, seed=2).fingerprint() == made.fingerprint()) == (rounds == 1)


def test_a_plan_lays_styles_over_a_stream() -> None:
    plain, made = people_stream(2, 4, seed=3), stream_of({"styled": {"stream": {"people": {"batches": 2, "people": 4, "seed": 3}}, "share": 0.5}})  # fmt: skip
    assert made.scenario == "domain" and made.name == "people, styled"
    for task, old in zip(made, plain, strict=True):
        assert task.train.fingerprint() == styled(old.train, 0.5).fingerprint()
        assert task.test.fingerprint() == old.test.fingerprint() and task.id == old.id
        assert task.strangers is not None and task.strangers.fingerprint() == old.strangers.fingerprint()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: styled(table(), 0), BadInput, "share=0"),
        (lambda: styled(table(), 1.1), BadInput, r"share=1\.1"),
        (lambda: styled(table(), styles=["choise"]), UnknownName, "did you mean 'choice'"),
        (lambda: styled(table(), styles=[]), BadInput, "one or more"),
        (lambda: styled(Examples({"text": ["a"]}, "plain"), 1.0), BadInput, "plain has no list column 'prompt'"),
        (lambda: styled(table().replace(answer=["one"] * 40), 1.0), BadInput, "all answers are alike"),
        (lambda: dialogues(table(), 0), BadInput, "rounds=0"),
        (lambda: dialogues(table(), 7), BadInput, "from 1 to 6"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
