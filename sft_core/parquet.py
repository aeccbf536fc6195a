"""Parquet files of outputs, read so that the process may end right after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def open_parquet(file: Path | IO[bytes]) -> pq.ParquetFile:
    """A Parquet file whose reads start no thread where they are called with `use_threads=False`."""
    return pq.ParquetFile(file, pre_buffer=False)


def read_table(
    file: Path | IO[bytes], columns: Sequence[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """The columns (all when None) of the rows `where` keeps, by this thread alone, a row group at a time.

    where: names columns among those read. `pyarrow.parquet.read_table` returns while threads of Arrow still clean up.
    A short process that ends in that moment is aborted ("terminate called without an active exception"), or hangs
    where Python opened the file (apache/arrow #34314, #50482).
    """
    names = None if columns is None else list(columns)
    with open_parquet(file) as parquet:
        if where is None:
            table = parquet.read(names, use_threads=False)
        else:
            groups = [
                parquet.read_row_group(group, names, use_threads=False).filter(where)
                for group in range(parquet.num_row_groups)
            ]
            table = pa.concat_tables(groups) if groups else parquet.schema_arrow.empty_table()
    return table if names is None else table.select(names)
