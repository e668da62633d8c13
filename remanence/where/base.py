"""What wheres share."""

from __future__ import annotations

from remanence.core.problem import CausalLM
from remanence.nn.anatomy import head_name
from remanence.train.update import Update


def head_parameters(u: Update) -> list[str]:
    """The head's parameters: beside adapters it learns, for it may grow. A language model's is a part of what was there, and stays."""
    if isinstance(u.problem, CausalLM):
        return []
    head = head_name(u.model)
    return [name for name in u.parameters if name.rpartition(".")[0] == head]
