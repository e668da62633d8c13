"""The living state of a life: the network with its structures, the learner, the keepers, the head's labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import Corrupt
from remanence.core.problem import Problem
from remanence.nn.anatomy import module_bytes
from remanence.train.resolve import named, resolve
from remanence.train.roles import Keeper, Learner, Method, Metric
from remanence.train.update import Context, Update


@dataclass
class State:
    """What learn and forget change and a snapshot saves. `labels`: of the head's columns; `met`: those that occurred so far."""

    model: nn.Module
    learner: Learner
    keepers: list[Keeper] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    met: list[int] = field(default_factory=list)
    structures: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)

    def holders(self) -> dict[str, Method]:
        """Learner and keepers by name."""
        return {f"learn/{self.learner.slug}": self.learner, **named(self.keepers, "keep")}

    def context(self, problem: Problem, tasks: Sequence[Any] = (), device: torch.device | str = "cpu") -> Context:
        return Context(self.model, problem, self.learner, self.labels, tasks, device)

    def grow(self, u: Update, parts: Sequence[Any]) -> None:
        """Ask the parts what the network gains now, build it, and write it down."""
        for part in parts:
            if hasattr(part, "structure"):
                gained = part.structure(u)
                if gained:
                    self.model = u.model = part.attach(self.model, gained).to(u.device)
                    self.structures.append({"verb": part.verb, "part": part.spec(), "structure": gained})

    def pack(self) -> dict[str, Any]:
        """Nested dicts of tensors and JSON values."""
        return {
            "weights": {name: value.detach() for name, value in self.model.state_dict().items()},
            "holders": {name: method.state_dict() for name, method in self.holders().items()},
            "metrics": {name: metric.state_dict() for name, metric in named(self.metrics, "measure").items()},
            "labels": list(self.labels),
            "met": list(self.met),
            "structures": copy.deepcopy(self.structures),
            "steps": self.steps,
            "optimizer": self.optimizer,
        }

    def load(self, packed: Mapping[str, Any], blank: nn.Module) -> None:
        """Become the packed state; `blank` is a copy of the life's initial network, used up.

        Raises:
            Corrupt: names, shapes or dtypes differ from the network's.
        """
        model = blank
        for entry in packed["structures"]:
            part: Any = resolve(entry["verb"], entry["part"], Method)
            model = part.attach(model, entry["structure"])
        load_weights(model, packed["weights"])
        device = next(iter(self.model.parameters()), torch.empty(0)).device
        self.model = model.to(device)
        self.labels, self.met, self.steps = list(packed["labels"]), list(packed["met"]), int(packed["steps"])
        self.structures, self.optimizer = list(packed["structures"]), dict(packed["optimizer"])
        for saved, methods in (("holders", self.holders()), ("metrics", named(self.metrics, "measure"))):
            for name, method in methods.items():
                if name not in packed[saved]:
                    raise Corrupt(f"the snapshot has no state of {name}")
                method.load_state_dict(packed[saved][name])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights after checking every name, shape and dtype.

    Raises:
        Corrupt: anything differs; names the first difference.
    """
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(weights)) or [
        name for name, value in own.items() if value.shape != weights[name].shape or value.dtype != weights[name].dtype
    ]
    if wrong:
        raise Corrupt(
            f"the saved weights do not fit the network ({len(wrong)} differences, the first is {wrong[0]!r}); is it the same model?"
        )
    model.load_state_dict(dict(weights))


def state_bytes(state: State) -> dict[str, int]:
    """Bytes of each in-life holder."""
    return {
        "weights": module_bytes(state.model),
        **{name: method.bytes() for name, method in state.holders().items() if method.bytes()},
    }
