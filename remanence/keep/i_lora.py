"""Two sets of weights, a fast one that learns and a slow one that follows and answers; old rows hold the fast one to the slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, CausalLM, target_counts
from remanence.nn.anatomy import evaluating, head_name
from remanence.nn.blocks import feed_forward
from remanence.nn.buffer import Buffer
from remanence.nn.slow import SlowCopy
from remanence.nn.taps import hidden_layers, taps
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class ILoRA(Keeper):
    """The network answers with slow weights, an average of the fast ones that are trained; on rows from a buffer the fast weights'
    hidden states may not fall below the slow ones'.

        L = (L_new + L_drawn) / 2 + gamma * C        C = mean over layers and units of max(0, h_slow - h_fast)^2
        after step k of an event:  slow <- a * slow + (1 - a) * fast,        a = min(1 - 1 / (k + 1), a_max)

    ``compare="symmetric"`` is the plain C = mean (h_slow - h_fast)^2. The two sets are all trainable parameters; with ``where="lora"``
    the adapters and the head, as in the paper. h are what every block of a transformer and the head are given, padding left out; in
    other networks what the activations give. From the second event on rows are drawn, as many as the batch has. At the end of an event
    the slow weights take their place in the network, which answers with them; the fast ones are kept aside, and the next event trains
    on from them. Running statistics of batch norm are one set, the fast one's.

    Pick it beside adapters, where old examples may be kept and there is memory for the trained weights once more, with an a_max of 0.9
    or more: at 0.25 slow is a third of a step behind, and all is as with replay alone. So it is, whatever a_max, where an event goes on
    until training is at rest and slow has caught up. Needs: stores examples; labels or targets. After a forget the fast weights, which
    held the examples, are dropped: the next event trains on from what the forget left. In a forget run it stands aside.
    Reference: Ren et al. 2024, "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning", arXiv 2402.18865; defaults
    from the official code, where the text speaks of larger a_max. Deviations: the code saves the fast set and after the first task calls
    a function that it lacks, so serving the slow set is from the paper; that function would start slow anew from fast at every task, here
    it goes on; states are compared in eval mode, in two forwards of the drawn rows; padding is neither trained on nor compared (there it
    is token 0); a row is offered to the reservoir once, after its step, where there every epoch offers it again, before.
    """

    stores: ClassVar[tuple[str, ...]] = ("capacity",)
    moves_at_end: ClassVar[bool] = True

    a_max: float = knob(0.25, "most of the slow weights that stays at a step; 0: slow is fast", low=0, high=1)
    gamma: float = knob(1.0, "weight of the distance of hidden states", low=0)
    capacity: int = knob(500, "examples in the reservoir", low=0)
    batch_size: int | None = knob(None, "rows drawn per batch; None: as many as the batch brings", low=0)
    compare: str = knob("above", "what is held: units that fall below, or both ways", choices=("above", "symmetric"))

    def setup(self) -> None:
        self.buffer = Buffer(self.capacity)
        self.other = SlowCopy()  # in an event the slow weights, between events the fast ones
        self.steps = 0

    @property
    def inert(self) -> bool:
        return self.a_max == 0 and (self.capacity == 0 or self.batch_size == 0)

    def begin(self, u: Update) -> None:
        self._drawn: Batch = {}
        self._replays = len(self.buffer) > 0 and self.batch_size != 0
        self._params = dict(u.model.named_parameters())
        self._blocks = [path for path, linear in feed_forward(u.model).items() if linear != [path]]
        if u.kind == "learn":
            self.other.fit(self._params)
            self.other.swap(self._params)
            self.steps = 0

    def prepare(self, u: Update, batch: Batch) -> Batch:
        if u.kind != "learn":
            return batch
        self.other.track(u.parameters)
        if not self._replays:
            return batch
        count = len(batch["id"]) if self.batch_size is None else self.batch_size
        self._drawn = rows = u.problem.compact(self.buffer.draw(count, u.rng("i-lora")))
        # Weighted so that the drawn rows weigh as much as the others, whatever the number of rows and of tokens.
        ones = torch.ones(len(batch["id"]), device=batch["id"].device)
        total = (target_counts(batch) * batch.get("weight", ones)).sum()
        weight = (total / target_counts(rows).sum().clamp(min=1)).expand(len(rows["id"]))
        return u.extend(batch, {**rows, "weight": weight}, self)

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        rows = self._drawn
        if not self.gamma or not rows:
            return None
        problem = replace(u.problem, packing=False) if isinstance(u.problem, CausalLM) else u.problem
        watch = hidden_states(u.model, self._blocks) if self._blocks else taps(u.model, hidden_layers(u.model))
        with evaluating(u.model), watch as states:
            with self.other.lent(self._params):
                problem.forward(u.model, rows)
            slow = _without_padding(states, rows)
            with torch.enable_grad():
                problem.forward(u.model, rows)
                away = [slow[name] - fast for name, fast in _without_padding(states, rows).items()]
                held = [below.relu() for below in away] if self.compare == "above" else away
                return self.gamma * torch.stack([distance.square().mean() for distance in held]).mean()

    def after(self, u: Update, batch: Batch) -> None:
        if u.kind != "learn":
            return
        if u.steps_done > self.steps:  # a batch whose gradient is still gathered makes no step
            self.steps = u.steps_done
            self.other.follow(u.parameters, 1 - min(1 - 1 / (self.steps + 1), self.a_max))
        if u.epoch < u.sweep:
            own = {name: c[batch["origin"] == 0] for name, c in batch.items() if name not in ("origin", "weight")}
            self.buffer.add(own, u.rng("i-lora-buffer"))

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self.other.swap(self._params)
        if u.kind == "learn" and not u.settings.epochs:  # only shown: no batch came
            for batch in u.batches(u.data("task"), 4096):
                self.buffer.add(batch, u.rng("i-lora-buffer"))

    def forgot(self, u: Update, ids: Ids) -> None:
        self.other.clear()


@contextmanager
def hidden_states(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that after every forward holds what each block and the head were given."""
    taken: dict[str, Tensor] = {}

    def take(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: taken.update({name: inputs[0]})

    hooks = [model.get_submodule(at).register_forward_pre_hook(take(at)) for at in (*blocks, head_name(model))]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _without_padding(states: dict[str, Tensor], rows: Batch) -> dict[str, Tensor]:
    """The states of the rows' own tokens (T, D); of rows that are no texts, as they are."""
    mask = rows.get("attention_mask")
    return {name: h if mask is None or h.dim() != 3 else h[mask] for name, h in states.items()}
