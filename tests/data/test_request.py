"""Requests: what they resolve to, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from remanence.core.errors import BadInput, UnknownName
from remanence.core.ids import Ids
from remanence.data import Examples, Request


def seen() -> list[Examples]:
    first = Examples(
        {"y": torch.tensor([0, 1, 0]), "document": ["a", "b", "a"], "client": torch.tensor([7, 7, 8])},
        "one",
        ids=[1, 2, 3],
    )
    return [first, Examples({"y": torch.tensor([1, 2]), "document": ["c", "a"]}, "two", ids=[10, 11])]


@pytest.mark.parametrize(
    ("asked", "found", "unseen"),
    [
        ({"ids": [2, 11, 99]}, [2, 11], [99]),
        ({"ids": torch.tensor([3, 3])}, [3], []),
        ({"ids": Ids([99])}, [], [99]),
        ({"classes": [1]}, [2, 10], []),
        ({"classes": [0, 2]}, [1, 3, 11], []),
        ({"classes": [5]}, [], []),
        ({"documents": ["a"]}, [1, 3, 11], []),
        ({"client": 7}, [1, 2], []),
        ({"ids": [10], "classes": [0]}, [1, 3, 10], []),  # fields add up
    ],
)
def test_a_request_resolves_against_what_was_seen(asked: dict[str, Any], found: list[int], unseen: list[int]) -> None:
    assert Request(**asked).resolve(seen()) == (Ids(found), Ids(unseen))


def test_names_that_were_never_seen_come_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'ab'"):
        Request(documents=["abc"]).resolve([*seen(), Examples({"document": ["ab"]}, "s")])
    with pytest.raises(UnknownName, match="no column 'entity'"):
        Request(entities=["Ann"]).resolve(seen())


@pytest.mark.parametrize("asked", [{}, {"ids": []}, {"classes": []}, {"ids": Ids(), "documents": []}])
def test_an_empty_request_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="names nothing"):
        Request(**asked)


def test_malformed_requests_are_refused() -> None:
    for asked in ({"classes": 3}, {"documents": "book"}, {"ids": [1.5]}, {"ids": [True]}):
        with pytest.raises(BadInput):
            Request(**asked)  # type: ignore[arg-type]


def test_words_and_json_say_what_was_asked_and_words_no_id() -> None:
    request = Request(ids=[12345, 7], classes=[3], documents=["a", "b"], client="Ann")
    assert request.asked() == {"ids": [7, 12345], "classes": [3], "documents": ["a", "b"], "client": "Ann"}
    assert request.plain() == "2 given examples and class 3 and documents a, b and client Ann"
    assert "12345" not in request.plain()


def test_originals_name_every_copy():
    from remanence.data import digits, permuted

    stream = permuted(digits(), tasks=3, seed=0)
    wanted = [int(i) for i in stream[0].train["original"][:2]]
    request = Request(originals=wanted)
    found, unseen = request.resolve([task.train for task in stream])
    assert (
        not unseen
        and len(found) == 6
        and request.asked() == {"originals": wanted}
        and request.plain() == "every copy of 2 examples"
    )


def test_targets_name_a_range_with_both_ends():
    parts = [
        Examples({"y": torch.tensor([0.0, 0.1, 29.5, 30.0, 30.5])}, "flat", range(5)),
        Examples({"y": torch.tensor([[-1.0], [7.0]])}, "column", range(10, 12)),
        Examples({"y": torch.tensor([12, 99])}, "whole numbers", range(20, 22)),
    ]
    request = Request(targets=(0, 30))
    assert request.resolve(parts) == (Ids([0, 1, 2, 3, 11, 20]), Ids())
    assert request.asked() == {"targets": [0.0, 30.0]} and Request(**request.asked()) == request
    assert request.plain() == "targets from 0 to 30"
    assert Request(ids=[4], targets=[-0.5, 0.1]).plain() == "1 given example and targets from -0.5 to 0.1"
    assert Request(ids=[4], targets=[-0.5, 0.1]).resolve(parts) == (Ids([0, 1, 4]), Ids())
    assert Request(targets=(50, 60)).resolve(parts) == (Ids(), Ids())
    for wrong in ([1.0], [1, 2, 3], [2, 1], [0, float("nan")], [0, float("inf")], ["0", "1"], [True, 2]):
        with pytest.raises(BadInput, match="two numbers"):
            Request(targets=wrong)
    with pytest.raises(UnknownName, match="one number per example"):
        request.resolve([Examples({"y": torch.zeros(3, 2)}, "pairs")])
    with pytest.raises(UnknownName, match="no column 'y'"):
        request.resolve([Examples({"x": torch.zeros(3, 2)}, "bare")])
