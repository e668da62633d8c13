"""Distances against their closed forms and torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from remanence.core.errors import BadInput
from remanence.nn import distances as d


def two(rows=8, columns=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=g).double(), torch.randn(rows, columns, generator=g).double()


def test_soft_cross_entropy():
    a, b = two()
    y = torch.arange(8) % 5
    assert torch.allclose(d.soft_cross_entropy(a, F.one_hot(y, 5).double()), F.cross_entropy(a, y, reduction="none"))
    p = b.softmax(1)
    entropy = -(p * p.log()).sum(1)
    assert torch.allclose(d.soft_cross_entropy(a, p), d.kl_from_logits(a, b) + entropy)
    assert torch.allclose(d.soft_cross_entropy(a, p, 2.0), d.soft_cross_entropy(a / 2, p))


def test_kl_from_logits():
    a, b = two()
    reference = F.kl_div(F.log_softmax(a / 3, 1), F.log_softmax(b / 3, 1), log_target=True, reduction="none").sum(1)
    assert torch.allclose(d.kl_from_logits(a, b, 3.0), reference)
    assert d.kl_from_logits(a, a + 4.0).abs().max() < 1e-14
    barred = b.clone()
    barred[:, 2] = -torch.inf
    p = torch.cat([b[:, :2], b[:, 3:]], 1).softmax(1)
    rest = F.log_softmax(a, 1)[:, [0, 1, 3, 4]]
    assert torch.allclose(d.kl_from_logits(a, barred), (p * (p.log() - rest)).sum(1))


def test_kl_gradient_is_p_minus_q():
    """d KL / d student = softmax(student) - softmax(teacher); zero at the teacher."""
    a, b = two()
    z = a.clone().requires_grad_()
    d.kl_from_logits(z, b).sum().backward()
    assert torch.allclose(z.grad, a.softmax(1) - b.softmax(1))


def test_sigmoid_bce_and_mse():
    a, b = two()
    p = b.sigmoid()
    q = a.sigmoid()
    assert torch.allclose(d.sigmoid_bce(a, p, "sum"), -(p * q.log() + (1 - p) * (1 - q).log()).sum(1))
    assert torch.allclose(d.sigmoid_bce(a, p) * 5, d.sigmoid_bce(a, p, "sum"))
    z = b.clone().requires_grad_()
    d.sigmoid_bce(z, p).sum().backward()
    assert z.grad.abs().max() < 1e-15
    assert torch.allclose(d.mse(a, b, "sum"), torch.cdist(a, b).diagonal() ** 2)
    assert torch.allclose(d.mse(a, b).mean(), F.mse_loss(a, b))
    assert d.mse(a.view(8, 5, 1), b.view(8, 5, 1)).shape == (8,) and d.mse(a[:, 0], b[:, 0]).shape == (8,)


def test_cosine_distance():
    a, b = two()
    assert d.cosine_distance(a, 3 * a).abs().max() < 1e-12
    assert torch.allclose(d.cosine_distance(a, -a), torch.full((8,), 2.0).double())
    assert torch.allclose(d.cosine_distance(torch.zeros_like(a), b), torch.ones(8).double())


@pytest.mark.parametrize("shape", [(40, 5, 7), (6, 20, 9)])
def test_linear_cka(shape):
    n, p, q = shape
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, p, generator=g).double(), torch.randn(n, q, generator=g).double()
    turn = torch.linalg.qr(torch.randn(p, p, generator=g).double()).Q
    assert abs(float(d.linear_cka(x, 3.0 * x @ turn + 2.0)) - 1) < 1e-12
    centre = torch.eye(n).double() - 1.0 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    hsic = float((k * m).sum() / (k.norm() * m.norm()))
    assert abs(float(d.linear_cka(x, y)) - hsic) < 1e-12
    assert float(d.linear_cka(x, torch.ones(n, 3).double())) == 0.0


def test_wrong_input():
    a, b = two()
    for call in (
        lambda: d.kl_from_logits(a, b[:, :3]),
        lambda: d.kl_from_logits(a, b, 0.0),
        lambda: d.mse(a, b, "max"),
        lambda: d.linear_cka(a, b[:3]),
    ):
        with pytest.raises(BadInput):
            call()
