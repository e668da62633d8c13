"""Several processes train one life: each goes through its share of every batch, and the gradients are added up."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remanence.core.errors import EventFailed
from remanence.core.problem import Batch, Out, Problem

#: Environment variables in which launchers say the number of this process and how many there are: torchrun and `accelerate launch`;
#: then what MPI sets under `accelerate launch` on several CPUs.
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def world() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are. A group that ``torchrun`` or ``accelerate launch`` has asked for is
    formed on first use; then every process must come here.

    With GPUs, ``cuda`` means from then on the one that the launcher gave this process.
    """
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        rank, size = _number(RANK), _number(SIZE)
        if rank is None or size is None or size < 2 or not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            return 0, 1
        gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
        if gpus:
            torch.cuda.set_device((_number(("LOCAL_RANK",)) or 0) % gpus)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", rank=rank, world_size=size)
        atexit.register(_leave)
    return dist.get_rank(), dist.get_world_size()


def main() -> bool:
    """Whether this process is the one that writes and reports: the first."""
    return world()[0] == 0


def team() -> Team | None:
    """This process among all; None where it is alone."""
    rank, size = world()
    return Team(rank, size) if size > 1 else None


def watched(model: nn.Module) -> bool:
    """Whether somebody looks into the forward of a layer, who must then see all rows. (On normalisations the loop has hooks of its own.)"""
    return any(
        (module._forward_hooks or module._forward_pre_hooks) and not isinstance(module, nn.modules.batchnorm._NormBase)
        for module in model.modules()
    )


def _number(names: Sequence[str]) -> int | None:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)


def _summed(values: Sequence[Tensor]) -> list[Tensor]:
    """The sum over all processes of each, in float32, by one message."""
    flat = torch.cat([value.reshape(-1).to(torch.float32) for value in values])
    dist.all_reduce(flat)
    pieces = flat.split([value.numel() for value in values])
    return [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)]


class _Together(torch.autograd.Function):
    """The rows of all processes, one after the other; `counts` says how many each has. What follows is the same in all processes, so
    each knows the slope at its own rows; it is multiplied by their number because gradients are averaged."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return torch.cat([one[:count] for one, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        start = sum(ctx.counts[: ctx.rank])
        return slopes[0][start : start + ctx.counts[ctx.rank]] * len(ctx.counts), None, None


def _leave() -> None:
    if dist.is_initialized():
        # Together: who takes its end of a connection away while another still uses it can end that one.
        with contextlib.suppress(RuntimeError, ValueError):  # a process that failed is not waited for
            dist.monitored_barrier(timeout=timedelta(seconds=10))
        dist.destroy_process_group()


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size` that live the same life: all draw the same batches and call the same hooks, and each goes through its own
    run of the rows. What comes out is the gradient of one process.

    Where the answers are small, as a classifier's are, `u.out` shares the forward out and brings the answers together:

        answers = every process's answers to its rows, one after the other;  backward: size * the slope at the own rows
        gradient = mean over processes

    so that objectives, terms and hooks see the whole batch, whatever they make of it. What goes past `u.out`, such as a penalty or a
    teacher's forward, is done by all processes alike, and their mean is what one would have; so is a forward with hooks on its layers.

    The answers to a text are large. Where a run of text has no term but an objective that is a mean over target tokens (the default one,
    or one whose class says ``by_rows = True`` beside it), each process makes it of its rows alone:

        gradient = sum over processes of count_r / count * gradient of objective(rows_r)        count: target tokens, each times its weight

    Gradients are added before the `gradient` hooks, in one message. Then these, clipping, the optimizer, masks and projections act alike
    everywhere, and all that else is computed, all compute. Two things are as in other data-parallel training: batch normalisation uses
    the statistics of the own rows, the running ones being averaged; and dropout draws the same numbers in all processes, for different rows.
    """

    rank: int
    size: int
    _normed: Sequence[Tensor] = ()

    def over(self, model: nn.Module) -> Team:
        """The team for a phase that trains `model`."""
        kinds = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        found = [value for module in kinds for value in (module.running_mean, module.running_var)]
        return Team(self.rank, self.size, [value for value in found if value is not None])

    def bounds(self, rows: int) -> list[int]:
        """Where the runs of the processes begin, and the end of the last."""
        return [rows * rank // self.size for rank in range(self.size + 1)]

    def share(self, problem: Problem, batch: Batch) -> tuple[Batch, float]:
        """The own rows of `batch`, and what a mean over them weighs in the mean over all. Where there are fewer rows than processes, or
        one would have no target, every process has all of them.
        """
        counts = self._counts(batch, weighted=True) if batch else [0.0]
        if min(counts) <= 0:
            return batch, 1 / self.size
        return problem.compact(self._mine(batch)), counts[self.rank] / sum(counts)

    def out(self, problem: Problem, model: nn.Module, batch: Batch, forward: Callable[[Batch], Out]) -> Out:
        """``forward(batch)``, of which every process computes its own rows."""
        if len(batch["id"]) < self.size or watched(model):
            return forward(batch)
        counts = [int(count) for count in self._counts(batch)]
        made = forward(problem.compact(self._mine(batch)))
        return Out(
            self._together(made.logits, counts),
            None if made.features is None else self._together(made.features, counts),
        )

    def _together(self, rows: Tensor, counts: list[int]) -> Tensor:
        found: Tensor = _Together.apply(rows, counts, self.rank)  # type: ignore[no-untyped-call]
        return found

    def _mine(self, batch: Batch) -> Batch:
        bounds = self.bounds(len(batch["id"]))
        return {name: column[bounds[self.rank] : bounds[self.rank + 1]] for name, column in batch.items()}

    def _counts(self, batch: Batch, weighted: bool = False) -> list[float]:
        """How many answers there are to the rows of each process."""
        bounds = self.bounds(len(batch["id"]))
        if "labels" not in batch:
            return [float(end - start) for start, end in pairwise(bounds)]
        count = (batch["labels"][:, 1:] != -100).sum(1).double()
        count = count * batch["weight"] if weighted and "weight" in batch else count
        found: list[float] = torch.stack([count[start:end].sum() for start, end in pairwise(bounds)]).tolist()
        return found

    @torch.no_grad()
    def add_up(self, params: Sequence[nn.Parameter]) -> None:
        """Put the sum over all processes in place of the gradients of `params`. One that no process has stays absent."""
        missing = [p.grad is None for p in params]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        there = torch.ones(len(params), device=params[0].device)
        if any(missing):
            there[torch.tensor(missing, device=there.device)] = 0
        *sums, there = _summed([*grads, there])
        # A process that has all of its gradients needs no look at who else has them.
        known = there.tolist() if any(missing) else [1.0] * len(params)
        for p, total, holders in zip(params, sums, known, strict=True):
            p.grad = total.to(p.dtype) if holders else None

    @torch.no_grad()
    def level(self) -> None:
        """Average the running statistics, which every process took from its share."""
        if self._normed:
            for value, mean in zip(self._normed, self.mean(self._normed), strict=True):
                value.copy_(mean)

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each over all processes."""
        return [total / self.size for total in _summed(values)]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        return _summed([values])[0]

    def agree(self, model: nn.Module, when: str) -> None:
        """Compare the weights of all processes.

        Raises:
            EventFailed: they differ.
        """
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            if isinstance(value, Tensor):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, digest.hexdigest())
        apart = [rank for rank, seen in enumerate(found) if seen != found[0]]
        if apart:
            raise EventFailed(
                f"after {when} the weights of process {', '.join(map(str, apart))} of {self.size} are not those of process 0: the processes "
                "were given different models, data or settings, or a part draws random numbers that are not the update's"
            )
