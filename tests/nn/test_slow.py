"""A slow copy is the average it says, gives back what it took, grows with the network, and ends of a line are exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.holder import Holder
from remanence.core.ids import Ids
from remanence.models import mlp
from remanence.nn.slow import SlowCopy, interpolated


def params(seed=0, rows=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    made = {"w": torch.randn(rows, 3, generator=g), "b": torch.randn(rows, generator=g)}
    return {name: nn.Parameter(value.to(dtype)) for name, value in made.items()}


def tracking(of):
    slow = SlowCopy()
    slow.track(of)
    return slow


def bits(values):
    return {name: value.detach().clone() for name, value in values.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_it_is_a_holder_that_starts_as_a_copy_of_its_own():
    p = params()
    slow = tracking(p)
    assert isinstance(slow, Holder) and slow.bytes() == 4 * (12 + 4)
    assert same(slow.values, bits(p)) and slow.values["w"].data_ptr() != p["w"].data_ptr()
    other = params(1)
    slow.track(other)  # followed already: nothing starts again
    assert same(slow.values, bits(p))
    assert not slow.holds(Ids([1, 2]))
    slow.track({"w": p["w"].to("meta")})
    assert slow.values["w"].device.type == "meta" and slow.values["b"].device.type == "cpu"


def test_following_is_the_weighted_sum_of_all_that_was_seen():
    """slow_n = (1 - s)^n w_0 + sum_k s (1 - s)^(n - k) w_k."""
    seen = [params(seed) for seed in range(8)]
    slow, share = tracking(seen[0]), 0.3
    for p in seen[1:]:
        slow.follow(p, share)
    for name in ("w", "b"):
        wanted = (1 - share) ** 7 * seen[0][name].double()
        for k in range(1, 8):
            wanted = wanted + share * (1 - share) ** (7 - k) * seen[k][name].double()
        torch.testing.assert_close(slow.values[name].double(), wanted.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("each", [False, True])
def test_shares_0_and_1_are_exact(each):
    a, b = params(0), params(1)
    for share, end in ((0.0, a), (1.0, b)):
        slow = tracking(a)
        slow.follow(b, {name: torch.tensor(share) for name in b} if each else share)
        assert same(slow.values, bits(end))


def test_every_tensor_can_have_a_share_of_its_own():
    a, b = params(0), params(1)
    slow, shares = tracking(a), {"w": torch.tensor(0.25), "b": torch.tensor(0.75, dtype=torch.float64)}
    slow.follow(b, shares)
    for name in shares:
        wanted = a[name] + float(shares[name]) * (b[name] - a[name])
        torch.testing.assert_close(slow.values[name], wanted.detach())


def test_what_is_not_followed_is_left_alone():
    a, b = params(0), params(1)
    slow = tracking({"w": a["w"]})
    slow.follow(b, 1.0)
    slow.swap(a)
    assert same(slow.values, {"w": params(0)["w"]})
    assert torch.equal(a["w"], b["w"]) and torch.equal(a["b"], params(0)["b"])
    slow.put({"b": b["b"]})
    assert torch.equal(b["b"], params(1)["b"])
    SlowCopy().follow(a, 0.5)


def test_swapping_twice_changes_no_bit():
    a, b = params(0), params(1)
    slow = tracking(b)
    slow.swap(a)
    assert same(bits(a), bits(b)) and same(slow.values, bits(params(0)))
    slow.swap(a)
    assert same(bits(a), bits(params(0))) and same(slow.values, bits(b))


def test_lent_weights_answer_and_are_given_back_even_after_an_error():
    model, other = mlp(4, [5], 2, seed=0), mlp(4, [5], 2, seed=1)
    own, x = dict(model.named_parameters()), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    slow = tracking(dict(other.named_parameters()))
    before, loss = bits(own), model(x).square().sum()
    places = [p.data_ptr() for p in own.values()]
    with slow.lent(own), torch.no_grad():
        assert torch.equal(model(x), other(x))
    assert same(bits(own), before) and places == [p.data_ptr() for p in own.values()]
    truth = torch.autograd.grad(model(x).square().sum(), list(own.values()))
    found = torch.autograd.grad(loss, list(own.values()))  # of a forward made before the loan
    assert all(torch.equal(a, b) for a, b in zip(truth, found, strict=True))
    with pytest.raises(ZeroDivisionError), slow.lent(own):
        1 / 0  # noqa: B018
    assert same(bits(own), before) and same(slow.values, bits(dict(other.named_parameters())))


def test_it_grows_with_the_network_and_drops_what_is_gone():
    old, now = params(0), params(1, rows=6)
    slow = tracking({**old, "gone": torch.ones(2)})
    slow.fit(now)
    assert list(slow.values) == ["w", "b"]
    for name in now:
        assert torch.equal(slow.values[name][:4], old[name]) and torch.equal(slow.values[name][4:], now[name][4:])
    with pytest.raises(BadInput, match="smaller"):
        slow.fit(old)


def test_low_precision_is_averaged_in_float32():
    """A share of 0.001 is lost in bfloat16, whose steps around 1 are 0.008."""
    p = {"w": nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    slow = tracking(p)
    with torch.no_grad():
        p["w"].add_(1)
    for _ in range(100):
        slow.follow(p, 0.001)
    assert slow.values["w"].dtype == torch.float32
    torch.testing.assert_close(slow.values["w"], torch.full((3,), 2 - 0.999**100), rtol=1e-5, atol=0)
    slow.put(p)
    assert p["w"].dtype == torch.bfloat16 and not (p["w"] == 1).any()
    assert tracking({"w": torch.ones(2, dtype=torch.float64)}).values["w"].dtype == torch.float64


def test_state_round_trip_and_clear():
    slow = tracking(params())
    other = SlowCopy()
    other.load_state_dict(copy.deepcopy(slow.state_dict()))
    assert same(other.values, slow.values) and other.bytes() == slow.bytes()
    other.follow(params(1), 0.5)
    assert not same(other.values, slow.values)
    other.clear()
    assert other.bytes() == 0 and not other.values


def test_the_ends_of_a_line_are_exact_and_its_middle_is_the_mean():
    a, b = params(0), params(1)
    assert same(interpolated(a, b, 0.0), bits(a)) and same(interpolated(a, b, 1.0), bits(b))
    torch.testing.assert_close(interpolated(a, b, 0.5)["w"], ((a["w"] + b["w"]) / 2).detach())
    torch.testing.assert_close(interpolated(a, b, 0.3), interpolated(b, a, 0.7))
    with pytest.raises(BadInput, match="names and shapes"):
        interpolated(a, params(rows=5), 0.5)
