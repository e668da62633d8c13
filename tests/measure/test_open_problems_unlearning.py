"""The robustness report: its rule on made-up figures, and the networks of the card on real digits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.problem import Classification, Regression
from remanence.data import Examples
from remanence.learn.finetune import Finetune
from remanence.measure.benchmarks.open_problems_unlearning import LEVELS, Check, OpenProblems, judge
from remanence.measure.robustness import quantised
from remanence.models import mlp
from remanence.train.update import Context
from tests.forget.helpers import LABELS, accuracy, class_ids, digits_model, same, split, taught

TRAIN, TEST = split()
THREE = class_ids(TRAIN, 3)
FAST = OpenProblems(
    relearn_n=[10], rates=[1e-3], steps=40, seeds=1, bits=[8, 4], prune=[0.2], noise=[0.2], permutations=0
)


def context(model, labels=LABELS):
    return Context(model, Classification(), Finetune(), labels)


def examine(model, original, references, ids=THREE, protocol=FAST):
    checks = protocol.examine(
        context(model), context(original), [context(r) for r in references], TRAIN.only(ids), TRAIN.without(ids), TEST
    )
    return protocol.verdict(checks), {check.name: check for check in checks}


# ------------------------------------------------------------------------------------------------------------ the rule


def test_a_check_fails_outside_the_interval_of_one_more_reference():
    """References .1, .2, .3: mean .2, sd .1, one more lies within t_{.975, 2} .1 sqrt(1 + 1/3) = .497 of it."""
    refs = (0.1, 0.2, 0.3)
    half = 4.302652729911275 * 0.1 * math.sqrt(4 / 3)
    for side, value, fails in (
        ("above", 0.2 + half + 0.13, True),
        ("above", 0.2 + half - 0.01, False),
        ("above", -5.0, False),
        ("below", -5.0, True),
        ("below", 5.0, False),
        ("both", -5.0, True),
        ("both", 5.0, True),
    ):
        found = judge("g", "n", value, None, refs, side, "")
        assert (found.verdict == "fail") is fails, (side, value)
    assert judge("g", "n", 0.9, None, refs, "above", "", margin=0.3).verdict == "pass"


def test_a_tenth_of_the_way_does_not_fail_and_powerless_checks_do_not_pass():
    refs = (0.0, 0.0, 0.0)
    assert judge("g", "n", 0.09, 1.0, refs, "above", "").verdict == "pass"
    found = judge("g", "n", 0.11, 1.0, refs, "above", "")
    assert found.verdict == "fail" and found.leak
    away = judge("g", "n", -0.5, 1.0, refs, "both", "")
    assert away.verdict == "fail" and not away.leak  # a mark, not the knowledge
    assert judge("g", "n", 0.0, 0.0, refs, "above", "").verdict == "cannot tell"
    assert judge("g", "n", 1.0, 1.0, (0.0,), "above", "").verdict == "cannot tell"  # one reference has no spread
    assert judge("g", "n", 0.0, 0.01, refs, "above", "", margin=0.02).verdict == "cannot tell"
    with pytest.raises(BadInput):
        judge("g", "n", 0.0, 1.0, (), "above", "")


def test_the_worst_group_that_leaks_names_the_level():
    fine = [Check(group, "n", 0.0, 1.0, (0.0, 0.0), "above", "", "pass", False, True) for group in LEVELS]
    protocol = OpenProblems()
    assert protocol.verdict(fine) == "removed"
    for i, (group, level) in enumerate(LEVELS.items()):
        bad = [replace(c, verdict="fail", leak=True) if j >= i else c for j, c in enumerate(fine)]
        assert protocol.verdict(bad) == level, group
    mark = [replace(c, verdict="fail") for c in fine if c.group != "relearning"]
    assert protocol.verdict([*mark, *[c for c in fine if c.group == "relearning"]]) == "removed"
    minor = [*fine, replace(fine[0], verdict="fail", leak=True, decides=False)]
    assert protocol.verdict(minor) == "removed"
    untold = [replace(c, verdict="cannot tell") if c.group == "relearning" else c for c in fine]
    assert protocol.verdict(untold) == "cannot tell" and protocol.verdict([]) == "cannot tell"


# -------------------------------------------------------------------------------------------------------- real networks


def within_half_a_step(original, steps=80):
    """Class 3 forgotten by ascent that moves no weight by half a step of its 4-bit grid, from a network on the grid."""
    base = quantised(original, 4)
    made = copy.deepcopy(base)
    start = {name: p.detach().clone() for name, p in made.named_parameters()}
    bound = {
        name: 0.45 * p.abs().amax(1, keepdim=True) / 7 * (p.abs() < p.abs().amax(1, keepdim=True))
        if p.dim() > 1
        else torch.zeros_like(p)
        for name, p in start.items()
    }
    mine, rest = TRAIN.only(THREE), TRAIN.without(THREE).select(torch.arange(300))
    for _ in range(steps):
        made.zero_grad()
        wrong = torch.log(1 - made(mine["x"]).softmax(1)[:, 3] + 1e-6).mean()
        (torch.nn.functional.cross_entropy(made(rest["x"]), rest["y"]) - 2 * wrong).backward()
        with torch.no_grad():
            for name, p in made.named_parameters():
                p -= 0.02 * p.grad.sign() * bound[name].mean()
                p.copy_(torch.maximum(torch.minimum(p, start[name] + bound[name]), start[name] - bound[name]))
    return base, made


@pytest.mark.fidelity(
    "measure/open-problems-unlearning",
    check="the networks of the protocol on digits, class 3, three seeds: unchanged, hidden below 4 bits, hidden by its bias, retrained",
    measured="holds, suppressed, obscured, removed, in every seed",
    paper="-",
    differs="made from the abstract; levels holds and cannot tell are ours",
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_purpose_the_four_levels(seed):
    references = [digits_model(10 + k, without=THREE) for k in range(3)]
    base, shallow = within_half_a_step(digits_model(seed))
    hidden = copy.deepcopy(base)
    with torch.no_grad():
        hidden.head.bias[3] -= 12
    mine = TRAIN.only(THREE)
    assert accuracy(shallow, mine) < 0.05 and accuracy(hidden, mine) == 0
    levels = {}
    for name, model in (
        ("unchanged", base),
        ("shallow", shallow),
        ("hidden", hidden),
        ("retrained", digits_model(seed, without=THREE)),
    ):
        before = copy.deepcopy(model)
        levels[name], checks = examine(model, base, references)
        assert same(model, before)
        print(name, levels[name], [(c.name, c.after) for c in checks.values() if c.verdict == "fail"])
    assert levels == {"unchanged": "holds", "shallow": "suppressed", "hidden": "obscured", "retrained": "removed"}


def test_the_same_model_as_reference_has_advantage_one():
    """Never trained on the class, beside itself: every figure equals the references', the advantage is 1."""
    never, original = digits_model(1, without=THREE), digits_model(0)
    level, checks = examine(never, original, [never, never])
    assert level == "removed"
    assert checks["relearn advantage, forgotten examples"].after == 1.0
    assert all(c.after == c.references[0] for c in checks.values()) and not any(c.leak for c in checks.values())


def test_random_examples_are_judged_by_loss_and_probed_against_strangers():
    small = TRAIN.select(torch.arange(300))
    ids = small.select(torch.arange(0, 300, 4)).ids
    models = [
        taught(mlp(64, [64], 10, seed=s), data, seed=s, epochs=60, lr=3e-3)
        for s, data in (
            (0, small),
            (0, small.without(ids)),
            (1, small.without(ids)),
            (2, small.without(ids)),
            (3, small.without(ids)),
        )
    ]
    levels = {}
    for name, model, permutations in (("unchanged", models[0], 20), ("retrained", models[1], 0)):
        protocol = replace(FAST, permutations=permutations)
        checks = protocol.examine(
            context(model), context(models[0]), [context(m) for m in models[2:]], small.only(ids), small.without(ids), TEST
        )  # fmt: skip
        levels[name] = protocol.verdict(checks)
        probed = next(c for c in checks if c.group == "probe")
        assert ("p = " in probed.note) is (permutations > 0) and 0.2 < probed.after < 0.8
        assert checks[0].name == "forget loss"
    assert levels == {"unchanged": "holds", "retrained": "removed"}


def test_a_regression_is_judged_by_its_loss():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(200, 2, generator=rng)
    y = (3 * x[:, 0] + 3.0 * (x[:, 1] > 0.6))[:, None]
    data = Examples({"x": x, "y": y}, "steps")
    gone = data.select((x[:, 1] > 0.6).nonzero()[:, 0])
    kept = data.without(gone.ids)

    def fitted(seed, rows):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        opt = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(300):
            opt.zero_grad()
            (model(rows["x"]) - rows["y"]).square().mean().backward()
            opt.step()
        return Context(model, Regression(), Finetune())

    original, never, *references = fitted(0, data), *[fitted(s, kept) for s in range(1, 5)]
    levels = [FAST.verdict(FAST.examine(model, original, references, gone, kept)) for model in (original, never)]
    assert levels == ["holds", "removed"]


def test_a_reference_without_the_column_gets_a_fresh_one():
    kept = TRAIN.without(THREE)
    labels = [label for label in LABELS if label != 3]

    def never(seed):
        made = kept.replace(y=torch.tensor([labels.index(y) for y in kept["y"].tolist()]))
        return context(taught(mlp(64, [32], 9, seed=seed), made, labels=list(range(9)), new=list(range(9)), seed=seed, epochs=10), labels)  # fmt: skip

    original = context(taught(mlp(64, [32], 10, seed=0), TRAIN, epochs=10))
    checks = FAST.examine(never(3), original, [never(1), never(2)], TRAIN.only(THREE), kept, TEST)
    assert FAST.verdict(checks) == "removed"
    assert FAST.verdict(FAST.examine(original, original, [never(1), never(2)], TRAIN.only(THREE), kept)) == "holds"
    with pytest.raises(BadInput):
        FAST.examine(original, original, [], TRAIN.only(THREE), kept)
