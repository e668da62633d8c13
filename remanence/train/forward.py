"""How a run's forward is carried out where it is not plain: in a lower precision, compiled, or done twice to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.problem import Batch, CausalLM, Out, Problem, output_layer

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Forward:
    """The model's forward under autocast and/or `torch.compile`; answers and features come back in float32, so that losses,
    penalties and statistics are the same code in every precision. Weights and optimizer state stay in float32.

    float16 has a loss scaler (Micikevicius et al. 2018, arXiv 1710.03740): gradients are unscaled before any part sees them, and
    a step with gradients that are not finite is left out.

    Args:
        precision: one of `PRECISIONS`.
        compile: whether the forward is compiled; one that also takes features runs uncompiled, for its hooks would be lost. Of a
            language model all but the output layer is compiled, which is called on other rows in every batch.
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: str, compile: bool) -> None:
        self.device, self.dtype = device, PRECISIONS[precision]
        self.compile = compile
        self.compiled: Any = None
        self.scaler = torch.amp.GradScaler(device.type) if precision == "float16" else None

    def __call__(self, problem: Problem, model: nn.Module, batch: Batch, head: nn.Module | None) -> Out:
        """As ``problem.forward(model, batch, head)``.

        Raises:
            BadInput: the model cannot be compiled here.
        """
        compiled = self.compile and head is None
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            made = self._compiled(problem, model, batch) if compiled else problem.forward(model, batch, head)
        return Out(made.logits.float(), None if made.features is None else made.features.float())

    def _compiled(self, problem: Problem, model: nn.Module, batch: Batch) -> Out:
        body: Any = _body(model) if isinstance(problem, CausalLM) else None
        if self.compiled is None:
            self.compiled = torch.compile(model if body is None else body._call_impl)
        try:
            if body is None:
                return problem.forward(self.compiled, batch)
            body._compiled_call_impl = self.compiled
            return problem.forward(model, batch)
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise BadInput(
                    f"compile=True: torch cannot compile the model here ({str(error).splitlines()[0][:200]}); leave it out"
                ) from error
            raise
        finally:
            if body is not None:
                body._compiled_call_impl = None

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


def _body(model: nn.Module) -> nn.Module:
    """A language model without its output layer.

    Raises:
        BadInput: it is not known apart.
    """
    body = getattr(model, "base_model", None)
    if not isinstance(body, nn.Module) or any(module is output_layer(model) for module in body.modules()):
        raise BadInput(
            f"compile=True: of language models those of transformers can be compiled, not {type(model).__name__}; leave it out"
        )
    return body


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside, a forward in train mode keeps only what enters each block of `model`, and the backward computes the rest again (Chen et
    al. 2016, arXiv 1604.06174): the same gradients with less memory, in about a third more time.

    Raises:
        BadInput: the model does not say how.
    """
    found: Any = next((m for m in model.modules() if getattr(m, "supports_gradient_checkpointing", False)), None)
    if found is None:
        raise BadInput(
            f"checkpointing=True needs a model of transformers that can do it, not {type(model).__name__}; leave it out"
        )
    word = "activation" if hasattr(found, "activation_checkpointing_enable") else "gradient"  # before transformers 5.24
    if getattr(found, f"is_{word}_checkpointing"):
        yield
        return
    getattr(found, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(found, f"{word}_checkpointing_disable")()
