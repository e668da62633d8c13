"""The one loop. Every event of every life goes through it, nested phases too."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.problem import Batch, Problem
from remanence.core.rng import generator, seed_of
from remanence.data import Examples, Request
from remanence.nn.anatomy import lone_rows
from remanence.nn.masks import Restore
from remanence.train.forward import Forward, recomputing
from remanence.train.roles import Forgetter, Learner, Outcome
from remanence.train.stopping import Stopping
from remanence.train.update import Consumed, Update, _cuda, hooks

_CHUNK = 16  # batches gathered at a time; each batch is then a slice


def learn(u: Update) -> Consumed:
    """One learn event: every part's `begin`, the learner, every part's `end`."""
    assert isinstance(u.owner, Learner)
    u.join()
    with u._exit:
        for begin in hooks([u.owner, *u.parts], "begin"):
            begin(u)
        u.owner.learn(u)
        if (
            not u.settings.epochs and u.task is not None
        ):  # only shown: what the network knows already, or parts are to take from
            u.consumed.epoch(u.data("task").id, False)
        _end(u)
        u.agree()
    return u.consumed.settle()


def forget(u: Update, request: Request) -> Outcome:
    """One forget run: every part's `begin`, the forgetter, every part's `end`."""
    assert isinstance(u.owner, Forgetter)
    u.join()
    with u._exit:
        for begin in hooks([u.owner, *u.parts], "begin"):
            begin(u)
        outcome = u.owner.forget(u, request)
        _end(u)
        u.agree()
    u.consumed.settle()
    return outcome


def _end(u: Update) -> None:
    u.epoch = -1
    ends = hooks([u.owner, *u.parts], "end")
    for end in sorted(ends, key=lambda hook: not getattr(hook.__self__, "moves_at_end", False)):
        end(u)
    for part in [u.owner, *u.parts]:
        for name in [name for name in vars(part) if name.startswith("_")]:
            delattr(part, name)


def loop(
    u: Update,
    drive: str | None,
    data: Examples | None,
    trainable: set[str] | None,
    mask: Mapping[str, Tensor] | None,
    replay: bool,
) -> None:
    """Epochs, batches and steps of one phase, in the order that `docs/add-a-method.md` tells."""
    parts = [u.owner, *u.parts]
    do = SimpleNamespace(
        **{name: hooks(parts, name) for name in ("order", "prepare", "loss", "gradient", "project", "after")}
    )
    params = dict(u.model.named_parameters())
    flags = [(p, p.requires_grad) for p in params.values()]
    modes = [(m, m.training) for m in u.model.modules()]
    recomputed = recomputing(u.model) if u.settings.checkpointing else nullcontext()
    try:
        with torch.random.fork_rng(devices=_cuda(u.device)), lone_rows(u.model), recomputed:
            u.model.train()
            _limit(u, params, trainable, mask)
            u._parameters = {name: p for name, p in params.items() if p.requires_grad}
            u.prepare_optimizers()
            if u.team is not None:
                u.team = u.team.over(u.model)
                u._shares = u.shares(bool(do.loss))
            if u.settings.precision != "float32" or u.settings.compile:
                u._forward = Forward(u.model, u.device, u.settings.precision, u.settings.compile)
            source = _Source(u, drive, data, replay)
            u.total = source.steps() * u.settings.epochs
            start = u.resume_at
            if start is not None:
                u.resume_at = None
                _restore(u, start)
            first = start["epoch"] if start else 0
            for epoch in range(first, u.settings.epochs):
                u.epoch = epoch
                if not start:
                    _seed(seed_of(u.seed, u.event, u.phase, "forward", u.epoch), u.device)
                index = _index(start["index"]) if start else source.index(do.order)
                if isinstance(index, list):
                    u.total = max(1, len(index) // u.settings.accumulate) * u.settings.epochs
                skip = start["batches"] if start else 0
                start = None
                for count, batch in enumerate(source.batches(index, skip), skip + 1):
                    if batch and do.prepare:
                        for prepare in do.prepare:
                            batch = prepare(u, batch)
                        u.consumed.rows(batch)
                    u.batch = batch
                    mine = u.share(batch)
                    for step in u.owner.steps(u, mine):
                        if u.backward(step, do.loss, mine):
                            for gradient in do.gradient:
                                gradient(u)
                            u.advance(step, do.project)
                    for after in do.after:
                        after(u, batch)
                    u._outs.clear()
                    for metric in u.metrics:
                        if not u._pending and u.step % metric.every == 0:
                            began = time.perf_counter()
                            with u.aside():
                                metric.value(u)
                            u._shared["measuring"] += time.perf_counter() - began
                    u.watch()
                    if u.checkpoint is not None:
                        u.checkpoint(u, source, index, count)
                    if not u._pending:
                        u.drop_gradients()
                if u._stopping is not None and u._stopping.over(u):
                    break
            if u._stopping is not None:
                u._stopping.restore(u)
            u.watch(last=True)
            if u._restore is not None:  # `prepare` may have moved masked entries before batches without a step
                u._restore.restore()
            u.keep_carried()
            u.count_training()
    finally:
        u._parameters = None
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, training in modes:
            if module.training is not training:
                module.training = training
        u.drop_gradients()


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators that a forward draws from. On the CPU that is one; torch.manual_seed also notes the call down, with
    its stack, for every accelerator that is not in use yet."""
    (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)


def _limit(
    u: Update, params: dict[str, nn.Parameter], trainable: set[str] | None, mask: Mapping[str, Tensor] | None
) -> None:
    """Take out of the optimizer what may not move, and remember the entries to put back."""
    masks = dict(mask or {})
    for names in hooks(u.parts, "trainable"):
        chosen = set(names(u))
        trainable = chosen if trainable is None else trainable & chosen
    for entries in hooks(u.parts, "mask"):
        for name, m in entries(u).items():
            masks[name] = masks[name] & m if name in masks else m
    if trainable is not None:
        unknown = trainable - set(params)
        if unknown:
            raise BadInput(f"trainable names parameters that the model lacks: {sorted(unknown)[:3]}")
        for name, p in params.items():
            p.requires_grad_(p.requires_grad and name in trainable)
    u._restore = Restore(params, masks) if masks else None


class _Source:
    """Where the batches of a phase come from."""

    def __init__(self, u: Update, drive: str | None, data: Examples | None, replay: bool) -> None:
        self.u, self.drive, self.replay = u, drive, replay
        self.size = u.settings.batch_size
        if drive is None:
            self.data = data if data is not None else u.data("task")
            if u.settings.patience is not None:
                u._stopping, self.data = Stopping.split(u, self.data)
        else:
            self.data, self.other = u.data("retain"), u.data("forget")
            if drive in ("retain", "mixed", "sequence") and not len(self.data):
                raise BadInput(
                    "no retained data can be reached, but this method needs it; learn some, or pick one that does not"
                )
        self.columns = {name: c for name, c in self.data.columns.items() if isinstance(c, Tensor)} | {
            "id": self.data.id
        }

    def steps(self) -> int:
        """Optimizer steps of an epoch, as far as they can be known."""
        counts = {None: len(self.data), "retain": len(self.data)}
        if self.drive in counts:
            batches = -(-counts[self.drive] // self.size)
        elif self.drive == "forget":
            batches = -(-len(self.other) // self.size)
        elif self.drive == "mixed":
            batches = -(-(len(self.other) + len(self.data)) // self.size)
        else:
            batches = -(-len(self.other) // self.size) + -(-len(self.data) // self.size)
        return max(1, batches // self.u.settings.accumulate)

    def index(self, orders: list[Any]) -> Any:
        """This epoch's example numbers: a permutation addressed by event and epoch, as the order hooks leave it."""
        u = self.u
        index: Any = torch.randperm(len(self.data), generator=u.rng("order"))
        if self.drive is None:
            for order in orders:
                index = order(u, index)
        flat = torch.cat(list(index)) if isinstance(index, list) else index
        if self.drive != "forget" and len(flat):
            ids = (
                self.data.id[flat] if orders and self.drive is None else self.data.id
            )  # all of them: sorted already, mostly
            u.consumed.epoch(ids, self.replay or u.kind == "forget")
        return index

    def batches(self, index: Any, skip: int = 0) -> Iterator[Batch]:
        if self.drive is None:
            yield from self._plain(self.columns, index, skip)
        else:
            yield from self._driven(index)

    def _plain(self, columns: dict[str, Tensor], index: Any, skip: int = 0) -> Iterator[Batch]:
        u, device = self.u, self.u.device
        groups = list(index) if isinstance(index, list) else None
        zeros = torch.zeros(self.size, dtype=torch.int64, device=device)
        if groups is None and type(u.problem).compact is not Problem.compact:
            groups = list(index.split(self.size))
        if groups is not None:
            for rows in groups[skip:]:
                chosen = u.problem.compact({name: c[rows] for name, c in columns.items()})
                yield {name: c.to(device) for name, c in chosen.items()} | {"origin": torch.zeros_like(rows).to(device)}
            return
        assert u.settings.batch_size == self.size
        rest = index[skip * self.size :]
        for rows in rest.split(self.size * _CHUNK) if len(rest) else ():
            gathered = [c[rows].to(device).split(self.size) for c in columns.values()]
            for parts in zip(*gathered, strict=True):
                batch = dict(zip(columns, parts, strict=True))
                batch["origin"] = zeros[: len(batch["id"])]
                yield batch

    def _cycle(self, data: Examples, name: str) -> Iterator[Batch]:
        """Endless batches of `data`, a new permutation for every pass."""
        columns = {n: c for n, c in data.columns.items() if isinstance(c, Tensor)} | {"id": data.id}
        rng = generator(self.u.seed, self.u.event, self.u.phase, name, self.u.epoch)
        while len(data):
            yield from self._plain(columns, torch.randperm(len(data), generator=rng))
        while True:
            yield {}

    def _driven(self, index: Tensor) -> Iterator[Batch]:
        """Yields the retain batch and sets ``u.forget``; either may be empty."""
        u = self.u
        others = {n: c for n, c in self.other.columns.items() if isinstance(c, Tensor)} | {"id": self.other.id}
        forget = torch.randperm(len(self.other), generator=u.rng("forget-order"))
        if self.drive == "retain":
            pairs = self._cycle(self.other, "paired")
            for batch in self._plain(self.columns, index):
                u.forget = next(pairs) or None
                yield batch
        elif self.drive == "forget":
            pairs = self._cycle(self.data, "paired")
            for rows in self._plain(others, forget):
                u.forget = rows
                batch = next(pairs)
                if batch:
                    u.consumed.epoch(batch["id"], True)
                yield batch
        elif self.drive == "sequence":
            for rows in self._plain(others, forget):
                u.forget = rows
                yield {}
            u.forget = None
            yield from self._plain(self.columns, index)
        else:
            both = {n: torch.cat([self.columns[n], others[n]]) for n in self.columns if n in others}
            count = len(self.data)
            order = torch.randperm(count + len(self.other), generator=u.rng("mixed-order"))
            for rows in order.split(self.size):
                kept, gone = rows[rows < count], rows[rows >= count]
                u.forget, batch = None, {}
                if len(gone):
                    chosen = u.problem.compact({n: c[gone] for n, c in both.items()})
                    u.forget = {n: c.to(u.device) for n, c in chosen.items()}
                if len(kept):
                    chosen = u.problem.compact({n: c[kept] for n, c in both.items()})
                    batch = {n: c.to(u.device) for n, c in chosen.items()}
                    batch["origin"] = torch.zeros(len(kept), dtype=torch.int64, device=u.device)
                yield batch


def position(u: Update, index: Any, batches: int) -> dict[str, Any]:
    """Everything the loop needs to go on from between two batches, but the weights and the parts' own state (which a
    ``load`` beside it puts back)."""
    return {
        "epoch": u.epoch,
        "batches": batches,
        "index": [rows.tolist() for rows in index] if isinstance(index, list) else index.tolist(),
        "step": u.step,
        "steps_done": u.steps_done,
        "pending": u._pending,
        "phases": u._shared["phases"],
        "lr": u.lr,
        "features": u._features,
        "stopping": u._stopping.state_dict() if u._stopping is not None else None,
        "scaler": u._forward.scaler.state_dict() if u._forward is not None and u._forward.scaler is not None else None,
        "grads": {name: p.grad for name, p in u.parameters.items() if p.grad is not None} if u._pending else {},
        "optimizers": {name: _plain_state(optimizer) for name, optimizer in u.optimizers.items()},
        "rngs": {f"{name}\x1f{epoch}": rng.get_state() for (name, epoch), rng in u._rngs.items()},
        "torch_rng": torch.get_rng_state(),
        "new": torch.from_numpy(u.consumed.settle().new.array.copy()),
        "replayed": torch.from_numpy(u.consumed.replayed.array.copy()),
    }


def _index(saved: list[Any]) -> Any:
    """An epoch's example numbers as they were saved: one tensor, or one per batch."""
    return [torch.tensor(rows) for rows in saved] if saved and isinstance(saved[0], list) else torch.tensor(saved)


def _plain_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    groups = [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in state["param_groups"]]
    return {"state": {str(k): v for k, v in state["state"].items()}, "param_groups": groups}


def _restore(u: Update, at: Mapping[str, Any]) -> None:
    from remanence.core.ids import Ids

    u.step, u._pending, u.lr, u.steps_done = at["step"], at["pending"], at["lr"], at["steps_done"]
    u._features = at["features"]  # else the first batch is forwarded twice, and dropout drawn twice
    if u._stopping is not None:
        u._stopping.load_state_dict(at["stopping"])
    if u._forward is not None and u._forward.scaler is not None:
        u._forward.scaler.load_state_dict(at["scaler"])
    for name, optimizer in u.optimizers.items():
        saved = at["optimizers"][name]
        optimizer.load_state_dict(
            {"state": {int(k): v for k, v in saved["state"].items()}, "param_groups": saved["param_groups"]}
        )
    for key, state in at["rngs"].items():
        name, _, epoch = key.partition("\x1f")
        rng = torch.Generator()
        rng.set_state(state)
        u._rngs[(name, int(epoch))] = rng
    torch.set_rng_state(at["torch_rng"])
    u._shared["phases"] = at["phases"]
    at["load"]()
    params = u.parameters
    for name, grad in at["grads"].items():
        params[name].grad = grad.clone()
    u.consumed = Consumed(Ids(at["new"].numpy()), Ids(at["replayed"].numpy()))
