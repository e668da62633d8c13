"""The families of the catalogue in the words of two surveys, and our streams in the names of their scenarios. Data only.

Wang et al. 2024, "A Comprehensive Survey of Continual Learning", TPAMI, arXiv 2302.00487: five families of methods, by what they work on.
Parisi et al. 2019, "Continual Lifelong Learning with Neural Networks: A Review", Neural Networks 113, arXiv 1802.07569: three, of its time.

Both are drawn from what the surveys are known to say, not read again. A family of ours is coarser than a method: it is placed by what most of
its members do. What neither survey has a place for (plain training, joint training) is `OUTSIDE`.
"""

from __future__ import annotations

from typing import NamedTuple

from remanence.core.part import Part

OUTSIDE = "outside"

WANG = ("regularization", "replay", "optimization", "representation", "architecture", OUTSIDE)
PARISI = ("regularization", "dynamic architectures", "complementary learning systems and replay", OUTSIDE)
NAMES = {"wang": WANG, "parisi": PARISI}
#: The verbs whose parts the surveys speak of.
VERBS = ("learn", "keep", "where")

_REGULAR, _DYNAMIC, _REPLAY, _ = PARISI


class Place(NamedTuple):
    """Where a family stands: Wang's family, his word for its kind, and Parisi's family."""

    wang: str
    kind: str
    parisi: str


FAMILIES: dict[str, Place] = {
    "baseline": Place(OUTSIDE, "", OUTSIDE),
    # what is penalised
    "regularisation": Place("regularization", "weight", _REGULAR),
    "distillation": Place("regularization", "function", _REGULAR),
    "bayesian": Place("regularization", "weight", _REGULAR),
    # what comes back
    "replay": Place("replay", "experience", _REPLAY),
    "data-recipe": Place("replay", "experience", _REPLAY),
    "contrastive-replay": Place("replay", "experience", _REPLAY),
    # how a step is made
    "projection": Place("optimization", "gradient projection", _REGULAR),
    "gradient-masking": Place("optimization", "gradient projection", _REGULAR),
    "schedule": Place("optimization", "loss landscape", _REGULAR),
    "weight-averaging": Place("optimization", "loss landscape", _REGULAR),
    # what is represented
    "prototype": Place("representation", "pretraining", _REPLAY),
    "analytic": Place("representation", "pretraining", OUTSIDE),
    "vector-quantization": Place("representation", "pretraining", _DYNAMIC),
    "semantic-targets": Place("representation", "pretraining", OUTSIDE),
    "prompt": Place("representation", "prompts and adapters", _DYNAMIC),
    "adapter": Place("representation", "prompts and adapters", _DYNAMIC),
    # which weights there are, and whose
    "sharded": Place("architecture", "modular networks", _DYNAMIC),
    "sparse-delta": Place("architecture", "parameter allocation", _DYNAMIC),
    "mask": Place("architecture", "parameter allocation", _DYNAMIC),
    "parameter-isolation": Place("architecture", "parameter allocation", _DYNAMIC),
    "sparse-architecture": Place("architecture", "parameter allocation", _DYNAMIC),
}


def of(part: Part) -> dict[str, str]:
    """``{"wang": ..., "wang_kind": ..., "parisi": ...}`` of a part that learns, keeps or says where; empty for others and for families
    that nobody has placed."""
    place = FAMILIES.get(part.family)
    if part.verb not in VERBS or place is None:
        return {}
    kind = {"wang_kind": place.kind} if place.kind else {}
    return {"wang": place.wang, **kind, "parisi": place.parisi}


#: The scenarios of Wang et al. by their letters.
SCENARIOS = {
    "IIL": "instance-incremental: the same classes, more examples of them",
    "DIL": "domain-incremental: the same classes, other inputs; which task it is need not be known",
    "TIL": "task-incremental: new classes, and the task is known when asked",
    "CIL": "class-incremental: new classes, and the task is known in training only",
    "TFCL": "task-free: new classes, and the task is never known",
    "OCL": "online: every example comes once (by the settings of the run: epochs=1)",
    "BBCL": "blurred boundaries: classes of one task come in others, too",
    "CPT": "continual pretraining",
}


def scenarios(scenario: str, borders: bool, classes: list[set[int]]) -> list[str]:
    """The letters that fit a stream: its `scenario`, whether it tells its borders, and the classes of each task."""
    seen: set[int] = set()
    blurred = False
    for task in classes:
        blurred |= bool(task & seen)
        seen |= task
    if scenario == "task":
        found = ["TIL"]
    elif scenario == "domain":
        found = ["DIL"]
    elif len(classes) > 1 and classes[0] and all(task == classes[0] for task in classes):
        return ["IIL"]
    elif scenario == "class":
        found = ["BBCL"] if blurred else ["CIL"]
    else:
        found = []
    return found if borders else [*found, "TFCL"]
