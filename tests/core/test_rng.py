"""Addressed random numbers."""

from __future__ import annotations

import subprocess
import sys

import torch

from remanence.core.rng import generator, seed_of


def test_an_address_has_one_seed_everywhere() -> None:
    assert (
        seed_of(0, "learn/0", "", "order", 0) == 3029562282545433225
    )  # pinned: another value would end every old life
    code = "from remanence.core.rng import seed_of; print(seed_of(7, 'learn/0', 'order', 3), seed_of(-1))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == [str(seed_of(7, "learn/0", "order", 3)), str(seed_of(-1))]


def test_addresses_do_not_run_into_one_another() -> None:
    addresses = [
        (),
        ("a",),
        ("a", "b"),
        ("ab",),
        ("b", "a"),
        ("a", ""),
        ("", "a"),
        ("1",),
        (1,),
        (1, 2),
        (12,),
        ("1", 2),
    ]
    seeds = {seed_of(seed, *address) for seed in (0, 1, -1) for address in addresses}
    assert len(seeds) == 3 * len(addresses) and all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_fresh_and_leave_torch_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (torch.rand(5, generator=generator(0, name)) for name in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
