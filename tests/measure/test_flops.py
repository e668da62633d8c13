"""Operations counted: closed forms of networks and of lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from remanence import Life
from remanence.core.problem import Batch
from remanence.data import split_digits
from remanence.keep.replay import Replay
from remanence.life.snapshots import weights_sha256
from remanence.measure.metrics.flops import Flops
from remanence.models import cnn, mlp
from remanence.nn.flops import flops
from remanence.train.roles import Learner, Step
from remanence.train.update import Update

STREAM = split_digits(tasks=5)
ROW = 2 * 64 * 32  # of the body of mlp(64, [32])


def lived(path, tasks=2, measure=None, learner=None, keep=(), model=None, **settings):
    settings = {"epochs": 3, "batch_size": 16, **settings}
    with Life(model or mlp(64, [32]), learner=learner, keep=keep, home=path, measure=[measure or Flops()]) as life:
        events = [life.learn(task, **settings) for task in STREAM.tasks[:tasks]]
        return events, weights_sha256(life.model.state_dict())


def close(found: float, expected: float) -> bool:
    return abs(found - expected) <= 1e-5 * expected  # a life keeps six digits


def test_forwards_have_their_closed_forms() -> None:
    x = torch.rand(7, 64)
    assert flops(lambda: mlp(64, [32, 16], 10)(x)) == 7 * 2 * (64 * 32 + 32 * 16 + 16 * 10)
    picture = torch.rand(3, 1, 8, 8)
    assert flops(lambda: cnn((1, 8, 8), [4, 8], 5)(picture)) == 3 * 2 * (
        8 * 8 * 9 * 1 * 4 + 4 * 4 * 9 * 4 * 8 + 2 * 2 * 8 * 5
    )


def test_a_training_step_is_three_forwards() -> None:
    """Of a layer whose inputs need gradients too: one product forward, two backward."""
    layer, x = nn.Linear(20, 30), torch.rand(8, 20, requires_grad=True)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        layer(x).square().sum().backward()
    assert counter.get_total_flops() == 3 * flops(lambda: layer(x)) == 3 * 8 * 2 * 20 * 30


@pytest.mark.fidelity(
    "measure/flops",
    check="the closed form of a perceptron's life, 3 * 2 * weights * rows * epochs; FlopCounterMode of a whole step; a life cut off inside an event",
    measured="equal, to the six digits that a life keeps",
    paper="-",
    differs="counted on one forward and times three, not from the compiled step",
)
def test_a_life_costs_what_its_weights_say(tmp_path) -> None:
    events, after = lived(tmp_path / "a")
    spent = [3 * (ROW + 2 * 32 * 2 * (k + 1)) * len(STREAM[k].train) * 3 for k in range(2)]
    assert close(events[0].measures["flops"], spent[0]) and "flops/1" not in events[0].measures
    assert close(events[1].measures["flops/0"], spent[0]) and close(events[1].measures["flops/1"], spent[1])
    assert close(events[1].measures["flops"], sum(spent))
    accumulated, _ = lived(tmp_path / "b", accumulate=2, batch_size=len(STREAM[0].train) // 2, tasks=1)
    assert close(accumulated[0].measures["flops"], spent[0])
    with Life(mlp(64, [32]), home=tmp_path / "c", measure=["bytes"]) as life:
        for task in STREAM.tasks[:2]:
            life.learn(task, epochs=3, batch_size=16)
        assert weights_sha256(life.model.state_dict()) == after  # counting moved nothing


def test_replayed_rows_and_further_steps_are_counted(tmp_path) -> None:
    @dataclass
    class Twice(Learner):
        """Two steps of each batch."""

        def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
            for _ in range(2):
                yield Step(self.objective(u, batch))

    plain = [event.measures for event in lived(tmp_path / "a")[0]]
    twice = [event.measures for event in lived(tmp_path / "b", learner=Twice())[0]]
    assert all(close(b["flops"], 2 * a["flops"]) for a, b in zip(plain, twice, strict=True))
    n, keeper = len(STREAM[1].train), Replay(batch_size=16)
    replayed = [event.measures for event in lived(tmp_path / "c", keep=[keeper])[0]]
    assert replayed[0] == plain[0]  # nothing is in the buffer yet
    more = 16 * -(-n // 16) * 3  # so many rows beside the task's own
    assert close(replayed[1]["flops/1"], plain[1]["flops/1"] * (3 * n + more) / (3 * n))


def test_looking_less_often_loses_what_comes_after_the_last_look(tmp_path) -> None:
    (exact,), _ = lived(tmp_path / "a", tasks=1)
    (rare,), _ = lived(tmp_path / "b", tasks=1, measure=Flops(every=4))
    batches = exact.steps
    full, rest = exact.measures["flops"], exact.steps % 4
    assert rest and abs(rare.measures["flops"] / full - (batches - rest) / batches) < 0.02


def test_a_life_cut_off_inside_an_event_counts_the_same(tmp_path) -> None:
    class Cut(KeyboardInterrupt):
        pass

    def stop(u: Update, _loss: float) -> None:
        if u.step > 40:
            raise Cut

    settings = {"epochs": 6, "batch_size": 16, "snapshot_every": 7}
    whole, _ = lived(tmp_path / "a", **settings)
    life = Life(mlp(64, [32]), home=tmp_path / "b", measure=[Flops()])
    life.learn(STREAM[0], **settings)
    life._progress = stop
    with pytest.raises(Cut):
        life.learn(STREAM[1], **settings)
    life.close()
    with Life.resume(tmp_path / "b", mlp(64, [32]), STREAM, parts=[Flops]) as again:
        assert again.learn(STREAM[1], **settings).measures == whole[1].measures
