"""MoRA: ranks that grow with every event, old ones that keep their bits, being rebuilt, and what it keeps beside LoRA."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.data import digits
from remanence.data.request import Request
from remanence.learn.finetune import Finetune
from remanence.life.life import Life
from remanence.life.state import State
from remanence.models import mlp
from remanence.nn.experts import MixtureOfRanks
from remanence.train.loop import learn
from remanence.train.roles import Where
from remanence.where.lora import LoRA
from remanence.where.mora_cl import MoRA
from tests.lm import tiny
from tests.where.helpers import moved, state, update
from tests.where.language import Speaker, books, halves

DATA = digits().select(torch.arange(200))


def mixtures(model: torch.nn.Module) -> list[MixtureOfRanks]:
    return [m for m in model.modules() if isinstance(m, MixtureOfRanks)]


@pytest.mark.parametrize("optimizer", [{"adamw": {"weight_decay": 0.5}}, {"sgd": {"momentum": 0.9, "weight_decay": 0.1}}])  # fmt: skip
def test_every_event_adds_ranks_and_freezes_those_before(optimizer):
    model = mlp(64, [32, 16], 10)
    before = model(DATA["x"])
    for event, rank in enumerate((3, 2, 4)):
        u = update(model, DATA, [MoRA(rank=rank, k=5)], event=f"learn/{event}", new=[], epochs=2, lr=0.01, optimizer=optimizer)  # fmt: skip
        model = u.model
        torch.testing.assert_close(model.eval()(DATA["x"]), before, atol=1e-5, rtol=0)  # adding them changes no answer
        old = state(model)
        learn(u)
        newest = {f"body.{i}.{p}.{event}" for i in (1, 3) for p in ("down", "up")}
        assert moved(old, model) == newest | {"head.weight", "head.bias"}
        before = model.eval()(DATA["x"]).detach()
    assert [[len(block) for block in m.down] for m in mixtures(model)] == [[3, 2, 4]] * 2
    assert all(up.any() for m in mixtures(model) for up in m.up)


def test_it_refuses_other_adapters_and_a_request_that_has_nothing_to_write_into():
    model = update(mlp(64, [32], 10), DATA, [LoRA()]).model
    with pytest.raises(BadInput, match="one kind"):
        update(model, DATA, [MoRA()], event="learn/1")
    u = update(mlp(64, [32], 10), DATA, [])
    with pytest.raises(BadInput, match="no ranks"):
        MoRA().trainable(u)


def test_a_request_may_write_into_all_ranks(tmp_path):
    tasks = halves(0, 200)
    life = Life(mlp(64, [32]), home=tmp_path / "life", where=[MoRA(rank=2)])
    for task in tasks:
        life.learn(task, epochs=2, lr=1e-2)
    before = state(life.model)
    life.forget(Request(classes=[1]), by="gradient-ascent", where=[MoRA(rank=2)])
    changed = moved(before, life.model)
    assert changed == {n for n in before if ".down." in n or ".up." in n} | {"head.weight", "head.bias"}
    assert all(len(m.down) == 2 for m in mixtures(life.model))
    life.close()


def test_rebuilt_from_json_and_tensors_with_the_same_bits_afterwards():
    speaker, tables = Speaker(), books(4, 16, 16, 16)
    part = MoRA(rank=3, k=4, tau=0.3, threshold=0.1, reserve=1, renormalise=True)
    for table in tables[:2]:
        speaker.learn(table, [part], epochs=2)
    packed = copy.deepcopy(speaker.state.pack())
    packed["structures"] = json.loads(json.dumps(packed["structures"]))
    again = speaker.copy()
    again.state = State(tiny(), Finetune())
    again.state.load(packed, tiny())
    assert not moved(state(speaker.model), again.model)
    first, second = mixtures(speaker.model)[0], mixtures(again.model)[0]
    for name in ("tau", "k", "threshold", "reserve", "renormalise", "skip_empty"):
        assert getattr(first, name) == getattr(second, name)
    for each in (speaker, again):
        each.learn(tables[2], [part], epochs=2)
    assert not moved(state(speaker.model), again.model)
    assert {len(m.down) for m in mixtures(again.model)} == {3} and len(mixtures(again.model)) == 14


def test_draws_depend_on_event_and_layer():
    one = update(mlp(64, [32, 32], 10), DATA, [MoRA(rank=2)]).model
    two = update(mlp(64, [32, 32], 10), DATA, [MoRA(rank=2, targets="body.3")]).model
    other = update(mlp(64, [32, 32], 10), DATA, [MoRA(rank=2)], event="learn/1").model
    assert torch.equal(one.body[3].down[0], two.body[3].down[0]) and isinstance(two.body[1], torch.nn.Linear)
    assert not torch.equal(one.body[3].down[0], other.body[3].down[0])


@pytest.mark.fidelity(
    "where/mora-cl",
    check="loops over inputs and ranks; tau without end is LoRA at 1/R; three sets of facts in a small Llama beside LoRA that learns as much",
    measured="1e-10; 1e-12; first set kept at 77 to 81 % against 46 to 49 %, second 41 to 50 % against 38 to 41 %, third learned to 89 to 91 % against 91 to 96 %",
    paper="- (no code was seen)",
    differs="reconstructed; empty ranks are left out of the sums outside training",
)
@pytest.mark.parametrize("seed", range(2))
def test_purpose_more_is_kept_than_by_lora_that_learns_as_much(seed):
    """All weights learn 64 facts; then 32 and 32 more through MoRA, or through LoRA of the same rank, its scale lowered until it just
    learns the last set. Seeds 0 to 2, sets one to three: MoRA 81 41 91, 79 45 89, 77 50 90 %; LoRA with alpha 3 49 38 96, 46 41 93, 46 40 91 %,
    with alpha 2 55 37 91, 52 39 80, 57 41 74 %, with alpha 16 34 35 100, 36 43 98, 35 42 98 %. The ranks of both later events share every
    input about equally here; a lower tau keeps them further apart: with 0.03 70 67 86, 75 63 85, 73 68 83 %."""
    tables = books(seed, 64, 32, 32)
    start = Speaker(seed, tables[0])
    found = []
    parts: list[Where] = [MoRA(), LoRA(rank=16, alpha=3.0)]
    for part in parts:
        speaker = start.copy()
        for table in tables[1:]:
            speaker.learn(table, [part])
        found.append([speaker.accuracy(table) for table in tables])
    (first, _, third), lora = found
    assert third > 0.8 and third > lora[2] - 0.12
    assert first > lora[0] + 0.2
