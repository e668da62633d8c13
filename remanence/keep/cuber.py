"""Leave the inputs of old tasks alone, but where an old task pulls the same way, let it improve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples
from remanence.nn.anatomy import norm_modules
from remanence.nn.subspace import (
    Subspace,
    fewest_columns,
    has_inputs,
    layer_inputs,
    projected_layers,
    step_outside,
)
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class CUBER(Keeper):
    """Gradient projection that opens, layer by layer, the input subspaces of old tasks whose gradient agrees with the new one.

        j is open while   |G B_j| > overlap |G|   and   <g_j, G> > agreement |g_j| |G|         at most `most` tasks a layer
        dW <- dW - dW N N'         N: columns of M that any task which is not open uses
        L + leash * sum over open j of |(W - W0) B_j|                                         W0: the event's start

    M is the basis of GPM, grown event by event by threshold + increase * t of the energy of the layer's inputs. B_j are the
    fewest columns of M that explain as much of task j's inputs, g_j is the gradient of task j's loss when it had been learned and
    G that of the new task's, both in eval mode. Tasks are chosen when the event begins; one whose g_j disagrees with the
    gradient of a later step is closed for the rest of the event. With overlap 1 or most 0 it is GPM.

    Pick it where tasks are alike, so that learning one should make others better, and no example may be stored. With
    unrelated tasks it is about as good as GPM; with new classes in one head it cost one to five points on the digits. Needs:
    borders; linear layers and convolutions. It holds one gradient a task beside the bases. After a forget all of it is made again from the new weights and the retained data.

    Reference: Lin et al. 2022, "Beyond Not-Forgetting: Continual Learning with Backward Knowledge Transfer", arXiv 2211.00789;
    no released code was seen. The leash's weight is one that served here, where at 1 hardly anything moved; it is added to the
    gradient in closed form. Deviations: the paper's scaled projection Q, trained for each pair of tasks and used where the task is
    told at test time, is left out, since a life has one network; an old task that overlaps and disagrees is thus protected like
    any other. A task's basis takes as few new directions as GPM would (there old and new ones compete by energy). The change made
    by the optimizer is projected, not the gradient, so momentum and weight decay do not leak; biases are projected with their
    weights; norm layers, which the paper has for each task, are frozen after the first event.
    """

    threshold: float = knob(0.97, "share of the inputs' energy that a basis explains; 0: nothing", low=0, high=1)
    increase: float = knob(0.003, "added to the threshold for every earlier event, up to 1", low=0, high=1)
    samples: int = knob(125, "examples of an event whose inputs and gradient are looked at", low=1)
    overlap: float = knob(
        0.5, "share of the gradient inside a task's subspace above which it may be opened", low=0, high=1
    )
    agreement: float = knob(0.0, "cosine of old and new gradient above which it may be opened", low=-1, high=1)
    leash: float = knob(0.1, "weight of the distance from the start inside opened subspaces", low=0)
    most: int = knob(2, "tasks that may be opened in a layer, those with most of the gradient", low=0)

    def setup(self) -> None:
        self.subspace = Subspace()
        self.events = 0
        self.uses: dict[str, Tensor] = {}  # by layer, (tasks, k) bool: which columns of the basis are the task's
        self.gradients: dict[str, list[Tensor]] = {}  # for each layer and task: (out then, d)
        self.open: dict[str, Tensor] = {}  # layers with tasks chosen for this event: (tasks,) bool, whether still open

    @property
    def inert(self) -> bool:
        return self.threshold == 0

    def begin(self, u: Update) -> None:
        self._norms = list(norm_modules(u.model).values())
        self._layers = projected_layers(u.model, "cuber")
        self._chosen: dict[str, list[int]] = {}
        self._uses: dict[str, Tensor] = {}  # (tasks, k), of layers with chosen tasks only, as what follows
        self._old: dict[str, list[Tensor]] = {}
        self._start: dict[str, Tensor] = {}  # coordinates of the weights
        self.open = {}
        if u.kind == "learn" and self.subspace.bases and self.most:
            self._choose(u)

    def _choose(self, u: Update) -> None:
        params = dict(u.model.named_parameters())
        for name, g in self._gradients(u, self._drawn(u, u.data("task"))).items():
            if name not in self.subspace.bases:
                continue
            uses = self.uses[name].to(u.device, g.dtype)
            shares = (uses @ self.subspace.coordinates(name, g).square().sum(0)).sqrt()
            old = [each.to(u.device) for each in self.gradients[name]]
            near = shares > self.overlap * (1 + 1e-6) * g.norm()  # a rounding error is no overlap
            best = torch.where(near, shares, -1.0).topk(min(self.most, len(shares))).indices
            chosen = [j for j in best.tolist() if near[j] and _agree(old[j], g, self.agreement)]
            if chosen:
                self._chosen[name], self._uses[name], self._old[name] = chosen, uses, old
                self._start[name] = self.subspace.coordinates(
                    name, *(params[n] for n in self._layers[name].values())
                ).detach()
                self.open[name] = torch.zeros(len(shares), dtype=torch.bool, device=u.device)
                self.open[name][chosen] = True
        u.extra_bytes += sum(start.nbytes for start in self._start.values())

    def prepare(self, u: Update, batch: Batch) -> Batch:
        if self.subspace.bases:
            for module in self._norms:
                module.eval()
        return batch

    @torch.no_grad()
    def gradient(self, u: Update) -> None:
        for name, chosen in self._chosen.items():
            own = [u.parameters[full] for full in self._layers[name].values() if full in u.parameters]
            if len(own) < len(self._layers[name]) or any(p.grad is None for p in own):
                continue
            g = _joined([p.grad for p in own if p.grad is not None])
            stay = [_agree(self._old[name][j], g, self.agreement) for j in chosen]
            self.open[name] = self.open[name].to(g.device)
            self.open[name][chosen] &= torch.stack(stay)
            away = self.subspace.coordinates(name, *own) - self._start[name]
            lengths = (self._uses[name] @ away.square().sum(0)).sqrt()
            pull = (self.open[name] / lengths.clamp_min(1e-12)) @ self._uses[name]
            for p, part in zip(own, self.subspace.inside(name, self.leash * away * pull, own[0]), strict=False):
                if p.grad is not None and part is not None:
                    p.grad += part

    def project(self, u: Update, params: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        if self.subspace.bases:
            shut = {name: (~self.open[name]).to(uses.dtype) @ uses for name, uses in self._uses.items()}
            step_outside(self.subspace, self._layers, params, before, {n: c.clamp(max=1) for n, c in shut.items()})

    def end(self, u: Update) -> None:
        self.open = {}
        if u.kind == "learn":
            self._extend(u, u.data("task"))

    def _extend(self, u: Update, examples: Examples) -> None:
        seen = self._drawn(u, examples)
        with u.aside():
            inputs = layer_inputs(u.model, lambda batch: u.problem.forward(u.model, batch), u.batches(seen), bias=True)
        threshold = min(1.0, self.threshold + self.increase * self.events)
        added = self.subspace.extend(inputs, threshold, seen.ids)
        for name, rows in inputs.items():
            energy = (rows @ self.subspace.bases[name].to(rows)).square().sum(0)
            mine = fewest_columns(energy, added[name], threshold * float(rows.square().sum()))[None]
            old = self.uses.get(name, mine[:0]).to(mine.device)
            self.uses[name] = torch.cat([F.pad(old, (0, mine.shape[1] - old.shape[1])), mine])
        for name, g in self._gradients(u, seen).items():
            self.gradients.setdefault(name, []).append(g)
        self.events += 1

    def _drawn(self, u: Update, examples: Examples) -> Examples:
        return examples.select(torch.randperm(len(examples), generator=u.rng("cuber"))[: self.samples])

    def _gradients(self, u: Update, examples: Examples) -> dict[str, Tensor]:
        """The gradient of the examples' loss in eval mode, as (out, d) for each layer; zero where it is frozen."""
        total = {name: torch.zeros_like(p) for name, p in u.model.named_parameters()}
        for batch in u.batches(examples) if u.parameters else ():
            with u.aside(), torch.enable_grad():
                out = u.problem.forward(u.model, batch)
                found = u.grad(u.problem.loss(out, batch, u.classes.seen if u.columns else None))
            for name, g in zip(u.parameters, found, strict=True):
                total[name].add_(g, alpha=len(batch["id"]) / len(examples))
        layers = {
            n: own for n, own in projected_layers(u.model, "cuber").items() if has_inputs(u.model.get_submodule(n))
        }
        return {name: _joined([total[full] for full in own.values()]) for name, own in layers.items()}

    def forgot(self, u: Update, ids: Ids) -> None:
        self.setup()
        for examples in u.history():
            if len(examples):
                self._extend(u, examples)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Weight and bias of a layer as (out, d)."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


def _agree(old: Tensor, g: Tensor, least: float) -> Tensor:
    """Whether the cosine is above `least`, as a bool tensor; rows that are new have no old gradient."""
    above: Tensor = (old * g[: len(old)]).sum() > least * old.norm() * g.norm()
    return above
