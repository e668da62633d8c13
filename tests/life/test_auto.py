"""`by: auto`: attempts in order, each on a copy, one of them taken, all of them told."""

from __future__ import annotations

import pytest

from remanence import Life
from remanence.core.errors import BadInput, UnknownName
from remanence.core.ids import Ids
from remanence.data import Request, split_digits
from remanence.forget.auto import Auto
from remanence.life.snapshots import weights_sha256
from remanence.models import mlp

STREAM = split_digits(tasks=2)
NOTHING_DONE = {"ssd": {"selection": 1e30}}


def life(tmp_path, name="a"):
    made = Life(
        lambda seed: mlp(64, [64], seed=seed % 1000), keep=[{"replay": {"per_class": 20}}], home=tmp_path / name, seed=3
    )
    for task in STREAM:
        made.learn(task, epochs=6, batch_size=32, lr=2e-3)
    return made


def weights(made):
    return weights_sha256(made.model.state_dict())


def test_the_first_that_is_like_retraining_is_taken_with_its_own_bits(tmp_path):
    with life(tmp_path) as one, life(tmp_path, "b") as other:
        start = weights(one)
        by = Auto(candidates=[NOTHING_DONE, {"random-label": {}}, {"gradient-ascent": {}}])
        receipt = one.forget(Request(classes=[3]), by=by, verify="retrain")
        said = receipt.content["notes"]
        assert said[0].startswith("attempt 1: ssd: not like retraining in forget accuracy")
        taken = said[-1].split()[1].rstrip(",")
        assert taken in ("random-label", "gradient-ascent") and weights(one) != start
        tried = [line for line in said if line.startswith("attempt")]
        assert len(tried) == (2 if "like retraining in every figure" in tried[1] else 3)
        other.forget(Request(classes=[3]), by=taken)
        assert weights(one) == weights(other)  # a trial leaves no trace in what comes after it
        assert receipt.by == "auto"


def test_where_none_gets_there_it_says_so(tmp_path):
    with life(tmp_path) as made:
        start = weights(made)
        receipt = made.forget(
            Request(classes=[3]), by=Auto(candidates=[NOTHING_DONE], otherwise="nothing"), verify="retrain"
        )
        assert receipt.content["notes"][-2:] == ["none of 1 is like retraining in every figure", "changed nothing"]
        assert weights(made) == start and receipt.states["weights"] == "holds"
    with life(tmp_path, "r") as made:
        receipt = made.forget(Request(classes=[3]), by=Auto(candidates=[NOTHING_DONE], otherwise="retrain"))
        assert receipt.states["weights"] == "deleted" and receipt.content["notes"][-1] == "retrained"


def test_what_only_does_harm_is_not_taken(tmp_path):
    """Of single examples that doing nothing cannot be told from, dampening every weight only harms the rest."""
    with life(tmp_path) as made:
        start = weights(made)
        harmful = {"ssd": {"selection": 1e-6, "dampening": 0.01}}
        receipt = made.forget(Request(ids=range(0, 40)), by=Auto(candidates=[harmful]), verify="retrain")
        said = receipt.content["notes"]
        assert "farther than before" in said[-3] and said[-1] == "doing nothing is nearer than any; changed nothing"
        assert weights(made) == start


def test_a_candidate_that_cannot_is_left_out(tmp_path):
    """No labels but one class left: random labels have nothing to teach."""
    with life(tmp_path) as made:
        made.forget(Request(classes=[0, 1, 2, 3, 5, 6, 7, 8, 9]), by="retrain")
        fours = STREAM[0].train.select((STREAM[0].train["y"] == 4).nonzero()[:20, 0]).ids
        receipt = made.forget(Request(ids=fours), by=Auto(candidates=["random-label", "gradient-ascent"]))
        assert (
            "random-label could not" in receipt.content["notes"][0]
            and "took gradient-ascent" in receipt.content["notes"][-1]
        )


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        ([], BadInput, "names no method"),
        (["sdd"], UnknownName, "ssd"),
        (["auto"], BadInput, "no candidate"),
        (["retrain"], BadInput, "no candidate"),
        ([{"ssd": {"selecton": 1}}], UnknownName, "selection"),
    ],
)
def test_wrong_candidates(candidates, error, message):
    with pytest.raises(error, match=message):
        Auto(candidates=candidates)


@pytest.mark.slow
@pytest.mark.fidelity(
    "forget/auto",
    check="a class and 40 random digits asked of lives: what was taken, and the receipt's own judgement",
    measured="of a class none is like retraining in every figure (KL from the references fails in all); the nearest is taken, under 0.2 of it left",
    paper="-",
    differs="no paper",
)
def test_the_default_candidates_on_digits(tmp_path):
    with life(tmp_path) as made:
        receipt = made.forget(Request(classes=[3]), by="auto", verify="retrain")
        said = receipt.content["notes"]
        assert said[-1].startswith("took") and receipt.content["after"]["forget accuracy"] < 0.2, said
        assert ("none of 7" in said[-2]) == said[-1].endswith("the nearest")
        ids = Ids(STREAM[0].train.without(receipt.ids).id[:40].numpy())
        again = made.forget(Request(ids=ids), by="auto", verify="retrain")
        assert any(line.startswith("took") for line in again.content["notes"]), again.content["notes"]
