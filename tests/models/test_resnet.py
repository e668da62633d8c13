"""ResNet-18: its shape and size, one block by hand, and that everything that acts on networks acts on it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import Classification
from remanence.models import MODELS, resnet18
from remanence.models.resnet import Residual
from remanence.nn.anatomy import features, norm_modules, reinitialised
from remanence.nn.fisher import diagonal_fisher
from remanence.nn.heads import grow_head
from tests.forget.helpers import SEEDS, accuracy, same, split, taught


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_the_known_sizes():
    """11,173,962 parameters with the stem for CIFAR-10, 11,689,512 with the one for ImageNet: the counts of everyone's ResNet-18."""
    with torch.device("meta"):
        assert size(resnet18((3, 32, 32), outputs=10)) == 11_173_962
        assert size(resnet18((3, 224, 224), outputs=1000, stem="large")) == 11_689_512
        assert resnet18((3, 32, 32), width=20, outputs=10).head.in_features == 160


@pytest.mark.parametrize(("stem", "side"), [("small", 4), ("large", 1)])
def test_the_size_of_the_last_map(stem, side):
    model, maps = resnet18((3, 32, 32), width=4, outputs=2, stem=stem).eval(), []
    model.stages.register_forward_hook(lambda _, __, out: maps.append(out))
    x = torch.rand(2, 3, 32, 32)
    y = model(x)
    assert maps[0].shape == (2, 32, side, side)
    torch.testing.assert_close(y, model.head(maps[0].mean((2, 3))))


@pytest.mark.parametrize(("inputs", "stride"), [(3, 2), (5, 1), (3, 1)])
def test_a_block_by_hand(inputs, stride):
    block = Residual(inputs, 5, stride).eval()
    with torch.no_grad():
        for norm in norm_modules(block).values():
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, inputs, 6, 6)

    def norm(layer, x):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    inner = F.relu(norm(block.norm1, F.conv2d(x, block.conv1.weight, stride=stride, padding=1)))
    inner = norm(block.norm2, F.conv2d(inner, block.conv2.weight, padding=1))
    if stride == 1 and inputs == 5:
        assert not len(block.shortcut)
        wanted = F.relu(inner + x)
    else:
        convolution, last = block.shortcut
        wanted = F.relu(inner + norm(last, F.conv2d(x, convolution.weight, stride=stride)))
    torch.testing.assert_close(block(x), wanted)


def test_seeds_rows_and_growth():
    torch.manual_seed(3)
    draws = torch.random.get_rng_state()
    a, b, c = (resnet18(64, width=4, seed=seed) for seed in (1, 1, 2))
    assert same(a, b) and not same(a, c) and torch.equal(draws, torch.random.get_rng_state())
    assert same(reinitialised(a, 5), reinitialised(c, 5)) and not same(reinitialised(a, 5), a)
    x = torch.rand(4, 64)
    a.eval()
    assert a(x).shape == (4, 0)
    grown = grow_head(a, 3, seed=0)
    assert torch.equal(grown(x), grown(x.reshape(4, 1, 8, 8))) and grown(x).shape == (4, 3)
    more = grow_head(copy.deepcopy(grown), 2, seed=1)
    assert torch.equal(more.head.weight[:3], grown.head.weight)
    torch.testing.assert_close(more(x)[:, :3], grown(x))
    z = features(grown, x)
    assert z.shape == (4, 32) and (z >= 0).all()
    torch.testing.assert_close(grown.head(z), grown(x))


def test_drawn_anew_its_statistics_are_new_too():
    model = resnet18(64, width=4, outputs=2)
    model(torch.rand(8, 64))
    fresh = reinitialised(model, 0)
    moved = [norm.running_mean.abs().sum() > 0 for norm in norm_modules(model).values()]
    assert all(moved) and not any(norm.running_mean.any() for norm in norm_modules(fresh).values())


@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_fisher_is_the_mean_of_squared_gradients(engine):
    model = resnet18(64, width=2, outputs=10).eval()
    params = dict(model.named_parameters())
    batch = split()[0].batch(torch.arange(6))
    found = diagonal_fisher(model, Classification(), [batch], params, engine=engine)
    wanted = {name: torch.zeros_like(p) for name, p in params.items()}
    for x, y in zip(batch["x"], batch["y"], strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        for name, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            wanted[name] += g.square() / 6
    for name in params:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_learns_digits(seed):
    """Two epochs at an eighth of the width. Measured: 0.924 to 0.960 of held-out digits."""
    train, test = split()
    model = taught(resnet18(64, width=8, outputs=10, seed=seed), train, seed=seed, epochs=2, batch_size=32, lr=3e-3)
    assert accuracy(model, test) > 0.88


def test_the_head_is_linear_and_a_plan_can_name_it():
    with torch.device("meta"):  # as a plan is checked
        model = MODELS["resnet18"](inputs=(1, 28, 28), width=20, outputs=2)
    assert isinstance(model.head, nn.Linear) and model.head.weight.is_meta


@pytest.mark.parametrize(
    ("inputs", "knobs", "word"), [(65, {}, "square"), (64, {"stem": "tiny"}, "stem"), (64, {"width": 0}, "width")]
)
def test_wrong_knobs(inputs, knobs, word):
    with pytest.raises(BadInput, match=word):
        resnet18(inputs, **knobs)
