"""A ridge head on frozen features, learned in closed form: rows can be taken out as exactly as they came in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.core.rng import generator, seed_of
from remanence.nn.anatomy import head, head_name
from remanence.nn.ridge import RidgeHead, steady_features
from remanence.train.roles import Learner, Step
from remanence.train.update import Context, Update


@dataclass
class ACU(Learner):
    """Analytic learning and unlearning: the head is the solution of a ridge regression onto one-hot labels.

        phi(x) = relu(V f(x))        V (width, D) drawn once per life, normal with variance 1 / D
        W = (Phi'Phi + gamma I)^{-1} Phi'Y        scores = W' phi(x)

    f is the input of the network's head, in eval mode, never trained. What is kept is Phi'Phi and Phi'Y in float64 (width^2
    numbers), so the order and the cut of the stream do not matter, and a request subtracts its rows: ``forget(by="acu")`` needs only the
    forgotten examples, and leaves what a life without them would have, to rounding. The scores are the logits.

    Pick it with a pretrained backbone, where deletion must be exact and cheap; its head is stronger than `nmc`. Needs: labels, a
    backbone that no event trains: f itself is never unlearned. Reference: ACU, 2025, arXiv 2505.12239; the equations are
    recursive least squares, derived and checked here, not copied from the paper, of which only the abstract was at hand. Deviations: sums
    are the state in place of R, from which the paper's two updates are a rearrangement (`remanence.nn.ridge` has both); gamma,
    width and the law of V are this library's. Phi'Phi tells second moments of the retained features to whoever reads it.
    """

    moves_weights: ClassVar[bool] = False

    gamma: float = knob(1.0, "ridge: the weight of |W|^2", low=1e-9)
    width: int = knob(1000, "random ReLU features; 0: the network's own features", low=0)

    def setup(self) -> None:
        self.ridge = RidgeHead(self.gamma)
        #: The address of V, and the sha256 of the network whose features are counted.
        self.draw, self.network = 0, ""

    def structure(self, u: Update) -> dict[str, Any]:
        return {}

    def begin(self, u: Update) -> None:
        self._check_network(u)
        # Addressed by the life alone: a life whose first event is forgotten has the same V as one that never had it.
        self.draw, self.network = seed_of(u.seed, "acu"), _body_sha256(u.model)
        u.extra_bytes += 8 * self.width * int(getattr(head(u.model), "in_features", 0))

    def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
        if u.epoch < u.sweep:
            self._add(u, batch)
        yield Step(None)

    def predict(self, c: Context, batch: Batch) -> Out:
        labels = self.ridge.labels
        size = max([c.columns, *[label + 1 for label in labels]])
        logits = torch.full((len(batch["x"]), size), -torch.inf, device=batch["x"].device)
        if labels:
            phi = self._phi(c, batch["x"])
            logits[:, labels] = (phi @ self.ridge.weights().to(phi)).to(logits)
        return Out(logits)

    def unlearn(self, u: Update, ids: Ids) -> str:
        """Subtract the rows of `ids`."""
        mine, data = self.ridge.holds(ids), u.data("forget").only(ids)
        if not mine <= data.ids:
            raise BadInput(
                f"{len(mine - data.ids)} of the examples to unlearn cannot be reached, and their features are needed"
            )
        self._check_network(u)
        _, first = np.unique(data.id.numpy(), return_index=True)  # learned in two tasks, an example counts once
        for batch in u.batches(data.select(torch.from_numpy(first)).only(mine)):
            self.ridge.remove(self._phi(u, batch["x"]), batch["y"], batch["id"])
        self._unlearned = ids
        return (
            f"taken out of the ridge head in closed form: equal to a life without them to {self.ridge.rounding():.0e}"
        )

    def purge(self, ids: Ids) -> None:
        """Nothing yet: a sum cannot be unmixed without its rows, which `unlearn` or `forgot` have. One of them follows in every
        request."""

    def forgot(self, u: Update, ids: Ids) -> None:
        """Unless `unlearn` has just taken them out, count afresh over what is retained: exact for any weights."""
        if vars(self).pop("_unlearned", None) == ids and not self.ridge.holds(ids):
            return
        self.ridge, self.network = RidgeHead(self.gamma), _body_sha256(u.model)
        for examples in u.history():
            for batch in u.batches(examples):
                self._add(u, batch)

    def _add(self, u: Update, batch: Batch) -> None:
        self.ridge.add(self._phi(u, batch["x"]), batch["y"], batch["id"])

    def _phi(self, c: Context, x: Tensor) -> Tensor:
        """The head's features (B, width) in float64, the same bits for a row in whatever batch it comes."""
        z = steady_features(c.model, x).to(torch.float64)
        if not self.width:
            return z
        address = (self.draw, z.shape[1])
        layer = vars(self).get("_layer")
        if layer is None or layer[0] != address:
            drawn = torch.randn(z.shape[1], self.width, generator=generator(*address), dtype=torch.float64)
            layer = self._layer = (address, drawn / z.shape[1] ** 0.5)
        return torch.relu(z @ layer[1].to(z.device))

    def _check_network(self, u: Update) -> None:
        if self.ridge.labels and self.network != _body_sha256(u.model):
            raise BadInput(
                "the network is not the one whose features were counted: acu needs a backbone that no event trains; learn every task "
                "with acu and without keepers or adapters that train"
            )


def _body_sha256(model: nn.Module) -> str:
    """sha256 (hex) of all that the features depend on: weights and buffers but the head's."""
    digest, own = hashlib.sha256(), head_name(model)
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] != own:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
