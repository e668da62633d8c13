"""Texts in files, or of the ``datasets`` library, as documents one by one and as tables."""

from __future__ import annotations

import glob
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from remanence.core.errors import BadInput, Corrupt, UnknownName, nearest
from remanence.core.problem import TOKENS
from remanence.data.digits import hold_out
from remanence.data.examples import Examples
from remanence.data.folders import inside
from remanence.data.stream import Stream, Task
from remanence.data.values import LIMIT, fits

_CHATS = ("messages", "conversations")
_PROMPTS = ("prompt", "question", "instruction")
_ANSWERS = ("answer", "completion", "response", "output")
_TEXTS = ("text", "content")
_ROLES = {"human": "user", "gpt": "assistant"}  # where a message is {from, value}
_ROWS = 1024  # of a Parquet file at a time

#: The document's name, where it stands in words, and its row.
Record = tuple[str, str, Mapping[str, Any]]


def text(
    paths: Any,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_bytes: int = LIMIT,
    source: str = "text",
    start: int = 0,
) -> Examples:
    """Documents as a table of list columns, from which a life's tokenizer makes rows of tokens: ``text``; or ``prompt`` and ``answer``;
    or ``messages``, lists of ``{"role": ..., "content": ...}``. And ``document``, by which a request can name one.

    Args:
        paths: a file, a folder, a pattern such as ``"notes/**/*.txt"``, or a list of these; or a ``datasets.Dataset`` (one split),
            streamed or not. Files are ``.txt`` (each one document), ``.jsonl`` (one row a line), ``.json`` (a list of rows, or one row
            a line; a row may be a text and nothing else) and ``.parquet`` (``pip install remanence[llm]``), all UTF-8. Of a folder, files that are called otherwise and
            hidden ones are passed over. Files come in the order of their names.
        columns: our names to theirs, such as ``{"prompt": "q", "answer": "a", "entity": "author"}``; others are left out. None: all,
            the texts by their usual names: messages or conversations; prompt, question or instruction (with ``input`` after it) with
            answer, completion, response or output; text or content. Of ``columns`` without any text, the texts are found likewise.
        limit: read no more documents than this; a streamed dataset must have one.
        max_bytes: of the texts in memory, at a byte a character.
        start: the number of the first row, where rows have no ids of their own: a life that learns several texts needs other ids in each.

    ``id``: whole numbers are the ids (else row numbers); words are the ``document``. A row without either is ``file:line``.

    Raises:
        BadInput: no file, no documents, an empty text or answer or one that is no text, rows of different columns, or the limit; names
            the file and the line.
        UnknownName: a column that the rows lack.
        Corrupt: not UTF-8, no JSON, or a damaged Parquet file; names the file and the line.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit={limit} documents must be at least 1")
    if limit is None and _is_dataset(paths) and not hasattr(type(paths), "__len__"):
        raise BadInput(f"{source}: a streamed dataset may never end; say how many documents to take (limit=)")
    made: dict[str, list[Any]] = {}
    size = count = 0
    for count, row in enumerate(islice(iterate(paths, columns), limit), 1):
        for name, value in row.items():
            made.setdefault(name, []).append(value)
            size += len(value) if isinstance(value, str) else len(str(value))
        if not count % _ROWS:
            fits(size, max_bytes, f"{source}: the first {count} documents")
    if not count:
        raise BadInput(f"{source} has no documents; was everything filtered out?")
    fits(size, max_bytes, f"{source}: {count} documents")
    if start < 0:
        raise BadInput(f"start={start} must be at least 0")
    own = made.pop("id", None)
    ids = range(start, start + count) if own is None else own
    examples = Examples(made, source, ids, positional=own is None)
    examples.check()
    return examples


def iterate(paths: Any, columns: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The documents of `text`, one after the other, without keeping any: for more than fits into memory.

    Raises:
        BadInput, UnknownName, Corrupt: as `text`, when the document is reached.
    """
    layout: _Layout | None = None
    for document, where, row in _dataset(paths) if _is_dataset(paths) else records(paths):
        if layout is None:
            layout = _Layout(row, columns, where)
        yield layout.read(row, document, where)


def text_stream(
    paths: list[str],
    tests: list[str] | None = None,
    test_share: float = 0.1,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Stream:
    """Each of `paths` (a file, a folder or a pattern, see `text`) is a task (scenario ``domain``). Row numbers as ids are counted for
    each path by itself, so that one that grows changes no other's.

    Args:
        tests: held-out documents, one path for each task; None takes `test_share` of the documents, drawn by `seed`.
        limit: of documents per path.

    Raises:
        BadInput: no paths, not as many `tests`, ids that come twice, or whatever `text` refuses.
    """
    if not paths or (tests is not None and len(tests) != len(paths)):
        raise BadInput(
            f"{len(paths)} paths and {len(tests or paths)} tests: give one path or more, and a test for each"
        )
    tasks = []
    for number, path in enumerate(paths):
        train = numbered(text(path, columns, limit), 2 * number)
        test = None if tests is None else numbered(text(tests[number], columns, limit), 2 * number + 1)
        tasks.append(Task(*hold_out(train, test, test_share, seed), id=number))
    ids = [id for task in tasks for part in (task.train, task.test) for id in part.id.tolist()]
    if len(set(ids)) < len(ids):
        raise BadInput(
            f"{len(ids) - len(set(ids))} ids are in more than one path; every document needs an id of its own"
        )
    return Stream(tuple(tasks), "domain", name="text")


def numbered(table: Examples, number: int) -> Examples:
    """`table`, its row numbers counted from a place of its own among several tables; ids of its own stay."""
    if not table.positional:
        return table
    return Examples(table.columns, table.source, table.id + number * 2**32, table.views, positional=True)


class _Layout:
    """Where the texts and the other columns of a row are; the same for all rows."""

    def __init__(self, first: Mapping[str, Any], columns: Mapping[str, str] | None, where: str) -> None:
        for theirs in (columns or {}).values():
            if theirs not in first:
                raise UnknownName(
                    f"{where} has no {theirs!r}{nearest(str(theirs), first)} (it has {', '.join(map(str, first))})"
                )
        self.strict = columns is None
        self.keys = set(first)
        named = dict(columns or {})
        if not set(named) & {"text", "answer", "messages"}:
            named |= _found(first, where)
        if self.strict:
            taken = {*named, *named.values(), "text", "messages", "prompt", "answer", "input"}
            named |= {name: name for name in first if name not in taken}
        for name in TOKENS:
            if name in named:
                raise BadInput(f"{where}: a text has no column {name!r} yet; say by columns= which to take")
        self.named = named
        self.more = "input" if named.get("prompt") == "instruction" and "input" in first else None
        self.whole = _whole(first.get(named.get("id", "")))

    def read(self, row: Mapping[str, Any], document: str, where: str) -> dict[str, Any]:
        if row.keys() != self.keys and (self.strict or not set(self.named.values()) <= row.keys()):
            raise BadInput(
                f"{where} has {', '.join(map(str, row)) or 'nothing'} where the first row has {', '.join(sorted(self.keys))}; give all "
                "rows the same columns, say by columns= which to take, or read them one kind at a time"
            )
        made: dict[str, Any] = {}
        for ours, theirs in self.named.items():
            value = row[theirs]
            if ours in ("text", "prompt", "answer"):
                made[ours] = said(value, ours if ours == theirs else f"{ours} ({theirs!r})", where)
            else:
                made[ours] = _messages(value, where) if ours == "messages" else value
        if self.more and row[self.more]:
            made["prompt"] += "\n" + said(row[self.more], self.more, where)
        if "id" in made and self.whole != _whole(made["id"]):
            raise BadInput(f"{where}: the id {made['id']!r} is of another kind than the first row's")
        if not self.whole and "id" in made:
            document = str(made.pop("id"))
        made.setdefault("document", document)
        return made


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _found(first: Mapping[str, Any], where: str) -> dict[str, str]:
    """The texts of a row, by their usual names."""

    def which(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in first), None)

    chat, prompt, answer, plain = map(which, (_CHATS, _PROMPTS, _ANSWERS, _TEXTS))
    if chat is not None:
        return {"messages": chat}
    if prompt is not None and answer is not None:
        return {"prompt": prompt, "answer": answer}
    if plain is not None:
        return {"text": plain}
    raise BadInput(
        f"{where} has {', '.join(map(str, first)) or 'nothing'}, of which none is known as text; say which is, such as "
        "columns={'text': 'body'} or columns={'prompt': 'q', 'answer': 'a'}"
    )


def said(value: Any, name: str, where: str) -> str:
    """`value`, if it is a text that says something.

    Raises:
        BadInput: it is none; says `where`.
    """
    if not isinstance(value, str):
        given = "missing" if value is None else f"a {type(value).__name__}, not text"
        raise BadInput(f"{where}: {name} is {given}; write it as text, or drop the row")
    if not value.strip():
        raise BadInput(f"{where}: {name} is empty; fill it or drop the row")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{where}: {name} has half a character at {error.start}; write it again as UTF-8") from None
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadInput(f"{where}: messages must be a list of one or more {{role, content}}")
    made = []
    for number, each in enumerate(value):
        here = f"{where}, message {number}"
        if not isinstance(each, Mapping):
            raise BadInput(f"{here} is a {type(each).__name__}, not {{role, content}}")
        role = said(each.get("role", each.get("from")), "the role", here)
        content = said(each.get("content", each.get("value")), "the content", here)
        made.append({"role": _ROLES.get(role, role), "content": content})
    return made


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "column_names") and hasattr(type(value), "__iter__")


def _dataset(ds: Any) -> Iterator[Record]:
    if isinstance(ds, Mapping):
        splits = ", ".join(map(str, ds))
        raise BadInput(
            f"this dataset has the splits {splits}; give one of them, such as ds[{next(iter(ds), 'train')!r}]"
        )
    for number, row in enumerate(ds):
        yield f"row:{number}", f"row {number}", row


def records(paths: Any) -> Iterator[Record]:
    """What is in text files, as it is there. See `text`.

    Raises:
        BadInput: no file, or a row that is none.
        Corrupt: as `text`.
    """
    for name, path in _listed([paths] if isinstance(paths, str | Path) else paths):
        read = _READ[path.suffix.lower()]
        try:
            for part, number, row in read(path, name):
                row = {"text": row} if isinstance(row, str) else row
                if not isinstance(row, Mapping):
                    raise BadInput(f"{name}, {part} {number} is a {type(row).__name__}; a row is {{column: value}}")
                yield (f"{name}:{number}", f"{name}, {part} {number}", row) if part else (name, name, row)
        except OSError as error:
            raise BadInput(f"{name} cannot be read ({error.strerror or error})") from None


def _listed(given: Any) -> list[tuple[str, Path]]:
    """Names and paths of all files, in order. A file of a folder is called by its path inside, another by its name where that is enough."""
    found: list[tuple[str, Path]] = []
    if not isinstance(given, Sequence) or not given or not all(isinstance(each, str | Path) for each in given):
        raise BadInput(f"paths={given!r} must be a path, a list of one or more, or a datasets.Dataset")
    for each in given:
        path = Path(each)
        if path.is_dir():
            inner = [f.relative_to(path) for f in path.rglob("*") if f.suffix.lower() in _READ and f.is_file()]
            shown = sorted(f.as_posix() for f in inner if not any(part.startswith(".") for part in f.parts))
            if not shown:
                raise BadInput(f"{each} has no {', '.join(_READ)} files")
            found += [(name, inside(path, name)) for name in shown]
            continue
        matched = [path] if path.is_file() else [Path(m) for m in sorted(glob.glob(str(each), recursive=True))]
        files = [match for match in matched if match.is_file()]
        if not files:
            raise BadInput(f"{each} matches no file; give a file, a folder, or a pattern such as 'notes/**/*.txt'")
        for file in files:
            if file.suffix.lower() not in _READ:
                raise BadInput(f"{file.name} is not known as text; files are {', '.join(_READ)}")
        found += [(file.name, file) for file in files]
    if len({name for name, _ in found}) < len(found):
        base = os.path.commonpath([path.absolute().parent for _, path in found])
        found = [(path.absolute().relative_to(base).as_posix(), path) for _, path in found]
    if len({name for name, _ in found}) < len(found):
        raise BadInput(f"{len(found) - len({name for name, _ in found})} files are named twice; name each once")
    return found


_Read = Iterator[tuple[str, int, Any]]
"""What a row is called in this kind of file, its number, and the row."""


def _txt(path: Path, name: str) -> _Read:
    yield "", 0, {"text": _decoded(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), name, 1)}


def _jsonl(path: Path, name: str) -> _Read:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            plain = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, name, number).strip()
            if plain:
                yield "line", number, _parsed(plain, name, number)


def _json(path: Path, name: str) -> _Read:
    with open(path, "rb") as file:
        begin = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begin != b"[":
        yield from _jsonl(path, name)
        return
    for number, row in enumerate(_parsed(_decoded(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), name, 1), name, 1)):
        yield "item", number, row


def _parquet(path: Path, name: str) -> _Read:
    try:
        pyarrow, parquet = (importlib.import_module(module) for module in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise BadInput(f"{name}: Parquet files need pyarrow; install it by: pip install 'remanence[llm]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    yield "row", number, row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise Corrupt(f"{name} cannot be read as Parquet after row {number} ({error}); write it again") from None


_READ = {".txt": _txt, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def _decoded(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise Corrupt(f"{name}, line {at} is not UTF-8 ({error.reason}); save it as UTF-8") from None


def _parsed(plain: str, name: str, line: int) -> Any:
    try:
        return json.loads(plain)
    except json.JSONDecodeError as error:
        raise Corrupt(f"{name}, line {line + error.lineno - 1}: no JSON ({error.msg}); mend this line") from None
    except (RecursionError, ValueError) as error:  # nested, or a number, beyond what Python reads
        raise Corrupt(f"{name}, line {line}: no JSON that can be read ({error}); mend this line") from None
