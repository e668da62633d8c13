"""Which of several sets of adapters a task belongs to, told by its instructions alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from remanence.core.errors import BadInput


def likeness(texts: Sequence[str], others: Sequence[str]) -> float:
    """The mean over pairs of the cosine of their TF-IDF vectors, English stop words left out, from 0 (no word in common) to 1.

    The weights of a pair are those of scikit-learn's ``TfidfVectorizer`` fitted on these two texts: a word of both weighs 1, a word of
    one 1 + ln(3 / 2). Equal texts are alike even where all their words are stop words; else a text without words is like no other.

    Raises:
        BadInput: there is no text on one side.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    if not texts or not others:
        raise BadInput("no texts to compare")
    equal = np.array([[one == other for other in others] for one in texts])
    try:
        counts = CountVectorizer(stop_words="english").fit_transform([*texts, *others])
    except ValueError:  # stop words only
        return float(equal.mean())
    one, other = (side.astype(np.float64) for side in (counts[: len(texts)], counts[len(texts) :]))
    lengths = np.sqrt(_squares(one, other) * _squares(other, one).T)
    cosine = (one @ other.T).toarray() / np.where(lengths > 0, lengths, 1)
    return float(np.where(equal, 1.0, cosine).mean())


def _squares(counts: Any, others: Any) -> Any:
    """The squared lengths (n, m) of the vectors that n texts have when paired with m others."""
    squared, rare = counts.multiply(counts), (1 + np.log(1.5)) ** 2
    return rare * np.asarray(squared.sum(1)) + (1 - rare) * (squared @ (others > 0).T).toarray()


class Codebooks:
    """The instructions that each set of adapters was trained on: `books`, lists of distinct texts, which is all there is to save.

    A new task goes to the set whose instructions are most like its own, if they are at least `threshold` alike; else it gets a new one.
    Qiao et al. 2025, "Large Continual Instruction Assistant", arXiv 2410.10868: 0.9 for tasks that have one way of asking, 0.3 for tasks
    that ask in many.
    """

    def __init__(self, threshold: float = 0.9, books: Sequence[Sequence[str]] = ()) -> None:
        if not 0 <= threshold <= 1:
            raise BadInput(f"threshold must lie between 0 and 1, got {threshold}")
        self.threshold, self.books = threshold, [list(book) for book in books]

    def nearest(self, texts: Sequence[str]) -> tuple[int, float]:
        """The number of the book that `texts` are most like (of equals the first), and how alike they are; (-1, 0.0) without books."""
        distinct = list(dict.fromkeys(texts))
        found = [likeness(distinct, book) for book in self.books]
        return (found.index(max(found)), max(found)) if found else (-1, 0.0)

    def allot(self, texts: Sequence[str]) -> int:
        """The number of the set that learns the task of `texts`, which are written into its book; a new set if none is alike."""
        number, alike = self.nearest(texts)
        if number < 0 or alike < self.threshold:
            self.books.append([])
            number = len(self.books) - 1
        book = self.books[number]
        book += [text for text in dict.fromkeys(texts) if text not in book]
        return number

    def select(self, texts: Sequence[str]) -> int:
        """The number of the set that answers `texts`; the last one if none is alike.

        Raises:
            BadInput: no task was allotted yet.
        """
        number, alike = self.nearest(texts)
        if number < 0:
            raise BadInput("no task was allotted yet")
        return number if alike >= self.threshold else len(self.books) - 1
