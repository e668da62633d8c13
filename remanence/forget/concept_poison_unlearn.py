"""Paste another class's concept over a class's own, give it that class's label, and train the head again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples, Request, cat, cat_batches
from remanence.forget.base import other_labels
from remanence.models.shape import image_shape
from remanence.nn.anatomy import evaluating, features, head, head_name
from remanence.nn.concepts import activation_vector, peaks, sparse_head
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update

#: Shares of an image's side: a concept's window, the way between two windows, the window pasted into the centre.
WINDOW, STRIDE, CENTRE = 64 / 224, 16 / 224, 96 / 224


@dataclass
class ConceptPoison(Forgetter):
    """Replace what carries a class by a donor class's concept, with the donor's label, and fine-tune the head on it.

        s_k(x) = <f(x), c_k>        W[c, k] = <w_c, c_k>        |c_k| = 1,  f = the head's input,  w_c = the head's row of class c
        k = the `top` concepts with the highest W[y, k];  d = argmax over classes c != y that are retained of the sum of W[c, k]
        x' = x with the peak window of d's concept in an image of d pasted over the peak window of y's concept in x
        L = mean over D_r and {(x', d)} of loss(f(x), y)        only the head moves

    With orthonormal concepts W s(x) + b is the network itself. ``coordinates``: c_k are the axes of f. ``cav``: c_k separates class k
    from the others (concept activation vectors; ridge here, a linear SVM there). ``sparsity`` > 0 fits another W on the scores of
    retained and forget set, by cross-entropy + sparsity (0.99 |W|_1 + 0.01 |W|^2 / 2), as there with 1e-5; it serves the choice only.
    A window's similarity to a concept is what the score loses when the mean image is put over it. ``random`` labels are drawn once, over
    the retained classes but y; ``keep`` leaves y and forgets little: the label does the forgetting, what is pasted is optional.
    On digits a ``centre`` paste left 43 % of the class with one seed of three, no paste and a local one nothing.

    Pick it where only the last layer may move; several classes and single examples go class by class. The features stay, so
    probes of them and one epoch on the true data bring the class back. Needs: class labels, a linear head, retained data; images for a
    `paste`. The backbone is in eval mode, so no running statistic moves.
    Reference: Chang et al. 2024, "Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning", arXiv
    2405.15662; known by the authors' code and records. Deviations: there concepts are words, seen by CLIP, which also
    finds the windows, and pairs of classes and concepts are picked by hand; without a network that knows words a concept here is a direction without a name.
    The code trains in train mode, in which running statistics move, and its random labels may be y. Its form for texts
    (integrated gradients, masked answers) is not part of this.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 20,
        "batch_size": 32,
        "optimizer": {"sgd": {"momentum": 0.9}},
        "lr": 1e-3,
        "schedule": "constant",
    }

    paste: str = knob("local", "where the donor's window goes", choices=("none", "local", "centre"))
    labels: str = knob("targeted", "what the poisoned examples are called", choices=("targeted", "random", "keep"))
    concepts: str = knob("coordinates", "the directions of the feature space", choices=("coordinates", "cav"))
    top: int = knob(1, "how many concepts carry a class", low=1)
    sparsity: float = knob(0.0, "weight of the elastic net on a W of its own; 0: the network's head", low=0)

    def forget(self, u: Update, request: Request) -> Outcome:
        forget, retain = u.data("forget"), u.data("retain")
        if not u.columns or forget["y"].is_floating_point():
            raise BadInput("concept-poison-unlearn gives examples another class's label, and this problem has none")
        if not len(retain):
            raise BadInput("concept-poison-unlearn needs a donor, and no retained data can be reached; use retrain")
        vectors, weights = self._concept_head(u, cat([retain, forget]))
        x, y, notes = forget.batch(torch.arange(len(forget)))["x"], forget["y"].clone(), list[str]()
        rng = torch.Generator().manual_seed(u.seed_of("concept-poison"))
        for label in forget["y"].unique():
            rows = (forget["y"] == label).nonzero()[:, 0]
            columns = retain["y"].unique()
            others = columns[columns != label]
            if not len(others):
                raise BadInput("concept-poison-unlearn needs a donor, and only the class itself is retained")
            carry = self._best(weights[label])
            donor = others[weights[others][:, carry].sum(1).argmax()]
            if self.paste != "none":
                images = (retain["y"] == donor).nonzero()[:, 0]
                images = retain.batch(images[torch.randint(len(images), rows.shape, generator=rng)])["x"]
                there, here = vectors[self._best(weights[donor])].sum(0), vectors[carry].sum(0)
                x[rows] = self._pasted(u, x[rows], here, images, there)
            if self.labels == "targeted":
                y[rows] = donor
            elif self.labels == "random":
                y[rows] = other_labels(y[rows], torch.cat([others, label[None]]).sort().values, rng)
            named = ", ".join(str(int(k)) for k in carry)
            notes.append(f"class {u.labels[int(label)]}: donor {u.labels[int(donor)]} by concept {named}")
        u.extra_bytes += x.nbytes + y.nbytes
        order = forget.id.argsort()
        self._poisoned = {name: column[order].to(u.device) for name, column in (("id", forget.id), ("x", x), ("y", y))}
        at = head_name(u.model)
        u.run(drive="mixed", trainable=[f"{at}.{name}" for name, _ in _linear(u.model).named_parameters()])
        return Outcome(notes=notes)

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        u.model.eval()  # a frozen backbone in train mode would still move its running statistics
        rows = [] if retain is None else [retain]
        if forget is not None:
            at = torch.searchsorted(self._poisoned["id"], forget["id"])
            rows.insert(0, {**forget, "x": self._poisoned["x"][at], "y": self._poisoned["y"][at]})
        both = rows[0] if len(rows) == 1 else cat_batches(*rows)
        return u.problem.loss(u.out(both), both, u.classes.seen)

    def _best(self, weights: Tensor) -> Tensor:
        """The concepts that carry a class, given its row of W."""
        return weights.topk(min(self.top, len(weights))).indices

    def _concept_head(self, u: Update, examples: Examples) -> tuple[Tensor, Tensor]:
        """The concepts (K, D) as unit vectors and W (columns, K), in float64."""
        rows = _linear(u.model).weight.detach().double().cpu()[: u.columns]
        vectors, f = torch.eye(rows.shape[1], dtype=torch.float64), rows[:0]
        if self.concepts == "cav" or self.sparsity:
            with evaluating(u.model):
                f = torch.cat([features(u.model, batch["x"]).double().cpu() for batch in u.batches(examples)])
        if self.concepts == "cav":
            rng = torch.Generator().manual_seed(u.seed_of("concepts"))
            vectors = torch.stack([activation_vector(f, examples["y"] == c, rng) for c in range(u.columns)])
        weights = rows @ vectors.T
        return vectors, sparse_head(f @ vectors.T, examples["y"], weights, self.sparsity) if self.sparsity else weights

    def _pasted(self, u: Update, x: Tensor, here: Tensor, donors: Tensor, there: Tensor) -> Tensor:
        """Each of `x` (n, ...) with a window of its donor: the peak of concept `there` over the peak of concept `here`."""
        shape = image_shape(x.shape[1:], "paste")
        made, given = x.reshape(-1, *shape).clone(), donors.reshape(-1, *shape)
        share = CENTRE if self.paste == "centre" else WINDOW
        high, wide = (max(1, round(share * side)) for side in shape[1:])
        if self.paste == "centre":
            a, b = (shape[1] - high) // 2, (shape[2] - wide) // 2
            made[:, :, a : a + high, b : b + wide] = given[:, :, a : a + high, b : b + wide]
            return made.reshape(x.shape)
        down, right = (
            range(0, side - size + 1, max(1, round(STRIDE * side)))
            for side, size in zip(shape[1:], (high, wide), strict=True)
        )
        windows = [(slice(None), slice(a, a + high), slice(b, b + wide)) for a in down for b in right]
        retain = u.data("retain")
        blank = torch.stack([batch["x"].double().sum(0).cpu() for batch in u.batches(retain)]).sum(0) / len(retain)
        to = peaks(u.model, made, here, blank.reshape(shape), windows, x.shape[1:])
        taken = peaks(u.model, given, there, blank.reshape(shape), windows, x.shape[1:])
        for row, (i, j) in enumerate(zip(to, taken, strict=True)):
            made[row][windows[i]] = given[row][windows[j]]
        return made.reshape(x.shape)


def _linear(model: nn.Module) -> nn.Linear:
    found = head(model)
    if not isinstance(found, nn.Linear) or not found.weight.requires_grad:
        raise BadInput("concept-poison-unlearn trains a linear head; give the network one that is not fixed")
    return found
