"""How a run's forward is carried out where it is not plain: in a lower precision, or compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.problem import Batch, Out, Problem

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Forward:
    """The model's forward under autocast and/or `torch.compile`; answers and features come back in float32, so that losses,
    penalties and statistics are the same code in every precision. Weights and optimizer state stay in float32.

    float16 has a loss scaler (Micikevicius et al. 2018, arXiv 1710.03740): gradients are unscaled before any part sees them, and
    a step with gradients that are not finite is left out.

    Args:
        precision: one of `PRECISIONS`.
        compile: whether the forward is compiled; one that also takes features runs uncompiled, for its hooks would be lost.
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: str, compile: bool) -> None:
        self.device, self.dtype = device, PRECISIONS[precision]
        self.compiled: Any = torch.compile(model) if compile else None
        self.scaler = torch.amp.GradScaler(device.type) if precision == "float16" else None

    def __call__(self, problem: Problem, model: nn.Module, batch: Batch, head: nn.Module | None) -> Out:
        """As ``problem.forward(model, batch, head)``.

        Raises:
            BadInput: the model cannot be compiled here.
        """
        compiled = self.compiled is not None and head is None
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            try:
                made = problem.forward(self.compiled if compiled else model, batch, head)
            except Exception as error:
                if compiled and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise BadInput(
                        f"compile=True: torch cannot compile the model here ({str(error).splitlines()[0][:200]}); leave it out"
                    ) from error
                raise
        return Out(made.logits.float(), None if made.features is None else made.features.float())

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Bring the gradients back to their own size."""
        if self.scaler is not None:
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)

    def step(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """One step of each, but none of one whose gradients are not finite."""
        for optimizer in optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
