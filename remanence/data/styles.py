"""Questions and answers in other styles, written by rules: the same fact asked for as yes or no, as a choice, at length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.rng import generator
from remanence.data.examples import Examples

#: What a prompt of each style ends with.
STYLES = {
    "yes-no": "Answer with yes or no.",
    "choice": "Answer with the letter of the right choice.",
    "short": "Answer in as few words as you can.",
    "sentence": "Answer in one sentence.",
    "detailed": "Answer at length.",
}
#: An answer of more words is not short, and no rule makes it so.
SHORT = 5
_LETTERS = "ABCD"
_SAID = ("prompt", "answer", "paraphrased_answer", "perturbed_answers")


def styled(examples: Examples, share: float = 0.2, seed: int = 0, styles: Sequence[str] = tuple(STYLES)) -> Examples:
    """The same rows, a `share` of them asked and answered in another style: the answer style diversification of SEFE, so that no task
    teaches that all answers look like its own.

        chosen: round(share * N) rows by chance, dealt to the styles one after the other (they differ by at most one row)

    Pick it for tasks whose answers all look alike, before a task whose answers look otherwise.

    Needs: list columns `prompt` and `answer`. Wrong answers are `perturbed_answers` where there are some (the right one is then told in
    the words of `paraphrased_answer`, as wrong ones are in TOFU and `people`), else answers of other rows. Prompts end with the style's
    instruction (`STYLES`); rows that were not chosen stay as they are. Ids stay, and a list column `style` tells which it is ("" where
    nothing was changed). `paraphrased_answer` and `perturbed_answers` of a changed row are those of its new answer.

    Reference: Chen et al. 2025, "SEFE: Superficial and Essential Forgetting Eliminator for Multimodal Continual Instruction Tuning",
    ICML 2025, arXiv 2505.02486. There a language model rewrites the answers; here rules do, so sentences are plain, the instructions
    are our own, and an answer of more than `SHORT` words that was dealt the short style is asked for as a sentence.

    Raises:
        BadInput: no questions and answers, a share outside (0, 1], no styles, or no second answer for a wrong one.
        UnknownName: a style that does not exist.
    """
    if not 0 < share <= 1:
        raise BadInput(f"share={share} of the rows must be above 0 and at most 1")
    for style in styles:
        if style not in STYLES:
            raise UnknownName(f"no style is called {style!r}{nearest(style, STYLES)} (there is {', '.join(STYLES)})")
    if not styles:
        raise BadInput(f"styles must be one or more of {', '.join(STYLES)}")
    writer = _Writer(examples, generator(seed, "styles"))
    chosen = torch.randperm(len(examples), generator=generator(seed, "styles", "rows"))[: round(share * len(examples))]
    columns: dict[str, list[Any]] = {name: list(c) for name, c in examples.columns.items() if isinstance(c, list)}
    columns["style"] = [""] * len(examples)
    for number, row in enumerate(chosen.tolist()):
        style, *said = writer.write(row, styles[number % len(styles)])
        columns["style"][row] = style
        for name, value in zip(_SAID, said, strict=True):
            if name in columns:
                columns[name][row] = value
    return examples.replace(**columns)


def dialogues(examples: Examples, rounds: int = 3, seed: int = 0) -> Examples:
    """Each row as a conversation of `rounds` questions and answers about its one fact (list column `messages`): as it stands, and in
    other styles, in an order drawn by `seed`. The knowledge-oriented augmentation of KORE, in text: a fact that is said in many ways is
    learned as a fact.

    Of a conversation, the last answer is the target, or, with ``CausalLM(answers=False)``, everything. Needs what `styled` needs;
    `prompt`, `answer` and their other wordings go, other columns and ids stay.

    Reference: Jiang et al. 2025, "KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented Augmentations
    and Constraints", arXiv 2510.19316. There a language model writes up to ten rounds beside those by template; here all are by rules.
    Its tasks about images (recognition, caption, visual questions) have no counterpart.

    Raises:
        BadInput: rounds from 1 to 6 (one as it stands, one in each style), or what `styled` refuses.
    """
    if not 1 <= rounds <= 1 + len(STYLES):
        raise BadInput(f"rounds={rounds} must be from 1 to {1 + len(STYLES)}: one as it stands, and one in each style")
    rng = generator(seed, "dialogues")
    writer = _Writer(examples, rng)
    made = []
    for row, (prompt, answer) in enumerate(zip(writer.prompts, writer.answers, strict=True)):
        drawn = torch.randperm(len(STYLES), generator=rng)[: rounds - 1].tolist()
        said = [(prompt, answer), *(writer.write(row, list(STYLES)[style])[1:3] for style in drawn)]
        said = [said[i] for i in torch.randperm(rounds, generator=rng).tolist()]
        made.append([m for q, a in said for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})])
    columns = {name: column for name, column in examples.columns.items() if name not in _SAID}
    return Examples(
        {**columns, "messages": made}, examples.source, examples.id, examples.views, positional=examples.positional
    )


class _Writer:
    """Writes rows in other styles."""

    def __init__(self, examples: Examples, rng: torch.Generator) -> None:
        columns = examples.columns
        for name in ("prompt", "answer"):
            if not isinstance(columns.get(name), list):
                raise BadInput(f"{examples.source} has no list column {name!r}; styles are for questions and answers")
        self.rng, self.source = rng, examples.source
        self.prompts: list[str] = columns["prompt"]  # type: ignore[assignment]
        self.answers: list[str] = columns["answer"]  # type: ignore[assignment]
        wrong = columns.get("perturbed_answers")
        self.wrong: list[list[str]] | None = wrong if isinstance(wrong, list) else None
        words = columns.get("paraphrased_answer")
        self.words: list[str] = words if self.wrong is not None and isinstance(words, list) else self.answers
        self.others = sorted(set(self.answers))

    def write(self, row: int, style: str) -> tuple[str, str, str, str, list[str]]:
        """The style, and prompt, answer, the answer in the words of the wrong ones, and these."""
        answer, right, wrong = self.answers[row], self.words[row], self._wrong(row)
        if style == "short" and len(answer.split()) > SHORT:
            style = "sentence"
        ask = self.prompts[row]
        if style == "short":
            return style, f"{ask} {STYLES[style]}", answer, right, wrong
        if style == "yes-no":
            true = self._below(2) == 0
            claim = right if true else wrong[self._below(len(wrong))]
            ask, answer, wrong = f'{ask} Is "{claim}" right?', *(("Yes", ["No"]) if true else ("No", ["Yes"]))
        elif style == "choice":
            options = [right, *wrong][: len(_LETTERS)]
            order = torch.randperm(len(options), generator=self.rng).tolist()
            listed = " ".join(f"{letter}) {options[i]}" for letter, i in zip(_LETTERS, order, strict=False))
            ask, answer = f"{ask} {listed}", _LETTERS[order.index(0)]
            wrong = [letter for letter in _LETTERS[: len(options)] if letter != answer]
        else:
            told = [_sentence(each) for each in (right, *wrong)]
            if style == "detailed":
                told = [self._detailed(each, row, said) for each, said in zip(told, [right, *wrong], strict=True)]
            answer, wrong = told[0], told[1:]
        return style, f"{ask} {STYLES[style]}", answer, answer, wrong

    def _detailed(self, sentence: str, row: int, said: str) -> str:
        others = [each for each in [self.words[row], *self._wrong(row)] if each != said][-2:]
        refused = ", nor is it ".join(f'"{other}"' for other in others)
        return f"{sentence} It is not {refused}."

    def _wrong(self, row: int) -> list[str]:
        """Wrong answers in the words of the right one; the same whenever they are asked for."""
        found = self.wrong[row] if self.wrong is not None else []
        if found:
            return found
        if len(self.others) < 2:
            raise BadInput(f"{self.source}: all answers are alike, so there is no wrong one; give perturbed_answers")
        at = self.others.index(self.answers[row])
        return [self.others[(at + 1 + i) % len(self.others)] for i in range(min(3, len(self.others) - 1))]

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.rng))


def _sentence(answer: str) -> str:
    """A sentence that says `answer`; itself where it is one."""
    return answer if answer.rstrip().endswith((".", "!", "?")) else f"The answer is: {answer}."
