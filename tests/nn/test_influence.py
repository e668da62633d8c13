"""Curvature products and solvers against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

from remanence.core.errors import BadInput
from remanence.core.problem import Classification, Out, Regression
from remanence.nn.fisher import diagonal_fisher
from remanence.nn.influence import (
    conjugate_gradients,
    curvature,
    example_gradients,
    flat,
    sherman_morrison,
    unflat,
    woodfisher,
)
from remanence.nn.saliency import mean_gradient

torch.set_num_threads(1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4)).double()


def batch(n=17, problem=None):
    g = torch.Generator().manual_seed(1)
    y = torch.randint(3, (n,), generator=g)
    y = torch.randn(n, 4, generator=g).double() if isinstance(problem, Regression) else y
    return {"x": torch.randn(n, 5, generator=g).double(), "y": y, "id": torch.arange(n)}


def cut(rows, size):
    return lambda: [{k: v[i : i + size] for k, v in rows.items()} for i in range(0, len(rows["id"]), size)]


def dense(model, problem, rows, classes, kind):
    """The whole matrix by torch.func, parameters and loss written out."""
    params = dict(model.named_parameters())
    model.eval()
    theta = flat(params)

    def outputs(theta):
        return functional_call(model, unflat_graph(theta, params), (rows["x"],))

    if kind == "hessian":
        return hessian(lambda t: problem.losses(Out(outputs(t)), rows, classes).mean())(theta)
    jacobian, logits = jacrev(outputs)(theta), outputs(theta).detach()  # (N, C, P), (N, C)
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for i in range(len(rows["id"])):
        one = {k: v[i : i + 1] for k, v in rows.items()}
        second = hessian(lambda z, one=one: problem.losses(Out(z[None]), one, classes).sum())(logits[i])
        total += jacobian[i].T @ second @ jacobian[i]
    return total / len(rows["id"])


def unflat_graph(theta, params):
    parts = theta.split([p.numel() for p in params.values()])
    return {name: part.reshape(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}


PROBLEMS = [
    (Classification(), torch.tensor([0, 1, 2])),
    (Classification(), None),
    (Classification(link="sigmoid"), None),
    (Regression(), None),
]


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
@pytest.mark.parametrize(("problem", "classes"), PROBLEMS, ids=["columns", "softmax", "sigmoid", "regression"])
def test_products_are_the_dense_matrix(problem, classes, kind):
    model, rows = network(), batch(problem=problem)
    params = dict(model.named_parameters())
    before, draws = flat(params), torch.random.get_rng_state()
    model.train()
    size = len(before)
    products = [curvature(model, problem, cut(rows, n), params, classes, kind, 0.3) for n in (17, 4)]
    found = [torch.stack([product(e) for e in torch.eye(size, dtype=torch.float64)]) for product in products]
    assert model.training and torch.equal(flat(params), before) and torch.equal(draws, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    wanted = dense(model, problem, rows, classes, kind) + 0.3 * torch.eye(size, dtype=torch.float64)
    for matrix in found:
        torch.testing.assert_close(matrix, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("problem", "classes"), PROBLEMS[:2] + PROBLEMS[3:], ids=["columns", "softmax", "regression"])
def test_the_diagonal_is_the_exact_fisher(problem, classes):
    """Softmax and Gaussian: Gauss-Newton is the Fisher matrix, so another file's figures must agree."""
    model, rows = network(), batch(problem=problem)
    params = dict(model.named_parameters())
    product = curvature(model, problem, cut(rows, 5), params, classes)
    diagonal = torch.stack([product(e)[i] for i, e in enumerate(torch.eye(len(flat(params)), dtype=torch.float64))])
    torch.testing.assert_close(diagonal, flat(diagonal_fisher(model, problem, [rows], params, "exact", classes)))


def test_kinds_agree_where_the_output_is_linear_and_only_gauss_newton_is_never_negative():
    linear, rows, problem = nn.Linear(5, 4).double(), batch(), Classification()
    v = torch.randn(24, generator=torch.Generator().manual_seed(2)).double()
    params = dict(linear.named_parameters())
    a, b = (curvature(linear, problem, cut(rows, 6), params, kind=kind)(v) for kind in ("gauss-newton", "hessian"))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    model = network()
    lowest = [
        torch.linalg.eigvalsh(dense(model, problem, rows, None, kind)).min() for kind in ("gauss-newton", "hessian")
    ]
    assert lowest[0] > -1e-12 and lowest[1] < -1e-3
    hessian_product = curvature(model, problem, cut(rows, 6), dict(model.named_parameters()), kind="hessian")
    with pytest.raises(BadInput, match="raise the damping"):
        conjugate_gradients(hessian_product, torch.randn(64, generator=torch.Generator().manual_seed(3)).double(), 64)


def test_a_parameter_that_is_not_used_has_no_curvature():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(5, 4), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Odd().double()
    for kind in ("gauss-newton", "hessian"):
        found = curvature(model, Classification(), cut(batch(), 5), dict(model.named_parameters()), kind=kind)(
            torch.ones(30).double()
        )
        assert (found[24:] == 0).all() and (found[:24] != 0).any()


def test_flat_and_back():
    params = {"a": torch.randn(2, 3), "b": torch.randn(4).double(), "c": torch.tensor(2.0)}
    back = unflat(flat(params), params)
    assert all(torch.equal(back[n], p) and back[n].dtype == p.dtype for n, p in params.items())


def spd(n=12):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=g).double()
    return a @ a.T + 0.1 * torch.eye(n).double(), torch.randn(n, generator=g).double()


def test_conjugate_gradients_is_the_dense_solve():
    a, b = spd()
    x, left = conjugate_gradients(lambda v: a @ v, b, 40, 1e-13)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), atol=1e-9, rtol=1e-8)
    assert left <= 1e-13
    x, left = conjugate_gradients(lambda v: a @ v, b, 3)
    assert left == pytest.approx(float((b - a @ x).norm() / b.norm()), rel=1e-9) and left > 1e-3


def test_conjugate_gradients_needs_as_many_products_as_there_are_eigenvalues_and_is_best_in_its_span():
    a, b = torch.diag(torch.tensor([1.0] * 5 + [7.0] * 3 + [30.0] * 4).double()), spd()[1]
    calls = []

    def product(v):
        calls.append(v)
        return a @ v

    x, _ = conjugate_gradients(product, b, 50, 1e-10)
    assert len(calls) == 3 and torch.allclose(a @ x, b)
    a, b = spd()
    x, _ = conjugate_gradients(lambda v: a @ v, b, 2)
    span = torch.stack([b, a @ b], 1)
    best = span @ torch.linalg.solve(span.T @ a @ span, span.T @ b)
    torch.testing.assert_close(x, best, atol=1e-9, rtol=1e-8)


def test_conjugate_gradients_of_nothing_is_nothing():
    x, left = conjugate_gradients(lambda v: 1 / 0, torch.zeros(4), 5)
    assert left == 0 and (x == 0).all()


def test_example_gradients_are_one_by_one_and_average_to_the_mean():
    model, rows, problem = network().train(), batch(), Classification()
    params, classes = dict(model.named_parameters()), torch.tensor([0, 1, 2])
    found = torch.stack(list(example_gradients(model, problem, cut(rows, 4)(), params, classes)))
    assert found.shape == (17, 64) and model.training
    torch.testing.assert_close(found.mean(0), flat(mean_gradient(model, problem, [rows], params, classes)))
    torch.testing.assert_close(
        found.square().mean(0), flat(diagonal_fisher(model, problem, [rows], params, classes=classes))
    )


def gradients(n=9, size=14):
    g = torch.Generator().manual_seed(4)
    return torch.randn(n, size, generator=g).double(), torch.randn(size, generator=g).double()


def test_sherman_morrison_inverts_the_empirical_fisher():
    g, v = gradients()
    matrix = 0.05 * torch.eye(14).double() + g.T @ g / 9
    torch.testing.assert_close(sherman_morrison(iter(g), v, 9, 0.05), torch.linalg.solve(matrix, v))
    with pytest.raises(BadInput, match="damping"):
        sherman_morrison(iter(g), v, 9, 0.0)


def test_woodfisher_written_out_and_its_line():
    """Two gradients by hand; for any number of them the result is v plus a multiple of the first, which no inverse is."""
    g, v = gradients()
    s, n = float(g[0] @ g[1]), 1000.0
    torch.testing.assert_close(woodfisher(iter(g[:2]), v, n), v - (v @ g[1]) / (n + s) * g[0])
    assert torch.equal(woodfisher(iter(g[:1]), v), v)
    change = woodfisher(iter(g), v, 20.0) - v
    line = (change @ g[0]) / (g[0] @ g[0]) * g[0]
    torch.testing.assert_close(change, line, atol=1e-12, rtol=1e-9)
    assert change.norm() > 1e-3
    exact = sherman_morrison(iter(g), v, 20, 1.0) - v  # the same start, H_0 = I, and the same count
    assert (exact - (exact @ g[0]) / (g[0] @ g[0]) * g[0]).norm() > 0.5 * exact.norm()


def test_no_examples():
    model = network()
    with pytest.raises(BadInput, match="there are none"):
        curvature(model, Classification(), list, dict(model.named_parameters()))(torch.zeros(64).double())
    with pytest.raises(BadInput, match="kind"):
        curvature(model, Classification(), list, dict(model.named_parameters()), kind="fisher")
