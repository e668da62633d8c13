"""Every learner, keeper, where and forgetter in a life of texts: it lives there, or is refused before anything moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import remanence as rm
from remanence import catalogue
from remanence.core.errors import BadInput, Refused
from remanence.core.ids import Ids
from remanence.nn.buffer import Buffer
from remanence.train.resolve import _lacking
from tests.lm import CONTEXT, facts, tiny

PROBLEM = {"causal-lm": {"context": CONTEXT}}
#: Knobs where the defaults are for larger networks, or for classes.
KNOBS: dict[str, dict[str, Any]] = {
    "replay": {"policy": "reservoir", "capacity": 20},
    "kore": {"rank": 8},
    "lt-sft": {"density": 0.2},
    "stability-gap-cpt": {"subset": 0.5},
    "auto": {"candidates": ["gradient-ascent"], "references": 2},
}
#: What works beside low-rank adapters only.
BESIDE_LORA = ("sefe",)
PARTS = [part for verb in ("learn", "keep", "where") for part in catalogue.parts(verb, "method")]


def lives(**given: Any) -> rm.Life:
    return rm.Life(tiny(0, hidden=16), problem=PROBLEM, **given)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.verb}/{part.slug}")
def test_it_learns_twice_and_outlives_a_request_or_says_why_not(part: Any) -> None:
    spec = {part.slug: KNOBS.get(part.slug, {})}
    role = {"learn": {"learner": spec}, "keep": {"keep": [spec]}, "where": {"where": [spec]}}[part.verb]
    beside = {"where": ["lora"]} if part.slug in BESIDE_LORA else {}
    if _lacking(part, rm.CausalLM()) is not None:
        with pytest.raises(BadInput, match=f"{part.slug} needs .*, and a causal-lm has none; there is"):
            lives(**role)
        return
    with lives(**role, **beside) as life:
        first, second = facts(12, seed=1, keys=1), facts(12, seed=2, keys=2, first_id=100)
        for task in (first, second):
            before = {name: value.clone() for name, value in life.model.state_dict().items()}
            life.learn(task, epochs=2, batch_size=4, lr=1e-3)
            now = life.model.state_dict()
            assert any(name not in before or not torch.equal(value, before[name]) for name, value in now.items())
        assert life._books.consumed >= first.ids and life._books.consumed & second.ids
        gone = first.id[:2].tolist()
        receipt = life.forget(rm.Request(ids=gone), by="gradient-ascent", epochs=1, lr=1e-4)
        assert receipt.ids.array.tolist() == gone
        stored = [
            v for method in life._state.holders().values() for v in vars(method).values() if isinstance(v, Buffer)
        ]
        assert not any(buffer.holds(Ids(gone)) for buffer in stored)
        if part.load().stores:
            assert stored and all(len(buffer) for buffer in stored)  # of others there are still some


@pytest.mark.parametrize("part", catalogue.parts("forget", "method"), ids=lambda part: part.slug)
def test_it_forgets_texts_or_says_why_not(part: Any) -> None:
    spec = {part.slug: KNOBS.get(part.slug, {})}
    with lives() as life:
        table = facts(12, seed=1, keys=1)
        life.learn(table, epochs=2, batch_size=4, lr=1e-3)
        digest = life.content_digest()
        asked = rm.Request(ids=[0, 1])
        if _lacking(part, rm.CausalLM()) is not None or part.slug in ("acu", "sisa", "s3t"):
            with pytest.raises((BadInput, Refused)):
                life.forget(asked, by=spec)
            assert life.content_digest() == digest
        else:
            receipt = life.forget(asked, by=spec)
            assert receipt.ids.array.tolist() == [0, 1]
            assert receipt.states["weights"] == ("deleted" if part.slug == "retrain" else "holds")
