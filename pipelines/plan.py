"""Planning: sources are listed (never read), and the listing is cut into fixed units.

The listing is a Parquet file with one row group per unit, so a worker reads just its own part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources.base import Item
from pipelines.storage import Folder

_ITEMS = pa.schema([(f.name, pa.int64() if f.name in ("size", "rows") else pa.string()) for f in fields(Item)])


def listing_path(source: str) -> str:
    return f"work/plan/{source}.parquet"


def slice_units(items: Iterable[Item], unit_rows: int) -> Iterator[list[Item]]:
    """Cut a listing into units of at most `unit_rows` rows. An item of unknown or larger size is a unit of its own."""
    unit, rows = list[Item](), 0
    for item in items:
        size = item.rows if item.rows >= 0 else unit_rows
        if unit and rows + size > unit_rows:
            yield unit
            unit, rows = [], 0
        unit.append(item)
        rows += size
    if unit:
        yield unit


def write_listing(corpus: Folder, source: str, units: Iterable[list[Item]]) -> Iterator[list[Item]]:
    """Store the units of a source while passing them on."""
    with corpus.writing(listing_path(source)) as local, pq.ParquetWriter(local, _ITEMS, compression="zstd") as out:
        for unit in units:
            out.write_table(pa.Table.from_pylist([asdict(i) for i in unit], _ITEMS))
            yield unit


def read_unit(corpus: Folder, source: str, index: int) -> list[Item]:
    """The items of one unit."""
    with corpus.open(listing_path(source)) as file:
        return [Item(**row) for row in pq.ParquetFile(file).read_row_group(index).to_pylist()]
