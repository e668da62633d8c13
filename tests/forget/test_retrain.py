"""What `retrain` asks of the life; that the result equals a life without the data is tested with lives."""

from __future__ import annotations

import pytest

from remanence.core.errors import BadInput
from remanence.data import Request
from remanence.forget.retrain import Retrain
from remanence.train.loop import forget
from tests.forget.helpers import class_ids, digits_model, forget_update, forgotten, split

TRAIN, _ = split()


@pytest.mark.fidelity(
    "forget/retrain",
    check="a fresh life that never had the data: weights, head, buffers and statistics",
    measured="equal in every bit",
    paper="the definition of exact unlearning",
)
def test_asks_the_lineage_for_a_model_without_the_request():
    asked, fresh, ids = [], digits_model(1), class_ids(TRAIN, 3)
    u = forget_update(digits_model(), Retrain(), TRAIN, ids, seed=7)
    u._retrain = lambda without, seed: asked.append((without, seed)) or fresh
    outcome = forget(u, Request(classes=[3]))
    assert asked == [(ids, 7)] and outcome.exact and outcome.model is fresh


def test_without_a_life_it_is_refused():
    with pytest.raises(BadInput, match="no lineage"):
        forgotten(digits_model(), Retrain(), TRAIN, class_ids(TRAIN, 3))
