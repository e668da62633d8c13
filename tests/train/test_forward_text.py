"""Language models in lower precision, compiled, and with activations computed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import CausalLM
from remanence.learn.finetune import Finetune
from remanence.train.forward import Forward, recomputing
from remanence.train.loop import learn
from remanence.train.settings import Settings
from remanence.train.update import Update
from tests.lm import CONTEXT, VOCAB, facts, tiny
from tests.train.helpers import blobs, network, update

PROBLEM = CausalLM(context=CONTEXT)
CPU = torch.device("cpu")


def text(owner: Finetune | None = None, model: nn.Module | None = None, **settings: Any) -> Update:
    data = facts(30, 0)
    return Update(model=model or tiny(hidden=16), problem=PROBLEM, owner=owner or Finetune(), data=lambda _: data,
                  settings=Settings(**{"batch_size": 10, "lr": 3e-3, **settings}))  # fmt: skip


def weights(u: Update) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in u.model.parameters()])


def batches() -> list[dict[str, torch.Tensor]]:
    """Batches of unlike numbers of rows, widths and targets."""
    data = facts(40, 0)
    full = {**data.columns, "id": data.id}
    full["labels"] = full["labels"].clone()
    full["labels"][::3, 6:] = -100
    parts = [(0, 10, 9), (10, 20, 9), (20, 27, 10), (27, 36, 11), (3, 18, 9)]
    return [
        {name: column[a:b, :width] if column.dim() > 1 else column[a:b] for name, column in full.items()}
        for a, b, width in parts
    ]


class Own(nn.Module):
    """A language model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids))


# -- precision


def test_bfloat16_answers_in_float32_for_the_targets_alone() -> None:
    """Near the plain answers, but not the same; nothing of the size of all tokens is turned into float32."""
    model, batch = tiny(hidden=16), batches()[0]
    plain = PROBLEM.forward(model, batch, model.lm_head)
    grown: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float32 and made.shape[-1:] == (VOCAB,):
                grown.append(made.shape)
            return made

    forward = Forward(model, CPU, "bfloat16", compile=False)
    with Watch(), torch.no_grad():
        low = forward(PROBLEM, model, batch, model.lm_head)
    assert low.logits.dtype == low.features.dtype == torch.float32
    assert 0 < (low.logits - plain.logits).abs().max() < 0.02 * plain.logits.abs().max()
    assert set(grown) == {plain.logits.shape} and plain.logits.shape == (int((batch["labels"] != -100).sum()), VOCAB)


def test_bfloat16_learns_what_float32_learns() -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        u = text(epochs=3, precision=precision, optimizer="sgd", lr=0.5)
        start = weights(u).clone()
        learn(u)
        found[precision] = weights(u) - start
    assert 0 < (found["bfloat16"] - found["float32"]).norm() < 0.1 * found["float32"].norm()


# -- compiled


def test_compiled_without_its_output_layer_it_is_traced_for_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs for five batches: one, and one for any shape. With the output layer inside there would be one per batch."""
    import torch._dynamo.testing

    real, counter = torch.compile, torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=counter))
    torch._dynamo.reset()
    model = tiny(hidden=16)
    forward = Forward(model, CPU, "float32", compile=True)
    for batch in batches():
        wanted = PROBLEM.forward(model, batch)
        grads = torch.autograd.grad(PROBLEM.loss(wanted, batch), list(model.parameters()))
        made = forward(PROBLEM, model, batch, None)
        torch.testing.assert_close(made.logits, wanted.logits)
        torch.testing.assert_close(torch.autograd.grad(PROBLEM.loss(made, batch), list(model.parameters())), grads)
        assert model.base_model._compiled_call_impl is None
    assert counter.frame_count == 2
    assert forward(PROBLEM, model, batches()[0], model.lm_head).features is not None and counter.frame_count == 2


def test_the_loop_compiles_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call: (made.append(call), call)[1])
    plain, compiled = text(epochs=2), text(epochs=2, compile=True)
    learn(plain)
    learn(compiled)
    assert len(made) == 1 and torch.equal(weights(plain), weights(compiled))


@pytest.mark.slow
def test_torch_compiles_it() -> None:
    plain, compiled = text(epochs=2), text(epochs=2, compile=True)
    learn(plain)
    learn(compiled)
    torch.testing.assert_close(weights(plain), weights(compiled), rtol=1e-4, atol=1e-5)


def test_a_model_whose_output_layer_is_not_known_apart_is_refused_compiled() -> None:
    u = text(model=Own(), compile=True)
    before = weights(u).clone()
    with pytest.raises(BadInput, match=r"compile=True.*Own"):
        learn(u)
    assert torch.equal(weights(u), before)
    learn(text(model=Own()))


# -- activations computed twice


def twice(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def saved(model: Any, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Gradients, and the bytes that the forward keeps for the backward, weights aside."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[torch.Tensor] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(value)
        return value

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = PROBLEM.loss(PROBLEM.forward(model, batch), batch)
    return list(torch.autograd.grad(loss, list(model.parameters()))), sum(held.values())


def test_the_same_gradients_from_a_fraction_of_the_memory() -> None:
    """A Llama of six blocks keeps less than a quarter of the bytes, and is as it was afterwards."""
    model, batch = tiny(layers=6), batches()[0]
    plain, whole = saved(model, batch)
    with recomputing(model):
        again, kept = saved(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept < whole / 4
    assert not twice(model) and saved(model, batch)[1] == whole


def test_training_ends_in_the_same_bits() -> None:
    inside: list[bool] = []

    class Looks(Finetune):
        def gradient(self, u: Any) -> None:
            inside.append(twice(u.model))

    plain, again = text(Looks(), epochs=2), text(Looks(), epochs=2, checkpointing=True)
    learn(plain)
    learn(again)
    assert torch.equal(weights(plain), weights(again)) and inside == [False] * 6 + [True] * 6
    assert not twice(again.model)


def test_dropout_is_the_same_both_times() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny(hidden=16)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        u = text(model=model, epochs=1, checkpointing=checkpointing)
        learn(u)
        found.append(weights(u))
    plain = text(epochs=1)
    learn(plain)
    assert torch.equal(*found) and not torch.equal(found[0], weights(plain))


def test_a_model_that_cannot_is_refused() -> None:
    u = update(network(), blobs(), checkpointing=True)
    with pytest.raises(BadInput, match="checkpointing=True"):
        learn(u)
    assert all(p.requires_grad for p in u.model.parameters())


def test_another_module_that_a_part_fits_needs_it_not() -> None:
    class Fits(Finetune):
        def learn(self, u: Update) -> None:
            u.fit(nn.Linear(1, 1), blobs(), lambda module, batch: module(batch["x"][:, :1]).square().mean())
            u.run()

    learn(text(Fits(), checkpointing=True))
