"""How strongly a set of examples pulls at each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.problem import Batch, Problem
from remanence.nn.anatomy import evaluating


def mean_gradient(
    model: nn.Module,
    problem: Problem,
    batches: Iterable[Batch],
    params: Mapping[str, Tensor],
    classes: Tensor | None = None,
) -> dict[str, Tensor]:
    """``d/d theta of 1/n sum_i loss(f(x_i), y_i)`` over the n examples of all batches, signed, in eval mode.

    Every example counts one, so the result does not depend on how the batches are cut. params: {name: parameter that requires
    a gradient}. classes: head columns that compete (K,) or None. Flags, buffers, random numbers and ``.grad`` stay as they are.
    Returns {name: tensor of the parameter's shape}, zeros where the loss does not depend on it. Raises BadInput without examples.
    """
    total, count = {name: torch.zeros_like(p) for name, p in params.items()}, 0
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            loss = problem.losses(problem.forward(model, batch), batch, classes).sum()
            found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            for name, gradient in zip(params, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
            count += len(batch["id"])
    if not count:
        raise BadInput("a saliency needs examples, and there are none")
    return {name: value / count for name, value in total.items()}
