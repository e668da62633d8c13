"""An event without epochs: what a network knows already is told to the life, and trained on by nobody."""

from __future__ import annotations

import torch

import remanence as rm
from remanence.models import mlp


def test_rows_that_are_only_shown_are_in_the_books_and_old_data_from_then_on() -> None:
    stream = rm.data.split_digits(tasks=2)
    with rm.Life(mlp(64, [16])) as life:
        body = life.model.body[1].weight.clone()
        event = life.learn(stream[0], epochs=0)
        assert event.steps == 0 and torch.equal(life.model.body[1].weight, body)
        assert life._books.consumed == stream[0].train.ids
        assert any(
            trace.holder == "weights" and trace.state == "holds" for trace in life.trace([int(stream[0].train.id[0])])
        )
        life.learn(stream[1], epochs=20, batch_size=32, learner="joint")
        assert life.measure()["tasks"][0] > 0.5  # learned together with what was only shown
        receipt = life.forget(rm.Request(classes=[0]), by="retrain")
        assert receipt.status == "done" and len(receipt.ids) == int((stream[0].train["y"] == 0).sum())


def test_what_is_shown_fills_the_buffers_that_batches_would_fill() -> None:
    stream = rm.data.split_digits(tasks=2)
    for keep in (
        {"replay": {"policy": "reservoir", "capacity": 30}},
        {"replay": {"per_class": 5}},
        {"agem": {"capacity": 30}},
        {"i-lora": {"capacity": 30}},
    ):
        with rm.Life(mlp(64, [16]), keep=[keep]) as life:
            life.learn(stream[0], epochs=0)
            assert len(life._state.keepers[0].buffer) == (25 if "per_class" in str(keep) else 30), keep
