"""LCIA: alpha is the formula's, the averages are the naive ones, and old and new are both kept where raw training forgets."""

from __future__ import annotations

import copy

import pytest
import torch

from remanence.core.problem import Regression
from remanence.data import Examples, Task
from remanence.keep.lcia import LCIA
from remanence.models import mlp
from remanence.train.roles import Keeper
from tests.keep.lives import Lived, same, stream, weights

STREAM = stream()
TWO = list(STREAM)[:2]
#: A factor with which no alpha is below 1: the fallback is always taken.
NEVER = 1e300


class Watch(Keeper):
    """Weights and gradients after every batch."""

    def after(self, u, batch):
        seen.append({name: (p.detach().clone(), p.grad.clone()) for name, p in u.parameters.items()})


seen: list[dict] = []


@pytest.fixture(autouse=True)
def _empty():
    seen.clear()


def net(seed=0):
    return mlp(64, [16], outputs=4, seed=seed)


def naive(steps, factor, fallback, norm="sum"):
    """Averages by name, over numbers of Python."""
    averages, shares = {}, []
    for name, (start, before) in steps[0].items():
        slow, before = start.double(), before.double()
        for step in steps[1:]:
            p, g = (value.double() for value in step[name])
            a, b, c = (float(value.abs().sum()) for value in (p - slow, g, g - before))
            if norm == "mean":
                a, b, c = a / p.numel(), b / p.numel(), c / p.numel()
            alpha = factor * (1 + b) / (a * c) if a * c > 0 else float("inf")
            alpha = alpha if 0 < alpha < 1 else fallback
            slow, before = (1 - alpha) * slow + alpha * p, g
            shares.append(alpha)
        averages[name] = slow
    return averages, shares


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}], ids=["every batch", "every third batch"])
@pytest.mark.parametrize(("norm", "factor"), [("sum", 0.1), ("mean", 1e-5)])
def test_the_average_is_the_naive_one_in_every_event(norm, factor, settings):
    keeper = LCIA(factor, 0.05, norm)
    lived = Lived([keeper, Watch()], net())
    for task in TWO:
        seen.clear()
        lived.learn(task, epochs=2, **settings)
        every = settings.get("accumulate", 1)
        averages, shares = naive(seen[every - 1 :: every], factor, 0.05, norm)
        assert any(share == 0.05 for share in shares) and any(share != 0.05 for share in shares)
        for name, value in weights(lived.model).items():
            torch.testing.assert_close(value.double(), averages[name], rtol=1e-4, atol=1e-5)
        assert keeper.bytes() == 0 and not keeper.derived()


def test_a_scalar_quadratic_by_hand():
    """L = 2 p^2 for rows x = 2, y = 0, by steps of 0.05: p goes 1, 0.8, 0.64, 0.512, 0.4096 and g = 4 p of the step's start.

    First step: theta* = 0.8. Second: a = 0.16, b = 3.2, c = 0.8, alpha = 0.01 * 4.2 / 0.128 = 0.328125, and so on.
    """
    model = mlp(1, [], outputs=1)
    with torch.no_grad():
        model.head.weight.fill_(1)
        model.head.bias.zero_()
    model.head.bias.requires_grad_(False)
    data = Examples({"x": torch.full((4, 1), 2.0), "y": torch.zeros(4, 1)}, "toy")
    keeper = LCIA(factor=0.01, fallback=0.5)
    lived = Lived([keeper, Watch()], model)
    lived.problem = Regression()
    lived.learn(Task(data, data, (), (), 0), lr=0.05, batch_size=1, epochs=1)
    trained = [float(step["head.weight"][0]) for step in seen]
    assert trained == pytest.approx([0.8, 0.64, 0.512, 0.4096])
    star, shares = 0.8, []
    for p, g, before in ((0.64, 3.2, 4.0), (0.512, 2.56, 3.2), (0.4096, 2.048, 2.56)):
        shares.append(0.01 * (1 + g) / (abs(p - star) * abs(g - before)))
        star += shares[-1] * (p - star)
    assert shares == pytest.approx([0.328125, 0.2361996, 0.2108981], rel=1e-5)
    assert lived.model.head.weight.item() == pytest.approx(star, rel=1e-5)


def test_a_fixed_alpha_is_the_fixed_average_and_alpha_1_is_raw_training():
    fixed = Lived([LCIA(NEVER, 0.01), Watch()], net()).all([TWO[0]])
    slow = {name: value.double() for name, (value, _) in seen[0].items()}
    for step in seen[1:]:
        slow = {name: 0.99 * value + 0.01 * step[name][0] for name, value in slow.items()}
    for name, value in weights(fixed.model).items():
        torch.testing.assert_close(value.double(), slow[name], rtol=0, atol=1e-6)
    raw, one = Lived([], net()).all(TWO), Lived([LCIA(NEVER, 1.0)], net()).all(TWO)
    assert same(raw.model, one.model) and not same(raw.model, fixed.model)
    assert LCIA(0.0, 1.0).inert


def test_two_gradients_alike_give_the_fallback():
    """No difference, no way to have gone, or both: infinite or no number, never a NaN in the average."""
    keeper = LCIA(fallback=0.125)
    p, g = torch.ones(3), torch.full((3,), 0.5)
    keeper.average.track({"same": torch.zeros(3), "there": torch.ones(3), "both": torch.ones(3), "far": torch.zeros(3)})
    keeper.gradients = {"same": g, "there": -g, "both": g, "far": -g}
    shares = keeper._alphas(dict.fromkeys(keeper.gradients, p), dict.fromkeys(keeper.gradients, g))
    assert [float(shares[name]) for name in ("same", "there", "both")] == [0.125] * 3
    assert float(shares["far"]) == 2 * (1 + 1.5) / (3 * 3)


def test_the_mean_does_not_see_how_large_a_tensor_is():
    g = torch.Generator().manual_seed(0)
    p, slow, now, before = torch.randn(4, 5, generator=g)
    for norm, ratio in (("mean", 1.0), ("sum", None)):
        keeper, shares = LCIA(1e-3, 0.5, norm), []
        for times in (1, 50):
            keeper.average.clear()
            keeper.average.track({"w": slow.repeat(times)})
            keeper.gradients = {"w": before.repeat(times)}
            shares.append(float(keeper._alphas({"w": p.repeat(times)}, {"w": now.repeat(times)})["w"]))
        assert 0 < shares[1] < 0.5 and 0 < shares[0] < 0.5
        b = float(now.abs().sum())
        assert shares[1] / shares[0] == pytest.approx(ratio or (1 + 50 * b) / (1 + b) / 50**2, rel=1e-5)


def test_what_gets_no_gradient_stays_and_a_forget_run_is_left_alone():
    model = net()
    model.unused = torch.nn.Parameter(torch.ones(3))
    lived = Lived([LCIA()], model).all([TWO[0]])
    assert torch.equal(lived.model.unused, torch.ones(3))
    u = lived.update("forget")
    keeper = lived.state.keepers[0]
    keeper.begin(u)
    keeper.after(u, {})
    before = weights(lived.model)
    keeper.end(u)
    assert same(lived.model, before) and keeper.bytes() == 0


def test_the_copy_is_counted_while_it_is_there():
    u = Lived([LCIA()], net()).learn(TWO[0], epochs=1)
    assert u.extra_bytes == 2 * sum(p.nbytes for p in u.model.parameters())


def after_two(keep, seed):
    """Accuracy of the first task before the second, of the first after it, of the second."""
    lived = Lived([], mlp(64, [256, 256], seed=seed), seed=seed)
    tasks = list(stream(seed))[:2]
    lived.learn(tasks[0], optimizer={"sgd": {"momentum": 0.9}}, lr=0.05, epochs=3)
    first = lived.accuracy(0)
    found = []
    for part in keep:
        other = copy.copy(lived)
        other.state, other.tasks, other.updates = copy.deepcopy(lived.state), list(lived.tasks), []
        other.state.keepers = part
        other.learn(tasks[1], optimizer="adamw", lr=0.001, epochs=5)
        found.append((first - other.accuracy(0), other.accuracy(1)))
    return found


@pytest.mark.fidelity(
    "keep/lcia",
    check="alpha by hand on a scalar quadratic, averages against numbers of Python; two tasks of digits by AdamW, five seeds",
    measured="forgetting 0.20 where raw training has 1.00; the new task at 0.97, where an average with alpha 0.001 has 0.07",
    paper="forgetting 5.42 to 1.93 on CoIN with LLaVA-7B",
    differs="digits and a perceptron, no choice of adapters; by SGD on so small a network alpha is often near 1 and little is kept",
)
def test_old_and_new_are_kept_where_raw_training_and_a_slower_average_have_one():
    for seed in range(5):
        raw, slow, dynamic = after_two(([], [LCIA(NEVER, 0.001)], [LCIA()]), seed)
        assert dynamic[0] < raw[0] - 0.3 and dynamic[1] > slow[1] + 0.4
