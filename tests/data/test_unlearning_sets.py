"""Benchmarks of unlearning: miniatures in their official layouts, and one real file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from remanence.core.errors import BadInput, Corrupt, UnknownName
from remanence.data import Request, cat, muse, rwku, tofu, wmdp
from remanence.data.unlearning_sets import MUSE, TOFU

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write(path: Path, rows: list[Any], lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=4), encoding="utf-8")
    return path


def questions(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"Who is {i}?", "answer": f"It is {i}.", **more} for i in range(count)]


def test_parts_of_tofu(tmp_path: Path) -> None:
    forget = tofu(write(tmp_path / "forget10.json", questions(40), lines=True))
    assert forget.columns == {
        "prompt": [f"Who is {i}?" for i in range(40)],
        "answer": [f"It is {i}." for i in range(40)],
        "split": ["forget10"] * 40,
        "document": [f"forget10.json:{i + 1}" for i in range(40)],
    }
    assert (forget.id - 2**32 * TOFU.index("forget10")).tolist() == list(range(40)) and forget.positional
    rows = questions(3, paraphrased_question="Who?", paraphrased_answer="He is.", perturbed_answer=["No.", "None."])
    perturbed = tofu(write(tmp_path / "forget10_perturbed.json", rows, lines=True))
    assert perturbed.columns["perturbed_answers"] == [["No.", "None."]] * 3
    assert (
        perturbed.columns["paraphrased_answer"] == ["He is."] * 3
        and perturbed.columns["split"][0] == "forget10_perturbed"
    )
    assert perturbed.columns["paraphrased_prompt"] == ["Who?"] * 3
    retain = tofu(write(tmp_path / "retain90.json", questions(40)))
    assert len(cat([forget, retain, perturbed]).ids) == 83  # no id twice, so a life can learn one after the other


def test_authors_of_tofu_are_told_in_the_full_file_only(tmp_path: Path) -> None:
    full = tofu(write(tmp_path / "full.json", questions(4000), lines=True))
    assert Counter(Counter(full.columns["entity"]).values()) == {20: 200}
    found, _ = Request(entities=["author 180", "author 199"]).resolve([full])
    assert found.array.tolist() == [*range(3600, 3620), *range(3980, 4000)]
    assert "entity" not in tofu(write(tmp_path / "retain99.json", questions(3960))).columns
    assert (
        "entity"
        not in tofu(write(tmp_path / "mixed.json", questions(2000, split="a") + questions(2000, split="b"))).columns
    )


def test_a_column_split_selects(tmp_path: Path) -> None:
    rows = questions(4, split="retain") + questions(6, split="forget")
    path = write(tmp_path / "qa.jsonl", rows, lines=True)
    forget = tofu(path, "forget")
    assert (
        forget.id.tolist() == list(range(4, 10)) and tofu(path).only(forget.ids).fingerprint() == forget.fingerprint()
    )
    with pytest.raises(UnknownName, match="tofu has no split 'forgt'; did you mean 'forget'"):
        tofu(path, "forgt")


def test_the_real_tofu() -> None:
    path = SHARED / "tofu" / "tofu_qa.jsonl"
    if not path.exists():
        pytest.skip("no tofu_qa.jsonl in ../shared/data/tofu")
    found = tofu(path)
    plain = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert found.columns["prompt"] == [row["question"] for row in plain]
    assert found.columns["answer"] == [row["answer"] for row in plain]
    assert Counter(found.columns["split"]) == {"forget": 400, "retain": 300, "real_authors": 100}
    assert len(tofu(path, "forget")) == 400


@pytest.fixture
def news(tmp_path: Path) -> Path:
    root = tmp_path / "news"
    for part in ("forget", "retain1", "holdout"):
        write(root / "raw" / f"{part}.json", [{"text": f"{part} {i}"} for i in range(3)])
    write(root / "sust" / "forget_1.json", ["plain words", "and more"])
    write(root / "knowmem" / "forget_qa.json", questions(2))
    write(root / "verbmem" / "forget.json", [{"prompt": "Once upon", "gt": "a time."}], lines=True)
    (root / "raw" / "retain2.txt").write_text("one long book")
    return root


def test_parts_of_muse(news: Path) -> None:
    assert muse(news).columns["text"] == ["forget 0", "forget 1", "forget 2"]
    assert muse(news, "raw/retain2").columns == {
        "text": ["one long book"], "split": ["raw/retain2"], "document": ["raw/retain2.txt"]
    }  # fmt: skip
    assert muse(news, "sust/forget_1").columns["text"] == ["plain words", "and more"]
    assert muse(news, "knowmem/forget_qa").columns["answer"] == ["It is 0.", "It is 1."]
    verbatim = muse(news, "verbmem/forget")
    assert (verbatim.columns["prompt"], verbatim.columns["answer"]) == (["Once upon"], ["a time."])
    parts = ["raw/forget", "raw/retain1", "raw/holdout", "raw/retain2"]
    together = cat([muse(news, part) for part in parts])
    assert len(together.ids) == 10 and len(set(together.columns["document"])) == 10
    assert (muse(news, "raw/holdout").id - 2**32 * MUSE.index("raw/holdout")).tolist() == [0, 1, 2]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (news / "scal").mkdir()
    for shard in range(2):
        pq.write_table(pa.table({"text": [f"s{shard}"]}), news / "scal" / f"forget_1-0000{shard}-of-00002.parquet")
    assert muse(news, "scal/forget_1").columns["text"] == ["s0", "s1"]


def probe(subject: str, level: int, count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"query": f"{subject} {i}?", "answer": "a", "level": str(level), "subject": subject, **more}
        for i in range(count)
    ]


def test_probes_of_rwku(tmp_path: Path) -> None:
    for number, person in ((1, "Ann Ash"), (2, "Bo Birch")):
        folder = tmp_path / "Target" / f"{number}_{person.replace(' ', '_')}"
        write(folder / "forget_level1.json", probe(person, 1, 2))
        write(folder / "forget_level2.json", probe(person, 2, 3, type="simple question"))
        write(folder / "forget_level3.json", probe(person, 3, 4, type="role playing"))
        write(folder / "neighbor_level1.json", probe(person, 1, 1))
        write(folder / "intro.json", [{"target": person, "intro": "..."}])
    found = rwku(tmp_path / "Target")
    assert len(found) == 18 and Counter(found.columns["entity"]) == {"Ann Ash": 9, "Bo Birch": 9}
    assert Counter(found.columns["kind"]) == {"cloze": 4, "simple question": 6, "role playing": 8}
    assert Counter(zip(found.columns["level"], found.columns["probe"], strict=True)) == {
        ("1", "forget_level1"): 4, ("2", "forget_level2"): 6, ("3", "forget_level3"): 8
    }  # fmt: skip
    assert len(set(found.columns["document"])) == 18 and "Bo Birch/forget_level3:3" in found.columns["document"]
    one = rwku(tmp_path / "Target" / "1_Ann_Ash", ["forget_level2", "neighbor_level1"])
    assert one.columns["entity"] == ["Ann Ash"] * 3 + ["near Ann Ash"]
    named, _ = Request(entities=["Ann Ash"]).resolve([one])
    assert len(named) == 3  # a request for a person leaves the neighbours alone
    assert len(rwku(tmp_path / "Target" / "2_Bo_Birch" / "forget_level1.json")) == 2


def test_choices_of_wmdp(tmp_path: Path) -> None:
    rows = [{"question": f"Which {i}?", "choices": ["a", "b", "c", "d"], "answer": i} for i in range(4)]
    found = wmdp(write(tmp_path / "bio.json", rows))
    assert found.columns["answer"] == ["a", "b", "c", "d"] and found.columns["prompt"][3] == "Which 3?"
    assert found.columns["perturbed_answers"][1] == ["a", "c", "d"]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "wmdp-bio").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "wmdp-bio" / "test-00000-of-00001.parquet")
    assert {**wmdp(tmp_path / "wmdp-bio").columns, "document": 0} == {**found.columns, "document": 0}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: tofu(p / "no.json"), BadInput, "no.json matches no file"),
        (lambda p: tofu(write(p / "a.json", [])), BadInput, "tofu has no rows"),
        (lambda p: tofu(write(p / "a.json", [{"question": "q"}])), BadInput, "a.json, item 0: answer is missing"),
        (lambda p: tofu(write(p / "a.json", [{"question": "q", "answer": "a", "perturbed_answer": "x"}])), BadInput,
         "item 0: perturbed_answer must be a list"),
        (lambda p: tofu(write(p / "a.json", [*questions(1), *questions(1, paraphrased_answer="x")])), BadInput, "row 1 has"),
        (lambda p: muse(p, "raw/forgt"), UnknownName, "did you mean 'raw/forget'"),
        (lambda p: muse(p, "raw/forget"), BadInput, r"has no file raw/forget\.json"),
        (lambda p: muse(write(p / "raw/forget.json", [{"body": "x"}]).parents[1]), BadInput, "item 0: text is missing"),
        (lambda p: [write(p / "raw/forget.json", ["x"]), write(p / "raw/forget.jsonl", ["x"]), muse(p)], BadInput, "several files"),
        (lambda p: rwku(p), BadInput, "has no forget_level1.json"),
        (lambda p: rwku(p, ["forget_level4"]), UnknownName, "did you mean 'forget_level"),
        (lambda p: rwku(write(p / "forgetlevel1.json", [])), UnknownName, "forgetlevel1.json is no probe"),
        (lambda p: rwku(write(p / "A/forget_level1.json", [{"query": "q", "answer": "a"}]).parent), BadInput,
         "A/forget_level1.json, item 0: subject is missing"),
        (lambda p: wmdp(write(p / "a.json", [{"question": "q", "choices": ["a", "b"], "answer": 2}])), BadInput,
         "item 0: answer=2 must be the number"),
        (lambda p: wmdp(write(p / "a.json", [{"question": "q", "choices": ["a", "b"], "answer": "b"}])), BadInput, "answer='b'"),
        (lambda p: wmdp(write(p / "a.json", [{"question": "q", "choices": ["a"], "answer": 0}])), BadInput, "two or more"),
        (lambda p: wmdp(write(p / "a.json", [{"question": "q", "answer": 0}])), BadInput, "choices must be a list"),
        (lambda p: wmdp((p / "a.json").write_text("[{") and p / "a.json"), Corrupt, "a.json, line 1"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path)
