"""Take no step that old examples object to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.anatomy import keeping_buffers
from remanence.nn.buffer import Buffer
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class AGEM(Keeper):
    """Where the gradient would raise the loss on rows drawn from old events, that part of it is taken out.

        g <- g - min(0, g.r) / (r.r) r        g: the step's gradient,  r: gradient of mean loss(f(x), y) over the drawn rows

    All parameters that have a gradient count as one vector. Afterwards g.r is 0 where it was below; elsewhere g keeps its bits. So to
    first order the loss on the drawn rows does not rise; on others it may, and so it may by momentum, Adam or weight decay, which
    act later: plain SGD serves it best. r is taken in the mode of the step; batch norm's running statistics are left alone.

    Pick it as a baseline, in streams whose classes stay the same. Where classes come in it hardly beats finetuning, here as in
    Buzzega et al. 2020 (arXiv 2004.07211), and replay from the same buffer is far better in both. Needs: labels or targets,
    borders, stores examples.
    Reference: Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", arXiv 1812.00420. Deviations: the memory is a
    reservoir over all events, filled at each one's end, where the paper gives every task an equal share; there is one head, where
    the paper has one for each task and tells the network which to use. In a forget run it stands aside.
    """

    stores: ClassVar[tuple[str, ...]] = ("capacity",)

    capacity: int = knob(200, "examples in the reservoir", low=0)
    batch_size: int = knob(64, "rows drawn for r at each step", low=0)

    def setup(self) -> None:
        self.buffer = Buffer(self.capacity)

    @property
    def inert(self) -> bool:
        return self.capacity == 0 or self.batch_size == 0

    @torch.no_grad()
    def gradient(self, u: Update) -> None:
        if u.kind != "learn" or not len(self.buffer):
            return
        rows = self.buffer.draw(self.batch_size, u.rng("agem"))
        u.consumed.rows({**rows, "origin": torch.ones_like(rows["id"])})  # in no batch, but they bear on the weights
        reference = zip(u.parameters.values(), self._reference(u, rows), strict=True)
        pairs = [(p.grad, r) for p, r in reference if p.grad is not None]
        share = _dot(pairs).clamp(max=0) / _dot([(r, r) for _, r in pairs]).clamp(min=torch.finfo(torch.float64).tiny)
        for g, r in pairs:
            g.sub_(share.to(g.dtype) * r)

    @torch.enable_grad()
    def _reference(self, u: Update, rows: Batch) -> list[Tensor]:
        devices = [u.device] if u.device.type == "cuda" else []
        with keeping_buffers(u.model), torch.random.fork_rng(devices=devices):
            out = u.problem.forward(u.model, rows)
            return u.grad(u.problem.loss(out, rows, u.classes.seen if u.columns else None))

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            for batch in u.batches(u.data("task"), 4096):
                self.buffer.add(batch, u.rng("agem-buffer"))


def _dot(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs]).sum()
