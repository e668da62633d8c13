"""A small spiking network: leaky integrate-and-fire neurons, trained through a surrogate gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.nn.heads import empty_linear


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons: currents (T, B, D) to spikes (T, B, D) of 0 and 1.

        v <- (1 - 1 / tau) v + current;    s = 1 if v >= threshold else 0;    v <- v - threshold * s

    Backward s is sigmoid(sharpness (v - threshold)), and the reset passes no gradient on. Every forward begins at rest, v = 0.
    """

    def __init__(self, tau: float = 2.0, threshold: float = 1.0, sharpness: float = 4.0) -> None:
        super().__init__()
        if not tau >= 1 or not threshold > 0 or not sharpness > 0:
            raise BadInput(f"LIF needs tau >= 1, threshold > 0 and sharpness > 0, not {tau}, {threshold}, {sharpness}")
        self.tau, self.threshold, self.sharpness = tau, threshold, sharpness

    def forward(self, current: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(current[0]), []
        for now in current:
            v = (1 - 1 / self.tau) * v + now
            soft = (self.sharpness * (v - self.threshold)).sigmoid()
            spike = (v >= self.threshold).to(v.dtype)
            spikes.append(soft + (spike - soft).detach())
            v = v - self.threshold * spike
        return torch.stack(spikes)


class SNN(nn.Module):
    """Flatten, then linear + LIF for each width of `hidden`, over `steps` time steps that all see the same input; a linear head
    on the firing rates, the mean of the spikes. Since the head is linear that is the mean of its answers to each step."""

    def __init__(self, inputs: int | Sequence[int], hidden: Sequence[int], outputs: int = 0, steps: int = 6) -> None:
        super().__init__()
        if steps < 1 or not hidden:
            raise BadInput(f"an SNN needs a hidden layer and at least one time step, not {list(hidden)} and {steps}")
        widths = [inputs if isinstance(inputs, int) else math.prod(inputs), *hidden]
        self.steps, self.neurons = steps, LIF()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], outputs) if outputs else empty_linear(widths[-1], 0)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.layers
        current = first(x.flatten(1))
        spikes = self.neurons(current.expand(self.steps, *current.shape))
        for layer in others:
            spikes = self.neurons(layer(spikes))
        return self.head(spikes.mean(0))  # type: ignore[no-any-return]
