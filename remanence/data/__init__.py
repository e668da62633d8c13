"""Examples, tasks, streams and requests; loaders for users' own data."""

from remanence.data.cifar import cifar10, cifar100
from remanence.data.corrupted import corrupted, stamp
from remanence.data.degraded import label_noise, long_tail
from remanence.data.digits import digits, idx, read_idx, split_classes, split_digits, split_idx
from remanence.data.examples import Examples, cat, cat_batches
from remanence.data.few_shot import few_shot
from remanence.data.folders import images
from remanence.data.gather import dataset, huggingface
from remanence.data.instances import instance_incremental
from remanence.data.language_streams import horizontal, vertical
from remanence.data.mapped import memmap
from remanence.data.nevis import dated
from remanence.data.omniglot import omniglot
from remanence.data.people import general_text, people, people_stream
from remanence.data.recurring import power_law, recurring, si_blurry
from remanence.data.request import Request
from remanence.data.stream import Stream, Task
from remanence.data.styles import dialogues, styled
from remanence.data.tables import csv, npz
from remanence.data.text import iterate, text, text_stream
from remanence.data.tokenizers import bpe, byte_tokens
from remanence.data.tokens import corpus, tokenised
from remanence.data.transformed import blurry, permuted, rotated
from remanence.data.unlearning_sets import muse, rwku, tofu, wmdp
from remanence.data.vision import core50, core50_stream, imagenet_r, tiny_imagenet

__all__ = [
    "Examples",
    "Request",
    "Stream",
    "Task",
    "blurry",
    "bpe",
    "byte_tokens",
    "cat",
    "cat_batches",
    "cifar10",
    "cifar100",
    "core50",
    "core50_stream",
    "corpus",
    "corrupted",
    "csv",
    "dataset",
    "dated",
    "dialogues",
    "digits",
    "few_shot",
    "general_text",
    "horizontal",
    "huggingface",
    "idx",
    "imagenet_r",
    "images",
    "instance_incremental",
    "iterate",
    "label_noise",
    "long_tail",
    "memmap",
    "muse",
    "npz",
    "omniglot",
    "people",
    "people_stream",
    "permuted",
    "power_law",
    "read_idx",
    "recurring",
    "rotated",
    "rwku",
    "si_blurry",
    "split_classes",
    "split_digits",
    "split_idx",
    "stamp",
    "styled",
    "text",
    "text_stream",
    "tiny_imagenet",
    "tofu",
    "wmdp",
    "tokenised",
    "vertical",
]
