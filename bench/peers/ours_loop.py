"""Our side of the comparison with peers, spoken to like theirs: a method per line in, seconds of the whole events out."""

from __future__ import annotations

import gc
import json
import sys

import torch

from bench.common import streams, timed
from bench.loop import BATCH, EWC, REPLAY, ours

KEEP = {
    "naive": (),
    "replay": REPLAY,
    "ewc": EWC,
    "ewc-online": EWC,
    "lwf": {"lwf": {"strength": 1.0, "temperature": 2.0}},
    "si": {"si": {"strength": 0.1, "damping": 0.1}},
    "mas": {"mas": {"strength": 0.01}},
    "agem": {"agem": {"capacity": 200, "batch_size": BATCH}},
}


def main() -> None:
    stream = streams()[sys.argv[1]]
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        run = ours(stream, KEEP[line.strip().partition("+")[0]])()
        gc.collect()
        took = timed(run)
        print(json.dumps({"wall": took.wall, "cpu": took.cpu}), flush=True)


if __name__ == "__main__":
    main()
