"""Where things are in any model: its head, its weighted modules, its parameters by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from remanence.core.errors import BadInput, UnknownName, nearest

HEAD_NAMES = ("head", "fc", "classifier", "lm_head")


def head_name(model: nn.Module) -> str:
    """The dotted name of the output layer: an attribute called head, fc, classifier or lm_head, else the last linear layer.

    Raises:
        BadInput: the model has no linear layer at all.
    """
    for name in HEAD_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            found = getattr(model, name)
            inner: list[str] = [path for path, module in found.named_modules() if isinstance(module, nn.Linear)]
            return name if isinstance(found, nn.Linear) or not inner else f"{name}.{inner[-1]}"
    linear: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise BadInput(f"{type(model).__name__} has no linear layer to be its head; give it a `head` attribute")
    return linear[-1]


def head(model: nn.Module) -> nn.Module:
    """The output layer."""
    return model.get_submodule(head_name(model))


def features(model: nn.Module, x: Tensor) -> Tensor:
    """The head's input for `x` (B, ...), flattened to (B, D)."""
    taken: list[Tensor] = []
    hook = head(model).register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    try:
        model(x)
    finally:
        hook.remove()
    return taken[-1].flatten(1)


def weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that own parameters themselves, by dotted name, in order of definition."""
    return {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Normalisation layers with parameters or running statistics, by dotted name."""
    return {name: module for name, module in model.named_modules() if _norm(module)}


def _norm(module: nn.Module) -> bool:
    """Whether it normalises; other libraries' layers are known by the name of their class, such as ``LlamaRMSNorm``."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, kinds) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` at the dotted `name`; returns the model, or `new` where the name is empty.

    Raises:
        UnknownName: the model has no such module.
    """
    if not name:
        return new
    names = dict(model.named_modules())
    if name not in names:
        raise UnknownName(f"the model has no module {name!r}{nearest(name, names)}")
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return model


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A copy of `model` whose weights are drawn anew by every module's own ``reset_parameters``, running statistics included; the
    scales of normalisations without one become 1. The global generators stay as they are.

    Raises:
        BadInput: a module owns parameters and has no ``reset_parameters``; names it.
    """
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in made.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif _norm(module):
                for at, p in module.named_parameters(recurse=False):
                    nn.init.constant_(p, float(at == "weight"))
            elif next(module.parameters(recurse=False), None) is not None:
                raise BadInput(
                    f"{name or type(module).__name__} owns parameters and has no reset_parameters, so it cannot be drawn anew; add one"
                )
    for p in made.parameters():
        p.grad = None
    return made


def twice_differentiable() -> AbstractContextManager[None]:
    """In it attention is computed by operations whose derivatives can be derived again; fused kernels know only the first."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The whole model in eval mode and without gradients; every module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def lone_rows(model: nn.Module) -> Iterator[None]:
    """Let one row alone through batch norm in train mode: it has no statistics of its own, so the running ones serve."""
    held = set[int]()

    def before(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if norm.training and inputs[0].numel() == inputs[0].shape[1]:
            held.add(id(norm))
            norm.eval()

    def after(norm: nn.Module, *_: Any) -> None:
        if id(norm) in held:
            held.discard(id(norm))
            norm.train()

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(before) for norm in norms]
    handles += [norm.register_forward_hook(after, always_call=True) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Every buffer (running statistics, counters) is put back at the end, in place, bit for bit."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def tensor_bytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Bytes of all tensors, shared storage counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        sizes[tensor.data_ptr() or id(tensor)] = max(
            sizes.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size()
        )
    return sum(sizes.values())


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return tensor_bytes([*module.parameters(), *module.buffers()])
