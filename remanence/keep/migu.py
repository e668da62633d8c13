"""Let only those outputs of a layer learn that the batch lights up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.adapters import LowRank
from remanence.nn.anatomy import head_name
from remanence.nn.masks import above_quantile, mask_gradients, token_places, undo_masked
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class MIGU(Keeper):
    """In every step only those rows of a linear layer move whose outputs on the step's batches are large.

        m_j = sum over tokens of |h_j|,  h = W x + b        row j of W, and b_j, may move if m_j >= the `threshold` quantile of m
        with low-rank adapters  y = W x + s B (A x):  rows of A by |A x|, rows of B by |B A x|

    Masked rows keep their bits: no momentum and no weight decay moves them, and the optimizer's moments see their gradient as zero.
    m is taken anew for every step, over all batches that are accumulated for it and all forwards that can be differentiated; padding
    does not count. What is no linear layer (embeddings, norms, convolutions, adapters other than LoRA's) learns as ever, and so does the
    head. While all outputs of B are zero, all its rows are equal and may move. The first event of a life, and forget runs, have no mask.
    Parts that come later in `keep` may move masked rows; name this one last.

    Pick it with a transformer, in full or with ``where="lora"``, beside any other keeper; nothing is stored. Alone it slows forgetting
    down and does not stop it. Measured: in a tiny language model a second table of facts costs less of the first than plain training does
    that gets less far, but random rows in as many numbers do no worse: the largest rows are largely (86 to 92 %) the same for both tables.
    A perceptron on digits (two pairs of classes; turned pictures) gains nothing over fewer epochs.
    Needs: borders, linear layers other than the head.
    Reference: Du et al. 2024, "Unlocking Continual Learning Abilities in Language Models", arXiv 2406.17245. Deviations: the official
    code masks the gradient only, so that Adam and weight decay move masked rows; counts padding; masks the head, too; and for LoRA
    looks for a method name that its scripts do not give, so that no mask is applied.
    """

    threshold: float = knob(
        0.7, "quantile of a layer's outputs from which on a row may move; 0: all may", low=0, high=1
    )

    @property
    def inert(self) -> bool:
        return self.threshold == 0

    def begin(self, u: Update) -> None:
        self._u = u
        self._real: tuple[Batch, Tensor | None] = (u.batch, None)
        self._seen: dict[tuple[str, ...], Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        head = head_name(u.model)
        places: list[tuple[nn.Module, tuple[str, ...]]] = []
        for name, module in u.model.named_modules():
            if isinstance(module, nn.Linear) and name != head:
                places.append((module, (f"{name}.weight", f"{name}.bias")))
            elif isinstance(module, LowRank):
                places += [(module.after_down, (f"{name}.down",)), (module.after_up, (f"{name}.up",))]
        if not places:
            raise BadInput("migu: the model has no linear layer but its head, so there are no rows to choose from")
        if u.kind == "learn" and not u.first:
            u.enter(self._watching(places))

    def prepare(self, u: Update, batch: Batch) -> Batch:
        self._u = u  # of this phase: its batch is what the next forwards see
        return batch

    def gradient(self, u: Update) -> None:
        self._masks = {}
        for names, m in self._seen.items():
            rows = above_quantile(m, self.threshold)
            for name in names:
                if name in u.parameters:
                    self._masks[name] = rows.view(-1, *[1] * (u.parameters[name].dim() - 1))
        self._seen = {}
        mask_gradients(u.parameters, self._masks)

    def project(self, u: Update, params: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        undo_masked(params, before, self._masks)

    @contextmanager
    def _watching(self, places: list[tuple[nn.Module, tuple[str, ...]]]) -> Iterator[None]:
        handles = [module.register_forward_hook(self._see(module, names)) for module, names in places]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, own: nn.Module, names: tuple[str, ...]) -> Callable[[nn.Module, Any, Tensor], None]:
        def see(module: nn.Module, _: Any, output: Tensor) -> None:
            # A copy of the network, such as a teacher, has copies of the hooks.
            if module is not own or not output.requires_grad or not self._learning(names):
                return
            size = output.detach().abs()
            real = self._tokens()
            if real is not None and real.shape == size.shape[:-1]:
                size = size * real[..., None]
            m = size.reshape(-1, size.shape[-1]).sum(0, dtype=torch.float32)
            self._seen[names] = self._seen[names] + m if names in self._seen else m

        return see

    def _learning(self, names: tuple[str, ...]) -> bool:
        return any(name in self._u.parameters for name in names)

    def _tokens(self) -> Tensor | None:
        """Where this batch's forward has tokens."""
        if self._real[0] is not self._u.batch:
            self._real = (self._u.batch, token_places(self._u.problem, self._u.batch))
        return self._real[1]
