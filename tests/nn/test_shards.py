"""Where examples go, in which orders slices are trained, and how long prefixes live."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.holder import Holder
from remanence.core.ids import Ids
from remanence.models import mlp
from remanence.nn.shards import (
    Slices,
    expected_deletions,
    fingerprint,
    layer_groups,
    matched,
    place,
    prefixes,
    rotations,
    score,
    surviving,
)
from tests.where.helpers import transformer


def test_where_an_id_goes_depends_on_no_other():
    rng = np.random.default_rng(0)
    ids = Ids(rng.integers(0, 2**62, 20_000))
    parts = place(ids, 20, key=7)
    assert sum(map(len, parts)) == len(ids) and Ids(np.concatenate([part.array for part in parts])) == ids
    some = Ids(ids.array[rng.random(len(ids)) < 0.3])
    assert [part & some for part in parts] == place(some, 20, key=7)
    sizes = np.array([len(part) for part in parts])
    assert ((sizes - 1000) ** 2 / 1000).sum() < 45  # chi-squared with 19 degrees of freedom: P = 0.0007


def test_neighbouring_ids_and_keys_are_told_apart():
    sizes = np.array([len(part) for part in place(Ids.range(0, 20_000), 20, key=0)])
    assert ((sizes - 1000) ** 2 / 1000).sum() < 45
    one, other = (place(Ids.range(0, 2000), 10, key=key) for key in (1, 2))
    shared = sum(len(a & b) for a, b in zip(one, other, strict=True))
    assert 140 < shared < 260  # by chance 200, standard deviation 13


def test_the_book_holds_what_its_cells_hold():
    book = Slices()
    book.cells = [Ids([1, 2]), Ids(), Ids([2, 5])]
    assert isinstance(book, Holder)
    assert book.holds(Ids([2, 5, 9])) == Ids([2, 5]) and book.touched(Ids([2])) == [0, 2]
    assert book.union([0, 2]) == Ids([1, 2, 5]) and book.bytes() == 4 * 8
    again = Slices()
    again.load_state_dict(book.state_dict())
    assert again.cells == book.cells
    book.purge(Ids([2]))
    assert book.cells == [Ids([1]), Ids(), Ids([5])] and not book.holds(Ids([2]))


def test_a_fingerprint_tells_one_bit_and_a_name():
    one, other = mlp(4, [3], 2, norm=True), mlp(4, [3], 2, norm=True)
    assert fingerprint(one) == fingerprint(other) != fingerprint(mlp(4, [3], 2, norm=True, seed=1))
    other.body[2].running_mean[1] = 1e-45
    assert fingerprint(one) != fingerprint(other)


# -- layer groups ------------------------------------------------------------------------------------------------------


def test_layer_groups_come_from_the_top():
    assert layer_groups(mlp(4, [3, 3, 3], 2), 3) == [["body.5"], ["body.3"], ["body.1"]]
    assert layer_groups(mlp(4, [3, 3, 3, 3], 2), 2) == [["body.7", "body.5"], ["body.3", "body.1"]]
    assert layer_groups(mlp(4, [3], 0), 1) == [["body.1"]]
    model = transformer(layers=4)
    groups = layer_groups(model, 2)
    assert [sorted({name.split(".")[1] for name in group}) for group in groups] == [["2", "3"], ["0", "1"]]
    assert all(len(group) == 14 for group in groups)
    hidden = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    assert sorted(itertools.chain(*groups)) == sorted(hidden)


def test_layers_of_a_transformer_not_of_the_perceptrons_in_it():
    block = nn.ModuleDict
    layers = [
        block(
            {"q": nn.Linear(4, 4), "mlp": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))}
        )
        for _ in range(2)
    ]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(4, 2)})
    model.head = model["head"]
    assert [len(group) for group in layer_groups(model, 2)] == [4, 4]


def test_more_groups_than_blocks_are_refused():
    with pytest.raises(BadInput, match=r"has 2 blocks .* at most 2 slices"):
        layer_groups(mlp(4, [3, 3], 2), 3)


# -- orders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_rotations_have_every_slice_once_at_every_place(n):
    found = rotations(range(n), n)
    assert all(sorted(column) == list(range(n)) for column in zip(*found, strict=True))
    assert rotations(range(n), 1) == [tuple(range(n))]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_beyond_the_rotations_there_are_as_many_orders_as_permutations(n):
    for count in range(1, math.factorial(n) + 1):
        found = rotations(range(n), count)
        assert len(set(found)) == count and all(sorted(order) == list(range(n)) for order in found)
        firsts = [sum(order[0] == item for order in found) for item in range(n)]
        assert max(firsts) - min(firsts) <= 1
    with pytest.raises(BadInput, match="more orders"):
        rotations(range(n), math.factorial(n) + 1)


def test_the_score_written_out():
    odds = [0.4, 0.3, 0.2, 0.1]
    assert score((3, 2), odds, 2) == pytest.approx(0.9**2 + 2 * 0.7**2)
    assert score((0, 1, 2, 3), odds) == pytest.approx(0.6**100 + 2 * 0.3**100 + 3 * 0.1**100)


@pytest.mark.parametrize("seed", range(5))
def test_matching_takes_the_best_assignment_at_every_place(seed):
    """Against all 24 assignments tried one by one; every slice comes once at every place, and likely ones come late."""
    odds = np.random.default_rng(seed).dirichlet(np.ones(4))
    found = matched(odds, power=10)
    assert all(sorted(column) == [0, 1, 2, 3] for column in zip(*found, strict=True))
    for n in range(1, 4):
        before = [order[:n] for order in found]
        totals = [
            sum(score((*order, item), odds, 10) for order, item in zip(before, items, strict=True))
            for items in itertools.permutations(range(4))
            if all(item not in order for order, item in zip(before, items, strict=True))
        ]
        mine = sum(score(order[: n + 1], odds, 10) for order in found)
        assert mine == pytest.approx(max(totals), rel=1e-12)
    turned = sum(score(order, odds, 10) for order in rotations(range(4), 4))
    assert sum(score(order, odds, 10) for order in found) >= turned * (1 - 1e-12)


def test_prefixes_and_what_is_left_of_them():
    paths = prefixes([(0, 1, 2), (0, 2, 1), (1, 2, 0)])
    assert paths == [(0,), (0, 1), (0, 1, 2), (0, 2), (0, 2, 1), (1,), (1, 2), (1, 2, 0)]
    assert surviving(paths, [2]) == [(0,), (0, 1), (1,)]
    assert surviving(surviving(paths, [2]), [0]) == surviving(paths, [0, 2]) == [(1,)]
    assert surviving(paths, []) == paths and surviving(paths, [0, 1]) == []


# -- how long they live ------------------------------------------------------------------------------------------------


def deletions(shards: int, slices: int, sequences: int, rng: np.random.Generator) -> int:
    """Slices drawn uniformly and deleted until no shard has a prefix left."""
    paths = [prefixes(rotations(range(slices), sequences)) for _ in range(shards)]
    for count in itertools.count(1):
        shard, gone = divmod(int(rng.integers(shards * slices)), slices)
        if paths[shard]:
            paths[shard] = surviving(paths[shard], [gone])
            if not any(paths):
                return count
    raise AssertionError


@pytest.mark.parametrize(("sequences", "wanted"), [(1, 68.5), (3, 99.5), (6, 119.8), (12, 119.8)])
def test_the_expected_number_of_deletions(sequences, wanted):
    """Card: 5 shards of 6 slices, within 3 % over 2000 runs; orders beyond the rotations add nothing."""
    assert expected_deletions(5, 6, sequences) == pytest.approx(wanted, abs=0.06)
    rng = np.random.default_rng(1)
    mean = np.mean([deletions(5, 6, sequences, rng) for _ in range(2000 if sequences < 12 else 500)])
    assert mean == pytest.approx(wanted, rel=0.03 if sequences < 12 else 0.05)


def test_the_expectation_where_it_can_be_counted():
    """One shard with two slices in one order dies at the first hit of one of two: 2 on average; in both orders it takes both: 3."""
    assert expected_deletions(1, 2, 1) == 2 and expected_deletions(1, 2, 2) == 3
    assert expected_deletions(1, 1) == 1 and expected_deletions(2, 1) == 3
