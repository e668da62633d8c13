"""Fisher matrices against closed forms and a loop over examples written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import Classification, Regression
from remanence.nn.fisher import absolute_gradient, absolute_sensitivity, batch_fisher, diagonal_fisher

torch.set_num_threads(1)


def seeded(build):
    torch.manual_seed(0)
    return build().double()


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 4))


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", groups=2, bias=False),
        nn.GroupNorm(3, 6),
        nn.Flatten(),
        nn.Linear(96, 4),
    )


class Sequence(nn.Module):
    """Linear layers on (B, T, F)."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.inner(x.reshape(len(x), 3, 6)))).mean(1))


def batch(n=21, shape=(6,), classes=4):
    g = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(n, *shape, generator=g).double(),
        "y": torch.randint(classes, (n,), generator=g),
        "id": torch.arange(n),
        "weight": torch.rand(n, generator=g).double(),
    }


def split(data, size):
    return [{k: v[at : at + size] for k, v in data.items()} for at in range(0, len(data["y"]), size)]


def naive(model, problem, data, kind, classes=None, weight=None):
    """One example at a time through plain autograd; the exact kind through every label in turn."""
    params = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    model = model.eval()
    n = len(data["y"])
    weight = torch.ones(n).double() if weight is None else weight
    for i, one in enumerate(split(data, 1)):
        columns = range(4) if classes is None else classes.tolist()
        labels = [one["y"]] if kind == "empirical" else [torch.tensor([c]) for c in columns]
        for y in labels:
            out = problem.forward(model, one)
            shown = out.logits if classes is None else out.logits[:, classes]
            p = 1.0 if kind == "empirical" else shown.softmax(1)[0, list(columns).index(int(y))].detach()
            loss = problem.losses(out, {**one, "y": y}, classes)
            for (name, _), g in zip(
                params.items(), torch.autograd.grad(loss.sum(), list(params.values())), strict=True
            ):
                total[name] += p * weight[i] * g**2 / weight.sum()
    return total


def close(a, b, rtol=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        assert torch.allclose(a[name], b[name], rtol=rtol, atol=rtol * float(b[name].max())), name


MODELS = {"mlp": (mlp, (6,)), "convnet": (convnet, (2, 8, 8)), "sequence": (Sequence, (18,))}


@pytest.mark.parametrize("kind", ["empirical", "exact"])
@pytest.mark.parametrize("engine", ["hooks", "vmap"])
@pytest.mark.parametrize("name", MODELS)
def test_engines_equal_the_loop_over_examples(name, engine, kind):
    build, shape = MODELS[name]
    model, data = seeded(build), batch(shape=shape)
    with torch.no_grad():
        model(data["x"])  # running statistics that are not the initial ones
    params = dict(model.named_parameters())
    found = diagonal_fisher(model, Classification(), split(data, 8), params, kind=kind, engine=engine)
    close(found, naive(model, Classification(), data, kind))


@pytest.mark.parametrize("kind", ["empirical", "exact"])
@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_batch_size_does_not_matter(engine, kind):
    model, data = seeded(mlp), batch(n=67)
    params = dict(model.named_parameters())
    found = [diagonal_fisher(model, Classification(), split(data, s), params, kind, engine=engine) for s in (1, 8, 64)]
    close(found[1], found[0], 1e-12)
    close(found[2], found[0], 1e-12)
    model = model.float()
    data = {k: v.float() if v.is_floating_point() else v for k, v in data.items()}
    params = dict(model.named_parameters())
    found = [diagonal_fisher(model, Classification(), split(data, s), params, kind, engine=engine) for s in (1, 8, 64)]
    close(found[1], found[0], 1e-6)
    close(found[2], found[0], 1e-6)


def test_logistic_closed_form():
    """Softmax regression: F_exact[c, d] = mean_i p_c (1 - p_c) x_d^2.

    F_empirical[c, d] = mean_i (p_c - 1[y = c])^2 x_d^2.
    """
    model, data = seeded(lambda: nn.Linear(6, 4)), batch()
    p = model(data["x"]).softmax(1).detach()
    params = dict(model.named_parameters())
    exact = diagonal_fisher(model, Classification(), [data], params, kind="exact")
    assert torch.allclose(exact["weight"], (p * (1 - p)).T @ data["x"] ** 2 / 21, rtol=1e-12)
    assert torch.allclose(exact["bias"], (p * (1 - p)).mean(0), rtol=1e-12)
    empirical = diagonal_fisher(model, Classification(), [data], params)
    error = (p - F.one_hot(data["y"], 4)) ** 2
    assert torch.allclose(empirical["weight"], error.T @ data["x"] ** 2 / 21, rtol=1e-12)


def test_linear_gaussian_closed_form():
    """Unit-variance Gaussian: F_exact = X'X diagonal / n whatever the targets; the empirical one is the residual's."""
    model, data = seeded(lambda: nn.Linear(6, 1)), batch()
    data["y"] = torch.randn(21, generator=torch.Generator().manual_seed(3)).double()
    params = dict(model.named_parameters())
    exact = diagonal_fisher(model, Regression(), [data], params, kind="exact")
    assert torch.allclose(exact["weight"][0], (data["x"] ** 2).mean(0), rtol=1e-12)
    assert torch.allclose(exact["bias"], torch.ones(1).double())
    empirical = diagonal_fisher(model, Regression(), split(data, 8), params)
    residual = (model(data["x"]).squeeze(1) - data["y"]).detach()
    assert torch.allclose(empirical["weight"][0], (residual[:, None] ** 2 * data["x"] ** 2).mean(0), rtol=1e-12)


def test_sigmoid_exact_is_the_sum_over_all_outcomes():
    model, data = seeded(lambda: nn.Linear(6, 3)), batch(n=5, classes=3)
    params, problem = dict(model.named_parameters()), Classification(link="sigmoid")
    found = diagonal_fisher(model, problem, [data], params, kind="exact")
    p, truth = model(data["x"]).sigmoid().detach(), torch.zeros(3, 6).double()
    for outcome in torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3):
        chance = torch.where(outcome == 1, p, 1 - p).prod(1)
        for i, one in enumerate(split(data, 1)):
            loss = problem.losses(problem.forward(model, one), {**one, "y": outcome.unsqueeze(0)})
            truth += chance[i] * torch.autograd.grad(loss.sum(), model.weight)[0] ** 2 / 5
    assert torch.allclose(found["weight"], truth, rtol=1e-10)


def test_exact_is_the_expectation_of_empirical():
    """Labels drawn from the model itself: the empirical Fisher tends to the exact one."""
    model, data = seeded(lambda: nn.Linear(6, 4)), batch(n=20)
    params = dict(model.named_parameters())
    exact = diagonal_fisher(model, Classification(), [data], params, kind="exact")
    many = {"x": data["x"].repeat(2000, 1)}
    g = torch.Generator().manual_seed(0)
    many["y"] = torch.multinomial(model(many["x"]).softmax(1).detach(), 1, generator=g).squeeze(1)
    sampled = diagonal_fisher(model, Classification(), [many], params)
    assert float((sampled["weight"] / exact["weight"] - 1).abs().max()) < 0.1


@pytest.mark.parametrize("engine", ["hooks", "vmap"])
def test_competing_columns_and_weights(engine):
    model, data = seeded(mlp), batch()
    data["y"] = torch.where(data["y"] % 2 == 0, 1, 3)
    classes, params = torch.tensor([1, 3]), dict(model.named_parameters())
    for kind in ("empirical", "exact"):
        found = diagonal_fisher(
            model, Classification(), split(data, 8), params, kind, classes, weight_by="weight", engine=engine
        )
        close(found, naive(model, Classification(), data, kind, classes, data["weight"]))
        assert not found["3.weight"][[0, 2]].any()


def test_nothing_is_touched():
    model, data = seeded(convnet), batch(shape=(2, 8, 8))
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    params = dict(model.named_parameters())
    for engine in ("hooks", "vmap"):
        found = diagonal_fisher(model, Classification(), [data], params, engine=engine)
        assert found["0.weight"].any()  # frozen parameters have a Fisher too
    batch_fisher(model, Classification(), [data], params)
    absolute_gradient(model, Classification(), [data], params)
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert not model[0].weight.requires_grad and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Tied(nn.Module):
    """The weight of `a` is also used outside its forward; `b` is called twice; `c` is a bare parameter."""

    def __init__(self, way):
        super().__init__()
        self.way, self.a, self.b = way, nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
        self.c = nn.Parameter(torch.ones(4)) if way == "bare" else None

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.way == "outside":
            h = F.linear(h, self.a.weight)
        if self.way == "twice":
            h = self.a(h)
        y = self.b(h)
        return y * self.c if self.way == "bare" else y


@pytest.mark.parametrize("way", ["outside", "twice", "bare"])
def test_models_that_the_hooks_cannot_read_fall_back(way):
    model, data = seeded(lambda: Tied(way)), batch()
    params = dict(model.named_parameters())
    close(
        diagonal_fisher(model, Classification(), split(data, 8), params),
        naive(model, Classification(), data, "empirical"),
    )
    with pytest.raises(BadInput):
        diagonal_fisher(model, Classification(), [data], params, engine="hooks")


def test_a_shared_parameter_falls_back():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    model[2].weight = model[0].weight
    data, params = batch(), dict(model.named_parameters())
    close(diagonal_fisher(model, Classification(), [data], params), naive(model, Classification(), data, "empirical"))


def test_chunks_do_not_matter(monkeypatch):
    model, data = seeded(convnet), batch(shape=(2, 8, 8))
    params = dict(model.named_parameters())
    whole = {e: diagonal_fisher(model, Classification(), [data], params, engine=e) for e in ("hooks", "vmap")}
    monkeypatch.setattr("remanence.nn.fisher.CHUNK_BYTES", 20_000)
    for engine, expected in whole.items():
        close(diagonal_fisher(model, Classification(), [data], params, engine=engine), expected, 1e-12)


def test_batch_fisher_is_the_square_of_the_batch_gradient():
    model, data = seeded(mlp), batch()
    model.eval()
    params, problem = dict(model.named_parameters()), Classification()
    truth = {name: torch.zeros_like(p) for name, p in params.items()}
    for part in split(data, 8):
        loss = F.cross_entropy(model(part["x"]), part["y"])
        for name, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            truth[name] += g**2 / 3
    close(batch_fisher(model, problem, split(data, 8), params), truth)
    close(batch_fisher(model, problem, split(data, 1), params), diagonal_fisher(model, problem, [data], params))


def test_absolute_gradient_closed_form():
    """f(x) = W x: d mean ||Wx||^2 / dW = 2/n sum (W x_i) x_i'. No label is read."""
    model, data = seeded(lambda: nn.Linear(6, 4, bias=False)), batch()
    del data["y"]
    w, x = model.weight.detach(), data["x"]
    parts = [x[:11], x[11:]]
    truth = sum(((2 / len(p)) * (p @ w.T).T @ p).abs() for p in parts) / 2
    found = absolute_gradient(model, Classification(), [{"x": p} for p in parts], dict(model.named_parameters()))
    assert torch.allclose(found["weight"], truth, rtol=1e-12)


@pytest.mark.parametrize("engine", ["hooks", "vmap"])
@pytest.mark.parametrize("name", MODELS)
def test_absolute_sensitivity_is_that_of_batches_of_one(name, engine):
    build, shape = MODELS[name]
    model, data = seeded(build), batch(shape=shape)
    params, seen = dict(model.named_parameters()), torch.tensor([0, 2])
    truth = absolute_gradient(model, Classification(), split(data, 1), params, seen)
    for cut in (7, len(data["y"])):
        close(absolute_sensitivity(model, Classification(), split(data, cut), params, seen, engine), truth)


def test_wrong_input():
    model, data = seeded(mlp), batch()
    params = dict(model.named_parameters())
    for call in (
        lambda: diagonal_fisher(model, Classification(), [], params),
        lambda: diagonal_fisher(model, Classification(), [data], params, kind="sampled"),
        lambda: diagonal_fisher(model, Classification(), [data], params, engine="jit"),
        lambda: diagonal_fisher(model, Classification(), [data], params, weight_by="batch"),
        lambda: batch_fisher(model, Classification(), [], params),
        lambda: absolute_gradient(model, Classification(), [], params),
        lambda: absolute_sensitivity(model, Classification(), [], params),
        lambda: absolute_sensitivity(model, Classification(), [data], params, engine="jit"),
    ):
        with pytest.raises(BadInput):
            call()
