"""Addressed random numbers: every draw has an address, so adding a part never changes another part's draws."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *address: str | int) -> int:
    """A 63-bit seed for `address` under `seed`; equal on every machine and in every process."""
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *address: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by its address."""
    return torch.Generator(device=device).manual_seed(seed_of(seed, *address))
