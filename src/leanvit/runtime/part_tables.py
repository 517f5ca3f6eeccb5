"""Rows of a part as a Parquet file: columns path, error, and what a JSON line of the task says. No torch.

Lists of numbers (embeddings) are lists of float32, other lists and objects JSON text, so that every part has the same
columns whatever was found in it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from leanvit.errors import require


def rows_as_parquet(rows: Sequence[str], columns: Mapping[str, bool]) -> bytes:
    """A Parquet file of JSON lines that have `path`, and `error` or what was found.

    columns: keys of what was found, and whether each is a list of numbers: see `columns_of`.
    """
    arrow = require("pyarrow")
    values = [json.loads(row) for row in rows]
    table = {
        "path": arrow.array([row["path"] for row in values], arrow.string()),
        "error": arrow.array([row.get("error") for row in values], arrow.string()),
    }
    for key, is_vector in columns.items():
        table[key] = _column(arrow, [row.get(key) for row in values], is_vector)
    file = io.BytesIO()
    require("pyarrow.parquet").write_table(arrow.table(table), file)
    return file.getvalue()


def columns_of(line: Mapping[str, Any]) -> dict[str, bool]:
    """The columns of a task's JSON lines, by one of them."""
    return {key: isinstance(value, list) and bool(value) and isinstance(value[0], float) for key, value in line.items()}


def _column(arrow: Any, values: list[Any], is_vector: bool) -> Any:
    if is_vector:
        return arrow.array(values, arrow.list_(arrow.float32()))
    return arrow.array([None if value is None else json.dumps(value) for value in values], arrow.string())


def rows_in_parquet(data: bytes) -> list[dict[str, Any]]:
    """`path` and `error` of all rows."""
    table = require("pyarrow.parquet").read_table(io.BytesIO(data), columns=["path", "error"])
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
