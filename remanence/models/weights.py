"""Weights in a file: a network trained once, on other data, is where many lives begin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from remanence.core.errors import BadInput, Corrupt
from remanence.nn.anatomy import head_name


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the parameters and buffers of `model` to a ``.safetensors`` file, which the knob `weights` of every model reads."""
    save_file({name: value.detach().cpu().clone() for name, value in model.state_dict().items()}, path)


def fill(model: nn.Module, path: str | Path, heads: Sequence[str] | None = None) -> nn.Module:
    """Put the weights of a ``.safetensors`` file into `model`: every name and shape of the one must be that of the other, but for the
    modules `heads` (None: the model's head), which keep their own values where the file has none of that shape. Of a model on the
    meta device, as a plan is checked, only the names are compared: the inputs' shape is not known yet.

    Raises:
        BadInput: no such file; other names or shapes; NaN or infinite values. The model is as it was.
        Corrupt: a file that is truncated or no ``.safetensors`` file.
    """
    path, wanted = Path(path), model.state_dict()
    free = tuple(f"{name}." for name in ([head_name(model)] if heads is None else heads))
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give a .safetensors file, such as save_weights makes")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no dict
            meta = any(value.is_meta for value in wanted.values())
            fitting = [n for n, value in wanted.items() if n in shapes and (meta or shapes[n] == tuple(value.shape))]
            for name in sorted((wanted.keys() | shapes.keys()) - set(fitting)):
                if not name.startswith(free):
                    have = f"has the shape {shapes[name]} there" if name in shapes else "is missing there"
                    want = f"the shape {tuple(wanted[name].shape)}" if name in wanted else "none of that name"
                    raise BadInput(
                        f"{path.name} has the weights of another network: {name} {have}, and this network has {want}"
                    )
            if meta:
                return model
            found = {name: file.get_tensor(name) for name in fitting}
    except SafetensorError as error:
        raise Corrupt(f"{path} cannot be read as a .safetensors file ({error}); fetch it again") from None
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise BadInput(f"the weights in {path.name} have NaN or infinite values in {name}")
    with torch.no_grad():
        for name, value in found.items():
            wanted[name].copy_(value)
    return model
