"""LoRAMoE: the structure, the balance loss against one made by hand, where it is refused, and that it splits the experts."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from remanence.core.errors import BadInput, UnknownName
from remanence.core.problem import CausalLM
from remanence.data import Examples, cat, digits
from remanence.learn.finetune import Finetune
from remanence.life.state import State
from remanence.models import mlp
from remanence.models.language import llama
from remanence.nn.experts import LowRankExperts, localized_balance, routing, row_shares
from remanence.train.loop import learn
from remanence.train.settings import Settings
from remanence.train.update import Update
from remanence.where.lora import LoRA
from remanence.where.loramoe import LoRAMoE
from tests.lm import CONTEXT, VOCAB, facts, tiny, tokens
from tests.where.helpers import moved, state, trained, update
from tests.where.language import PROBLEM, Speaker, books

DATA = digits().select(torch.arange(200))
GROUPED = DATA.replace(group=torch.arange(200) % 2)
ALL = {"targets": "all-linear"}


def test_structure_and_what_learns():
    model = mlp(64, [32, 16], 10, norm=True)
    before = model.eval()(DATA["x"])
    u = update(model, DATA, [LoRAMoE(experts=4, rank=2, **ALL)])
    assert torch.equal(u.model.eval()(DATA["x"]), before)
    assert sum(isinstance(m, LowRankExperts) for m in u.model.modules()) == 2
    held = state(u.model)
    for event in ("learn/1", "learn/2"):  # attached once
        after = trained(u.model, DATA, [LoRAMoE(experts=4, rank=2, **ALL)], event=event, new=[], epochs=2, optimizer={"adamw": {"weight_decay": 0.5}})  # fmt: skip
    changed = {name for name in moved(held, after) if "running" not in name and "num_batches" not in name}
    experts = {n for n, _ in after.named_parameters() if n.endswith((".down", ".up", ".router.weight"))}
    assert len(experts) == 6 and changed == experts | {"head.weight", "head.bias"}


def test_targets_are_the_feed_forward_layers_of_a_language_model_and_its_head_stays():
    speaker = Speaker()
    held = state(speaker.model)
    speaker.learn(facts(16, 5), [LoRAMoE()], epochs=1)
    wrapped = [n for n, m in speaker.model.named_modules() if isinstance(m, LowRankExperts)]
    assert wrapped == [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")]
    now = {name.replace(".base.", "."): value for name, value in speaker.model.state_dict().items()}
    assert all(torch.equal(value, now[name]) for name, value in held.items())
    with pytest.raises(UnknownName, match="gate_proj"):
        update(mlp(64, [32], 10), DATA, [LoRAMoE()])


@pytest.mark.parametrize("part", [LoRA(rank=2), LoRAMoE(rank=2)])
def test_an_output_layer_of_its_own_stays_in_a_language_model(part):
    pytest.importorskip("transformers")
    model = llama(VOCAB, 48, 2, 4, context=CONTEXT, tie=False)
    u = Update(model=model, problem=PROBLEM, owner=Finetune(), settings=Settings(), data=lambda _: facts(4, 5), parts=[part])  # fmt: skip
    u.model = part.attach(u.model, part.structure(u))
    assert "lm_head.weight" in u.parameters and "lm_head.weight" not in part.trainable(u)


def test_one_kind_of_adapters_only():
    model = update(mlp(64, [32], 10), DATA, [LoRA()]).model
    with pytest.raises(BadInput, match="one kind"):
        update(model, DATA, [LoRAMoE(**ALL)], event="learn/1")
    model = update(mlp(64, [32], 10), DATA, [LoRAMoE(**ALL)]).model
    with pytest.raises(BadInput, match="one kind"):
        update(model, DATA, [LoRA()], event="learn/1")


def test_rebuilt_from_json_and_tensors():
    speaker = Speaker()
    table, other = books(3, 16, 16)
    speaker.learn(table, [LoRAMoE(experts=2)], epochs=2)
    packed = copy.deepcopy(speaker.state.pack())
    packed["structures"] = json.loads(json.dumps(packed["structures"]))
    again = speaker.copy()
    again.state = State(tiny(), Finetune())
    again.state.load(packed, tiny())
    for each in (speaker, again):
        each.learn(other, [LoRAMoE(experts=2)], epochs=2)
    assert not moved(state(speaker.model), again.model)


def text(group: torch.Tensor, **knobs: object) -> Update:
    """An event on facts of two kinds, of which some rows are shorter than others, before its first step."""
    rows = facts(len(group), 5)
    rows["attention_mask"][::3, 7:] = False
    rows["labels"][::3, 7:] = -100
    table = rows.replace(group=group)
    part = LoRAMoE(dropout=0.0, group="group", **knobs)  # type: ignore[arg-type]
    u = Update(model=tiny(), problem=PROBLEM, owner=Finetune(), settings=Settings(batch_size=len(group)), data=lambda _: table, parts=[part])  # fmt: skip
    u.model = part.attach(u.model, part.structure(u))
    return u


def test_the_loss_is_the_balance_of_every_layer_over_tokens_that_are_there():
    u = text(torch.tensor([0, 1, 1, 0, 1, 0]), delta=0.3, balance=0.7)
    part = u.parts[0]
    assert isinstance(part, LoRAMoE)
    batch = u.data("task").batch(torch.arange(6))
    with u._exit:
        part.begin(u)
        part.prepare(u, batch)
        u.out(batch)
        found = part.loss(u, batch)
        with torch.no_grad():
            u.problem.forward(u.model, batch)  # looking does no harm
        torch.testing.assert_close(part.loss(u, batch), found)
        u.problem.forward(u.model, {n: c[:2] for n, c in batch.items()})  # nor does a replayed batch
        torch.testing.assert_close(part.loss(u, batch), found)
        part.prepare(u, batch)
        u.problem.forward(u.model, {n: c[:2] for n, c in batch.items()})  # another batch was forwarded first
        torch.testing.assert_close(part.loss(u, batch), found)
    with routing(u.model) as taken:
        u.problem.forward(u.model, batch)
    expected = 0.0
    for shares in taken.values():
        q = torch.stack([shares[b, : int(batch["attention_mask"][b].sum())].mean(0) for b in range(6)])
        expected += 0.7 * float(localized_balance(q, batch["group"], 0.3).detach())
    assert len(taken) == 6 and float(found) == pytest.approx(expected, rel=1e-5)


def test_what_the_balance_needs():
    group = torch.tensor([0, 1, 1, 0])
    for knobs, said in (({"experts": 3}, "even"),):
        with pytest.raises(BadInput, match=said):
            learn(text(group, **knobs))
    with pytest.raises(BadInput, match="0 and 1"):
        learn(text(torch.tensor([0, 1, 2, 0])))
    with pytest.raises(BadInput, match="kind"):
        learn(update(mlp(64, [32], 10), DATA, [LoRAMoE(group="kind", **ALL)]))
    u = text(group)
    u.problem = CausalLM(context=CONTEXT, packing=True)
    with pytest.raises(BadInput, match="packing"):
        learn(u)
    part = LoRAMoE(group="group", **ALL)
    u = update(mlp(64, [32], 10), GROUPED, [part])
    with pytest.raises(BadInput, match="no column"), u._exit:
        part.begin(u)
        part.loss(u, {"x": DATA["x"], "id": DATA.id})


def test_without_a_column_or_weight_there_is_no_balance():
    models = [
        trained(mlp(64, [32], 10), GROUPED, [LoRAMoE(experts=2, **ALL, **knobs)], epochs=2)
        for knobs in ({}, {"group": "group", "balance": 0.0}, {"group": "group"})
    ]
    assert not moved(state(models[0]), models[1]) and moved(state(models[0]), models[2])


def copies(count: int, seed: int) -> Examples:
    """Rows whose answer is their key: another kind than facts, and another first token."""
    key = torch.randint(4, VOCAB, (count, 3), generator=torch.Generator().manual_seed(seed))
    one = torch.ones(count, 1, dtype=torch.int64)
    return tokens(torch.cat([0 * one, key, 2 * one, key, 3 * one], 1), 5, 5000, f"copies-{seed}")


def two_kinds(copied: Examples, asked: Examples, first_id: int) -> Examples:
    both = cat([copied.replace(group=torch.ones(len(copied))), asked.replace(group=torch.zeros(len(asked)))])
    return Examples(both.columns, "two kinds", torch.arange(len(both)) + first_id)


def lean(speaker: Speaker, table: Examples) -> float:
    """How much more of its shares a row of kind 1 gives to the second half of the experts than a row of kind 0."""
    batch = table.batch(torch.arange(len(table)))
    speaker.model.eval()
    with routing(speaker.model) as taken:
        PROBLEM.forward(speaker.model, batch)
    shares = torch.stack([row_shares(s, batch["attention_mask"]) for s in taken.values()]).mean(0).detach()
    second = shares[:, shares.shape[1] // 2 :].sum(1)
    return float(second[batch["group"] == 1].mean() - second[batch["group"] == 0].mean())


@pytest.mark.fidelity(
    "where/loramoe",
    check="N = 1 is LoRA; the balance by hand, its fixed point and sign; held-out rows of two kinds in a small Llama",
    measured="N = 1 equal to 1e-14; shares (1 + delta) / 2 to 1e-4; with delta = 0.3 the halves differ by 0.19 to 0.22, without by up to 0.02",
    paper="- (the official code's formula)",
    differs="mean over tokens without padding for their sum with it; one dropout mask per layer; that the split keeps more of what was known is not seen here",
)
@pytest.mark.parametrize("seed", range(2))
def test_purpose_each_kind_leans_on_its_own_half(seed):
    """Facts that are known and copies that are new. Held out, seeds 0 to 2: 0.189, 0.211, 0.219; without the loss 0.017, 0.007, 0.007."""
    (known,) = books(seed, 64)
    start = Speaker(seed, known)
    train = two_kinds(copies(64, seed + 77), known.select(torch.arange(32)), 9000)
    test = two_kinds(copies(64, seed + 99), known.select(torch.arange(32, 64)), 9500)
    found = []
    for group in ("group", None):
        speaker = start.copy()
        speaker.learn(train, [LoRAMoE(group=group, delta=0.3)], epochs=20)
        found.append(lean(speaker, test))
    assert found[0] > 0.1 and abs(found[1]) < 0.05
