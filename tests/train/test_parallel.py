"""Two processes against one: the same weights, whatever the parts make of a batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from remanence.core.problem import CausalLM
from remanence.learn.finetune import Finetune
from remanence.train.parallel import Team, main, world
from remanence.train.roles import Learner
from tests.lm import facts, tiny
from tests.train import several
from tests.train.helpers import blobs, network, update

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(several.__file__)
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--master-port={port}"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no", "--main_process_port={port}"]  # fmt: skip


def together(folder: Path, launcher: list[str], names: list[str]) -> list[dict[str, Any]]:
    """What each of two processes ends with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(port=port) for word in launcher]
    command = [sys.executable, "-m", *words, str(SCRIPT), str(folder), *names]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=300,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"{r}.safetensors") | json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    return together(tmp_path_factory.mktemp("two"), ACCELERATE, [*several.LIVES, *several.MORE])


@pytest.mark.parametrize("name", several.LIVES)
def test_two_processes_end_where_one_does(name: str, ends: list[dict[str, Any]]) -> None:
    alone = several.LIVES[name]()
    assert torch.equal(ends[0][name], ends[1][name])
    torch.testing.assert_close(ends[0][name], alone, rtol=0, atol=1e-5)


def test_running_statistics_are_the_same_in_all(ends: list[dict[str, Any]]) -> None:
    """Every process normalises by its own rows, so the end is not that of one; where batches are left over it is still one end."""
    for name in ("normed", "normed, accumulated"):
        assert torch.equal(ends[0][name], ends[1][name]) and bool(ends[0][name].isfinite().all())


def test_each_goes_through_its_rows(ends: list[dict[str, Any]]) -> None:
    """Of 25 rows of text by rows, and of 90 points whose answers all see."""
    assert [end["shares"] for end in ends] == [[12, 90], [13, 90]]
    assert [end["world"] for end in ends] == [[0, 2], [1, 2]]


def test_progress_is_told_once(ends: list[dict[str, Any]]) -> None:
    assert [end["reported"] for end in ends] == [1, 0]


def test_weights_that_differ_are_noticed_by_all(ends: list[dict[str, Any]]) -> None:
    assert ends[0]["apart"] == ends[1]["apart"]
    assert "process 1 of 2" in ends[0]["apart"] and "learn/0" in ends[0]["apart"]


def test_a_loss_that_is_no_number_in_one_ends_all_at_the_same_step(ends: list[dict[str, Any]]) -> None:
    assert ends[0]["not finite"] == ends[1]["not finite"] and "nan at step 3" in ends[0]["not finite"]


@pytest.mark.slow
def test_by_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = together(tmp_path, TORCHRUN, ["text, by rows"])
    assert torch.equal(found[0]["text, by rows"], found[1]["text, by rows"])
    torch.testing.assert_close(found[1]["text, by rows"], several.LIVES["text, by rows"](), rtol=0, atol=1e-5)


# -- shares, without processes


@pytest.mark.parametrize("rows", [3, 7, 8, 30])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_shares_gradients_add_up_to_that_of_the_batch(rows: int, weighted: bool) -> None:
    model, problem, data = tiny(hidden=16), CausalLM(context=12), facts(rows, 1)
    batch = {**data.columns, "id": data.id}
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, 6:] = -100
    if weighted:
        batch["weight"] = torch.rand(rows, generator=torch.Generator().manual_seed(0)) + 0.1
    params = list(model.parameters())

    def gradient(part: Any) -> torch.Tensor:
        loss = problem.loss(problem.forward(model, part), part)
        return torch.cat([g.reshape(-1).double() for g in torch.autograd.grad(loss, params)])

    total, ids = torch.zeros((), dtype=torch.float64), []
    for rank in range(3):
        mine, weight = Team(rank, 3).share(problem, batch)
        ids += mine["id"].tolist()
        total = total + weight * gradient(mine)
    assert ids == batch["id"].tolist()
    torch.testing.assert_close(total, gradient(batch), rtol=1e-4, atol=1e-7)


def test_only_a_mean_over_rows_is_made_of_some() -> None:
    """The default objective is one; another must say so itself, not by whom it comes from; a term of a part never is."""

    class Plain(Learner):
        pass

    class Anew(several.ByRows):
        def objective(self, u: Any, batch: Any) -> Any:
            return super().objective(u, batch)

    class Inherits(several.ByRows):
        pass

    asked = {
        owner: several.text_update(owner()).shares(False) for owner in (Plain, Finetune, several.ByRows, Anew, Inherits)
    }
    assert asked == {
        Plain: True,
        Finetune: vars(Finetune).get("by_rows", False),
        several.ByRows: True,
        Anew: False,
        Inherits: True,
    }
    assert not several.text_update(several.ByRows()).shares(True)
    assert not update(network(), blobs(), owner=several.ByRows()).shares(False)


def test_too_few_rows_go_to_all() -> None:
    """Two rows for three, and one whose share has no target."""
    data = facts(6, 0)
    batch = {**data.columns, "id": data.id}
    few = {name: column[:2] for name, column in batch.items()}
    none = {**batch, "labels": torch.where(torch.arange(6)[:, None] < 2, -100, batch["labels"])}
    for each in (few, none):
        for rank in range(3):
            mine, weight = Team(rank, 3).share(CausalLM(context=12), each)
            assert mine is each and weight == pytest.approx(1 / 3)


def test_the_runs_of_rows_cover_them() -> None:
    for rows in (2, 3, 10, 64):
        for size in (2, 3, 7):
            bounds = Team(0, size).bounds(rows)
            lengths = torch.tensor(bounds).diff()
            assert bounds[0] == 0 and bounds[-1] == rows and int(lengths.max() - lengths.min()) <= 1


def test_no_launcher_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")  # a scheduler's, for something else
    assert world() == (0, 1) and main()
