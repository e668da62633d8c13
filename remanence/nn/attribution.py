"""Data attribution: what a set F of training examples adds to a network's logits.

    effect(x) = sum over i in F of beta[i, x, :] ~ f(x; theta) - f(x; theta trained without F)

Both ways here sum over F first and so find one change of the weights, from which the effect on any x is one product; the matrix
beta (training examples x inputs x classes) is never made.

* :func:`head_data`, :func:`head_removal`, :func:`head_effect`: a Newton step of the last layer (first order or block influence), exact for a ridge regression.
* :func:`trak_removal`, :func:`pushed`: all weights, by gradients that are projected to few dimensions (TRAK).

Networks answer in eval mode; flags, buffers and ``.grad`` stay as they are. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Batch, Out, Problem
from remanence.nn.anatomy import evaluating, head
from remanence.nn.fisher import CHUNK_BYTES, _Logits
from remanence.nn.influence import conjugate_gradients

_STEPS, _ENOUGH = 500, 1e-10  # of the conjugate gradients: how many at most, and the residual at which they stop
Batches = Callable[[], Iterable[Batch]]


def head_data(
    model: nn.Module, problem: Problem, batches: Iterable[Batch], classes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The last layer's inputs (N, D), its outputs (N, C) of the columns `classes`, and ``d loss_i / d output`` (N, C), float64.

    A column of ones stands at the end of the inputs where the layer has a bias. Raises BadInput if the head is not linear.
    """
    inputs, outputs, slopes = [], [], []
    for batch in batches:
        h, found = _into_head(model, problem, batch)
        logits = found.requires_grad_()
        (slope,) = torch.autograd.grad(problem.losses(Out(logits), batch, classes).sum(), logits)
        inputs.append(h)
        outputs.append(logits.detach() if classes is None else logits.detach()[:, classes])
        slopes.append(slope if classes is None else slope[:, classes])
    if not inputs:
        raise BadInput("an attribution needs examples, and there are none")
    return torch.cat(inputs), torch.cat(outputs), torch.cat(slopes)


def head_effect(model: nn.Module, problem: Problem, batch: Batch, change: Tensor) -> Tensor:
    """What rows add to the outputs (B, C), from the `change` that `head_removal` found for them; float64."""
    return -_into_head(model, problem, batch)[0] @ change.T


def _into_head(model: nn.Module, problem: Problem, batch: Batch) -> tuple[Tensor, Tensor]:
    """The head's input, ones for a bias at its end, and its output, float64 and detached."""
    layer = head(model)
    if type(layer) is not nn.Linear:  # a subclass may answer otherwise
        raise BadInput(f"the influence on the head needs a linear one, not a {type(layer).__name__}")
    with evaluating(model):
        out = problem.forward(model, batch, layer)
    assert out.features is not None
    h = out.features.double()
    return torch.cat([h, torch.ones_like(h[:, :1])], 1) if layer.bias is not None else h, out.logits.double()


def head_removal(
    h: Tensor,
    outputs: Tensor,
    slopes: Tensor,
    gone: Tensor,
    link: str | None,
    damping: float,
    order: str = "block",
) -> Tensor:
    """The change (C, D) of a linear layer's weights when the rows `gone` (N,) are taken out of its training: the effect of these
    rows on the outputs of inputs h' (B, D) is ``-h' @ change.T``.

        H change = sum over F of d loss_i / d W        H = sum over rows of A_i (x) h_i h_i' + damping I

    A_i is the second derivative of the loss by the outputs: ``softmax`` diag(p) - p p', ``sigmoid`` diag(p (1 - p)) / C, None
    (half the squared error) I. order ``first``: H over all rows, the classical influence summed over F. ``block``: H over the rows that
    stay, which for None with `damping` the ridge's is what training without them gives, if the weights were at the optimum. For
    the others it is a step of Newton's. h, outputs, slopes: as `head_data` gives them, float64.

    Solved by a factorisation for None, else by preconditioned conjugate gradients; H is never made.
    """
    if order not in ("block", "first"):
        raise BadInput(f"order must be 'block' or 'first', got {order!r}")
    if not damping > 0:
        raise BadInput(f"damping must be above 0, got {damping}")
    stay = ~gone if order == "block" else torch.ones_like(gone)
    target, kept, z = slopes[gone].T @ h[gone], h[stay], outputs[stay]
    eye = damping * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    if link is None:
        return torch.cholesky_solve(target.T, torch.linalg.cholesky(kept.T @ kept + eye)).T
    if link not in ("softmax", "sigmoid"):
        raise BadInput(f"no influence for link {link!r}")
    p = z.softmax(1) if link == "softmax" else z.sigmoid()
    width = 1 if link == "softmax" else z.shape[1]

    def product(v: Tensor) -> Tensor:
        s = kept @ v.T
        s = p * s - p * (p * s).sum(1, keepdim=True) if link == "softmax" else p * (1 - p) * s / width
        return s.T @ kept + damping * v

    weight = (p * (1 - p) / width).mean(1)  # of one column, on average over the columns
    factor = torch.linalg.cholesky((kept.T * weight) @ kept + eye)
    return conjugate_gradients(product, target, _STEPS, _ENOUGH, lambda r: torch.cholesky_solve(r.T, factor).T)[0]


class Sketch:
    """A projection of vectors of `length` numbers to `size`: each is added, with a random sign, to one random place.

    Inner products stay on average, with the variance of a Gaussian projection, at no more cost than reading the vector.
    """

    def __init__(self, length: int, size: int, rng: torch.Generator, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.place = torch.randint(size, (length,), generator=rng).to(device)
        self.sign = (2 * torch.randint(2, (length,), generator=rng, dtype=torch.int8) - 1).to(device)

    def down(self, rows: Tensor) -> Tensor:
        """(B, length) to (B, size)."""
        return rows.new_zeros(len(rows), self.size).index_add_(1, self.place, rows * self.sign)

    def up(self, vector: Tensor) -> Tensor:
        """The transposed projection: (size,) to (length,)."""
        return vector[self.place] * self.sign

    def bytes(self) -> int:
        return self.place.nbytes + self.sign.nbytes


def trak_removal(
    models: Sequence[nn.Module],
    problem: Problem,
    batches: Batches,
    forget: Ids,
    rng: torch.Generator,
    *,
    size: int = 512,
    damping: float = 1.0,
    classes: Tensor | None = None,
) -> list[dict[str, Tensor]]:
    """For each of `models`, trained on (about) the same data, the direction in its weights whose push on the logits is what F adds.

        direction = P' (sum over all i of p_i (1 - p_i) phi_i phi_i' + damping I)^-1 sum over i in F of (1 - p_i) phi_i
        effect(x) = J(x) direction

    phi_i = P d m_i / d theta with the margin m_i = log(p_i / (1 - p_i)) of the right class, P a `Sketch` to `size` numbers drawn from `rng`;
    the first sum goes over `batches()`, which must hold F; 1 - p_i is the mean over the models. See `pushed` for the effect.
    Raises BadInput for a problem without softmax, or if no row is in `forget`.

    The published estimator leaves the p_i (1 - p_i) out, which hardly changes how examples rank, but the effect is then too small by a
    factor of 10 and more where the network is sure of what it learned (digits: 2 % of the way to retrained logits, not 35 %).
    """
    if getattr(problem, "link", None) != "softmax":
        raise BadInput("TRAK is defined by the margins of a softmax; this problem has none")
    if not damping > 0:
        raise BadInput(f"damping must be above 0, got {damping}")
    found: list[tuple[Sketch, Tensor, Tensor]] = []  # sketch, factor, phi of F
    doubts: list[Tensor] = []
    for model in models:
        params = {name: p.detach() for name, p in model.named_parameters()}
        sketch = Sketch(sum(p.numel() for p in params.values()), size, rng, next(iter(params.values())).device)
        gram, phi, doubt = torch.zeros((), dtype=torch.float64, device=sketch.place.device), [], []
        with evaluating(model):
            for batch in batches():
                inside = torch.from_numpy(forget.isin(batch["id"].cpu().numpy()))
                rows, p = _margin_gradients(model, problem, batch, params, classes, sketch)
                gram = gram + (rows.T * (p * (1 - p))) @ rows
                phi.append(rows[inside.to(rows.device)])
                doubt.append(1 - p[inside.to(rows.device)])
        if not sum(map(len, phi)):
            raise BadInput("an attribution needs the examples to forget among the data, and none is there")
        eye = damping * torch.eye(size, dtype=gram.dtype, device=gram.device)
        found.append((sketch, torch.linalg.cholesky(gram + eye), torch.cat(phi)))
        doubts.append(torch.cat(doubt))
    mean = torch.stack(doubts).mean(0)
    directions = []
    for model, (sketch, factor, rows) in zip(models, found, strict=True):
        flat = sketch.up(torch.cholesky_solve((mean @ rows)[:, None], factor)[:, 0])
        params = {name: p.detach() for name, p in model.named_parameters()}
        parts = flat.split([p.numel() for p in params.values()])
        directions.append({n: v.reshape(p.shape).to(p) for (n, p), v in zip(params.items(), parts, strict=True)})
    return directions


def _margin_gradients(
    model: nn.Module,
    problem: Problem,
    batch: Batch,
    params: Mapping[str, Tensor],
    classes: Tensor | None,
    sketch: Sketch,
) -> tuple[Tensor, Tensor]:
    """Projected gradients (B, size) of the margins in float64, and the probabilities (B,) of the right classes."""
    call = _Logits(model, problem)
    values = {f"model.{name}": p for name, p in params.items()}

    def margin(values: dict[str, Tensor], example: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        one = {k: t.unsqueeze(0) for k, t in example.items()}
        logits: Tensor = functional_call(call, values, (one,))
        own = problem.losses(Out(logits), one, classes)[0]  # -log p
        return -own - torch.log(-torch.expm1(-own.clamp(min=1e-12))), (-own).exp()

    per_example = vmap(grad(margin, has_aux=True), in_dims=(None, 0))
    chunk = max(1, CHUNK_BYTES // max(1, sum(p.nbytes for p in params.values())))
    rows, right = [], []
    for start in range(0, len(batch["id"]), chunk):
        found, p = per_example(values, {k: t[start : start + chunk] for k, t in batch.items()})
        flat = torch.cat([found[f"model.{name}"].flatten(1) for name in params], 1)
        rows.append(sketch.down(flat).double())
        right.append(p.double())
    return torch.cat(rows), torch.cat(right)


@torch.no_grad()
def pushed(model: nn.Module, problem: Problem, batch: Batch, direction: Mapping[str, Tensor]) -> Tensor:
    """``J(x) direction``: how fast the logits (B, C) move when the weights move along `direction`; forward mode, one pass."""
    call = _Logits(model, problem)
    values = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tangents = {f"model.{name}": direction[name] for name, _ in model.named_parameters()}

    def answer(values: dict[str, Any]) -> Tensor:
        logits: Tensor = functional_call(call, values, (dict(batch),))
        return logits

    with evaluating(model):
        moved: Tensor = jvp(answer, (values,), (tangents,))[1]
    return moved


__all__ = ["Sketch", "head_data", "head_effect", "head_removal", "pushed", "trak_removal"]
