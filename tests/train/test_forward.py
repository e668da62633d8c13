"""Lower precision, compiled forwards and early stopping: what they change, and what they must not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import remanence as rm
from remanence.core.errors import BadInput
from remanence.core.problem import Out
from remanence.learn.finetune import Finetune
from remanence.train.forward import Forward
from remanence.train.loop import learn
from remanence.train.stopping import Stopping
from tests.train.helpers import blobs, network, update


def weights(u: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in u.model.parameters()])


# -- precision


@pytest.mark.parametrize("precision, tolerance", [("bfloat16", 0.03), ("float16", 0.005)])
def test_lower_precision_stays_near_and_is_not_the_same(precision: str, tolerance: float) -> None:
    found = {}
    for each in ("float32", precision):
        u = update(network(), blobs(), epochs=3, batch_size=16, lr=0.05, optimizer="sgd", precision=each)
        learn(u)
        found[each] = weights(u)
    change = (found["float32"] - torch.cat([p.detach().reshape(-1) for p in network().parameters()])).norm()
    distance = (found[precision] - found["float32"]).norm()
    assert 0 < distance < tolerance * change + 1e-3
    assert found[precision].dtype == torch.float32


def test_parts_see_float32_answers_and_unscaled_gradients() -> None:
    """A gradient hook sees what plain training would show it, although the loss was scaled by 2^16."""
    seen: dict[str, list[torch.Tensor]] = {}

    class Looks(Finetune):
        def gradient(self, u: Any) -> None:
            assert u.out(u.batch).logits.dtype == torch.float32
            seen.setdefault(u.settings.precision, []).append(
                torch.cat([p.grad.reshape(-1) for p in u.parameters.values()])
            )

    for each in ("float32", "float16"):
        learn(
            update(network(), blobs(), owner=Looks(), epochs=1, batch_size=90, lr=0.05, optimizer="sgd", precision=each)
        )
    torch.testing.assert_close(seen["float16"][0], seen["float32"][0], rtol=0.02, atol=2e-4)


def test_a_step_that_overflows_is_left_out_and_the_scale_falls() -> None:
    u = update(network(), blobs(), epochs=1, batch_size=90, lr=0.05, optimizer="sgd", precision="float16")
    scales: list[float] = []

    class Overflows(Finetune):
        def objective(self, u: Any, batch: Any) -> torch.Tensor:
            scales.append(u._forward.scaler.get_scale())
            return super().objective(u, batch) * 1e35  # finite, but not once it is scaled

    u.owner = Overflows()
    before = weights(u)
    learn(u)
    assert torch.equal(weights(u), before) and u.steps_done == 1


def test_accumulation_and_clipping_act_on_unscaled_gradients() -> None:
    found = []
    for each in ("float32", "float16"):
        u = update(
            network(), blobs(), epochs=2, batch_size=16, accumulate=2, clip=0.1, lr=0.5, optimizer="sgd", precision=each
        )
        learn(u)
        found.append(weights(u))
    start = torch.cat([p.detach().reshape(-1) for p in network().parameters()])
    assert (found[0] - found[1]).norm() < 0.05 * (found[0] - start).norm()


# -- compiled


def test_a_compiled_forward_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def stand_in(model: torch.nn.Module) -> Any:  # inductor takes half a minute; what is ours is when it is used
        return lambda x: (calls.append(1), model(x))[1]

    monkeypatch.setattr(torch, "compile", stand_in)
    plain, compiled = (
        update(network(), blobs(), epochs=2, batch_size=16),
        update(network(), blobs(), epochs=2, batch_size=16, compile=True),
    )
    learn(plain)
    learn(compiled)
    assert torch.equal(weights(plain), weights(compiled)) and len(calls) == compiled.steps_done
    features = update(network(), blobs(), epochs=1, batch_size=16, compile=True)
    features.ask_features()
    learn(features)
    assert len(calls) == compiled.steps_done  # hooks would be lost: uncompiled


@pytest.mark.slow
def test_torch_compiles_it() -> None:
    plain, compiled = (
        update(network(), blobs(), epochs=1, batch_size=30, lr=0.01),
        update(network(), blobs(), epochs=1, batch_size=30, lr=0.01, compile=True),
    )
    learn(plain)
    learn(compiled)
    torch.testing.assert_close(weights(plain), weights(compiled), rtol=1e-4, atol=1e-5)


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import InternalTorchDynamoError

    def fails(model: Any) -> Any:
        def call(x: Any) -> Any:
            raise InternalTorchDynamoError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    forward = Forward(network(), torch.device("cpu"), "float32", compile=True)
    with pytest.raises(BadInput, match="no C\\+\\+ compiler"):
        forward(rm.Classification(), network(), {"x": torch.zeros(2, 6)}, None)


@pytest.mark.parametrize("knobs", [{"precision": "float8"}, {"patience": 0}, {"validation": 1.5}, {"compile": "yes"}])
def test_wrong_settings(knobs: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(knobs))):
        update(network(), blobs(), **knobs)


# -- early stopping


def test_rows_held_back_are_not_trained_on_but_count_as_consumed() -> None:
    trained: set[int] = set()

    class Watches(Finetune):
        def objective(self, u: Any, batch: Any) -> torch.Tensor:
            trained.update(batch["id"].tolist())
            return super().objective(u, batch)

    data = blobs(90)
    u = update(network(), data, owner=Watches(), epochs=2, batch_size=16, patience=5, validation=0.2)
    consumed = learn(u)
    assert len(trained) == 72 and consumed.new == data.ids


def test_training_stops_and_the_best_epoch_comes_back() -> None:
    """Against a loop written out: epochs of the same order, the loss on the same rows, the weights of the lowest."""
    data = blobs(90, width=6)
    noisy = data.replace(y=torch.where(torch.arange(90) % 4 == 0, (data["y"] + 1) % 3, data["y"]))
    u = update(network(), noisy, epochs=60, batch_size=8, lr=0.02, patience=3, validation=0.3)
    epochs: list[int] = []
    losses: list[float] = []
    kept: list[torch.Tensor] = []
    real = Stopping.over

    def over(self: Stopping, u: Any) -> bool:
        epochs.append(u.epoch)
        y = self.rows["y"]
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(u.model.eval()(self.rows["x"]), y)))
        u.model.train()
        kept.append(weights(u))
        return real(self, u)

    Stopping.over = over  # type: ignore[method-assign]
    try:
        learn(u)
    finally:
        Stopping.over = real  # type: ignore[method-assign]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert epochs == list(range(len(epochs))) and len(epochs) < 60
    assert len(losses) == best + 1 + 3  # three epochs without a lower one
    assert torch.equal(weights(u), kept[best])


def test_patience_that_never_runs_out_changes_no_bit_of_the_rows_left() -> None:
    data = blobs(90)
    stopped = update(network(), data, epochs=3, batch_size=16, lr=0.001, patience=50, validation=0.2)
    learn(stopped)
    left = Stopping.split(update(network(), data, patience=50, validation=0.2), data)[1]
    plain = update(network(), left, epochs=3, batch_size=16, lr=0.001)
    learn(plain)
    assert math.isfinite(float(weights(plain).sum())) and torch.equal(weights(stopped), weights(plain))


@pytest.mark.parametrize("validation", [0.0, 1.0, 0.001])
def test_too_few_rows(validation: float) -> None:
    with pytest.raises(BadInput, match="leaves none"):
        learn(update(network(), blobs(20), patience=1, validation=validation))


def test_nested_phases_are_as_long_as_their_part_says() -> None:
    class Nested(Finetune):
        def learn(self, u: Any) -> None:
            u.run()
            u.run(epochs=4, lr=0.0)
            lengths.append(u.steps_done)

    lengths: list[int] = []
    learn(update(network(), blobs(80), owner=Nested(), epochs=2, batch_size=80, lr=0.0, patience=1, validation=0.5))
    assert lengths == [2 + 4]


# -- in a life


def test_a_killed_event_goes_on_with_its_stopping_and_its_scale(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two steps and resumed: the same bits, in float16 with early stopping and a one-cycle schedule."""
    task = rm.data.split_digits()[0]
    how: dict[str, Any] = {
        "epochs": 6, "batch_size": 32, "lr": 0.01, "schedule": "one-cycle", "precision": "float16", "patience": 2, "validation": 0.2,
        "snapshot_every": 4,
    }  # fmt: skip

    def live(home: Any, stop_at: int | None) -> str:
        model = rm.models.mlp(64, [16])
        life = rm.Life.resume(home, model, [task]) if (home / "ledger.db").exists() else rm.Life(model, home=home)
        steps = 0
        real = Out.__init__

        def dies(self: Out, *arguments: Any, **knobs: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                raise KeyboardInterrupt
            real(self, *arguments, **knobs)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(Out, "__init__", dies)
                life.learn(task, **how)
            return life.content_digest()
        finally:
            life.close()

    whole = live(tmp_path / "whole" / "home", None)
    with pytest.raises(KeyboardInterrupt):
        live(tmp_path / "cut" / "home", 41)
    assert live(tmp_path / "cut" / "home", None) == whole


def test_a_device_that_is_not_there_is_refused() -> None:
    for device in ("cuda", "mps"):
        there = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
        if not there:
            with pytest.raises(BadInput, match="cpu"):
                rm.Life(rm.models.mlp(64, [8]), device=device)
