"""The training loop on text against bare loops and the Trainer of transformers: a Llama of a million weights.

    python -m bench.lm [--rounds 9]

A run is one epoch of AdamW (fused) over preloaded tokens: short answers to prompts in rows of 20 to 40 tokens, padded to the longest of
their batch; or full rows of 128 of which every token is a target. The first bare loop is what most people write: the model's logits at
all places, the loss of transformers' own kind. The second computes the output layer at the targets alone, as ours does, and must end in
the same bits as ours, or the benchmark stops.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import Row, Run, Side, interleave, ratio_row, save, seconds
from remanence.core.problem import CausalLM
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.learn.finetune import Finetune
from remanence.models.language import llama
from remanence.train.loop import learn
from remanence.train.settings import Settings
from remanence.train.update import Update

VOCAB, CONTEXT, LR = 1024, 128, 1e-3
Ends = dict[str, nn.Module]


def network() -> Any:
    return llama(VOCAB, hidden=128, layers=4, heads=4, context=CONTEXT).train()


def rows(shortest: int, longest: int, count: int, answers: bool) -> Examples:
    """`count` rows of random tokens in `CONTEXT` places, as a life's text has them; of a prompt's row the last third is to be predicted."""
    rng = generator(0, "bench", longest)
    lengths = torch.randint(shortest, longest + 1, (count, 1), generator=rng)
    places = torch.arange(CONTEXT)
    mask = places < lengths
    ids = torch.where(mask, torch.randint(1, VOCAB, (count, CONTEXT), generator=rng), 0).to(torch.int32)
    target = mask & (places >= lengths * 2 // 3) if answers else mask
    columns = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(target, ids, -100)}
    return Examples(columns, "bench", torch.arange(count))


def ours(data: Examples, batch_size: int, ends: Ends | None = None, **settings: Any) -> Side:
    def prepare() -> Run:
        u = Update(model=network(), problem=CausalLM(context=CONTEXT), owner=Finetune(), data=lambda _: data,
                   settings=Settings(epochs=1, batch_size=batch_size, lr=LR, **settings))  # fmt: skip

        def run() -> None:
            learn(u)
            if ends is not None:
                ends["ours"] = u.model

        return run

    return prepare


def batches(data: Examples, batch_size: int) -> list[Tensor]:
    return list(torch.randperm(len(data), generator=generator(0, "learn/0", "", "order", 0)).split(batch_size))


def everywhere(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss from the logits at all places."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def at_targets(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss from the logits at the targets alone."""
    wanted = labels[:, 1:]
    chosen = (wanted != -100).nonzero(as_tuple=True)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[chosen]), wanted[chosen])


def bare(
    data: Examples, batch_size: int, loss: Callable[[Any, Tensor, Tensor], Tensor], ends: Ends | None = None
) -> Side:
    """The bare loop: whole tensors, one gather per batch, cut to its longest row."""

    def prepare() -> Run:
        model = network()
        ids, labels = data["input_ids"].long(), data["labels"].long()
        lengths = data["attention_mask"].sum(1)

        def run() -> None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
            for chosen in batches(data, batch_size):
                longest = int(lengths[chosen].max())
                optimizer.zero_grad()
                loss(model, ids[chosen, :longest], labels[chosen, :longest]).backward()
                optimizer.step()
            if ends is not None:
                ends["bare"] = model

        return run

    return prepare


def by_trainer(data: Examples, batch_size: int, folder: Path) -> Side:
    """The same batches through `transformers.Trainer`, which logs and saves nothing."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Ordered(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(order)

    order = torch.cat(batches(data, batch_size)).tolist()
    lengths = data["attention_mask"].sum(1)

    def collated(chosen: list[int]) -> dict[str, Tensor]:
        longest = int(lengths[chosen].max())
        return {name: data[name][chosen, :longest].long() for name in ("input_ids", "attention_mask", "labels")}

    def prepare() -> Run:
        arguments = TrainingArguments(
            output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=batch_size, learning_rate=LR, weight_decay=0.01,
            lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=0.0, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Ordered(model=network(), args=arguments, train_dataset=order, data_collator=collated)
        trainer.remove_callback(PrinterCallback)

        def run() -> None:
            trainer.train()

        return run

    return prepare


def same(ends: Ends) -> None:
    """Stop if the two sides did not compute the same."""
    a, b = (ends[side].state_dict() for side in ("ours", "bare"))
    if any(not torch.equal(a[name], b[name]) for name in a):
        raise SystemExit("the two sides end in different weights, so their times mean nothing")


def rows_of(on: str, data: Examples, batch_size: int, rounds: int, folder: Path) -> list[Row]:
    ends: Ends = {}
    sides = {
        "ours": ours(data, batch_size, ends),
        "all places": bare(data, batch_size, everywhere),
        "targets": bare(data, batch_size, at_targets, ends),
        "trainer": by_trainer(data, batch_size, folder),
        "twice": ours(data, batch_size, checkpointing=True),
    }
    t = interleave(sides, rounds)
    same(ends)
    tokens = int(data["attention_mask"].sum())
    speed = ", ".join(f"{name} {tokens / seconds(times)[1] / 1e3:.1f}k" for name, times in t.items())
    limit = round(1 / 0.95, 3)
    return [
        ratio_row("text, against a bare loop with logits at all places", on, t["ours"], t["all places"], limit, f"tokens/s: {speed}"),
        ratio_row("text, against a bare loop with logits at the targets", on, t["ours"], t["targets"], limit),
        ratio_row("text, against transformers' Trainer", on, t["ours"], t["trainer"], 1.0),
        ratio_row("text, activations computed twice, against once", on, t["twice"], t["ours"]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = rows_of("answers", rows(20, 40, 256, True), 16, rounds, Path(folder))
        found += rows_of("full rows", rows(CONTEXT, CONTEXT, 64, False), 8, rounds, Path(folder))
    text = (
        "Ours over others: a Llama of four blocks, width 128, 1,024 tokens (0.9 million weights), AdamW, one epoch; *answers*: 256 rows of 20 "
        "to 40 tokens, batch 16, the last third of each to be predicted; *full rows*: 64 rows of 128 tokens, batch 8. All loops see the same "
        "batches, cut to their longest row."
    )
    save("lm", "The training loop on text", text, found, rounds=rounds, lr=LR)


if __name__ == "__main__":
    main()
