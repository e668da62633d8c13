"""Keepers in a training script of transformers or TRL: ``rm.protect`` puts them into its trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput, Corrupt
from remanence.core.ids import Ids
from remanence.core.problem import TOKENS, Batch, padded, problem_of
from remanence.data import Examples
from remanence.train.guard import OwnLoop
from remanence.train.loop import _limit
from remanence.train.resolve import check_fits, resolve_all
from remanence.train.roles import Keeper, Where
from remanence.train.schedules import Schedule, schedule_of
from remanence.train.settings import Settings


def protect(
    trainer: Any,
    keep: Any = (),
    *,
    where: Any = (),
    schedule: Any = None,
    seed: int = 0,
    resume: str | Path | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Protected:
    """Put keepers, and limits to where a task may write, into a trainer of a causal language model, before ``trainer.train()``::

        trainer = SFTTrainer(model=model, args=args, train_dataset=second)
        u = rm.protect(trainer, keep=["l2", {"replay": {"policy": "reservoir", "capacity": 500}}], resume="keepers")  # added
        trainer.train()
        u.save("keepers")  # for the next script

    Each call of ``trainer.train`` is a task. The trainer stays the owner of data order, loss, optimizer and checkpoints; evaluation
    and prediction are its own. Keepers edit the gradient before it is clipped, as in our loop. Rows that a keeper adds are part of
    the mean over a batch's targets, and its terms weigh the same whatever ``gradient_accumulation_steps`` is.

    The rows' ids are the whole numbers in a column ``id`` of a `datasets.Dataset`, else row numbers, counted on from task to task; a
    dataset without a length has none, and serves keepers that look at no data. A keeper that asks for the network's answers costs a
    forward of its own; where one weighs rows, the loss is the weighted cross-entropy. Adapters of peft may be there: keepers see the
    parameters that can be trained.

    Args:
        trainer: a ``Trainer`` of transformers, or TRL's ``SFTTrainer``, that has not trained yet; in one process, on one device.
        keep: slugs, ``{slug: knobs}`` or keepers.
        where: in the same way, for instance ``"hft"``. What they freeze is kept out of the optimizer; what they add to the network
            (``"lora"``) is added when the first task begins.
        schedule: of the learning rate, as in a life; None: the trainer's own.
        seed: of the keepers' own draws.
        resume: the folder of `save`, or what `state_dict` gave. Modules that wheres added are there again: then load the weights.
        settings: `Settings` of phases that a keeper runs itself; by default with the trainer's rate and batch size.

    Raises:
        UnknownName, BadInput: a part that does not exist, that needs class heads or to own the data's order; a trainer that has
            trained already, or that works in a way in which keepers could not.
        Corrupt: a state that is damaged, or was saved with other keepers.
    """
    _check(trainer)
    args = trainer.args
    made = Settings(**{"lr": args.learning_rate, "batch_size": args.per_device_train_batch_size, **settings})
    planned = None if schedule is None else schedule_of(schedule)
    if planned is not None and trainer.lr_scheduler is not None:
        raise BadInput("the trainer was given a scheduler of its own; leave it out, or leave out schedule=")
    keepers, wheres = resolve_all("keep", keep, Keeper), resolve_all("where", where, Where)
    problem = problem_of("causal-lm")
    check_fits([*keepers, *wheres], problem)
    u = Protected(trainer, keepers, wheres, problem, seed, made, planned)
    if isinstance(resume, Mapping):
        u.load_state_dict(resume)
    elif resume is not None:
        u.load(resume)
    return u


def _check(trainer: Any) -> None:
    """Refuse what is no trainer, and ways to train in which keepers could not act as they should."""
    if not all(hasattr(trainer, name) for name in ("compute_loss", "training_step", "accelerator", "callback_handler")):
        raise BadInput(f"protect takes a Trainer of transformers or an SFTTrainer of TRL, not {type(trainer).__name__}")
    if isinstance(getattr(trainer.train, "__self__", None), Protected):
        raise BadInput("this trainer is protected already; give all keepers in one call")
    if trainer.state.global_step or trainer.is_in_train:
        raise BadInput("the trainer has trained already; call protect before trainer.train(), or make a new trainer")
    args, model = trainer.args, trainer.model
    inside = str(args.optim).lower()
    refused = {
        "several processes or devices": args.world_size > 1 or args.n_gpu > 1,
        "DeepSpeed or FSDP": trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
        "fp16, whose scaled gradients no keeper can read; use bf16": args.fp16,
        "auto_find_batch_size, which begins a task twice": args.auto_find_batch_size,
        "model_init, which makes another model; give the model": trainer.model_init is not None,
        "optimizers that step inside the backward pass": "lomo" in inside or "layerwise" in inside,
        "prompt tuning, which puts tokens before the text": getattr(
            getattr(model, "active_peft_config", None), "is_prompt_learning", False
        ),
    }
    for what, found in refused.items():
        if found:
            raise BadInput(f"protect does not work with {what}")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise BadInput(
            f"protect is for causal language models, and {type(model).__name__} is none; for other networks there is rm.guard"
        )


class Protected(OwnLoop):
    """The update of a trainer's tasks; made by `protect`."""

    def __init__(
        self,
        trainer: Any,
        keepers: list[Keeper],
        wheres: list[Where],
        problem: Any,
        seed: int,
        settings: Settings,
        schedule: Schedule | None,
    ) -> None:
        super().__init__(trainer.model, None, keepers, problem, seed, settings, wheres)
        self.trainer = trainer
        self._planned, self._built = schedule, trainer.optimizer is None
        self._dataset: _Numbered | None = None
        names = ["train", "training_step", "compute_loss", "get_train_dataloader"]
        names += ["create_scheduler"] if schedule is not None else []
        self._originals: dict[str, Callable[..., Any]] = {name: getattr(trainer, name) for name in names}
        for name in names:
            setattr(trainer, name, getattr(self, name))
        trainer.add_callback(_callback(self))

    # ------------------------------------------------------------------ in place of the trainer's own methods

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's, as a task from border to border."""
        if resume_from_checkpoint:
            raise BadInput(
                "a protected task cannot go on from a checkpoint in its middle: keepers looked at the network when it began; "
                "train it from its beginning"
            )
        dataset = self.trainer.train_dataset
        streamed = isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__")
        self._dataset = None if streamed else _numbered(dataset, self.ids)
        with self._between_borders([], None, Ids() if self._dataset is None else self._dataset.ids), self._limits():
            return self._originals["train"](resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The trainer's, whose batches have a column ``id`` while a task is open."""
        if not self._open or self._dataset is None:
            return self._originals["get_train_dataloader"]()
        trainer, dataset, rest = self.trainer, self._dataset, self._collated()
        trainer._set_signature_columns_if_needed()
        before = trainer.train_dataset, trainer.data_collator, trainer._signature_columns
        trainer.train_dataset, trainer.data_collator = _Numbered(rest.rows, dataset.id), _Collator(rest.collate)
        trainer._signature_columns = [*before[2], "id"]
        try:
            return self._originals["get_train_dataloader"]()
        finally:
            trainer.train_dataset, trainer.data_collator, trainer._signature_columns = before

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule as torch's scheduler."""
        planned, start = self._planned, self.life_step
        assert planned is not None
        self.trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.trainer.optimizer, lambda step: planned.factor(step, num_training_steps, start)
        )
        self.trainer._created_lr_scheduler = True
        return self.trainer.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss of the batch with the keepers' rows, and the keepers' terms; outside training the trainer's."""
        original = self._originals["compute_loss"]
        if not (self._open and model.training and torch.is_grad_enabled()):
            return original(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        inputs = dict(inputs)
        given = _ours(inputs, inputs.pop("id", None))
        batch = self.prepare(given)
        scaled = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (self.trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
                self.trainer.compute_loss_func is not None
            )
        # A loss that is a share of all targets of the step is not divided by the number of batches any more.
        share = 1 / self.trainer.current_gradient_accumulation_steps if scaled else 1.0
        if "weight" in batch:
            part = _count(given) / num_items_in_batch if scaled and num_items_in_batch is not None else share
            found = self._weighted(batch) * part
        else:
            if any(batch[name] is not given[name] for name in TOKENS):
                inputs = _theirs(inputs, batch)
                if num_items_in_batch is not None:  # of all batches of this step; this one keeps its share of them
                    num_items_in_batch = num_items_in_batch * (_count(batch) / _count(given))
            found = original(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        terms = [term for term in (hook(self, batch) for hook in self._do.loss) if term is not None]
        if not terms:
            return found
        extra = share * sum(terms)
        return (found[0] + extra, found[1]) if return_outputs else found + extra

    def _weighted(self, batch: Batch) -> Tensor:
        """The loss of rows that a keeper weighs: no trainer's own knows weights, so it must be the plain one."""
        trainer = self.trainer
        special = trainer.compute_loss_func is not None or getattr(trainer, "aux_loss_enabled", False)
        if special or trainer.label_smoother is not None or getattr(trainer.args, "loss_type", None) == "dft":
            raise BadInput("a keeper weighs the rows of a batch, which works with the plain cross-entropy only")
        return self.problem.loss(self.out(batch), batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's; after the last batch of a step keepers edit the gradient, before it is clipped."""
        loss = self._originals["training_step"](*args, **kwargs)
        if self._open and self.trainer.accelerator.sync_gradients:
            self.lr = float(self.optimizers["main"].param_groups[0]["lr"])
            for gradient in self._do.gradient:
                gradient(self)
            self.before_step(self._do.project)
        return loss

    # ------------------------------------------------------------------ the update

    def reference(self) -> nn.Module:
        return _plain(super().reference())

    def fresh(self, name: str) -> nn.Module:
        return _plain(super().fresh(name))

    @property
    def structures(self) -> list[dict[str, Any]]:
        """What wheres added to this very network, in order: it may have come here through another trainer."""
        found: list[dict[str, Any]] = vars(self.model).setdefault("_remanence_structures", [])
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "structures": list(self.structures)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        wheres = {part.slug: part for part in self.parts if isinstance(part, Where)}
        for entry in state.get("structures", [])[len(self.structures) :]:
            if entry["part"] not in wheres:
                raise Corrupt(
                    f"the state was saved with where={entry['part']!r}, which added modules; give it here, too"
                )
            self._attach(wheres[entry["part"]], entry["structure"])

    def _pick(self, name: str) -> Examples:
        if name != "task" or not self._open or self._dataset is None:
            raise BadInput(
                f"a trainer offers no data {name!r}: it knows 'task' while it trains, if its dataset has a length"
            )
        source = self._collated()
        parts = []
        with torch.random.fork_rng(devices=[]):
            for rows in torch.arange(len(self._dataset)).split(self.settings.batch_size):
                parts.append(self.problem.compact(_ours(source.collate([source.rows[i] for i in rows.tolist()]), rows)))
        width = max(part["labels"].shape[1] for part in parts)
        columns = {name: torch.cat([padded(name, part[name], width) for part in parts]) for name in TOKENS}
        return Examples(columns, "train_dataset", self._dataset.id, positional=self._dataset.positional)

    def _first(self) -> None:
        for part in (part for part in self.parts if isinstance(part, Where) and not part.inert):
            structure = part.structure(self) if hasattr(part, "structure") else None
            if structure:
                self._attach(part, structure)
        super()._first()

    def _attach(self, part: Any, structure: dict[str, Any]) -> None:
        if part.attach(self.model, structure).to(self.device) is not self.trainer.model:
            raise BadInput(f"{part.slug} puts another model in the place of the trainer's; use Life.learn")
        self.structures.append({"part": part.slug, "structure": structure})

    @contextmanager
    def _limits(self) -> Iterator[None]:
        """While the trainer works, what may not move stays out of the optimizer."""
        params = dict(self.model.named_parameters())
        flags = [(p, p.requires_grad) for p in params.values()]
        if self._built and len(self.keepers) < len(self.parts):
            self.trainer.optimizer = None  # of the task before, which other parameters moved in
        try:
            _limit(self, params, None, None)
            self._parameters = {name: p for name, p in params.items() if p.requires_grad}
            yield
        finally:
            self._parameters = None
            for p, flag in flags:
                p.requires_grad_(flag)

    def _collated(self) -> _Collated:
        """The dataset and its collator, both without the columns that the trainer removes."""
        trainer, dataset = self.trainer, self._dataset
        assert dataset is not None
        if hasattr(dataset.rows, "remove_columns"):
            rows = trainer._remove_unused_columns(dataset.rows, description="training")
            return _Collated(rows, trainer.data_collator)
        return _Collated(dataset.rows, trainer._get_collator_with_removed_columns(trainer.data_collator, "training"))

    def _listen(self) -> None:
        """Nothing: the trainer says when it steps."""

    def _deafen(self) -> None:
        """Nothing: no hook of ours is on the optimizer."""


def _callback(u: Protected) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        """Tells the update when the trainer begins, passes an epoch and has stepped."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = u.trainer.optimizer
            while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
                optimizer = optimizer.optimizer
            u.optimizers, u.total, u.epoch = {"main": optimizer}, state.max_steps, -1

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            u.epoch += 1

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            u._after_step()

    return Steps()


# ---------------------------------------------------------------------- data


class _Numbered(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of a dataset with the id of each."""

    def __init__(self, rows: Any, id: Tensor, positional: bool = True) -> None:
        self.rows, self.id, self.positional = rows, id, positional

    @property
    def ids(self) -> Ids:
        return Ids(self.id)

    def __len__(self) -> int:
        return len(self.id)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], "id": int(self.id[row])}

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        many = getattr(self.rows, "__getitems__", None)
        found = many(list(rows)) if many is not None else [self.rows[row] for row in rows]
        return [{**item, "id": int(self.id[row])} for item, row in zip(found, rows, strict=True)]


class _Collator:
    """A collator that leaves the ids to us."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        batch = self.collate([{name: v for name, v in row.items() if name != "id"} for row in features])
        ids = torch.tensor([row["id"] for row in features])
        if len(batch.get("input_ids", ids)) != len(ids) or "cu_seq_lens_q" in batch:
            raise BadInput(
                "the collator puts several documents into one row; use padding_free=False, and no packing or the strategy 'wrapped'"
            )
        mask = batch.get("attention_mask")
        if mask is not None and not bool(mask[:, 0].all()):
            raise BadInput("the batch is padded on the left; set tokenizer.padding_side = 'right'")
        batch["id"] = ids
        return batch


class _Collated:
    """A dataset and what makes a batch of its rows."""

    def __init__(self, rows: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.rows, self.collate = rows, collate


def _numbered(dataset: Any, before: Ids) -> _Numbered:
    """With the ids of the column ``id``, else with row numbers after those of the tasks before."""
    column = dataset["id"] if "id" in (getattr(dataset, "column_names", None) or ()) else None
    own = [] if column is None else list(column)
    if own and all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in own):
        if len(set(own)) < len(own):
            raise BadInput("the dataset's column 'id' names a row twice; every row needs an id of its own")
        return _Numbered(dataset, torch.tensor(own), positional=False)
    start = int(before.array[-1]) + 1 if before else 0
    return _Numbered(dataset, torch.arange(start, start + len(dataset)))


def _ours(inputs: Mapping[str, Any], ids: Tensor | None) -> Batch:
    """A trainer's batch as keepers know it."""
    if not {"input_ids", "labels"} <= inputs.keys():
        raise BadInput(f"the batches of a causal language model have input_ids and labels; these have {sorted(inputs)}")
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    batch = {
        "input_ids": tokens.to(torch.int32),
        "attention_mask": torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(torch.bool),
        "labels": inputs["labels"].to(torch.int32),
    }
    return batch if ids is None else {**batch, "id": ids}


def _theirs(inputs: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """A batch that keepers changed, as the trainer knows it."""
    more = sorted(name for name, value in inputs.items() if isinstance(value, Tensor) and name not in TOKENS)
    if more:
        raise BadInput(f"the batches have columns that old rows lack: {', '.join(more)}; leave them out of the dataset")
    return {**inputs, **{name: batch[name].long() for name in TOKENS}}


def _count(batch: Batch) -> Tensor:
    """How many targets a batch has."""
    return (batch["labels"][:, 1:] != -100).sum().to(torch.float32)


def _plain(model: nn.Module) -> nn.Module:
    """A copy of a network without the forwards that trainers put on it: those of a copy may still call the network itself."""
    for module in model.modules():
        vars(module).pop("forward", None)
    return model
