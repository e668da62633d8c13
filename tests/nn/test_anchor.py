"""The analytic gradient is autograd's; anchors survive growth, merge like the sum of their tasks, and let go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.holder import Holder
from remanence.core.ids import Ids
from remanence.nn.anchor import QuadraticAnchor


def setting(stiff=True):
    g = torch.Generator().manual_seed(0)
    params = {n: nn.Parameter(torch.randn(s, generator=g)) for n, s in {"w": (4, 3), "b": (4,)}.items()}
    anchor = {n: torch.randn(p.shape, generator=g) for n, p in params.items()}
    stiffness = {n: torch.rand(p.shape, generator=g) for n, p in params.items()} if stiff else None
    return params, anchor, stiffness


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stiff", [False, True])
def test_gradient_is_autograds(stiff, half):
    params, anchor, stiffness = setting(stiff)
    held = QuadraticAnchor(anchor, stiffness, strength=3.0, half=half)
    weights = stiffness or {n: torch.ones_like(a) for n, a in anchor.items()}
    value = (1.5 if half else 3.0) * sum((weights[n] * (params[n] - anchor[n]) ** 2).sum() for n in params)
    assert torch.allclose(held.penalty(params), value)
    truth = dict(zip(params, torch.autograd.grad(held.penalty(params), list(params.values())), strict=True))
    params["w"].grad = torch.ones(4, 3)
    held.add_gradient(params)
    assert torch.allclose(params["w"].grad, truth["w"] + 1) and torch.allclose(params["b"].grad, truth["b"])


def test_ones_are_l2():
    params, anchor, _ = setting()
    plain = QuadraticAnchor(anchor, None, 0.7)
    ewc = QuadraticAnchor(anchor, {n: torch.ones_like(a) for n, a in anchor.items()}, 0.7)
    plain.add_gradient(params)
    first = {n: p.grad.clone() for n, p in params.items()}
    for p in params.values():
        p.grad = None
    ewc.add_gradient(params)
    assert all(torch.equal(first[n], p.grad) for n, p in params.items())
    assert float(plain.penalty(anchor)) == 0.0 and ewc.bytes() == 2 * plain.bytes()


def test_strength_zero_writes_nothing():
    params, anchor, stiffness = setting()
    params["w"].grad = torch.full((4, 3), -0.0)
    QuadraticAnchor(anchor, stiffness, 0.0).add_gradient(params)
    assert params["b"].grad is None and torch.signbit(params["w"].grad).all()


def test_only_old_rows_of_a_grown_head_are_anchored():
    params, anchor, stiffness = setting()
    grown = {"w": nn.Parameter(torch.cat([params["w"].detach(), torch.full((2, 3), 9.0)])), "b": params["b"]}
    one, two = QuadraticAnchor(anchor, stiffness, 2.0), QuadraticAnchor(anchor, stiffness, 2.0)
    one.add_gradient(grown)
    two.add_gradient(params)
    assert torch.equal(grown["w"].grad[:4], params["w"].grad) and not grown["w"].grad[4:].any()
    assert torch.equal(one.penalty(grown), two.penalty(params))
    with pytest.raises(BadInput):
        one.penalty({"w": nn.Parameter(torch.zeros(3, 3))})


def test_missing_and_frozen_parameters_are_left_alone():
    params, anchor, stiffness = setting()
    params["w"].requires_grad_(False)
    QuadraticAnchor(anchor, stiffness).add_gradient(params)
    assert params["w"].grad is None and params["b"].grad is not None
    lone = {"other": nn.Parameter(torch.zeros(2))}
    QuadraticAnchor(anchor, stiffness).add_gradient(lone)
    assert lone["other"].grad is None
    assert float(QuadraticAnchor().penalty(params)) == 0.0


def test_merge_is_online_ewc():
    params, anchor, stiffness = setting()
    held = QuadraticAnchor(anchor, stiffness, ids=Ids([1]))
    more = {n: torch.full_like(a, 0.25) for n, a in anchor.items()}
    grown = {"w": torch.cat([params["w"].detach(), torch.ones(1, 3)]), "b": params["b"].detach(), "new": torch.ones(2)}
    fresh = {"w": torch.full((5, 3), 0.25), "b": more["b"], "new": torch.ones(2)}
    held.merge(grown, fresh, decay=0.9, ids=Ids([2]))
    assert torch.allclose(held.stiffness["w"][:4], 0.9 * stiffness["w"] + 0.25)
    assert torch.equal(held.stiffness["w"][4], torch.full((3,), 0.25)) and torch.equal(
        held.stiffness["new"], torch.ones(2)
    )
    assert torch.equal(held.anchor["w"], grown["w"]) and held.ids == Ids([1, 2])
    held.merge(grown)
    assert torch.allclose(held.stiffness["b"], 0.9 * stiffness["b"] + 0.25)
    plain = QuadraticAnchor(anchor)
    plain.merge(grown)
    assert plain.stiffness is None and torch.equal(plain.anchor["new"], grown["new"])


def test_holder():
    params, anchor, stiffness = setting()
    held = QuadraticAnchor(anchor, stiffness, 5.0, True, Ids.range(0, 10))
    assert isinstance(held, Holder) and held.holds(Ids([3, 50])) == Ids([3])
    held.purge(Ids([50]))
    assert held.bytes() == 2 * 16 * 4
    copy = QuadraticAnchor(strength=1.0)
    copy.load_state_dict(held.state_dict())
    assert torch.equal(copy.penalty(params), held.penalty(params)) and copy.ids == held.ids
    held.purge(Ids([3]))
    assert held.bytes() == 0 and not held.holds(Ids.range(0, 10)) and float(held.penalty(params)) == 0.0
    held.add_gradient(params)
    assert params["w"].grad is None
    anchor["w"].fill_(7.0)
    assert not (copy.anchor["w"] == 7.0).any()  # the anchor is a copy
    plain = QuadraticAnchor(anchor)
    again = QuadraticAnchor(anchor, stiffness)
    again.load_state_dict(plain.state_dict())
    assert again.stiffness is None


def test_wrong_input():
    _, anchor, stiffness = setting()
    for call in (
        lambda: QuadraticAnchor(anchor, strength=-1.0),
        lambda: QuadraticAnchor(anchor, {"w": stiffness["w"]}),
    ):
        with pytest.raises(BadInput):
            call()
