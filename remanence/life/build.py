"""The resolver, under the name by which lives and plans know it."""

from remanence.train.resolve import check_keepers, named, resolve, resolve_all

__all__ = ["check_keepers", "named", "resolve", "resolve_all"]
