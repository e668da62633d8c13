"""A plain PyTorch loop with `rm.guard` gives the same bits as a life's learn events."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import remanence as rm
from remanence import catalogue
from remanence.core.errors import BadInput, Corrupt, UnknownName
from remanence.core.ids import Ids
from remanence.core.problem import Classification
from remanence.core.rng import generator
from remanence.data import Examples, Task
from remanence.keep.l2 import L2
from remanence.keep.replay import Replay
from remanence.learn.finetune import Finetune
from remanence.life.events import Recipe, learn_event
from remanence.life.state import State
from remanence.nn.heads import grow_head
from remanence.train.guard import OwnLoop
from remanence.train.roles import Keeper
from tests.lm import facts, tiny
from tests.train.helpers import Spy, blobs, network, same

OPTIMIZERS = {"sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01, "fused": False}), "adamw": (torch.optim.AdamW, {"fused": True})}  # fmt: skip
LR = 0.05


@dataclass
class Half(Keeper):
    """Lets half of every step stand, and adds a pull on the output: the hooks that replay, l2 and gpm leave out."""

    def loss(self, u: Any, batch: dict[str, Tensor]) -> Tensor:
        return 0.1 * sum(p.square().sum() for p in u.parameters.values())  # type: ignore[no-any-return]

    def project(self, u: Any, params: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        for name, p in params.items():
            p.sub_(0.5 * (p - before[name]))


def protectors() -> list[Any]:
    return ["replay", {"l2": {"strength": 0.1}}, "gpm"]


def as_task(examples: Examples, number: int) -> Task:
    labels = tuple(examples["y"].unique().tolist())
    return Task(examples, examples, labels, tuple(map(str, labels)), number)


def our_life(
    model: nn.Module, keepers: list[Keeper], tasks: list[Examples], optimizer: str, carry: bool = False, **knobs: Any
) -> State:
    state = State(model, Finetune(), keepers)
    settings = {"epochs": 2, "batch_size": 16, "lr": LR, "optimizer": {optimizer: OPTIMIZERS[optimizer][1]}, **knobs}
    for number, examples in enumerate(tasks):
        recipe = Recipe(number, settings, carry=carry)
        learn_event(state, as_task(examples, number), recipe, problem=Classification(), seed=5, history=tasks[:number])
    return state


def built(name: str, model: nn.Module) -> torch.optim.Optimizer:
    cls, knobs = OPTIMIZERS[name]
    return cls(model.parameters(), lr=LR, **knobs)


def same_class_tasks() -> list[Examples]:
    return [blobs(75, seed=1), blobs(60, seed=2, at=100), blobs(53, seed=3, at=200)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_l2_and_gpm_in_three_added_lines_give_the_bits_of_our_loop(optimizer: str) -> None:
    model = network()
    tasks, epochs = same_class_tasks(), 2
    life = our_life(copy.deepcopy(model), rm_keepers(protectors()), tasks, optimizer, carry=True)
    step = built(optimizer, model)
    bare = copy.deepcopy(model)
    assert not same(life.model, bare)

    u = rm.guard(model, step, keep=protectors(), seed=5)  # added
    for number, examples in enumerate(tasks):
        with u.learn(examples):  # added
            for epoch in range(epochs):
                order = torch.randperm(len(examples), generator=generator(5, f"learn/{number}", "", "order", epoch))
                for rows in order.split(16):
                    batch = u.prepare(examples.batch(rows))  # added
                    loss = F.cross_entropy(model(batch["x"]), batch["y"]) + u.loss(batch)
                    step.zero_grad()
                    loss.backward()
                    step.step()

    assert same(model, life.model)
    assert same(u.state_dict()["keep"], {name: k.state_dict() for name, k in life.holders().items() if "keep/" in name})


def rm_keepers(specs: list[Any]) -> list[Keeper]:
    from remanence.train.resolve import resolve_all

    return resolve_all("keep", specs, Keeper)


def own_loop(
    u: OwnLoop, model: nn.Module, tasks: list[Examples], optimizer: str, epochs: int = 2, start: int = 0, clip: bool = False, accumulate: int = 1
) -> None:  # fmt: skip
    """A user's loop whose every task has its own optimizer, a head of fixed or growing width, and accumulation."""
    for examples in tasks[start:]:
        step = built(optimizer, model)
        with u.learn(examples, step):
            seen, count = u.classes.seen, 0
            for u.epoch in range(epochs):
                for rows in torch.randperm(len(examples), generator=u.rng("order")).split(16):
                    batch = u.prepare(examples.batch(rows))
                    logits = model(batch["x"])
                    if len(seen) < logits.shape[1]:
                        barred = torch.ones(logits.shape[1], dtype=torch.bool).index_fill(0, seen, False)
                        logits = logits.masked_fill(barred, -torch.inf)
                        loss = F.cross_entropy(logits, batch["y"], reduction="none").mean() + u.loss(batch)
                    else:
                        loss = F.cross_entropy(logits, batch["y"]) + u.loss(batch)
                    if count % accumulate == 0:
                        step.zero_grad()
                    (loss if accumulate == 1 else loss / accumulate).backward()
                    count += 1
                    if count % accumulate == 0:
                        step.step()


def class_tasks() -> list[Examples]:
    return [blobs(60, 2, seed=1), blobs(60, 2, seed=2, first=2, at=100), blobs(45, 2, seed=3, first=4, at=200)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", [{"replay": {"per_class": 7}}, {"replay": {"policy": "reservoir", "capacity": 20}}])
def test_new_classes_under_a_fixed_head_give_the_bits_of_our_loop(optimizer: str, policy: dict[str, Any]) -> None:
    keep = [policy, {"l2": {"strength": 0.1}}, {"ewc": {"strength": 5.0}}]
    model = network(6)
    life = our_life(copy.deepcopy(model), [*rm_keepers(keep), Half()], class_tasks(), optimizer)
    u = rm.guard(model, built(optimizer, model), keep=[*keep, Half()], seed=5)
    own_loop(u, model, class_tasks(), optimizer)
    assert same(model, life.model)
    assert u.classes.seen.tolist() == life.labels and u.life_step == life.steps


@pytest.mark.parametrize(("clip", "accumulate"), [(0.05, 1), (None, 2), (0.05, 3)])
def test_clipping_and_accumulation_give_the_bits_of_our_loop(clip: float | None, accumulate: int) -> None:
    keep = [{"replay": {"policy": "reservoir", "capacity": 20}}, {"l2": {"strength": 0.1}}]
    model, tasks = network(6), class_tasks()[:2]
    life = our_life(copy.deepcopy(model), rm_keepers(keep), tasks, "sgd", clip=clip, accumulate=accumulate)
    u = rm.guard(model, built("sgd", model), keep=keep, seed=5, clip=clip)
    own_loop(u, model, tasks, "sgd", accumulate=accumulate)
    assert same(model, life.model)


def test_a_head_that_the_user_grows() -> None:
    tasks, keep = class_tasks(), [{"replay": {"per_class": 7}}, {"l2": {"strength": 0.1}}]
    model = network(2)
    life = our_life(copy.deepcopy(model), rm_keepers(keep), tasks, "adamw")
    u = rm.guard(model, built("adamw", model), keep=keep, seed=5)
    for number in range(3):
        if number:
            from remanence.core.rng import seed_of

            grow_head(model, 2, seed_of(5, f"learn/{number}", "", "head"))
        own_loop(u, model, tasks[: number + 1], "adamw", start=number)
    assert same(model, life.model)


def test_save_and_go_on_between_tasks() -> None:
    keep = [{"replay": {"per_class": 5}}, {"l2": {"strength": 0.1}}, "ewc"]
    whole = network(6)
    own_loop(rm.guard(whole, built("sgd", whole), keep=keep, seed=5), whole, class_tasks(), "sgd")

    first = network(6)
    u = rm.guard(first, built("sgd", first), keep=keep, seed=5)
    own_loop(u, first, class_tasks()[:1], "sgd")
    saved, values = copy.deepcopy(u.state_dict()), copy.deepcopy(first.state_dict())

    second = network(6, seed=9)
    second.load_state_dict(values)
    u = rm.guard(second, built("sgd", second), keep=keep, seed=5)
    u.load_state_dict(saved)
    assert len(u.parts[2].holds(Ids([3, 999]))) == 1  # ewc: computed by weights that saw example 3
    own_loop(u, second, class_tasks(), "sgd", start=1)
    assert same(second, whole)

    other = rm.guard(second, built("sgd", second), keep=["l2"])
    with pytest.raises(Corrupt, match="keep/replay"):
        other.load_state_dict(saved)


def test_keepers_of_no_strength_and_a_closed_guard_change_no_bit() -> None:
    def train(model: nn.Module, u: OwnLoop | None, step: torch.optim.Optimizer) -> nn.Module:
        data = blobs()
        for rows in torch.arange(90).split(16):
            batch = u.prepare(data.batch(rows)) if u else data.batch(rows)
            loss = F.cross_entropy(model(batch["x"]), batch["y"]) + (u.loss(batch) if u else 0)
            step.zero_grad()
            loss.backward()
            step.step()
        return model

    plain = network()
    train(plain, None, built("sgd", plain))
    guarded = network()
    step = built("sgd", guarded)
    u = rm.guard(guarded, step, keep=[Replay(batch_size=0), L2(strength=0.0)])
    with u.learn(blobs()):
        train(guarded, u, step)
    assert same(guarded, plain)
    spy = Spy()
    u = rm.guard(guarded, step, keep=[spy])
    with u.learn([0, 1, 2]):
        pass
    train(guarded, None, step)
    train(plain, None, step_of(plain, step))
    assert spy.calls == ["begin", "end"]


def step_of(model: nn.Module, like: torch.optim.Optimizer) -> torch.optim.Optimizer:
    made = built("sgd", model)
    made.load_state_dict(copy.deepcopy(like.state_dict()))
    return made


def test_hooks_in_order_once_per_step_and_only_while_a_task_is_open() -> None:
    model, spy = network(), Spy()
    step = built("sgd", model)
    u = rm.guard(model, step, keep=spy)
    batch = blobs(8).batch(torch.arange(8))
    for _ in range(2):
        with u.learn([0, 1, 2]):
            spy.calls.clear()
            for _ in range(2):
                prepared = u.prepare(batch)
                F.cross_entropy(model(prepared["x"]), prepared["y"]).backward()
                expected = [p.detach() - q for p, q in zip(model.parameters(), looked(u, model), strict=True)]
                step.step()
            assert [torch.allclose(e, e) for e in expected]
        assert spy.calls == ["prepare", "gradient", "project", "after"] * 2 + ["end"]
    step.step()
    assert spy.calls[-1] == "end"


def looked(u: OwnLoop, model: nn.Module) -> list[Tensor]:
    """`lookahead` fires no hook of ours."""
    calls = len(u.parts[0].calls)  # type: ignore[attr-defined]
    change = u.lookahead()
    assert len(u.parts[0].calls) == calls  # type: ignore[attr-defined]
    return change


def test_an_error_in_the_loop_leaves_no_hook_behind_and_the_task_unlearned() -> None:
    model, spy = network(), Spy()
    step = built("sgd", model)
    u = rm.guard(model, step, keep=spy)
    with pytest.raises(ZeroDivisionError), u.learn([0]):
        1 / 0  # noqa: B018
    step.step()
    assert spy.calls == ["begin"] and u.event == "learn/0" and not len(u.classes.seen)
    with u.learn([2, 0]):
        assert u.classes.new.tolist() == u.classes.seen.tolist() == [0, 2] and not len(u.classes.old)
    with u.learn([1, 0]):
        assert u.event == "learn/1"
        assert (u.classes.seen.tolist(), u.classes.new.tolist(), u.classes.old.tolist()) == ([0, 2, 1], [1], [0, 2])


def test_head_rows_of_old_classes_are_held_wherever_they_lie() -> None:
    model = network(6)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    u = rm.guard(model, step, keep={"l2": {"strength": 1.0}})
    with u.learn(blobs(20, 2, first=4)):
        pass
    with u.learn(blobs(20, 2, first=1)):
        with torch.no_grad():
            model.head.weight.add_(1.0)
        step.zero_grad()
        step.step()  # no loss: only the pull, 2 * strength * 1
        moved = model.head.weight.grad
    assert moved is not None and moved.sum(1).ne(0).tolist() == [False] * 4 + [True] * 2
    torch.testing.assert_close(moved[4:], torch.full_like(moved[4:], 2.0))


def test_batches_without_ids_and_problems_without_classes() -> None:
    model = network()
    step = built("sgd", model)
    u = rm.guard(model, step, keep={"replay": {"per_class": 4}})
    with u.learn(blobs(30, at=10)):
        assert set(u.prepare({"x": torch.zeros(2, 6), "y": torch.zeros(2, dtype=torch.int64)})) == {"x", "y", "origin"}
    with u.learn(blobs(30, seed=3, at=100)):
        batch = u.prepare({"x": torch.zeros(2, 6), "y": torch.zeros(2, dtype=torch.int64)})
    assert batch["x"].shape == (2 + 12, 6) and batch["origin"].tolist() == [0] * 2 + [1] * 12
    assert u.parts[0].holds(Ids.range(0, 200)) == u.parts[0].buffer.ids  # type: ignore[attr-defined]

    values = network(1)
    u = rm.guard(values, built("sgd", values), keep="l2", problem="regression")
    data = blobs(8).replace(y=torch.rand(8))
    with u.learn(data):
        assert not len(u.classes.seen) and u.data("task") is data
        u.prepare(data.batch(torch.arange(8)))


def test_wrong_use_is_refused_with_what_to_do() -> None:
    model = network()
    step = built("sgd", model)
    with pytest.raises(UnknownName, match="did you mean 'replay'"):
        rm.guard(model, step, keep=["replai"])

    @dataclass
    class Orders(Keeper):
        def order(self, u: Any, index: Tensor) -> Tensor:
            return index

    with pytest.raises(BadInput, match=r"Life\.learn"):
        rm.guard(model, step, keep=[Orders()])
    u = rm.guard(model, step, keep=["ewc"])
    batch = blobs(8).batch(torch.arange(8))
    with pytest.raises(BadInput, match=r"u\.learn"):
        u.prepare(batch)
    with pytest.raises(BadInput, match=r"u\.learn\(examples\)"), u.learn([0, 1]):
        u.prepare(batch)
    with u.learn(blobs(8)), pytest.raises(BadInput, match="still open"), u.learn([1]):
        pass
    with u.learn(blobs(8)):
        with pytest.raises(BadInput, match="between two tasks"):
            u.state_dict()
        u.prepare(batch)
        with pytest.raises(BadInput, match="closure"):
            step.step(lambda: 0.0)


def test_the_parts_that_a_guard_can_take_are_those_without_order_or_structure() -> None:
    model = network()
    for part in catalogue.parts(verb="keep"):
        cls = part.load()
        if any(hasattr(cls, hook) for hook in ("order", "structure", "parameters")):
            with pytest.raises(BadInput, match=part.slug):
                rm.guard(model, built("sgd", model), keep=[cls()])
        else:
            rm.guard(model, built("sgd", model), keep=[cls()])


def test_what_a_loop_can_get_wrong_is_said() -> None:
    model = network()
    with pytest.raises(BadInput, match="optimizer"):
        rm.guard(model, None, keep=["l2"])  # type: ignore[arg-type]
    u = rm.guard(model, built("sgd", model), keep=["l2"])
    for call in (lambda: u.loss({}), lambda: u.prepare({"x": torch.zeros(1, 6)})):
        with pytest.raises(BadInput, match="there is no task"):
            call()
    with pytest.raises(BadInput, match="labels such as"), u.learn((torch.zeros(3, 6), torch.zeros(3))):  # type: ignore[arg-type]
        pass
    with u.learn([0, 1]), pytest.raises(BadInput, match="a dict with 'x'"):
        u.prepare((torch.zeros(1, 6), torch.zeros(1)))  # type: ignore[arg-type]
    with pytest.raises(Corrupt, match=r"u\.state_dict"):
        u.load_state_dict({})


def test_a_loop_over_text_and_its_keepers_in_a_folder(tmp_path: Path) -> None:
    """Batches of text need no x and no y; one process or two, the weights are the same."""
    keep = [{"replay": {"policy": "reservoir", "capacity": 16, "per_class": None}}, {"ewc": {"strength": 10.0}}]
    tasks = [facts(20, 1), facts(20, 2, keys=1, first_id=100)]

    def train(u: OwnLoop, model: nn.Module, step: torch.optim.Optimizer, data: Examples) -> None:
        with u.learn(data):
            for rows in torch.arange(20).split(8):
                batch = u.prepare(data.batch(rows))
                loss = u.problem.loss(u.out(batch), batch) + u.loss(batch)
                step.zero_grad()
                loss.backward()
                step.step()

    whole = tiny()
    step = torch.optim.SGD(whole.parameters(), lr=0.1)
    u = rm.guard(whole, step, keep=keep, problem="causal-lm", seed=3)
    train(u, whole, step, tasks[0])
    u.save(tmp_path / "keepers")
    other = copy.deepcopy(whole)
    train(u, whole, step, tasks[1])
    step = torch.optim.SGD(other.parameters(), lr=0.1)
    v = rm.guard(other, step, keep=keep, problem="causal-lm", seed=3)
    v.load(tmp_path / "keepers")
    assert v.parts[0].holds(Ids.range(0, 200)) == v.parts[0].buffer.ids  # type: ignore[attr-defined]
    assert len(v.parts[0].buffer) == 16  # type: ignore[attr-defined]
    train(v, other, step, tasks[1])
    assert same(whole, other) and u.event == v.event == "learn/2"
    with u.learn(tasks[1]), pytest.raises(BadInput, match=r"a dict with \['input_ids'\]"):
        u.prepare({"input_ids": tasks[0]["input_ids"]})
