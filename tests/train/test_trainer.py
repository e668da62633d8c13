"""`rm.protect` gives the trainers of transformers and TRL the keepers of our loop, and nothing else."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from remanence.core.errors import BadInput, Corrupt
from remanence.core.ids import Ids
from remanence.core.problem import TOKENS, CausalLM, targets
from remanence.data import Examples
from remanence.keep.ewc import EWC
from remanence.keep.l2 import L2
from remanence.keep.replay import Replay
from remanence.learn.finetune import Finetune
from remanence.train.loop import learn
from remanence.train.roles import Keeper
from remanence.train.schedules import Cosine
from remanence.train.settings import Settings
from remanence.train.trainer import Protected
from remanence.train.update import Update
from tests.lm import VOCAB, facts, tiny
from tests.train.helpers import same

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trainers make the folder that they are given."""
    monkeypatch.chdir(tmp_path)


SOME = {"policy": "reservoir", "capacity": 64, "batch_size": 16}


def table(examples: Examples, id: bool = False) -> Any:
    """As a `datasets.Dataset`, padded as it is."""
    columns = {name: examples[name].long().tolist() for name in TOKENS}
    return datasets.Dataset.from_dict({**columns, "id": examples.id.tolist()} if id else columns)


def unpadded(data: Examples) -> Any:
    """As a `datasets.Dataset` of rows of their own lengths, with a column ``id``."""
    there = data["attention_mask"]
    rows = {name: [data[name][i][there[i]].tolist() for i in range(len(data))] for name in ("input_ids", "labels")}
    return datasets.Dataset.from_dict({**rows, "id": data.id.tolist()})


def arguments(folder: Any, **knobs: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **knobs,
    }


def plain(model: nn.Module, data: Any, folder: Any = "unused", **knobs: Any) -> Any:
    """A `Trainer` of transformers."""
    other: Examples | None = knobs.pop("eval_dataset", None)
    more = {name: knobs.pop(name) for name in ("optimizers", "data_collator") if name in knobs}
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments(folder, **knobs)),
        train_dataset=table(data) if isinstance(data, Examples) else data,
        eval_dataset=None if other is None else table(other),
        **{"data_collator": transformers.default_data_collator, **more},
    )


def sft(model: nn.Module, data: Examples, folder: Any = "unused", **knobs: Any) -> Any:
    """TRL's `SFTTrainer`, with rows as long as they are and the collator of TRL."""
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="t0", eos_token="t3", unk_token="t0"
    )
    other: Examples | None = knobs.pop("eval_dataset", None)
    more = {name: knobs.pop(name) for name in ("peft_config", "data_collator") if name in knobs}
    options = {"bf16": False, "max_length": 12, "activation_checkpointing": False}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(folder, **options, **knobs)),
        train_dataset=unpadded(data),
        eval_dataset=None if other is None else unpadded(other),
        processing_class=tokenizer,
        **more,
    )


KINDS = pytest.mark.parametrize("kind", [plain, sft])


@torch.no_grad()
def scores(model: nn.Module, data: Examples) -> dict[str, float]:
    problem, batch = CausalLM(), data.batch(torch.arange(len(data)))
    was = model.training
    found = problem.score(problem.forward(model.eval(), batch), batch)
    model.train(was)
    return {name: float(value.mean()) for name, value in found.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@dataclass
class Spy(Keeper):
    """Writes down what it is asked, and with what."""

    def setup(self) -> None:
        self._calls: list[Any] = []

    def _note(self, *what: Any) -> None:
        vars(self).setdefault("_calls", []).append(what)
        seen.append(what)

    def begin(self, u: Any) -> None:
        self._note("begin")

    def prepare(self, u: Any, batch: Any) -> Any:
        self._note("prepare", u.epoch, tuple(batch["id"].tolist()))
        return batch

    def loss(self, u: Any, batch: Any) -> None:
        self._note("loss")

    def gradient(self, u: Any) -> None:
        norm = torch.cat([p.grad.flatten() for p in u.parameters.values() if p.grad is not None]).norm()
        self._note("gradient", u.lr, u.total, float(norm))

    def project(self, u: Any, params: Any, before: Any) -> None:
        self._note("project", any(not torch.equal(p, before[name]) for name, p in params.items()))

    def after(self, u: Any, batch: Any) -> None:
        self._note("after", u.step)

    def end(self, u: Any) -> None:
        self._note("end")


#: What every Spy noted; scratch of a part is dropped after a task.
seen: list[Any] = []


@dataclass
class Pull(Keeper):
    """A term of the loss that asks for the network's answers, and lets half of every step stand."""

    def loss(self, u: Any, batch: dict[str, Tensor]) -> Tensor:
        return 0.3 * u.out(batch).logits.square().mean()  # type: ignore[no-any-return]

    def project(self, u: Any, params: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        for name, p in params.items():
            p.sub_(0.5 * (p - before[name]))


# ---------------------------------------------------------------------- the same as our loop


def ours(
    model: nn.Module, keepers: list[Keeper], tasks: list[Examples], wheres: Any = (), **settings: Any
) -> nn.Module:
    """Learn events of our own loop."""
    seen_before = Ids()
    for number, data in enumerate(tasks):
        for part in keepers:
            part.inputs = seen_before
        u = Update(
            model=model,
            problem=CausalLM(),
            owner=Finetune(),
            settings=Settings(**settings),
            data=lambda name, data=data: data,
            parts=[*keepers, *wheres],
            seed=7,
            event=f"learn/{number}",
        )
        learn(u)
        seen_before = seen_before | data.ids
    return model


def theirs(model: nn.Module, keep: list[Keeper], tasks: list[Examples], where: Any = (), kind: Any = plain, **knobs: Any) -> Protected:  # fmt: skip
    state: Any = None
    for data in tasks:
        trainer = kind(model, data, **knobs)
        u = rm.protect(trainer, keep=keep, where=where, seed=7, resume=state)
        trainer.train()
        state = copy.deepcopy(u.state_dict())
    return u


@dataclass
class Old(Keeper):
    """Puts the same four rows beside every batch."""

    def prepare(self, u: Any, batch: Any) -> Any:
        rows = facts(4, 3, keys=3, first_id=500)
        return u.extend(batch, rows.batch(torch.arange(4)), self)


def some_of_all_hooks(accumulate: int) -> list[Keeper]:
    """What they draw does not depend on the order in which rows came."""
    drawn = Replay(policy="reservoir", capacity=200, batch_size=200, per_class=None) if accumulate == 1 else Old()
    return [L2(strength=0.05), EWC(strength=50.0), drawn, Pull()]


@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [(plain, 1), (plain, 2), (sft, 2), pytest.param(sft, 1, marks=pytest.mark.slow)],
)
def test_two_tasks_of_a_trainer_are_two_events_of_our_loop(kind: Any, accumulate: int) -> None:
    """Each step sees all rows of its task and of the buffer, so only float32 sums can differ."""
    tasks = [facts(16, 1), facts(16, 2, keys=1, first_id=100)]
    size = 16 // accumulate
    model, start = tiny(), weights(tiny())
    settings = {"optimizer": {"sgd": {"momentum": 0.9}}, "lr": 0.2, "epochs": 4, "batch_size": size}
    expected = ours(tiny(), some_of_all_hooks(accumulate), tasks, clip=0.5, accumulate=accumulate, **settings)
    knobs = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.2,
        "num_train_epochs": 4,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulate,
        "max_grad_norm": 0.5,
    }
    u = theirs(model, some_of_all_hooks(accumulate), tasks, kind=kind, **knobs)
    moved = max(float((p - start[name]).abs().max()) for name, p in weights(model).items())
    apart = max(
        float((p - q).abs().max()) for p, q in zip(weights(model).values(), weights(expected).values(), strict=True)
    )
    assert moved > 0.1 and apart < 2e-5
    assert u.ids == (tasks[0].ids | tasks[1].ids if kind is sft else Ids.range(0, 32))


def test_rows_of_unequal_length_weigh_as_in_the_trainer_and_old_rows_join_their_batch() -> None:
    """With accumulation a batch keeps its share of the step's targets, and is a mean over its own and the old rows."""
    model, data, old = tiny(), facts(6, 1), facts(4, 3, keys=3)
    data["labels"][0, 5:7] = -100  # 2 targets, the others have 4
    trainer = plain(model, data, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1, optim="sgd")
    trainer.args.max_grad_norm = 0.0
    rm.protect(trainer, keep=[Spy(), Old()])
    found: dict[str, Tensor] = {}
    seen.clear()

    class Keep(transformers.TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(Keep)
    expected = copy.deepcopy(model)
    trainer.train()
    order = [call[2] for call in seen if call[0] == "prepare"]
    problem, total = CausalLM(), len(targets(data.batch(torch.arange(6)))[0])
    for rows in order:
        mine, theirs_ = data.batch(torch.tensor(rows)), old.batch(torch.arange(4))
        both = {name: torch.cat([mine[name], theirs_[name]]) for name in TOKENS}
        loss = problem.loss(problem.forward(expected, both), both)
        (loss * len(targets(mine)[0]) / total).backward()
    for name, p in expected.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_statistics_are_taken_under_bf16_too() -> None:
    found = []
    for bf16 in (False, True):
        u = theirs(tiny(), [EWC(strength=1.0)], [facts(16, 1)], bf16=bf16, num_train_epochs=1)
        found.append(u.state_dict()["keep"]["keep/ewc"]["anchor"]["stiffness"])
    for name, value in found[0].items():
        assert float((found[1][name] - value).norm()) < 0.05 * float(value.norm()), name


@dataclass
class Heavy(Old):
    """Old rows weigh four times as much as new ones."""

    def prepare(self, u: Any, batch: Any) -> Any:
        batch = super().prepare(u, batch)
        return {**batch, "weight": torch.where(batch["origin"] > 0, 2.0, 0.5)}


@pytest.mark.parametrize(("kind", "accumulate"), [(plain, 2), (sft, 1)])
def test_weights_of_rows_are_those_of_our_loop(kind: Any, accumulate: int) -> None:
    tasks = [facts(16, 1)]
    sgd = {"optimizer": "sgd", "lr": 0.2, "epochs": 3, "batch_size": 16 // accumulate}
    expected = ours(tiny(), [Heavy(), Pull()], tasks, accumulate=accumulate, clip=1.0, **sgd)
    knobs = {"per_device_train_batch_size": 16 // accumulate, "gradient_accumulation_steps": accumulate}
    model, light = tiny(), tiny()
    knobs |= {"optim": "sgd", "learning_rate": 0.2, "num_train_epochs": 3}
    theirs(model, [Heavy(), Pull()], tasks, kind=kind, **knobs)
    theirs(light, [Old(), Pull()], tasks, kind=kind, **knobs)
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert float((model.lm_head.weight - light.lm_head.weight).detach().abs().max()) > 1e-3
    trainer = kind(model, tasks[0], label_smoothing_factor=0.1)
    rm.protect(trainer, keep=[Heavy()])
    with pytest.raises(BadInput, match="plain cross-entropy"):
        trainer.train()


def test_bf16_is_the_bf16_of_our_loop() -> None:
    tasks = [facts(32, 1)]
    model, start = tiny(), weights(tiny())
    settings = {"optimizer": {"sgd": {"momentum": 0.9}}, "lr": 0.2, "epochs": 4, "batch_size": 32, "clip": 1.0}
    expected = ours(tiny(), [L2(strength=0.05), Pull()], tasks, precision="bfloat16", **settings)
    knobs = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.2, "num_train_epochs": 4}
    theirs(model, [L2(strength=0.05), Pull()], tasks, bf16=True, per_device_train_batch_size=32, **knobs)
    moved = max(float((p - start[name]).abs().max()) for name, p in weights(model).items())
    apart = max(
        float((p - q).abs().max()) for p, q in zip(weights(model).values(), weights(expected).values(), strict=True)
    )
    assert apart < 0.05 * moved


# ---------------------------------------------------------------------- nothing else


@KINDS
def test_keepers_of_no_strength_leave_every_bit_and_every_file_as_it_was(kind: Any, tmp_path: Path) -> None:
    data, found = facts(32, 1), []
    for number, keep in enumerate([None, [L2(strength=0.0), Replay(batch_size=0), EWC(strength=0.0)]]):
        model, folder = tiny(), tmp_path / str(number)
        trainer = kind(model, data, folder, num_train_epochs=2, save_strategy="epoch", save_total_limit=1)
        if keep is not None:
            rm.protect(trainer, keep=keep)
        trainer.train()
        found.append((weights(model), sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and any("model.safetensors" in name for name in found[0][1])


@KINDS
def test_evaluation_and_prediction_are_the_trainers_own(kind: Any) -> None:
    model, data, other = tiny(), facts(32, 1), facts(16, 5, keys=5)
    trainer = kind(model, data, num_train_epochs=2, eval_strategy="epoch", eval_dataset=other)
    rm.protect(trainer, keep=[Pull(), Replay(policy="reservoir", capacity=64, per_class=None), Spy()])
    losses: list[float] = []

    class Listen(transformers.TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            batch = other.batch(torch.arange(16))
            with torch.no_grad():
                losses.append(float(CausalLM().loss(CausalLM().forward(model, batch), batch)) - metrics["eval_loss"])
            seen.append(("evaluated",))

    trainer.add_callback(Listen)
    seen.clear()
    trainer.train()
    assert len(losses) == 2 and max(map(abs, losses)) < 1e-5
    assert [call[0] for call in seen].count("prepare") == 4 and seen[-2:] == [("evaluated",), ("end",)]
    calls = len(seen)
    before = weights(model)
    assert abs(trainer.evaluate()["eval_loss"] - scores(model, other)["loss"]) < 1e-5
    if kind is plain:
        batch = other.batch(torch.arange(16))
        predicted = trainer.predict(table(other)).predictions
        with torch.no_grad():
            mine = model.eval()(batch["input_ids"].long()).logits
        there = batch["attention_mask"]
        torch.testing.assert_close(torch.as_tensor(predicted)[there], mine[there])
    assert set(seen[calls:]) == {("evaluated",)} and same(weights(model), before)


@KINDS
def test_hooks_come_in_order_and_epochs_ids_and_rates_are_said(kind: Any) -> None:
    data = facts(40, 1, first_id=1000)
    trainer = kind(tiny(), data, num_train_epochs=2, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_grad_norm=0.01)  # fmt: skip
    u = rm.protect(trainer, keep=Spy(), schedule=Cosine(warmup=2))
    seen.clear()
    trainer.train()
    batch, step = ["prepare", "loss"], ["gradient", "project", "after"]
    full = [*batch, "after", *batch, *step]
    assert [call[0] for call in seen] == ["begin", *[*full, *full, *batch, *step] * 2, "end"]
    prepared = [call[1:] for call in seen if call[0] == "prepare"]
    assert [number for number, _ in prepared] == [0] * 5 + [1] * 5
    start = 1000 if kind is sft else 0
    for number in range(2):
        assert sorted(i for e, ids in prepared for i in ids if e == number) == list(range(start, start + 40))
    gradients = [call[1:] for call in seen if call[0] == "gradient"]
    assert [total for _, total, _ in gradients] == [6] * 6
    assert [rate for rate, _, _ in gradients] == [pytest.approx(3e-3 * Cosine(warmup=2).factor(step, 6, 0)) for step in range(6)]  # fmt: skip
    assert min(norm for *_, norm in gradients) > 0.1  # not clipped yet
    assert all(moved for call, *moved in seen if call == "project")
    assert u.life_step == 6 and u.ids == Ids.range(start, start + 40) and u.event == "learn/1"


# ---------------------------------------------------------------------- its purpose


@functools.cache
def learned(seed: int, kind: Any) -> Any:
    """A network that learned a first task, and what keepers remember of it."""
    first, second = facts(32, 10 * seed + 1, 10 * seed), facts(32, 10 * seed + 2, 10 * seed + 1, first_id=100)
    model = tiny(seed)
    trainer = kind(model, first, num_train_epochs=40, seed=seed)
    u = rm.protect(trainer, keep=[EWC(strength=3e5), Replay(**SOME, per_class=None)], seed=seed)
    trainer.train()
    assert scores(model, first)["accuracy"] > 0.99
    return weights(model), u.state_dict(), first, second


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [pytest.param(plain, id="plain"), pytest.param(sft, id="sft", marks=pytest.mark.slow)])
def test_a_second_task_overwrites_less_of_the_first(kind: Any, seed: int) -> None:
    """By the loss of the first task, in nats per token, against that without a keeper."""
    start, state, first, second = learned(seed, kind)

    def after(keep: Any = (), where: Any = ()) -> tuple[float, float]:
        model = tiny(seed)
        model.load_state_dict(start)
        trainer = kind(model, second, num_train_epochs=15, seed=seed)
        mine = {
            name: copy.deepcopy(value) for name, value in state["keep"].items() if name.partition("/")[2] in str(keep)
        }
        rm.protect(trainer, keep=keep, where=where, seed=seed, resume={**state, "keep": mine} if mine else None)
        trainer.train()
        return scores(model, first)["loss"], scores(model, second)["accuracy"]

    kept = {
        "nothing": after(),
        "l2": after([{"l2": {"strength": 0.1}}]),
        "ewc": after([{"ewc": {"strength": 3e5}}]),
        "replay": after([{"replay": SOME}]),
        "hft": after(where="hft"),
    }
    assert min(new for _, new in kept.values()) > 0.85
    for name, margin in (("l2", 1.4), ("ewc", 1.3), ("replay", 2.0), ("hft", 0.5)):
        assert kept[name][0] < kept["nothing"][0] - margin, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_adapters_of_peft_are_protected_too(seed: int) -> None:
    peft = pytest.importorskip("peft")
    start, _, _, first = learned(seed, plain)
    second = facts(32, 10 * seed + 3, 10 * seed + 3, first_id=200)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)

    def after(keep: Any) -> tuple[float, float]:
        model, state = tiny(seed), None
        model.load_state_dict(start)
        for data, epochs in ((first, 40), (second, 20)):
            more = {} if state else {"peft_config": config}
            trainer = sft(model, data, num_train_epochs=epochs, learning_rate=1e-2, seed=seed, **more)
            model = trainer.model
            u = rm.protect(trainer, keep=keep, seed=seed, resume=state)
            trainer.train()
            state = u.state_dict()
        return scores(model, first)["accuracy"], scores(model, second)["accuracy"]

    (bare, new), (kept, also) = after([]), after([{"ewc": {"strength": 1e4}}])
    assert kept > bare + 0.1 and also > new - 0.05


def test_of_a_network_with_adapters_of_peft_keepers_see_the_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    trainer = sft(tiny(), facts(16, 1), peft_config=config)
    u = rm.protect(trainer, keep=[EWC(strength=5.0), L2(strength=0.1)])
    trainer.train()
    moving = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    anchor = u.state_dict()["keep"]["keep/ewc"]["anchor"]["anchor"]
    assert set(anchor) == moving and len(moving) == 28 and all(".lora_" in name for name in moving)


# ---------------------------------------------------------------------- from script to script


@KINDS
def test_a_second_script_goes_on_from_the_folder_of_the_first(kind: Any, tmp_path: Path) -> None:
    tasks = [facts(24, 1), facts(24, 2, keys=1, first_id=24)]
    keep = [{"replay": {**SOME, "per_class": None}}, {"ewc": {"strength": 50.0}}]
    whole = tiny()
    u = theirs(whole, keep, tasks, kind=kind)  # type: ignore[arg-type]
    first = tiny()
    trainer = kind(first, tasks[0])
    v = rm.protect(trainer, keep=keep, seed=7)
    trainer.train()
    v.save(tmp_path / "keepers")
    trainer.save_model(str(tmp_path / "model"))
    assert [p.name for p in (tmp_path / "keepers").iterdir()] == ["keepers.safetensors"]

    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = kind(second, tasks[1])
    w = rm.protect(trainer, keep=keep, seed=7, resume=tmp_path / "keepers")
    assert w.event == "learn/1" and w.parts[0].holds(Ids.range(0, 48)) == Ids.range(0, 24)
    trainer.train()
    assert same(weights(second), weights(whole))
    assert w.ids == u.ids == Ids.range(0, 48) and w.life_step == u.life_step == 12

    trainer = kind(second, tasks[1])
    with pytest.raises(Corrupt, match="keep/ewc"):
        rm.protect(trainer, keep="l2", resume=tmp_path / "keepers")
    with pytest.raises(BadInput, match="no saved state"):
        rm.protect(kind(second, tasks[1]), keep="l2", resume=tmp_path / "elsewhere")


def test_a_trainer_that_trains_twice_has_two_tasks() -> None:
    first, second = table(facts(24, 1, first_id=3), id=True), table(facts(24, 2, keys=1))
    model = tiny()
    trainer = plain(model, first, num_train_epochs=2)
    u = rm.protect(trainer, keep=[{"replay": {**SOME, "per_class": None}}, Spy()], where="hft", seed=7)
    moved: list[set[str]] = []
    for data in (first, second):
        trainer.train_dataset = data
        before = weights(model)
        trainer.train()
        now = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert now == {name for name, p in model.state_dict(keep_vars=True).items() if id(p) in held}
        moved.append(now)
    assert moved[0] != moved[1] and all(p.requires_grad for p in model.parameters())
    assert u.ids == Ids.range(3, 51)  # own ids, then row numbers after them
    assert [call[0] for call in seen][-1] == "end" and u.event == "learn/2"


def test_low_rank_adapters_come_before_the_optimizer_and_come_again(tmp_path: Path) -> None:
    data, model = facts(24, 1), tiny()
    before = weights(model)
    trainer = plain(model, data, tmp_path)
    u = rm.protect(trainer, keep=[Spy()], where={"lora": {"rank": 4}}, seed=7)
    trainer.train()
    now = weights(model)
    assert all(torch.equal(now[name.replace(".weight", ".base.weight") if "_proj" in name else name], value) for name, value in before.items())  # fmt: skip
    assert any("up" in name and bool(value.any()) for name, value in now.items())
    u.save(tmp_path / "keepers")
    again = tiny()
    trainer = plain(again, data, tmp_path)
    rm.protect(trainer, keep=[Spy()], where={"lora": {"rank": 4}}, seed=7, resume=tmp_path / "keepers")
    again.load_state_dict(now)
    with torch.no_grad():
        ids = data["input_ids"].long()
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    trainer = plain(tiny(), data, tmp_path)
    with pytest.raises(Corrupt, match="where='lora'"):
        rm.protect(trainer, keep=[Spy()], resume=tmp_path / "keepers")


def test_masked_entries_stay_under_adamw_and_decay() -> None:
    model, data = tiny(), facts(24, 1)
    before = weights(model)
    trainer = plain(model, data, weight_decay=0.1, num_train_epochs=2)
    rm.protect(trainer, where={"saliency": {"rho": 0.25}})
    trainer.train()
    moved = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    count = sum(p.numel() for p in model.parameters())
    assert 0.2 * count < moved <= 0.25 * count


def test_any_dataset_and_collator_with_a_length() -> None:
    """A list of dicts, a collator that pads and gives no mask, and columns that the model does not know."""
    data = facts(10, 1)
    rows = [{"input_ids": data["input_ids"][i, : 5 + i % 5].tolist(), "note": "text"} for i in range(10)]

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(set(row) == {"input_ids"} for row in features)
        width = max(len(row["input_ids"]) for row in features)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in features])
        return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}

    seen.clear()
    trainer = plain(tiny(), rows, per_device_train_batch_size=4, num_train_epochs=1, data_collator=collate)
    found: list[Examples] = []

    @dataclass
    class Look(Keeper):
        def end(self, u: Any) -> None:
            found.append(u.data("task"))

    u = rm.protect(trainer, keep=[Look(), Spy()])
    trainer.train()
    assert u.ids == Ids.range(0, 10) and sorted(i for c in seen if c[0] == "prepare" for i in c[2]) == list(range(10))
    task = found[0]
    assert task["input_ids"].shape == (10, 9) and task["input_ids"].dtype == torch.int32
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert task["input_ids"][i, :length].tolist() == row["input_ids"] == task["labels"][i, :length].tolist()
        assert bool((task["labels"][i, length:] == -100).all())


def test_a_streamed_dataset_serves_keepers_that_look_at_no_data() -> None:
    data = facts(10, 1)

    class Endless(torch.utils.data.IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            while True:
                yield from table(data)

    model, free = tiny(), tiny()
    for m, keep in ((model, [L2(strength=1.0)]), (free, [])):
        trainer = plain(m, Endless(), max_steps=5)
        u = rm.protect(trainer, keep=keep)
        trainer.train()
    start = tiny().lm_head.weight
    assert (model.lm_head.weight - start).norm() < 0.9 * (free.lm_head.weight - start).norm() and not u.ids
    trainer = plain(model, Endless(), max_steps=2)
    rm.protect(trainer, keep=[EWC()])
    with pytest.raises(BadInput, match="if its dataset has a length"):
        trainer.train()


def test_the_reference_of_a_patched_network_is_a_network_of_its_own() -> None:
    """TRL's forward of a copy would answer with the weights of the network itself."""
    data, found = facts(24, 1), []
    batch = data.batch(torch.arange(24))

    @dataclass
    class Look(Keeper):
        def begin(self, u: Any) -> None:
            self._old = u.reference()
            found.append(u.problem.forward(self._old, batch).logits)

        def end(self, u: Any) -> None:
            with torch.no_grad():
                found.extend([u.problem.forward(m.eval(), batch).logits for m in (self._old, u.model)])

    trainer = sft(tiny(), data)
    rm.protect(trainer, keep=[Look()])
    trainer.train()
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[1], found[2], atol=0.1)


def test_an_error_in_training_leaves_the_task_unlearned() -> None:
    model, data = tiny(), facts(24, 1)

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError

    trainer = plain(model, data)
    u = rm.protect(trainer, keep=[Spy()], where="hft")
    trainer.add_callback(Stop)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert u.event == "learn/0" and not u.ids and all(p.requires_grad for p in model.parameters())
    trainer.remove_callback(Stop)
    trainer.train()
    assert u.event == "learn/1" and u.ids == Ids.range(0, 24)


# ---------------------------------------------------------------------- what is refused


def test_wrong_use_is_refused_with_what_to_do(tmp_path: Path) -> None:
    data, model = facts(16, 1), tiny()

    @dataclass
    class Orders(Keeper):
        def order(self, u: Any, index: Tensor) -> Tensor:
            return index

    def refused(words: str, keep: Any = (), trainer: Any = None, **knobs: Any) -> None:
        with pytest.raises((BadInput, Corrupt), match=words):
            rm.protect(trainer if trainer is not None else plain(model, data), keep=keep, **knobs)

    refused("lwf needs classes", "lwf")
    refused("hook 'order'", Orders())
    refused("did you mean 'replay'", "replai")
    refused("did you mean 'cosine'", schedule="cosin")
    refused("Trainer of transformers", trainer=model)
    refused("auto_find_batch_size", trainer=plain(model, data, auto_find_batch_size=True))
    refused("inside the backward", trainer=plain(model, data, optim="lomo"))
    refused("rm.guard", trainer=plain(nn.Linear(2, 2), data))
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    given = plain(model, data, optimizers=(step, torch.optim.lr_scheduler.ConstantLR(step)))
    refused("scheduler of its own", trainer=given, schedule="cosine")
    refused(r"state of a guarded loop", "l2", resume={})

    trainer = plain(model, data, tmp_path, save_strategy="epoch", num_train_epochs=1)
    trainer.train()
    refused("has trained already", trainer=trainer)
    trainer = plain(model, data, tmp_path)
    rm.protect(trainer, keep="l2")
    refused("protected already", "ewc", trainer=trainer)
    with pytest.raises(BadInput, match="in its middle"):
        trainer.train(resume_from_checkpoint=True)

    def left(features: list[dict[str, Any]]) -> Any:
        batch = transformers.default_data_collator(features)
        return {**batch, "attention_mask": batch["attention_mask"].flip(1)}

    for collate, words in (
        (left, "padding_side = 'right'"),
        (
            lambda rows: {n: v[:1] for n, v in transformers.default_data_collator(rows).items()},
            "several documents into one row",
        ),
        (lambda rows: {"input_ids": torch.zeros(len(rows), 3, dtype=torch.int64)}, "have input_ids and labels"),
    ):
        trainer = plain(model, data, data_collator=collate)
        rm.protect(trainer, keep=["l2"])
        with pytest.raises(BadInput, match=words):
            trainer.train()
    trainer = sft(model, data, packing=True)
    rm.protect(trainer, keep=["l2"])
    with pytest.raises(BadInput, match="strategy 'wrapped'"):
        trainer.train()
    twice = table(facts(4, 1), id=True).map(lambda row: {**row, "id": 5})
    trainer = plain(model, twice)
    rm.protect(trainer, keep=["l2"])
    with pytest.raises(BadInput, match="names a row twice"):
        trainer.train()
