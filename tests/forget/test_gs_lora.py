"""The checks of card gs-lora: one step by hand, exact identities, and requests one after another on a small vision transformer."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from remanence.core.errors import BadInput, NotFinite
from remanence.core.rng import generator
from remanence.data import Request, digits, split_classes
from remanence.forget.gs_lora import GSLoRA
from remanence.life.life import Life
from remanence.models import cnn, mlp, vit
from remanence.nn.adapters import LowRank, add_low_rank
from remanence.nn.anatomy import features
from remanence.nn.blocks import feed_forward
from remanence.train.loop import forget
from tests.forget.helpers import (
    SEEDS,
    accuracy,
    class_accuracy,
    class_ids,
    digits_model,
    forget_update,
    forgotten,
    same,
    split,
    state,
    taught,
)

TRAIN, TEST = split()
THREE = class_ids(TRAIN, 3)
SHORT = {"epochs": 3, "schedule": "constant"}


def small_vit(seed=0, outputs=10):
    return vit(64, patch=4, width=32, depth=4, heads=4, ratio=2, outputs=outputs, seed=seed)


@lru_cache
def _vit_model(seed):
    return taught(small_vit(seed), TRAIN, seed=seed, epochs=15, batch_size=32, lr=3e-3)


def vit_model(seed=0):
    return copy.deepcopy(_vit_model(seed))


def blocks_changed(outcome):
    return int(outcome.notes[0].split()[0])


# ------------------------------------------------------------------------------------------------------------- values


def test_one_step_written_out():
    """One step of plain gradient descent from B = 0: A feels the lasso only, so the layer moves by -lr dL/dW A'A(1 - lr alpha / |A|)."""
    model, lr = digits_model(), 0.05
    by = GSLoRA(rank=3, alpha=0.7, beta=0.4, bound=20.0, pull=0.3, bound_p=9.0, hold=0.2, data_ratio=1.0, threshold=0.0)
    knobs = {"epochs": 1, "batch_size": 5000, "optimizer": "sgd", "lr": lr, "schedule": "constant"}
    after, outcome = forgotten(model, by, TRAIN, THREE, **knobs)
    u = forget_update(model, by, TRAIN, THREE)
    bound = 64**-0.5
    down = torch.empty(3, 64).uniform_(-bound, bound, generator=generator(u.seed_of("adapters"), "low-rank", "body.1"))
    asked, retain = TRAIN.only(THREE), TRAIN.without(THREE)
    with torch.no_grad():
        z = features(model, TRAIN["x"])
        means = torch.stack([z[TRAIN["y"] == c].mean(0) for c in range(10)])

    def distance(examples):
        p, e = means[examples["y"]].softmax(1), features(model, examples["x"]).softmax(1)
        return (p * (p.log() - e.log())).sum(1).mean()

    kept, gone = (F.cross_entropy(model(examples["x"]), examples["y"]) for examples in (retain, asked))
    assert gone < 20 and distance(asked) < 9  # both ascents push
    loss = kept + 0.4 * (20 - gone) + 0.3 * (9 - distance(asked)) + 0.2 * distance(retain)
    (slope,) = torch.autograd.grad(loss, model.body[1].weight)
    moved = down * (1 - lr * 0.7 / down.norm())
    wanted = model.body[1].weight - lr * slope @ down.T @ moved
    torch.testing.assert_close(after.body[1].weight, wanted, atol=1e-6, rtol=1e-4)
    share = ((wanted - model.body[1].weight).norm() / model.body[1].weight.norm()).item()
    assert outcome.notes == [f"1 of 1 blocks changed: body.1 by {share:.2g}"]


def test_beyond_the_bound_the_forget_set_pushes_no_more():
    """At bound 0 every loss is beyond it: the same bits as without the term."""
    model = vit_model()
    without, _ = forgotten(model, GSLoRA(beta=0.0), TRAIN, THREE, **SHORT)
    beyond, _ = forgotten(model, GSLoRA(bound=0.0), TRAIN, THREE, **SHORT)
    pushed, _ = forgotten(model, GSLoRA(), TRAIN, THREE, **SHORT)
    assert same(without, beyond) and not same(without, pushed)


def test_prototypes_beyond_their_bound_push_no_more():
    model = vit_model()
    plain, _ = forgotten(model, GSLoRA(), TRAIN, THREE, **SHORT)
    beyond, _ = forgotten(model, GSLoRA(pull=0.5, bound_p=0.0), TRAIN, THREE, **SHORT)
    pushed, _ = forgotten(model, GSLoRA(pull=0.5), TRAIN, THREE, **SHORT)
    assert not same(plain, pushed)
    for (name, p), q in zip(plain.named_parameters(), beyond.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("kind", ["vit", "mlp"])
def test_only_the_blocks_linear_weights_change(kind):
    """Not a bias, a norm, a running statistic, an attention or the head; and the structure is the old one."""
    model = vit_model() if kind == "vit" else digits_model(norm=True)
    flags = [p.requires_grad for p in model.parameters()]
    after, _ = forgotten(model, GSLoRA(pull=0.02, hold=0.01), TRAIN, THREE, **SHORT)
    before, now = state(model), state(after)
    assert list(before) == list(now) and [type(m) for m in model.modules()] == [type(m) for m in after.modules()]
    assert flags == [p.requires_grad for p in after.parameters()]
    moved = {name for name in before if not torch.equal(before[name], now[name])}
    assert moved == {f"{name}.weight" for group in feed_forward(model).values() for name in group}


@pytest.mark.parametrize("norm", [False, True])
def test_below_the_threshold_nothing_changes(norm):
    for model in (vit_model(), digits_model(norm=norm)):
        after, outcome = forgotten(model, GSLoRA(threshold=1e9), TRAIN, THREE, **SHORT)
        assert same(after, model) and blocks_changed(outcome) == 0


def test_a_change_has_the_rank_asked_for():
    model = vit_model()
    after, _ = forgotten(model, GSLoRA(rank=3), TRAIN, THREE, **SHORT)
    for names in feed_forward(model).values():
        for name in names:
            change = after.get_submodule(name).weight - model.get_submodule(name).weight
            size = torch.linalg.svdvals(change.detach().double())
            assert size[2] > 1e-4 and size[3] < 1e-5 * size[0]


def test_the_average_of_the_adapters():
    """decay = 1 stays at the first adapters taken, those of the end of epoch `average_from`; decay = 0 is the last ones."""
    model = vit_model()

    def run(epochs, **knobs):
        return forgotten(model, GSLoRA(**knobs), TRAIN, THREE, **{**SHORT, "epochs": epochs})[0]

    two, four = run(2), run(4)
    assert same(run(4, average_from=1, decay=1.0), two) and same(run(4, average_from=1, decay=0.0), four)
    assert same(run(4, average_from=4, decay=0.5), four) and not same(run(4, average_from=1, decay=0.5), four)


def test_the_lasso_can_wait():
    model = vit_model()
    late, _ = forgotten(model, GSLoRA(alpha=0.1, alpha_from=3), TRAIN, THREE, **SHORT)
    never, _ = forgotten(model, GSLoRA(alpha=0.0), TRAIN, THREE, **SHORT)
    now, _ = forgotten(model, GSLoRA(alpha=0.1), TRAIN, THREE, **SHORT)
    assert same(late, never) and not same(now, never)


def test_the_share_of_the_retained_data():
    """What is drawn is all that counts: the rest of the retained data may be noise."""
    model, by = vit_model(), GSLoRA(data_ratio=0.05)
    u = forget_update(copy.deepcopy(model), by, TRAIN, THREE, **SHORT)
    forget(u, Request(ids=THREE))
    seen = u.consumed.replayed
    retain = TRAIN.without(THREE)
    assert len(seen) == round(0.05 * len(retain)) and not seen & THREE
    whole, _ = forgotten(model, GSLoRA(data_ratio=0.05), TRAIN, THREE, **SHORT)
    rest = retain.without(seen)
    noise = TRAIN["x"].clone()
    noise[TRAIN.rows(rest.ids)] = 0.5
    again, _ = forgotten(model, GSLoRA(data_ratio=0.05), TRAIN.replace(x=noise), THREE, **SHORT)
    assert same(whole, again)


def test_same_seed_same_bits_and_nothing_left_behind():
    model, by = vit_model(), GSLoRA(pull=0.02, average_from=1)
    u = forget_update(model, by, TRAIN, THREE, **SHORT)
    torch.manual_seed(5)
    draws = torch.random.get_rng_state()
    forget(u, Request(ids=THREE))
    assert torch.equal(draws, torch.random.get_rng_state())
    assert not [name for name in vars(by) if name.startswith("_")] and by.bytes() == 0 and not by.state_dict()
    adapters = sum(4 * 8 * (32 + 64) * 2 for _ in range(4))
    assert u.extra_bytes == 2 * adapters + 10 * 32 * 4
    again, _ = forgotten(vit_model(), GSLoRA(pull=0.02, average_from=1), TRAIN, THREE, **SHORT)
    other, _ = forgotten(vit_model(), GSLoRA(pull=0.02, average_from=1), TRAIN, THREE, seed=1, **SHORT)
    assert same(again, model) and not same(other, model)


def test_after_a_failure_the_network_is_as_it_was():
    model = vit_model()
    failing = copy.deepcopy(model)
    with pytest.raises(NotFinite):
        forget(forget_update(failing, GSLoRA(), TRAIN, THREE, **{**SHORT, "lr": 1e30}), Request(ids=THREE))
    assert same(failing, model)


def test_adapters_that_are_there_stay():
    """A network that learns by LoRA keeps its adapters; what is forgotten goes into the weights below them."""
    model = vit_model()
    names = [name for group in feed_forward(model).values() for name in group]
    add_low_rank(model, names, rank=2, alpha=2.0, seed=0)
    after, outcome = forgotten(model, GSLoRA(), TRAIN, THREE, **SHORT)
    assert list(state(after)) == list(state(model)) and blocks_changed(outcome) == 4
    assert sum(isinstance(module, LowRank) for module in after.modules()) == 8
    for name, p in model.named_parameters():
        assert torch.equal(p, after.get_parameter(name)) is not name.endswith("base.weight"), name


def test_one_example_can_be_forgotten():
    one = TRAIN.ids.sample(1, torch.Generator().manual_seed(0))
    after, _ = forgotten(vit_model(), GSLoRA(), TRAIN, one, epochs=10, schedule="constant")
    with torch.no_grad():
        loss = F.cross_entropy(after(TRAIN.only(one)["x"]), TRAIN.only(one)["y"])
    assert loss > 3 and accuracy(after, TEST) > 0.9


def test_what_it_cannot_do():
    model = digits_model()
    with pytest.raises(BadInput, match="retained"):
        forgotten(model, GSLoRA(), TRAIN, TRAIN.ids)
    for bare in (mlp(64, [], 10), cnn((1, 8, 8), [4], 10)):
        with pytest.raises(BadInput, match="hidden linear"):
            forgotten(bare, GSLoRA(), TRAIN, THREE)
    with pytest.raises(BadInput, match="label"):
        forgotten(model, GSLoRA(), TRAIN.replace(y=TRAIN["y"].double()), THREE)
    with pytest.raises(BadInput, match="data_ratio"):
        GSLoRA(data_ratio=1.5)


# ------------------------------------------------------------------------------------------------------------ purpose


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_lasso_leaves_blocks_alone(seed):
    """Measured: 4 blocks change without it; 1, 2 and 2 with alpha 0.1 from epoch 15, 0 % left, the rest between +0.7 and -1.5 points."""
    model = vit_model(seed)
    base = class_accuracy(model, TEST, 3)
    _, plain = forgotten(model, GSLoRA(alpha=0.0), TRAIN, THREE, **SHORT)
    after, sparse = forgotten(model, GSLoRA(alpha=0.1, alpha_from=15), TRAIN, THREE)
    gone, kept = class_accuracy(after, TEST, 3)
    assert blocks_changed(plain) == 4 and 1 <= blocks_changed(sparse) < 4
    assert base[0] > 0.9 and gone < 0.05 and kept > base[1] - 0.03
    said = {word for word in sparse.notes[0].replace(",", " ").split() if word.startswith("blocks.")}
    for block, names in feed_forward(model).items():
        for name in names:
            still = torch.equal(model.get_submodule(name).weight, after.get_submodule(name).weight)
            assert still is (block not in said)


def test_a_strong_lasso_from_the_start_wins_before_anything_is_forgotten():
    model = vit_model()
    after, outcome = forgotten(model, GSLoRA(alpha=1.0), TRAIN, THREE, epochs=40)
    assert same(after, model) and blocks_changed(outcome) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_forgets_a_class_of_a_perceptron(seed):
    model = digits_model(seed)
    before = class_accuracy(model, TEST, 3)
    after, outcome = forgotten(model, GSLoRA(), TRAIN, THREE, epochs=40)
    gone, kept = class_accuracy(after, TEST, 3)
    assert blocks_changed(outcome) == 1 and before[0] > 0.9
    assert gone < 0.05 and kept > before[1] - 0.03


@pytest.mark.fidelity(
    "forget/gs-lora",
    check="one step by hand, prototypes included; bounds, threshold and average as exact identities; three requests in one life, ViT on digits, three seeds",
    measured="classes 3, 8, 5 by data_ratio 0.3, 35 epochs: 0 % left of each and later too, the other classes gain 1.3 to 3.2 points",
    paper="CASIA-Face100, 4 requests of 20 classes: 0.00 newly, 1.93 earlier forgotten left (++: 0.00), the rest 72.45 (75.36) of 74.47 (75.11)",
    differs="plain cross-entropy with bound 10; adapters B A without 1 / rank; small blocks are left out at the end",
)
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_three_requests_in_one_life(seed, tmp_path):
    """A tenth of these few data is 120 examples: with it 0 % are left, too, but one seed of three loses 4 points of the rest."""
    task = split_classes(digits(), tasks=1)[0]
    with Life(small_vit(seed, outputs=0), home=tmp_path / "life", measure=["accuracy"], seed=seed) as life:
        life.learn(task, epochs=15, batch_size=32, lr=3e-3)
        left = task.test.without(class_ids(task.test, 3) | class_ids(task.test, 8) | class_ids(task.test, 5))
        base = accuracy(life.model, left)
        for number, label in enumerate((3, 8, 5)):
            assert class_accuracy(life.model, task.test, label)[0] > 0.85
            life.forget(Request(classes=[label]), by=GSLoRA(data_ratio=0.3), epochs=35)
            gone = [class_accuracy(life.model, task.test, c)[0] for c in (3, 8, 5)[: number + 1]]
            assert max(gone) < 0.05 and accuracy(life.model, left) > base - 0.03
