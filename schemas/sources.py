"""The `sources` section of a recipe: where images come from, and which columns or fields say what about them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from schemas.vocabulary import normalise_task, stream_for

FieldName = Literal[
    "image",
    "caption",
    "caption_short",
    "tags",
    "alt",
    "entities",
    "depth",
    "scene_id",
    "source_url",
    "license",
    "license_url",
    "author",
    "optout",
    "x_robots_tag",
    "tdm_reservation",
]


class SourceBase(BaseModel):
    """What every source has.

    Attributes:
        name: slug, unique in the recipe; prefixes unit names.
        path: file, folder or glob, as a local path or any fsspec URL; a relative one starts at the recipe's folder.
        license, license_url, author: used where a row says nothing itself.
        optout: True marks every row of the source as opted out.
        user_agents: names under which the images were fetched; rows' `x_robots_tag` may address them.
        robots_directives: directives of `X-Robots-Tag` that opt an image out.
        scene_from: images of one scene never straddle train/val/test. `field` uses the row's `scene_id`, `folder`
            the image's folder; `uid` (and the others where they yield nothing) makes every image its own scene.
        fields: field -> its name in the source (column, or key of the JSON), where the two differ. `caption` and
            `caption_short` describe the image, `alt` is text found beside it; `entities` is a list of `{phrase,
            label, box: [x0, y0, x1, y1], mask, score, subject_id}` in pixels of the upright image, a mask being
            uncompressed COCO run lengths, polygons, or the path of a mask image, and entities with one `subject_id`
            the same individual; `depth` is a 16-bit PNG (larger is nearer, 0 unknown); `x_robots_tag` and
            `tdm_reservation` are response headers of those names (text, or a list of several), the latter also a
            site's `tdmrep.json`.
        max_caption_chars: longer captions quarantine their row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    path: str = Field(min_length=1)
    license: str = ""
    license_url: str = ""
    author: str = ""
    optout: bool = False
    user_agents: tuple[str, ...] = ("x2i", "img2dataset")
    robots_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    scene_from: Literal["field", "folder", "uid"] = "field"
    fields: dict[FieldName, str] = {}
    max_caption_chars: int = Field(default=8000, gt=0)

    @field_validator("path")
    @classmethod
    def _path_is_a_glob(cls, path: str) -> str:
        if "{" in path:
            raise ValueError(f"path {path!r}: braces are not expanded, write a glob such as shards/*.tar")
        return path


class FolderSource(SourceBase):
    """Images below a folder, each with an optional `.txt` (caption) and `.json` (fields) of the same stem beside it.

    Attributes:
        extensions: what counts as an image, lower case and without the dot; matched in any case.
        text_is: the caption that a `.txt` is.
        subjects: each folder right below the path has photographs of one subject, whose name it is, as for DreamBooth
            (`red_cartoon/03.jpg`). All photographs of a subject are in one split. Where the subject is need not be
            said; a `.json` may say so, with an entity of that label.
    """

    type: Literal["folder"] = "folder"
    subjects: bool = False
    extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
    text_is: Literal["alt", "caption", "caption_short"] = "alt"

    @model_validator(mode="before")
    @classmethod
    def _a_subject_is_a_scene(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("subjects"):
            return {"scene_from": "folder", **fields}
        return fields

    @model_validator(mode="after")
    def _subjects_are_not_torn_apart(self) -> FolderSource:
        if self.subjects and self.scene_from != "folder":
            raise ValueError(f"scene_from: {self.scene_from!r} would tear subjects apart; leave it out")
        return self


class ManifestSource(SourceBase):
    """A CSV, JSONL or Parquet file whose rows name images.

    Attributes:
        image_root: what the paths of images, masks and depth maps start from; default: the manifest's folder.
            They must not leave it.
        url_schemes: rows may name images by absolute URL with one of these schemes.
        ignore: columns to leave out without a warning.
    """

    type: Literal["manifest"] = "manifest"
    image_root: str = ""
    url_schemes: tuple[str, ...] = ("https", "http", "s3", "gs", "hf")
    ignore: tuple[str, ...] = ()


class WebDatasetSource(SourceBase):
    """Tars (`.tar`, `.tar.gz`, `.tgz`) with `jpg|jpeg|png|webp` and `txt|caption|json` members, as img2dataset writes.

    Beside `00000.tar`, a `00000.parquet` of img2dataset accounts for the rows that it failed to download.

    Attributes:
        text_is: the caption that a `txt` or `caption` member is.
        dotted_keys: split a member's name at its last dot instead of its first (`v1.5_001.jpg`).
    """

    type: Literal["webdataset"] = "webdataset"
    fields: dict[FieldName, str] = {"alt": "caption", "source_url": "url"}
    text_is: Literal["alt", "caption", "caption_short"] = "alt"
    dotted_keys: bool = False


class ParquetSource(SourceBase):
    """Parquet files that hold the images themselves, as binary or as Hugging Face's `struct<bytes, path>`."""

    type: Literal["parquet"] = "parquet"


class ParquetSamplesSource(SourceBase):
    """Finished samples in Parquet files that hold their images: InstructPix2Pix, MagicBrush, OmniEdit and their like.

    `fields` may name columns for `scene_id` (MagicBrush: `img_id`), licence, author, source and opt-out.

    Attributes:
        inputs, output: columns of images, as binary or as Hugging Face's `struct<bytes, path>`.
        instruction: column of text, or of a list of texts, of which the first is the instruction and the others its
            variants.
        task: of the samples, as `edit` or `style/transfer`.
        task_column: a column whose values `tasks` gives other tasks, e.g. `{"style": "style/transfer"}`.
    """

    type: Literal["parquet_samples"] = "parquet_samples"
    inputs: tuple[str, ...] = ("input_image",)
    instruction: str = "edit_prompt"
    output: str = "edited_image"
    task: str = "edit"
    task_column: str = ""
    tasks: dict[str, str] = {}

    @model_validator(mode="after")
    def _tasks_take_the_inputs(self) -> ParquetSamplesSource:
        for name in (self.task, *self.tasks.values()):
            stream_for(normalise_task(name)[0], len(self.inputs))
        return self


class X2ISource(SourceBase):
    """Finished samples in the official JSONL: `task_type, instruction, input_images, output_image`.

    The path is such a file, a folder of X2I as it was downloaded and unpacked, or a mix of OmniGen2 (`.yml`).

    Attributes:
        image_root: what image paths start from; default: the JSONL's folder, from which a relative one starts. They
            must not leave it. The paths in a mix start there too, by default at the mix's folder.
        default_task: the task of rows without `task_type`.
        tasks: further task names -> one of x2i's, e.g. `{"my_edits": "edit"}`.
    """

    type: Literal["x2i"] = "x2i"
    image_root: str = ""
    default_task: str = ""
    tasks: dict[str, str] = {}


Source = Annotated[
    FolderSource | ManifestSource | WebDatasetSource | ParquetSource | ParquetSamplesSource | X2ISource,
    Field(discriminator="type"),
]
