"""Many lives side by side: run the cells of a grid in processes, each once, and say how the variants differ.

    FOLDER/  plan.yaml  cells/<key>/ (a life's home, with cell.json when it is done)  beginnings/  references/  comparison.json, .csv, .md, .html

A cell that is done is never run again while nothing changed that its result depends on; one that was killed goes on where it was.
Cells of one seed that differ only in how they forget share their beginning, and all share retrained references.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from remanence.core.errors import BadInput, Refused, RemanenceError
from remanence.life.files import canonical, plain_errors, write_atomic
from remanence.life.grid import AXES, Cell, Group, cell_of, choices, expand, groups, prefix_text
from remanence.life.home import begun
from remanence.life.lock import Lock
from remanence.life.memory import Room, budgets_of, fitted, refuse_sizes, room_of, trials
from remanence.life.plan import load_plan
from remanence.life.report_words import size
from remanence.life.surroundings import versions
from remanence.measure import matrix as figures_of
from remanence.measure.evidence import compare_distances, interval
from remanence.measure.memory import accuracy_per_mb, area_under_curve

__all__ = ["collect", "compare"]

NOTHING, AGAIN = "do nothing", "retrain, another seed"
#: Figures of a whole life, from its report.
LIFE_FIGURES = (
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "seconds",
    "bytes",
)
#: The same, against the life of the same seed that learned by `joint`, where there is one.
JOINT_FIGURES = ("omega_all", "intransigence")
#: Accuracy against memory: what is said, and the letters of its area.
CURVES = {"average_incremental_accuracy": "AUC-A", "average_accuracy": "AUC-L"}

#: So many requests of a kind in one plan are also shown as one table.
POOLED = 5

Told = Callable[[int, int, str], None]


def compare(
    path: str | Path,
    *,
    learn: str | None = None,
    keep: str | None = None,
    where: str | None = None,
    forget: str | None = None,
    memory: str | None = None,
    seeds: int | Sequence[int] = 3,
    jobs: int = 1,
    references: int = 3,
    klom: bool = False,
    folder: str | Path | None = None,
    allow_code: bool = False,
    told: Told | None = None,
) -> tuple[dict[str, Any], Path]:
    """Live every variant of a plan with every seed; returns the comparison and its folder.

    Args:
        learn, keep, where, forget: alternatives in the syntax of plans, see `grid.choices`; None: as planned.
        memory: budgets such as ``200KB,500KB,1MB``; every variant lives with each, its stores as large as the budget allows beside
            everything else that remembers.
        seeds: how many, counted from the plan's own, or which.
        jobs: processes at a time.
        references: models retrained for each request, at least 2: one has no spread.
        klom: also hold the networks of all seeds together against all references, as distributions (see `life.klom`); lives every plan
            again up to its last request, and needs two seeds or more.
        folder: default ``runs/<plan name>-compare``.
        told: called with (cells done, cells in all, what was done last).

    Raises:
        PlanError, BadInput: the plan or an alternative cannot be used; nothing ran.
        Refused: the folder holds the comparison of another plan.
    """
    from remanence.life.run import build_stream

    plan = load_plan(Path(path), allow_code=allow_code)
    if any(":" in next(iter(part)) for part in (plan.model, plan.stream)):
        raise BadInput(
            "a comparison runs its lives in processes of their own, from plans that may not run code; name a model and a stream of ours"
        )
    numbers = list(range(plan.seed, plan.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or jobs < 1 or references < 2:
        raise BadInput(
            f"seeds={seeds}, jobs={jobs}, references={references}: jobs and seeds are at least 1, references at least 2"
        )
    if klom and (len(numbers) < 2 or not plan.events or plan.events[-1].kind != "forget"):
        raise BadInput("KLoM needs a plan whose last event is a forget request, and two seeds or more")
    root = Path(folder) if folder is not None else Path("runs") / f"{plan.name}-compare"
    axes = {
        "learner": choices("learner", learn, plan),
        "keep": choices("keep", keep, plan),
        "where": choices("where", where, plan),
        "forget": choices("forget", forget, plan),
    }
    budgets = budgets_of(memory) if memory is not None else []
    if budgets:
        refuse_sizes(axes["learner"], axes["keep"])
    about = {**versions(), "threads": plan.threads or 1}
    fingerprint = build_stream(plan).fingerprint()
    cells = expand(plan, axes, numbers, references, fingerprint, about)
    kept = root / "plan.yaml"
    if kept.exists() and kept.read_text(encoding="utf-8") != plan.source:
        raise Refused(f"{root} holds the comparison of another plan; choose another --home, or delete the folder")
    write_atomic(kept, plan.source.encode())
    failed: list[dict[str, Any]] = []
    fits: list[tuple[Cell, int, int | None]] = []
    unfit: list[dict[str, Any]] = []
    with Lock(root):
        if budgets:

            def cell(names: dict[str, str], seed: int, text: str) -> Cell:
                return cell_of(names, seed, text, fingerprint, about)

            rooms, failed = _rooms(root, trials(cells, cell), jobs, told)
            fits, unfit = fitted(cells, budgets, rooms, cell)
            cells = [each for each, _, _ in fits]
        _run(root, cells, jobs, told)
    made = {
        "name": plan.name,
        "seeds": numbers,
        "references": references,
        "versions": about,
        **collect(cells, [_result(root, cell) for cell in cells]),
    }
    made["failed"] = failed + made["failed"]
    if budgets:
        made["memory"] = at_memory(fits, [_result(root, each) for each, _, _ in fits], budgets, unfit)
    if klom:
        _add_klom(root, cells, made["requests"], told)
    write_atomic(
        root / "comparison.json", (json.dumps(made, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    )
    return made, root


def _rooms(
    root: Path, lives: Mapping[tuple[str, ...], Sequence[Cell]], jobs: int, told: Told | None
) -> tuple[dict[tuple[str, ...], Room], list[dict[str, Any]]]:
    """What the trial lives of each setting tell of its bytes, and which of them failed."""
    _run(root, [cell for each in lives.values() for cell in each], jobs, told)
    rooms: dict[tuple[str, ...], Room] = {}
    failed: list[dict[str, Any]] = []
    for setting, each in lives.items():
        results = [_result(root, cell) or {"error": "not finished"} for cell in each]
        errors = [result["error"] for result in results if result["error"] is not None]
        if errors:
            failed.append({**each[0].names, "seed": each[0].seed, "error": errors[0]})
        else:
            rooms[setting] = room_of([_figure(result["report"], "bytes") or 0.0 for result in results])
    return rooms, failed


def _run(root: Path, cells: Sequence[Cell], jobs: int, told: Told | None) -> None:
    """The cells that are not done yet, or that failed, their groups side by side. What has no store is one life at every budget."""
    cells = list({cell.key: cell for cell in cells}.values())
    open_ = [cell for cell in cells if (_result(root, cell) or {"error": "not begun"})["error"] is not None]
    done = len(cells) - len(open_)
    if told is not None:
        told(done, len(cells), f"{done} of {len(cells)} lives were lived before" if done else "")
    if not open_:
        return
    for left in [
        root / "beginnings",
        root / "work",
        *(root / "cells").glob(".*"),
    ]:  # of a run that was killed: they hold examples
        shutil.rmtree(left, ignore_errors=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_group, str(root), group): group for group in groups(open_)}
        try:
            for future in as_completed(waiting):
                future.result()
                done += len(waiting[future].cells)
                if told is not None:
                    told(done, len(cells), _named(waiting[future].cells[0]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _named(cell: Cell) -> str:
    words = [f"{axis} {name}" for axis, name in cell.names.items() if axis != "forget" and name != "as planned"]
    return ", ".join([*words, f"seed {cell.seed}"])


def run_group(root: str, group: Group) -> None:
    """Live a group's cells one after another, in this process."""
    import torch

    first = group.cells[0].plan
    torch.set_num_threads(first.threads or 1)
    folder = Path(root)
    beginning: Path | None = None
    if group.prefix is not None and len(group.cells) > 1:
        beginning = folder / "beginnings" / group.prefix
        _live(beginning, prefix_text(group.cells[0]), folder)
    for cell in group.cells:
        home = folder / "cells" / cell.key
        try:
            if beginning is not None and not begun(home):
                _copy(beginning, home, cell.text)
            told: dict[str, Any] = {"error": None, "report": _live(home, cell.text, folder)}
        except RemanenceError as error:
            told = {"error": f"{type(error).__name__}: {error}", "report": None}
        write_atomic(home / "cell.json", canonical({"names": cell.names, "seed": cell.seed, **told}).encode())
    if beginning is not None:
        shutil.rmtree(beginning, ignore_errors=True)


def _live(home: Path, text: str, root: Path) -> dict[str, Any]:
    """Live the plan `text` in `home` to its end, from wherever it is; the report."""
    from remanence.life.run import run_plan

    plan = root / "work" / f"{home.name}.{os.getpid()}.yaml"
    write_atomic(plan, text.encode())
    try:
        run_plan(plan, home, references=root / "references").close()
    finally:
        plan.unlink(missing_ok=True)
    report: dict[str, Any] = json.loads((home / "report.json").read_text(encoding="utf-8"))
    return report


def _copy(beginning: Path, home: Path, text: str) -> None:
    """Begin a life as a copy of its group's beginning."""
    part = home.with_name(f".{home.name}")
    with plain_errors(home):
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(beginning, part, ignore=shutil.ignore_patterns("lock", "work", "report.*"))
        write_atomic(part / "plan.yaml", text.encode())
        shutil.rmtree(home, ignore_errors=True)
        os.rename(part, home)


def _result(root: Path, cell: Cell) -> dict[str, Any] | None:
    """What a cell came to, or why it failed; None if it never ended."""
    path = root / "cells" / cell.key / "cell.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


# -- what came of it ---------------------------------------------------------------------------------------------------


def collect(cells: Sequence[Cell], results: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The tables: ``lives`` (a row per variant) and ``requests`` (per setting and request, a row per forgetter beside *do nothing* and
    *retrain, another seed*). Every figure is {mean, half, n}: over seeds, half width of the 95 % interval (None for one seed)."""
    variants: dict[tuple[str, ...], dict[int, Mapping[str, Any]]] = {}
    failed: list[dict[str, Any]] = []
    for cell, result in zip(cells, results, strict=True):
        mine = variants.setdefault(tuple(cell.names[axis] for axis in AXES), {})
        if result is None or result["error"] is not None:
            failed.append({**cell.names, "seed": cell.seed, "error": result["error"] if result else "not finished"})
        else:
            mine[cell.seed] = result["report"]
    return {"lives": _lives(variants), "requests": _requests(variants), "failed": failed}


def _add_klom(root: Path, cells: Sequence[Cell], requests: Sequence[dict[str, Any]], told: Told | None) -> None:
    """Put KLoM into the rows of each setting's last request: its floor into *retrain, another seed*, do nothing once for all forgetters."""
    from remanence.life import klom as distributions

    homes: dict[tuple[str, ...], dict[str, list[Path]]] = {}
    for cell in cells:
        if (_result(root, cell) or {"error": "not finished"})["error"] is None:
            mine = homes.setdefault(tuple(cell.names[axis] for axis in AXES[:-1]), {})
            mine.setdefault(cell.names["forget"], []).append(root / "cells" / cell.key)
    for setting, forgetters in homes.items():
        made = [r for r in requests if tuple(r[axis] for axis in AXES[:-1]) == setting]
        request = [r for r in made if not r["request"].endswith("requests together")][-1]
        rows = {row["by"]: row for row in request["rows"]}
        for name, lived in forgetters.items():
            if len(lived) < 2:
                continue
            if told is not None:
                told(len(cells), len(cells), f"KLoM of {name}")
            found = distributions.klom(lived, root / "references", nothing="klom" not in request)
            rows[name]["klom"] = found["rows"][distributions.UNLEARNED]
            if "klom" not in request:
                request["klom"] = {key: found[key] for key in ("lives", "oracles", "estimator")}
                rows[NOTHING]["klom"] = found["rows"][distributions.NOTHING]
                rows[AGAIN]["klom"] = found["rows"][distributions.ORACLES]


def at_memory(
    fits: Sequence[tuple[Cell, int, int | None]],
    results: Sequence[Mapping[str, Any] | None],
    budgets: Sequence[int],
    unfit: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Accuracy against memory: a row per variant and accuracy, with its figure at every budget, what the stores hold there, the area
    over all budgets (None where one does not fit) and the accuracy per MB at the smallest and the largest budget.

    A life that came to more bytes than its budget in spite of all does not count at it."""
    curves: dict[tuple[str, ...], dict[int, dict[int, Mapping[str, Any]]]] = {}
    stored: dict[tuple[str, ...], dict[int, int | None]] = {}
    outside = {(*(each[axis] for axis in AXES if axis != "memory"), each["budget"]): each["reason"] for each in unfit}
    for (cell, budget, units), result in zip(fits, results, strict=True):
        names = tuple(cell.names[axis] for axis in AXES if axis != "memory")
        curves.setdefault(names, {})
        stored.setdefault(names, {})[budget] = units
        if result is None or result["error"] is not None:
            continue
        weight = _figure(result["report"], "bytes") or 0.0
        if weight > budget:
            outside[(*names, budget)] = f"needs {size(weight)}"
        else:
            curves[names].setdefault(budget, {})[cell.seed] = result["report"]
    for each in unfit:
        curves.setdefault(tuple(each[axis] for axis in AXES if axis != "memory"), {})
    rows = []
    for names, at in curves.items():
        for figure, area in CURVES.items():
            points = {
                b: {s: v for s, r in reports.items() if (v := _figure(r, figure)) is not None}
                for b, reports in at.items()
            }
            whole = set.intersection(*(set(points.get(budget, ())) for budget in budgets))
            lines = [[points[budget][seed] for budget in budgets] for seed in sorted(whole)]
            ends = [accuracy_per_mb(budgets, line) for line in lines]
            rows.append(
                {
                    **dict(zip([axis for axis in AXES if axis != "memory"], names, strict=True)),
                    "accuracy": figure,
                    "points": [
                        {
                            "budget": budget,
                            "stored": stored.get(names, {}).get(budget),
                            "value": _stat(points.get(budget, {}).values()),
                            "outside": outside.get((*names, budget)),
                        }
                        for budget in budgets
                    ],
                    "area": area,
                    "auc": _stat([area_under_curve(budgets, line) for line in lines]) if len(budgets) > 1 else None,
                    "apm_s": _stat([small for small, _ in ends]),
                    "apm_e": _stat([large for _, large in ends]),
                }
            )
    return {"budgets": list(budgets), "rows": rows}


def _lives(variants: Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    first: dict[int, float] | None = None
    joint = _joint(variants)
    for names, reports in variants.items():
        figures = {name: {seed: _figure(report, name) for seed, report in reports.items()} for name in LIFE_FIGURES}
        if joint:
            against = {seed: _against(report, joint[seed]) for seed, report in reports.items() if seed in joint}
            figures |= {name: {seed: found[name] for seed, found in against.items()} for name in JOINT_FIGURES}
        accuracy = {seed: value for seed, value in figures["average_accuracy"].items() if value is not None}
        shared = sorted(set(accuracy) & set(first)) if first is not None else []
        rows.append(
            {
                **dict(zip(AXES, names, strict=True)),
                "figures": {name: _stat(values.values()) for name, values in figures.items()},
                "measures": _measures(reports.values()),
                "difference": _stat([accuracy[seed] - first[seed] for seed in shared]) if first is not None else None,
            }
        )
        first = accuracy if first is None else first
    return rows


def _joint(variants: Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]]) -> Mapping[int, Mapping[str, Any]]:
    """The lives of the first variant that learns by `joint`, by seed."""
    return next((reports for names, reports in variants.items() if names[0].partition("(")[0] == "joint"), {})


def _against(report: Mapping[str, Any], joint: Mapping[str, Any]) -> dict[str, float | None]:
    """A life's figures against the joint life: what of its accuracy is there, and how much worse each task was learned, in the mean."""
    if any(each.get("score", "accuracy") != "accuracy" for each in (report, joint)):
        return dict.fromkeys(JOINT_FIGURES)
    mine, best = (
        np.array([[math.nan if v is None else v for v in row] for row in each["matrix"]]) for each in (report, joint)
    )
    if mine.shape != best.shape or not mine.size:
        return dict.fromkeys(JOINT_FIGURES)
    ideal = [figures_of.average_accuracy(best, at) for at in range(len(best))]
    when = figures_of.learned_rows(best)
    lost = [figures_of.intransigence(mine, best[row, task], task) for task, row in enumerate(when) if row < len(best)]
    found = {"omega_all": figures_of.omega(mine, ideal)["omega_all"], "intransigence": sum(lost) / max(len(lost), 1)}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _measures(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the plan's metrics said after the last learn event."""
    found: dict[str, list[float | None]] = {}
    for report in reports:
        last = [event for event in report["events"] if event.get("kind", "learn") == "learn"][-1:]
        for name, value in last[0].get("measures", {}).items() if last else ():
            found.setdefault(name, []).append(value)
    return {name: _stat(values) for name, values in found.items()}


def _figure(report: Mapping[str, Any], name: str) -> float | None:
    if name == "seconds":
        learned = sum(event["seconds"] or 0.0 for event in report["events"] if event.get("kind", "learn") == "learn")
        return learned + sum(
            receipt["cost"]["seconds"] or 0.0 for receipt in report["receipts"]
        )  # evidence is no cost of the life
    if name == "bytes":
        return float(
            sum(holder["bytes"] for holder in report["holders"] if holder["name"] not in ("snapshots", "references"))
        )
    value = report["summary"][name]["value"]
    return None if value is None else float(value)


def _requests(variants: Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    settings: dict[tuple[str, ...], dict[str, Mapping[int, Mapping[str, Any]]]] = {}
    for names, reports in variants.items():
        settings.setdefault(names[:-1], {})[names[-1]] = reports
    found = []
    for setting, forgetters in settings.items():
        labels = next(
            (
                [r["asked_plain"] for r in report["receipts"]]
                for reports in forgetters.values()
                for report in reports.values()
            ),
            [],
        )
        asked: dict[str, list[int]] = {}
        for number, label in enumerate(labels):
            asked.setdefault(_kind(label), []).append(number)
        about = dict(zip(AXES, setting, strict=False))
        for number, label in enumerate(labels):
            found.append({**about, "request": label, "rows": _request_rows(forgetters, [number])})
        for kind, numbers in asked.items():
            if len(numbers) >= POOLED:
                name = f"{kind}: {len(numbers)} requests together"
                found.append({**about, "request": name, "rows": _request_rows(forgetters, numbers)})
    return found


def _kind(label: str) -> str:
    """What a request asks for, without how many and which."""
    return " ".join(word for word in label.split() if not any(c.isdigit() for c in word))


def _request_rows(
    forgetters: Mapping[str, Mapping[int, Mapping[str, Any]]], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of one request, or of several of a kind together. Only the first is asked of the same network by all forgetters, so that each
    has its own *do nothing*."""
    rows: list[dict[str, Any]] = []
    base: dict[str, list[dict[str, Any]]] = {NOTHING: [], AGAIN: []}
    for name, reports in forgetters.items():
        receipts = {
            (seed, number): report["receipts"][number]
            for number in numbers
            for seed, report in reports.items()
            if number < len(report["receipts"])
        }
        gaps: dict[str, dict[tuple[int, int], tuple[float, float, float]]] = {}
        for seed, receipt in receipts.items():
            for cell in receipt["evidence"]:
                if (gap := _gap(cell)) is not None:
                    gaps.setdefault(cell["metric"], {})[seed] = gap
        order = dict.fromkeys(cell["metric"] for receipt in receipts.values() for cell in receipt["evidence"])
        gaps = {metric: gaps[metric] for metric in order if metric in gaps}
        columns = {
            metric: [list(values) for values in zip(*by_seed.values(), strict=True)] for metric, by_seed in gaps.items()
        }
        shares = [receipt["cost"]["fraction_of_retraining"] for receipt in receipts.values()]
        rows.append(
            {
                "by": name,
                "gaps": {metric: _stat(after) for metric, (after, _, _) in columns.items()},
                "verdicts": {
                    metric: compare_distances(metric, x, y, z).verdict for metric, (x, y, z) in columns.items()
                },
                "cost": _stat(shares),
                "peak": _stat([receipt["cost"].get("peak_bytes") for receipt in receipts.values()]),
                "states": sorted(
                    {
                        row["state"]
                        for receipt in receipts.values()
                        for row in receipt["done"]
                        if row["holder"] == "weights"
                    }
                ),
            }
        )
        for word, at in ((NOTHING, 1), (AGAIN, 2)):
            base[word].append({metric: three[at] for metric, three in columns.items()})
    shared: list[dict[str, Any]] = []
    for word, cost in ((NOTHING, 0.0), (AGAIN, 1.0)):
        metrics = list(dict.fromkeys(metric for each in base[word] for metric in each))
        values = {metric: next(each[metric] for each in base[word] if metric in each) for metric in metrics}
        shared.append(
            {
                "by": word,
                "gaps": {m: _stat(v) for m, v in values.items()},
                "verdicts": {},
                "cost": _stat([cost]),
                "peak": None,
                "states": [],
            }
        )
    return shared + rows


def _gap(cell: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Distances to the references: of the method's model, of doing nothing, and of one more reference.

    ``|x - mean|`` for a figure that each model has by itself; a reference's distance to the mean of the others is, in the root mean
    square, ``sd sqrt(n / (n - 1))``. A divergence is a distance already.
    """
    mean, sd, n = cell["reference_mean"], cell["reference_sd"], cell["n"]
    if cell["direction"] == "lower":
        known = cell["after"], cell["nothing"], mean
    else:
        known = (
            None if mean is None or cell["after"] is None else abs(cell["after"] - mean),
            None if mean is None or cell["nothing"] is None else abs(cell["nothing"] - mean),
            None if sd is None or n < 2 else sd * math.sqrt(n / (n - 1)),
        )
    after, nothing, again = known
    return None if after is None or nothing is None or again is None else (float(after), float(nothing), float(again))


def _stat(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean over seeds with the half width of its 95 % interval."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    mean, half = interval(known)
    return {"mean": mean, "half": half, "n": len(known)}
