"""Datasets of other libraries, gathered into columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from remanence.core.errors import BadInput, UnknownName
from remanence.data import dataset, huggingface


class Items(Dataset[Any]):
    """Given items, counted as they are fetched."""

    def __init__(self, *items: Any) -> None:
        self.items, self.fetched = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.fetched += 1
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


class Table:
    """What a `datasets.Dataset` answers, without the library: names, a length, and dicts of lists for slices."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.columns, self.asked = dict(columns), 0

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: slice) -> dict[str, Any]:
        self.asked += 1
        return {name: values[key] for name, values in self.columns.items()}


def test_tensors_arrays_numbers_and_words_become_columns() -> None:
    x, y = torch.randn(7, 2, 3), torch.arange(7) % 3
    found = dataset(TensorDataset(x, y))
    assert torch.equal(found["x"], x) and torch.equal(found["y"], y) and found.positional and found.source == "dataset"
    items = [
        {"x": row.numpy().astype("f8"), "y": float(i), "document": f"d{i}", "key": np.int64(10 * i), "on": i > 3}
        for i, row in enumerate(x)
    ]
    mixed = dataset(Items(*items), source="mine")
    assert torch.equal(mixed["x"], x) and mixed["y"].dtype == torch.float32 and mixed["y"].tolist() == list(range(7))
    assert mixed.columns["document"] == [f"d{i}" for i in range(7)] and mixed["on"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    named = dataset(Items(*items), columns={"x": "x", "y": "on", "id": "key"})
    assert named.id.tolist() == [10 * i for i in range(7)] and set(named.columns) == {"x", "y"} and not named.positional
    triples = Items(*((torch.ones(2) * i, "word", i) for i in range(3)))
    assert dataset(triples, columns={"x": 0, "y": 2})["y"].tolist() == [0, 1, 2] and triples.fetched == 3
    half = dataset(Items((torch.tensor([1.5], dtype=torch.bfloat16), 1)))
    assert half["x"].dtype == torch.float32 and half["x"].tolist() == [[1.5]]


def test_bytes_are_pixels_and_images_of_pillow_are_read() -> None:
    rows = torch.randint(0, 256, (4, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = dataset(Items(*((row, i) for i, row in enumerate(rows))))
    torch.testing.assert_close(found["x"], rows[:, None].float() / 255)
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pictures = Items(*((Image.fromarray(row.numpy()), i) for i, row in enumerate(rows)))
    assert dataset(pictures).fingerprint() == found.fingerprint()
    color = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    for picture in (Image.fromarray(color), Image.fromarray(color).quantize()):
        got = dataset(Items((picture, 0)))["x"]
        expected = torch.tensor(np.asarray(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        torch.testing.assert_close(got, expected)
    bits = dataset(Items((Image.fromarray(np.array([[True, False]])), 0)))["x"]
    assert bits.tolist() == [[[[1, 0]]]]


@pytest.mark.parametrize(
    ("items", "knobs", "message"),
    [
        ([], {}, "is empty"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 0)], {}, r"row 1, 'x' has shape \(3,\) where the first row has \(2,\)"),
        ([(torch.zeros(2), 0), (torch.zeros(2), 0.5)], {}, "row 1, 'y' is float64 where the first row has int64"),
        ([(np.zeros(2, np.uint8), 0), (np.zeros(2, bool), 0)], {}, "row 1, 'x' is bool where the first row has uint8"),
        ([(torch.zeros(2), 0), (torch.zeros(2), "a")], {}, "row 1, 'y' is a word where"),
        ([(torch.zeros(2), 0), ValueError("torn")], {}, r"item 1 cannot be fetched \(ValueError: torn\)"),
        ([(torch.zeros(2), None)], {}, "item 0, 'y' is missing"),
        ([([[1, 2], [3]], 0)], {}, "'x' is ragged"),
        ([(torch.zeros(2), 0, 1)], {}, "has 3 values, not"),
        ([torch.zeros(2)], {}, "is a Tensor; items must be"),
        ([{"a": 1}, {"b": 1}], {}, "row 1 has b where the first has a"),
        ([(torch.tensor([1, torch.nan]), 0)], {}, "NaN or infinite values in 1 rows"),
        ([(object(), 0)], {}, "values of type object"),
        ([{"x": 1, "id": -1}], {}, "must not be negative"),
        ([{"x": 1, "id": 3}, {"x": 1, "id": 3}], {}, "1 ids are repeated"),
        ([{"id": 3}], {}, "no column but the id"),
    ],
)
def test_bad_items_are_named(items: list[Any], knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        dataset(Items(*items), **knobs)


def test_keys_kinds_and_limits() -> None:
    with pytest.raises(UnknownName, match=r"item 0 has no 'lable'; did you mean 'label'\? \(it has image, label\)"):
        dataset(Items({"image": 1, "label": 2}), columns={"x": "image", "y": "lable"})

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    for other in (Stream(), iter([])):
        with pytest.raises(BadInput, match="no map-style dataset"):
            dataset(other)
    large = Items(*[(np.zeros(1000, np.uint8), 0)] * 50)
    with pytest.raises(BadInput, match=r"50 rows like the first would take 0.2 MiB of memory where 0.1 MiB"):
        dataset(large, max_bytes=100_000)
    assert large.fetched == 1


def test_a_datasets_dataset_is_read_in_slices() -> None:
    n = 600
    tokens = [[i, i + 1, 0] for i in range(n)]
    table = Table({"tokens": tokens, "label": [i % 4 for i in range(n)], "text": [f"t{i}" for i in range(n)]})
    found = huggingface(table, columns={"x": "tokens", "y": "label", "document": "text"})
    assert found["x"].tolist() == tokens and found["x"].dtype == torch.int64 and found["y"][5] == 1
    assert found.columns["document"][599] == "t599" and table.asked == 3
    in_torch = Table({"x": torch.tensor(tokens), "y": torch.arange(n) % 4})  # ds.with_format("torch")
    assert torch.equal(huggingface(in_torch)["x"], found["x"])
    with pytest.raises(UnknownName, match="no column 'lable'; did you mean 'label'"):
        huggingface(table, columns={"y": "lable"})
    with pytest.raises(BadInput, match=r"splits train, test; give one of them, such as ds\['train'\]"):
        huggingface({"train": table, "test": table})
    with pytest.raises(BadInput, match=r"is no datasets.Dataset"):
        huggingface([1, 2])
    with pytest.raises(BadInput, match="is empty"):
        huggingface(Table({"x": []}))
    with pytest.raises(BadInput, match="row 301, 'x' is missing"):
        huggingface(Table({"x": [1.0] * 301 + [None]}))
    with pytest.raises(BadInput, match="row 1, 'x' has shape"):
        huggingface(Table({"x": [[1, 2], [3]]}))
    with pytest.raises(BadInput, match="600 rows like the first"):
        huggingface(table, max_bytes=1000)


def test_the_real_library() -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    ds = datasets.Dataset.from_dict({"x": [[0.5, 1.0], [2.0, 3.0]], "y": [1, 0]})
    assert huggingface(ds)["x"].tolist() == [[0.5, 1.0], [2.0, 3.0]]
    assert huggingface(ds.with_format("torch"))["y"].tolist() == [1, 0]
