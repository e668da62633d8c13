"""Experts behind a router, the balance loss, and ranks that choose themselves: identities, and naive loops beside them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from remanence.nn.adapters import LowRank
from remanence.nn.experts import (
    LowRankExperts,
    MixtureOfRanks,
    Router,
    add_experts,
    localized_balance,
    routing,
    row_shares,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(inputs: int = 6, outputs: int = 5) -> nn.Linear:
    made = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        for at, p in enumerate(made.parameters()):
            p.copy_(torch.randn(p.shape, generator=rng(at), dtype=torch.float64))
    return made


def filled(layer: nn.Module) -> nn.Module:
    """Every adapter weight drawn anew, the values too."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if not name.startswith("base"):
                p.copy_(torch.randn(p.shape, generator=rng(len(name) + p.numel()), dtype=p.dtype))
    return layer


X = torch.randn(4, 3, 6, generator=rng(9), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- experts


def test_nothing_changes_until_b_moves() -> None:
    layer = LowRankExperts(linear(), 4, 2, 3.0, 0.0, rng())
    assert torch.equal(layer(X), layer.base(X)) and layer.down.any() and layer.router.weight.any()
    assert float(layer.down.detach().abs().max()) <= 6**-0.5


def test_one_expert_is_lora() -> None:
    one, plain = LowRankExperts(linear(), 1, 3, 7.0, 0.0, rng(1)), LowRank(linear(), 3, 7.0, rng(1))
    assert torch.equal(one.down, plain.down) and one.up.shape == plain.up.shape
    with torch.no_grad():
        for layer in (one, plain):
            layer.up.copy_(torch.randn(5, 3, generator=rng(2), dtype=torch.float64))
    torch.testing.assert_close(one(X), plain(X), atol=1e-14, rtol=0)


def test_it_is_the_formula() -> None:
    layer = filled(LowRankExperts(linear(), 4, 2, 3.0, 0.0, rng()))
    assert isinstance(layer, LowRankExperts)
    for x, y in zip(X.flatten(0, 1), layer(X).flatten(0, 1), strict=True):
        logits = [math.exp(float(g @ x)) for g in layer.router.weight.detach()]
        by_hand = layer.base(x)
        for i in range(4):
            a, b = layer.down[2 * i : 2 * i + 2], layer.up[:, 2 * i : 2 * i + 2]
            by_hand = by_hand + 3.0 / 2 * logits[i] / sum(logits) * (b @ (a @ x))
        torch.testing.assert_close(y, by_hand, atol=1e-12, rtol=0)


def test_the_router_works_in_float32_and_dropout_on_the_experts_only() -> None:
    layer = LowRankExperts(nn.Linear(6, 5).bfloat16(), 4, 2, 3.0, 0.0, rng())
    shares = layer.router(X.bfloat16())
    assert shares.dtype == torch.float32 and layer(X.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(shares.sum(-1), torch.ones(4, 3), atol=1e-6, rtol=0)
    dropped = filled(LowRankExperts(linear(), 4, 2, 3.0, 0.5, rng()))
    assert isinstance(dropped, LowRankExperts)
    assert not torch.equal(dropped(X), dropped(X)) and torch.equal(dropped.router(X), dropped.router(X))
    dropped.eval()
    assert torch.equal(dropped(X), dropped(X))


# -------------------------------------------------------------------------------------------- the balance


def test_balance_by_hand() -> None:
    shares = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    # Row 0 is of group 0 (the first two experts), row 1 of group 1: the own half counts 1 - delta.
    z = [0.9 * 0.1, 0.9 * 0.2, 1.1 * 0.3, 1.1 * 0.4, 1.1 * 0.4, 1.1 * 0.3, 0.9 * 0.2, 0.9 * 0.1]
    mean = sum(z) / 8
    expected = sum((v - mean) ** 2 for v in z) / 7 / mean**2
    assert float(localized_balance(shares, torch.tensor([0, 1]), 0.1)) == pytest.approx(expected, abs=1e-9)
    equal = torch.full((3, 6), 1 / 6)
    assert float(localized_balance(equal, torch.tensor([0, 1, 1]), 0.0)) < 1e-12


@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_the_balance_is_least_where_a_row_leans_on_its_own_half(delta: float) -> None:
    """Free shares end at (1 + delta) / 2 on the row's own half: the sign, and the fixed point."""
    logits = torch.randn(6, 4, generator=rng(3), dtype=torch.float64).requires_grad_()
    group = torch.tensor([0, 1, 0, 1, 1, 0])
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        loss = localized_balance(logits.softmax(1), group, delta)
        loss.backward()
        optimizer.step()
    shares = logits.detach().softmax(1)
    halves = torch.stack([shares[:, :2].sum(1), shares[:, 2:].sum(1)], 1)
    own = halves.gather(1, group[:, None])[:, 0]
    torch.testing.assert_close(own, torch.full_like(own, (1 + delta) / 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(shares[:, 0], shares[:, 1], atol=1e-4, rtol=0)
    assert float(loss) < 1e-8


def test_its_gradient_reaches_the_layers_router_only() -> None:
    layer = filled(LowRankExperts(linear(), 4, 2, 3.0, 0.0, rng()))
    with routing(layer) as taken:
        layer(X)
    loss = localized_balance(row_shares(taken["router"]), torch.tensor([0, 1, 1, 0]), 0.3)
    loss.backward()
    reached = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"router.weight"}


def test_padding_takes_no_part_and_long_rows_weigh_no_more() -> None:
    shares = torch.rand(3, 5, 4, generator=rng(4)).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    found = row_shares(shares, mask)
    for row, length in enumerate((5, 2, 1)):
        torch.testing.assert_close(found[row], shares[row, :length].mean(0))
    shares[1, 2:] = 7.0
    assert torch.equal(row_shares(shares, mask), found)
    torch.testing.assert_close(row_shares(shares), shares.mean(1))
    assert torch.equal(row_shares(shares[:, 0]), shares[:, 0])


def test_routing_keeps_the_first_forward_with_gradients() -> None:
    model = add_experts(nn.Sequential(linear(), nn.ReLU(), linear(5, 6)), ["0", "2"], 4, 2, 1.0, 0.0, 3)
    with routing(model) as taken:
        with torch.no_grad():
            model(X)
        assert not taken
        model(X)
        first = dict(taken)
        model(2 * X)
        assert set(taken) == {"0.router", "2.router"} and all(taken[name] is first[name] for name in first)
        assert taken["0.router"].shape == (4, 3, 4) and taken["0.router"].requires_grad
        taken.clear()
        model(2 * X)
        assert not torch.equal(taken["0.router"], first["0.router"])
    taken.clear()
    model(X)
    assert not taken and not any(m._forward_hooks for m in model.modules() if isinstance(m, Router))


# -------------------------------------------------------------------------------------------------- ranks


def mixture(*ranks: int, base: nn.Linear | None = None, **choice: object) -> MixtureOfRanks:
    layer = MixtureOfRanks(base or linear())
    layer.choose(**{"tau": 0.1, "k": 100, **choice})  # type: ignore[arg-type]
    for at, rank in enumerate(ranks):
        layer.append(rank, rng(at))
    return layer


def by_hand(layer: MixtureOfRanks, x: Tensor) -> tuple[Tensor, int]:
    """One input (in,): the answer and how many ranks took part, with loops only."""
    keys = [key for block in layer.down for key in block.detach()]
    values = [value for block in layer.up for value in block.detach().T]
    response = [float(key @ x) for key in keys]
    length = math.sqrt(sum(r * r for r in response))
    score = [r / length for r in response]
    total = sum(math.exp(s / layer.tau) for s in score)
    best = sorted(range(len(keys)), key=lambda i: -score[i])[: layer.k]
    if not layer.training and layer.threshold is not None:
        best = [i for i in best if score[i] >= layer.threshold]
    weight = {i: math.exp(score[i] / layer.tau) / total for i in best}
    if layer.renormalise:
        weight = {i: w / sum(weight.values()) for i, w in weight.items()}
    y = layer.base(x)
    for i in best:
        y = y + weight[i] * response[i] * values[i]
    return y, len(best)


@pytest.mark.parametrize(
    "choice", [{}, {"k": 3}, {"k": 3, "tau": 0.7}, {"threshold": 0.1}, {"k": 4, "threshold": 0.0, "renormalise": True}]
)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_formula_of_ranks(choice: dict[str, object], training: bool) -> None:
    layer = filled(mixture(4, 3, **choice)).train(training)
    assert isinstance(layer, MixtureOfRanks)
    for x, y in zip(X.flatten(0, 1), layer(X).flatten(0, 1), strict=True):
        expected, count = by_hand(layer, x)
        torch.testing.assert_close(y, expected, atol=1e-10, rtol=0)
        assert count <= layer.k
    assert layer.training is training


def test_without_a_choice_it_is_lora_at_one_over_the_ranks() -> None:
    layer = filled(mixture(3, 4, tau=math.inf))
    assert isinstance(layer, MixtureOfRanks)
    plain = LowRank(linear(), 7, 1.0, rng())
    with torch.no_grad():
        plain.down.copy_(torch.cat(list(layer.down)))
        plain.up.copy_(torch.cat(list(layer.up), 1))
    assert plain.scale == 1 / 7
    torch.testing.assert_close(layer(X), plain(X), atol=1e-12, rtol=0)


def test_nothing_changes_until_values_move_and_new_ranks_change_nothing_until_trained() -> None:
    layer = mixture(3)
    for training in (True, False):
        assert torch.equal(layer.train(training)(X), layer.base(X))
    with torch.no_grad():
        layer.up[0].copy_(torch.randn(5, 3, generator=rng(7), dtype=torch.float64))
    before = layer.eval()(X)
    layer.append(4, rng(8))
    torch.testing.assert_close(layer(X), before, atol=1e-14, rtol=0)
    assert not torch.allclose(layer.train()(X), before)  # in training they take their share
    layer.eval().choose(tau=0.1, k=100, skip_empty=False)
    assert not torch.allclose(layer(X), before)


def test_the_key_that_points_to_the_input_wins_and_the_opposite_one_does_not() -> None:
    layer = mixture(6, k=1)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=rng(5), dtype=torch.float64)).Q
    with torch.no_grad():
        layer.down[0].copy_(basis)
    w = layer.weights(basis @ basis.T, layer.up[0])
    assert torch.equal(w.argmax(1), torch.arange(6)) and torch.equal((w > 0).sum(1), torch.ones(6, dtype=torch.int64))
    opposite = layer.weights(-basis @ basis.T, layer.up[0])
    assert not bool(((opposite > 0) & torch.eye(6, dtype=torch.bool)).any())


@pytest.mark.parametrize("k", [1, 3, 6])
def test_never_more_than_k_and_the_newest_have_their_reserve(k: int) -> None:
    layer = mixture(5, 4, k=k, reserve=2).train()
    x = torch.randn(200, 6, generator=rng(6), dtype=torch.float64)
    w = layer.weights(x @ torch.cat(list(layer.down)).T, torch.cat(list(layer.up), 1))
    used = w > 0
    assert int(used.sum(1).max()) == int(used.sum(1).min()) == k
    assert int(used[:, 5:].sum(1).min()) >= min(2, k)
    layer.choose(tau=0.1, k=k)
    free = layer.weights(x @ torch.cat(list(layer.down)).T, torch.cat(list(layer.up), 1)) > 0
    assert int(free[:, 5:].sum(1).min()) < 2


def test_the_choice_is_a_constant_but_the_weights_have_a_gradient() -> None:
    layer = filled(mixture(4, k=2))
    layer(X).square().sum().backward()
    assert isinstance(layer, MixtureOfRanks)
    assert layer.down[0].grad is not None and layer.down[0].grad.any()
    down = layer.down[0]

    def value(keys: Tensor) -> Tensor:
        response = X.flatten(0, 1)[:1] @ keys.T
        return layer.weights(response, layer.up[0]).sum()

    torch.autograd.gradcheck(value, (down.detach().clone().requires_grad_(),))
