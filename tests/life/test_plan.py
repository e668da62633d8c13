"""Plans: what a valid one means, that each mistake is found at its line, and that no input raises anything but PlanError."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.core.errors import PlanError
from remanence.core.ids import Ids
from remanence.data import Request
from remanence.life.forgetting import seeds_of
from remanence.life.plan import Plan, load_plan, parse_plan
from remanence.life.yaml import parse

torch.set_num_threads(1)

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"
HEAD = "model: {mlp: {hidden: [8]}}\nstream: {split-digits: {tasks: 5}}\n"
FULL = """\
name: full
seed: 3
model: {mlp: {hidden: [16], norm: true}}
problem: {classification: {link: softmax}}
stream: {split-digits: {tasks: 5, test_share: 0.3}}
learner: finetune
keep: [{replay: {per_class: 2}}, {ewc: {strength: 1}}]
where: saliency
train: {epochs: 2, batch_size: 16, optimizer: {sgd: {momentum: 0.9}}, lr: 0.1, schedule: {cosine: {warmup: 2}}, clip: 1.0, accumulate: 2}
events:
  - learn: 0
  - learn: {task: 1, epochs: 3, lr: 0.5, clip: none, keep: [], where: [hft], carry: true, snapshot_every: 5, allow_forgotten: true}
  - forget: {classes: [1], ids: [3, '5-7'], by: {ssd: {selection: 5}}, keep: [l2], where: saliency, limit: 0.5}
  - forget: {ids: '10-12', by: salun, verify: none, epochs: 2, batch_size: 8, optimizer: adam, lr: 0.1, schedule: linear}
measure: [accuracy, {stability-gap: {every: 2}}]
device: cpu
threads: 1
"""


def refused(text: str, *expected: tuple[int, str]) -> str:
    """Every problem begins with file and line; each of `expected` (line, words) is among them."""
    with pytest.raises(PlanError) as error:
        parse_plan(text)
    message = str(error.value)
    for line in message.split("\n"):
        assert re.match(r"plan\.yaml:\d+: \S", line), message
    for number, words in expected:
        assert re.search(rf"^plan\.yaml:{number}: .*{words}", message, re.MULTILINE), f"{number}: {words}\n{message}"
    return message


def test_the_example_is_a_plan() -> None:
    plan = load_plan(EXAMPLE)
    assert [event.kind for event in plan.events] == ["learn"] * 3 + ["forget"] * 2 + ["learn"] * 2
    assert plan.name == "digits"
    assert plan.source == EXAMPLE.read_text()
    classes, ids = (event.options() for event in plan.events[3:5])
    assert classes["request"] == {"classes": [3]}
    assert classes["verify"] == {"retrain": {"seeds": 3}}
    assert len(ids["request"]["ids"]) == 60
    assert ids["verify"] is None
    assert Request(**ids["request"]).ids == ids["request"]["ids"]


def test_the_ids_of_the_example_were_learned_and_are_not_forgotten_twice() -> None:
    plan = load_plan(EXAMPLE)
    make, knobs = plan.factory("stream")
    ids = plan.events[4].options()["request"]["ids"]
    tasks = [task.train for task in make(**knobs).tasks[:3]]
    assert [len(ids & task.ids) for task in tasks] == [20, 20, 20]
    assert 3 not in tasks[1].only(ids & tasks[1].ids)["y"].tolist()


def test_options_are_the_arguments_of_the_life() -> None:
    import inspect

    from remanence.life.life import Life

    plan = parse_plan(FULL)
    assert plan.events[0].options() == {"task": 0, "carry": False, "allow_forgotten": False}
    learn, forget, second = (event.options() for event in plan.events[1:])
    assert learn["keep"] == []
    assert learn["where"] == [{"hft": {}}]
    assert learn["clip"] is None
    assert learn["snapshot_every"] == 5
    assert set(learn) <= set(inspect.signature(Life.learn).parameters)
    assert set(forget) - {"request"} | set(second) - {"request"} <= set(inspect.signature(Life.forget).parameters)
    assert forget["request"] == {"classes": [1], "ids": Ids([3, 5, 6, 7])}
    assert second["request"] == {"ids": Ids([10, 11, 12])}
    assert [seeds_of(event["verify"]) for event in (forget, second)] == [3, 0]
    assert "lr" not in forget
    assert second["lr"] == 0.1
    assert plan.events[1].learn is not None
    merged = plan.settings(plan.events[1].learn)
    assert merged == {
        "epochs": 3,
        "batch_size": 16,
        "optimizer": {"sgd": {"momentum": 0.9}},
        "lr": 0.5,
        "schedule": {"cosine": {"warmup": 2}},
        "clip": None,
        "accumulate": 2,
        "precision": "float32",
        "compile": False,
        "patience": None,
        "validation": 0.1,
        "checkpointing": False,
    }


@pytest.mark.parametrize("text", [FULL, EXAMPLE.read_text(), HEAD + "events: [{learn: 0}]"])
def test_canonical_is_a_plan_of_the_same_meaning(text: str) -> None:
    once = parse_plan(text).canonical()
    again = parse_plan(json.dumps(once), "other.yaml").canonical()
    assert json.dumps(once, sort_keys=True) == json.dumps(again, sort_keys=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("keep: [ewc]", "keep: {ewc: {strength: 100}}"),
        ("keep: ewc", "keep: [{ewc: }]"),
        ("train: {epochs: 1}", "name: other\nhome: elsewhere"),
        ("learner: finetune", "seed: 0"),
        ("train: {lr: 1}", "train: {lr: 1.0}"),
        ("problem: classification", ""),
    ],
)
def test_what_means_the_same_is_canonically_the_same(one: str, other: str) -> None:
    tail = "\nevents: [{learn: 0}]\n"
    assert parse_plan(HEAD + one + tail).canonical() == parse_plan(HEAD + other + tail).canonical()
    assert parse_plan(HEAD + "seed: 1" + tail).canonical() != parse_plan(HEAD + tail).canonical()


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("model:", "modle:", 3, "no key 'modle'; did you mean 'model'"),
        ("{mlp: {hidden", "{mpl: {hidden", 3, "no model is called 'mpl'; did you mean 'mlp'"),
        ("hidden:", "hiden:", 3, "mlp has no knob 'hiden'; did you mean 'hidden'"),
        ("[16]", "sixteen", 3, "hidden='sixteen' has the wrong type; expected list"),
        ("[16]", "[-16]", 3, "mlp cannot be built"),
        ("norm: true", "norm: yes", 3, "norm='yes' has the wrong type"),
        ("norm: true", "seed: 3", 3, "seed is no knob of a plan's model"),
        ("norm: true", "hidden: [3]", 3, "given before"),
        ("{classification: {link: softmax}}", "clasification", 4, "no problem is called .* did you mean 'classification'"),
        ("link: softmax", "link: softmx", 4, "is not one of .* did you mean softmax|did you mean 'softmax'"),
        ("split-digits", "split-digit", 5, "no stream is called .* did you mean 'split-digits'"),
        ("tasks: 5", "taks: 5", 5, "no knob 'taks'; did you mean 'tasks'"),
        ("tasks: 5", "tasks: 1", 12, "the stream has tasks 0 to 0, not 1"),
        ("tasks: 5", "tasks: 0", 5, "at least 1 task"),
        ("split-digits: {tasks: 5, test_share: 0.3}", "split-idx: {images: a}", 5, "split-idx needs labels"),
        ("finetune", "fintune", 6, "did you mean 'finetune'"),
        ("finetune", "ewc", 6, "'ewc' is a part of keep"),
        ("replay", "repaly", 7, "did you mean 'replay'"),
        ("per_class: 2", "per_clas: 2", 7, "replay has no knob 'per_clas'; did you mean 'per_class'"),
        ("per_class: 2", "per_class: two", 7, "per_class='two' has the wrong type"),
        ("strength: 1}", "strength: -1}", 7, "strength=-1 is outside its range"),
        ("strength: 1}", "strength: .nan}", 7, "not a finite number"),
        ("strength: 1}", "strength: .inf}", 7, "not a finite number"),
        ("{ewc: {strength: 1}}", "{ewc: {}, l2: {}}", 7, "expected one name"),
        ("{ewc: {strength: 1}}", "{ewc: 3}", 7, "a mapping such as"),
        ("{ewc: {strength: 1}}", "7", 7, "expected a name"),
        ("where: saliency\n", "where: salience\n", 8, "did you mean 'saliency'"),
        ("epochs: 2, batch_size: 16", "epochs: -2, batch_size: 16", 9, "epochs=-2 is outside"),
        ("batch_size: 16", "batch_size: '16'", 9, "a whole number, not '16'; write 16 without quotes"),
        ("batch_size: 16", "batch_size: 16.0", 9, "a whole number"),
        ("batch_size: 16", "batchsize: 16", 9, "did you mean 'batch_size'"),
        ("momentum", "momentun", 9, "did you mean 'momentum'"),
        ("{sgd", "{sgdd", 9, "no optimizer is called .* did you mean 'sgd'"),
        ("momentum: 0.9", "momentum: -3", 9, "momentum"),
        ("{cosine", "{cosin", 9, "did you mean 'cosine'"),
        ("warmup", "warmpu", 9, "did you mean 'warmup'"),
        ("learn: 0", "lern: 0", 11, "did you mean 'learn'"),
        ("learn: 0", "learn: first", 11, "a mapping"),
        ("learn: 0", "learn: true", 11, "must be"),
        ("learn: 0", "learn: -1", 11, "greater than or equal to 0"),
        ("learn: 0", "learn: 5", 11, "tasks 0 to 4, not 5"),
        ("learn: 0", "learn: {epochs: 1}", 11, "task is missing"),
        ("learn: 0", "{learn: 0, forget: {classes: [1], by: ssd}}", 11, "either"),
        ("- learn: 0", "- 0", 11, "a mapping"),
        ("- learn: 0", "-", 11, "a mapping"),
        ("carry: true", "carry: on", 12, "true or false, not 'on'; write true"),
        ("classes: [1]", "clases: [1]", 13, "did you mean 'classes'"),
        ("classes: [1]", "classes: 1", 13, r"a list, not 1; write \[1\]"),
        ("classes: [1]", "classes: [one]", 13, "a whole number"),
        ("'5-7'", "'7-5'", 13, "runs backwards"),
        ("'5-7'", "'0-99999999999999'", 13, "more than 10000000 ids"),
        ("'5-7'", "'0-99999999999999999999'", 13, "ids are a list"),
        ("'5-7'", "-9223372036854775808-9223372036854775806", 13, "more than"),
        ("'5-7'", "five", 13, "ids are a list of whole numbers"),
        ("'5-7'", "1.5", 13, "ids are a list of whole numbers"),
        ("by: {ssd", "by: {sdd", 13, "did you mean 'ssd'"),
        ("selection: 5", "selektion: 5", 13, "did you mean 'selection'"),
        ("by: {ssd: {selection: 5}}, ", "", 13, "by is missing"),
        ("limit: 0.5", "limit: 2", 13, "less than or equal to 1"),
        ("limit: 0.5", "retain: linage", 13, "one of lineage, not 'linage'; did you mean 'lineage'"),
        ("classes: [1], ids: [3, '5-7'], ", "", 13, "names nothing"),
        ("classes: [1], ids: [3, '5-7'], ", "ids: [], ", 13, "names nothing"),
        ("verify: none", "verify: retrian", 14, "verify is retrain"),
        ("verify: none", "verify: {retrain: {seeds: 0}}", 14, "1 to 100"),
        ("verify: none", "verify: {retrain: {seeds: true}}", 14, "1 to 100"),
        ("[accuracy", "[acuracy", 15, "did you mean 'accuracy'"),
        ("device: cpu", "device: gpu", 16, "no kind of device 'gpu'"),
        ("threads: 1", "threads: 0", 17, "threads"),
        ("name: full", "name: ../up", 1, "cannot name a folder"),
        ("name: full", "name: ''", 1, "cannot name a folder"),
        ("seed: 3", "seed: -3", 2, "seed"),
        ("seed: 3", "seed: 3.0", 2, "a whole number"),
        ("seed: 3", "seed: null", 2, "a whole number"),
        ("seed: 3", "seed: 3\nseed: 4", 3, "before, in line 2"),
        ("seed: 3", "seed: !!python/object/apply:os.system ['true']", 2, "tag"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_at_its_line(old: str, new: str, line: int, words: str) -> None:
    assert old in FULL
    refused(FULL.replace(old, new, 1), (line, words))


def test_all_mistakes_are_said_at_once_with_the_line_inside_blocks() -> None:
    text = """\
model:
  mlp:
    hidden: [8]
    drop: 0.1
stream: split-digits
keep:
  - replay:
      per_class: 3
      polcy: reservoir
  - ewc:
      strength: 5
      decay: 7
events:
  - learn: 0
  - forget:
      classes: [1]
      by:
        ssd:
          selection: many
  - learn: 9
"""
    message = refused(
        text,
        (4, "mlp has no knob 'drop'"),
        (9, "did you mean 'policy'"),
        (12, "decay=7"),
        (19, "selection='many'"),
        (20, "tasks 0 to 4"),
    )
    assert len(message.split("\n")) == 5
    assert [int(line.split(":")[1]) for line in message.split("\n")] == [4, 9, 12, 19, 20]
    many = refused(HEAD + "events:\n" + "  - learn: 7\n" * 50)
    assert len(many.split("\n")) == 21
    assert many.endswith("and 30 more")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "empty"), ("null", 1, "empty"), ("- 1", 1, "must be a mapping"), ("plan", 1, "must be a mapping"),
        (HEAD, 1, "events is missing"), (HEAD + "events: []", 3, "no learn event"), (HEAD + "events:", 3, "must be a list"),
        (HEAD + "events:\n- forget: {classes: [1], by: ssd}\n", 3, "no learn event"),
        (HEAD + "events:\n- forget: {classes: [1], by: ssd}\n- learn: 0\n", 4, "nothing has been learned before"),
        ("stream: split-digits\nevents: [{learn: 0}]", 1, "model is missing"), ("a: &a [*a]", 1, "anchor"),
    ],
)  # fmt: skip
def test_incomplete_plans(text: str, line: int, words: str) -> None:
    refused(text, (line, words))


def test_code_needs_to_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "nets_of_mine.py").write_text(
        "from pathlib import Path\nfrom torch import nn\n"
        f"Path({str(mark)!r}).write_text('')\n"
        "def small(inputs, width: int = 4, seed: int = 0):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 1))\nno = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "plan.yaml"
    text = HEAD.replace("mlp: {hidden: [8]}", "'nets_of_mine:small': {width: 8}") + "events: [{learn: 0}]\n"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"plan\.yaml:1: .*--allow-code"):
        load_plan(path)
    assert not mark.exists()
    function, knobs = load_plan(path, allow_code=True).factory("model")
    assert isinstance(function(inputs=(64,), **knobs), torch.nn.Module)
    assert mark.exists()
    for old, new, words in (
        ("small", "absent", "cannot be imported"), ("nets_of_mine", "nets_of_none", "cannot be imported"), ("small", "no", "is no function"),
        ("width", "widht", "did you mean 'width'"), ("width: 8", "width: x", "has the wrong type"), ("nets_of_mine:small", ":", "must be module:function"),
    ):  # fmt: skip
        path.write_text(text.replace(old, new))
        with pytest.raises(PlanError, match=rf"plan\.yaml:1: .*{words}"):
            load_plan(path, allow_code=True)


def test_factories_of_the_registry() -> None:
    plan = parse_plan(FULL)
    function, knobs = plan.factory("model")
    assert isinstance(function(inputs=(64,), **knobs), torch.nn.Module)
    stream, knobs = plan.factory("stream")
    assert len(stream(**knobs)) == 5
    assert str(plan.error(("stream",), "broken")) == "plan.yaml:5: broken"


def test_names_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my first plan!.yaml"
    path.write_text(HEAD + "events: [{learn: 0}]\n")
    assert load_plan(path).name == "my-first-plan"
    with pytest.raises(PlanError, match=r"absent\.yaml:1: there is no such file"):
        load_plan(tmp_path / "absent.yaml")
    with pytest.raises(PlanError, match=":1: this is a folder"):
        load_plan(tmp_path)


# -- broken at random ------------------------------------------------------------------------------------------------------

VALID: Any = parse(FULL).data
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 5, 2**62, 1.5, -0.0, 1e300, 1e-300, "", "x", "none", "ewc", "10-20", "a:b", "é\x85\u2028", "-" * 200, [], [[]], {}, [1], [None],
    [2**62], ["x", 1], {"a": 1}, {"ewc": None}, {"ewc": {"strength": "x"}}, {"": {}}, {"retrain": None}, {"{0}": {"%s": "{text}"}}, {"mlp": {"hidden": [2**62]}},
]  # fmt: skip


def addresses(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in inner for found in addresses(item, (*place, key)))]


def run(text: str) -> None:
    try:
        plan = parse_plan(text)
    except PlanError as error:
        for line in str(error).split("\n"):
            assert re.match(r"plan\.yaml:\d+: \S", line), str(error)
            assert int(line.split(":")[1]) <= text.count("\n") + 1
    else:
        assert isinstance(plan, Plan)
        assert parse_plan(json.dumps(plan.canonical())).canonical() == plan.canonical()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_plans_broken_at_random_places(data: st.DataObject) -> None:
    plan = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        places = [place for place in addresses(plan) if place]
        if not places:
            break
        *path, last = data.draw(st.sampled_from(places))
        holder = plan
        for step in path:
            holder = holder[step]
        action = data.draw(st.sampled_from(["delete", "rename", "retype", "repeat"]))
        if action == "delete":
            del holder[last]
        elif action == "rename" and isinstance(holder, dict):
            name = data.draw(st.sampled_from([last + "s", last[:-1], last.upper(), "x", "", "keep", "ewc"]))
            holder[name] = holder.pop(last)
        elif action == "repeat" and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        else:
            holder[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    run(json.dumps(plan, indent=data.draw(st.sampled_from([None, 2]))))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(FULL) - 1), st.sampled_from(["", *" \n\t:-[]{},&*!#'\"%@0a.~?|>"]), st.integers(0, 4)
        ),
        min_size=1,
        max_size=3,
    )
)
def test_plans_with_slips_of_the_pen(slips: list[tuple[int, str, int]]) -> None:
    text = FULL
    for at, typed, removed in slips:
        text = text[:at] + typed + text[at + removed :]
    run(text)


def test_what_cannot_compose_is_said_at_its_line() -> None:
    text = "model: {mlp: {outputs: 1}}\nproblem: regression\nstream: split-digits\nkeep: [l2, lwf]\nevents:\n  - learn: 0\n  - forget: {classes: [1], by: salun}\n"
    with pytest.raises(PlanError) as found:
        parse_plan(text)
    said = str(found.value).splitlines()
    assert len(said) == 2 and said[0].startswith(
        "plan.yaml:4: lwf needs classes, and a regression has none; there is replay"
    )
    assert said[1].startswith("plan.yaml:7: salun needs classes") and "gradient-ascent" in said[1]
    assert parse_plan(text.replace("regression", "classification"))


REGRESSION = """\
model: {mlp: {hidden: [8], outputs: 1}}
problem: regression
stream: {permuted: {source: {csv: {path: people.csv, label: age}}, tasks: 1}}
keep: [{replay: {policy: reservoir, capacity: 20}}]
events:
  - learn: 0
  - forget: {targets: [0, 30], by: blindspot-regression}
"""


def test_a_range_of_targets_is_asked_of_a_regression() -> None:
    plan = parse_plan(REGRESSION)
    event = plan.events[1].forget
    assert event is not None and event.request().plain() == "targets from 0 to 30"
    assert plan.canonical() == parse_plan(REGRESSION.replace("[0, 30]", "[0.0, 30.0]")).canonical()
    assert plan.canonical()["events"][1]["forget"]["targets"] == [0.0, 30.0]
    for text, line, said in (
        (REGRESSION.replace("[0, 30]", "[30, 0]"), 7, "the smaller first"),
        (REGRESSION.replace("[0, 30]", "[a, 30]"), 7, "must be a number"),
        (
            REGRESSION.replace("problem: regression\n", "").replace("blindspot-regression", "ssd"),
            6,
            "has classes; write classes",
        ),
    ):
        with pytest.raises(PlanError) as found:
            parse_plan(text)
        assert f"plan.yaml:{line}: " in str(found.value) and said in str(found.value)


def test_what_a_regression_cannot_be_is_said_when_the_plan_is_read() -> None:
    text = REGRESSION.replace(", outputs: 1", "").replace("{policy: reservoir, capacity: 20}", "{per_class: 5}")
    with pytest.raises(PlanError) as found:
        parse_plan(text)
    first, second = str(found.value).splitlines()
    assert first.startswith("plan.yaml:1: a regression's network needs its outputs") and "{outputs: 1}" in first
    assert second.startswith("plan.yaml:4: replay shares its buffer out by classes") and "policy: reservoir" in second
    assert parse_plan(
        text.replace("problem: regression\n", "").replace(
            "targets: [0, 30], by: blindspot-regression", "classes: [1], by: ssd"
        )
    )
