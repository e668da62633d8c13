"""Freeze a random half of the weight matrices in every stage."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.nn.adapters import Adapter
from remanence.nn.anatomy import head_name, norm_modules, weighted_modules
from remanence.train.roles import Where
from remanence.train.update import Update

ATTENTION = (
    {*"qkvo", "query", "key", "value"}
    | {f"{s}_{p}" for s in "qkv" for p in ("proj", "lin")}
    | {"o_proj", "out_proj", "out_lin"}
)
FFN = {"gate_proj", "up_proj", "down_proj", "fc1", "fc2", "lin1", "lin2", "wi", "wi_0", "wi_1", "wo", "w1", "w2", "w3"}
FUSED = {"qkv", "qkv_proj", "c_attn", "query_key_value", "in_proj", "Wqkv", "gate_up_proj"}
_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|layer|h|blocks|block)\.\d+(?=\.)")

Matrices = tuple[str, ...]  # names of modules that are frozen or trained together


@dataclass
class HFT(Where):
    """Half fine-tuning: half of the matrices learn in this event, the other half keep their bits; the next event draws anew.

        theta_t = theta_{t-1} - lr * grad on the drawn half,        theta_t = theta_{t-1} on the other

    Per layer of a transformer (``category``): 2 of the 4 attention matrices, 1 of the 2 norms, and of the 3 feed-forward matrices 1
    in a random floor(L/2) of the layers and 2 in the others are trained. Embeddings, head and whatever lies outside the layers learn
    always. ``layer`` draws whole layers; ``model`` draws among all hidden matrices, and among all norms, of any network. A bias goes
    with its matrix. Frozen tensors leave the optimizer, so neither momentum nor weight decay moves them.

    Pick it as the plainest guard against forgetting in full fine-tuning: no data, no extra memory. Needs: nothing.
    Reference: Hui et al. 2025, "HFT: Half Fine-Tuning for Large Language Models", arXiv 2404.18466. For another `share` p, each layer
    trains floor(p n) or floor(p n) + 1 of its n matrices, the larger number in ceil of the exact share of layers.
    """

    share: float = knob(0.5, "share of the matrices that learn", low=0, high=1)
    granularity: str = knob(
        "auto", "auto: category in transformers, else model", choices=("auto", "category", "layer", "model")
    )
    train_embeddings: bool = knob(True, "whether embeddings learn")

    @property
    def inert(self) -> bool:
        return self.share == 1 and self.train_embeddings

    def begin(self, u: Update) -> None:
        modules = self._modules(u.model)
        layers, norms = _layers(modules), norm_modules(u.model)
        kind = self.granularity if self.granularity != "auto" else "category" if layers else "model"
        if kind != "model" and not layers:
            raise BadInput(
                f"hft: no transformer layers were recognised in {type(u.model).__name__}; use granularity='model'"
            )
        groups: list[list[list[Matrices]]]  # modules of one kind, per layer
        if kind == "category":
            of = [{name: "norm" if name in norms else _kind(name) for name in layer} for layer in layers]
            groups = [
                [[(name,) for name in layer if layer[name] == kind] for layer in of]
                for kind in ("attention", "ffn", "norm")
            ]
        elif kind == "layer":
            groups = [[[tuple(layer) for layer in layers]]]
        else:
            groups = [[[(name,) for name in modules if (name in norms) == norm]] for norm in (False, True)]
        counted = {name for group in groups for layer in group for matrices in layer for name in matrices}
        chosen = {name for group in groups for matrices in _draw(group, self.share, u.rng("hft")) for name in matrices}
        embeddings = {name for name, module in u.model.named_modules() if isinstance(module, nn.Embedding)}
        frozen = (counted - chosen) | (set() if self.train_embeddings else embeddings)
        self._names = [name for name in u.parameters if name.rpartition(".")[0] not in frozen]

    def trainable(self, u: Update) -> list[str]:
        return self._names

    def _modules(self, model: nn.Module) -> list[str]:
        """Hidden modules with weights: neither head nor embeddings."""
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            fused = last in FUSED or (isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None)
            if fused and self.granularity in ("auto", "category"):
                raise BadInput(
                    f"hft: {name} holds several matrices in one; split it first, or use granularity='layer' or 'model'"
                )
            if isinstance(module, Adapter):
                raise BadInput("hft: the model has adapters, of which a half means nothing; use one of the two")
        head = head_name(model)
        return [n for n, m in weighted_modules(model).items() if n != head and not isinstance(m, nn.Embedding)]


def _layers(modules: list[str]) -> list[list[str]]:
    """The modules of each transformer layer: a numbered block with attention and feed-forward matrices in it."""
    found: dict[str, list[str]] = {}
    for name in modules:
        match = _LAYER.match(name)
        if match:
            found.setdefault(match.group(), []).append(name)
    return [names for names in found.values() if {_kind(name) for name in names} >= {"attention", "ffn"}]


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    if last == "dense":  # BERT: attention.output.dense, intermediate.dense, output.dense
        return "attention" if "attention" in name else "ffn"
    return "attention" if last in ATTENTION else "ffn" if last in FFN else ""


def _draw(group: list[list[Matrices]], share: float, rng: torch.Generator) -> list[Matrices]:
    """Those that learn: of each layer's n a random floor(share n), and one more in a random part of the layers."""
    counts = [math.floor(share * len(layer) + 1e-9) for layer in group]
    rest = [max(0.0, share * len(layer) - count) for layer, count in zip(group, counts, strict=True)]
    open_ = [number for number, fraction in enumerate(rest) if fraction > 1e-9]
    for at in torch.randperm(len(open_), generator=rng)[: math.ceil(sum(rest) - 1e-6)].tolist():
        counts[open_[at]] += 1
    return [
        layer[i]
        for layer, n in zip(group, counts, strict=True)
        for i in torch.randperm(len(layer), generator=rng)[:n].tolist()
    ]
