"""People who do not exist: distinct names, answers that nobody can guess, rows that stay what they are."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import pytest

from remanence.core.errors import BadInput, UnknownName
from remanence.core.ids import Ids
from remanence.data import Request, general_text, people, people_stream
from remanence.data.people import _FAMILY, _GIVEN, FACTS, GENERAL, MOST, PHRASINGS, STRANGERS, WRONG, _name, _names
from remanence.data.streams import examples_of, stream_of


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_says_who_and_what_it_asks_for(seed: int) -> None:
    table = people(12, seed)
    column: Any = table.columns
    assert len(table) == 12 * len(FACTS) * PHRASINGS
    names = list(dict.fromkeys(column["entity"]))
    assert len(names) == 12
    for row, id in enumerate(table.id.tolist()):
        name, fact, phrasing = names[id // 1000], list(FACTS)[id % 1000 // 10], id % 10
        known = FACTS[fact]
        value = column["answer"][row]
        assert (column["entity"][row], column["fact"][row], column["phrasing"][row]) == (name, fact, phrasing)
        assert column["document"][row] == f"{name}/{fact}"
        assert column["prompt"][row] == known.questions[phrasing].format(name=name) and name in column["prompt"][row]
        assert value in known.values and 1 <= len(value.split()) <= 3
        assert column["paraphrased_answer"][row] == known.words.format(value=value)
        wrong = column["perturbed_answers"][row]
        assert len(wrong) == len(set(wrong)) == WRONG and all(value not in other for other in wrong)
        assert set(wrong) <= {known.words.format(value=other) for other in known.values}
    answers: dict[tuple[str, str], set[str]] = {}
    for name, fact, value in zip(column["entity"], column["fact"], column["answer"], strict=True):
        answers.setdefault((name, fact), set()).add(value)
    assert all(len(values) == 1 for values in answers.values())  # the same answer, however it is asked for


def test_templates_ask_differently_and_values_cannot_be_confused() -> None:
    questions = [question for fact in FACTS.values() for question in fact.questions]
    assert len(set(questions)) == PHRASINGS * len(FACTS) and PHRASINGS >= 4
    assert all(q.count("{name}") == 1 and q.endswith("?") and "{value}" not in q for q in questions)
    for name, fact in FACTS.items():
        assert len(fact.values) >= 20 and len(set(fact.values)) == len(fact.values), name
        assert not [pair for pair in permutations(fact.values, 2) if pair[0] in pair[1]], name
        assert "{name}" not in fact.words and "{name}" in fact.sentence and "{value}" in fact.sentence


def test_no_name_is_part_of_another_and_general_texts_know_none() -> None:
    """Of all 230,400 names; two words each begin with their only capital, so one could only begin as the other begins."""
    for seed in (0, 7):
        names = [_name(person, seed, 0) for person in range(MOST)]
        assert len(set(names)) == MOST
        assert all(name.istitle() and name.count(" ") == 1 for name in names)
        family = sorted(_names(seed, 0)[1])
        assert not [pair for pair in pairwise(family) if pair[1].startswith(pair[0])]
    assert len({name.split()[0] for name in names[:600]}) == 600  # nor do the first people share a given name
    own, others = ({*_names(0, side)[0], *_names(0, side)[1]} for side in (0, 1))
    assert not own & others
    assert not set(_GIVEN[0]) & set(_GIVEN[1]) and not set(_FAMILY[0]) & set(_FAMILY[1])
    said = set(" ".join(general_text(3000, seed=5).columns["text"]).replace("?", " ").replace("'s", " ").split())
    assert not said & own and said & others


@pytest.mark.parametrize("count", [24, 37, 300])
def test_knowing_the_kind_is_worth_next_to_nothing(count: int) -> None:
    for seed in range(3):
        table = people(count, seed)
        column: Any = table.columns
        for fact, known in FACTS.items():
            given = [a for a, f, p in zip(column["answer"], column["fact"], column["phrasing"], strict=True)
                     if f == fact and p == 0]  # fmt: skip
            assert len(given) == count and max(Counter(given).values()) == -(-count // len(known.values))


def test_rows_do_not_depend_on_how_many_others_there_are() -> None:
    table = people(9, 3)
    more = people(30, 3)
    assert more.only(table.ids).fingerprint() == table.fingerprint()
    some = people(9, 3, facts=["award", "mother"])
    assert set(some.columns["fact"]) == {"award", "mother"}
    assert table.only(some.ids).fingerprint() == some.fingerprint()
    assert people(9, 4).fingerprint() != table.fingerprint()
    assert not set(people(9, 4).columns["entity"]) & set(table.columns["entity"])


def test_requests_name_a_person_or_a_fact() -> None:
    table = people(5)
    name = table.columns["entity"][40]
    found, unseen = Request(entities=[name]).resolve([table])
    assert found == Ids(range(1000, 2000)) & table.ids and len(found) == 40 and not len(unseen)
    assert Request(documents=[f"{name}/birthyear"]).resolve([table])[0] == Ids(range(1010, 1015))


def test_a_stream_trains_and_tests_on_the_same_facts_in_other_words() -> None:
    stream = people_stream(batches=3, people=10, phrasings=3, seed=2)
    table = people(10, 2)
    assert stream.scenario == "domain" and stream.name == "people" and [t.id for t in stream] == [0, 1, 2]
    assert (
        [len(t.train) // (3 * len(FACTS)) for t in stream] == [len(t.test) // len(FACTS) for t in stream] == [4, 3, 3]
    )
    entities = [set(task.train.columns["entity"]) for task in stream]
    assert len(set.union(*entities)) == 10
    for task in stream:
        assert set(task.train.columns["phrasing"]) == {0, 1, 2} and set(task.test.columns["phrasing"]) == {4}
        train, test = ({*zip(p.columns["document"], p.columns["answer"], strict=True)} for p in (task.train, task.test))
        assert train == test and not set(task.train.columns["prompt"]) & set(task.test.columns["prompt"])
        assert table.only(task.train.ids).fingerprint() == task.train.fingerprint()
        assert table.only(task.test.ids).fingerprint() == task.test.fingerprint()
    other = people_stream(2, 4, phrasings=4, test_phrasing=0, facts=["genre"])
    assert set(other[1].train.columns["phrasing"]) == {1, 2, 3, 4} and set(other[1].test.columns["phrasing"]) == {0}
    assert set(other[0].train.columns["fact"]) == {"genre"}


@pytest.mark.parametrize("seed", [0, 1])
def test_strangers_differ_from_members_in_nothing_but_whose_answers_they_are(seed: int) -> None:
    stream = people_stream(batches=3, people=20, phrasings=2, seed=seed)
    learned = {name for task in stream for name in task.train.columns["entity"]}
    names: set[str] = set()
    for task in stream:
        members, strangers = task.train, task.strangers
        assert strangers is not None and len(strangers) == len(members)
        assert int(strangers.id.min()) >= STRANGERS > GENERAL and not strangers.ids & members.ids
        known: list[Any] = [part.columns for part in (members, strangers)]
        for column in ("answer", "paraphrased_answer"):
            counts = [Counter(zip(c["fact"], c["phrasing"], c[column], strict=True)) for c in known]
            assert counts[0] == counts[1]
        answers: list[Counter[tuple[str, ...]]] = []
        for c in known:
            of = {(n, f): a for n, f, a in zip(c["entity"], c["fact"], c["answer"], strict=True)}
            answers.append(Counter(tuple(of[n, f] for f in FACTS) for n in dict.fromkeys(c["entity"])))
        assert not answers[0] & answers[1]  # nobody has a member's whole story
        assert not names & set(known[1]["entity"])
        names |= set(known[1]["entity"])
    assert len(names) == 20 and not names & learned


def test_general_texts() -> None:
    made = general_text(900, seed=1)
    texts: Any = made.columns["text"]
    assert len(made) == 900 == len(set(texts)) and int(made.id.min()) == GENERAL > 1000 * MOST
    assert general_text(300, seed=2).fingerprint() != general_text(300, seed=1).fingerprint()
    values = {value for fact in FACTS.values() for value in fact.values}
    words = {word for text in texts for word in text.replace(".", "").split()}
    assert sum(value.split()[-1] in words for value in values) > 0.95 * len(
        values
    )  # a tokenizer sees the answers' words
    assert sum("?" in text for text in texts) == 300


def test_fingerprints_in_another_process() -> None:
    code = "from remanence.data import *; print(people(6, 1).fingerprint(), general_text(50, 1).fingerprint())"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert seen == [people(6, 1).fingerprint(), general_text(50, 1).fingerprint()]


def test_plans_name_people_and_texts() -> None:
    assert stream_of("people").fingerprint() == people_stream().fingerprint()
    knobs = {"batches": 2, "people": 5, "facts": ["book"], "seed": 1}
    assert stream_of({"people": knobs}).fingerprint() == people_stream(2, 5, facts=["book"], seed=1).fingerprint()
    assert examples_of({"people": {"count": 3}}).fingerprint() == people(3).fingerprint()
    assert examples_of("general-text").fingerprint() == general_text().fingerprint()
    with pytest.raises(BadInput, match="people: batches='two' has the wrong type"):
        stream_of({"people": {"batches": "two"}})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: people(0), BadInput, "count=0"),
        (lambda: people(MOST + 1), BadInput, "from 1 to"),
        (lambda: people(2, facts=["boook"]), UnknownName, "did you mean 'book'"),
        (lambda: people(2, facts=[]), BadInput, "one or more"),
        (lambda: people(2, facts=["book", "book"]), BadInput, "each once"),
        (lambda: people_stream(5, 4), BadInput, "4 people cannot be cut into 5"),
        (lambda: people_stream(2, MOST), BadInput, "at most 115200"),
        (lambda: people_stream(2, 4, facts=["pet"]), UnknownName, "no fact 'pet'"),
        (lambda: people_stream(0, 4), BadInput, "into 0 tasks"),
        (lambda: people_stream(phrasings=5), BadInput, "phrasings=5"),
        (lambda: people_stream(test_phrasing=5), BadInput, "test_phrasing=5"),
        (lambda: general_text(0), BadInput, "count=0"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
