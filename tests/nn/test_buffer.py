"""The buffer keeps what its policy says, answers for it, and leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from remanence.core.errors import BadInput
from remanence.core.holder import Holder
from remanence.core.ids import Ids
from remanence.nn.buffer import Buffer


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(ids, labels=None, width=3, **extra):
    ids = torch.as_tensor(ids, dtype=torch.int64)
    labels = ids % 5 if labels is None else torch.as_tensor(labels)
    x = ids.to(torch.float32).unsqueeze(1) + torch.arange(width) * 0.25
    return {"x": x, "y": labels, "id": ids, **extra}


def naive_reservoir(n, capacity, chunks, seed):
    """Algorithm R written row by row, with the same uniform numbers."""
    g, slots, seen = gen(seed), [], 0
    for chunk in chunks:
        free = min(max(capacity - len(slots), 0), len(chunk))
        u = torch.rand(len(chunk) - free, generator=g, dtype=torch.float64).tolist()
        for at, item in enumerate(chunk):
            seen += 1
            if len(slots) < capacity:
                slots.append(item)
            else:
                j = int(u[at - free] * seen)
                if j < capacity:
                    slots[j] = item
    return slots


@pytest.mark.parametrize("capacity,size", [(7, 64), (10, 3), (1, 50), (60, 1)])
def test_vectorised_reservoir_is_the_sequential_one(capacity, size):
    chunks = list(torch.arange(200).split(size))
    buffer, g = Buffer(capacity), gen(3)
    for chunk in chunks:
        buffer.add(rows(chunk), g)
    assert buffer.columns["id"].tolist() == naive_reservoir(200, capacity, [c.tolist() for c in chunks], 3)
    assert torch.equal(buffer.columns["x"], rows(buffer.columns["id"])["x"])
    assert buffer.offered == 200


def test_reservoir_is_uniform_over_the_stream():
    streams, n, capacity = 3000, 40, 8
    counts, g = np.zeros(n), gen(0)
    for _ in range(streams):
        buffer = Buffer(capacity)
        for chunk in torch.arange(n).split(13):
            buffer.add({"y": torch.zeros_like(chunk), "id": chunk}, g)
        counts[buffer.ids.array] += 1
    assert counts.sum() == streams * capacity
    expected = streams * capacity / n
    # Inclusions within a stream exclude one another, which shrinks the variance by (1 - capacity / n) * n / (n - 1).
    statistic = ((counts - expected) ** 2).sum() / (expected * (1 - capacity / n)) * (n - 1) / n
    assert stats.chi2.sf(statistic, n - 1) > 1e-3
    assert stats.chi2.cdf(statistic, n - 1) > 1e-3


def test_pairs_are_uniform_too():
    """Not only each row: first and last rows are in together as often as independence without replacement says."""
    streams, n, capacity, both, g = 3000, 12, 4, 0, gen(1)
    for _ in range(streams):
        buffer = Buffer(capacity)
        buffer.add({"y": torch.zeros(n, dtype=torch.int64), "id": torch.arange(n)}, g)
        both += len(buffer.holds(Ids([0, n - 1]))) == 2
    p = capacity * (capacity - 1) / (n * (n - 1))
    assert stats.binomtest(both, streams, p).pvalue > 1e-3


def test_class_balanced_shares_and_uniformity_within_a_class():
    streams, g = 2000, gen(2)
    counts = np.zeros(30)
    for _ in range(streams):
        buffer = Buffer(9, policy="class-balanced")
        buffer.add({"y": torch.zeros(30, dtype=torch.int64), "id": torch.arange(30)}, g)
        assert len(buffer) == 9
        buffer.add({"y": torch.tensor([1] * 20), "id": torch.arange(100, 120)}, g)
        assert torch.bincount(buffer.columns["y"]).tolist() == [5, 4]
        buffer.add({"y": torch.tensor([2] * 20), "id": torch.arange(200, 220)}, g)
        assert torch.bincount(buffer.columns["y"]).tolist() == [3, 3, 3]
        counts[(buffer.ids & Ids.range(0, 30)).array] += 1
    expected = streams * 3 / 30
    statistic = ((counts - expected) ** 2).sum() / (expected * (1 - 3 / 30)) * 29 / 30
    assert stats.chi2.sf(statistic, 29) > 1e-3


def test_per_class_cap_grows_with_labels_and_capacity_bounds_it():
    buffer = Buffer(per_class=4, policy="class-balanced")
    for label in range(3):
        buffer.add(rows(torch.arange(20) + 100 * label, torch.full((20,), label)), gen(label))
        assert torch.bincount(buffer.columns["y"]).tolist() == [4] * (label + 1)
        assert buffer.allocated == 4 * (label + 1)
    both = Buffer(10, per_class=4, policy="class-balanced")
    both.add(rows(torch.arange(100), torch.arange(100) % 5), gen())
    assert torch.bincount(both.columns["y"]).tolist() == [2] * 5


def test_an_id_is_held_once():
    buffer = Buffer(10)
    kept = buffer.add(rows([4, 4, 5]), gen())
    assert kept.tolist() == [True, False, True]
    assert not buffer.add(rows([5, 4]), gen()).any()
    assert len(buffer) == 2 and buffer.offered == 2


def test_kept_says_which_rows_are_in():
    buffer, g = Buffer(5), gen(8)
    for chunk in torch.arange(100).split(30):
        kept = buffer.add(rows(chunk), g)
        assert Ids(chunk[kept]) == buffer.holds(Ids(chunk))


def test_draw():
    buffer = Buffer(100)
    assert buffer.draw(3, gen()) == {}
    buffer.add(rows(torch.arange(60), torch.tensor([0] * 40 + [1] * 15 + [2] * 5)), gen())
    one, two = buffer.draw(20, gen(1)), buffer.draw(20, gen(1))
    assert torch.equal(one["id"], two["id"]) and len(Ids(one["id"])) == 20
    assert torch.equal(one["x"], rows(one["id"])["x"])
    assert len(buffer.draw(1000, gen())["id"]) == 60
    assert len(buffer.draw(0, gen())["id"]) == 0
    even = buffer.draw(15, gen(4), balanced=True)
    assert torch.bincount(even["y"]).tolist() == [5, 5, 5]
    assert torch.bincount(buffer.draw(30, gen(4), balanced=True)["y"]).tolist() in ([13, 12, 5], [12, 13, 5])
    assert len(Ids(buffer.draw(60, gen(4), balanced=True)["id"])) == 60


@pytest.mark.parametrize("balanced", [False, True])
def test_draws_are_uniform_within_a_class(balanced):
    buffer, counts, g = Buffer(20), np.zeros(20), gen(5)
    buffer.add(rows(torch.arange(20), torch.arange(20) % 4), gen())
    for _ in range(3000):
        counts[buffer.draw(6, g, balanced)["id"].numpy()] += 1
    assert stats.chisquare(counts).pvalue > 1e-3  # conservative: draws without replacement vary less


def test_large_buffers_draw_without_replacement():
    buffer = Buffer(20_000)
    buffer.add({"y": torch.zeros(20_000, dtype=torch.int64), "id": torch.arange(20_000)}, gen())
    found = np.concatenate([buffer.draw(64, g)["id"].numpy() for g in [gen(9)] for _ in range(200)])
    assert all(len(set(part)) == 64 for part in found.reshape(200, 64))
    assert stats.kstest(found / 20_000, "uniform").pvalue > 1e-3


def test_the_buffer_uses_no_global_randomness():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    buffer = Buffer(5, policy="class-balanced")
    buffer.add(rows(torch.arange(40)), gen())
    buffer.draw(3, gen(), balanced=True)
    assert torch.equal(before, torch.get_rng_state())


def storage_bytes(buffer):
    return b"".join(bytes(column.untyped_storage()) for column in buffer._columns.values())


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced"])
def test_purge_leaves_no_byte(policy):
    secrets = [3, 17, 44, 59]
    buffer = Buffer(60, policy=policy)
    pattern = torch.full((4,), 1.23456789e-21)
    data = rows(torch.arange(60), logits=torch.zeros(60, 4))
    data["logits"][secrets] = pattern
    data["id"][secrets] += 0x5EC0E7_00000000
    buffer.add(data, gen())
    # A value of the secret rows that no other row has, as raw bytes, in each column.
    marks = [pattern.numpy().tobytes()] + [np.int64(s + 0x5EC0E7_00000000).tobytes() for s in secrets]
    marks += [data["x"][s].numpy().tobytes() for s in secrets]
    assert all(mark in storage_bytes(buffer) for mark in marks)
    ids = Ids(data["id"][secrets])
    assert buffer.holds(ids) == ids
    buffer.purge(ids)
    assert not any(mark in storage_bytes(buffer) for mark in marks)
    assert len(buffer) == 56 and not buffer.holds(ids)
    rest = buffer.columns
    assert torch.equal(rest["x"], rows(rest["id"])["x"])
    buffer.purge(buffer.ids)
    assert len(buffer) == 0 and not any(storage_bytes(buffer)) and buffer.offered == 0


def test_shrinking_and_replacing_leave_no_byte_either():
    buffer = Buffer(8, policy="class-balanced")
    first = rows(torch.arange(1000, 1008), [0] * 8, logits=torch.randn(8, 2, generator=gen()))
    buffer.add(first, gen())
    buffer.add(rows(torch.arange(2000, 2008), [1] * 8, logits=torch.zeros(8, 2)), gen())
    gone = Ids.range(1000, 1008) - buffer.ids
    assert len(gone) == 4
    for value in gone:
        assert first["x"][value - 1000].numpy().tobytes() not in storage_bytes(buffer)
    old = buffer._columns["logits"]
    buffer.replace("logits", torch.ones(8, 5))
    assert not old.any() and buffer.columns["logits"].shape == (8, 5)
    buffer.add(rows([3000], [1], logits=torch.ones(1, 5)), gen())


def test_freed_room_is_filled_again():
    buffer, g = Buffer(20), gen()
    buffer.add(rows(torch.arange(100)), g)
    buffer.purge(Ids(buffer.columns["id"][:10]))
    assert len(buffer) == 10 and buffer.offered == 50
    buffer.add(rows(torch.arange(200, 210)), g)
    assert len(buffer) == 20 and buffer.offered == 60


def test_a_forgotten_class_gives_its_share_back():
    buffer, g = Buffer(12, policy="class-balanced"), gen()
    buffer.add(rows(torch.arange(30), torch.arange(30) % 3), g)
    buffer.purge(Ids(buffer.columns["id"][buffer.columns["y"] == 1]))
    buffer.add(rows(torch.arange(100, 130), torch.arange(30) % 2 * 2), g)
    assert torch.bincount(buffer.columns["y"]).tolist() == [6, 0, 6]


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced"])
def test_state_round_trip_goes_on_alike(policy):
    one, g = Buffer(9, policy=policy), gen(6)
    for chunk in torch.arange(50).split(7):
        one.add(rows(chunk), g)
    one.evict(Ids([int(one.columns["id"][2])]))
    two = Buffer(9, policy=policy)
    two.load_state_dict(one.state_dict())
    assert two.bytes() == one.bytes() and two.offered == one.offered
    again = gen(11)
    again.set_state(g.get_state())
    one.add(rows(torch.arange(50, 90)), g)
    two.add(rows(torch.arange(50, 90)), again)
    for name in one.columns:
        assert torch.equal(one.columns[name], two.columns[name])
    state = one.state_dict()
    one.purge(one.ids)
    assert state["columns"]["id"].any()  # the state is a copy
    empty = Buffer(9, policy=policy)
    empty.load_state_dict(Buffer(9, policy=policy).state_dict())
    assert len(empty) == 0 and empty.bytes() == 0


def test_bytes_are_what_is_allocated():
    buffer = Buffer(100)
    assert buffer.bytes() == 0
    buffer.add(rows([1]), gen())
    assert buffer.bytes() == 100 * (3 * 4 + 8 + 8)
    assert isinstance(buffer, Holder)


def test_capacity_zero_and_wrong_input():
    nothing = Buffer(0)
    assert not nothing.add(rows([1, 2]), gen()).any()
    assert len(nothing) == 0
    for bad in ({}, {"capacity": -1}, {"capacity": 3, "policy": "fifo"}, {"capacity": 3, "per_class": 2}):
        with pytest.raises(BadInput):
            Buffer(**bad)
    buffer = Buffer(3)
    buffer.add(rows([1]), gen())
    for bad in (
        {"y": torch.zeros(1)},
        rows([1, 2], extra=torch.zeros(2)),
        rows([5], width=4),
        {**rows([5]), "x": torch.zeros(2, 3)},
        {**rows([5]), "y": torch.zeros(1)},
    ):
        with pytest.raises(BadInput):
            buffer.add(bad, gen())
    assert buffer.ids == Ids([1])
