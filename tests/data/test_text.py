"""Texts in files: what becomes of a row, whatever it is called, and which file and line an error names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from remanence.core.errors import BadInput, Corrupt, UnknownName
from remanence.data import iterate, text, text_stream

QA = [
    {"question": "Who?", "answer": "Ann", "entity": "a"},
    {"question": "Where?", "answer": "Bö, 12 €", "entity": "b"},
    {"question": "When?", "answer": "line\nbreak", "entity": "a"},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[Any], groups: int = 1) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=max(1, len(rows) // groups))
    return path


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "a.jsonl", QA)
    (tmp_path / "b.json").write_text(json.dumps(QA), encoding="utf-8")
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + lines.read_bytes().replace(b"\n", b"\r\n\r\n"))
    expected = {
        "prompt": [row["question"] for row in QA],
        "answer": [row["answer"] for row in QA],
        "entity": ["a", "b", "a"],
    }
    places = {"a.jsonl": [1, 2, 3], "b.json": [0, 1, 2], "c.json": [1, 3, 5]}
    for name, numbers in places.items():
        found = text(tmp_path / name)
        assert found.columns == {**expected, "document": [f"{name}:{n}" for n in numbers]}, name
        assert found.id.tolist() == [0, 1, 2] and found.positional and found.source == "text"
    for groups in (1, 3):
        found = text(str(parquet(tmp_path / "d.parquet", QA, groups)))
        assert found.columns == {**expected, "document": ["d.parquet:0", "d.parquet:1", "d.parquet:2"]}
    assert [*iterate(lines)] == [
        {name: column[i] for name, column in text(lines).columns.items()} for i in range(len(QA))
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "t"}, {"text": "t"}),
        ("t", {"text": "t"}),
        ({"content": "t", "date": 3}, {"text": "t", "date": 3}),
        ({"prompt": "p", "completion": "c"}, {"prompt": "p", "answer": "c"}),
        ({"instruction": "p", "output": "c"}, {"prompt": "p", "answer": "c"}),
        ({"instruction": "p", "input": "i", "output": "c", "text": "x"}, {"prompt": "p\ni", "answer": "c"}),
        ({"instruction": "p", "input": "", "output": "c"}, {"prompt": "p", "answer": "c"}),
        ({"question": "p", "answer": "c", "perturbed_answers": ["x"]}, {"prompt": "p", "answer": "c", "perturbed_answers": ["x"]}),
        ({"messages": [{"role": "user", "content": "p", "name": "n"}, {"role": "assistant", "content": "c"}]},
         {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
         {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}),
        ({"text": "t", "document": "mine"}, {"text": "t", "document": "mine"}),
        ({"text": "t", "id": "w7"}, {"text": "t", "document": "w7"}),
        ({"text": "t", "id": "w7", "document": "mine"}, {"text": "t", "document": "mine"}),
    ],
)  # fmt: skip
def test_usual_names(tmp_path: Path, row: Any, expected: dict[str, Any]) -> None:
    (made,) = iterate(jsonl(tmp_path / "a.jsonl", [row]))
    assert made == {"document": "a.jsonl:1", **expected}


def test_columns_by_name_leave_the_others_out(tmp_path: Path) -> None:
    rows = [{"q": "Who?", "a": "Ann", "n": 4, "loose": 1}, {"q": "Where?", "a": "Bö", "n": 2}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = text(path, {"prompt": "q", "answer": "a", "id": "n"})
    assert found.columns == {
        "prompt": ["Who?", "Where?"],
        "answer": ["Ann", "Bö"],
        "document": ["a.jsonl:1", "a.jsonl:2"],
    }
    assert found.id.tolist() == [4, 2] and not found.positional
    known = text(jsonl(tmp_path / "b.jsonl", QA), {"who": "entity"})
    assert list(known.columns) == ["who", "prompt", "answer", "document"]
    with pytest.raises(UnknownName, match=r"a.jsonl, line 1 has no 'aa'; did you mean 'a'"):
        text(path, {"prompt": "q", "answer": "aa"})


def test_folders_patterns_and_lists(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "in/c.txt", "in/deep/a.txt", ".hidden/d.txt"):
        path = tmp_path / "notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"I am {name}.\n")
    (tmp_path / "notes" / "README.md").write_text("no text of mine")
    notes = tmp_path / "notes"
    everything = text(notes)
    assert everything.columns["document"] == ["a.txt", "b.txt", "in/c.txt", "in/deep/a.txt"]
    assert everything.columns["text"] == [f"I am {name}.\n" for name in everything.columns["document"]]
    assert text(f"{notes}/*.txt").columns["document"] == ["a.txt", "b.txt"]
    assert text(f"{notes}/in/**/*.txt").columns["document"] == ["c.txt", "a.txt"]
    assert text([notes / "in", notes / "b.txt"]).columns["document"] == ["c.txt", "deep/a.txt", "b.txt"]
    assert text([notes / "in/deep/a.txt", notes / "a.txt"]).columns["document"] == ["in/deep/a.txt", "a.txt"]
    assert len(text(notes, limit=3)) == 3 and text(notes, limit=9).fingerprint() == everything.fingerprint()
    with pytest.raises(BadInput, match="1 files are named twice"):
        text([notes / "a.txt", f"{notes}/a*.txt"])
    (tmp_path / "[1].txt").write_text("brackets")
    assert text(tmp_path / "[1].txt").columns["text"] == ["brackets"]
    (notes / "out.txt").symlink_to(tmp_path / "[1].txt")
    with pytest.raises(BadInput, match=r"out.txt is a link that leads out"):
        text(notes)


OK = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.jsonl", OK + b'{"text": "bad"\n', Corrupt, "a.jsonl, line 2: no JSON"),
        ("a.jsonl", OK + b"[" * 100000 + b"\n", Corrupt, "a.jsonl, line 2: no JSON"),
        ("a.jsonl", OK + b"\n" + b'{"text": "f\xff"}\n', Corrupt, "a.jsonl, line 3 is not UTF-8"),
        ("a.jsonl", OK + b'{"text": "\\ud800"}\n', BadInput, "a.jsonl, line 2: text has half a character at 0"),
        ("a.jsonl", OK + b'{"text": ""}\n', BadInput, "a.jsonl, line 2: text is empty"),
        ("a.jsonl", OK + b'{"text": null}\n', BadInput, "a.jsonl, line 2: text is missing"),
        ("a.jsonl", OK + b'{"text": 4}\n', BadInput, "a.jsonl, line 2: text is a int, not text"),
        ("a.jsonl", OK + b"[4]\n", BadInput, "a.jsonl, line 2 is a list"),
        ("a.jsonl", OK + b'{"text": "b", "n": 1}\n', BadInput, "a.jsonl, line 2 has text, n where the first row has text"),
        ("a.jsonl", OK + b'{"prompt": "b", "answer": "c"}\n', BadInput, "line 2 has prompt, answer where the first"),
        ("a.jsonl", b'{"q": "b", "answer": "c"}\n', BadInput, r"a.jsonl, line 1 has q, answer, of which none .* columns="),
        ("a.jsonl", b'{"question": "b", "answer": " \\n"}\n', BadInput, r"line 1: answer is empty"),
        ("a.jsonl", b'{"question": "b", "output": ""}\n', BadInput, r"line 1: answer \('output'\) is empty"),
        ("a.jsonl", b'{"text": "b", "labels": 1}\n', BadInput, r"line 1: a text has no column 'labels' yet"),
        ("a.jsonl", b'{"text": "b", "id": 1}\n{"text": "b", "id": "2"}\n', BadInput, "line 2: the id '2' is of another kind"),
        ("a.jsonl", b'{"text": "b", "id": 1}\n{"text": "b", "id": 1}\n', BadInput, "1 ids are repeated"),
        ("a.jsonl", b'{"messages": []}\n', BadInput, "line 1: messages must be a list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', BadInput, "line 1, message 0: the content is missing"),
        ("a.jsonl", b'{"messages": ["hello"]}\n', BadInput, "line 1, message 0 is a str"),
        ("a.jsonl", b"\n\n", BadInput, "text has no documents; was everything filtered out"),
        ("a.json", b"[]", BadInput, "text has no documents"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', Corrupt, "a.json, line 2: no JSON"),
        ("a.json", b'[{"text": "a"},\n\n{"text": "\xfe"}]', Corrupt, "a.json, line 3 is not UTF-8"),
        ("a.json", b'[{"text": "a"}, {"text": ""}]', BadInput, "a.json, item 1: text is empty"),
        ("a.json", b'{"data": [\n{"text": "a"}]}', Corrupt, "a.json, line 1: no JSON"),
        ("a.txt", b"good\nbad \xe4\n", Corrupt, "a.txt, line 2 is not UTF-8"),
        ("a.txt", b" \n", BadInput, "a.txt: text is empty"),
        ("a.csv", b"text\n", BadInput, "a.csv is not known as text"),
        ("a.parquet", b"PAR1 and no more", Corrupt, "a.parquet cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_an_error_names_the_file_and_the_line(
    tmp_path: Path, name: str, data: bytes, error: type[Exception], message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        text(tmp_path / name)


def test_a_truncated_parquet_file_and_one_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet", QA * 500)
    whole = path.read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Corrupt, match=r"b.parquet cannot be read as Parquet"):
        text(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"pip install 'remanence\[llm\]'"):
        text(path)


def test_mixed_files_and_paths_that_are_none(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", QA)
    (tmp_path / "b.txt").write_text("plain")
    with pytest.raises(BadInput, match=r"b.txt has text where the first row has answer, entity, question"):
        text(tmp_path)
    (tmp_path / "empty").mkdir()
    for paths, message in (
        (f"{tmp_path}/*.json", "matches no file"),
        (tmp_path / "no.txt", "matches no file"),
        (tmp_path / "empty", "has no .txt"),
        ([], "must be a path"),
        (3, "must be a path"),
    ):
        with pytest.raises(BadInput, match=message):
            text(paths)
    with pytest.raises(BadInput, match="limit=0"):
        text(tmp_path / "b.txt", limit=0)


def test_a_limit_of_memory_and_documents_without_one(tmp_path: Path) -> None:
    rows = [{"text": f"{i:01000d}"} for i in range(3000)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadInput, match=r"the first 2048 documents would take 2.0 MiB of memory where 1.9 MiB"):
        text(path, max_bytes=2_000_000)
    assert len(text(path, max_bytes=3_100_000)) == 3000
    found = iterate(path)  # one line is read at a time: what comes later is not looked at
    path.write_text(json.dumps(rows[0]) + "\nbroken")
    assert next(found)["text"] == rows[0]["text"]
    with pytest.raises(Corrupt, match="line 2"):
        next(found)


def test_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    ds = datasets.Dataset.from_list(QA)
    expected = {**text(jsonl(tmp_path / "a.jsonl", QA)).columns, "document": ["row:0", "row:1", "row:2"]}
    assert text(ds).columns == expected
    streamed = ds.to_iterable_dataset()
    with pytest.raises(BadInput, match="limit="):
        text(streamed)
    assert text(streamed, limit=2).columns == {name: column[:2] for name, column in expected.items()}
    assert text(ds, {"text": "answer"}).columns["text"] == [row["answer"] for row in QA]
    with pytest.raises(BadInput, match="splits train"):
        text(datasets.DatasetDict({"train": ds}))
    with pytest.raises(BadInput, match="no documents"):
        text(ds.filter(lambda _: False))
    with pytest.raises(BadInput, match="row 1: answer is empty"):
        text(datasets.Dataset.from_list([QA[0], {**QA[1], "answer": ""}]))


def test_a_stream_of_files(tmp_path: Path) -> None:
    paths = [str(jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}"} for i in range(20)])) for n in "abc"]
    stream = text_stream(paths, test_share=0.25, seed=3)
    assert stream.scenario == "domain" and [(len(t.train), len(t.test)) for t in stream] == [(15, 5)] * 3
    for number, task in enumerate(stream):
        whole = text(paths[number])
        back = {int(i) - 2 * number * 2**32: said for part in (task.train, task.test)
                for i, said in zip(part.id, part.columns["text"], strict=True)}  # fmt: skip
        assert back == dict(enumerate(whole.columns["text"]))
    longer = text_stream(paths[::-1], tests=paths, limit=4)
    assert [t.train.columns["text"][0] for t in longer] == ["c 0", "b 0", "a 0"] and len(longer[0].test) == 4
    assert len({int(i) for t in longer for part in (t.train, t.test) for i in part.id}) == 24
    for each in (lambda: text_stream([]), lambda: text_stream(paths, paths[:1])):
        with pytest.raises(BadInput, match="give one path or more"):
            each()
    same = str(jsonl(tmp_path / "id.jsonl", [{"text": "t", "id": i} for i in range(8)]))
    with pytest.raises(BadInput, match="8 ids are in more than one path"):
        text_stream([same, same], test_share=0.5)
