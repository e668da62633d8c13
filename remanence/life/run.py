"""Running a plan, and going on with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remanence.core.errors import Refused
from remanence.core.rng import seed_of
from remanence.data import Request, Stream
from remanence.life.life import Life
from remanence.life.plan import Plan, load_plan
from remanence.train.update import Progress


def model_and_data(path: str | Path, allow_code: bool = False) -> tuple[Callable[[int], nn.Module], Stream]:
    """The model's builder and the stream that a plan names."""
    plan = load_plan(Path(path), allow_code=allow_code)
    stream = build_stream(plan)
    return model_builder(plan, stream), stream


def build_stream(plan: Plan) -> Stream:
    """The plan's stream."""
    from remanence.data.streams import STREAMS

    name, knobs = one(plan.stream)
    return STREAMS[name](**knobs)


def model_builder(plan: Plan, stream: Stream) -> Callable[[int], nn.Module]:
    """A function of the life's seed that builds the plan's network for the stream's inputs."""
    from remanence.models import MODELS

    name, knobs = one(plan.model)
    shape = tuple(stream[0].train["x"].shape[1:])

    def build(seed: int) -> nn.Module:
        made = MODELS[name](inputs=shape, **{**knobs, "seed": seed_of(seed, "model") % 2**31})
        assert isinstance(made, nn.Module)
        return made

    return build


def one(value: Any) -> tuple[str, dict[str, Any]]:
    """``name`` or ``{name: knobs}`` as a pair."""
    if isinstance(value, dict):
        name, knobs = next(iter(value.items()))
        return str(name), dict(knobs or {})
    return str(value), {}


def run_plan(
    path: str | Path, home: str | Path | None = None, allow_code: bool = False, progress: Progress | None = None
) -> Life:
    """Begin the life of a plan and live it to its end; a home that holds this very plan is gone on with.

    Raises:
        PlanError: the plan cannot be run; nothing was written.
        Refused: the home holds another life.
    """
    path = Path(path)
    plan = load_plan(path, allow_code=allow_code)
    folder = Path(home) if home is not None else Path(plan.home or f"runs/{plan.name}")
    if (folder / "ledger.db").exists():
        kept = folder / "plan.yaml"
        if not kept.exists() or kept.read_text() != plan.source:
            raise Refused(
                f"{folder} holds another life; choose another --home, or delete it first (remanence delete {folder})"
            )
        life = Life.resume(folder, progress=progress)
    else:
        if plan.threads is not None:
            torch.set_num_threads(plan.threads)
        stream = build_stream(plan)
        life = Life(
            model_builder(plan, stream),
            problem=plan.problem,
            learner=plan.learner,
            keep=plan.keep,
            where=plan.where,
            home=folder,
            seed=plan.seed,
            device=plan.device,
            measure=plan.measure,
            name=plan.name,
            plan=plan.source,
            progress=progress,
        )
    continue_plan(life)
    return life


def continue_plan(life: Life, after: Callable[[Life], None] | None = None) -> None:
    """Live the events of the life's plan that have not happened yet; `after` is called after each, then the report is written."""
    plan = load_plan(life.home / "plan.yaml")
    stream = build_stream(plan)
    train = (
        {k: v for k, v in dict(plan.train).items() if v is not None}
        if not hasattr(plan.train, "model_dump")
        else plan.train.model_dump(exclude_none=True)
    )
    for event in plan.events[len(life.events) :]:
        options = event.options()
        if event.kind == "learn":
            life.learn(stream[options.pop("task")], **{**train, **options})
        else:
            request = Request(**options.pop("request"))
            life.forget(request, **options)
        if after is not None:
            after(life)
    life.report()
