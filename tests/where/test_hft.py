"""The checks of card hft on a tiny transformer and on perceptrons."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.models import mlp
from remanence.where.hft import HFT, _kind
from remanence.where.lora import LoRA
from tests.where.helpers import accuracy, moved, state, table, trained, transformer, update

DATA = table("sum")


def frozen_modules(u, part: HFT) -> set[str]:
    part.begin(u)
    return {name.rpartition(".")[0] for name in set(u.parameters) - set(part.trainable(u))}


@pytest.mark.parametrize("optimizer", ["adamw", {"sgd": {"momentum": 0.9, "weight_decay": 0.1}}])
def test_share_one_is_plain_fine_tuning_and_share_zero_freezes_every_counted_matrix(optimizer):
    kw = {"epochs": 3, "batch_size": 16, "lr": 0.05 if isinstance(optimizer, dict) else 1e-3, "optimizer": optimizer}
    plain, whole, none = (transformer() for _ in range(3))
    before = state(none)
    trained(plain, DATA, [], **kw)
    trained(whole, DATA, [HFT(share=1.0)], **kw)
    assert not moved(state(plain), whole)
    trained(none, DATA, [HFT(share=0.0)], **kw)
    assert {name.rpartition(".")[0] for name in moved(before, none)} == {"embed", "place", "head"}


@pytest.mark.parametrize("layers", [1, 2, 4, 5])
def test_category_counts_of_matrices(layers):
    """Card: attention 2L, norms L and FFN floor(L/2) * 2 + (L - floor(L/2)) frozen, two of three in a RANDOM half of the layers."""
    model = transformer(layers=layers)
    halves = set()
    for event in range(12):
        frozen = frozen_modules(update(model, DATA, [], event=f"learn/{event}"), HFT())
        inside = [name for name in frozen if name.startswith("layers.")]
        assert frozen == set(inside)  # neither embeddings nor head
        of = {kind: [n for n in inside if "norm" not in n and _kind(n) == kind] for kind in ("attention", "ffn")}
        assert len(of["attention"]) == 2 * layers
        assert len(of["ffn"]) == layers // 2 * 2 + (layers - layers // 2)
        assert len([n for n in inside if "norm" in n]) == layers
        for layer in range(layers):
            mine = [n for n in inside if n.startswith(f"layers.{layer}.")]
            assert sum(n in of["attention"] for n in mine) == 2 and sum("norm" in n for n in mine) == 1
            assert sum(n in of["ffn"] for n in mine) in (1, 2)
        halves.add(tuple(layer for layer in range(layers) if sum(n.startswith(f"layers.{layer}.") for n in of["ffn"]) == 2))  # fmt: skip
    assert len(halves) > 1 or layers == 1


def test_parameter_share_is_half_where_matrices_are_equal():
    """Even L and equal sizes per category: exactly half of the attention, FFN and norm parameters learn."""
    model = transformer(layers=4)
    u = update(model, DATA, [])
    part = HFT()
    part.begin(u)
    learns = set(part.trainable(u))
    for kind in ("attention", "ffn"):
        sizes = {n: p.numel() for n, p in u.parameters.items() if n.endswith("weight") and "norm" not in n and _kind(n.rpartition(".")[0]) == kind and n.startswith("layers")}  # fmt: skip
        assert 2 * sum(size for name, size in sizes.items() if name in learns) == sum(sizes.values())


@pytest.mark.fidelity(
    "where/hft",
    check="card hft: frozen tensors keep their bits under AdamW and momentum; counts 2L, L, floor(L/2)*2+L-floor(L/2)",
    measured="exact",
    paper="frozen half at theta_{t-1}",
    differs="-",
)
@pytest.mark.parametrize(
    "optimizer", [{"adamw": {"weight_decay": 0.5}}, {"sgd": {"momentum": 0.9, "weight_decay": 0.1}}]
)
def test_frozen_matrices_keep_their_bits_over_a_stage_and_each_stage_draws_anew(optimizer):
    model, stages = transformer(), []
    for event in ("learn/0", "learn/1"):
        before = state(model)
        frozen = frozen_modules(update(model, DATA, [], event=event), HFT())
        trained(model, DATA, [HFT()], event=event, epochs=4, batch_size=16, optimizer=optimizer, lr=0.01)
        changed = {name.rpartition(".")[0] for name in moved(before, model)}
        assert not changed & frozen
        # k_proj's bias has no gradient (softmax ignores it), its weight has: every module that may learn does
        assert changed == {name.rpartition(".")[0] for name, _ in model.named_parameters()} - frozen
        stages.append(frozen)
    assert stages[0] != stages[1]
    other = frozen_modules(update(model, DATA, [], event="learn/0", seed=1), HFT())
    assert other != stages[0]


def test_layer_and_model_granularity():
    model = transformer(layers=4)
    frozen = frozen_modules(update(model, DATA, []), HFT(granularity="layer"))
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm) and n.startswith("layers")}
    whole = [{n for n in names if n.startswith(f"layers.{layer}.")} for layer in range(4)]
    assert len(frozen) == 18 and sum(layer <= frozen for layer in whole) == 2
    frozen = frozen_modules(update(model, DATA, []), HFT(granularity="model"))
    assert len(frozen & {n for n in names if "norm" not in n}) == 14 and len([n for n in frozen if "norm" in n]) == 4
    assert frozen_modules(update(model, DATA, []), HFT(train_embeddings=False)) > {"embed", "place"}


def test_any_network_and_what_cannot_be_halved():
    """A perceptron is drawn from as a whole; fused matrices, adapters and networks without layers are refused."""
    net = mlp(3, [8, 8, 8, 8], 7, norm=True)
    flat = DATA.replace(x=DATA["x"].float())
    frozen = frozen_modules(update(net, flat, []), HFT())
    linear = {n for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert len(frozen & linear) == 2 and len(frozen - linear) == 2 and "head" not in frozen
    with pytest.raises(BadInput, match="granularity='model'"):
        frozen_modules(update(net, flat, []), HFT(granularity="category"))
    fused = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 7))
    with pytest.raises(BadInput, match="split it first"):
        frozen_modules(update(fused, DATA, []), HFT())
    with pytest.raises(BadInput, match="adapters"):
        frozen_modules(update(net, flat, [LoRA(rank=1)]), HFT())


def test_other_shares_train_floor_or_ceil_of_each_layer():
    model = transformer(layers=4)
    for share in (0.25, 0.4, 0.6, 0.75):
        frozen = frozen_modules(update(model, DATA, []), HFT(share=share))
        attention = [16 - sum(_kind(n) == "attention" for n in frozen), share * 16]
        assert abs(attention[0] - attention[1]) < 1
        for layer in range(4):
            left = 4 - sum(_kind(n) == "attention" and n.startswith(f"layers.{layer}.") for n in frozen)
            assert left in (int(4 * share), int(4 * share) + 1)


def test_inert_only_where_nothing_is_frozen():
    assert HFT(share=1).inert and not HFT(share=1, train_embeddings=False).inert and not HFT().inert


@pytest.mark.slow
@pytest.mark.fidelity(
    "where/hft",
    check="two modular-addition tables in a row, tiny transformer, mean of 5 seeds: accuracy on A after B, then on B",
    measured="HFT 0.331 / 0.996, full fine-tuning 0.253 / 1.000",
    paper="TRACE backward transfer -5.6 % against -10.2 %",
    differs="a two-layer transformer of width 32 in place of a 7b language model",
)
def test_purpose_less_is_forgotten_for_the_same_new_table():
    """Card hft, last check: A after B is higher with HFT over 5 seeds, B within a few points."""
    labels, first, second = list(range(7)), table("sum"), table("difference")
    full, half = [], []
    for seed in range(5):
        start = transformer(layers=2, width=32, seed=seed)
        trained(start, first, [], epochs=100, batch_size=49, lr=3e-3, seed=seed)
        assert accuracy(start, first, labels) > 0.99
        for parts, rows in (([], full), ([HFT()], half)):
            model = copy.deepcopy(start)
            trained(model, second, parts, event="learn/1", new=[], epochs=40, batch_size=7, lr=3e-3, seed=seed)
            rows.append((accuracy(model, first, labels), accuracy(model, second, labels)))
    (old_full, new_full), (old_half, new_half) = (torch.tensor(rows).mean(0) for rows in (full, half))
    assert old_half > old_full + 0.03 and new_half > new_full - 0.03
