"""Adapters trained slice by slice from the top of a frozen network: an example goes by switching adapters off."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.learn.base import Sharded
from remanence.nn.adapters import add_low_rank
from remanence.nn.anatomy import head_name, module_bytes, norm_modules
from remanence.nn.shards import Path, layer_groups, prefixes, rotations, surviving
from remanence.train.update import Context, Update

#: What one step trained: ``{"adapters": {name: tensor}, "head": {name: tensor}}``.
Trained = dict[str, dict[str, Tensor]]


class Frozen(nn.Module):
    """A frozen network in training: dropout draws, running statistics stand still."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for module in norm_modules(self.network).values():
            module.eval()
        return self


@dataclass
class S3T(Sharded):
    """Sequence-aware sharded sliced training: each slice trains its own layers' adapters, in several orders.

        shard k, order pi: step j trains on slice pi_j the low-rank adapters of layer group j, counted from the top, and the head
        W x + alpha / sqrt(rank) B A x        B = 0 in groups of later steps        M_pi1..pij = what stands after step j
        delete an example of slice s: M_path goes for every path with s in it        expected life: m L H_K deletions, K = m min(B, L)

    Nothing is trained to forget: a shard answers with the longest path that is left (of equally long ones the first), which is
    equal, bit for bit, to the same path of a life that never had the examples. Orders are cyclic rotations, then rotations of the
    rests. The price of a deletion: the other examples of the slice, and the slices behind it in each order, are lost to the shard until
    ``by="retrain"``; a shard without a path falls silent. Every learn event makes shards of its own, and events weigh the same in
    the answer: classes of different events are compared by confidence only, so a class-incremental life is answered much worse
    than one large event (three tasks of two digits: 0.53 to 0.70, `sisa` 0.98). Learning costs about B times plain training.

    Pick it with a pretrained network, when single examples will be asked for often and there is no time to train. Not for requests
    of whole classes, which touch every slice. Needs: labels; a frozen backbone with at least `slices` blocks of linear layers (a
    transformer's layers, a perceptron's linear layers; see `nn.shards.layer_groups`), of which all are adapted, in the paper
    query and value only. No keeper and no where can act.
    Reference: "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning", ICLR 2025, arXiv 2406.16257, and
    its official code. Deviations: each step trains on its own slice, as in the paper (the code's script: on all slices so far, and it
    chooses the epoch on test data); slices are drawn by hash; no dropout on the adapters; probabilities are averaged (logits there); a
    dead shard is not trained anew in the background; several events are ours. Which classes there are is not forgotten, see `sisa`.
    """

    sequences: int | None = knob(None, "orders trained in each shard, B; null: as many as slices, beyond which lives get no longer", low=1)  # fmt: skip
    rank: int = knob(16, "rank of the adapters", low=1)
    alpha: float = knob(16.0, "scale of the adapters, divided by the root of the rank", low=0)

    def setup(self) -> None:
        super().setup()
        rotations(range(self.slices), self.sequences or self.slices)  # refuses too many
        #: For each event and shard what every path trained last, by the path's slices.
        self.trained: list[dict[str, Trained]] = []

    def take_in(self, u: Update) -> None:
        event = len(self.events) - 1
        groups = layer_groups(u.model, self.slices)
        u.extra_bytes += module_bytes(u.model)
        for shard in range(self.shards):
            made: dict[str, Trained] = {}
            for path in prefixes(rotations(range(self.slices), self.sequences or self.slices)):
                made[_key(path)] = self._step(u, event, shard, path, groups, made)
            self.trained.append(made)

    def _step(
        self, u: Update, event: int, shard: int, path: Path, groups: list[list[str]], made: dict[str, Trained]
    ) -> Trained:
        """Train the last slice of `path` on what the path before it came to."""
        inner = self.grown(u, copy.deepcopy(u.model), event, shard)
        for n in range(1, len(path) + 1):
            seed = self.seed(u, event, shard, _key(path[:n]))
            inner = add_low_rank(inner, groups[n - 1], self.rank, self.alpha * math.sqrt(self.rank), seed)
            if n < len(path):
                inner.load_state_dict(
                    {**made[_key(path[:n])]["adapters"], **made[_key(path[:n])]["head"]}, strict=False
                )
        inner.requires_grad_(False)  # the adapters of earlier steps, too
        own = [f"{name}.{part}" for name in groups[len(path) - 1] for part in ("down", "up")]
        head = [f"{head_name(inner)}.{name}" for name, _ in inner.get_submodule(head_name(inner)).named_parameters()]
        for name in own + head:
            inner.get_parameter(name).requires_grad_(True)
        examples = self.rows(u, self.book.cells[self.cell(event, shard, path[-1])])
        if examples is not None:
            epochs = int(self.events[event]["settings"]["epochs"])
            self.fit(u, Frozen(inner), examples, event, f"s3t/{shard}/{_key(path)}", epochs)
        state = inner.state_dict()
        return {"adapters": {n: state[n].clone() for n in own}, "head": {n: state[n].clone() for n in head}}

    def take_out(self, u: Update, ids: Ids) -> str:
        left = []
        for at, made in enumerate(self.trained):
            gone = [s for s, cell in enumerate(self._cells(at)) if cell & ids]
            left.append({_key(path): made[_key(path)] for path in surviving(map(_path, made), gone)})
        spoke = [self._best(at, made) is not None for at, made in enumerate(self.trained)]
        speak = [self._best(at, made) is not None for at, made in enumerate(left)]
        if not any(speak):
            raise BadInput("s3t: the request would leave no shard with anything to answer with; ask by='retrain'")
        cut, silent = sum(map(len, self.trained)) - sum(map(len, left)), sum(spoke) - sum(speak)
        self.trained = left
        for at, made in enumerate(
            left
        ):  # a slice that is in no path that is left was left by all that was trained on it
            used = {s for path in map(_path, made) for s in path}
            for s in set(range(self.slices)) - used:
                self.book.cells[at * self.slices + s] = Ids()
        said = f"switched off {cut} prefixes: what is left was never trained on them"
        return f"{said}; {silent} of {len(left)} shards fell silent until by='retrain'" if silent else said

    # ------------------------------------------------------------------ answers

    def answers(self, c: Context, batch: Batch) -> list[list[Tensor]]:
        groups = layer_groups(c.model, self.slices)
        said: list[list[Tensor]] = [[] for _ in self.events]
        for at, made in enumerate(self.trained):
            path = self._best(at, made)
            if path is not None:
                weights = self.weights(c.model, groups, made, path)
                said[at // self.shards].append(functional_call(c.model, weights, (batch["x"],)))
        return said

    def _cells(self, at: int) -> list[Ids]:
        return self.book.cells[at * self.slices : (at + 1) * self.slices]

    def _best(self, at: int, made: dict[str, Trained]) -> Path | None:
        """The longest path, of those that were trained on anything; of equally long ones the first."""
        cells = self._cells(at)
        told = [path for path in map(_path, made) if any(cells[s] for s in path)]
        return max(told, key=len) if told else None

    def weights(
        self, model: nn.Module, groups: list[list[str]], made: dict[str, Trained], path: Path
    ) -> dict[str, Any]:
        """What a path puts in the place of the network's own: adapted weights, and its head."""
        device = next(model.parameters()).device
        weights: dict[str, Any] = {n: value.to(device) for n, value in made[_key(path)]["head"].items()}
        for n in range(1, len(path) + 1):
            adapters = made[_key(path[:n])]["adapters"]
            for name in groups[n - 1]:
                low = self.alpha / math.sqrt(self.rank) * adapters[f"{name}.up"] @ adapters[f"{name}.down"]
                weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight") + low.to(device)
        return weights


def _key(path: Path) -> str:
    return ".".join(map(str, path))


def _path(key: str) -> Path:
    return tuple(map(int, key.split(".")))
