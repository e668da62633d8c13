"""Episodes of a few examples at a time, asked about their classes or about the very same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.rng import seed_of
from remanence.data import Examples, Stream, Task
from remanence.data.few_shot import few_shot
from remanence.measure.evidence import interval
from remanence.train.roles import Benchmark

#: A mean over episodes and the half width of its 95 % interval (None for one episode).
Figure = tuple[float, float | None]


class Answer(Protocol):
    """Who takes part: learns the tasks of `stream` in order, then says the label of each row of each of `asked`."""

    def __call__(self, stream: Stream, asked: Sequence[Tensor], seed: int, /) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Scores:
    """`accuracy` (episodes, levels, sets): the share of a set's targets that was answered rightly, by level of corruption."""

    accuracy: Tensor
    levels: tuple[float, ...]

    def mean(self, level: int = 0) -> Figure:
        """At the level of that number, over all sets, which have equally many targets."""
        return interval(self.accuracy[:, level].mean(1).tolist())

    def by_level(self) -> dict[float, Figure]:
        """Accuracy against corruption."""
        return {level: self.mean(number) for number, level in enumerate(self.levels)}

    def by_age(self, level: int = 0) -> list[Figure]:
        """Accuracy against how many sets came after: first the latest set, last the oldest."""
        return [interval(column) for column in self.accuracy[:, level].T.flip(0).tolist()]


@dataclass
class CFSL(Benchmark):
    """Learns a stream of small support sets, once each, and asks afterwards for all of them: fast storage and its retention.

        episode = few_shot(examples, seed e):  sets x (ways x shots) rows to learn, then all targets among all labels
        score = mean over episodes of the share of right answers, +- t_{.975, E-1} s / sqrt(E)

    The class test asks for new rows of the classes, the instance test for the very images, each a label of its own, whole and with a
    share of their pixels lost; see `remanence.data.few_shot`. `run` takes any callable that learns and answers, so that an external
    memory takes part as a life does (`nearest` is the plainest). One learned memory answers all levels. What it is given has support
    rows in the place of the targets, so no target can be learned. With a life:

        def answer(stream, asked, seed):
            with rm.Life(rm.models.mlp(64, [64], seed=seed), learner="nmc", seed=seed) as life:
                for task in stream:
                    life.learn(task, epochs=5)
                return [life.predict(x) for x in asked]

        scores = CFSL(instance=True).run(rm.data.digits(), answer)

    Replay in the paper's sense is a life that keeps by ``replay``.

    Pick it to ask how much of what was seen once is still known, and how exactly. Needs: labels; many classes of few rows for wide
    episodes, such as `remanence.data.omniglot`. Reference: Kowadlo et al. 2022, "Expanding continual few-shot learning benchmarks to
    include recognition of specific instances", arXiv 2209.07863; episodes of Antoniou et al. 2020, arXiv 2004.11967. Deviations:
    nothing is learned before an episode unless `answer` brings it (the paper meta-trains or pretrains on other classes);
    what `few_shot` says of labels; an occluder is told by its share of the pixels, in the released code by its radius r as a share of
    the height (half the side of a box), which is a level of pi r^2 for a circle and of 4 r^2 for a box; noise takes all channels of a
    pixel, there single values.
    """

    sets: int = knob(5, "support sets of an episode, a multiple of interval", low=1)
    interval: int = knob(1, "sets in a row with the same classes", low=1)
    ways: int = knob(5, "classes of a set", low=1)
    shots: int = knob(1, "rows of each class in a set", low=1)
    targets: int = knob(5, "rows of each class and set that are asked in the class test", low=1)
    overwrite: bool = knob(False, "later groups of classes take the labels of earlier ones")
    instance: bool = knob(True, "ask for the learned images themselves, each a label of its own")
    episodes: int = knob(600, "drawn anew, each learned from nothing", low=1)
    corrupt: str = knob("noise", "what the targets suffer", choices=("noise", "circle", "box"))
    levels: list[float] = knob([0.0, 0.3, 0.6, 0.9], "shares of a target's pixels that are lost")

    def episode(self, examples: Examples, number: int, level: float = 0.0, seed: int = 0) -> Stream:
        """Episode `number` of `seed`, with its targets at this level of corruption.

        Raises:
            BadInput: as `remanence.data.few_shot.few_shot`.
        """
        return few_shot(
            examples,
            self.sets,
            self.interval,
            self.ways,
            self.shots,
            self.targets,
            self.overwrite,
            self.instance,
            self.corrupt,
            level,
            seed_of(seed, "episode", number),
        )

    def run(
        self, examples: Examples, answer: Answer, seed: int = 0, told: Callable[[int, int], None] | None = None
    ) -> Scores:
        """The scores of `answer` over all episodes; `told` is called with (episodes done, episodes in all).

        Raises:
            BadInput: no levels; an episode that the examples do not suffice for; answers that are not one label for each row.
        """
        if not self.levels:
            raise BadInput("levels=[] asks nothing; give [0] to ask without corruption")
        found = torch.empty(self.episodes, len(self.levels), self.sets, dtype=torch.float64)
        for number in range(self.episodes):
            levels = [self.episode(examples, number, level, seed) for level in self.levels]
            tests = [[task.test for task in stream] for stream in levels]
            shown = Stream(
                tuple(Task(task.train, task.train, task.classes, task.names, task.id) for task in levels[0]),
                levels[0].scenario,
                name=levels[0].name,
            )
            asked = [torch.cat([test["x"] for test in each]) for each in tests]
            truth = torch.cat([test["y"] for test in tests[0]])
            answers = answer(shown, asked, seed_of(seed, "answer", number))
            if [tuple(each.shape) for each in answers] != [tuple(truth.shape)] * len(asked):
                raise BadInput(
                    f"the answers have shapes {[tuple(each.shape) for each in answers]}; give one label for each of the "
                    f"{len(truth)} rows of each of the {len(asked)} tensors asked"
                )
            for k, each in enumerate(answers):
                found[number, k] = (each.cpu() == truth).double().reshape(self.sets, -1).mean(1)
            if told is not None:
                told(number + 1, self.episodes)
        return Scores(found, tuple(self.levels))


def nearest(stream: Stream, asked: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The memory that keeps every image: the label of the nearest by Euclidean distance of pixels, of equal ones the first."""
    x = torch.cat([task.train["x"] for task in stream]).flatten(1)
    y = torch.cat([task.train["y"] for task in stream])
    return [y[torch.cdist(each.flatten(1), x, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)] for each in asked]
