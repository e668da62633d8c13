"""What a forget request covers, when it is a repeat, when it is refused, and what may be called deleted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput, EventFailed, Refused, RemanenceError, UnknownName
from remanence.core.ids import Ids
from remanence.data import Examples, Request, Task
from remanence.life import receipts
from remanence.life.life import Life
from remanence.life.references import live_again
from remanence.train.roles import Forgetter, Keeper, Outcome
from remanence.train.update import Update
from tests.life.helpers import FAST, REPLAY, again, bits, kinds, lived, network, of_class, stream, tree

RICH: list[Any] = [*REPLAY, {"ewc": {"strength": 5.0}}]


def rest(life: Life) -> list[str]:
    """Rows without attempts."""
    return [kind for kind in kinds(life) if kind != "attempt"]


def part_of(task: Task, low: int, high: int, number: int | None = None) -> Task:
    """The task with some of its training rows only."""
    rows = torch.arange(len(task.train))[low:high]
    return replace(task, train=task.train.select(rows), id=task.id if number is None else number)


# -- repeats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["retrain", "ssd"])
def test_a_second_identical_request_does_nothing(by: str, tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        first = life.forget(Request(classes=[3]), by=by)
        before, rows = bits(life), rest(life)
        second = life.forget(Request(classes=[3]), by=by)
        assert second == first and bits(life) == before and rest(life) == rows
        assert len(list((tmp_path / "receipts").iterdir())) == 1
    with again(tmp_path) as life:  # nor does it after a restart
        assert life.forget(Request(classes=[3]), by=by).content == first.content and rest(life) == rows


def test_part_of_what_was_deleted_is_a_repeat_and_a_stronger_method_is_not(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        ids = of_class(stream()[1], 3)
        weak = life.forget(Request(classes=[3]), by={"ssd": {"selection": 10}})
        other = life.forget(Request(classes=[3]), by={"ssd": {"selection": 2}})
        strong = life.forget(Request(classes=[3]), by="retrain")
        assert [weak.number, other.number, strong.number] == [1, 2, 3] and strong.states["weights"] == "deleted"
        assert life.forget(Request(ids=ids.array[:4]), by="ssd") == strong  # at least as strong
        assert life.forget(Request(classes=[3]), by="salun") == strong


def test_new_data_of_the_class_makes_it_a_new_request(tmp_path: Path) -> None:
    half = [part_of(stream()[1], 0, 30), part_of(stream()[1], 30, 60, number=5)]
    with lived(tmp_path, tasks=1) as life:
        life.learn(half[0], **FAST)
        first = life.forget(Request(classes=[3]), by="retrain")
        life.learn(half[1], **FAST)
        late = of_class(half[1], 3)
        assert late and not late & first.ids
        second = life.forget(Request(classes=[3]), by="retrain")
        assert second.number == 2 and late <= second.ids and second.status == "done"
        assert not life._books.holding() & (first.ids | late)


def test_a_request_covers_what_was_seen_when_it_was_accepted(tmp_path: Path) -> None:
    half = [part_of(stream()[1], 0, 30), part_of(stream()[1], 30, 60, number=5)]
    with lived(tmp_path, tasks=1) as life:
        life.learn(half[0], **FAST)
        receipt = life.forget(Request(classes=[3]), by="retrain")
        assert receipt.ids == of_class(half[0], 3)
        life.learn(half[1], **FAST)  # class 3 again, other examples: nobody asked for these
        late = of_class(half[1], 3)
        assert late <= life._books.consumed and not late & life._books.tombstones


def test_two_tasks_may_share_a_number(tmp_path: Path) -> None:
    """New data of an old task: a failed event and a restart tell them apart by their content."""
    half = [part_of(stream()[1], 0, 30), part_of(stream()[1], 30, 60)]
    assert half[0].id == half[1].id
    with lived(tmp_path, tasks=1) as life:
        for task in half:
            life.learn(task, **FAST)
        before = bits(life)
        with pytest.raises(EventFailed):
            life.learn(stream()[2], **{**FAST, "lr": 1e30})
        assert bits(life) == before and all(item.task is not None for item in life._learned)
    with again(tmp_path, [stream()[0], *half]) as life:
        assert bits(life) == before
        assert life.forget(Request(classes=[3]), by="retrain").ids == of_class(stream()[1], 3)


# -- learning again ---------------------------------------------------------------------------------------------------


def test_forgotten_ids_are_learned_again_only_if_asked_for(tmp_path: Path) -> None:
    task = stream()[1]
    gone = of_class(task, 3)
    with lived(tmp_path) as life:
        life.forget(Request(classes=[3]), by="retrain")
        life.learn(replace(task, id=7), **FAST)  # the rest of it is welcome
        assert life._rows[-1].body["skipped_forgotten"] == len(gone)
        assert not gone & life._books.holding() and not gone & life._state.keepers[0].buffer.ids
        before, rows = bits(life), rest(life)
        with pytest.raises(Refused, match="allow_forgotten=True"):
            life.learn(Task(task.train.only(gone), task.test, (3,), ("3",), 8), **FAST)
        assert bits(life) == before and rest(life) == rows
    with again(tmp_path, [*stream(), replace(task, id=7)]) as life:  # the whole task is what the source still has
        assert bits(life) == before
        life.learn(Task(task.train.only(gone), task.test, (3,), ("3",), 8), **FAST, allow_forgotten=True)
        assert gone <= life._books.holding() and not gone & life._books.tombstones
        row = life.trace(gone)[0]
        assert row.holder == "weights" and row.state == "holds" and row.ids == gone
        receipt = life.forget(Request(ids=gone), by="retrain")
        assert receipt.number == 2 and receipt.states["weights"] == "deleted"  # no repeat: consumed since


def test_nothing_of_what_was_forgotten_is_seen_by_any_later_part(tmp_path: Path) -> None:
    seen: dict[str, Ids] = {}

    @dataclass
    class Spy(Keeper):
        """Writes down every id it can reach."""

        def begin(self, u: Update) -> None:
            for name in ("task", "seen"):
                seen[name] = seen.get(name, Ids()) | u.data(name).ids
            for examples in u.history():
                seen["history"] = seen.get("history", Ids()) | examples.ids

        def after(self, u: Update, batch: Any) -> None:
            seen["batch"] = seen.get("batch", Ids()) | Ids(batch["id"].numpy())

    with lived(tmp_path) as life:
        gone = life.forget(Request(classes=[3]), by={"ssd": {"selection": 10}}).ids
        seen.clear()
        life.learn(replace(stream()[1], id=9), **FAST, keep=[Spy(), {"replay": {"per_class": 20}}], learner="joint")
        life.learn(stream()[2], **FAST, keep=[Spy(), {"replay": {"per_class": 20}}], learner="joint")
        assert set(seen) == {"task", "seen", "history", "batch"} and all(len(ids) > 50 for ids in seen.values())
        assert not any(ids & gone for ids in seen.values())
        reference = live_again(life, life._books.tombstones, 5)
        assert not reference.keepers[0].buffer.ids & gone
        assert not any(examples.ids & gone for examples in life._history())


# -- nothing held and refusals ----------------------------------------------------------------------------------------


def test_unseen_ids_get_a_signed_answer(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        before = bits(life)
        receipt = life.forget(Request(ids=[10**9, 10**9 + 1]), by="retrain")
        after = bits(life)
        assert receipt.status == "nothing held" and receipt.content["unseen"] == 2 and receipt.content["n"] == 0
        assert receipts.verify(receipt.path).ok
        assert after["state"] == before["state"] and after["tombstones"] == before["tombstones"]
        some = life.forget(Request(ids=[10**9, *of_class(stream()[0], 0).array[:2]]), by="retrain")
        assert some.status == "done" and some.content["unseen"] == 1 and len(some.ids) == 2
        empty_class = life.forget(Request(classes=[5]), by="retrain")  # not learned yet
        assert empty_class.status == "nothing held"
    with Life(network, home=tmp_path / "unborn") as life:
        assert life.forget(Request(ids=[1]), by="retrain").status == "nothing held"


@pytest.mark.parametrize(
    ("request_of", "error", "advice"),
    [
        (lambda: Request(classes=[0, 1, 2, 3]), Refused, "delete the life"),
        (lambda: Request(client="somebody"), UnknownName, "ask by ids="),
        (lambda: Request(documents=["a"]), UnknownName, "ask by ids="),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_moves(
    request_of: Any, error: type[RemanenceError], advice: str, tmp_path: Path
) -> None:
    with lived(tmp_path) as life:
        before, rows = bits(life), rest(life)
        with pytest.raises(error, match=advice):
            life.forget(request_of(), by="retrain")
        assert bits(life) == before and rest(life) == [*rows, "refused"]
        row = life._ledger.last("refused")
        assert row is not None and advice in row.extra["reason"]
        life.learn(stream()[2], **FAST)  # and life goes on


@pytest.mark.parametrize("fields", [{}, {"ids": []}, {"classes": []}, {"documents": []}])
def test_an_empty_request_cannot_even_be_made(fields: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"give ids=\[...\] or classes"):
        Request(**fields)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"by": "sds"}, "did you mean 'ssd'"),
        ({"by": {"ssd": {"selektion": 1}}}, "did you mean 'selection'"),
        ({"by": "ssd", "retain": "all"}, "lineage"),
        ({"by": "ssd", "limit": 2.0}, "between 0 and 1"),
        ({"by": "ssd", "verify": "oracle"}, "seeds"),
        ({"by": "ssd", "verify": {"retrain": {"seeds": 0}}}, "seeds"),
        ({"by": "ssd", "optimizer": "adem"}, "did you mean 'adam"),
        ({"by": "ssd", "keep": "replai"}, "did you mean 'replay'"),
    ]
    with lived(tmp_path, tasks=1) as life:
        before, rows = bits(life), rest(life)
        for options, words in wrong:
            with pytest.raises(BadInput, match=words):
                life.forget(Request(classes=[0]), **options)
        with pytest.raises(BadInput, match="needs a Request"):
            life.forget([1, 2], by="ssd")  # type: ignore[arg-type]
        assert bits(life) == before and rest(life) == rows


def test_without_the_data_it_says_how_to_give_it(tmp_path: Path) -> None:
    lived(tmp_path).close()
    with again(tmp_path, []) as life:
        before, rows = bits(life), rest(life)
        for request, by in (
            (Request(classes=[3]), "ssd"),
            (Request(ids=of_class(stream()[1], 3)), "retrain"),
            (Request(ids=of_class(stream()[1], 3)), "ssd"),
        ):
            with pytest.raises(Refused, match="data="):
                life.forget(request, by=by)
        assert bits(life) == before and rest(life) == [*rows, "refused", "refused", "refused"]
        assert life.trace(of_class(stream()[1], 3))[0].state == "holds"
        assert life.forget(Request(ids=[10**9]), by="ssd").status == "nothing held"


# -- what is earned ---------------------------------------------------------------------------------------------------


def test_retrain_is_bit_equal_to_a_life_that_never_had_the_ids(tmp_path: Path) -> None:
    gone = of_class(stream()[1], 3) | Ids(stream()[0].train.id.numpy()[::5])
    with lived(tmp_path / "a", keep=RICH, tasks=3) as life, Life(network, keep=RICH, home=tmp_path / "b") as fresh:
        life.forget(Request(ids=gone), by="retrain")
        for task in stream():
            left = task.train.without(gone)
            classes = tuple(c for c in task.classes if c in left["y"].unique().tolist())
            fresh.learn(Task(left, task.test, classes, tuple(map(str, classes)), task.id), **FAST)
        one, other = life._state.pack(), fresh._state.pack()
        assert 3 not in one["labels"] and one["labels"] == other["labels"]
        for name in ("weights", "holders", "labels", "structures", "steps", "optimizer"):
            assert tree(one[name]) == tree(other[name]), name
        assert {row.state for row in life.trace(gone)} == {"deleted"}


def test_an_unmeasured_attempt_stays_holds(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        receipt = life.forget(Request(classes=[3]), by={"ssd": {"selection": 2, "importance": "example"}})
        assert receipt.status == "partial" and receipt.states["weights"] == "holds"
        row = next(row for row in life.trace(receipt.ids) if row.holder == "weights")
        assert row.state == "holds" and row.reason.startswith("attempted: ssd")
        assert receipt.states["keep/replay"] == "deleted"  # no copy is left


def test_one_reference_earns_nothing_and_a_useless_method_neither(tmp_path: Path) -> None:
    @dataclass
    class Idle(Forgetter):
        """Does nothing."""

        def forget(self, u: Update, request: Request) -> Outcome:
            return Outcome()

    with lived(tmp_path) as life:
        one = life.forget(Request(classes=[3]), by="salun", verify={"retrain": {"seeds": 1}})
        assert one.states["weights"] == "holds" and "spread unknown" in one.content["earned"]
        idle = life.forget(Request(classes=[2]), by=Idle(), verify={"retrain": {"seeds": 2}})
        assert idle.states["weights"] == "holds" and idle.status == "partial"
        assert idle.content["before"] == idle.content["after"]


def test_a_working_method_that_was_measured_is_called_unlearned_and_never_deleted(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        for task in (stream()[0], stream()[1]):
            life.learn(task, **{**FAST, "epochs": 2})
        receipt = life.forget(Request(classes=[3]), by="salun", verify="retrain", lr=0.05)
        assert receipt.content["after"]["forget accuracy"] < 0.2 < receipt.content["before"]["forget accuracy"]
        assert receipt.states["weights"] == "unlearned" and "deleted" not in receipt.content["earned"]
        snapshot = next(state for name, state in receipt.states.items() if name == f"snapshots/{len(life.events)}")
        assert snapshot == "unlearned"


def test_a_later_exact_retrain_deletes_all_that_was_forgotten_so_far(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        first = life.forget(Request(classes=[3]), by="salun")
        assert life._books.weights(first.ids)[0][1] == "holds"
        second = life.forget(Request(ids=of_class(stream()[0], 0).array[:3]), by="retrain")
        assert {row.state for row in life.trace(first.ids | second.ids)} == {"deleted"}
        assert not life._books.holding() & (first.ids | second.ids)


def test_stale_snapshots_that_hold_the_ids_are_erased(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        entries = {
            entry["event"]: life._snapshots.files(entry["manifest"]) for entry in life._ledger.get_current("snapshots")
        }
        assert set(entries) == {0, 1, 2}
        receipt = life.forget(Request(classes=[3]), by="retrain")
        kept = [entry["event"] for entry in life._ledger.get_current("snapshots")]
        assert kept == [0, 1, 3]  # the one before class 3 was met may stay
        only = set(entries[2]) - set(entries[0]) - set(entries[1])
        assert only and not any((tmp_path / name).exists() for name in only)
        assert only <= set(receipt.content["erased"]) and receipt.states["snapshots/2"] == "deleted"
        verdict = receipts.verify(receipt.path)
        assert verdict.ok and set(verdict.files.values()) == {"present"}
        life.forget(Request(classes=[0]), by="retrain")
        assert [entry["event"] for entry in life._ledger.get_current("snapshots")] == [0, 4]
        later = receipts.verify(receipt.path)
        assert later.ok and any(word == "erased by receipt 2" for word in later.files.values())


def test_ten_requests_in_a_row_are_measured_alike(tmp_path: Path) -> None:
    """The references of the tenth are lives without anything that was forgotten before it."""
    ids = [int(i) for i in of_class(stream()[0], 0).array[:10]]
    with lived(tmp_path) as life:
        found = [
            life.forget(Request(ids=[i]), by={"ssd": {"selection": 10}}, verify={"retrain": {"seeds": 2}}) for i in ids
        ]
        assert [receipt.number for receipt in found] == list(range(1, 11))
        assert all(row.state in ("holds", "unlearned", "deleted") for row in life.trace(ids))
        gone = Ids(ids)
        reference = live_again(life, gone, 77)
        assert not reference.keepers[0].buffer.ids & gone
        means = {cell["metric"]: cell["reference_mean"] for cell in found[-1].evidence}
    with lived(tmp_path / "fresh") as fresh:
        fresh.forget(Request(ids=ids[:9]), by="retrain")
        tenth = fresh.forget(Request(ids=ids[9:]), by={"ssd": {"selection": 10}}, verify={"retrain": {"seeds": 2}})
        same = {cell["metric"]: cell["reference_mean"] for cell in tenth.evidence}
    assert means and means == same
    assert [cell["metric"] for cell in found[0].evidence] == [cell["metric"] for cell in found[-1].evidence]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_crossed_limit_fails_the_event_and_the_life_is_as_before(tmp_path: Path) -> None:
    with lived(tmp_path, keep=RICH) as life:
        before, rows = bits(life), rest(life)
        with pytest.raises(EventFailed, match=r"as it was before.*limit 0.1"):
            life.forget(Request(classes=[3]), by={"gradient-ascent": {"cap": None, "retain": 0.0}}, lr=1.0, limit=0.1)
        assert bits(life) | {"digest": ""} == before | {"digest": ""} and rest(life) == [*rows, "asked", "failed"]
        receipt = life.forget(Request(classes=[3]), by="retrain", limit=0.9)  # it may be retried
        assert receipt.status == "done" and receipt.number == 2


def test_a_method_that_breaks_the_network_fails(tmp_path: Path) -> None:
    @dataclass
    class Breaks(Forgetter):
        """Puts NaN into the weights."""

        def forget(self, u: Update, request: Request) -> Outcome:
            with torch.no_grad():
                next(u.model.parameters())[0] = float("nan")
            return Outcome()

    @dataclass
    class Lies(Forgetter):
        """Claims exactness for a network of its own."""

        def forget(self, u: Update, request: Request) -> Outcome:
            return Outcome(exact=True, model=nn.Linear(64, 4))

    with lived(tmp_path) as life:
        before = bits(life)["state"]
        for method, words in ((Breaks(), "NaN"), (Lies(), "did not retrain")):
            with pytest.raises(EventFailed, match=words):
                life.forget(Request(classes=[3]), by=method)
            assert bits(life)["state"] == before and not life._books.tombstones


def test_by_column_and_by_several_fields(tmp_path: Path) -> None:
    def with_client(task: Task) -> Task:
        names = ["ann" if i % 3 else "bob" for i in range(len(task.train))]
        return replace(task, train=task.train.replace(client=names))

    tasks = [with_client(task) for task in stream()]
    with Life(network, keep=REPLAY, home=tmp_path) as life:
        for task in tasks[:2]:
            life.learn(task, **FAST)
        with pytest.raises(UnknownName, match="did you mean 'bob'"):
            life.forget(Request(client="bobb"), by="retrain")
        receipt = life.forget(Request(client="bob", classes=[3]), by="retrain")
        bob = Ids([int(i) for task in tasks[:2] for n, i in enumerate(task.train.id) if not n % 3])
        assert receipt.ids == bob | of_class(tasks[1], 3)
        assert "bob" not in receipt.path.read_text()


def test_the_receipt_carries_no_example_and_no_id(tmp_path: Path) -> None:
    with lived(tmp_path) as life:
        base = Examples(
            {"x": torch.rand(4, 64), "y": torch.tensor([0, 1, 0, 1])}, "people", [910000017 + i for i in range(4)]
        )
        life.learn(Task(base, stream()[0].test, (0, 1), ("0", "1"), 11), **FAST)
        receipt = life.forget(Request(ids=base.ids), by="salun", verify={"retrain": {"seeds": 2}})
        text = receipt.path.read_text()
        assert "91000001" not in text and receipt.content["n"] == 4
        assert "your source files, exports and backups" in text
        assert "91000001" not in str(receipt) and "9100000" not in life.report().read_text()
