"""How well learned examples can be told from held-out ones by the model's answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import CausalLM, Regression
from remanence.core.rng import generator
from remanence.data import Examples, cat
from remanence.measure.attacks import ATTACKS, auc, audit, match_nonmembers, tpr_at_fpr
from remanence.train.roles import Metric
from remanence.train.update import Context


@dataclass
class Membership(Metric):
    """AUC of a membership attack on all tasks seen: their training examples against their test examples of the same
    class and task.

        AUC = P(score of a member > score of a non-member), ties counting half; .5 is chance

    ``membership`` with its 95 % interval ``membership/low`` and ``/high``, and ``membership/tpr@<fpr>`` where there
    are non-members enough for it. A training example forgotten on request (``c.forgotten``) is no member here; its
    receipt measures it. Attacks and sources: `measure.attacks`. A regression is attacked by its squared error,
    whatever `attack` says.

    Pick it to see what the model gives away about single examples before anyone asks to be forgotten. Needs: a test set per
    task, labels or targets. Reference: Song & Mittal 2021, arXiv 2003.10595.
    """

    attack: str = knob("loss-threshold", "which attack", choices=ATTACKS)
    subset: int = knob(2000, "members taken at most, drawn once and for all", low=2)
    fpr: float = knob(0.01, "false-positive rate at which the share of members found is told", low=1e-6, high=0.5)

    def value(self, c: Context) -> dict[str, float]:
        gone = c.forgotten
        tasks = [task for task in c.tasks if len(task.test)]
        trains = [task.train.without(gone) for task in tasks]
        if not any(len(train) for train in trains):
            return {}
        if isinstance(c.problem, CausalLM):
            return self._text(c, [train for train in trains if len(train)], [task.strangers for task in tasks])
        members, at = _joined(c, trains, [task.id for task in tasks])
        pool, pool_at = _joined(c, [task.test for task in tasks], [task.id for task in tasks])
        regression = isinstance(c.problem, Regression)
        group, pool_group = (at, pool_at) if regression else (members["y"], pool["y"])
        rng = generator(0, "membership")
        try:
            match = match_nonmembers(group, pool_group, rng, at, pool_at)
        except BadInput:  # no test example of any class that is left
            return {}
        inside, outside = torch.from_numpy(match.members), torch.from_numpy(match.nonmembers)
        inside = inside[torch.randperm(len(inside), generator=rng)[: self.subset]].sort().values
        attack = "squared-error" if regression else self.attack
        if attack == "logistic" and min(len(inside), len(outside)) < 2:
            return {}
        member, other = members.select(inside), pool.select(outside)
        inside, outside = (
            c.outputs(each)[:, : c.columns] if c.columns else c.outputs(each) for each in (member, other)
        )
        found = audit(inside, member["y"], outside, other["y"], [attack], [self.fpr])[attack]
        return {"membership" if name == "auc" else f"membership/{name}": value for name, value in found.items()}

    def _text(self, c: Context, trains: list[Examples], strangers: list[Examples | None]) -> dict[str, float]:
        """By each row's own loss, against rows that nobody learned."""
        others = {id(part): part for part in strangers if part is not None and len(part)}
        if not others:
            return {}
        members = cat(trains)
        some = torch.randperm(len(members), generator=generator(0, "membership"))[: self.subset].sort().values
        inside, outside = (
            (-c.scores(part)["loss"]).double().cpu().numpy()
            for part in (members.select(some), cat(list(others.values())))
        )
        rate = tpr_at_fpr(inside, outside, self.fpr)
        return {
            "membership": auc(inside, outside).value,
            **({} if rate is None else {f"membership/tpr@{self.fpr}": rate}),
        }


def _joined(c: Context, parts: list[Examples], tasks: list[int]) -> tuple[Examples, torch.Tensor]:
    """All rows with a label that the head knows, labels as head columns, and the task of each row."""
    both = cat([Examples({name: part.columns[name] for name in ("x", "y")}, "seen", part.id) for part in parts])
    at = torch.repeat_interleave(torch.tensor(tasks), torch.tensor([len(part) for part in parts]))
    ready = c.mapped(both)
    if ready["y"].is_floating_point():
        return ready, at
    known = torch.nonzero(ready["y"] >= 0).flatten()
    return ready.select(known), at[known]
