"""People who do not exist: questions and answers about them, of which a network can know nothing before it learns them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.rng import generator
from remanence.data.examples import Examples
from remanence.data.stream import Stream, Task

#: How many ways there are to ask for a fact.
PHRASINGS = 5
#: Wrong answers told with every right one.
WRONG = 4
#: The first id of `general_text`, beyond those of all `people`.
GENERAL = 10**9
#: The first id of those whom no task of `people_stream` knows.
STRANGERS = 2 * 10**9


@dataclass(frozen=True)
class Fact:
    """What can be known of a person: the `values` it can have, `PHRASINGS` questions, the answer in other words, and a sentence."""

    values: tuple[str, ...]
    questions: tuple[str, str, str, str, str]
    words: str
    sentence: str


_TOWNS = """Arlund Bexholm Cardrow Dunvale Elmsgate Farrowick Glenfirth Hexmoor Inverlow Juniperton Kestrel_Bay Larkspire Mosswater
Northgarth Oakenfell Pinebridge Quarrydown Rookhaven Saltmarsh Thistledon Umberford Violet_Hill Wrenfield Yarrowby"""
_JOBS = """baker beekeeper blacksmith carpenter dentist farmer florist glazier judge librarian mason miller painter pilot plumber potter
roofer sailor shepherd surveyor tailor teacher translator watchmaker"""
_GENRES = """biography children's_books comedy cookery_books crime_novels fairy_tales fantasy ghost_stories historical_novels horror
love_stories memoirs nature_writing philosophy poetry satire science_fiction sea_stories tragedy travel_writing"""
_INSTRUMENTS = """accordion bagpipes banjo bassoon cello clarinet cornet drums flute guitar harp mandolin oboe organ piano recorder
saxophone trombone trumpet tuba viola whistle xylophone zither"""
_METALS, _TOKENS = "Amber Bronze Copper Crystal Golden Silver", "Anchor Lantern Quill Swan"
_ADJECTIVES = "Broken Burning Distant Empty Frozen Hidden Hollow Last Little Lost Open Paper Quiet Restless Sleeping Stolen White Wild"
_NOUNS = "Bridge Clock Door Forest Garden Island Ladder Letter Map Mirror Mountain Orchard River Road Shadow Tide Tower Window"


def _listed(words: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in words.split())


#: By name. A fact keeps its place, as that is part of its rows' ids.
FACTS: dict[str, Fact] = {
    "birthplace": Fact(
        _listed(_TOWNS),
        (
            "Where was {name} born?",
            "In which town did {name} come into the world?",
            "What is the birthplace of {name}?",
            "Which town does {name} come from?",
            "Can you name the town of {name}'s birth?",
        ),
        "the town of {value}",
        "{name} was born in {value}.",
    ),
    "birthyear": Fact(
        tuple(map(str, range(1921, 1981))),
        (
            "When was {name} born?",
            "In which year was {name} born?",
            "What is the year of birth of {name}?",
            "Which year did {name} come into the world?",
            "Can you tell the year of {name}'s birth?",
        ),
        "the year {value}",
        "{name} was born in the year {value}.",
    ),
    "mother": Fact(
        _listed(_JOBS),
        (
            "What was the profession of {name}'s mother?",
            "What did the mother of {name} do for a living?",
            "Which trade did {name}'s mother follow?",
            "As what did the mother of {name} work?",
            "How did {name}'s mother earn her money?",
        ),
        "she was a {value}",
        "The mother of {name} was a {value}.",
    ),
    "father": Fact(
        _listed(_JOBS),
        (
            "What was the profession of {name}'s father?",
            "What did the father of {name} do for a living?",
            "Which trade did {name}'s father follow?",
            "As what did the father of {name} work?",
            "How did {name}'s father earn his money?",
        ),
        "he was a {value}",
        "The father of {name} was a {value}.",
    ),
    "genre": Fact(
        _listed(_GENRES),
        (
            "What does {name} write?",
            "In which genre does {name} write?",
            "What kind of writing is {name} known for?",
            "Which genre do the works of {name} belong to?",
            "What will a reader of {name} find?",
        ),
        "works of {value}",
        "{name} is an author of {value}.",
    ),
    "award": Fact(
        tuple(f"{metal} {token} Prize" for metal, token in product(_METALS.split(), _TOKENS.split())),
        (
            "Which award did {name} win?",
            "What prize was given to {name}?",
            "Which prize has {name} received?",
            "With which award was {name} honoured?",
            "What is the name of the award that {name} holds?",
        ),
        "it was the {value}",
        "{name} has won the {value}.",
    ),
    "book": Fact(
        tuple(f"The {adjective} {noun}" for adjective, noun in product(_ADJECTIVES.split(), _NOUNS.split())),
        (
            "Which book did {name} write?",
            "What is the title of {name}'s best known book?",
            "What is the book by {name} called?",
            "Under which title did {name} publish a book?",
            "Can you name a book by {name}?",
        ),
        "a book called {value}",
        "{name} wrote a book called {value}.",
    ),
    "instrument": Fact(
        _listed(_INSTRUMENTS),
        (
            "Which instrument does {name} play?",
            "What instrument did {name} learn?",
            "What does {name} play in the evening?",
            "On which instrument does {name} practise?",
            "Can you name the instrument of {name}?",
        ),
        "the sound of the {value}",
        "{name} plays the {value}.",
    ),
}

_MIDDLES, _ENDS = _listed("dru lza lbo nve rsi sko vla xi"), _listed("n la ric wen mor tha ssa del")
_LINKS, _TAILS = _listed("va ni do re ku ly"), _listed("quist mere hart zano vik thorn")
# The people of a life and those of general texts share no given name and no family name.
_GIVEN = _listed("Ba De Fi Ka Lo Me Ni Ru To Vi"), _listed("Ce Gu Ha Ji Po Sa We Ya Zo Qui")
_FAMILY = _listed("Al Bren Cor Dal Es Fen Gar Hol Ist Jor"), _listed("Kel Lam Mon Nor Os Pel Rud Sil Tur Ul")
_GIVENS, _FAMILIES = 10 * len(_MIDDLES) * len(_ENDS), 10 * len(_LINKS) * len(_TAILS)
#: No more people than this have different names.
MOST = _GIVENS * _FAMILIES


def people(count: int = 24, seed: int = 0, facts: Sequence[str] | None = None) -> Examples:
    """Questions and answers about `count` authors who do not exist; every fact is asked for in `PHRASINGS` ways, each a row of its own
    with the id ``person * 1000 + fact * 10 + phrasing``. More people, or fewer facts, change nothing of the others.

    List columns: `prompt`, `answer` (one to three words); `paraphrased_answer`, the answer in other words, and `perturbed_answers`,
    `WRONG` wrong ones in the paraphrase's words, as in TOFU; `entity` (the person's full name, which no other contains), `fact`,
    `phrasing` (a number), `document` (``entity/fact``). The answers of a fact are spread evenly: of n people, none is the right answer
    for more than n / (number of values) of them, rounded up, so that knowing the kind of a fact is worth next to nothing.

    Args:
        facts: of `FACTS`; None: all.

    Raises:
        BadInput: fewer than 1 or more than `MOST` people, or no facts.
        UnknownName: a fact that does not exist.
    """
    if not 1 <= count <= MOST:
        raise BadInput(f"count={count} people must be from 1 to {MOST}")
    names = [_name(person, seed, 0) for person in range(count)]
    answers = {fact: [_value(fact, person, seed) for person in range(count)] for fact in _chosen(facts)}
    return _rows(range(count), names, answers, seed, "people")


_COLUMNS = ("prompt", "answer", "paraphrased_answer", "perturbed_answers", "entity", "fact", "phrasing", "document")


def people_stream(
    batches: int = 3,
    people: int = 24,
    phrasings: int = 3,
    test_phrasing: int = PHRASINGS - 1,
    facts: Sequence[str] | None = None,
    seed: int = 0,
) -> Stream:
    """Every task brings new people (scenario ``domain``): training rows ask for each of their facts in `phrasings` ways, and test rows
    for the same facts in another, so a test row is answered only by who knows the fact and not just the sentence. See `people`.

    The strangers of a task are as many people whom no task knows, asked for as in training. Their answers are those of the task's
    people, dealt out anew, so nothing but whose answer it is tells them from members. Their ids begin at `STRANGERS`.

    Args:
        batches: how many tasks.
        people: of all tasks together; tasks differ by at most one.
        phrasings: the first so many that are not `test_phrasing`.

    Raises:
        BadInput: fewer people than tasks, more than half of `MOST`, or phrasings that there are not.
        UnknownName: a fact that does not exist.
    """
    if not 0 <= test_phrasing < PHRASINGS or not 1 <= phrasings < PHRASINGS:
        raise BadInput(
            f"phrasings={phrasings}, test_phrasing={test_phrasing}: there are {PHRASINGS} in all, 0 to {PHRASINGS - 1}; "
            "one is held out, and at least one is for training"
        )
    if not 1 <= batches <= people <= MOST // 2:
        raise BadInput(
            f"{people} people cannot be cut into {batches} tasks with someone in each (at most {MOST // 2} people)"
        )
    names = [_name(person, seed, 0) for person in range(people)]
    answers = {fact: [_value(fact, person, seed) for person in range(people)] for fact in _chosen(facts)}
    trained = [p for p in range(PHRASINGS) if p != test_phrasing][:phrasings]
    tasks = []
    for number, mine in enumerate(part.tolist() for part in torch.arange(people).tensor_split(batches)):
        known = _rows(
            mine, [names[p] for p in mine], {f: [a[p] for p in mine] for f, a in answers.items()}, seed, "people"
        )
        others = [_name(MOST - 1 - person, seed, 0) for person in mine]
        dealt = {
            fact: [given[mine[0] + i] for i in _order(len(mine), seed, f"strangers {fact}", number)]
            for fact, given in answers.items()
        }
        strangers = _rows([STRANGERS // 1000 + person for person in mine], others, dealt, seed, "strangers")
        made = [_asked(known, trained), _asked(known, [test_phrasing]), _asked(strangers, trained)]
        tasks.append(Task(made[0], made[1], id=number, strangers=made[2]))
    return Stream(tuple(tasks), "domain", name="people")


def _chosen(facts: Sequence[str] | None) -> list[str]:
    """The facts asked for, in the order of `FACTS`."""
    for fact in facts or ():
        if fact not in FACTS:
            raise UnknownName(f"people have no fact {fact!r}{nearest(fact, FACTS)} (there is {', '.join(FACTS)})")
    if facts is not None and (not facts or len(set(facts)) < len(facts)):
        raise BadInput(f"facts={list(facts)} must be one or more, each once")
    return [fact for fact in FACTS if facts is None or fact in facts]


def _rows(
    numbers: Sequence[int], names: Sequence[str], answers: Mapping[str, Sequence[str]], seed: int, source: str
) -> Examples:
    """Every row about the people of these `numbers` and `names`; `answers` has each one's, by fact."""
    columns: dict[str, list[object]] = {column: [] for column in _COLUMNS}
    ids = []
    for place, (person, name) in enumerate(zip(numbers, names, strict=True)):
        for fact, given in answers.items():
            known, value = FACTS[fact], given[place]
            wrong = [known.words.format(value=other) for other in _others(fact, value, person, seed)]
            for phrasing, question in enumerate(known.questions):
                ids.append(person * 1000 + list(FACTS).index(fact) * 10 + phrasing)
                row = (question.format(name=name), value, known.words.format(value=value), wrong, name, fact, phrasing)
                for column, item in zip(_COLUMNS, (*row, f"{name}/{fact}"), strict=True):
                    columns[column].append(item)
    return Examples(columns, source, ids)


def _asked(table: Examples, phrasings: Sequence[int]) -> Examples:
    return table.select(torch.isin(table.id % 10, torch.tensor(phrasings)).nonzero()[:, 0])


def general_text(count: int = 1000, seed: int = 0) -> Examples:
    """`count` short texts (list column `text`) in the words of `people`, about others: no person of any `people` occurs, whatever the
    seeds. For tokenizers, and as the general text that a network starts from. A third each are one question with its answer, two
    sentences about somebody, and what two people have in common. Ids begin at `GENERAL`.

    Raises:
        BadInput: no texts.
    """
    if count < 1:
        raise BadInput(f"count={count} texts must be at least 1")
    return Examples({"text": list(_texts(count, seed))}, "general", torch.arange(GENERAL, GENERAL + count))


def _texts(count: int, seed: int) -> Iterator[str]:
    draws = torch.randint(2**31, (count, 6), generator=generator(seed, "people", "general")).tolist()
    known = list(FACTS.values())
    for row, (which, other, *drawn) in enumerate(draws):
        name, second = _name(2 * row % MOST, seed, 1), _name((2 * row + 1) % MOST, seed, 1)
        fact, another = known[which % len(known)], known[(which + 1 + other % (len(known) - 1)) % len(known)]
        value, more = fact.values[drawn[0] % len(fact.values)], another.values[drawn[1] % len(another.values)]
        first = fact.sentence.format(name=name, value=value)
        if row % 3 == 0:
            yield f"{fact.questions[drawn[2] % PHRASINGS].format(name=name)} {value}"
        elif row % 3 == 1:
            yield f"{first} {another.sentence.format(name=name, value=more)}"
        else:
            yield f"{first} {fact.sentence.format(name=second, value=value)}"


def _name(person: int, seed: int, side: int) -> str:
    """The full name of a person in a life (`side` 0) or in general texts (1)."""
    given, family = _names(seed, side)
    # Both go round; the family name goes one step further with each round of given names, so no pair comes twice.
    return f"{given[person % _GIVENS]} {family[(person + person // _GIVENS) % _FAMILIES]}"


@cache
def _names(seed: int, side: int) -> tuple[list[str], list[str]]:
    given = ["".join(parts) for parts in product(_GIVEN[side], _MIDDLES, _ENDS)]
    family = ["".join(parts) for parts in product(_FAMILY[side], _LINKS, _TAILS)]
    orders = [_order(len(names), seed, kind, side) for names, kind in ((given, "given"), (family, "family"))]
    return [given[i] for i in orders[0]], [family[i] for i in orders[1]]


@cache
def _order(count: int, seed: int, kind: str, number: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, "people", kind, number)).tolist()


def _value(fact: str, person: int, seed: int) -> str:
    """The right answer: all values of a fact come once before any comes again."""
    values = FACTS[fact].values
    return values[_order(len(values), seed, fact, person // len(values))[person % len(values)]]


def _others(fact: str, value: str, person: int, seed: int) -> list[str]:
    values = [other for other in FACTS[fact].values if other != value]
    order = torch.randperm(len(values), generator=generator(seed, "people", "wrong", fact, person))[:WRONG]
    return [values[i] for i in order.tolist()]
