"""Public benchmarks of unlearning from copies that you have, in the layouts in which their authors give them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.data.examples import Examples
from remanence.data.text import records, said

#: The parts of TOFU, as its files are called; a part's place decides its ids.
TOFU = ("full", *(f"{kind}{share}" for kind, shares in (("forget", "01 05 10"), ("retain", "99 95 90"), ("holdout", "01 05 10"))
        for share in shares.split()), "real_authors", "world_facts", "forget01_perturbed", "forget05_perturbed",
        "forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")  # fmt: skip
#: The parts of MUSE (News or Books), as its files are called; a part's place decides its ids.
MUSE = ("raw/forget", "raw/retain1", "raw/retain2", "raw/holdout", "knowmem/forget_qa", "knowmem/retain_qa",
        "knowmem/forget_qa_icl", "knowmem/retain_qa_icl", "verbmem/forget", "privleak/forget", "privleak/retain",
        "privleak/holdout", "scal/forget_1", "scal/forget_2", "scal/forget_3", "scal/forget_4", "sust/forget_1",
        "sust/forget_2", "sust/forget_3", "sust/forget_4", "train/forget", "train/retain1", "train/retain2")  # fmt: skip
#: The probes of RWKU for a target, as its files are called, and what they ask for.
RWKU = {"forget_level1": "cloze", "forget_level2": "question", "forget_level3": "adversarial",
        "neighbor_level1": "cloze", "neighbor_level2": "question"}  # fmt: skip
_AUTHOR, _ALL = 20, 4000  # questions about an author of TOFU, and in all


def tofu(path: str | Path, split: str | None = None, source: str = "tofu") -> Examples:
    """A part of TOFU (Maini et al. 2024, arXiv 2401.06121): questions and answers about 200 authors who do not exist. List columns
    `prompt`, `answer`, `split`, `document`; where the file has them `paraphrased_answer`, `paraphrased_prompt` and `perturbed_answers`
    (wrong answers in the paraphrase's words). In the full file of 4000 rows, in which every 20 are one author, `entity` is ``author 0``
    to ``author 199``; of other parts, the files do not tell who is who.

    The parts repeat one another's rows: of ``full`` and ``forget10``, learn one. Ids tell the parts apart: row i of part k of `TOFU` is
    k * 2**32 + i.

    Args:
        path: a file of it, ``.json``, ``.jsonl`` or ``.parquet``, whose name says which part it is (``forget10.json``), unless a
            column ``split`` does.
        split: only the rows whose column ``split`` is this.

    Raises:
        BadInput: no such file, no such rows, a row without question and answer; names the line.
        Corrupt: a damaged file.
    """
    stem = Path(path).stem
    part = next((part for part in sorted(TOFU, key=len, reverse=True) if stem.startswith(part)), None)
    rows = []
    for document, where, row in records(path):
        made: dict[str, Any] = _asked(row, "question", "answer", where)
        made |= {"split": str(row.get("split", part or stem)), "document": document}
        for ours, theirs in (
            ("paraphrased_prompt", "paraphrased_question"),
            ("paraphrased_answer", "paraphrased_answer"),
        ):
            if theirs in row:
                made[ours] = said(row[theirs], theirs, where)
        for theirs in ("perturbed_answer", "perturbed_answers"):
            if theirs in row:
                made["perturbed_answers"] = _several(row[theirs], theirs, where)
        rows.append(made)
    full = len(rows) == _ALL and len({row["split"] for row in rows}) == 1
    if full:
        rows = [{**row, "entity": f"author {number // _AUTHOR}"} for number, row in enumerate(rows)]
    first = 2**32 * (TOFU.index(part) if part is not None else 0)
    ids: Sequence[int] = range(first, first + len(rows))
    if split is not None:
        splits = sorted({row["split"] for row in rows})
        if split not in splits:
            raise UnknownName(f"{source} has no split {split!r}{nearest(split, splits)} (it has {', '.join(splits)})")
        ids = [i for i, row in zip(ids, rows, strict=True) if row["split"] == split]
        rows = [row for row in rows if row["split"] == split]
    return _table(rows, source, ids)


def muse(path: str | Path, part: str = "raw/forget", source: str = "muse") -> Examples:
    """A part of MUSE, News or Books (Shi et al. 2024, arXiv 2407.06460), from a copy of its folder. Raw, privacy and training parts are
    texts (list column `text`); ``knowmem`` has questions and answers, and ``verbmem`` passages whose beginning is the `prompt` and
    whose continuation is the `answer`. Also `split` (the part) and `document`.

    The parts under ``train``, ``scal`` and ``sust`` repeat rows of ``raw``. Ids tell the parts apart: row i of part k of `MUSE` is
    k * 2**32 + i.

    Args:
        path: the folder with the folders raw, knowmem, ...
        part: which, of `MUSE`: ``<folder>/<name>`` of one file (``.json``, ``.jsonl``, ``.txt``, ``.parquet``), or of Parquet files called
            ``<name>-00000-of-00001.parquet`` and so on.

    Raises:
        UnknownName: no such part.
        BadInput: its file is not there, or has other columns; names the line.
        Corrupt: a damaged file.
    """
    if part not in MUSE:
        raise UnknownName(f"MUSE has no part {part!r}{nearest(part, MUSE)} (it has {', '.join(MUSE)})")
    folder, name = part.split("/")
    shards = sorted(Path(path, folder).glob(f"{name}-*-of-*.parquet"))
    files = [
        f for suffix in (".json", ".jsonl", ".txt", ".parquet") if (f := Path(path, folder, name + suffix)).is_file()
    ]
    if len(files) + bool(shards) != 1:
        found = "several files" if files else "no file"
        raise BadInput(f"{source} has {found} {part}.json, .jsonl, .txt or .parquet in {path}; one is needed")
    rows = []
    for document, where, row in records(files or shards):
        if folder == "knowmem":
            made = _asked(row, "question", "answer", where)
        elif folder == "verbmem":
            made = _asked(row, "prompt", "gt", where)
        else:
            made = {"text": said(row.get("text"), "text", where)}
        rows.append({**made, "split": part, "document": f"{folder}/{document}"})
    first = 2**32 * MUSE.index(part)
    return _table(rows, source, range(first, first + len(rows)))


def rwku(
    path: str | Path,
    probes: Sequence[str] = ("forget_level1", "forget_level2", "forget_level3"),
    source: str = "rwku",
) -> Examples:
    """Probes of RWKU (Jin et al. 2024, arXiv 2406.10890), of what a network knows of famous people: `prompt` (the query as it is; the
    benchmark's instruction before it is not there), `answer`, `level` ("1" cloze, "2" question, "3" adversarial), `kind` (of the
    adversarial ones: which attack), `probe`, `document`, and `entity`: the person. Of neighbours, things close to a person that are to
    stay, the `entity` is ``near <person>``, so that a request for the person does not name them.

    Args:
        path: the folder of one target (``Target/1_Stephen_King``), a folder with any number of these, or one file.
        probes: which, of `RWKU`.

    Raises:
        UnknownName: no such probe.
        BadInput: no such files, or rows without query, answer and subject; names the item.
        Corrupt: a damaged file.
    """
    for probe in probes:
        if probe not in RWKU:
            raise UnknownName(f"RWKU has no probe {probe!r}{nearest(probe, RWKU)} (it has {', '.join(RWKU)})")
    root = Path(path)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*.json") if f.stem in probes)
    if not files:
        raise BadInput(f"{root} has no {', '.join(f'{probe}.json' for probe in probes)}")
    rows = []
    for file in files:
        probe = file.stem
        if probe not in RWKU:
            raise UnknownName(f"{file.name} is no probe of RWKU{nearest(probe, RWKU)} (these are {', '.join(RWKU)})")
        for number, (_, where, row) in enumerate(records(file)):
            made = _asked(row, "query", "answer", f"{file.parent.name}/{where}")
            person = said(row.get("subject"), "subject", f"{file.parent.name}/{where}")
            made |= {
                "level": str(row.get("level", probe[-1])),
                "kind": str(row.get("type") or RWKU[probe]),
                "probe": probe,
            }
            made["entity"] = person if probe.startswith("forget") else f"near {person}"
            rows.append({**made, "document": f"{person}/{probe}:{number}"})
    return _table(rows, source)


def wmdp(path: str | Path, source: str = "wmdp") -> Examples:
    """Multiple-choice questions as WMDP's (Li et al. 2024, arXiv 2403.03218): `prompt` (the question), `answer` (the right choice, in
    words), `perturbed_answers` (the other choices), `document`.

    Args:
        path: a file, a folder or a pattern (see `text`) with ``question``, ``choices`` and ``answer``, the right one's number from 0.

    Raises:
        BadInput: no such file, fewer than two choices, or a number that none has; names the line.
        Corrupt: a damaged file.
    """
    rows = []
    for document, where, row in records(path):
        choices, answer = _several(row.get("choices"), "choices", where), row.get("answer")
        if (
            len(choices) < 2
            or isinstance(answer, bool)
            or not isinstance(answer, int)
            or not 0 <= answer < len(choices)
        ):
            raise BadInput(f"{where}: answer={answer!r} must be the number of one of two or more choices, from 0")
        made = {"prompt": said(row.get("question"), "question", where), "answer": choices[answer]}
        others = [choice for number, choice in enumerate(choices) if number != answer]
        rows.append({**made, "perturbed_answers": others, "document": document})
    return _table(rows, source)


def _asked(row: Mapping[str, Any], prompt: str, answer: str, where: str) -> dict[str, Any]:
    return {ours: said(row.get(theirs), theirs, where) for ours, theirs in (("prompt", prompt), ("answer", answer))}


def _several(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise BadInput(f"{where}: {name} must be a list of texts, not {value!r}")
    return [said(each, f"one of {name}", where) for each in value]


def _table(rows: Sequence[Mapping[str, Any]], source: str, ids: Sequence[int] | None = None) -> Examples:
    if not rows:
        raise BadInput(f"{source} has no rows")
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise BadInput(f"{source}: row {number} has {', '.join(row)} where the first has {', '.join(rows[0])}")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Examples(columns, source, None if ids is None else list(ids), positional=True)
