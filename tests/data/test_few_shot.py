"""Few-shot episodes and dealt instances: labels, draws and corruption, by their definitions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from remanence.core.errors import BadInput, UnknownName
from remanence.core.rng import generator
from remanence.data import Examples, Stream, digits
from remanence.data.few_shot import CORRUPT, disturbed, few_shot
from remanence.data.instances import instance_incremental
from remanence.data.streams import stream_of


def table(n: int = 600, classes: int = 30) -> Examples:
    """Labels 0, 3, 6, ...; ids are not row numbers."""
    y = 3 * (torch.arange(n) % classes)
    x = torch.rand(n, 16, generator=generator(0, "table"))
    return Examples({"x": x, "y": y, "name": [f"word {c}" for c in y.tolist()]}, "table", ids=range(7, n + 7))


def sources(stream: Stream) -> list[set[int]]:
    """The labels in the source that each set learns."""
    return [set(task.train["label"].tolist()) for task in stream]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("sets", "interval", "ways", "shots"), [(4, 2, 5, 2), (6, 1, 5, 1), (3, 3, 2, 4), (1, 1, 30, 3)]
)
def test_the_class_test_by_its_definition(seed: int, sets: int, interval: int, ways: int, shots: int) -> None:
    data = table()
    stream = few_shot(data, sets, interval, ways, shots, 2, seed=seed)
    assert len(stream) == sets and [task.id for task in stream] == list(range(sets))
    groups = sources(stream)[::interval]
    assert sum(map(len, groups)) == len(set().union(*groups)) == ways * sets // interval  # none in two groups
    old = dict(zip(data.id.tolist(), data["y"].tolist(), strict=True))
    meaning: dict[int, int] = {}
    for task in stream:
        own = list(range(task.id // interval * ways, (task.id // interval + 1) * ways))
        assert list(task.classes) == own and set(task.train["set"].tolist()) == {task.id}
        for part, each in ((task.train, shots), (task.test, 2)):
            assert Counter(part["y"].tolist()) == dict.fromkeys(own, each)
            assert [old[i] for i in part.id.tolist()] == part["label"].tolist()
            assert torch.equal(part["x"], data.only(part.ids)["x"][part.id.argsort().argsort()])
            for new, label in zip(part["y"].tolist(), part["label"].tolist(), strict=True):
                assert meaning.setdefault(new, label) == label
                assert task.names[own.index(new)] == f"word {label}"
    assert sorted(meaning) == list(range(ways * sets // interval))
    used = [i for task in stream for part in (task.train, task.test) for i in part.id.tolist()]
    assert len(used) == len(set(used)) == sets * ways * (shots + 2)  # no row twice, in support or target


def test_overwriting_reuses_the_labels() -> None:
    kept, over = (few_shot(table(), 4, 2, 5, 2, 3, overwrite=overwrite) for overwrite in (False, True))
    assert {c for task in over for c in task.classes} == set(range(5)) and sources(over) == sources(kept)
    for a, b in zip(kept, over, strict=True):
        assert torch.equal(a.train.id, b.train.id) and torch.equal(a.train["y"] % 5, b.train["y"])
    assert (kept.scenario, over.scenario, few_shot(table(), 2, 2).scenario) == ("class", "domain", "domain")


@pytest.mark.parametrize(("sets", "interval", "ways", "shots"), [(4, 2, 5, 2), (6, 1, 5, 1), (2, 1, 1, 5)])
def test_every_image_is_a_label(sets: int, interval: int, ways: int, shots: int) -> None:
    for overwrite in (False, True):
        stream = few_shot(table(), sets, interval, ways, shots, overwrite=overwrite, instance=True)
        labels = torch.cat([task.train["y"] for task in stream])
        assert labels.tolist() == list(range(ways * shots * sets)) and stream.scenario == "class"
        assert [c for task in stream for c in task.classes] == labels.tolist()
        for task in stream:
            assert task.test.fingerprint() == task.train.fingerprint()
            at = [f"word {c}/{i}" for c, i in zip(task.train["label"].tolist(), task.train.id.tolist(), strict=True)]
            assert list(task.names) == at
    plain = few_shot(table(), sets, interval, ways, shots, 1)
    assert [task.train.id.tolist() for task in plain] == [task.train.id.tolist() for task in stream]


def test_a_seed_is_an_episode_and_classes_and_rows_are_drawn_apart() -> None:
    data = table()
    stream = few_shot(data, 4, 1, 5, 1, 2, seed=3)
    assert few_shot(data, 4, 1, 5, 1, 2, seed=3).fingerprint() == stream.fingerprint()
    assert few_shot(data, 4, 1, 5, 1, 2, seed=4).fingerprint() != stream.fingerprint()
    # other rows, other numbers of them or another order of the table: the same classes
    for other in (
        few_shot(data, 4, 1, 5, 3, 4, seed=3),
        few_shot(data, 4, 1, 5, 1, instance=True, seed=3),
        few_shot(data.select(torch.randperm(600, generator=generator(1))), 4, 1, 5, 1, 2, seed=3),
    ):
        assert sources(other) == sources(stream)
    assert sources(few_shot(data, 6, 1, 5, 1, 2, seed=3))[:4] == sources(stream)

    def rows(stream: Stream) -> dict[int, int]:
        return {int(c): int(i) for task in stream for c, i in zip(task.train["label"], task.train.id, strict=True)}

    # other classes: a class that both have keeps its rows
    more = few_shot(data.select((data["y"] > 20).nonzero()[:, 0]), 4, 1, 5, 1, 2, seed=3)
    shared = rows(more).keys() & rows(stream).keys()
    assert sources(more) != sources(stream) and len(shared) > 5
    assert all(rows(more)[c] == rows(stream)[c] for c in shared)
    corrupted = few_shot(data, 4, 1, 5, 1, 2, level=0.5, seed=3)
    assert [task.train.fingerprint() for task in corrupted] == [task.train.fingerprint() for task in stream]
    assert [task.test.id.tolist() for task in corrupted] == [task.test.id.tolist() for task in stream]
    assert all(not torch.equal(a.test["x"], b.test["x"]) for a, b in zip(corrupted, stream, strict=True))


def test_only_classes_with_enough_rows_are_drawn() -> None:
    data = table()
    few = data.select(((data["y"] >= 30) | (torch.arange(600) < 60)).nonzero()[:, 0])  # ten classes with two rows
    for seed in range(3):
        assert all(min(labels) >= 30 for labels in sources(few_shot(few, 4, 1, 5, 1, 2, seed=seed)))
    with pytest.raises(
        BadInput, match=r"5 groups of 5 classes need 25 classes of at least 3 rows, of which table has 20"
    ):
        few_shot(few, 5, 1, 5, 1, 2)
    assert len(few_shot(few, 5, 1, 5, 1, 1)) == 5
    for knobs in ({"sets": 3, "interval": 2}, {"shots": 0}, {"ways": 0}, {"targets": 0}, {"interval": 0}):
        with pytest.raises(BadInput, match="a multiple of interval"):
            few_shot(data, **knobs)
    for wrong in ({"corrupt": "blur"}, {"level": 1.5}):
        with pytest.raises(BadInput, match="is one of noise, circle, box"):
            few_shot(data, **wrong)
    with pytest.raises(BadInput, match="integer labels"):
        few_shot(data.replace(y=data["y"].float()))


@pytest.mark.parametrize("shape", [(9, 12), (3, 9, 12), (1, 10, 10), (100,)])
@pytest.mark.parametrize("how", CORRUPT)
@pytest.mark.parametrize("level", [0.0, 0.15, 0.4, 0.9, 1.0])
def test_exactly_that_share_is_lost(shape: tuple[int, ...], how: str, level: float) -> None:
    x = 0.5 + torch.rand(
        20, *shape, generator=generator(0, "x"), dtype=torch.float64
    )  # no value that noise or 0 could repeat
    kept = x.clone()
    made = disturbed(x, how, level, generator(1, "noise"))
    assert torch.equal(x, kept) and made.shape == x.shape and made.dtype == x.dtype
    channels, pixels = (shape[0] if len(shape) == 3 else 1), math.prod(shape[-2:])
    changed = (made != x).reshape(20, channels, pixels)
    assert (changed.sum(2) == round(level * pixels)).all() and (changed == changed[:, :1]).all()
    assert torch.equal(made, disturbed(x, how, level, generator(1, "noise")))
    if 0 < level < 0.5:
        assert len({tuple(row) for row in changed[:, 0].tolist()}) > 10  # each image suffers elsewhere
    if how == "noise":
        assert made.min() >= x.min() and made.max() <= x.max()
    else:
        assert (made.reshape(20, channels, pixels)[changed] == 0).all()


def test_noise_is_nested_and_uniform() -> None:
    x = torch.full((400, 1, 10, 10), 0.5)
    x[:, :, 0] = torch.tensor([2.0, 5.0]).repeat(5)
    low, high = (disturbed(x, "noise", level, generator(1)) for level in (0.3, 0.7))
    lost = low != x
    assert torch.equal(low[lost], high[lost]) and int(lost.sum()) == 12_000
    counts = lost.sum(0).flatten().double()  # of 400 images, each pixel in 30 %: sd 9.2
    assert (counts - 120).abs().max() < 4.5 * 9.2
    values = torch.histc(low[lost], 10, 0.5, 5.0)
    assert ((values - 1200).square() / 1200).sum() < 27.9  # chi-square, 9 degrees of freedom, .001


def spread(lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Height and width of the occluded, and how far its pixels lie from its middle."""
    where = lost.nonzero().double()
    size = where.max(0).values - where.min(0).values + 1
    return size[0], size[1], (where - where.mean(0)).square().sum(1).sqrt().max()


@pytest.mark.parametrize("level", [0.1, 0.3, 0.5])
def test_occluders_have_their_shapes_and_lie_inside(level: float) -> None:
    x = torch.ones(60, 40, 60)
    boxes = disturbed(x, "box", level, generator(2)) == 0
    for lost in boxes:
        high, wide, _ = spread(lost)
        assert abs(high - math.sqrt(level) * 40) <= 1.5 and abs(wide - math.sqrt(level) * 60) <= 1.5
    radius = math.sqrt(level * 2400 / math.pi)
    discs = disturbed(x, "circle", level, generator(2)) == 0
    for lost in discs:
        high, wide, far = spread(lost)
        if 2 * radius <= 40:
            assert abs(high - 2 * radius) <= 2 and abs(wide - 2 * radius) <= 2 and abs(far - radius) <= 1.5
    for found in (boxes, discs):  # they are anywhere: every row and column is hit, but perhaps the outermost
        assert all(found.any(0).any(k)[2:-2].all() for k in (0, 1))


def test_corruption_is_refused_where_it_means_nothing() -> None:
    x = torch.rand(5, 15)
    assert disturbed(x, "noise", 0.5, generator(0)).shape == (5, 15)  # rows need not be images for noise
    assert len(disturbed(x[:0], "noise", 0.5, generator(0))) == 0
    with pytest.raises(BadInput, match="are no images"):
        disturbed(x, "box", 0.5, generator(0))
    for how, level in (("blur", 0.5), ("noise", 1.5), ("box", -0.1), ("noise", float("nan"))):
        with pytest.raises(BadInput, match="is one of noise, circle, box"):
            disturbed(x, how, level, generator(0))


@pytest.mark.parametrize("seed", range(3))
def test_every_row_comes_once_and_every_class_in_every_task(seed: int) -> None:
    stream = instance_incremental(digits(), 7, seed=seed)
    ids = torch.cat([task.train.id for task in stream])
    test = stream[0].test
    assert len(set(ids.tolist())) == len(ids) == 1797 - len(test) and not set(ids.tolist()) & set(test.id.tolist())
    sizes = [len(task.train) for task in stream]
    assert max(sizes) - min(sizes) <= 1 and stream.scenario == "domain"
    counts = torch.stack([torch.bincount(task.train["y"], minlength=10) for task in stream])
    assert (counts.max(0).values - counts.min(0).values <= 1).all() and counts.min() > 0
    assert all(task.test is test and task.classes == tuple(range(10)) for task in stream)
    assert instance_incremental(digits(), 7, seed=seed).fingerprint() == stream.fingerprint()
    assert instance_incremental(digits(), 7, seed=seed + 1).fingerprint() != stream.fingerprint()


def test_one_instance_of_each_class_and_refusals() -> None:
    data = table(90)  # three rows of each class
    stream = instance_incremental(data, 3, test=data)
    assert [sorted(task.train["y"].tolist()) for task in stream] == [list(range(0, 90, 3))] * 3
    with pytest.raises(BadInput, match=r"4 tasks need 4 training rows of every class, but class 0 has 3 rows"):
        instance_incremental(data, 4, test=data)
    with pytest.raises(BadInput, match="at least 1 task"):
        instance_incremental(data, 0)
    with pytest.raises(BadInput, match="there are no rows"):
        instance_incremental(data.select(torch.arange(0)), 2, test=data)
    with pytest.raises(BadInput, match="integer labels"):
        instance_incremental(data.replace(y=data["y"].float()), 2)


def test_plans_name_them() -> None:
    knobs: dict[str, Any] = {
        "sets": 2,
        "ways": 3,
        "shots": 2,
        "instance": True,
        "corrupt": "box",
        "level": 0.25,
        "seed": 5,
    }
    made = stream_of({"few-shot": {"source": "digits", **knobs}})
    assert made.fingerprint() == few_shot(digits(), **knobs).fingerprint()
    dealt = stream_of({"instance-incremental": {"source": "digits", "tasks": 4, "seed": 2}})
    assert dealt.fingerprint() == instance_incremental(digits(), 4, seed=2).fingerprint()
    with pytest.raises(UnknownName, match="shots"):
        stream_of({"few-shot": {"source": "digits", "shot": 1}})
