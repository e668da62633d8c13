"""Diagonal Fisher information and its shortcuts: how much each weight matters to a set of examples.

* :func:`diagonal_fisher`: the mean over EXAMPLES of the squared per-example gradient of ``log p(y | x)``; does not
  depend on the batch size.
* :func:`batch_fisher`: the mean over BATCHES of the squared gradient of the batch's mean loss (the shortcut of the
  released SSD code); depends on the batch size.
* :func:`absolute_gradient`: label-free, the mean over batches of ``| d mean_i ||f(x_i)||^2 / d theta |`` (LFSSD).
* :func:`absolute_sensitivity`: the same for each EXAMPLE by itself (MAS); does not depend on the batch size.

An example of text is a row, ``log p`` the mean over its targets, and f its logits at all of them.

All run the model in eval mode and put every train/eval flag back; they draw no random number and write no buffer or
``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from remanence.core.errors import BadInput
from remanence.core.problem import CausalLM, Out, Problem, output_layer, targets
from remanence.nn.anatomy import evaluating

#: Per-example gradients held at one time, in bytes; larger sets of rows are worked off in chunks.
CHUNK_BYTES = 128 * 2**20

Batch = Mapping[str, Any]
#: From logits (B, C) the directions in output space that are pulled back into the weights, one after the other.
Factors = Callable[[Tensor], Iterable[Tensor]]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


def diagonal_fisher(
    model: nn.Module,
    problem: Problem,
    batches: Iterable[Batch],
    params: Mapping[str, Tensor],
    kind: str = "empirical",
    classes: Tensor | None = None,
    weight_by: str = "example",
    engine: str = "auto",
) -> dict[str, Tensor]:
    """``F_j = 1/n sum_i sum_y w(y) (d log p(y | x_i) / d theta_j)^2`` over the n examples of all batches.

    kind ``empirical``: y is the example's own label. ``exact``: the expectation over the model's predictive
    distribution, summed, not sampled; labels are not read.
    For softmax it runs over the competing columns, for sigmoid over all 2^K outcomes in closed form, for regression
    over the unit Gaussian. Both kinds take ``problem.losses`` as -log p, so ``exact`` is the expectation of
    ``empirical`` under the model's own labels; it costs one backward per competing column, and is not there for text.
    params: {name in model.named_parameters(): parameter}, frozen or not. classes: head columns that compete (K,) or
    None.
    weight_by: ``example`` (each counts one) or ``weight`` (mean weighted by the batch column ``weight``).
    engine: ``hooks`` (one backward per batch, for Linear, Conv2d and norm layers that are called once on (B, ...); of a
    language model also for embeddings and RMS norms), ``vmap`` (torch.func, any model, no text), ``rows``
    (one backward per example, anything), or ``auto``: hooks where they apply, which is checked on the first example
    against autograd, else vmap, or rows for text.
    Returns {name: tensor of the parameter's shape}, at least float32; sums are kept in float64. Raises BadInput, also
    when there is no example.
    """
    if kind not in ("empirical", "exact"):
        raise BadInput(f"kind must be 'empirical' or 'exact', got {kind!r}")
    if weight_by not in ("example", "weight"):
        raise BadInput(f"weight_by must be 'example' or 'weight', got {weight_by!r}")
    if kind == "exact" and isinstance(problem, CausalLM):
        raise BadInput("the exact Fisher needs a backward for every token of the vocabulary; use kind='empirical'")

    def factors(batch: Batch) -> Factors:
        weight = batch["weight"].detach() if weight_by == "weight" else None
        return partial(_factors, problem, batch, kind, classes, weight)

    def mass(batch: Batch, rows: int) -> float:
        return rows if weight_by == "example" else float(batch["weight"].sum())

    return _per_example(model, problem, batches, params, engine, factors, torch.square, mass)


def batch_fisher(
    model: nn.Module,
    problem: Problem,
    batches: Iterable[Batch],
    params: Mapping[str, Tensor],
    classes: Tensor | None = None,
) -> dict[str, Tensor]:
    """``1/B sum_b (d mean_i loss_i / d theta_j)^2`` over the B batches, a ragged last one counting like the others.

    Unlike :func:`diagonal_fisher` it holds the cross terms between the examples of a batch: keep the batch size equal
    between two passes that are compared.
    Returns {name: tensor of the parameter's shape}. Raises BadInput when there is no batch.
    """
    total, count = _zeros(params), 0
    with evaluating(model), _requiring(params), torch.enable_grad():
        for batch in batches:
            loss = problem.losses(problem.forward(model, dict(batch)), dict(batch), classes).mean()
            for name, gradient in zip(
                params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True
            ):
                if gradient is not None:
                    total[name] += gradient.square()
            count += 1
    return _mean(total, params, count)


def absolute_gradient(
    model: nn.Module,
    problem: Problem,
    batches: Iterable[Batch],
    params: Mapping[str, Tensor],
    classes: Tensor | None = None,
) -> dict[str, Tensor]:
    """``1/B sum_b | d mean_i ||f(x_i)||_2^2 / d theta_j |``, f the logits (of the columns ``classes``, if given). Reads
    no label.

    Returns {name: tensor of the parameter's shape}. Raises BadInput when there is no batch.
    """
    total, count = _zeros(params), 0
    with evaluating(model), _requiring(params), torch.enable_grad():
        for batch in batches:
            logits = problem.forward(model, dict(batch)).logits
            logits = logits if classes is None else logits[:, classes]
            norm = logits.flatten(1).square().sum(dim=1).mean()
            for name, gradient in zip(
                params, torch.autograd.grad(norm, list(params.values()), allow_unused=True), strict=True
            ):
                if gradient is not None:
                    total[name] += gradient.abs()
            count += 1
    return _mean(total, params, count)


def absolute_sensitivity(
    model: nn.Module,
    problem: Problem,
    batches: Iterable[Batch],
    params: Mapping[str, Tensor],
    classes: Tensor | None = None,
    engine: str = "auto",
) -> dict[str, Tensor]:
    """``1/n sum_i | d ||f(x_i)||_2^2 / d theta_j |`` over the n EXAMPLES of all batches, however they are cut: what
    :func:`absolute_gradient` is on batches of one.

    params, classes, engine: as in :func:`diagonal_fisher`. Reads no label. Returns {name: tensor of the parameter's
    shape}. Raises BadInput when there is no example.
    """

    def factors(batch: Batch) -> Factors:
        def of(logits: Tensor) -> Iterator[Tensor]:
            logits = logits.detach()
            v = torch.zeros_like(logits)
            columns = slice(None) if classes is None else classes
            v[:, columns] = 2 * logits[:, columns]
            yield v

        return of

    return _per_example(model, problem, batches, params, engine, factors, torch.abs, lambda batch, rows: rows)


def _per_example(
    model: nn.Module,
    problem: Problem,
    batches: Iterable[Batch],
    params: Mapping[str, Tensor],
    engine: str,
    factors: Callable[[Batch], Factors],
    raised: Callable[[Tensor], Tensor],
    mass: Callable[[Batch, int], float],
) -> dict[str, Tensor]:
    """``sum_i sum_v raised(J_i' v_i) / mass``: raised is the square or the absolute value, both of which turn the product
    of two factors into the product of what they become."""
    if engine not in ("auto", "hooks", "vmap", "rows"):
        raise BadInput(f"engine must be 'auto', 'hooks', 'vmap' or 'rows', got {engine!r}")
    total, count, checked = _zeros(params), 0.0, False
    text = isinstance(problem, CausalLM)
    if isinstance(problem, CausalLM):
        problem = replace(problem, packing=False)  # rows that share one row of the forward cannot be told apart
    other = "rows" if text else "vmap"
    owners = _owners(model, params, text) if engine in ("auto", "hooks") else None
    if engine == "hooks" and owners is None:
        raise BadInput(
            f"the parameters are not all owned by one Linear, Conv2d or norm layer each; use engine='{other}'"
        )
    with evaluating(model), _requiring(params):
        for batch in batches:
            rows = _rows(batch)
            if not rows:
                continue
            if text and not bool((batch["labels"][:, 1:] != -100).any()):
                count += mass(batch, rows)  # rows without a target, whose gradient is 0
                continue
            if owners is not None and not checked:
                at = int(targets(dict(batch))[0][0]) if text else 0  # a row without a target would show nothing
                first = _row(batch, at, rows)
                sound = _hooks_agree(model, problem, first, params, owners)
                if engine == "hooks" and not sound:
                    raise BadInput(
                        "the layers are not called once each on (B, ...) inputs, or their weights are used elsewhere "
                        f"too; use engine='{other}'"
                    )
                owners, checked = (owners if sound else None), True
            found = (
                None
                if owners is None
                else _by_hooks(model, problem, batch, rows, params, owners, factors(batch), raised)
            )
            if found is None and (engine == "rows" or text):
                found = _by_rows(model, problem, batch, rows, params, factors, raised)
            elif found is None:
                found = _by_vmap(model, problem, batch, rows, params, factors(batch), raised)
            for name, value in found.items():
                total[name] += value
            count += mass(batch, rows)
    return _mean(total, params, count)


# -- what is differentiated --------------------------------------------------------------------------------------------


def _factors(
    problem: Problem, batch: Batch, kind: str, classes: Tensor | None, weight: Tensor | None, logits: Tensor
) -> Iterator[Tensor]:
    """Directions v (B, C), of text (M, V), in output space whose squared pull-backs ``(J_i' v_i)^2`` sum to the Fisher of example i.

    empirical: the gradient of the loss. softmax: sqrt(p_c) (p - e_c) per column c. sigmoid: independent zero-mean
    errors, sqrt(p_k (1 - p_k)) e_k (over K, as the loss is a mean over columns). Regression: e_k.
    """
    logits = logits.detach()
    if weight is not None and isinstance(problem, CausalLM):
        weight = weight[targets(dict(batch))[0]]
    scale = 1.0 if weight is None else weight.to(logits.dtype).sqrt().reshape(-1, *[1] * (logits.dim() - 1))
    if kind == "empirical":
        with torch.enable_grad():
            z = logits.clone().requires_grad_()
            (v,) = torch.autograd.grad(problem.losses(Out(z), dict(batch), classes).sum(), z)
        yield v * scale
        return
    if logits.dim() == 1:
        logits = logits.unsqueeze(1)
    if logits.dim() != 2:
        raise BadInput(f"the exact Fisher needs logits (B, C), got {tuple(logits.shape)}")
    link = getattr(problem, "link", None)
    columns = (
        torch.arange(logits.shape[1], device=logits.device)
        if classes is None or link is None
        else classes.to(logits.device)
    )
    if link == "softmax":
        p = torch.zeros_like(logits)
        p[:, columns] = logits[:, columns].softmax(dim=1)
        for column in columns.tolist():
            v = p.clone()
            v[:, column] -= 1.0
            yield v * p[:, column : column + 1].sqrt() * scale
        return
    if link == "sigmoid":
        p = logits.sigmoid()
        size = (p * (1 - p)).sqrt() / len(columns)
    elif link is None:
        size = torch.ones_like(logits)
    else:
        raise BadInput(f"no exact Fisher for link {link!r}; use kind='empirical'")
    for column in columns.tolist():
        v = torch.zeros_like(logits)
        v[:, column] = size[:, column]
        yield v * scale


# -- torch.func: any model ---------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """The model as a module from a batch to its logits, so that functional_call can swap its parameters."""

    def __init__(self, model: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.model, self.problem = model, problem

    def forward(self, batch: dict[str, Any]) -> Tensor:
        logits: Tensor = self.problem.forward(self.model, batch).logits
        return logits


def _by_vmap(
    model: nn.Module,
    problem: Problem,
    batch: Batch,
    rows: int,
    params: Mapping[str, Tensor],
    factors: Factors,
    raised: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    call = _Logits(model, problem)
    columns = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and v.shape[0] == rows}
    rest = {k: v for k, v in batch.items() if k not in columns}
    values = {f"model.{name}": param.detach() for name, param in params.items()}
    with torch.no_grad():
        logits = call(dict(batch))

    def pulled(values: dict[str, Tensor], example: dict[str, Tensor], v: Tensor) -> Tensor:
        one = {k: t.unsqueeze(0) for k, t in example.items()}
        logits: Tensor = functional_call(call, values, ({**rest, **one},))
        return (logits.reshape(v.shape) * v).sum()

    per_example = vmap(grad(pulled), in_dims=(None, 0, 0))
    chunk = max(1, CHUNK_BYTES // max(1, sum(p.numel() * p.element_size() for p in params.values())))
    total = _zeros(params)
    for v in factors(logits):
        for start in range(0, rows, chunk):
            cut = slice(start, start + chunk)
            found = per_example(values, {k: t[cut] for k, t in columns.items()}, v[cut])
            for name in params:
                total[name] += raised(found[f"model.{name}"]).sum(dim=0)
    return total


# -- rows: one backward per example ------------------------------------------------------------------------------------


def _by_rows(
    model: nn.Module,
    problem: Problem,
    batch: Batch,
    rows: int,
    params: Mapping[str, Tensor],
    factors: Callable[[Batch], Factors],
    raised: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    total = _zeros(params)
    for row in range(rows):
        one = problem.compact(_row(batch, row, rows))
        with torch.enable_grad():
            logits = problem.forward(model, one).logits
        if not logits.requires_grad:
            continue
        for v in factors(one)(logits):
            found = torch.autograd.grad(
                logits, list(params.values()), v.reshape(logits.shape), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(params, found, strict=True):
                if gradient is not None:
                    total[name] += raised(gradient)
    return total


# -- hooks: one backward per batch -------------------------------------------------------------------------------------

_Owner = tuple[
    nn.Module, str | None, str | None
]  # a layer, the names of its weight and of its bias among the parameters asked for


def _owners(model: nn.Module, params: Mapping[str, Tensor], text: bool) -> list[_Owner] | None:
    """The layers that own the parameters, or None if a layer has no rule, or shares one with another: of text, with more than that
    embeddings and head share their matrix."""
    names = {id(param): name for name, param in params.items()}
    homes: dict[str, list[nn.Module]] = {}
    owners: list[_Owner] = []
    for module in model.modules():
        asked = {kind: names[id(p)] for kind, p in module.named_parameters(recurse=False) if id(p) in names}
        if not asked:
            continue
        known = type(module) in (nn.Linear, nn.Conv2d, *_NORMS) or (text and (_embeds(module) or _rms(module)))
        if not known or not set(asked) <= {"weight", "bias"}:
            return None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return None  # batch statistics even in eval: the examples are not independent
        owners.append((module, asked.get("weight"), asked.get("bias")))
        for name in asked.values():
            homes.setdefault(name, []).append(module)
    for sharing in homes.values():
        if len(sharing) > 1 and not (text and [_embeds(module) for module in sharing] == [True, False]):
            return None
    return owners if len(homes) == len(params) else None


def _embeds(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.padding_idx is None and not module.scale_grad_by_freq


def _rms(module: nn.Module) -> bool:
    """RMS normalisation, torch's or that of a library, such as ``LlamaRMSNorm``."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")


def _by_hooks(
    model: nn.Module,
    problem: Problem,
    batch: Batch,
    rows: int,
    params: Mapping[str, Tensor],
    owners: Sequence[_Owner],
    factors: Factors,
    raised: Callable[[Tensor], Tensor],
) -> dict[str, Tensor] | None:
    """The batch's sum of per-example gradients, squared or absolute, from each layer's input and output gradient; None where a layer
    is not called once on (B, ...)."""
    inputs: dict[nn.Module, Tensor] = {}
    probes: dict[nn.Module, Tensor] = {}
    odd: list[nn.Module] = []
    places = _places(batch) if isinstance(problem, CausalLM) else None
    top = output_layer(model) if places is not None else None

    def fits(module: nn.Module, x: Any) -> bool:
        if not isinstance(x, Tensor) or module in probes:
            return False
        if places is None:
            return x.shape[:1] == (rows,) and x.dim() >= 2
        if module is top:  # which sees a row for each target
            return x.dim() == 2 and len(x) == len(places[0])
        return x.shape[:1] == (rows,) and x.dim() == (2 if type(module) is nn.Embedding else 3)

    def tap(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not args or not fits(module, args[0]):
            odd.append(module)
            return output
        # Adding a zero whose gradient is the output's: safe with in-place activations after the layer, and with frozen
        # weights.
        inputs[module] = _full(args[0].detach())
        probes[module] = torch.zeros_like(output, requires_grad=True)
        return output + probes[module]

    handles = [module.register_forward_hook(tap) for module, _, _ in owners]
    try:
        with torch.enable_grad():
            logits = problem.forward(model, dict(batch)).logits
    finally:
        for handle in handles:
            handle.remove()
    if odd or any(module not in probes for module, _, _ in owners):
        return None
    total: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        value = value.reshape(params[name].shape)
        total[name] = total[name].to(_wide(value)) + value if name in total else value  # one term needs no wide sum

    def by_row(module: nn.Module, values: Tensor) -> Tensor:
        """What the head saw, or its gradient, as (B, T, ...)."""
        if places is None or module is not top:
            return values
        row, turn = places
        spread = values.new_zeros(rows, int(turn.max()) + 1 if len(turn) else 1, *values.shape[1:])
        return spread.index_put((row, turn), values)

    taps = [probes[module] for module, _, _ in owners]
    embeddings = {name: module for module, name, _ in owners if type(module) is nn.Embedding}
    tied = {m: embeddings[name] for m, name, _ in owners if name in embeddings and m is not embeddings[name]}
    for v in factors(logits):
        grads = torch.autograd.grad(logits, taps, v.reshape(logits.shape), retain_graph=True, allow_unused=True)
        found = {module: None if g is None else _full(g) for (module, _, _), g in zip(owners, grads, strict=True)}
        with torch.no_grad():
            for module, weight_name, bias_name in owners:
                g = found[module]
                if g is None or module in tied.values():  # of a shared matrix the head sees to both
                    continue
                x, g = by_row(module, inputs[module]), by_row(module, g)
                if weight_name is not None:
                    shared = (inputs[tied[module]], found[tied[module]]) if module in tied else None
                    add(weight_name, _weight_sums(module, x, g, raised, shared))
                if bias_name is not None:
                    add(bias_name, raised(_per_channel(module, g)).sum(dim=0))
    return total


def _full(value: Tensor) -> Tensor:
    """In float32 at least: under autocast the layers of one network differ."""
    return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each target of a batch of text its row, and which target of the row it is."""
    row = targets(dict(batch))[0]
    return row, torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)


def _weight_sums(
    module: nn.Module,
    x: Tensor,
    g: Tensor,
    raised: Callable[[Tensor], Tensor],
    shared: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """``sum_i raised(d / d weight of example i)`` from the layer's input x (B, ...) and its output's gradient g (B,
    ...). shared: tokens (B, L) and gradient (B, L, D) of embeddings with the same weight."""
    if type(module) is nn.Embedding:
        size = module.num_embeddings
        cell, at = torch.unique(x + size * torch.arange(len(x), device=x.device)[:, None], return_inverse=True)
        # index_put adds up in the same order on every run, on GPUs too.
        sums = g.new_zeros(len(cell), g.shape[-1]).index_put((at.flatten(),), g.flatten(0, 1), accumulate=True)
        return g.new_zeros(size, g.shape[-1]).index_put((cell % size,), raised(sums), accumulate=True)
    if isinstance(module, nn.Linear):
        if x.dim() == 2:
            return raised(g).T @ raised(x)  # one product g_i x_i per example
        x, g = x.flatten(1, -2).transpose(1, 2), g.flatten(1, -2).transpose(1, 2)  # (B, F, T), (B, O, T)
        groups = 1
    elif isinstance(module, nn.Conv2d):
        x, g, groups = unfold(module, x), g.flatten(2), module.groups  # (B, C k k, L), (B, O, L)
    else:
        return raised(_per_channel(module, g * _normalised(module, x))).sum(dim=0)
    x = x.reshape(x.shape[0], groups, -1, x.shape[-1])
    g = g.reshape(g.shape[0], groups, -1, g.shape[-1])
    size = groups * g.shape[2] * x.shape[2]
    chunk = max(1, CHUNK_BYTES // (size * x.element_size()))
    total = x.new_zeros(groups, g.shape[2], x.shape[2])
    for start in range(0, x.shape[0], chunk):
        cut = slice(start, start + chunk)
        each = g[cut] @ x[cut].transpose(-1, -2)
        if shared is not None and shared[1] is not None:
            tokens, gradient = shared[0][cut], shared[1][cut]
            row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
            each[:, 0].index_put_((row, tokens), gradient, accumulate=True)
        total += raised(each).sum(dim=0)
    return total


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a norm layer after normalisation, before its affine map."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if _rms(module):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    assert (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
    )
    shape = (1, -1, *[1] * (x.dim() - 2))
    return (x - module.running_mean.reshape(shape)) * torch.rsqrt(module.running_var.reshape(shape) + module.eps)


def _per_channel(module: nn.Module, g: Tensor) -> Tensor:
    """g summed over everything but the row and the axes of the layer's bias: (B, size of the bias)."""
    if isinstance(module, nn.Linear):
        return g.reshape(g.shape[0], -1, g.shape[-1]).sum(dim=1)
    if _rms(module):
        return g.reshape(g.shape[0], -1, g.shape[-1]).sum(dim=1)
    if isinstance(module, nn.LayerNorm):
        size = 1
        for axis in module.normalized_shape:
            size *= axis
        return g.reshape(g.shape[0], -1, size).sum(dim=1)
    return g.reshape(g.shape[0], g.shape[1], -1).sum(dim=2)


def unfold(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches a convolution sees: (B, C, H, W) -> (B, C * kh * kw, L), in the order of its flattened weight; any
    padding mode, stride and dilation."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)


def _hooks_agree(
    model: nn.Module, problem: Problem, batch: Batch, params: Mapping[str, Tensor], owners: Sequence[_Owner]
) -> bool:
    """Whether, for one example, the hooks find the square of what autograd finds: they miss weights that are used
    outside their layer's own forward."""
    with torch.enable_grad():
        logits = problem.forward(model, dict(batch)).logits
    v = torch.linspace(1.0, 2.0, logits.numel(), dtype=logits.dtype, device=logits.device).reshape(logits.shape)
    truth = torch.autograd.grad(logits, list(params.values()), v, allow_unused=True)
    found = _by_hooks(model, problem, batch, 1, params, owners, lambda _: (v,), torch.square)
    if found is None:
        return False
    for name, gradient in zip(params, truth, strict=True):
        square = (
            torch.zeros_like(params[name])
            if gradient is None
            else gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
        )
        if not bool(((found.get(name, 0.0) - square).abs() <= 1e-3 * square + 1e-6 * square.max()).all()):
            return False
    return True


# -- small things ------------------------------------------------------------------------------------------------------


@contextmanager
def _requiring(params: Mapping[str, Tensor]) -> Iterator[None]:
    """Frozen parameters have a Fisher too."""
    frozen = [param for param in params.values() if not param.requires_grad]
    for param in frozen:
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in frozen:
            param.requires_grad_(False)


def _row(batch: Batch, row: int, rows: int) -> dict[str, Any]:
    """One of the `rows` of a batch."""
    return {
        k: v[row : row + 1] if isinstance(v, Tensor) and v.dim() and v.shape[0] == rows else v for k, v in batch.items()
    }


def _rows(batch: Batch) -> int:
    for key in ("id", "y", "x", *batch):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise BadInput("a batch without any column has no examples")


def _zeros(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float64 sums where the device has them."""
    return {n: torch.zeros(p.shape, dtype=_wide(p), device=p.device) for n, p in params.items()}


def _wide(value: Tensor) -> torch.dtype:
    return torch.float32 if value.device.type == "mps" else torch.float64


def _mean(total: dict[str, Tensor], params: Mapping[str, Tensor], count: float) -> dict[str, Tensor]:
    if not count > 0:
        raise BadInput("no example to compute the Fisher from")
    return {
        n: t.div_(count).to(params[n].dtype if params[n].dtype.itemsize >= 4 else torch.float32)
        for n, t in total.items()
    }
