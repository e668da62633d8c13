"""Which columns compete: those of classes that were met, in every forgetter."""

from __future__ import annotations

import copy

import pytest
import torch

from remanence.forget.catastrophic import Catastrophic
from remanence.forget.gradient_ascent import GradientAscent
from remanence.forget.random_label import RandomLabel
from remanence.forget.salun import SalUn
from remanence.forget.ssd import SSD
from remanence.models import mlp
from remanence.where.saliency import Saliency
from tests.forget.helpers import class_ids, forgotten, split, taught

TRAIN = split()[0]
CASES = [
    (SSD(selection=3.0), ()),
    (SSD(selection=3.0, importance="label-free"), ()),
    (SalUn(), ()),
    (GradientAscent(), ()),
    (RandomLabel(), ()),
    (Catastrophic(), ()),
    (GradientAscent(), (Saliency(rho=0.3),)),
]


@pytest.mark.parametrize("by, parts", CASES)
def test_columns_of_no_class_do_not_compete(by, parts):
    """A head with two columns more than there are labels: whatever they answer, the rest comes out in the same bits."""
    model = taught(mlp(64, [32], 12, seed=0), TRAIN, epochs=3)
    found = []
    for bias in (0.0, 30.0):
        start = copy.deepcopy(model)
        with torch.no_grad():
            start.head.bias[10:] = bias
        settings = {} if isinstance(by, SSD) else {"epochs": 1}
        after = forgotten(start, by, TRAIN, class_ids(TRAIN, 3), parts=list(parts), **settings)[0]
        found.append({n: p[:10] if n.startswith("head.") else p for n, p in after.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
