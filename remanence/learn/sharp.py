"""A sparse network whose units are frozen as they age, activations of the last classes replayed, answers by masked neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.data import Examples
from remanence.learn.frozen import check_labels
from remanence.nn.aging import chain, is_sparse, older, open_entries, redraw, rewire, sparsify, spread, take, through
from remanence.nn.anatomy import evaluating, features, head
from remanence.nn.buffer import Buffer
from remanence.nn.contrast import supervised_contrast, unit
from remanence.nn.neighbours import masked_distances, votes
from remanence.nn.quantized import dequantised, quantised
from remanence.nn.taps import taps
from remanence.train.roles import Learner
from remanence.train.update import Context, Update

#: Rows of the event on which units are picked.
SAMPLES = 1024


@dataclass
class SHARP(Learner):
    """Units that carry an event are taken by it and frozen soon after; only what the last events' classes stirred in the middle of the
    network is replayed; classes are told by their own units.

        L = mean_i supcon(z_i, y_i; temperature)        z = unit(h m), rows of the batch and stored ones  F(a)
        picked in phase k: the most active units with max(cos^2(pi k / (2 tau)), share) of their layer's activity
        answer: vote of the nearest rows v_j by  |unit(h m_c) - unit(v_j m_c)|,  c the class of v_j

    The network is F(E(x)), E its first `early` hidden layers; h is the head's input, m the units that are not free. A phase is
    `phase_epochs` epochs; it begins by picking among the units that no earlier event has, then drops all connections from free units
    into others, and grows as many into free ones, from anywhere, with weight 0 (fewer, where no place is left). At the end of an event
    its picked units are its own for good, and free ones are drawn anew. What comes into a unit, its bias and its batch norm are frozen one
    event after it was taken in E, and 1 + `window` events after it in F, so that it and all that it reads stay. Of every class `per_class`
    activations a = E(x) are kept in 8 bits for `window` events, and the h of `neighbours` rows for good, made anew as long as the
    class is replayed. m_c are the units taken up to the last event of class c. The head is not trained: its rows become the mean unit(h m_c).

    Pick it for class after class on a small memory, with a network that is larger than one event needs. Needs: labels, borders, a chain
    of linear layers or convolutions with ReLU, stores activations; 10 * phase_epochs epochs or more per event: with few phases nearly
    every unit is picked, and none is left for later. Keepers that look at logits see the head. Leave `patience` off: while an event
    lasts, its classes have no vectors to be told by.
    The first classes are told best and the newest worst, for these find fewer free units and are compared on more of them: digits, two
    classes at a time, 0.99 and 0.24 to 0.58 after five events. Without freezing the stored vectors are worth nothing any more (0.00 and
    0.98 to 1.00); made anew from all old data, which here is not asked for, they would give 0.54 to 0.67 on the first classes. Over all classes
    `nmc` on the pixels is better (0.90 to 0.93, against 0.54 to 0.76).
    After a forget both memories are made again from what is retained, by the new weights. Who is free and what is connected is
    part of the network, and stays.
    Reference: Gurbuz, Moorman and Dovrolis 2023, "SHARP: Sparsity and Hidden Activation RePlay for Neuro-Inspired Continual Learning",
    arXiv 2305.18563, and its code. Deviations: the life's settings train (there Adadelta at 1.0), through all phases of an
    event with one optimizer; activations are coded row by row (there per class, and a row that is deleted would leave its extremes in
    the others), as many replayed as the batch has rows and never one twice; a class with one row in a batch is not left out, but has no
    partner; k in cos^2 counts from 1 (in the code 2, 2, 3, ..); rows to store are drawn (there the first); new weights of free units have
    variance 2 / fan-in; with `window` 0, which its code has, nothing would be replayed, and it is not offered. Its
    scripts store activations behind a pretrained and frozen E only, and inputs where nothing is pretrained: layers whose parameters
    need no gradient when SHARP begins stay whole and as they are.
    """

    stores: ClassVar[tuple[str, ...]] = ("per_class",)

    early: int = knob(1, "hidden layers before the stored activations; 0: inputs are stored", low=0)
    window: int = knob(1, "events whose classes are replayed", low=1)
    per_class: int = knob(25, "activations of each of these classes", low=0)
    neighbours: int = knob(25, "vectors of each class for its answers", low=1)
    k: int = knob(5, "vectors that vote", low=1)
    pruned: float = knob(0.6, "share of the connections that is missing", low=0, high=1)
    share: float = knob(0.8, "least share of a layer's activity that is picked", low=0, high=1)
    tau: int = knob(30, "phases after which that share alone would decide", low=1)
    phase_epochs: int = knob(3, "epochs between two pickings", low=1)
    temperature: float = knob(0.1, "of the supervised contrast", low=1e-3)

    def setup(self) -> None:
        self.recent = Buffer(per_class=self.per_class, policy="class-balanced")
        self.lasting = Buffer(per_class=self.neighbours, policy="class-balanced")
        #: The number of the next event, and of the last one in which there was data of each head column; -1: none.
        self.now, self.events = 1, torch.zeros(0, dtype=torch.int64)

    def structure(self, u: Update) -> dict[str, Any]:
        check_labels(u, self.slug)
        links = chain(u.model)
        if self.early >= len(links):
            raise BadInput(
                f"sharp: early={self.early} leaves none of {len(links)} hidden layers to learn with what is replayed"
            )
        return super().structure(u) | ({} if is_sparse(links) else {"sparse": u.seed_of("sharp")})

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        model = super().attach(model, structure) if "rows" in structure else model
        if "sparse" in structure:
            sparsify(model, self.pruned, int(structure["sparse"]))
        return model

    def begin(self, u: Update) -> None:
        self._links = chain(u.model)
        spans = [0 if number < self.early else self.window for number in range(len(self._links))]
        self._frozen = [older(link, self.now - span) for link, span in zip(self._links, spans, strict=True)]
        self._statistics = [
            (buffer, units, buffer.clone())
            for link, units in zip(self._links, self._frozen, strict=True)
            for norm in link.norms.values()
            for buffer in norm.buffers()
            if buffer.dim()
        ]

    def learn(self, u: Update) -> None:
        self._parts = u.parts
        u.run(mask=open_entries(self._links, self._frozen))
        del self._parts

    def order(self, u: Update, index: Any) -> Any:
        own = u.parts is vars(self).get("_parts")  # a keeper may run the loop as well
        if own and u.epoch % self.phase_epochs == 0:
            phase = min(1 + u.epoch // self.phase_epochs, self.tau)
            share = max(math.cos(math.pi * phase / (2 * self.tau)) ** 2, self.share)
            take(self._links, self._activity(u), share, self.now)
            rewire(self._links, u.rng("sharp-grow"))
        return index

    def objective(self, u: Update, batch: Batch) -> Tensor:
        y, weight, rows = batch["y"], batch.get("weight", torch.ones_like(batch["y"])), None
        drawn = self.recent.draw(len(y), u.rng("sharp-replay"), balanced=True)
        if drawn:
            one = torch.ones_like(drawn["id"])
            u.consumed.rows({"id": drawn["id"], "origin": one})
            y, weight, rows = torch.cat([y, drawn["y"]]), torch.cat([weight, one]), _activations(drawn)
        h = through(u.model, self.early, batch["x"], rows)[1]
        taken = spread(self._links[-1].sparse.born >= 0, h.shape[1])
        return (supervised_contrast(unit(h * taken), y, self.temperature) * weight).mean()

    def after(self, u: Update, batch: Batch) -> None:
        for statistic, units, value in self._statistics:
            statistic[units] = value[units]

    def end(self, u: Update) -> None:
        task, rows = u.data("task"), self.recent.columns
        with evaluating(u.model):
            if rows:  # classes of earlier events, once more while they are there
                first = task["x"][:1].to(u.device)
                h = through(u.model, self.early, first, _activations(rows))[1][1:]
                self._put(u, self.lasting, {"h": h, "y": rows["y"], "id": rows["id"]})
            self._widen(u.columns)
            self.events[task["y"].unique()] = self.now
            self.now += 1
            self._store(u, task)
        gone = self.events < self.now - self.window
        self.recent.evict(_ids_of(self.recent, gone.nonzero()[:, 0]))
        redraw(self._links, u.rng("sharp-redraw"))
        self._set_head(u.model)

    def forgot(self, u: Update, ids: Ids) -> None:
        for memory in (self.recent, self.lasting):
            memory.evict(memory.ids)
        self._widen(u.columns)
        with evaluating(u.model):
            for examples in u.history() if self.now > 1 else ():
                self._store(u, examples)

    def derived(self) -> bool:
        """The rows are copies, and were computed by the weights as well."""
        return self.now > 1

    def predict(self, c: Context, batch: Batch) -> Out:
        """Votes of the nearest vectors; among equal ones the nearest vector decides."""
        h = features(c.model, batch["x"])
        if not len(self.lasting):
            return Out(h.new_zeros(len(h), c.columns))
        rows = {name: column.to(h.device) for name, column in self.lasting.columns.items()}
        event = self.events.to(h.device)[rows["y"]]
        distances = masked_distances(h, rows["h"], event, self._masks(c.model, h.shape[1]))
        return Out(votes(distances, rows["y"], self.k, c.columns))

    def _activity(self, u: Update) -> list[Tensor]:
        """The summed output of every unit of every layer, on at most `SAMPLES` rows of the event."""
        task = u.data("task")
        some = task.select(torch.randperm(len(task), generator=u.rng("sharp-pick"))[:SAMPLES])
        totals = [torch.zeros(link.units, dtype=torch.float64, device=u.device) for link in self._links]
        with u.aside(), taps(u.model, [link.relu for link in self._links]) as taken:
            for batch in u.batches(some):
                u.model(batch["x"])
                for total, link in zip(totals, self._links, strict=True):
                    total += taken[link.relu].transpose(0, 1).flatten(1).double().sum(1)
        return totals

    def _store(self, u: Update, examples: Examples) -> None:
        """Rows of the classes in `examples`, as far as an event of them is known, take the place of what there is of these classes."""
        y = examples["y"]
        of_class = [(y == column).nonzero()[:, 0] for column in y.unique() if self.events[column] >= 0]
        drawn = [at[torch.randperm(len(at), generator=u.rng("sharp-store"))] for at in of_class]
        for memory, n in ((self.lasting, self.neighbours), (self.recent, self.per_class)):
            kept = [at for at in drawn if memory is self.lasting or self.events[y[at[0]]] >= self.now - self.window]
            if not kept:
                continue
            made = []
            for batch in u.batches(examples.select(torch.cat([at[:n] for at in kept]))):
                a, h = through(u.model, self.early, batch["x"])
                codes = dict(zip(("a", "low", "high"), quantised(a), strict=True))
                made.append({"y": batch["y"], "id": batch["id"], **({"h": h} if memory is self.lasting else codes)})
            self._put(u, memory, {name: torch.cat([part[name] for part in made]) for name in made[0]})

    def _put(self, u: Update, memory: Buffer, rows: Batch) -> None:
        memory.evict(_ids_of(memory, rows["y"].unique()))
        memory.add(rows, u.rng("sharp-put"))

    def _widen(self, columns: int) -> None:
        self.events = F.pad(self.events, (0, columns - len(self.events)), value=-1)

    def _masks(self, model: nn.Module, width: int) -> dict[int, Tensor]:
        """For each event, which of the head's `width` inputs come from units that were taken up to it; all, if none do."""
        link = chain(model)[-1]
        taken = {event: older(link, event + 1) for event in self.events.unique().tolist()}
        return {event: spread(m if m.any() else torch.ones_like(m), width) for event, m in taken.items()}

    @torch.no_grad()
    def _set_head(self, model: nn.Module) -> None:
        layer, rows = head(model), self.lasting.columns
        assert isinstance(layer, nn.Linear)
        masks = self._masks(model, layer.in_features)
        for column in rows["y"].unique().tolist():
            h = rows["h"][rows["y"] == column]
            layer.weight[column] = unit(h * masks[int(self.events[column])]).mean(0)
            if layer.bias is not None:
                layer.bias[column] = 0


def _activations(rows: Batch) -> Tensor:
    return dequantised(rows["a"], rows["low"], rows["high"])


def _ids_of(memory: Buffer, columns: Tensor) -> Ids:
    """The ids of the rows whose head column is among `columns`."""
    rows = memory.columns
    return Ids(rows["id"][torch.isin(rows["y"], columns.to(rows["y"].device))]) if rows else Ids()
