"""Schedules: their closed forms at the points that matter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from remanence.core.errors import BadInput, UnknownName
from remanence.train.roles import Learner
from remanence.train.schedules import SCHEDULES, Constant, Cosine, Linear, OneCycle, Schedule, schedule_of
from tests.train.helpers import blobs, network, update


def test_closed_forms() -> None:
    assert [Constant().factor(step, None, 0) for step in (0, 7)] == [1.0, 1.0]
    assert [Constant(warmup=3).factor(step, None, 0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [Linear().factor(step, 4, 0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [Linear(final=0.5).factor(step, 4, 0) for step in (0, 2, 4)] == [1.0, 0.75, 0.5]
    for step in range(11):
        assert Cosine().factor(step, 10, 0) == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 10)))
    assert Cosine(final=0.1).factor(10, 10, 0) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_warm_up_rises_to_one_then_the_rest_of_the_way_falls(kind: type) -> None:
    schedule = kind(warmup=4, final=0.2)
    factors = [schedule.factor(step, 20, 0) for step in range(25)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(factors[4:21]))
    assert factors[20:] == pytest.approx([0.2] * 5)  # steps beyond the total stay at the end
    assert schedule.factor(12, 20, 0) == pytest.approx(0.6)  # half-way


@pytest.mark.parametrize(
    "total, rise, start, final", [(40, 0.3, 0.04, 1e-4), (7, 0.5, 0.1, 0.01), (100, 0.1, 0.5, 1.0)]
)
def test_one_cycle_is_torchs(total: int, rise: float, start: float, final: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        1.0,
        total_steps=total,
        pct_start=rise,
        div_factor=1 / start,
        final_div_factor=1 / final,
        cycle_momentum=False,
    )
    for step in range(total):
        assert OneCycle(rise, start, final).factor(step, total, 0) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        ), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


def test_one_cycle_needs_a_total_and_bears_short_runs() -> None:
    with pytest.raises(BadInput, match="number of steps"):
        OneCycle().factor(0, None, 0)
    for total in (1, 2, 3):
        assert all(0 <= OneCycle().factor(step, total, 0) <= 1 for step in range(total + 2))


def test_the_loop_counts_steps_and_their_total() -> None:
    class Watches(Learner):
        def steps(self, u, batch):  # type: ignore[no-untyped-def]
            yield from super().steps(u, batch)
            rates.append((u.lr, u.optimizers["main"].param_groups[0]["lr"]))

    rates: list[tuple[float, float]] = []
    u = update(network(), blobs(60), (), Watches(), epochs=2, batch_size=16, lr=0.1, schedule="linear")
    u.run()
    assert rates == [(0.1 * (1 - step / 8),) * 2 for step in range(8)]


def test_resolving() -> None:
    assert schedule_of("cosine") == Cosine() and schedule_of({"linear": {"warmup": 2}}) == Linear(warmup=2)
    assert schedule_of({"cosine": None}) == Cosine() and schedule_of(kept := Linear()) is kept
    assert set(SCHEDULES) == {"constant", "cosine", "linear", "one-cycle"}
    with pytest.raises(UnknownName, match="did you mean 'cosine'"):
        schedule_of("cosin")
    with pytest.raises(UnknownName, match="did you mean 'warmup'"):
        schedule_of({"linear": {"warm_up": 2}})
    with pytest.raises(BadInput, match="final"):
        schedule_of({"linear": {"final": 2}})
    with pytest.raises(BadInput, match="number of steps"):
        Cosine().factor(0, None, 0)


def test_a_schedule_given_as_an_object_is_written_down_by_its_name() -> None:
    from remanence.learn.infinite_lr import InfiniteLR
    from remanence.train.schedules import spec_of

    for made in (Cosine(warmup=3), InfiniteLR(warmup=1, cooldown=2)):
        assert schedule_of(spec_of(made)) == made
    assert spec_of("cosine") == "cosine" and list(spec_of(InfiniteLR())) == ["infinite-lr"]

    class Own(Schedule):
        pass

    with pytest.raises(BadInput, match="Own has none"):
        spec_of(Own())
