"""What a method remembers is derived from its attributes: state, bytes, ids held, purge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput, Corrupt
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.keep.replay import Replay
from remanence.nn.anchor import QuadraticAnchor
from remanence.nn.buffer import Buffer
from remanence.train.loop import learn
from remanence.train.resolve import check_keepers, named, resolve, resolve_all
from remanence.train.roles import Keeper, Learner, Method, head_rows
from remanence.train.update import hooks
from tests.train.helpers import Spy, blobs, network, same, update


@dataclass
class Rich(Keeper):
    """One of everything that can be remembered."""

    strength: float = knob(1.0, "weight", low=0)
    names: list[str] = knob([], "a knob, not a memory")

    def setup(self) -> None:
        self.buffer = Buffer(capacity=4)
        self.count = 0
        self.teacher = nn.Linear(2, 1, bias=False)
        self.prototypes = {"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.float64)]}
        self.twice = self.prototypes["a"]

    def forgot(self, u: Any, ids: Ids) -> None: ...


def filled() -> Rich:
    rich = Rich()
    rows = {"x": torch.rand(3, 2), "y": torch.tensor([0, 1, 0]), "id": torch.tensor([5, 6, 7])}
    rich.buffer.add(rows, torch.Generator().manual_seed(0))
    rich.count, rich.prototypes["a"][:] = 3, 1.5
    return rich


def test_bytes_are_every_tensor_once() -> None:
    rows = 4 * (2 * 4 + 8 + 8)  # the buffer's whole capacity: x, y, id
    assert filled().bytes() == rows + 2 * 4 + 3 * 4 + 2 * 8  # `twice` shares storage with a prototype
    assert Rich().bytes() == 2 * 4 + 3 * 4 + 2 * 8


def test_holds_and_purge() -> None:
    rich = filled()
    asked = Ids([5, 9, 100])
    assert rich.holds(asked) == Ids([5])
    rich.inputs = Ids([9])  # the weights that made the teacher had seen 9
    assert rich.holds(asked) == Ids([5, 9])
    rich.purge(asked)
    assert rich.buffer.ids == Ids([6, 7]) and rich.holds(asked) == Ids([9])
    plain = Replay()
    plain.inputs = Ids([9])
    assert not plain.holds(asked)  # records only: what the weights saw is not in it


def test_state_survives_a_crash_and_scratch_does_not() -> None:
    rich = filled()
    rich._scratch = torch.ones(1)
    state = rich.state_dict()
    assert set(state) == {"buffer", "count", "teacher", "prototypes", "twice"}
    fresh = Rich()
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state) and fresh.count == 3 and fresh.buffer.ids == Ids([5, 6, 7])
    del state["buffer"]
    with pytest.raises(Corrupt, match="buffer"):
        Rich().load_state_dict(state)


def test_memory_made_during_life_is_restored_into_a_new_object_and_gone_from_one_saved_before() -> None:
    late = Spy()
    before = late.state_dict()
    late.mean = torch.ones(2)
    other = Spy()
    other.load_state_dict(late.state_dict())
    assert torch.equal(other.mean, torch.ones(2))
    other.load_state_dict(before)
    assert not hasattr(other, "mean")


def test_scratch_is_gone_after_the_event() -> None:
    @dataclass
    class Scratch(Keeper):
        seen: list[int] = field(default_factory=list)

        def begin(self, u: Any) -> None:
            self._now = torch.ones(1)
            self.memory = torch.ones(1)

        def end(self, u: Any) -> None:
            self.seen.append(int(hasattr(self, "_now")))

    keeper = Scratch()
    learn(update(network(), blobs(20), [keeper]))
    assert keeper.seen == [1] and not hasattr(keeper, "_now") and hasattr(keeper, "memory")


def test_only_hooks_that_exist_are_called_and_none_of_an_inert_part() -> None:
    rich, spy = Rich(strength=0.0), Spy()
    assert rich.inert and not Rich().inert and not spy.inert
    assert hooks([rich, spy], "loss") == [] and hooks([rich, spy], "after") == [spy.after]
    assert Replay(batch_size=0).inert and Replay(policy="reservoir", capacity=0).inert and not Replay().inert


def test_spec_builds_an_equal_method() -> None:
    made = Replay(per_class=3, batch_size=8)
    assert made.spec() == {"replay": {"per_class": 3, "capacity": None, "batch_size": 8, "policy": "class-balanced"}}
    assert resolve("keep", made.spec(), Keeper) == made


def test_resolving_and_names() -> None:
    both = resolve_all("keep", ["replay", {"l2": {"strength": 3}}, "replay"], Keeper)
    assert [keeper.slug for keeper in both] == ["replay", "l2", "replay"] and both[1].strength == 3  # type: ignore[attr-defined]
    assert list(named(both, "keep")) == ["keep/replay", "keep/l2", "keep/replay#2"]
    assert resolve_all("keep", None, Keeper) == [] and resolve_all("keep", both[0], Keeper) == [both[0]]
    for wrong, message in (
        ({"l2": {}, "ewc": {}}, "one method"),
        ({"l2": 3}, "mapping"),
        (7, "int"),
        (Learner(), "no Keeper"),
    ):
        with pytest.raises(BadInput, match=message):
            resolve("keep", wrong, Keeper)


def test_a_keeper_of_computed_values_that_cannot_rebuild_them_is_refused() -> None:
    class Teaches(Keeper):
        def setup(self) -> None:
            self.logits = torch.zeros(3)

    class Anchors(Keeper):
        def setup(self) -> None:
            self.anchor = QuadraticAnchor()

    with pytest.raises(BadInput, match="teach forgotten data back"):
        check_keepers([Teaches()])
    with pytest.raises(BadInput, match="teach forgotten data back"):
        check_keepers([Anchors()])
    check_keepers([Rich(), Replay()])


def test_head_rows_and_growth_by_the_default_learner() -> None:
    model = network(2)
    u = update(model, blobs(), labels=(0, 1, 2))
    structure = u.owner.structure(u)
    assert structure["rows"] == 1
    assert head_rows(u.owner.attach(model, structure)) == 3 and u.owner.structure(u) == {}


def test_a_method_checks_its_knobs_when_made() -> None:
    with pytest.raises(BadInput, match="strength=-1"):
        Rich(strength=-1)
    assert isinstance(Rich(), Method) and isinstance(Rich().twice, Tensor)
