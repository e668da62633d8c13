"""Examples, tasks, streams and requests."""

from remanence.data.digits import digits, idx, read_idx, split_classes, split_digits, split_idx
from remanence.data.examples import Examples, cat, cat_batches
from remanence.data.request import Request
from remanence.data.stream import Stream, Task

__all__ = [
    "Examples",
    "Request",
    "Stream",
    "Task",
    "cat",
    "cat_batches",
    "digits",
    "idx",
    "read_idx",
    "split_classes",
    "split_digits",
    "split_idx",
]
