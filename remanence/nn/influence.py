"""How far the optimum moves when examples leave: products with a network's curvature, and three ways to solve with it.

Vectors are flat: all parameters one after the other, in the order of `params`, float64 where the device has it. Everything here
runs the model in eval mode, counts every example alike (a column ``weight`` is not read), draws no random number, and leaves
flags, buffers and ``.grad`` as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.problem import Batch, Out, Problem
from remanence.nn.anatomy import evaluating, twice_differentiable
from remanence.nn.fisher import _wide

Product = Callable[[Tensor], Tensor]


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """The values of `tensors`, one after the other (P,)."""
    return torch.cat([t.detach().to(_wide(t)).reshape(-1) for t in tensors.values()])


def unflat(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`vector` (P,) cut into the shapes, and cast to the dtypes, of `like`."""
    parts = vector.split([t.numel() for t in like.values()])
    return {name: part.reshape(t.shape).to(t.dtype) for (name, t), part in zip(like.items(), parts, strict=True)}


def curvature(
    model: nn.Module,
    problem: Problem,
    batches: Callable[[], Iterable[Batch]],
    params: Mapping[str, Tensor],
    classes: Tensor | None = None,
    kind: str = "gauss-newton",
    damping: float = 0.0,
) -> Product:
    """The map ``v -> (C + damping I) v``, C a curvature of the mean loss over all examples; each call is a pass over them.

    kind ``gauss-newton``: C = mean_i J_i' S_i J_i, J_i the Jacobian of example i's output and S_i the second derivative of its
    loss there; never negative for the losses of `problem`, and for them the Fisher matrix (``exact``), whole instead of its
    diagonal. ``hessian``: C = mean_i of the second derivative of loss_i, which can be negative off an optimum. They are equal
    where the output is linear in the parameters. batches: called for every product, must give the same examples. params:
    {name: parameter that requires a gradient}. classes: head columns that compete, or None.
    """
    if kind not in ("gauss-newton", "hessian"):
        raise BadInput(f"kind must be 'gauss-newton' or 'hessian', got {kind!r}")
    values = list(params.values())

    def product(vector: Tensor) -> Tensor:
        along = list(unflat(vector, params).values())
        total, count = torch.zeros_like(vector), 0
        with evaluating(model), torch.enable_grad(), twice_differentiable():
            for batch in batches():
                logits = problem.forward(model, batch).logits
                if kind == "hessian":
                    loss = problem.losses(Out(logits), batch, classes).sum()
                    slope = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
                    found = _along(slope, values, along)
                else:
                    pushed = _second(problem, logits, batch, classes, _pushed(logits, values, along))
                    found = torch.autograd.grad(logits, values, pushed, allow_unused=True)
                total += _joined(found, values)
                count += len(batch["id"])
        if not count:
            raise BadInput("a curvature needs examples, and there are none")
        return total / count + damping * vector

    return product


def _pushed(logits: Tensor, values: list[Tensor], along: list[Tensor]) -> Tensor:
    """J v, by differentiating ``w -> J' w``, which is linear, along v: no forward-mode rules are needed."""
    w = torch.zeros_like(logits, requires_grad=True)
    back = torch.autograd.grad(logits, values, w, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(back, along, strict=True) if g is not None]
    (found,) = torch.autograd.grad([g for g, _ in pairs], w, [v for _, v in pairs])
    return found


def _second(problem: Problem, logits: Tensor, batch: Batch, classes: Tensor | None, v: Tensor) -> Tensor:
    """The second derivative of the losses by the outputs, times v."""
    z = logits.detach().requires_grad_()
    (slope,) = torch.autograd.grad(problem.losses(Out(z), batch, classes).sum(), z, create_graph=True)
    (found,) = torch.autograd.grad(slope, z, v)
    return found


def _along(slope: Iterable[Tensor | None], values: list[Tensor], along: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The derivative of ``slope . along``."""
    terms = [(g * v).sum() for g, v in zip(slope, along, strict=True) if g is not None and g.requires_grad]
    return torch.autograd.grad(sum(terms[1:], terms[0]), values, allow_unused=True)


def _joined(found: Iterable[Tensor | None], values: list[Tensor]) -> Tensor:
    pairs = zip(found, values, strict=True)
    return flat({str(i): torch.zeros_like(p) if g is None else g for i, (g, p) in enumerate(pairs)})


def conjugate_gradients(
    product: Product, b: Tensor, steps: int, tolerance: float = 0.0, precondition: Product | None = None
) -> tuple[Tensor, float]:
    """x with ``A x = b`` for the symmetric, positive definite A behind `product`, by at most `steps` products.

    Ends when ``|b - A x| <= tolerance |b|``. Exact, but for rounding, after as many steps as A has different eigenvalues; sooner
    it is the best x in the span of b, A b, A^2 b, ... `precondition`: about the inverse of A, symmetric and positive, which saves
    steps. b has any shape. Returns x and the relative residual that is left.

    Raises:
        BadInput: A is not positive definite along a direction that was met.
    """
    x, residual = torch.zeros_like(b), b.clone()
    ready = residual if precondition is None else precondition(residual)
    direction, size = ready.clone(), float((residual * ready).sum())
    start = float(b.norm())
    for _ in range(steps):
        if float(residual.norm()) <= tolerance * start or not size:
            break
        moved = product(direction)
        bend = float((direction * moved).sum())
        if not bend > 0:
            raise BadInput("the curvature is not positive along a direction; raise the damping, or use gauss-newton")
        x += size / bend * direction
        residual -= size / bend * moved
        ready = residual if precondition is None else precondition(residual)
        before, size = size, float((residual * ready).sum())
        direction = ready + size / before * direction
    return x, float(residual.norm()) / start if start else 0.0


def example_gradients(
    model: nn.Module,
    problem: Problem,
    batches: Iterable[Batch],
    params: Mapping[str, Tensor],
    classes: Tensor | None = None,
) -> Iterator[Tensor]:
    """The gradient of each example's loss (P,), one at a time, by a forward and a backward of its own."""
    values = list(params.values())
    for batch in batches:
        for row in range(len(batch["id"])):
            one = {name: column[row : row + 1] for name, column in batch.items()}
            with evaluating(model), torch.enable_grad():
                loss = problem.losses(problem.forward(model, one), one, classes).sum()
                found = torch.autograd.grad(loss, values, allow_unused=True)
            yield _joined(found, values)


def woodfisher(gradients: Iterable[Tensor], v: Tensor, count: float = 1000.0) -> Tensor:
    """The recursion of the released Unlearn-Sparse code, in place of ``H^{-1} v``.

        first:  o = g, k = v        then:  s = o.g,  k <- k - (k.g) / (count + s) o,  o <- o - s / (count + s) o

    A heuristic: o never leaves the line of the first gradient, so the result is v plus a multiple of that one gradient. In the
    textbook form (`sherman_morrison`) o is made anew from every gradient.
    """
    k, o = v.clone(), torch.empty(0)
    for g in gradients:
        if not len(o):
            o = g.clone()
            continue
        s = o @ g
        k -= (k @ g) / (count + s) * o
        o -= s / (count + s) * o
    return k


def sherman_morrison(gradients: Iterable[Tensor], v: Tensor, count: int, damping: float) -> Tensor:
    """``(damping I + 1/count sum_k g_k g_k')^{-1} v``, exactly, one rank at a time.

        o_k = H_{k-1}^{-1} g_k        H_k^{-1} v = H_{k-1}^{-1} v - (o_k . v) / (count + g_k . o_k) o_k        H_0 = damping I

    All o are kept: as many vectors as there are gradients, and the square of that in products.

    Raises:
        BadInput: the damping is not above 0.
    """
    if not damping > 0:
        raise BadInput("the Fisher matrix of so few gradients has no inverse; give a damping above 0")
    rows, scales = list[Tensor](), list[Tensor]()

    def solved(b: Tensor) -> Tensor:
        x = b / damping
        for o, scale in zip(rows, scales, strict=True):
            x -= (o @ b) / scale * o
        return x

    for g in gradients:
        o = solved(g)
        scales.append(count + g @ o)
        rows.append(o)
    return solved(v)
