"""Likeness is what scikit-learn's vectoriser gives, pair by pair; books are chosen by it, opened and written into."""

from __future__ import annotations

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from remanence.core.errors import BadInput
from remanence.nn.allocation import Codebooks, likeness

COLOURS = [
    "Name the colour of the car.",
    "Which colour has the car, red or blue or red?",
    "Tell me the colour of a house",
]
SUMS = ["Add the two numbers and answer with a number.", "Multiply two numbers, then answer with one number"]


def naive(texts, others):
    """One vectoriser for each pair."""
    found = []
    for one in texts:
        for other in others:
            vectors = TfidfVectorizer(stop_words="english").fit_transform([one, other])
            found.append(cosine_similarity(vectors[0:1], vectors[1:2])[0][0])
    return sum(found) / len(found)


@pytest.mark.parametrize(("texts", "others"), [(COLOURS, SUMS), (SUMS, COLOURS), (COLOURS, COLOURS), (SUMS[:1], SUMS)])
def test_likeness_is_scikit_learns(texts, others):
    assert likeness(texts, others) == pytest.approx(naive(texts, others), abs=1e-12)


def test_ends_of_likeness():
    assert likeness(["red car"], ["blue house"]) == 0
    assert likeness(["red car"], ["red car"]) == 1
    assert likeness(["Red CAR!"], ["car, red"]) == pytest.approx(1)
    assert likeness(COLOURS, SUMS) == pytest.approx(likeness(SUMS, COLOURS), abs=1e-12)
    # One word of two shared: 1 / (1 + (1 + ln 1.5)^2).
    assert likeness(["red car"], ["red house"]) == pytest.approx(0.3360969, abs=1e-6)


def test_texts_of_stop_words_are_like_themselves_only():
    assert likeness(["What is this?"], ["What is this?"]) == 1
    assert likeness(["What is this?"], ["Who are they?"]) == 0
    assert likeness(["What is this?"], ["red car"]) == 0
    assert likeness(["What is this?", "red car"], ["What is this?"]) == 0.5
    with pytest.raises(BadInput, match="no texts"):
        likeness([], COLOURS)


def test_a_like_task_takes_the_book_and_writes_what_is_new_into_it():
    books = Codebooks(0.3)
    assert books.allot(["Name the colour of the car."] * 5) == 0 and books.books == [["Name the colour of the car."]]
    assert books.allot(SUMS) == 1
    assert books.allot(["Tell the colour of that car.", "Name the colour of the car."]) == 0
    assert books.books == [["Name the colour of the car.", "Tell the colour of that car."], SUMS]
    assert books.allot(["Translate into French"]) == 2


def test_the_threshold_decides_at_equality():
    alike = likeness(["red car"], ["red house"])
    for threshold, number in ((alike, 0), (alike + 1e-9, 1)):
        books = Codebooks(threshold, [["red car"]])
        assert books.allot(["red house"]) == number
        assert len(books.books) == number + 1


def test_an_unlike_text_is_answered_by_the_last():
    books = Codebooks(0.9, [COLOURS[:1], SUMS[:1], ["Translate into French"]])
    assert [books.select([texts]) for texts in (COLOURS[0], SUMS[0], "something else entirely")] == [0, 1, 2]
    assert books.books == [COLOURS[:1], SUMS[:1], ["Translate into French"]]  # asking writes nothing
    assert books.nearest(["something else entirely"]) == (0, 0.0)


def test_without_books():
    assert Codebooks().nearest(["red car"]) == (-1, 0.0)
    with pytest.raises(BadInput, match="no task"):
        Codebooks().select(["red car"])
    with pytest.raises(BadInput, match="threshold"):
        Codebooks(1.5)
    given = [["red car"]]
    Codebooks(0.1, given).allot(["blue car"])
    assert given == [["red car"]]
