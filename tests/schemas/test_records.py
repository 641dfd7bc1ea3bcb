import json

import pyarrow as pa
import pytest
from pydantic import ValidationError

from schemas.arrow import SAMPLES
from schemas.records import Captions, Entity, Op, SampleRecord

PLACES = {"shard", "index", "offset", "size", "members"}


def record(**fields):
    defaults = {
        "key": "abc-edit-remove-0",
        "stream": "edit",
        "task": "edit",
        "subtask": "remove",
        "instruction": "<img><|image_1|></img> Remove the cup.",
        "input_roles": ("edit_source",),
        "parents": ("a" * 64,),
        "ops": (Op.of("remove", "1", radius=3),),
    }
    return SampleRecord(**(defaults | fields))


def nulls(value):
    if isinstance(value, dict):
        return any(nulls(v) for v in value.values())
    return any(nulls(v) for v in value) if isinstance(value, list) else value is None


def test_json_has_fixed_keys_no_nulls_and_typed_numbers():
    sparse = json.loads(record().to_json())
    full = json.loads(record(captions=Captions(short="x"), edit_area_ratio=1, severity=0).to_json())
    assert list(sparse) == list(full) == list(SampleRecord.model_fields)
    assert not nulls(sparse)
    assert b'"edit_area_ratio":1.0' in record(edit_area_ratio=1).to_json()


def test_the_index_has_every_field_of_the_record():
    assert set(SAMPLES.names) == set(SampleRecord.model_fields) | PLACES
    row = record().model_dump(mode="json") | {"shard": "", "index": 0, "offset": 0, "size": 0, "members": []}
    stored = pa.Table.from_pylist([row], schema=SAMPLES).to_pylist()[0]
    assert {k: stored[k] for k in SampleRecord.model_fields} == {k: row[k] for k in SampleRecord.model_fields}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": "a.b"}, "does not match"),
        ({"stream": "control"}, "does not belong"),
        ({"input_roles": ()}, "input roles"),
        ({"edit_source_index": 1}, "names no input"),
        ({"instruction": "no placeholder"}, "0 distinct placeholder"),
        ({"instruction_variants": ("<img><|image_2|></img>",)}, "not contiguous"),
        ({"parents": ()}, "at least 1"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_inconsistent_records_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        record(**fields)


def test_boxes_are_ordered():
    with pytest.raises(ValidationError, match="x0 < x1"):
        Entity(phrase="cup", box=(5, 0, 5, 9))
