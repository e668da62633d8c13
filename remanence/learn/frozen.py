"""What learners that read a network's features, and do not train it in the event, share."""

from __future__ import annotations

import torch

from remanence.core.errors import BadInput
from remanence.core.problem import Classification
from remanence.data import Examples
from remanence.nn.ridge import steady_features
from remanence.train.update import Context, Update


def check_labels(u: Update, slug: str) -> None:
    """
    Raises:
        BadInput: the problem has no classes.
    """
    if not isinstance(u.problem, Classification):
        raise BadInput(f"{slug} needs classes, and a {type(u.problem).__name__.lower()} has none")


def check_alone(u: Update, slug: str) -> None:
    """
    Raises:
        BadInput: a part of the event could only act in training, and nothing is trained.
    """
    acting = [part.slug for part in u.parts if not part.inert]
    if acting:
        raise BadInput(f"{slug} trains no network in this event, so {', '.join(acting)} cannot act; leave it out")


@torch.no_grad()
def featured(c: Context, examples: Examples) -> Examples:
    """`examples` with the head's input, in eval mode, for their `x` (N, D); the same bits for a row in whatever company."""
    found = [steady_features(c.model, batch["x"]) for batch in c.batches(examples)]
    return Examples({"x": torch.cat(found), "y": examples["y"].to(c.device)}, examples.source, examples.id)
