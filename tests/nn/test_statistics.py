"""Sums per class can be added in any order and taken back exactly; a Statistic knows what it came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.holder import Holder
from remanence.core.ids import Ids
from remanence.nn.statistics import ClassStatistics, Statistic


def data(n=200, dim=6, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=g), torch.randint(classes, (n,), generator=g) * 3, torch.arange(n) + 1000


def test_means_and_covariances_are_numpys():
    z, y, ids = data()
    stats = ClassStatistics(6, second_order=True)
    stats.add(z, y, ids)
    for label in (0, 3, 6, 9):
        mine = z[y == label].double().numpy()
        assert np.allclose(stats.means([label])[0].numpy(), mine.mean(0), rtol=1e-12, atol=1e-14)
        assert np.allclose(stats.covariances([label])[0].numpy(), np.cov(mine.T, bias=True), rtol=1e-9, atol=1e-12)
        assert int(stats.counts([label])[0]) == len(mine)


@pytest.mark.parametrize("size", [1, 7, 200])
def test_order_and_chunks_do_not_matter(size):
    z, y, ids = data()
    joint = ClassStatistics(6, second_order=True)
    joint.add(z, y, ids)
    parts = ClassStatistics(6, second_order=True)
    for rows in torch.randperm(200, generator=torch.Generator().manual_seed(1)).split(size):
        parts.add(z[rows], y[rows], ids[rows])
    order = joint.labels
    assert torch.allclose(joint.means(order), parts.means(order), rtol=1e-12, atol=1e-14)
    assert torch.allclose(joint.outer(order), parts.outer(order), rtol=1e-12, atol=1e-12)
    assert parts.ids == joint.ids


@pytest.mark.parametrize("way", ["remove", "purge"])
def test_removal_equals_a_life_without_the_rows(way):
    z, y, ids = data()
    gone = torch.zeros(200, dtype=torch.bool)
    gone[::3] = True
    stats, without = ClassStatistics(6, second_order=True), ClassStatistics(6, second_order=True)
    stats.add(z, y, ids)
    without.add(z[~gone], y[~gone], ids[~gone])
    if way == "remove":
        stats.remove(z[gone], y[gone], ids[gone])
    else:
        stats.source = lambda wanted: (z[wanted.array - 1000], y[wanted.array - 1000])
        stats.purge(Ids(ids[gone]) | Ids([5]))
    order = without.labels
    assert torch.allclose(stats.means(order), without.means(order), rtol=1e-10, atol=1e-12)
    assert torch.allclose(stats.outer(order), without.outer(order), rtol=1e-10, atol=1e-10)
    assert stats.ids == without.ids and not stats.holds(Ids(ids[gone]))


def test_an_id_counts_once():
    z, y, ids = data()
    stats = ClassStatistics(6)
    stats.add(torch.cat([z, z]), torch.cat([y, y]), torch.cat([ids, ids]))
    stats.add(z[:50], y[:50], ids[:50])
    once = ClassStatistics(6)
    once.add(z, y, ids)
    assert torch.equal(stats.counts([0, 3]), once.counts([0, 3]))
    assert torch.allclose(stats.sums([0]), once.sums([0]), rtol=1e-13)


def test_purge_without_a_source_drops_whole_classes():
    z, y, ids = data()
    stats = ClassStatistics(6)
    stats.add(z, y, ids)
    rest = stats.means([3, 6, 9]).clone()
    one = int(ids[y == 0][0])
    stats.purge(Ids([one]))
    assert 0 not in stats.labels and not stats.holds(Ids([one]))
    assert torch.equal(stats.means([3, 6, 9]), rest)
    with pytest.raises(BadInput):
        stats.means([0])


def test_dropped_class_leaves_no_byte():
    stats = ClassStatistics(4)
    stats.add(torch.full((1, 4), 1.5), torch.tensor([1]), torch.tensor([7]))
    stats.add(torch.full((1, 4), -77.123), torch.tensor([2]), torch.tensor([8]))
    old = stats._sum
    stats.drop(2)
    assert not old.any()
    assert np.float64(np.float32(-77.123)).tobytes() not in bytes(stats._sum.untyped_storage())
    assert stats.means([1]).tolist() == [[1.5] * 4]


def test_rows_without_ids_may_be_anyone():
    stats = ClassStatistics(2)
    stats.add(torch.ones(3, 2), torch.tensor([1, 1, 2]))
    assert stats.holds(Ids([5, 6])) == Ids([5, 6])
    stats.purge(Ids([5]))
    assert stats.labels == [] and not stats.holds(Ids([5, 6]))


def test_refusals_change_nothing():
    z, y, ids = data(20)
    stats = ClassStatistics(6)
    stats.add(z, y, ids)
    before = stats.sums().clone()
    for features, labels, names in (
        (z[:1], torch.tensor([99]), None),
        (z[:1], y[:1], torch.tensor([5])),
        (z[:2], y[:1].repeat(2), ids[:1].repeat(2)),
        (torch.zeros(21, 6), torch.zeros(21, dtype=torch.int64), None),
        (torch.zeros(1, 5), y[:1], None),
    ):
        with pytest.raises(BadInput):
            stats.remove(features, labels, names)
    with pytest.raises(BadInput):
        stats.outer()
    assert torch.equal(stats.sums(), before)


def test_state_round_trip():
    z, y, ids = data()
    one, two = ClassStatistics(6, second_order=True), ClassStatistics(6, second_order=True)
    one.add(z, y, ids)
    one.drop(3)
    two.load_state_dict(one.state_dict())
    assert two.labels == one.labels and two.ids == one.ids and two.bytes() == one.bytes()
    assert torch.equal(two.means(), one.means()) and torch.equal(two.outer(), one.outer())
    one.add(z, y, ids + 500)
    two.add(z, y, ids + 500)
    assert torch.equal(two.sums(one.labels), one.sums(one.labels))
    with pytest.raises(BadInput):
        ClassStatistics(5, second_order=True).load_state_dict(one.state_dict())
    assert isinstance(one, Holder)


def test_statistic():
    values = {i: torch.tensor(float(i)) for i in range(10)}

    def total(ids):
        return torch.stack([values[i] for i in ids]).sum()

    known = Statistic(total(range(10)), Ids.range(0, 10), total)
    assert known.holds(Ids([3, 40])) == Ids([3])
    known.purge(Ids([40]))
    assert float(known.value) == 45
    known.purge(Ids([3, 9]))
    assert float(known.value) == 33 and not known.holds(Ids([3, 9])) and len(known.ids) == 8
    known.purge(Ids.range(0, 10))
    assert known.value is None and known.bytes() == 0

    blind = Statistic({"a": torch.ones(4), "b": torch.ones(2)}, Ids([1, 2]))
    assert blind.bytes() == 24
    copy = Statistic()
    copy.load_state_dict(blind.state_dict())
    assert copy.ids == blind.ids and torch.equal(copy.value["a"], blind.value["a"])
    blind.purge(Ids([2]))
    assert blind.value is None and not blind.ids
    assert isinstance(blind, Holder)
    copy.load_state_dict(blind.state_dict())
    assert copy.value is None
