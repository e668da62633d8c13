"""Running a plan, and going on with one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remanence.core.errors import BadInput, Refused
from remanence.core.problem import CausalLM, problem_of
from remanence.core.rng import seed_of
from remanence.data import Request, Stream
from remanence.data.tokenizers import TOKENIZERS
from remanence.data.tokens import tokenised_stream
from remanence.life.home import begun, delete, unlived
from remanence.life.life import Life
from remanence.life.plan import Plan, load_plan
from remanence.train.update import Progress

After = Callable[[Life], None]


def model_and_data(path: str | Path, allow_code: bool = False) -> tuple[Callable[[int], nn.Module], Stream, Any]:
    """The model's builder, the stream and the tokenizer (or None) that a plan names."""
    return _made(load_plan(Path(path), allow_code=allow_code))


def _made(plan: Plan) -> tuple[Callable[[int], nn.Module], Stream, Any]:
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)  # the same bits ask for the same number of threads
    stream = build_stream(plan)
    return model_builder(plan, stream), stream, build_tokenizer(plan)


def build_stream(plan: Plan) -> Stream:
    """The plan's stream.

    Raises:
        PlanError: the function that the plan names gives no stream.
    """
    function, knobs = plan.factory("stream")
    try:
        made = function(**knobs)
    except BadInput as error:
        raise plan.error(("stream",), str(error)) from error
    if not isinstance(made, Stream):
        raise plan.error(("stream",), f"the function gave a {type(made).__name__}; a stream is a remanence.data.Stream")
    tokenizer, problem = build_tokenizer(plan), problem_of(plan.problem)
    if tokenizer is None or not isinstance(problem, CausalLM):
        return made
    try:
        return tokenised_stream(made, tokenizer, problem)
    except BadInput as error:
        raise plan.error(("stream",), str(error)) from error


def build_tokenizer(plan: Plan) -> Any:
    """The plan's tokenizer; None without one.

    Raises:
        PlanError: it cannot be made.
    """
    if plan.tokenizer is None:
        return None
    ((name, knobs),) = plan.tokenizer.items()
    try:
        return TOKENIZERS[name](**knobs)
    except BadInput as error:
        raise plan.error(("tokenizer",), str(error)) from error


def model_builder(plan: Plan, stream: Stream) -> Callable[[int], nn.Module]:
    """A function of the life's seed that builds the plan's network for the stream's inputs.

    Raises:
        PlanError: (when called) the function that the plan names gives no network.
    """
    function, knobs = plan.factory("model")
    takes = inspect.signature(function).parameters
    known: dict[str, Any] = {}
    if "x" in stream[0].train.columns:
        known["inputs"] = tuple(stream[0].train["x"].shape[1:])
    elif "vocab" in takes:
        known["vocab"] = len(build_tokenizer(plan))

    def build(seed: int) -> nn.Module:
        made = function(**known, **{**knobs, "seed": seed_of(seed, "model") % 2**31})
        if not isinstance(made, nn.Module):
            raise plan.error(("model",), f"the function gave a {type(made).__name__}; a model is a torch module")
        return made

    return build


def run_plan(
    path: str | Path,
    home: str | Path | None = None,
    allow_code: bool = False,
    progress: Progress | None = None,
    after: After | None = None,
    references: str | Path | None = None,
) -> Life:
    """Begin the life of a plan and live it to its end; a home that holds this very plan is gone on with.

    Raises:
        PlanError: the plan cannot be run; nothing was written.
        Refused: the home holds another life; or an event of the plan was refused.
        EventFailed: an event failed; the life is as it was before that event.
    """
    life, plan, stream = open_plan(path, home, allow_code, progress, references)
    try:
        continue_plan(life, after, plan, stream)
    except BaseException:
        life.close()
        raise
    return life


def open_plan(
    path: str | Path,
    home: str | Path | None = None,
    allow_code: bool = False,
    progress: Progress | None = None,
    references: str | Path | None = None,
) -> tuple[Life, Plan, Stream]:
    """The life of a plan, new or as far as its home has come, the plan and its stream: what `continue_plan` takes.

    Raises:
        PlanError: the plan cannot be run; nothing was written.
        Refused: the home holds another life.
    """
    plan = load_plan(Path(path), allow_code=allow_code)
    folder = Path(home) if home is not None else Path(plan.home or f"runs/{plan.name}")
    if begun(folder):
        kept = folder / "plan.yaml"
        same = kept.exists() and kept.read_text(encoding="utf-8") == plan.source
        if not same and kept.exists() and unlived(folder):  # its first event failed, and the plan was mended since
            delete(folder)
        elif not same:
            raise Refused(
                f"{folder} holds another life; choose another --home, or delete it first (remanence delete {folder})"
            )
    if begun(folder):
        builder, stream, tokenizer = _made(plan)
        life = Life.resume(folder, builder, stream, tokenizer=tokenizer, progress=progress, references=references)
        return life, plan, stream
    builder, stream, tokenizer = _made(plan)
    life = Life(
        builder,
        problem=plan.problem,
        tokenizer=tokenizer,
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
        references=references,
    )
    return life, plan, stream


def continue_plan(
    life: Life,
    after: After | None = None,
    plan: Plan | None = None,
    stream: Stream | None = None,
    before: Callable[[str], None] | None = None,
) -> None:
    """Live the events of the life's plan that have not happened yet, then write the report.

    Args:
        after: called after each event.
        plan, stream: if they were made already. A home's copy of a plan may not run code; the user's own may.
        before: called before each event with what it is, in words.
    """
    plan = plan or load_plan(life.home / "plan.yaml")
    stream = build_stream(plan) if stream is None else stream
    for event in remaining(life, plan):
        options = event.options()
        count = len(life.events)
        if event.kind == "learn":
            number = options.pop("task")
            if before is not None:
                before(f"learn task {number}")
            life.learn(stream[number], **{**plan.train.given(), **options})
        else:
            request = Request(**options.pop("request"))
            if before is not None:
                before(f"forget {request.plain()} by {next(iter(options['by']))}")
            life.forget(request, **options)
        if len(life.events) == count:
            # A repeated request is answered by its earlier receipt: no event of the life, yet one of the plan.
            with life._ledger.begin() as tx:
                tx.set_current("repeated", tx.get_current("repeated", 0) + 1)
        if after is not None:
            after(life)
    life.report()


def remaining(life: Life, plan: Plan) -> list[Any]:
    """The events of the plan that have not happened yet."""
    return list(plan.events[len(life.events) + life._ledger.get_current("repeated", 0) :])


class Reading(Life):
    """A life opened to look at it: nothing is finished, gone on with or erased, and other versions or threads do not matter."""

    def _check_drift(self, allow: bool) -> None: ...

    def _finish_owed(self) -> None: ...

    def _continue_request(self, opening: bool = False) -> None: ...

    def _sweep(self) -> None: ...

    def _writable(self) -> None:
        raise BadInput("this life was opened only to look at it; Life.resume(home) opens it to go on")
