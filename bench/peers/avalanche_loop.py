"""avalanche-lib 0.6.0 on the same tensors, network and settings; runs in an environment of its own, spoken to in lines.

    .venv-peers/bin/python bench/peers/avalanche_loop.py DATA.npz        stdin: a method per line; stdout: {"wall", "cpu"}

A method that ends in ``+default`` runs with the evaluator that a strategy gets when none is given: loss and accuracy of every
experience, and a logger that prints.

It pulls a torchvision that is built for another torch and dies when it registers its operators; these are skipped.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import io
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

_register_fake = torch.library.register_fake


def _without_torchvision(op: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(op, str) and op.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(op, *args, **kwargs)


torch.library.register_fake = _without_torchvision
warnings.filterwarnings("ignore")

from avalanche.benchmarks import benchmark_from_datasets  # noqa: E402
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline  # noqa: E402
from avalanche.benchmarks.utils import DataAttribute  # noqa: E402
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset  # noqa: E402
from avalanche.training.plugins import (  # noqa: E402
    AGEMPlugin,
    EvaluationPlugin,
    EWCPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.plugins.evaluation import default_evaluator  # noqa: E402
from avalanche.training.storage_policy import ClassBalancedBuffer  # noqa: E402
from avalanche.training.supervised import Naive  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

LR, BATCH, MEMORY, STRENGTH = 0.1, 64, 200, 100.0


def experiences(path: str) -> tuple[Any, int]:
    """The stream of training experiences, and the width of the inputs."""
    made = []
    with np.load(path) as arrays:
        for number in range(len(arrays.files) // 2):
            x, y = torch.from_numpy(arrays[f"x{number}"]), torch.from_numpy(arrays[f"y{number}"])
            attributes = [
                DataAttribute(y.tolist(), "targets", use_in_getitem=False),
                DataAttribute([0] * len(y), "targets_task_labels", use_in_getitem=True),
            ]
            made.append(TaskAwareSupervisedClassificationDataset([TensorDataset(x, y)], data_attributes=attributes))
    return with_classes_timeline(benchmark_from_datasets(train=made)).train_stream, x.shape[1]


def strategy(method: str, width: int) -> Naive:
    method, _, default = method.partition("+")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    memory = ClassBalancedBuffer(MEMORY, adaptive_size=False, total_num_classes=10)
    plugins: dict[str, Callable[[], Any]] = {
        "replay": lambda: ReplayPlugin(MEMORY, storage_policy=memory),
        "ewc": lambda: EWCPlugin(STRENGTH),
        "ewc-online": lambda: EWCPlugin(STRENGTH, mode="online", decay_factor=1.0),
        "lwf": lambda: LwFPlugin(alpha=1.0, temperature=2.0),
        "si": lambda: SynapticIntelligencePlugin(si_lambda=0.1, eps=0.1),
        "mas": lambda: MASPlugin(lambda_reg=0.01, alpha=0.5),
        "agem": lambda: AGEMPlugin(patterns_per_experience=MEMORY // 5, sample_size=BATCH),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
    return Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        train_epochs=1,
        plugins=[plugins[method]()] if method in plugins else [],
        evaluator=default_evaluator() if default else EvaluationPlugin(),  # else: no metrics, no loggers
    )


def main() -> None:
    warnings.showwarning = lambda *_, **__: None  # some switch themselves on again
    torch.set_num_threads(1)
    stream, width = experiences(sys.argv[1])
    answers, sys.stdout = sys.stdout, io.StringIO()  # loggers keep the stream that they find when they are made
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        made = strategy(line.strip(), width)
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        for experience in stream:
            made.train(experience, num_workers=0)
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(took), file=answers, flush=True)


if __name__ == "__main__":
    main()
