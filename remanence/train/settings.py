"""How a run trains: epochs, batches, optimizer, rate."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.knobs import check_knobs, knob
from remanence.train.forward import PRECISIONS
from remanence.train.schedules import schedule_of

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


#: What was tried already and can be built.
_USABLE: set[str] = set()


@dataclass(frozen=True)
class Settings:
    """The training knobs of one run, checked when made."""

    epochs: int = knob(1, "passes over the data", low=0)
    batch_size: int = knob(64, "examples per batch", low=1)
    optimizer: str | Mapping[str, Any] = knob("adamw", "sgd, adam, adamw or {name: its arguments}")
    lr: float = knob(1e-3, "base learning rate", low=0)
    schedule: Any = knob("constant", "constant, cosine, linear or {name: knobs}")
    clip: float | None = knob(None, "largest norm of the whole gradient", low=0)
    accumulate: int = knob(1, "batches per optimizer step", low=1)
    precision: str = knob("float32", "of the forward; weights stay in float32", choices=tuple(PRECISIONS))
    compile: bool = knob(False, "whether torch compiles the forward: slow to begin, for large networks")
    patience: int | None = knob(
        None, "epochs without a lower validation loss after which training stops; null: never", low=1
    )
    validation: float = knob(
        0.1, "share of the task's rows that `patience` looks at, and that are not trained on", low=0, high=1
    )
    checkpointing: bool = knob(False, "whether the backward recomputes activations: less memory, more time")

    def __post_init__(self) -> None:
        check_knobs(self)
        said = repr((self.optimizer, self.lr, self.schedule))
        if said not in _USABLE:  # trying an optimizer takes a quarter of a millisecond, and every event has settings
            schedule_of(self.schedule)
            self.build([torch.nn.Parameter(torch.zeros(1))])
            _USABLE.add(said)

    def build(self, params: Any, lr: float | None = None, optimizer: Any = None) -> torch.optim.Optimizer:
        """The optimizer over `params`.

        Raises:
            UnknownName: no such optimizer, or no such argument of it.
        """
        value = optimizer or self.optimizer
        name, given = next(iter(value.items())) if isinstance(value, Mapping) else (value, {})
        if name not in OPTIMIZERS:
            raise UnknownName(f"no optimizer is called {name!r}{nearest(str(name), OPTIMIZERS)}")
        cls, given = OPTIMIZERS[name], dict(given or {})
        valid = _arguments(cls)  # type: ignore[arg-type]  # classes are hashable
        for key in given:
            if key not in valid:
                raise UnknownName(f"{name} has no argument {key!r}{nearest(str(key), valid)}")
        try:
            return cls(params, **{"lr": self.lr if lr is None else lr, "fused": True, **given})
        except (TypeError, ValueError) as error:
            raise BadInput(f"optimizer {name}: {error}") from None


@functools.cache
def _arguments(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "params"]
