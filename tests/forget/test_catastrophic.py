"""Fine-tuning on the retained data: the same as a plain loop, and blind to the forget set."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.data import Request
from remanence.forget.catastrophic import Catastrophic
from remanence.train.loop import forget
from tests.forget.helpers import SEEDS, class_accuracy, class_ids, digits_model, forget_update, forgotten, same, split

TRAIN, TEST = split()
THREE = class_ids(TRAIN, 3)


def test_equals_a_plain_loop_bit_for_bit():
    model = digits_model()
    ours, _ = forgotten(model, Catastrophic(), TRAIN, THREE, epochs=2)
    naive, retain = copy.deepcopy(model).train(), TRAIN.without(THREE)
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    for epoch in range(2):
        for rows in torch.randperm(len(retain), generator=generator(0, "forget/1", "", "order", epoch)).split(64):
            batch = retain.batch(rows)
            optimizer.zero_grad()
            F.cross_entropy(naive(batch["x"]), batch["y"]).backward()
            optimizer.step()
    assert same(ours, naive)


def test_the_forget_set_is_never_used():
    model = digits_model()
    wrong = TRAIN.replace(x=torch.where((TRAIN["y"] == 3)[:, None], torch.full_like(TRAIN["x"], 1e30), TRAIN["x"]))
    assert same(*(forgotten(model, Catastrophic(), data, THREE, epochs=1)[0] for data in (TRAIN, wrong)))


def test_needs_retained_data():
    with pytest.raises(BadInput, match="no retained data"):
        forget(forget_update(digits_model(), Catastrophic(), TRAIN, TRAIN.ids), Request(ids=[1]))


@pytest.mark.fidelity(
    "forget/catastrophic",
    check="a plain loop on the retained data, bit for bit; classes 3 and 8 of ten digits, three seeds",
    measured="class 8 from 93-95 % to 59-61 %, class 3 from 96-98 % to 78-83 %; the others lose nothing",
    paper="the weakest baseline of every study",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_class_fades(seed):
    """Measured: class 8 from 93-95 % to 59-61 %, class 3 from 96-98 % to 78-83 %; the others do not lose."""
    model = digits_model(seed)
    for label, least in ((8, 0.2), (3, 0.08)):
        before = class_accuracy(model, TEST, label)
        after = class_accuracy(forgotten(model, Catastrophic(), TRAIN, class_ids(TRAIN, label))[0], TEST, label)
        assert after[0] < before[0] - least and after[1] > before[1] - 0.01
