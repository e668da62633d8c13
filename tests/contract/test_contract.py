"""Every part of the catalogue through its contract: one row each. And for each rule a part that breaks it, which `check` must catch."""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from remanence import catalogue
from remanence.core.errors import BadInput, UnknownName
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.data import Examples
from remanence.keep.ewc import EWC
from remanence.models import mlp, vit
from remanence.nn.adapters import add_low_rank
from remanence.nn.buffer import Buffer
from remanence.testing import EVERY, RULES, ContractError, check
from remanence.train.roles import Benchmark, Forgetter, Keeper, Learner, Metric, Outcome, Where


@pytest.fixture(autouse=True, scope="module")
def in_memory():
    """Lives write and sync many small files; a disk in memory, where there is one, makes that cheap."""
    before = tempfile.tempdir
    tempfile.tempdir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else before
    yield
    tempfile.tempdir = before


#: verb, slug, knobs where the defaults do not suit 240 digits, and knobs with which it can have no effect (a `strength` of 0 needs no word).
ROWS: tuple[tuple[str, str, dict[str, Any] | None, dict[str, Any] | None], ...] = (
    ("learn", "finetune", None, None),
    ("learn", "joint", None, None),
    ("learn", "nmc", None, None),
    ("learn", "acu", None, None),
    ("learn", "sisa", None, None),
    ("learn", "prd", {"prototype_lr": 0.1}, None),
    ("learn", "uer", None, None),
    ("learn", "hpcr", {"capacity": 60}, None),
    ("learn", "onpro", {"capacity": 60}, None),
    ("learn", "fetril", None, None),
    ("learn", "dkvb", {"codebooks": 16, "pairs": 32, "key_dim": 8}, None),
    ("learn", "protocl", {"memory": 60}, None),
    ("learn", "napa-vq", None, None),
    ("learn", "s3t", {"slices": 1, "rank": 4}, None),
    ("learn", "sharp", {"early": 0, "phase_epochs": 1}, None),
    ("learn", "lingocl", None, None),
    (
        "learn",
        "mvp-siblurry",
        {"size": 3, "shared_blocks": [0], "shared_length": 1, "own_blocks": [1], "own_length": 2},
        None,
    ),
    ("learn", "lt-sft", {"density": 0.3}, None),
    ("learn", "cpt-rewarm-replay", {"share": 0.25}, None),
    ("learn", "dmt", {"k": 0.25}, None),
    ("learn", "stability-gap-cpt", {"select": "random", "subset": 0.6, "old": 0.3}, None),
    ("keep", "replay", None, {"batch_size": 0}),
    ("keep", "replay", {"policy": "reservoir", "capacity": 30}, {"capacity": 0}),
    ("keep", "ewc", None, None),
    ("keep", "l2", None, None),
    ("keep", "lwf", None, None),
    ("keep", "feature-distill", None, None),
    ("keep", "refresh-learning", None, {"delta": 0.0}),
    ("keep", "fpf", {"steps": 20}, {"k": 0}),
    ("keep", "fpf", {"steps": 20, "objective": "kd", "capacity": 40}, {"capacity": 0}),
    ("keep", "gpm", {"samples": 20}, {"threshold": 0.0}),
    ("keep", "view-batch", {"views": 2, "start": 1}, {"views": 1}),
    ("keep", "gradient-restriction", None, None),
    ("keep", "si", None, None),
    ("keep", "mas", None, None),
    ("keep", "task-free-mas", {"level": 1.0}, None),
    ("keep", "der", {"capacity": 30}, {"capacity": 0}),
    ("keep", "der", {"capacity": 30, "alpha": 1.0, "beta": 0.0}, {"batch_size": 0}),
    ("keep", "agem", {"capacity": 30}, {"capacity": 0}),
    ("keep", "gss", {"capacity": 30}, {"capacity": 0}),
    ("keep", "power-law-rehearsal", None, {"amount": 0}),
    ("keep", "cuber", {"samples": 20}, {"threshold": 0.0}),
    ("keep", "hlop", None, {"first": 0.0, "later": 0.0}),
    ("keep", "migu", {}, {"threshold": 0}),
    ("keep", "sefe", {}, None),
    ("keep", "ama", None, {"alpha": 0.0}),
    ("keep", "lines", None, {"alpha": 1.0, "choose": False}),
    ("keep", "gere", {"texts": 30, "strength": 1.0}, {"texts": 0}),
    ("keep", "i-lora", {"capacity": 40, "a_max": 0.9, "gamma": 10.0}, {"a_max": 0, "capacity": 0}),
    ("keep", "lcia", {"fallback": 0.3}, {"factor": 0, "fallback": 1}),
    ("where", "saliency", None, {"rho": 1.0}),
    ("where", "hft", None, {"share": 1.0}),
    ("where", "lora", {"rank": 2}, None),
    ("where", "loramoe", {"experts": 2, "rank": 2, "targets": "all-linear"}, None),
    ("where", "mora-cl", {"rank": 4, "k": 4}, None),
    ("where", "kore", {"rank": 8}, None),
    ("forget", "retrain", None, None),
    ("forget", "catastrophic", None, None),
    ("forget", "gradient-ascent", None, {"ascent": 0.0, "retain": 0.0}),
    ("forget", "random-label", None, None),
    ("forget", "ssd", None, {"selection": 1e30}),
    ("forget", "salun", None, {"rho": 0.0}),
    ("forget", "sparse-unlearn", None, None),
    ("forget", "sparse-unlearn", {"mode": "prune", "ratio": 0.5, "then": "random-label"}, None),
    ("forget", "scrub", None, None),
    ("forget", "bad-teacher", None, None),
    ("forget", "boundary", None, None),
    ("forget", "boundary", {"mode": "expand"}, None),
    ("forget", "fisher-noise", None, {"alpha": 0.0, "reset": False}),
    ("forget", "influence", None, {"alpha": 0.0}),
    ("forget", "influence", {"solver": "sherman-morrison", "samples": 30, "damping": 0.1}, {"alpha": 0.0}),
    ("forget", "iau", None, None),
    ("forget", "newton", None, {"iterations": 0}),
    ("forget", "acu", None, None),
    ("forget", "sisa", None, None),
    ("forget", "s3t", None, None),
    ("forget", "dmm", None, None),
    ("forget", "laf", None, None),
    ("forget", "blindspot-regression", None, None),
    ("forget", "gaussian-amnesiac", None, None),
    ("forget", "gs-lora", {"rank": 2}, {"threshold": 1e9}),
    ("forget", "concept-poison-unlearn", None, None),
    (
        "forget",
        "auto",
        {"candidates": ["ssd", "random-label"], "references": 2},
        {"candidates": [{"ssd": {"selection": 1e30}}], "otherwise": "nothing"},
    ),
    ("measure", "accuracy", None, None),
    ("measure", "forgetting", None, None),
    ("measure", "membership", None, None),
    ("measure", "bytes", None, None),
    ("measure", "stability-gap", {"every": 2}, None),
    ("measure", "transfer", None, None),
    ("measure", "probe-forgetting", None, None),
    ("measure", "loss", None, None),
    ("measure", "llm-cl-survey", None, None),
    ("measure", "flops", None, None),
    ("measure", "corrective-unlearning", {"size": 2}, None),
    ("measure", "worst-case-forget", None, None),
    ("measure", "open-problems-unlearning", None, None),
    ("measure", "cfsl-instance", None, None),
    ("measure", "nevis", None, None),
)
#: Networks for parts that the usual one does not suit.
MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("keep", "sefe"): {"model": lambda: add_low_rank(mlp(64, [16], dropout=0.1), ["body.1"], 4, 8.0, 0)},
    ("forget", "s3t"): {"model": lambda: mlp(64, [16] * 4)},  # a layer for every slice
    ("learn", "mvp-siblurry"): {"model": lambda: vit(64, patch=4, width=16, depth=2, heads=2, ratio=2, pool="token")},
}


def test_every_part_has_a_row():
    ours = {
        (part.verb, part.slug) for part in catalogue.PARTS if part.kind != "schedule"
    }  # which is a function of a step
    assert {(verb, slug) for verb, slug, _, _ in ROWS} == ours


@pytest.mark.parametrize(("verb", "slug", "knobs", "inert"), ROWS, ids=[f"{verb}/{slug}" for verb, slug, *_ in ROWS])
def test_contract(verb, slug, knobs, inert):
    ran = check(f"{verb}/{slug}", knobs, inert=inert, **MODELS.get((verb, slug), {}))
    role = next(r for r in RULES if issubclass(catalogue.find(verb, slug).load(), r))
    expected = [rule.__name__.removeprefix("_") for rule in (*EVERY, *RULES[role])]
    with_strength = inert is not None or slug in (
        "ewc",
        "l2",
        "lwf",
        "feature-distill",
        "gradient-restriction",
        "si",
        "mas",
        "task-free-mas",
        "sefe",
    )
    assert ran == [name for name in expected if with_strength or name != "strength_0_changes_nothing"]


# ------------------------------------------------------------------------------------------------ parts that break a rule


@dataclass
class Undocumented(Keeper):
    """Does something."""


@dataclass
class Wordless(Keeper):
    """L2 toward zero.

        L + strength * |theta|^2

    Pick it never. Needs: nothing. Reference: none.
    """

    strength: float = 0.1


@dataclass
class Unwritable(Keeper):
    sizes: tuple[int, ...] = knob((1, 2), "a tuple, which JSON gives back as a list")


@dataclass
class Unchecked(Keeper):
    share: float = knob(0.5, "a share", low=0, high=1)

    def __post_init__(self) -> None:
        """Forgets to check its knobs."""


@dataclass
class Failing(Where):
    def begin(self, u):
        raise ZeroDivisionError("oh")


_count = itertools.count()


@dataclass
class Moody(Learner):
    def objective(self, u, batch):
        return (1 + next(_count)) * super().objective(u, batch)


@dataclass
class Forgetful(Keeper):
    """Counts its steps, pulls harder with each, and saves nothing."""

    def setup(self) -> None:
        self.steps = 0

    def loss(self, u, batch):
        self.steps += 1
        return 1e-4 * self.steps * sum(p.square().sum() for p in u.parameters.values())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@dataclass
class Leaking(Keeper):
    how: str = knob("seed", "what it touches", choices=("seed", "filters", "python", "threads"))

    def end(self, u):
        if self.how == "seed":
            torch.rand(1)
        elif self.how == "filters":
            warnings.simplefilter("ignore", category=BytesWarning)
        elif self.how == "python":
            import random

            random.random()
        else:
            torch.set_num_threads(torch.get_num_threads() + 1)


@dataclass
class Never0(Keeper):
    strength: float = knob(1.0, "weight of the pull", low=0)

    inert = False

    def loss(self, u, batch):
        return (self.strength + 1e-3) * sum(p.square().sum() for p in u.parameters.values())


@dataclass
class Weightless(Keeper):
    def setup(self) -> None:
        self.buffer = Buffer(None, 5, "class-balanced")

    def end(self, u):
        for batch in u.batches(u.data("task")):
            self.buffer.add(batch, u.rng("weightless"))

    def bytes(self) -> int:
        return 0


@dataclass
class Clinging(Weightless):
    """Its purge drops nothing."""

    def bytes(self) -> int:
        return self.buffer.bytes()

    def purge(self, ids):
        pass


@dataclass
class Silent(Weightless):
    """Stores examples and does not own up to it."""

    def bytes(self) -> int:
        return self.buffer.bytes()

    def holds(self, ids):
        return Ids()


@dataclass
class Boasting(Keeper):
    def holds(self, ids):
        return ids


@dataclass
class TeachingBack(Keeper):
    """Pulls the weights back to where they were before the forget."""

    truthful: bool = knob(False, "whether the old weights are dropped after a forget")

    def setup(self) -> None:
        self.old: dict[str, torch.Tensor] = {}

    def end(self, u):
        if u.kind == "learn":
            self.old = {name: p.detach().clone() for name, p in u.parameters.items()}

    def gradient(self, u):
        for name, old in self.old.items():
            p = u.parameters[name]
            p.grad[: len(old)] += p.detach()[: len(old)] - old

    def forgot(self, u, ids):
        if self.truthful:
            self.old = {}


@dataclass
class StaleEWC(EWC):
    """Keeps Fisher and anchor of the weights that held the forgotten."""

    def forgot(self, u, ids):
        pass


@dataclass
class Lying(Forgetter):
    """Retrains with another seed, and calls the result equal."""

    def forget(self, u, request):
        return Outcome(exact=True, model=u.retrain(u.data("forget").ids, u.seed + 1))


@dataclass
class Nowhere(Metric):
    def value(self, c):
        return {"nowhere": float("nan")}


@dataclass
class Meddling(Metric):
    """Moves what it measures."""

    every: int = knob(1, "steps between looks", low=1)

    def value(self, c):
        with torch.no_grad():
            c.model.head.bias += 1e-3
        return {"bias": float(c.model.head.bias.detach().mean())}


@dataclass
class Hoarding(Benchmark):
    def setup(self) -> None:
        self.kept = torch.zeros(3)


@pytest.mark.parametrize(
    ("cls", "rule", "knobs", "says"),
    [
        (Undocumented, "documented", {}, "formula"),
        (Wordless, "documented", {}, "strength"),
        (Unwritable, "can_be_written_down", {}, "JSON"),
        (Unchecked, "wrong_knobs_are_refused", {}, "share"),
        (Failing, "runs", {}, "ZeroDivisionError: oh"),
        (Moody, "twice_the_same", {}, "run twice"),
        (Forgetful, "survives_a_crash", {}, "state_dict"),
        (Leaking, "touches_nothing_global", {}, "torch's random numbers"),
        (Leaking, "touches_nothing_global", {"how": "filters"}, "warnings filters"),
        (Leaking, "touches_nothing_global", {"how": "python"}, "Python's random numbers"),
        (Leaking, "touches_nothing_global", {"how": "threads"}, "threads"),
        (Never0, "strength_0_changes_nothing", {}, "other weights"),
        (Weightless, "counts_its_bytes", {}, "says 0 bytes"),
        (Silent, "says_what_it_holds", {}, "no example"),
        (Boasting, "says_what_it_holds", {}, "never saw"),
        (Clinging, "lets_go", {}, "purge"),
        (TeachingBack, "does_not_teach_back", {}, "one task later"),
        (StaleEWC, "does_not_teach_back", {}, "one task later"),
        (Lying, "says_what_is_true", {}, "other weights"),
        (Nowhere, "gives_figures", {}, "nowhere"),
        (Hoarding, "remembers_nothing", {}, "remembers something"),
        (Meddling, "looks_without_a_trace", {}, "moves the weights"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_broken_part_is_caught(cls, rule, knobs, says):
    threads, filters = torch.get_num_threads(), list(warnings.filters)
    try:
        with pytest.raises(ContractError, match=says) as caught:
            check(cls, knobs, rules=[rule])
    finally:
        torch.set_num_threads(threads)
        warnings.filters[:] = filters  # type: ignore[index]
    assert caught.value.rule == rule and str(caught.value).startswith(f"{rule}: {cls.__name__}")


def test_a_copy_that_is_dropped_after_a_forget_teaches_nothing_back():
    assert check(TeachingBack, {"truthful": True}, rules=["does_not_teach_back"]) == ["does_not_teach_back"]


def test_learning_from_nan_is_caught(monkeypatch):
    """The life refuses NaN; were it not to, the rule would say so."""
    assert check("keep/l2", rules=["nan_is_refused"]) == ["nan_is_refused"]
    monkeypatch.setattr(Examples, "check", lambda self: None)
    with pytest.raises(ContractError, match="nan_is_refused"):
        check("keep/l2", rules=["nan_is_refused"])


def test_every_rule_has_a_part_that_breaks_it():
    """Or a test of its own, above."""
    caught = {mark.args[1][i][1] for mark in test_a_broken_part_is_caught.pytestmark for i in range(len(mark.args[1]))}
    rules = {rule.__name__.removeprefix("_") for rule in (*EVERY, *(r for rs in RULES.values() for r in rs))}
    assert rules - caught == {"nan_is_refused"}


def test_names_and_classes():
    assert check("ewc", rules=["documented"]) == ["documented"]
    assert check(catalogue.find("keep", "ewc"), rules=["documented"]) == ["documented"]
    assert check(catalogue.find("keep", "ewc").load(), rules=["documented"]) == ["documented"]
    with pytest.raises(UnknownName, match="ewc"):
        check("ewk")
    with pytest.raises(UnknownName, match="documented"):
        check("ewc", rules=["documentd"])
    with pytest.raises(BadInput, match="Keeper"):
        check(int)
