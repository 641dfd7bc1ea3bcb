"""Units: a listing is cut in order, nothing is lost, and a worker reads back just its own part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipelines.plan import read_unit, slice_units, write_listing
from pipelines.sources.base import Item
from pipelines.storage import Folder

ITEMS = st.lists(st.integers(-1, 12), max_size=40).map(
    lambda rows: [Item(f"file-{i}", 10 * i, f"v{i}", r) for i, r in enumerate(rows)]
)


@given(ITEMS, st.integers(1, 10))
def test_units_keep_every_item_in_order_within_their_size(items, unit_rows):
    units = list(slice_units(items, unit_rows))
    assert [i for unit in units for i in unit] == items
    for unit in units:
        assert len(unit) == 1 or sum(unit_rows if i.rows < 0 else i.rows for i in unit) <= unit_rows


@given(ITEMS)
def test_adding_items_at_the_end_leaves_full_units_alone(items):
    more = [*items, Item("later", 1, "v", 1)]
    before, after = list(slice_units(items, 5)), list(slice_units(more, 5))
    assert after[: len(before) - 1] == before[: len(before) - 1]


def test_a_worker_reads_its_own_row_group(tmp_path):
    folder = Folder(str(tmp_path))
    items = [Item(f"file-{i}", i, f"v{i}", 1, '{"x": 1}') for i in range(7)]
    units = list(write_listing(folder, "photos", slice_units(items, 3)))
    assert [read_unit(folder, "photos", i) for i in range(3)] == units == [items[:3], items[3:6], items[6:]]
