"""Half a level of error at most, and no row knows of another."""

from __future__ import annotations

import pytest
import torch

from remanence.nn.quantized import dequantised, quantised


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("shape", [(40, 7), (9, 3, 4, 5), (5, 1)])
def test_half_a_level_at_most(shape, scale):
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    codes, low, high = quantised(x)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and low.shape == high.shape == (len(x),)
    span = (high - low).view(-1, *[1] * (x.dim() - 1)).double()
    error = (dequantised(codes, low, high).double() - x.double()).abs()
    assert (error <= span / 255 / 2 + 1e-6 * x.abs().amax()).all()
    if x[0].numel() > 1:
        assert float((error / span).max()) > 1e-3  # it is 8 bits, not the row itself
        assert torch.equal(codes.flatten(1).amin(1), torch.zeros(len(x), dtype=torch.uint8))
        assert (codes.flatten(1).amax(1) == 255).all()


def test_every_value_has_the_nearest_level():
    x = torch.rand(6, 50, generator=torch.Generator().manual_seed(0))
    codes, low, high = quantised(x)
    for row, code, a, b in zip(x.double(), codes, low.double(), high.double(), strict=True):
        levels = a + (b - a) * torch.arange(256, dtype=torch.float64) / 255
        assert torch.equal((row[:, None] - levels).abs().argmin(1), code.long())


def test_constant_rows_and_the_ends_are_exact():
    x = torch.stack([torch.full((4,), 0.1), torch.zeros(4), torch.tensor([-1.7, 0.3, 0.4, 2.9])])
    found = dequantised(*quantised(x))
    assert torch.equal(found[:2], x[:2]) and torch.equal(found[2, [0, 3]], x[2, [0, 3]])
    none = dequantised(*quantised(torch.zeros(0, 4)))
    assert none.shape == (0, 4)


def test_a_row_is_the_same_in_whatever_company():
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    whole, alone = quantised(x), quantised(x[3:4])
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole, alone, strict=True))
