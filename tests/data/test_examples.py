"""Examples: whole columns, ids, fingerprints."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.data import Examples, cat, cat_batches


def table(n: int = 5, at: int = 10) -> Examples:
    columns = {
        "x": torch.arange(2.0 * n).reshape(n, 2),
        "y": torch.arange(n) % 2,
        "document": [f"d{i}" for i in range(n)],
    }
    return Examples(columns, "table", ids=range(at, at + n))


def test_rows_are_chosen_in_the_order_asked_with_all_their_columns() -> None:
    chosen = table().select(torch.tensor([3, 0, 3]))
    assert chosen.id.tolist() == [13, 10, 13] and chosen["x"].tolist() == [[6, 7], [0, 1], [6, 7]]
    assert chosen.columns["document"] == ["d3", "d0", "d3"] and chosen.source == "table"
    batch = table().batch(torch.tensor([4, 1]))
    assert set(batch) == {"x", "y", "id"} and batch["id"].tolist() == [14, 11] and batch["y"].tolist() == [0, 1]


def test_only_and_without_divide_the_rows() -> None:
    ids = Ids([11, 14, 999])
    assert table().only(ids).id.tolist() == [11, 14] and table().without(ids).id.tolist() == [10, 12, 13]
    assert table().without(ids).columns["document"] == ["d0", "d2", "d3"]
    whole = table()
    assert whole.without(Ids([1])) is whole and len(whole.only(Ids())) == 0
    assert whole.rows(ids).tolist() == [1, 4]


def test_ids_by_position_stay_bound_to_their_rows() -> None:
    named, counted = table(), Examples({"x": torch.zeros(4)}, "s")
    assert not named.positional and counted.positional
    part = counted.select(torch.tensor([2, 3]))
    assert part.positional and part.id.tolist() == [2, 3]
    assert cat([named, Examples({"x": torch.zeros(1, 2), "y": torch.zeros(1, dtype=torch.int64)}, "t")]).positional


@pytest.mark.parametrize(
    ("columns", "ids", "message"),
    [
        ({}, None, "at least one column"),
        ({"x": torch.zeros(3), "y": torch.zeros(2)}, None, "differ in length"),
        ({"id": torch.zeros(3)}, None, "ids="),
        ({"x": torch.zeros(3)}, [0, 1], "one id per row"),
        ({"x": torch.zeros(3)}, [0.0, 1.0, 2.0], "integers"),
        ({"x": torch.zeros(2)}, [True, False], "integers"),
        ({"x": torch.zeros(2)}, [-1, 0], "negative"),
    ],
)
def test_malformed_tables_are_refused(columns: dict[str, torch.Tensor], ids: list[int] | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Examples(columns, "bad", ids=ids)


def test_check_names_the_column_and_counts_the_rows() -> None:
    table().check()
    bad = torch.zeros(4, 2)
    bad[1, 0], bad[1, 1], bad[3, 0] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(BadInput, match=r"'x' has NaN or infinite values in 2 rows"):
        Examples({"x": bad}, "bad").check()
    huge = torch.full((4,), 3e38)  # the sum overflows, the values do not
    Examples({"x": huge}, "huge").check()
    with pytest.raises(BadInput, match="1 ids are repeated"):
        Examples({"x": torch.zeros(3)}, "twice", ids=[1, 2, 1]).check()
    with pytest.raises(BadInput, match="no tensor column 'z'"):
        table()["z"]


def test_the_fingerprint_sees_every_change_and_nothing_else() -> None:
    base = table()
    assert (
        base.fingerprint() == table().fingerprint() == Examples(base.columns, "other name", ids=base.id).fingerprint()
    )
    changed = [
        base.replace(x=base["x"] + torch.tensor([[0.0, 0.0]] * 4 + [[0.0, 1e-6]])),
        base.replace(x=base["x"].double()),
        base.replace(x=base["x"].reshape(5, 1, 2)),
        base.replace(document=["d0", "d1", "d2", "d3", "d5"]),
        base.select(torch.tensor([1, 0, 2, 3, 4])),
        Examples(base.columns, "table", ids=range(11, 16)),
        base.replace(extra=torch.zeros(5)),
        base.replace(document=["d0", "d1", "d2", "d3", "d4\x1f"]),
    ]
    prints = {examples.fingerprint() for examples in changed} | {base.fingerprint()}
    assert len(prints) == len(changed) + 1
    view = torch.arange(20.0).reshape(2, 10).T[:5]  # the same values in another memory order
    assert Examples({"x": view}, "v").fingerprint() == Examples({"x": view.contiguous()}, "v").fingerprint()


def test_fingerprints_are_equal_in_another_process() -> None:
    code = "import remanence as rm; print(rm.data.digits().fingerprint(), rm.data.split_digits(seed=3).fingerprint())"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    from remanence.data import digits, split_digits

    assert seen == f"{digits().fingerprint()} {split_digits(seed=3).fingerprint()}\n"


def test_joining_tables() -> None:
    joined = cat([table(2, 0), table(3, 50)])
    assert joined.id.tolist() == [0, 1, 50, 51, 52] and joined.columns["document"] == ["d0", "d1", "d0", "d1", "d2"]
    assert joined.source == "table" and cat([table(), Examples({"x": torch.zeros(1, 2)}, "o")]).columns.keys() == {"x"}
    assert cat([one := table()]) is one
    with pytest.raises(BadInput, match="'x' cannot be joined"):
        cat([table(), Examples({"x": torch.zeros(1, 3)}, "wide")])
    with pytest.raises(BadInput, match="no examples to join"):
        cat([])


def test_joining_batches_keeps_shared_columns_and_fills_weights() -> None:
    first = {
        "x": torch.zeros(2, 3),
        "id": torch.tensor([1, 2]),
        "only": torch.zeros(2),
        "weight": torch.tensor([0.5, 2.0]),
    }
    second = {"x": torch.ones(1, 3, dtype=torch.float64), "id": torch.tensor([9]), "other": torch.zeros(1)}
    joined = cat_batches(first, second)
    assert set(joined) == {"x", "id", "weight"} and joined["x"].dtype == torch.float32
    assert joined["id"].tolist() == [1, 2, 9] and joined["weight"].tolist() == [0.5, 2.0, 1.0]
    assert cat_batches({"x": torch.zeros(2, 3), "id": torch.zeros(2)}, first)["weight"].tolist() == [1, 1, 0.5, 2]
    with pytest.raises(BadInput, match="'x'"):
        cat_batches(first, {"x": torch.zeros(1, 4), "id": torch.zeros(1)})
