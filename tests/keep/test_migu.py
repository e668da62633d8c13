"""MIGU: which rows may move, and that the others keep every bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import CausalLM, Classification
from remanence.keep.migu import MIGU
from remanence.learn.finetune import Finetune
from remanence.models import mlp
from remanence.nn.adapters import LowRank, add_low_rank
from remanence.nn.masks import above_quantile, token_places
from remanence.train.loop import learn
from remanence.train.roles import Keeper
from remanence.train.settings import Settings
from remanence.train.update import Update
from tests.keep.lives import same, stream, weights
from tests.lm import facts, tiny, tokens

STREAM = stream()
PLAIN = {"optimizer": "sgd", "lr": 0.1, "batch_size": 256}


def event(model, data, parts, problem=None, life_step=1, labels=(0, 1), **settings):
    """A learn event by hand; `life_step` 0 is a life's first."""
    u = Update(model=model, problem=problem or Classification(), owner=Finetune(), settings=Settings(**{**PLAIN, **settings}),
               data=lambda _: data, parts=parts, labels=labels, new_labels=labels, life_step=life_step)  # fmt: skip
    learn(u)
    return u


def still(before, model, name):
    """Rows of a parameter of which no bit changed."""
    now = dict(model.named_parameters())[name].detach()
    equal = before[name].view(torch.int32) == now.view(torch.int32)
    return equal.reshape(len(now), -1).all(1)


class Looking(Keeper):
    """What the keeper before it decided in each step."""

    def __init__(self, other):
        super().__init__()
        self.other, self.masks = other, []

    def remembered(self):
        return {}

    def gradient(self, u):
        self.masks.append({name: mask.flatten().clone() for name, mask in self.other._masks.items()})


@pytest.mark.fidelity(
    "keep/migu",
    check="a step of a plain loop that multiplies gradient rows by a quantile mask of summed absolute outputs; a second table of facts in a tiny language model, three seeds",
    measured="weights equal to 1e-6; loss on the old table 2.57 where plain training, less far with the new one, has 2.76; 2.34 with rows at random",
    paper="15.2 points over plain LoRA on 15 tasks with T5-large",
    differs="moments and weight decay are masked, too; no padding, no head; small networks",
)
def test_a_step_is_the_papers():
    model = mlp(64, [20, 12], 2, seed=3)
    naive, before, data = copy.deepcopy(model), weights(model), STREAM[0].train
    event(model, data, [MIGU(threshold=0.6)], batch_size=1000)
    x, y = data["x"], data["y"]
    h1 = F.linear(x, naive.body[1].weight, naive.body[1].bias)
    h2 = F.linear(F.relu(h1), naive.body[3].weight, naive.body[3].bias)
    F.cross_entropy(naive.head(F.relu(h2)), y).backward()
    for layer, h in ((naive.body[1], h1), (naive.body[3], h2), (naive.head, None)):
        m = h.detach().abs().sum(0) if h is not None else torch.ones(2)
        mask = (m >= torch.quantile(m, 0.6)).float()
        for p in (layer.weight, layer.bias):
            p.data -= 0.1 * p.grad * mask.view(-1, *[1] * (p.dim() - 1))
    for name, p in naive.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], p, rtol=1e-6, atol=1e-7)
        assert h is None or int(mask.sum()) == {20: 8, 12: 5}[len(mask)]
    assert not still(before, model, "head.weight").any()


@pytest.mark.parametrize(
    "optimizer", [{"adamw": {"weight_decay": 0.5}}, {"sgd": {"momentum": 0.9, "weight_decay": 0.1}}]
)
def test_rows_that_no_step_chose_keep_every_bit(optimizer):
    """Under momentum and weight decay, over many steps; their moments are those of a gradient of zero."""
    model, keeper = mlp(64, [16], 2, seed=1), MIGU(threshold=0.7)
    looking = Looking(keeper)
    before = weights(model)
    u = event(model, STREAM[0].train, [keeper, looking], optimizer=optimizer, lr=0.01, batch_size=32, epochs=2)
    assert len(looking.masks) == u.steps_done > 10
    ever = torch.stack([masks["body.1.weight"] for masks in looking.masks]).any(0)
    assert int((~ever).sum()) > 0 and torch.equal(still(before, model, "body.1.weight"), ~ever)
    assert torch.equal(still(before, model, "body.1.bias"), ~ever) and not vars(keeper).get("_seen")


def test_the_largest_row_always_moves():
    model = mlp(64, [16], 2, seed=1)
    before = weights(model)
    event(model, STREAM[0].train, [MIGU(threshold=1.0)], batch_size=1000)
    h = F.linear(STREAM[0].train["x"], before["body.1.weight"], before["body.1.bias"]).abs().sum(0)
    assert (~still(before, model, "body.1.weight")).nonzero().flatten().tolist() == [int(h.argmax())]


def test_the_first_event_is_free_and_all_rows_are_none():
    models = [mlp(64, [16], 2, seed=1) for _ in range(3)]
    for model, part, step in zip(models, ([], [MIGU()], [MIGU(threshold=0)]), (0, 0, 1), strict=True):
        event(model, STREAM[0].train, part, life_step=step)
    assert same(models[0], models[1]) and same(models[0], models[2])


def test_accumulated_batches_share_one_mask():
    """The mask of the sum over the batches of a step, not of its last batch."""
    data = STREAM[0].train
    looks = []
    for size, accumulate in ((60, 4), (240, 1)):
        model, keeper = mlp(64, [32], 2, seed=1), MIGU()
        looks.append(Looking(keeper))
        event(model, data.select(torch.arange(240)), [keeper, looks[-1]], batch_size=size, accumulate=accumulate)
    (four,), (one,) = looks[0].masks, looks[1].masks
    assert torch.equal(four["body.1.weight"], one["body.1.weight"])


def test_low_rank_adapters_are_masked_by_their_own_outputs():
    model = add_low_rank(mlp(64, [16], 2, seed=1), ["body.1"], 8, 8.0, 0)
    layer = model.body[1]
    assert isinstance(layer, LowRank)
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(0))
    layer.base.requires_grad_(False)
    before, x = weights(model), STREAM[0].train["x"]
    event(model, STREAM[0].train, [MIGU(threshold=0.5)], batch_size=1000)
    low = x @ before["body.1.down"].T
    for name, h in (("body.1.down", low), ("body.1.up", low @ before["body.1.up"].T)):
        assert torch.equal(~still(before, model, name), above_quantile(h.abs().sum(0), 0.5))
    assert still(before, model, "body.1.base.weight").all()


def masks_of(data, problem, batch_size=64, **settings):
    model, keeper = tiny(), MIGU()
    looking = Looking(keeper)
    event(
        model,
        data,
        [keeper, looking],
        problem,
        labels=(),
        batch_size=batch_size,
        optimizer="adamw",
        lr=1e-3,
        **settings,
    )
    return looking.masks, model


def mixed():
    """Rows of 9 tokens and of 5."""
    data = facts(32, 1)
    body = data["input_ids"].clone().long()
    short = tokens(body[:16, :5], 2)
    return data.replace(
        **{name: torch.cat([short[name], data[name][16:]]) for name in ("input_ids", "attention_mask", "labels")}
    )


@pytest.mark.parametrize("packing", [False, True])
def test_padding_does_not_count(packing):
    """The rows chosen are those of a sum over rows that are forwarded one by one, without any padding."""
    data, problem = mixed(), CausalLM(context=12, packing=packing)
    (masks,), _ = masks_of(data, problem)
    model, sums = tiny(), {}

    def add(name):
        def hook(_, __, output):
            sums[name] = sums.get(name, 0) + output.detach().abs().sum((0, 1))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(add(f"{name}.weight"))
    for row in range(len(data)):
        length = int(data["attention_mask"][row].sum())
        model(input_ids=data["input_ids"][row : row + 1, :length].long())
    assert set(masks) == set(sums) and len(sums) == 14
    assert all(torch.equal(masks[name], above_quantile(m, 0.7)) for name, m in sums.items())
    places = token_places(problem, data.batch(torch.arange(len(data))))
    assert int(places.sum()) == int(data["attention_mask"].sum())


def test_of_a_language_model_all_but_the_linear_layers_learn_as_ever():
    before = weights(tiny())
    masks, model = masks_of(facts(64, 1), CausalLM(context=12))
    assert len(masks) == 1
    for name, p in model.named_parameters():
        if name in masks[0]:
            assert torch.equal(~still(before, model, name), masks[0][name])
        else:
            assert not torch.equal(p, before[name])


def test_no_rows_to_choose():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(BadInput, match="migu"):
        event(net, STREAM[0].train, [MIGU()])


def score(model, data, problem):
    batch = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        return float(problem.loss(problem.forward(model, batch), batch))


def tables(seed, epochs):
    """A table of facts is learned, then another one under each keeper: the loss on the first, and on the second."""
    problem, model = CausalLM(context=12), tiny(seed)
    old, new = facts(24, 10 + seed, keys=1), facts(24, 40 + seed, keys=2, first_id=1000)
    settings = {"labels": (), "optimizer": "adamw", "batch_size": 12}
    event(model, old, [], problem, life_step=0, lr=3e-3, epochs=18, **settings)
    found = []
    for keeper, count in epochs:
        after = copy.deepcopy(model)
        event(after, new, [keeper] if keeper else [], problem, lr=2e-3, epochs=count, **settings)
        found.append((score(after, old, problem), score(after, new, problem)))
    return found


@pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)]])
def test_less_of_an_old_table_is_forgotten_for_as_much_of_a_new_one(seed):
    """Loss on the old table and on the new one. Measured: 2.79 and 2.26, 2.67 and 2.14, 2.83 and 2.32 without; 2.53 and 1.95, 2.46 and
    2.03, 2.71 and 2.12 with; 2.40 and 2.02, 2.30 and 2.18, 2.33 and 2.21 with rows at random, which are as good: of the rows that one
    table chooses the other one chooses 86 to 92 %."""
    plain, masked = tables(seed, [(None, 8), (MIGU(), 14)])
    assert masked[1] < plain[1] and masked[0] < plain[0] - 0.08
