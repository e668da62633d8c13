"""Which modules are specific to a task: their change across tasks against their change inside one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from remanence.core.errors import BadInput


def sensitivity(weights: Sequence[Sequence[Mapping[str, Tensor]]]) -> dict[str, float]:
    """How much more a module changes across tasks than inside one: S_m = C_m / D_m, the largest first.

        D_m = mean over tasks t and epochs n of |theta_m^{t,n+1} - theta_m^{t,n}|_1 / size of theta_m
        C_m = the same of theta_m^{t+1,n} - theta_m^{t,n}

    Args:
        weights: per task, per epoch, {parameter: value}: at least two tasks and two epochs, the same epochs in each. Of a
            head that grows, the rows that both sides have are compared.

    Returns:
        {module: S_m}; infinite where a module changes across tasks only, 0 where it never changes.
    """
    if len(weights) < 2 or len({len(task) for task in weights}) > 1 or len(weights[0]) < 2:
        raise BadInput(
            "sensitivity needs the weights of at least two tasks and of at least two epochs, as many in each"
        )
    inside = [_change(old, new) for task in weights for old, new in pairwise(task)]
    across = [_change(old, new) for before, task in pairwise(weights) for old, new in zip(before, task, strict=True)]
    d, c = ({m: sum(x[m] for x in found) / len(found) for m in found[0]} for found in (inside, across))
    scores = {m: c[m] / d[m] if d[m] else math.inf if c[m] else 0.0 for m in d}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def _change(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean absolute change of each module's entries."""
    total: dict[str, list[float]] = {}
    for name, value in old.items():
        moved = new[name][tuple(slice(0, n) for n in value.shape)] - value
        entry = total.setdefault(name.rpartition(".")[0], [0.0, 0.0])
        entry[0] += float(moved.abs().sum())
        entry[1] += moved.numel()
    return {module: moved / max(1.0, size) for module, (moved, size) in total.items()}
