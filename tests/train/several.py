"""Lives that one process or several live alike. Run by a launcher it writes what each process ends with: ``several.py FOLDER NAMES``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import remanence as rm
from remanence.core.errors import EventFailed, NotFinite
from remanence.core.problem import Batch, CausalLM
from remanence.learn.finetune import Finetune
from remanence.nn.taps import hidden_layers, taps
from remanence.train import parallel
from remanence.train.loop import learn
from remanence.train.roles import Keeper
from remanence.train.settings import Settings
from remanence.train.update import Update
from tests.lm import facts, tiny
from tests.train.helpers import blobs, network, update


class ByRows(Finetune):
    """The default objective, said to be a mean over the batch's targets."""

    by_rows = True


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().reshape(-1).double() for value in model.state_dict().values()])


def digits() -> Tensor:
    """Two tasks with replay and EWC; 33 rows to a batch do not divide by two."""
    stream = rm.data.split_digits(tasks=5)
    keep = [{"replay": {"per_class": 5, "batch_size": 9}}, {"ewc": {"strength": 50.0}}]
    with rm.Life(rm.models.mlp(64, [16]), keep=keep) as life:
        for task in list(stream)[:2]:
            life.learn(task, epochs=1, batch_size=33, lr=0.01, clip=1.0)
        return flat(life.model)


def by_comparison() -> Tensor:
    """Dark experience replay, whose terms know places of rows in the whole batch."""
    with rm.Life(rm.models.mlp(64, [16]), keep=[{"der": {"capacity": 40, "batch_size": 8}}]) as life:
        for task in list(rm.data.split_digits(tasks=5))[:2]:
            life.learn(task, epochs=1, batch_size=65, lr=0.01, optimizer="sgd")
        return flat(life.model)


def projected() -> Tensor:
    """A-GEM asks for a gradient of its own inside the step."""
    with rm.Life(rm.models.mlp(64, [16]), keep=[{"agem": {}}]) as life:
        for task in list(rm.data.split_digits(tasks=5))[:2]:
            life.learn(task, epochs=1, batch_size=65, lr=0.05, optimizer="sgd")
        return flat(life.model)


def forgotten() -> Tensor:
    """A forget run over pairs of batches of unlike size."""
    stream = rm.data.split_digits(tasks=5)
    with rm.Life(rm.models.mlp(64, [16])) as life:
        life.learn(stream[0], epochs=1)
        ids = rm.Request(ids=stream[0].train.ids.array[:51].tolist())
        life.forget(ids, by="scrub", epochs=1, batch_size=16)
        return flat(life.model)


def normed(accumulate: int = 1) -> Tensor:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    made = rm.models.small.seeded(0, lambda: model)
    for module in made.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
            nn.init.zeros_(module.bias)
    learn(update(made, blobs(), epochs=2, batch_size=16, lr=0.02, accumulate=accumulate))
    return flat(made)


def text_update(owner: Finetune, model: nn.Module | None = None, **settings: Any) -> Update:
    data = facts(25, 0)
    labels = data["labels"].clone()
    labels[::7, 6:] = -100  # rows of unlike numbers of targets
    weight = torch.linspace(0.5, 2.0, 25)
    return Update(model=model or tiny(hidden=16), problem=CausalLM(context=12), owner=owner, settings=Settings(**settings),
                  data=lambda _: data.replace(labels=labels, weight=weight))  # fmt: skip


def text(owner: Finetune, **settings: Any) -> Tensor:
    u = text_update(owner, **{"epochs": 2, "batch_size": 10, "lr": 1e-3, **settings})
    learn(u)
    return flat(u.model)


def looked_into() -> Tensor:
    """A part that pulls a hidden layer, of all rows, towards 0 and clips by what it saw."""

    @dataclass
    class Looks(Keeper):
        def begin(self, u: Update) -> None:
            self._taken = u.enter(taps(u.model, hidden_layers(u.model)[:1]))

        def loss(self, u: Update, batch: Batch) -> Tensor:
            u.out(batch)
            (hidden,) = self._taken.values()
            assert len(hidden) == len(batch["id"])
            return hidden.std()

        def gradient(self, u: Update) -> None:
            (hidden,) = self._taken.values()
            for p in u.parameters.values():
                if p.grad is not None:
                    p.grad *= 1 + hidden.detach().mean()

    made = network()
    learn(update(made, blobs(), parts=[Looks()], epochs=2, batch_size=17, lr=0.05, optimizer="sgd"))
    return flat(made)


def apart() -> str:
    """Every process begins elsewhere."""
    try:
        learn(update(network(seed=parallel.world()[0]), blobs(), epochs=1, lr=0.0))
    except EventFailed as error:
        return str(error)
    return ""


def not_finite() -> str:
    """The last process alone meets a loss that is no number."""

    class Breaks(ByRows):
        by_rows = True

        def objective(self, u: Any, batch: Batch) -> Tensor:
            loss = super().objective(u, batch)
            rank, size = parallel.world()
            return loss * torch.nan if u.step == 3 and rank == size - 1 else loss

    try:
        learn(text_update(Breaks(), batch_size=5))
    except NotFinite as error:
        return str(error)
    return ""


def reported() -> int:
    """Times that progress was told here."""
    calls: list[float] = []
    learn(update(network(), blobs(), epochs=1, more={"progress": lambda u, loss: calls.append(loss)}))
    return len(calls)


def shares() -> list[int]:
    """Rows per objective in this process, where all of the answers are needed and where they are not."""
    rows: list[int] = []

    class Counts(ByRows):
        by_rows = True

        def objective(self, u: Any, batch: Batch) -> Tensor:
            rows.append(len(batch["id"]))
            return super().objective(u, batch)

    learn(text_update(Counts(), batch_size=25))
    learn(update(network(), blobs(), owner=Counts(), batch_size=90))
    return rows


#: What must end alike in one process and in several.
LIVES: dict[str, Callable[[], Tensor]] = {
    "digits": digits,
    "by comparison": by_comparison,
    "projected": projected,
    "forgotten": forgotten,
    "looked into": looked_into,
    "text, whole": lambda: text(Finetune()),
    "text, by rows": lambda: text(ByRows()),
    "text, accumulated": lambda: text(ByRows(), accumulate=2, clip=0.5, schedule="cosine"),
    "text, one row": lambda: text(ByRows(), batch_size=1, epochs=1),
}

#: What is asked of several processes alone.
MORE: dict[str, Callable[[], Any]] = {
    "normed": normed,
    "normed, accumulated": lambda: normed(4),
    "apart": apart,
    "not finite": not_finite,
    "reported": reported,
    "shares": shares,
    "world": parallel.world,
}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    ends = {name: run() for name, run in {**LIVES, **MORE}.items() if name in names}
    tensors = {name: end for name, end in ends.items() if isinstance(end, Tensor)}
    to = Path(folder) / str(parallel.world()[0])
    save_file(tensors, to.with_suffix(".safetensors"))
    to.with_suffix(".json").write_text(json.dumps({name: end for name, end in ends.items() if name not in tensors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
