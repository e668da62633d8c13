"""How much of which data: scaling an ability's data alone and in a mixture, and where the two are in each other's way.

Dong et al. 2024, "How Abilities in Large Language Models are Affected by Supervised Fine-tuning Data Composition", ACL, arXiv 2310.05492.

    conflict_f = score(mixture at f) - score(single at f)
    k = (special rows used / special rows there are) / (general rows used / general rows there are)

A conflict above 0 says that the other data helps (it does where there is little), below 0 that it is in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.data import Examples, cat

#: The paper's fractions.
FRACTIONS = (1.0, 1 / 4, 1 / 16, 1 / 64, 1 / 256)

Score = Callable[[Examples, str], float]


def fraction(examples: Examples, share: float, seed: int = 0) -> Examples:
    """``round(share n)`` of the rows, at least one, in their own order; with equal seeds a smaller share lies within a larger one.

    Raises:
        BadInput: no rows, or a share that is not in (0, 1].
    """
    if not 0 < share <= 1 or not len(examples):
        raise BadInput(f"share={share} must lie in (0, 1], of at least one row (there are {len(examples)})")
    count = max(1, round(share * len(examples)))
    order = torch.randperm(len(examples), generator=generator(seed, "fraction", len(examples)))
    return examples.select(order[:count].sort().values)


def mixture(sets: Mapping[str, Examples], share: float, seed: int = 0) -> Examples:
    """`fraction` of each set, joined: the proportions stay as they are."""
    return cat([fraction(examples, share, seed) for examples in sets.values()])


def scaling(
    sets: Mapping[str, Examples], score: Score, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """The scaling experiment: ``{"single" | "mixture" | "conflict": {set: a figure for each fraction}}``.

    Args:
        sets: the data of each ability.
        score: ``score(data, name)`` trains a fresh model on `data` and gives the figure of the ability `name`. It is called once for each
            ability alone and, on the mixture, once for each ability: remember the model of a mixture by ``data.fingerprint()``.
    """
    alone: dict[str, list[float]] = {name: [] for name in sets}
    mixed: dict[str, list[float]] = {name: [] for name in sets}
    for share in fractions:
        joined = mixture(sets, share, seed)
        for name, examples in sets.items():
            alone[name].append(score(fraction(examples, share, seed), name))
            mixed[name].append(score(joined, name))
    conflict = {name: conflict_index(mixed[name], alone[name]) for name in sets}
    return {"single": alone, "mixture": mixed, "conflict": conflict}


def conflict_index(mixture: Sequence[float], single: Sequence[float]) -> list[float]:
    """score(mixture) - score(single) at each fraction, both higher-is-better.

    Raises:
        BadInput: of unequal length.
    """
    if len(mixture) != len(single):
        raise BadInput(
            f"{len(mixture)} figures of the mixture and {len(single)} of the single set; give one of each per fraction"
        )
    return [both - one for both, one in zip(mixture, single, strict=True)]


def crossing(fractions: Sequence[float], conflict: Sequence[float]) -> float | None:
    """The fraction at which the conflict crosses 0, on a logarithmic scale between its neighbours; None where it does not.

    Of several crossings the one at the least fraction.
    """
    points = sorted(zip(fractions, conflict, strict=True))
    for (f, here), (g, there) in pairwise(points):
        if here > 0 >= there or here < 0 <= there:
            return float(f * (g / f) ** (here / (here - there)))
    return None


def ratio(special_used: int, special: int, general_used: int, general: int) -> float:
    """The paper's k: the used share of the special data over the used share of the general data.

    Raises:
        BadInput: a set without rows, or no general data used.
    """
    if special <= 0 or general <= 0 or general_used <= 0 or special_used < 0:
        raise BadInput("both sets need rows, and some general ones must be used")
    return (special_used / special) / (general_used / general)
