"""Parquet read by one thread: the rows and columns asked for, and no thread left when a process ends."""

import ast
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sft_core.parquet import read_table

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "source=chat").mkdir()
    path = tmp_path / "source=chat" / "rows.parquet"
    table = pa.table({"row_id": [f"{n % 7}" for n in range(50)], "text": ["x" * n for n in range(50)], "n": range(50)})
    pq.write_table(table, path, row_group_size=8)
    return path


def test_columns_and_rows_are_those_asked_for(file: Path):
    everything = read_table(file)
    assert everything.column_names == ["row_id", "text", "n"] and len(everything) == 50
    assert read_table(file, ["n", "row_id"]).column_names == ["n", "row_id"]
    some = read_table(file, ["n", "row_id"], pc.field("row_id") == "3")
    assert some.column_names == ["n", "row_id"] and some["n"].to_pylist() == list(range(3, 50, 7))
    assert len(read_table(file, ["row_id"], pc.field("row_id") == "no such")) == 0
    with file.open("rb") as opened:
        assert read_table(opened, ["text"])["text"].to_pylist() == ["x" * n for n in range(50)]


def test_table_without_rows_keeps_its_columns(tmp_path: Path):
    schema = pa.schema({"row_id": pa.string(), "n": pa.int32()})
    with pq.ParquetWriter(tmp_path / "none.parquet", schema):
        pass
    empty = read_table(tmp_path / "none.parquet", ["n", "row_id"], pc.field("n") == 1)
    assert empty.schema == pa.schema({"n": pa.int32(), "row_id": pa.string()})


def test_no_thread_is_started(file: Path):
    """Threads that end after the interpreter abort it, or wait for it for ever."""
    code = f"""
import os
import pyarrow as pa
from pathlib import Path
from sft_core.parquet import read_table
before = len(os.listdir("/proc/self/task"))
with open({str(file)!r}, "rb") as opened:
    read_table(opened)
    read_table(Path({str(file)!r}), ["n"])
print(before, len(os.listdir("/proc/self/task")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert before == after


def starts_threads(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in ("read_table", "ParquetFile")
    reads = isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".read_row_group", ".iter_batches"))
    return reads and "use_threads=False" not in ast.unparse(node)


def test_outputs_are_read_with_it():
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("steps", "sft_core")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if starts_threads(node) and path.name != "parquet.py"
    ]
    assert calls == []
