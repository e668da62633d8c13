"""Move the embeddings of the forget set away from what they were, without a single label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples, Request
from remanence.models.small import seeded
from remanence.nn.anatomy import head, head_name, module_bytes
from remanence.nn.distances import cosine_distance
from remanence.nn.vae import VAE
from remanence.train.roles import Forgetter, Outcome, Step
from remanence.train.update import Update


@dataclass
class LAF(Forgetter):
    """Label-agnostic forgetting: retained embeddings stay typical and in place, forgotten ones become untypical and move.

        h, h_f = autoencoders (nn.vae) of the embeddings g0(x), the head's input, of all data and of D_f
        per pair of batches, two steps of two optimizers over the same weights:
        L_UE = sum over D_r of exp(m / (m + 1)) - sum over D_f of exp(n / (n + 1))        m = |h(g(x)) - g(x)|^2, n = |h_f(g(x)) - g(x)|^2
        L_RA = sum over D_r of c - n_r log sum over D_f of exp(c / temperature)           c = 1 - cos(g(x), g0(x)), n_r retained rows

    One epoch goes over the forget set once, every batch of it paired with one of the retained data. Labels are never read unless
    ``repair`` asks for it: then the head alone is trained on the retained labels afterwards (LAF+R). The two steps give the head no
    gradient at all, so without repair it answers moved embeddings as it always did.

    Pick it where the labels of a request are wrong or missing. Needs: retained data; labels only for repair. Reference: Shen et al.
    2024, "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models", arXiv 2404.00506. Published rates of the two steps:
    5e-5 and 1e-4 for a small network, 1e-5 and 4e-5 or 5e-5 for a ResNet with 40 epochs and 16 latent numbers; temperature 5 or 20. They
    are meant for thousands of steps: for a hundred examples take lr 1e-3 or more and small batches; at temperature 20 the forget
    set then still stays where it was.
    Deviations: the autoencoders' output is linear (the code's sigmoid cannot give an embedding above 1) and their code is mu when
    they judge (the code draws it); their sizes follow the embedding's; the teacher is g0 in eval mode, while the network trains in
    train mode; repair goes over all retained data, where the code takes as many batches as the forget set has.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 20,
        "batch_size": 64,
        "optimizer": "adam",
        "lr": 5e-5,
        "schedule": "constant",
    }

    align: float = knob(2.0, "rate of the alignment steps, as a multiple of lr", low=0)
    temperature: float = knob(5.0, "divides the forget set's distances in L_RA", low=1e-6)
    latent: int = knob(8, "numbers in the autoencoders' code", low=1)
    fit_epochs: int = knob(10, "epochs of the autoencoders, at Adam 1e-3", low=0)
    repair: int = knob(0, "epochs of training the head on retained labels; 0: no label is read", low=0)
    repair_lr: float = knob(1e-3, "rate of the repair", low=0)

    def forget(self, u: Update, request: Request) -> Outcome:
        if not len(u.data("retain")):
            raise BadInput("laf holds the retained embeddings in place, and no retained data can be reached")
        if u.settings.accumulate > 1:
            raise BadInput(
                "laf takes two different steps of each batch, which cannot be accumulated; leave accumulate at 1"
            )
        self._repairing = False
        self._origin = u.reference()
        self._typical, self._gone = (self._autoencoder(u, name) for name in ("seen", "forget"))
        u.run(drive="forget")
        if self.repair:
            self._repairing = True
            names = {f"{head_name(u.model)}.{name}" for name, _ in head(u.model).named_parameters()}
            u.run(data=u.data("retain"), trainable=names, epochs=self.repair, lr=self.repair_lr)
        return Outcome()

    def parameters(self, u: Update) -> list[dict[str, Any]]:
        """The same weights twice: two optimizers, each with moments of its own."""
        weights = list(u.parameters.values())
        aligned = {"params": weights, "name": "align", "lr": self.align * u.settings.lr}
        return [] if self._repairing else [{"params": weights}, aligned]

    def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
        if self._repairing:
            yield Step(u.problem.loss(u.out(batch), batch, u.classes.seen if u.columns else None))
            return
        assert u.forget is not None and u.total is not None
        if u.step == 0:
            u.total *= 2  # schedules count steps, and the loop has counted batches
        kept, gone = self._embedded(u, batch), self._embedded(u, u.forget)
        yield Step(unlike(self._typical.errors(kept)) - unlike(self._gone.errors(gone)), by="main")
        u.fresh_out()
        kept, gone = (cosine_distance(self._embedded(u, rows), self._first(u, rows)) for rows in (batch, u.forget))
        yield Step(alignment(kept, gone, self.temperature), by="align")

    def _embedded(self, u: Update, batch: Batch) -> Tensor:
        features = u.out(batch, features=True).features
        assert features is not None
        return features

    @torch.no_grad()
    def _first(self, u: Update, batch: Batch) -> Tensor:
        """The batch's embeddings in the network from before the request."""
        features = u.problem.forward(self._origin, batch, head(self._origin)).features
        assert features is not None
        return features

    def _autoencoder(self, u: Update, name: str) -> VAE:
        examples = u.data(name)
        made = torch.cat([self._first(u, batch).cpu() for batch in u.batches(examples)])
        embedded = Examples({"x": made}, "embeddings", examples.id)
        vae = seeded(u.seed_of(f"laf/{name}"), lambda: VAE(made.shape[1], self.latent).to(u.device))
        assert isinstance(vae, VAE)
        u.extra_bytes += module_bytes(vae) + made.nbytes
        u.fit(vae, embedded, lambda _, batch: vae.loss(batch["x"]), epochs=self.fit_epochs, optimizer="adam", lr=1e-3)
        vae.requires_grad_(False).eval()
        return vae


def unlike(errors: Tensor) -> Tensor:
    """``sum of exp(m / (m + 1))``: between n and e n for n errors (n,) >= 0, flat where they are large."""
    return torch.exp(errors / (errors + 1)).sum()


def alignment(kept: Tensor, gone: Tensor, temperature: float) -> Tensor:
    """``sum of kept - n log sum exp(gone / temperature)`` of distances (n,) and (m,)."""
    return kept.sum() - len(kept) * torch.logsumexp(gone / temperature, 0)
