"""A life of texts: tokens, entities, evidence, resume, and what is refused before anything moves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import remanence as rm
from remanence.core.errors import BadInput, DataChanged, UnknownName
from remanence.core.problem import CausalLM
from remanence.data import Examples, Task

pytest.importorskip("transformers")
from remanence.data.people import people_stream
from remanence.data.tokenizers import bpe, byte_tokens
from remanence.models import llama

PROBLEM = {"causal-lm": {"context": 64}}
FACTS = ["birthplace", "instrument", "genre"]
TRAIN: dict[str, Any] = {"epochs": 30, "batch_size": 16, "lr": 3e-3, "clip": 1.0}


@pytest.fixture(scope="module")
def tok() -> Any:
    return bpe(400)


@pytest.fixture(scope="module")
def stream() -> Any:
    return people_stream(2, 4, phrasings=2, facts=FACTS)


def network(tok: Any, seed: int = 0) -> Any:
    return llama(len(tok), 64, 2, 4, context=64, seed=seed)


@pytest.fixture(scope="module")
def lived(tok: Any, stream: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A life that learned both batches."""
    home = tmp_path_factory.mktemp("lived") / "home"
    life = rm.Life(
        network(tok),
        tokenizer=tok,
        problem=PROBLEM,
        home=home,
        keep=[{"replay": {"policy": "reservoir", "capacity": 30}}],
    )
    with life:
        for task in stream:
            life.learn(task, **TRAIN)
        yield life


def test_facts_are_learned_word_for_word_and_answered(lived: Any, stream: Any) -> None:
    train = stream[1].train
    context = lived._context()
    scores = context.evaluate(lived._learned[1].task.train)
    assert scores["exact"] == 1 and scores["accuracy"] == 1
    prompts, answers = train.columns["prompt"][:4], train.columns["answer"][:4]
    assert lived.predict(prompts) == answers and lived.predict(prompts[0]) == answers[0]
    unseen = lived._learned[1].task.strangers
    assert context.evaluate(unseen)["exact"] < 0.5


def test_the_books_follow_documents_and_entities(lived: Any, stream: Any) -> None:
    name = stream[0].train.columns["entity"][0]
    mine = [row for row, each in enumerate(stream[0].train.columns["entity"]) if each == name]
    asked, unseen = rm.Request(entities=[name]).resolve([item.task.train for item in lived._learned])
    assert sorted(asked.array.tolist()) == sorted(stream[0].train.id[mine].tolist()) and not unseen
    document = stream[0].train.columns["document"][0]
    asked, _ = rm.Request(documents=[document]).resolve([item.task.train for item in lived._learned])
    assert len(asked) == 2  # the fact, asked for in two ways
    assert {trace.holder for trace in lived.trace(asked) if trace.state == "holds"} >= {"weights"}


def test_a_request_for_somebody_never_seen_moves_nothing(lived: Any) -> None:
    before = lived.content_digest()
    with pytest.raises(UnknownName, match="never seen entities"):
        lived.forget(rm.Request(entities=["Nobody Atall"]), by="gradient-ascent")
    assert lived.content_digest() == before


def test_an_author_is_forgotten_with_evidence_beside_retraining(tok: Any, stream: Any) -> None:
    name = stream[0].train.columns["entity"][0]
    with rm.Life(network(tok), tokenizer=tok, problem=PROBLEM) as life:
        life.learn(stream[0], **TRAIN)
        held = len(life._tasks()[0].test)
        receipt = life.forget(rm.Request(entities=[name]), by="retrain", verify={"retrain": {"seeds": 2}})
        assert receipt.status == "done"
        cells = {cell["metric"]: cell for cell in life._rows[-1].body["evidence"]}
        assert cells["forget exact"]["nothing"] == 1 and cells["forget exact"]["after"] < 0.7
        assert cells["membership AUC (loss-threshold)"]["nothing"] > 0.9
        assert cells["membership AUC (loss-threshold)"]["after"] < cells["membership AUC (loss-threshold)"]["nothing"]
        assert {"forget held-out accuracy", "retain exact", "test accuracy", "KL from references"} <= cells.keys()
        # Whoever is forgotten is not asked about any more in what is held out; and nothing says the name.
        assert len(life._tasks()[0].test) == held - len(FACTS)
        assert all(trace.state == "deleted" for trace in life.trace(receipt.ids) if trace.holder == "weights")
        assert name not in "".join(row.body.__repr__() for row in life._ledger.rows())


def test_a_life_goes_on_with_the_same_bits_and_asks_for_its_tokenizer(tok: Any, stream: Any, tmp_path: Path) -> None:
    short = {**TRAIN, "epochs": 2}
    with rm.Life(network(tok), tokenizer=tok, problem=PROBLEM, home=tmp_path / "a", keep=["gere"]) as life:
        life.learn(stream[0], **short)
        life.learn(stream[1], **short)
        whole = life.model.state_dict()
    with rm.Life(network(tok), tokenizer=tok, problem=PROBLEM, home=tmp_path / "b", keep=["gere"]) as life:
        life.learn(stream[0], **short)
    with pytest.raises(DataChanged, match="tokenizer"):
        rm.Life.resume(tmp_path / "b", network(tok), stream)
    with pytest.raises(DataChanged, match="tokenizer"):
        rm.Life.resume(tmp_path / "b", network(tok), stream, tokenizer=bpe(390))
    with rm.Life.resume(tmp_path / "b", network(tok), stream, tokenizer=tok) as life:
        life.learn(stream[1], **short)
        assert all(torch.equal(value, whole[name]) for name, value in life.model.state_dict().items())


PLAN = """
model: {llama: {hidden: 32, layers: 2, context: 64}}
tokenizer: {bpe: {vocab: 300}}
problem: {causal-lm: {context: 64}}
stream: {people: {batches: 2, people: 4, phrasings: 2, facts: [birthplace]}}
keep: [{replay: {policy: reservoir, capacity: 10}}]
train: {epochs: 2, batch_size: 8, lr: 0.003}
events:
  - learn: 0
  - forget: {entities: [NAME], by: retrain, verify: none}
  - learn: 1
"""


def test_a_plan_lives_the_same_life_and_is_resumed(stream: Any, tmp_path: Path) -> None:
    from remanence.life.run import run_plan

    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("NAME", stream[0].train.columns["entity"][0]))
    with run_plan(path, tmp_path / "home") as life:
        assert [event.kind for event in life.events] == ["learn", "forget", "learn"]
        digest = life.content_digest()
        assert (tmp_path / "home" / "report.html").exists()
    with rm.Life.resume(tmp_path / "home") as again:
        assert again.content_digest() == digest and again.tokenizer is not None
        assert isinstance(again.predict("Where?", tokens=3), str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("keep: [{replay: {policy: reservoir, capacity: 10}}]", "keep: [replay]"),
            "replay shares its buffer out by classes",
        ),
        (
            ("keep: [{replay: {policy: reservoir, capacity: 10}}]", "keep: [lwf]"),
            "lwf needs classes, and a causal-lm has none",
        ),
        (("{bpe: {vocab: 300}}", "{bpee: {vocab: 300}}"), "no tokenizer is called 'bpee'; did you mean 'bpe'"),
        (("{bpe: {vocab: 300}}", "{bpe: {vocabb: 300}}"), "bpe has no knob 'vocabb'; did you mean 'vocab'"),
        (("{causal-lm: {context: 64}}", "classification"), "llama is a language model; write problem: causal-lm"),
        (
            ("{llama: {hidden: 32, layers: 2, context: 64}}", "{mlp: {}}"),
            "mlp is no language model; write one of llama, causal-lm",
        ),
        (("context: 64}}\nstream", "contex: 48}}\nstream"), "contex"),
        (("hidden: 32", "hidden: 33"), "must be a multiple"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_at_its_line(change: tuple[str, str], message: str) -> None:
    from remanence.core.errors import PlanError
    from remanence.life.plan import parse_plan

    assert change[0] in PLAN
    with pytest.raises(PlanError, match=message):
        parse_plan(PLAN.replace(*change), "plan.yaml")


def test_what_does_not_fit_is_refused_before_anything_moves(tok: Any, stream: Any) -> None:
    with pytest.raises(BadInput, match="embeds 300"):
        rm.Life(llama(300, 32, 1, 2, context=64), tokenizer=tok, problem=PROBLEM)
    with pytest.raises(BadInput, match="more than the 64 places"):
        rm.Life(network(tok), tokenizer=tok, problem={"causal-lm": {"context": 65}})
    with pytest.raises(BadInput, match="belongs to a causal language model"):
        rm.Life(network(tok), tokenizer=tok, problem="classification")
    with rm.Life(network(tok), tokenizer=tok, problem=PROBLEM) as life:
        weights = copy.deepcopy(life.model.state_dict())
        long = Examples({"prompt": ["Who?"], "answer": ["word " * 60], "document": ["d1"]}, "long")
        bad: list[tuple[Any, str]] = [
            (long, "document 'd1' has .* tokens, and a row has 64"),
            (Examples({"prompt": ["Who?"], "answer": [" "]}, "qa"), "answer is empty"),
            (Examples({"x": torch.zeros(3, 2)}, "numbers"), "has no input_ids"),
        ]
        for data, message in bad:
            with pytest.raises(BadInput, match=message):
                life.learn(data)
        table = rm.data.tokenised(stream[0].train, tok, CausalLM(context=64))
        wrong = {
            "tokens beyond the 400": {"input_ids": table["input_ids"] + 300},
            "padding that is not on the right": {"attention_mask": table["attention_mask"].flip(1)},
            "targets that are not their own tokens": {"labels": table["labels"].clone().fill_(3)},
            "no target at all": {"labels": torch.full_like(table["labels"], -100)},
        }
        for message, columns in wrong.items():
            with pytest.raises(BadInput, match=message):
                life.learn(table.replace(**columns))
        assert not life.events
        assert all(torch.equal(value, weights[name]) for name, value in life.model.state_dict().items())
    with rm.Life(network(tok), problem=PROBLEM) as life, pytest.raises(BadInput, match="no tokenizer to cut them"):
        life.learn(stream[0])


def test_packing_and_bfloat16_learn_the_same_facts(tok: Any, stream: Any) -> None:
    for knobs, precision in (({"packing": True}, "float32"), ({}, "bfloat16")):
        with rm.Life(network(tok), tokenizer=tok, problem={"causal-lm": {"context": 64, **knobs}}) as life:
            life.learn(stream[0], **TRAIN, precision=precision)
            assert life._context().evaluate(life._learned[0].task.train)["exact"] > 0.95


def test_early_stopping_and_accumulation_take_texts(tok: Any, stream: Any) -> None:
    with rm.Life(network(tok), tokenizer=tok, problem=PROBLEM) as life:
        event = life.learn(stream[0], epochs=3, batch_size=4, accumulate=2, patience=1, validation=0.2)
        assert 0 < event.steps <= 3 * 3


def test_rows_of_tokens_need_no_tokenizer_and_every_document_keeps_its_id() -> None:
    tok = byte_tokens()
    texts = Examples({"text": ["one document of some length here", "two"], "document": ["a", "b"]}, "texts", [5, 6])
    table = rm.data.tokenised(texts, tok, CausalLM(context=12, long="split"))
    with rm.Life(llama(257, 32, 1, 2, context=12), problem={"causal-lm": {"context": 12, "packing": True}}) as life:
        life.learn(Task(table, table, id=0), epochs=1, batch_size=4)
        asked, _ = rm.Request(documents=["a"]).resolve([life._learned[0].task.train])
        assert {int(i) // 2**16 for i in asked.array} == {5} and len(asked) == 3
        receipt = life.forget(rm.Request(documents=["a"]), by="gradient-ascent", epochs=1, lr=1e-4)
        assert receipt.ids == asked


def test_a_saved_model_and_its_tokenizer_go_on_living_in_python_and_in_a_plan(tok: Any, tmp_path: Path) -> None:
    import json

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from remanence.life.run import run_plan

    folder = tmp_path / "model"
    network(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    table = rm.data.people(2, facts=["birthplace"])
    rows = [dict(zip(("question", "answer", "entity"), row, strict=True))
            for row in zip(*(table.columns[n] for n in ("prompt", "answer", "entity")), strict=True)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.txt").write_text("Words about nobody. " * 3)
    loaded = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with rm.Life(model, tokenizer=loaded, problem=PROBLEM, keep=["gere"]) as life:
        life.learn(rm.data.text(str(tmp_path / "*.jsonl")), schedule="infinite-lr", where={"lora": {"rank": 4}})
        with pytest.raises(DataChanged, match="start="):
            life.learn(rm.data.text(tmp_path / "b.txt"), where={"lora": {"rank": 4}})
        life.learn(rm.data.text(tmp_path / "b.txt", start=1000), where={"lora": {"rank": 4}})
        receipt = life.forget(rm.Request(entities=[rows[0]["entity"]]), by="gradient-ascent")
        assert len(receipt.ids) == 5 and [event.kind for event in life.events] == ["learn", "learn", "forget"]
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({
        "model": {"causal-lm": {"name": str(folder)}}, "tokenizer": {"pretrained": {"name": str(folder)}}, "problem": PROBLEM,
        "stream": {"text": {"paths": [str(tmp_path / "a.jsonl")], "test_share": 0.2}}, "events": [{"learn": 0}],
    }))  # fmt: skip
    with run_plan(path, tmp_path / "home") as life:
        assert life.events[0].steps == 1 and life.tokenizer.get_vocab() == loaded.get_vocab()
    with pytest.raises(BadInput, match="is no folder"):
        rm.models.causal_lm(str(tmp_path / "nothing"))
    with pytest.raises(BadInput, match="gives no causal language model"):
        rm.models.causal_lm(str(tmp_path / "home"))


def test_of_several_processes_only_the_first_writes_a_home_and_none_resumes(
    tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remanence.core.errors import Refused
    from remanence.life import life as module

    monkeypatch.setattr(module, "main", lambda: False)
    with rm.Life(network(tok), tokenizer=tok, problem=PROBLEM, home=tmp_path / "home") as life:
        assert life.home != tmp_path / "home" and not (tmp_path / "home").exists()
    monkeypatch.setattr(module, "world", lambda: (0, 2))
    with pytest.raises(Refused, match="not resumed by several processes"):
        rm.Life.resume(tmp_path / "home", network(tok), tokenizer=tok)


def test_the_membership_metric_tells_learned_rows_from_strangers(lived: Any) -> None:
    values = lived._measured(lived._learned, [rm.measure.Membership()])["measures"]
    assert values["membership"] > 0.8
