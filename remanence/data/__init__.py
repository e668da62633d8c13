"""Examples, tasks, streams and requests; loaders for users' own data."""

from remanence.data.corrupted import corrupted, stamp
from remanence.data.degraded import label_noise, long_tail
from remanence.data.digits import digits, idx, read_idx, split_classes, split_digits, split_idx
from remanence.data.examples import Examples, cat, cat_batches
from remanence.data.folders import images
from remanence.data.gather import dataset, huggingface
from remanence.data.mapped import memmap
from remanence.data.recurring import power_law, recurring, si_blurry
from remanence.data.request import Request
from remanence.data.stream import Stream, Task
from remanence.data.tables import csv, npz
from remanence.data.transformed import blurry, permuted, rotated

__all__ = [
    "Examples",
    "Request",
    "Stream",
    "Task",
    "blurry",
    "cat",
    "cat_batches",
    "corrupted",
    "csv",
    "dataset",
    "digits",
    "huggingface",
    "idx",
    "images",
    "label_noise",
    "long_tail",
    "memmap",
    "npz",
    "permuted",
    "power_law",
    "read_idx",
    "recurring",
    "rotated",
    "si_blurry",
    "split_classes",
    "split_digits",
    "split_idx",
    "stamp",
]
