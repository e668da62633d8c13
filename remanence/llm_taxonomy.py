"""The catalogue in the words of a survey on the continual learning of large language models. Data only.

Shi et al. 2025, "Continual Learning of Large Language Models: A Comprehensive Survey", ACM Computing Surveys, arXiv 2404.16789. Down the
vertical axis every stage has narrower data than the one before; along the horizontal one a stage goes on through time and domains.

Drawn from what the survey is known to say, not read again. Which stage a method is tagged with is that of its own paper; what knows nothing
about texts, and can stand in any, has all three. `isolation`, choosing which weights may move, is our word beside the survey's.
"""

from __future__ import annotations

from typing import NamedTuple

from remanence.core.part import Part

#: The stages of the vertical axis, in order.
STAGES = {
    "CPT": "continual pre-training: the next token of general texts, of newer ones or of another language",
    "DAP": "domain-adaptive pre-training: the next token of texts of one domain",
    "CFT": "continual fine-tuning: examples of tasks, one after the other",
}
#: Of the stage CFT.
SETTINGS = ("general", "instruction tuning", "model refinement", "alignment", "multimodal")
TECHNIQUES = (
    "replay",
    "regularisation/parameters",
    "regularisation/function",
    "architecture/adapters",
    "architecture/experts",
    "architecture/expansion",
    "architecture/isolation",
    "other",
)
#: What a stream for pre-training changes in.
SHIFTS = {
    "language": "another natural or programming language",
    "content": "another domain",
    "temporal": "the same sources, later",
}
#: Of our own streams, by the name of the `Stream`; slices in a random order shift in nothing.
SHIFT_OF = {"vertical": "content", "horizontal, chronological": "temporal"}
SCENARIOS = {
    "TIL": "task-incremental: the task is known when asked",
    "DIL": "domain-incremental: the same answers, other inputs",
    "CIL": "class-incremental: new answers, and the task is not known when asked",
    "online": "every example comes once",
    "offline": "a stage is gone over as often as one likes",
}
#: The verbs whose parts the survey speaks of.
VERBS = ("learn", "keep", "where")
#: What a text has none of: a part that needs one of these is for other problems.
UNFIT = ("class-head", "one-answer", "regression")

_ALL = tuple(STAGES)
_CPT, _DAP, _CFT = (("CPT",), ("DAP",), ("CFT",))


class Tag(NamedTuple):
    """The stages, the settings within fine-tuning (none where that is no stage of it), and by what a method works."""

    stages: tuple[str, ...]
    settings: tuple[str, ...]
    techniques: tuple[str, ...]


#: By family, where `TAGS` has no line of the part's own.
FAMILIES: dict[str, tuple[str, ...]] = {
    "baseline": ("other",),
    "regularisation": ("regularisation/parameters",),
    "distillation": ("regularisation/function",),
    "replay": ("replay",),
    "projection": ("other",),
    "schedule": ("other",),
    "weight-averaging": ("other",),
    "merging": ("other",),
    "data-recipe": ("other",),
    "adapter": ("architecture/adapters",),
    "mask": ("architecture/isolation",),
    "gradient-masking": ("architecture/isolation",),
    "parameter-isolation": ("architecture/isolation",),
    "sparse-delta": ("architecture/isolation",),
}
#: By slug: methods whose own paper is about language models.
TAGS: dict[str, Tag] = {
    "infinite-lr": Tag(_CPT, (), ("other",)),
    "cpt-rewarm-replay": Tag(_CPT, (), ("replay", "other")),
    "stability-gap-cpt": Tag(_DAP, (), ("replay", "other")),
    "dmt": Tag(_CFT, ("instruction tuning",), ("replay", "other")),
    "lt-sft": Tag(_CFT, ("general",), ("architecture/isolation",)),
    "gere": Tag(_CFT, ("instruction tuning",), ("replay", "regularisation/function")),
    "i-lora": Tag(_CFT, ("instruction tuning",), ("replay", "regularisation/function", "architecture/adapters")),
    "lcia": Tag(_CFT, ("instruction tuning", "multimodal"), ("other",)),
    "migu": Tag(_CFT, ("general", "instruction tuning"), ("architecture/isolation",)),
    "sefe": Tag(_CFT, ("instruction tuning", "multimodal"), ("regularisation/parameters", "architecture/adapters")),
    "ama": Tag(_CFT, ("alignment",), ("other",)),
    "lines": Tag(_CFT, ("general",), ("other",)),
    "hft": Tag(_CFT, ("instruction tuning", "alignment"), ("architecture/isolation",)),
    "lora": Tag(("DAP", "CFT"), ("general", "instruction tuning"), ("architecture/adapters",)),
    "loramoe": Tag(_CFT, ("instruction tuning",), ("architecture/adapters", "architecture/experts")),
    "mora-cl": Tag(_CFT, ("general",), ("architecture/adapters", "architecture/experts", "architecture/expansion")),
    "kore": Tag(_CFT, ("model refinement", "multimodal"), ("architecture/adapters",)),
}
_NEEDS = {"stores-examples": "old data", "old-data": "old data", "borders": "boundaries", "task-id": "task id"}


def fits(part: Part) -> bool:
    """Whether a causal language model has what the part needs, and the part takes part in learning."""
    return part.verb in VERBS and not set(UNFIT) & set(part.needs)


def of(part: Part) -> Tag | None:
    """The part's tag; None where it does not fit, or where nobody has placed it or its family."""
    if not fits(part):
        return None
    techniques = FAMILIES.get(part.family)
    return TAGS.get(part.slug) or (None if techniques is None else Tag(_ALL, ("general",), techniques))


def needs(part: Part) -> list[str]:
    """What the part asks for, in the survey's words: ``old data``, ``task id``, ``boundaries``."""
    return sorted({_NEEDS[need] for need in part.needs if need in _NEEDS})
