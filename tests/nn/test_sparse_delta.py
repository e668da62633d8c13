"""Sparse deltas: lossless positions, values that are copied, sums where deltas meet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput, UnknownName
from remanence.nn.sparse_delta import Skills, SparseDelta, decode, encode


@pytest.mark.parametrize("gap", [1, 100, 1000, 10**6, 2**33])
@pytest.mark.parametrize("size", [0, 1, 57])
def test_positions_come_back(size, gap):
    rng = torch.Generator().manual_seed(size)
    at = torch.randint(1, gap + 1, (size,), generator=rng).cumsum(0) - 1
    coded = encode(at)
    assert torch.equal(decode(coded), at) and decode(coded).dtype == torch.int64
    assert coded.element_size() <= {1: 1, 100: 1, 1000: 2, 10**6: 4, 2**33: 8}[gap]


@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4), (0,), (0, 3), ()])
def test_a_delta_is_put_on_and_taken_off_bit_for_bit(shape):
    rng = torch.Generator().manual_seed(0)
    old = torch.randn(shape, generator=rng)
    new = torch.where(torch.rand(shape, generator=rng) < 0.5, old, old + 1e-8 + torch.randn(shape, generator=rng))
    delta = SparseDelta.between({"w": old}, {"w": new})
    again = SparseDelta()
    again.load_state_dict(delta.state_dict())
    p = nn.Parameter(old.clone())
    assert len(delta) == len(again) == int((old != new).sum())
    for part in (delta, again):
        part.put_on({"w": p})
        assert torch.equal(p, new)
        part.take_off({"w": p})
        assert torch.equal(p, old)
    assert delta.bytes() == len(delta) * (1 + 4 + 4)


def test_a_delta_of_a_transposed_and_of_a_grown_parameter():
    """The second is a head that has got rows since."""
    old = torch.arange(12.0).reshape(3, 4)
    new = old.clone()
    new[1, 2] = new[2, 3] = -1
    delta = SparseDelta.between({"w": old}, {"w": new})
    turned = nn.Parameter(old.clone().T.contiguous().T)
    delta.put_on({"w": turned})
    assert torch.equal(turned, new) and not turned.is_contiguous()
    grown = nn.Parameter(torch.cat([old, torch.ones(2, 4)]))
    delta.put_on({"w": grown})
    assert torch.equal(grown, torch.cat([new, torch.ones(2, 4)]))
    for params in ({}, {"w": torch.zeros(2, 4)}):
        with pytest.raises(BadInput, match="smaller"):
            delta.put_on(params)


def test_two_deltas_are_added_where_they_meet():
    base, skills = torch.tensor([1.0, 2.0, 3.0]), Skills()
    skills.deltas["a"] = SparseDelta.between({"w": base}, {"w": torch.tensor([1.5, 2.0, 2.0])})
    skills.deltas["b"] = SparseDelta.between({"w": base}, {"w": torch.tensor([1.0, 7.0, 4.0])})
    p = nn.Parameter(base.clone())
    skills.put_on({"w": p})
    assert p.tolist() == [1.5, 7.0, 3.0]
    skills.take_off({"w": p})
    assert p.tolist() == base.tolist()
    skills.put_on({"w": p}, ["b"])
    assert p.tolist() == [1.0, 7.0, 4.0]
    with pytest.raises(UnknownName, match="'c'"):
        skills.put_on({"w": p}, ["c"])
