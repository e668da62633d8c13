"""Problems against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput, UnknownName
from remanence.core.problem import Classification, Out, Regression, problem_of

LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 2.0, 4.0, 0.5]])
Y = torch.tensor([0, 2, 1])


def test_cross_entropy_over_the_competing_columns_only() -> None:
    problem, batch = Classification(), {"y": Y}
    for columns in ([0, 1, 2, 3], [0, 1, 2]):
        chosen = torch.tensor(columns)
        p = LOGITS[:, columns].double().softmax(1)
        expected = torch.tensor([-math.log(p[i, columns.index(int(y))]) for i, y in enumerate(Y)])
        torch.testing.assert_close(problem.losses(Out(LOGITS), batch, chosen), expected)
        torch.testing.assert_close(problem.loss(Out(LOGITS), batch, chosen), expected.mean())
    assert float(problem.losses(Out(LOGITS), batch)[1]) == pytest.approx(math.log(4))
    scattered = problem.losses(Out(LOGITS), {"y": torch.tensor([0, 3, 3])}, torch.tensor([3, 0]))
    torch.testing.assert_close(scattered, F.cross_entropy(LOGITS[:, [0, 3]], torch.tensor([0, 1, 1]), reduction="none"))


def test_columns_that_do_not_compete_get_no_gradient() -> None:
    for link in ("softmax", "sigmoid"):
        logits = LOGITS.clone().requires_grad_()
        Classification(link=link).loss(Out(logits), {"y": Y}, torch.tensor([0, 1, 2])).backward()
        assert logits.grad is not None and not logits.grad[:, 3].any() and bool(logits.grad[:, :3].ne(0).any(0).all())


def test_sigmoid_link_is_the_mean_binary_cross_entropy() -> None:
    for columns in (None, torch.tensor([0, 1, 2])):
        some = range(4) if columns is None else columns.tolist()
        expected = [
            sum(math.log1p(math.exp(-float(LOGITS[i, c]) if c == int(y) else float(LOGITS[i, c]))) for c in some)
            / len(some)
            for i, y in enumerate(Y)
        ]
        found = Classification(link="sigmoid").losses(Out(LOGITS), {"y": Y}, columns)
        torch.testing.assert_close(found, torch.tensor(expected))
        one_hot = {"y": F.one_hot(Y, 4).float()}
        torch.testing.assert_close(Classification(link="sigmoid").losses(Out(LOGITS), one_hot, columns), found)


def test_hard_labels_are_one_hot_probabilities_and_weights_weigh() -> None:
    problem = Classification()
    hard = problem.losses(Out(LOGITS), {"y": Y})
    torch.testing.assert_close(problem.losses(Out(LOGITS), {"y": F.one_hot(Y, 4).float()}), hard)
    weight = torch.tensor([2.0, 0.0, 1.0])
    torch.testing.assert_close(problem.loss(Out(LOGITS), {"y": Y, "weight": weight}), (2 * hard[0] + hard[2]) / 3)
    ones = problem.loss(Out(LOGITS), {"y": Y, "weight": torch.ones(3)})
    torch.testing.assert_close(ones, problem.loss(Out(LOGITS), {"y": Y}))


def test_scores() -> None:
    found = Classification().score(Out(LOGITS), {"y": torch.tensor([3, 0, 1])})
    assert found["accuracy"].tolist() == [1, 1, 0]
    assert Classification().score(Out(LOGITS), {"y": Y}, torch.tensor([0, 1]))["accuracy"].tolist() == [1, 0, 1]


def test_regression_is_half_the_squared_error_summed_over_outputs() -> None:
    values, y = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 4.0], [0.0, -1.0]])
    assert Regression().losses(Out(values), {"y": y}).tolist() == [2.5, 0.0]
    assert Regression().score(Out(values), {"y": y})["mse"].tolist() == [5.0, 0.0]
    column = Regression().losses(Out(torch.tensor([[1.0], [3.0]])), {"y": torch.tensor([1, 1])})
    assert column.tolist() == [0.0, 2.0]  # (B, 1) values against (B,) targets, not all against all
    with pytest.raises(BadInput, match="shape"):
        Regression().losses(Out(torch.zeros(2, 3)), {"y": torch.zeros(2)})


def test_forward_captures_the_heads_input() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    out = Classification().forward(model, {"x": x}, model[2])
    assert out.features is not None and torch.equal(out.features, model[1](model[0](x)))
    assert torch.equal(out.logits, model(x)) and not model[2]._forward_pre_hooks
    assert Classification().forward(model, {"x": x}).features is None
    with pytest.raises(BadInput, match="never called its head"):
        Classification().forward(model, {"x": x}, nn.Linear(1, 1))


def test_resolving() -> None:
    assert problem_of(None) == Classification() == problem_of("classification")
    assert problem_of({"classification": {"link": "sigmoid"}}).link == "sigmoid"  # type: ignore[attr-defined]
    assert isinstance(problem_of({"regression": None}), Regression)
    with pytest.raises(UnknownName, match="did you mean 'regression'"):
        problem_of("regresion")
    with pytest.raises(BadInput, match="softmax"):
        Classification(link="softmx")
