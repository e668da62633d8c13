"""Streams that a plan can name; the keyword arguments of each are its knobs."""

from __future__ import annotations

from collections.abc import Callable

from remanence.data.digits import split_digits, split_idx
from remanence.data.stream import Stream

STREAMS: dict[str, Callable[..., Stream]] = {"split-digits": split_digits, "split-idx": split_idx}
