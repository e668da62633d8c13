"""Write only where the data pulls hardest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from remanence.core.knobs import knob
from remanence.nn.masks import top_fraction
from remanence.nn.saliency import mean_gradient
from remanence.train.roles import Where
from remanence.train.update import Update


@dataclass
class Saliency(Where):
    """A 0/1 mask, fixed for the event, of the entries with the largest gradient at the event's start.

        g = d/d theta of mean over D of loss(f(x), y)        m_j = 1 for the top `rho` of all |g_j|, ranked over all tensors together

    D is the forget set in a forget run and the event's task in a learn run (`on` names another). The gradient is taken in
    eval mode and summed with its sign before the absolute value is taken, so entries on which examples disagree rank low.
    Masked-out entries keep their bits under momentum and weight decay; buffers such as batch-norm statistics are not masked.

    Pick it in a forget run to hold any forgetter to the weights that matter for the request (SalUn's mask as a part of its own),
    in a learn run to bound how many weights a task may change. Needs: labels or targets.
    Reference: Fan et al. 2024, "SalUn", arXiv 2310.12508. Deviation: examples count equally, where the official code adds up
    batch means, so that a short last batch counts more there.
    """

    rho: float = knob(0.5, "share of entries that may move", low=0, high=1)
    on: str = knob(
        "auto",
        "examples the gradient is of; auto: forget, or task",
        choices=("auto", "task", "forget", "retain", "seen"),
    )

    @property
    def inert(self) -> bool:
        return self.rho == 1

    def begin(self, u: Update) -> None:
        name = self.on if self.on != "auto" else "forget" if u.kind == "forget" else "task"
        classes = u.classes.seen if u.columns else None
        gradient = mean_gradient(u.model, u.problem, u.batches(u.data(name)), u.parameters, classes)
        self._mask = top_fraction({name: g.abs() for name, g in gradient.items()}, self.rho)
        u.extra_bytes += sum(m.numel() for m in self._mask.values())

    def mask(self, u: Update) -> dict[str, Tensor]:
        return self._mask
