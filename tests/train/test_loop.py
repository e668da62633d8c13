"""The one loop: equal to a bare loop, undisturbed by parts that do nothing, true to its books."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remanence import catalogue
from remanence.core.errors import BadInput, NotFinite
from remanence.core.ids import Ids
from remanence.core.problem import Classification
from remanence.data import Request
from remanence.keep.ewc import EWC
from remanence.keep.l2 import L2
from remanence.keep.replay import Replay
from remanence.learn.finetune import Finetune
from remanence.train.loop import forget, learn
from remanence.train.roles import Forgetter, Keeper, Learner, Metric, Outcome, Step, Where
from remanence.train.schedules import Cosine
from remanence.train.settings import Settings
from remanence.train.update import Update
from tests.train.helpers import Spy, bare, blobs, network, same, update, weights


def flat(lists: Iterable[list[int]]) -> list[int]:
    return [item for some in lists for item in some]


SGD = {"sgd": {"momentum": 0.9, "weight_decay": 0.01}}


# ------------------------------------------------------------------------------------------- equal to a bare loop


@pytest.mark.parametrize("optimizer", [SGD, "adamw", {"sgd": {"fused": False, "nesterov": True, "momentum": 0.5}}])
@pytest.mark.parametrize(
    "how", [{}, {"clip": 0.1}, {"accumulate": 3}, {"schedule": {"cosine": {"warmup": 2}}}, {"clip": 0.2, "accumulate": 2, "schedule": "cosine"}]
)  # fmt: skip
def test_our_loop_is_a_bare_loop_bit_for_bit(optimizer: Any, how: dict[str, Any]) -> None:
    data, ours, theirs = blobs(83), network(), network()
    u = update(ours, data, epochs=2, batch_size=16, lr=0.05, optimizer=optimizer, **how)
    learn(u)
    schedule = how.get("schedule")
    factor = None
    if schedule:
        cosine = Cosine(**(schedule["cosine"] if isinstance(schedule, dict) else {}))
        factor = lambda step, total: cosine.factor(step, total, 0)  # noqa: E731
    built = Settings(lr=0.05, optimizer=optimizer).build(theirs.parameters())
    steps = bare(theirs, data, built, 2, 16, clip=how.get("clip"), accumulate=how.get("accumulate", 1), factor=factor)
    assert same(ours, theirs) and not same(ours, network())
    assert u.steps_done == steps


class Every(Metric):
    """Looks at everything a metric could disturb."""

    every = 2

    def value(self, c: Any) -> dict[str, float]:
        torch.rand(7)
        c.model(torch.randn(4, 6))
        return {"x": c.evaluate(blobs(20))["accuracy"]}


def noisy() -> nn.Module:
    """A network whose forward draws random numbers and keeps running statistics."""
    return network(norm=True, dropout=0.3)


IDLE = [
    [Replay(batch_size=0)], [Replay(per_class=0)], [Replay(capacity=0)], [L2(strength=0.0)], [EWC(strength=0.0)], [Spy()],
    [Spy(), L2(strength=0.0), EWC(strength=0)],
]  # fmt: skip


@pytest.mark.parametrize("parts", IDLE, ids=lambda parts: "+".join(type(part).__name__ for part in parts))
def test_strength_zero_changes_no_bit(parts: list[Keeper]) -> None:
    plain, kept = noisy(), noisy()
    for number, data in enumerate((blobs(60), blobs(50, seed=4, at=100))):
        learn(update(plain, data, epochs=2, batch_size=16, optimizer=SGD, lr=0.05, event=f"learn/{number}"))
        learn(update(kept, data, parts, epochs=2, batch_size=16, optimizer=SGD, lr=0.05, event=f"learn/{number}"))
    assert same(plain, kept)


WITH_STRENGTH = [p.slug for p in catalogue.parts(verb="keep") if "strength" in p.load().__dataclass_fields__]


@pytest.mark.parametrize("slug", WITH_STRENGTH)  # the others' idle knobs stand in the rows of tests/contract
def test_strength_zero_of_every_listed_keeper_changes_no_bit(slug: str) -> None:
    cls, knobs = catalogue.find("keep", slug).load(), {"strength": 0.0}
    plain, kept, keeper = noisy(), noisy(), cls(**knobs)
    for number, data in enumerate((blobs(60), blobs(50, seed=4, at=100))):
        for model, parts in ((plain, []), (kept, [keeper])):
            learn(update(model, data, parts, epochs=2, batch_size=16, lr=0.05, event=f"learn/{number}"))
    assert same(plain, kept)


def test_a_metric_in_the_loop_changes_no_bit_and_is_called_every_k_steps() -> None:
    plain, measured = noisy(), noisy()
    metric, calls = Every(), []
    original = metric.value
    metric.value = lambda c: (calls.append(c.step), original(c))[1]  # type: ignore[method-assign, func-returns-value]
    learn(update(plain, blobs(), epochs=2, batch_size=16))
    learn(update(measured, blobs(), epochs=2, batch_size=16, metrics=[metric]))
    assert same(plain, measured)
    assert calls == [2, 4, 6, 8, 10, 12]


class SecondSpy(Spy):
    name = "second"


def test_adding_a_part_never_changes_anothers_draws() -> None:
    alone, beside = Spy(draws=True), Spy(draws=True)
    learn(update(network(), blobs(), [alone], epochs=3, batch_size=32))
    replay = Replay(per_class=5)
    replay.buffer.add(blobs(30, at=500).batch(torch.arange(30)), torch.Generator().manual_seed(0))
    learn(update(network(), blobs(), [replay, beside], epochs=3, batch_size=32))
    other = SecondSpy(draws=True)
    learn(update(network(), blobs(), [other, alone2 := Spy(draws=True)], epochs=3, batch_size=32))
    assert alone.drawn == beside.drawn == alone2.drawn and len(set(alone.drawn + other.drawn)) == 18
    assert [batch[:26] for batch in alone.batches] == [batch[:26] for batch in beside.batches]


# ------------------------------------------------------------------------------------------- what it leaves alone


def test_flags_and_the_global_generator_are_as_before() -> None:
    model = noisy()
    model.body[2].eval()
    model.body[1].weight.requires_grad_(False)
    modes, grads = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    frozen, state = model.body[1].weight.clone(), torch.random.get_rng_state()

    class Head(Where):
        def trainable(self, u: Update) -> list[str]:
            return ["head.weight"]

    before = weights(model)
    learn(update(model, blobs(), [Head(), Spy(draws=True)], epochs=2))
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(state, torch.random.get_rng_state()) and torch.equal(frozen, model.body[1].weight)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"head.weight"}
    assert all(p.grad is None for p in model.parameters())


def test_flags_are_restored_when_a_run_fails() -> None:
    model = network()
    model.eval()

    class Fails(Keeper):
        def after(self, u: Update, batch: Any) -> None:
            raise RuntimeError("on purpose")

    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"):
        learn(update(model, blobs(), [Fails()]))
    assert not any(m.training for m in model.modules()) and torch.equal(state, torch.random.get_rng_state())


@dataclass
class Half(Where):
    """Lets the entries of its masks move; its projection would move all of them."""

    masks: Any = None

    def mask(self, u: Update) -> dict[str, Tensor]:
        return dict(self.masks)

    def project(self, u: Update, params: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        for p in params.values():
            p.add_(0.01)

    def begin(self, u: Update) -> None:
        self._start = weights(u.model)

    def after(self, u: Update, batch: Any) -> None:
        for name, mask in self.masks.items():
            now = u.model.get_parameter(name)
            assert torch.equal(now[~mask], self._start[name][~mask]), (u.step, name)


def test_masked_entries_keep_their_bits_under_momentum_weight_decay_and_projection() -> None:
    for optimizer in (SGD, "adamw", {"adamw": {"weight_decay": 0.5}}):
        model = network()
        rng = torch.Generator().manual_seed(1)
        masks = {n: torch.rand(p.shape, generator=rng) < 0.5 for n, p in model.named_parameters() if n != "head.bias"}
        masks["head.weight"][:] = False

        learn(update(model, blobs(), epochs=2, optimizer=optimizer, lr=0.05))  # so that no entry is zero or fresh
        before = weights(model)
        learn(
            update(
                model, blobs(), [Half(masks)], epochs=3, batch_size=16, optimizer=optimizer, lr=0.05, event="learn/1"
            )
        )
        for name, p in model.named_parameters():
            fixed = ~masks[name] if name in masks else torch.zeros_like(p, dtype=torch.bool)
            assert torch.equal(p[fixed], before[name][fixed]), (optimizer, name)
            assert bool((p[~fixed] != before[name][~fixed]).all()), (optimizer, name)


def test_lookahead_is_the_step_taken_later_and_moves_nothing() -> None:
    seen = []

    class Looks(Keeper):
        def gradient(self, u: Update) -> None:
            before, state = weights(u.model), copy.deepcopy(u.optimizers["main"].state_dict())
            self._change = u.lookahead()
            assert same(before, weights(u.model)) and same(state, u.optimizers["main"].state_dict())
            assert same(u.lookahead(), self._change)

        def project(self, u: Update, params: dict[str, Tensor], before: dict[str, Tensor]) -> None:
            seen.append(same([p - before[n] for n, p in params.items()], self._change))

    for optimizer in (SGD, "adamw", "adam"):
        plain, looked = network(), network()
        learn(update(plain, blobs(), epochs=2, batch_size=32, optimizer=optimizer))
        learn(update(looked, blobs(), [Looks()], epochs=2, batch_size=32, optimizer=optimizer))
        assert same(plain, looked)
    assert len(seen) == 18 and all(seen)


# ------------------------------------------------------------------------------------------- steps and orders


def test_hooks_are_called_in_the_documented_order() -> None:
    spy = Spy()
    learn(update(network(), blobs(32), [spy], batch_size=16))
    step = ["prepare", "gradient", "project", "after"]
    assert spy.calls == ["begin", *step, *step, "end"]


def test_a_step_of_none_moves_nothing_and_calls_no_step_hook() -> None:
    class Looks(Learner):
        def steps(self, u: Update, batch: Any) -> Iterator[Step]:
            yield Step(None)

    model, spy = network(), Spy()
    before = weights(model)
    u = update(model, blobs(32), [spy], Looks(), batch_size=16)
    consumed = learn(u)
    assert same(before, weights(model)) and u.steps_done == 0
    assert spy.calls == ["begin", "prepare", "after", "prepare", "after", "end"]
    assert consumed.new == blobs(32).ids  # looked at, hence consumed


def test_several_steps_and_several_optimizers() -> None:
    class Two(Learner):
        def parameters(self, u: Update) -> list[dict[str, Any]]:
            return [{"params": [u.model.head.weight], "name": "head", "optimizer": "sgd", "lr": 0.25}]

        def steps(self, u: Update, batch: Any) -> Iterator[Step]:
            u.model.head.weight.grad = None
            first = weights(u.model)
            yield Step(self.objective(u, batch), by="head")
            now = weights(u.model)
            assert {n for n in now if not torch.equal(first[n], now[n])} == {"head.weight"}
            grad = u.model.head.weight.grad
            torch.testing.assert_close(now["head.weight"], first["head.weight"] - 0.25 * grad, rtol=0, atol=1e-7)
            yield Step(self.objective(u, batch), by="main")
            assert torch.equal(u.model.head.weight, now["head.weight"])
            assert not torch.equal(u.model.body[1].weight, now["body.1.weight"])

    u = update(network(), blobs(32), (), Two(), batch_size=16, optimizer=SGD)
    learn(u)
    assert u.steps_done == 4


def test_an_order_hook_may_choose_drop_and_repeat_rows_or_give_the_batches() -> None:
    class Mine(Keeper):
        def order(self, u: Update, index: Tensor) -> Any:
            return torch.arange(10) if u.epoch == 0 else [torch.tensor([3, 3, 5]), torch.tensor([7])]

    spy = Spy()
    data = blobs(30, at=100)
    consumed = learn(update(network(), data, [Mine(), spy], epochs=2, batch_size=8))
    expected = [list(range(100, 108)), [108, 109], [103, 103, 105], [107]]
    assert spy.batches == expected
    assert consumed.new == Ids(range(100, 110)) and not consumed.replayed


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    spy = Spy()
    learn(update(network(), blobs(50), [spy], epochs=3, batch_size=16))
    epochs = [flat(spy.batches[i : i + 4]) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


# ------------------------------------------------------------------------------------------- nested phases, lineage


def test_nested_phases_keep_the_outer_run_whole() -> None:
    extra = blobs(20, seed=8, at=700)

    class Nested(Keeper):
        def after(self, u: Update, batch: Any) -> None:
            if u.step == 2:
                state = (u.step, u.epoch, id(u.optimizers["main"]), u.phase)
                before = weights(u.model)
                u.run(
                    data=extra,
                    parts=[],
                    epochs=1,
                    batch_size=4,
                    trainable=["head.weight"],
                    replay=True,
                    lr=0.1,
                    schedule="cosine",
                )
                assert (u.step, u.epoch, id(u.optimizers["main"]), u.phase) == state
                moved = {n for n, v in weights(u.model).items() if not torch.equal(v, before[n])}
                assert moved == {"head.weight"}

    spy = Spy()
    u = update(network(), blobs(60), [Nested(), spy], batch_size=16)
    consumed = learn(u)
    assert spy.calls.count("after") == 4  # the phase ran without the event's parts
    assert u.steps_done == 4 + 5
    assert consumed.new == blobs(60).ids and consumed.replayed == extra.ids


def test_two_phases_of_one_event_draw_different_orders() -> None:
    class Twice(Finetune):
        def learn(self, u: Update) -> None:
            u.run()
            u.run()

    spy = Spy()
    learn(update(network(), blobs(30), [spy], Twice(), batch_size=30))
    assert sorted(spy.batches[0]) == sorted(spy.batches[1]) and spy.batches[0] != spy.batches[1]


def test_lineage_tells_new_from_replayed() -> None:
    replay, old, data = Replay(per_class=4), blobs(30, at=500), blobs(40)
    learn(update(network(), old, [replay]))
    held = replay.buffer.ids
    consumed = learn(update(network(), data, [replay], event="learn/1", epochs=2, batch_size=8))
    assert consumed.new == data.ids
    assert consumed.replayed == held and len(held) == 12
    consumed = learn(update(network(), data, [Replay(per_class=4)], event="learn/1"))
    assert consumed.new == data.ids and not consumed.replayed


def test_rows_that_replace_others_are_in_the_lineage_too() -> None:
    old = blobs(9, at=500).batch(torch.arange(9))

    class Swaps(Keeper):
        def prepare(self, u: Update, batch: Any) -> Any:
            joined = u.extend(batch, old, self)
            return {name: column[-len(batch["id"]) :] for name, column in joined.items()}

    consumed = learn(update(network(), blobs(30), [Swaps()], batch_size=10))
    assert consumed.replayed == Ids(range(500, 509)) and consumed.new == blobs(30).ids


def test_fit_trains_another_module_without_keepers() -> None:
    inner, spy, other = network(), Spy(), nn.Linear(6, 1)

    class Fits(Finetune):
        def learn(self, u: Update) -> None:
            before = weights(u.model)
            u.fit(
                other, u.data("task"), lambda m, b: (m(b["x"]).squeeze(1) - b["y"]).square().mean(), epochs=30, lr=0.05
            )
            assert same(before, weights(u.model))

    start = float((other(blobs()["x"]).squeeze(1) - blobs()["y"]).detach().square().mean())
    consumed = learn(update(inner, blobs(), [spy], Fits()))
    assert float((other(blobs()["x"]).squeeze(1) - blobs()["y"]).detach().square().mean()) < 0.5 * start
    assert spy.calls == ["begin", "end"] and consumed.new == blobs().ids


# ------------------------------------------------------------------------------------------- drives of forget runs


@dataclass
class Drives(Forgetter):
    """Writes down what a drive hands out."""

    drive: str = "retain"

    def forget(self, u: Update, request: Request) -> Outcome:
        self.pairs: list[tuple[list[int], list[int]]] = []
        u.run(drive=self.drive)
        return Outcome()

    def objective(self, u: Update, forget: Any, retain: Any) -> Tensor | None:
        both = [batch["id"].tolist() if batch else [] for batch in (forget, retain)]
        self.pairs.append((both[0], both[1]))
        return sum(u.problem.loss(u.out(batch), batch) for batch in (forget, retain) if batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("drive", ["retain", "forget", "sequence", "mixed"])
def test_a_drive_covers_its_sets_once_per_epoch(drive: str) -> None:
    gone, left = blobs(22, at=1000), blobs(50)
    sets = {"forget": gone, "retain": left}
    by, spy = Drives(drive=drive), Spy()
    u = Update(model=network(), problem=Classification(), owner=by, settings=Settings(epochs=2, batch_size=8), data=sets.__getitem__,
               parts=[spy], labels=[0, 1, 2], event="forget/0", kind="forget")  # fmt: skip
    forget(u, Request(ids=gone.ids))
    half = len(by.pairs) // 2
    for epoch in (by.pairs[:half], by.pairs[half:]):
        forgotten = sorted(flat(f for f, _ in epoch))
        retained = sorted(flat(r for _, r in epoch))
        sizes = [len(f) + len(r) for f, r in epoch]
        if drive != "retain":
            assert forgotten == gone.id.tolist()
        if drive != "forget":
            assert retained == left.id.tolist()
        if drive in ("retain", "forget"):  # paired with batches of the other set, all along
            assert all(f and r for f, r in epoch)
            assert len(epoch) == (7 if drive == "retain" else 3)
        if drive == "sequence":
            assert [bool(f) for f, _ in epoch] == [True] * 3 + [False] * 7 and all(not (f and r) for f, r in epoch)
        if drive == "mixed":
            assert sizes == [8] * 9 and any(f and r for f, r in epoch)
    assert u.steps_done == len(by.pairs)
    assert not u.consumed.new and u.consumed.replayed == Ids(flat(r for _, r in by.pairs))
    shown = [ids for ids in spy.batches if ids]  # keepers see retain batches only
    assert all(max(ids) < 1000 for ids in shown)


def test_drives_without_retained_data_are_refused_and_unknown_ones_too() -> None:
    gone = blobs(8)
    sets = {"forget": gone, "retain": gone.without(gone.ids)}
    for drive, message in (("retain", "no retained data"), ("mixed", "no retained data"), ("backwards", "not one of")):
        u = Update(model=network(), problem=Classification(), owner=Drives(drive=drive), settings=Settings(), data=sets.__getitem__,
                   labels=[0, 1, 2], kind="forget")  # fmt: skip
        with pytest.raises(BadInput, match=message):
            forget(u, Request(ids=gone.ids))


# ------------------------------------------------------------------------------------------- failure


@pytest.mark.parametrize("bad", [0, 5, 64, 70])
def test_a_loss_that_is_not_finite_names_the_first_such_step(bad: int) -> None:
    class Breaks(Finetune):
        def objective(self, u: Update, batch: Any) -> Tensor:
            return super().objective(u, batch) * (math.nan if u.step >= bad else 1.0)

    with pytest.raises(NotFinite, match=rf"nan at step {bad} of learn/0"):
        learn(update(network(), blobs(80), (), Breaks(), batch_size=1))


def test_a_loss_that_is_not_finite_under_accumulation_names_its_step() -> None:
    class Breaks(Finetune):
        def objective(self, u: Update, batch: Any) -> Tensor:
            return super().objective(u, batch) * (math.inf if u.step >= 6 else 1.0)

    with pytest.raises(NotFinite, match="at step 6 of"):
        learn(update(network(), blobs(80), (), Breaks(), batch_size=2, accumulate=2))


def test_zero_epochs_and_unknown_trainable_names() -> None:
    model = network()
    before = weights(model)
    u = update(model, blobs(), [Spy()], epochs=0)
    assert not learn(u).new and same(before, weights(model))

    class Wrong(Where):
        def trainable(self, u: Update) -> list[str]:
            return ["haed.weight"]

    with pytest.raises(BadInput, match="haed"):
        learn(update(model, blobs(), [Wrong()]))


def test_carried_optimizer_state_equals_one_long_optimizer() -> None:
    data, ours, theirs = blobs(48), network(), network()
    state: dict[str, Any] = {}
    optimizer = Settings(lr=0.05, optimizer=SGD).build(theirs.parameters())
    for number in range(2):
        u = update(ours, data, epochs=2, batch_size=16, lr=0.05, optimizer=SGD, event=f"learn/{number}")
        u.carried = dict(state)
        learn(u)
        state = u.carried
        bare(theirs, data, optimizer, 2, 16, event=f"learn/{number}")
    assert same(ours, theirs)


def test_a_last_batch_of_one_row_passes_batch_norm():
    """It has no statistics of its own: the running ones serve, and they do not move for it."""
    from remanence.data import Examples
    from remanence.models import mlp
    from tests.forget.helpers import learner_update, split

    train = split()[0]
    odd: Examples = train.select(torch.arange(33))
    model = mlp(64, [16], 10, norm=True)
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d))
    learn(learner_update(model, odd, batch_size=32, lr=1e-3))
    assert int(norm.num_batches_tracked) == 1 and all(torch.isfinite(p).all() for p in model.parameters())
    assert norm.training and not norm._forward_hooks and not norm._forward_pre_hooks
