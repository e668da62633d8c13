"""What equal bits depend on beside plan and data, and the device that a life runs on."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

from remanence.core.errors import BadInput


def versions() -> dict[str, Any]:
    """What equal bits depend on beside plan and data."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    for package in ("remanence", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def check_device(device: torch.device) -> None:
    """
    Raises:
        BadInput: torch has no such device here.
    """
    known: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    there = known.get(device.type)
    if there is not None and not there():
        raise BadInput(f"device={str(device)!r}: torch finds no such device here; use 'cpu', or a torch built for it")
