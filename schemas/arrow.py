"""Arrow schemas of what is stored beside the shards: image columns, the ledger and the sample index."""

from __future__ import annotations

import pyarrow as pa

_CAPTIONS = pa.struct([(name, pa.string()) for name in ("short", "long", "alt", "tags")])
_OP = pa.struct(
    [
        ("name", pa.string()),
        ("version", pa.string()),
        ("params", pa.string()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("revision", pa.string()),
    ]
)

# One row per input of a stage: what became of it, why, and which value decided.
LEDGER = pa.schema(
    [
        ("unit", pa.string()),
        ("row", pa.int64()),
        ("input", pa.string()),  # where it came from: a path, `tar::member`, or `uid/attempt`
        ("uid", pa.string()),
        ("status", pa.string()),  # kept | dropped | quarantined
        ("reason", pa.string()),
        ("value", pa.float64()),
        ("detail", pa.string()),
        ("outputs", pa.list_(pa.string())),
    ]
)

# One row per ingested image, with where its normalised bytes are in the unit's tar.
IMAGES = pa.schema(
    [
        ("uid", pa.string()),
        ("unit", pa.string()),
        ("row", pa.int64()),
        ("input", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("source_format", pa.string()),
        ("changes", pa.list_(pa.string())),  # what normalisation did or noted
        ("members", pa.string()),  # JSON: member -> [offset, size] in the unit's tar
        ("captions", _CAPTIONS),
        ("entities", pa.string()),
        ("scene_id", pa.string()),
        ("license", pa.string()),
        ("license_url", pa.string()),
        ("author", pa.string()),
        ("source_url", pa.string()),
        ("optout", pa.bool_()),
        ("optout_reason", pa.string()),  # where it was said and what, "" if nowhere
        ("ready", pa.string()),  # JSON of a finished sample (task, instruction, its images), or ""
    ]
)

_MEMBER = pa.struct(
    [
        ("name", pa.string()),  # without the key: `input_1.jpg`
        ("offset", pa.int64()),  # of the data, from the start of the shard
        ("size", pa.int64()),
        ("width", pa.int32()),  # -1 for members that are not images
        ("height", pa.int32()),
    ]
)

# One row per published sample: its record, and where its bytes are.
SAMPLES = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # path relative to the corpus
        ("index", pa.int64()),  # position in the shard
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("members", pa.list_(_MEMBER)),
        ("stream", pa.string()),
        ("task", pa.string()),
        ("subtask", pa.string()),
        ("direction", pa.string()),
        ("instruction", pa.string()),
        ("instruction_variants", pa.list_(pa.string())),
        ("template_id", pa.string()),
        ("input_roles", pa.list_(pa.string())),
        ("output_kind", pa.string()),
        ("real_input", pa.bool_()),
        ("real_output", pa.bool_()),
        ("edit_source_index", pa.int32()),
        ("edit_area_ratio", pa.float64()),
        ("aligned", pa.bool_()),
        (
            "align",
            pa.struct([(n, pa.float64()) for n in ("psnr_outside", "ssim_outside", "l1_outside", "shift_px")]),
        ),
        ("change", pa.struct([("l1_inside", pa.float64())])),
        ("captions", _CAPTIONS),
        ("entities", pa.string()),
        ("references", pa.string()),
        ("group", pa.string()),
        ("scores", pa.string()),
        ("severity", pa.float64()),
        ("parents", pa.list_(pa.string())),
        ("ops", pa.list_(_OP)),
        ("scene_id", pa.string()),
        ("split", pa.string()),
        ("license", pa.string()),
        ("license_url", pa.string()),
        ("author", pa.string()),
        ("source_url", pa.string()),
        ("optout", pa.bool_()),
    ]
)

# One row per input image and target of a shard, in the order of its samples: where the image's posterior moments are.
# The schema's metadata says of what and how they were made, see `fine_tune.latents`.
LATENTS = pa.schema(
    [
        ("key", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),  # from the start of the file, -1 if the image could not be encoded
        ("shape", pa.list_(pa.int32())),  # 2C, h, w: means, then log-variances
    ]
)
