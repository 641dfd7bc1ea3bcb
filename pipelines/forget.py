"""forget: takes images out of a published corpus, with everything that was made of them, for good.

The tombstone comes first and the manifest last, and every step between may be repeated: whenever it is interrupted,
calling it again, or building, ends it. Only shards that hold samples of the images are written anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import ledger
from pipelines.corpus import Shard, find_shards, read_index
from pipelines.engine import describe
from pipelines.publish import digest_of_file, publish
from pipelines.scrub import Doomed, recount, scrub_ledger, scrub_part, scrub_table
from pipelines.stages.decide import DecideStage
from pipelines.stages.ingest import IngestStage
from pipelines.stages.pack import PackStage, packed, packed_digests, write_shard
from pipelines.storage import TEMPORARY, Folder
from pipelines.tombstones import PATH, add_tombstones, is_pending, read_tombstones
from schemas import latents
from schemas.arrow import SAMPLES
from schemas.identity import UID_CHARS
from schemas.shards import SampleSpan, iter_samples

_UID_LENGTH = 64
_CHUNK = 1 << 24
_IDENTITY = ["key", "parents"]


class ForgetError(ValueError):
    """Nothing was done; the message says why not and what to do."""


@dataclass(frozen=True)
class Plan:
    """What forgetting takes away.

    Attributes:
        uids: of the images, and of finished samples that were imported and show one of them.
        unknown: those that the corpus does not have; they are kept out of it from now on.
        duplicates: uids of other images that were dropped as near duplicates of these.
        samples: of each shard that has any: how many go, how many stay.
    """

    uids: tuple[str, ...]
    unknown: tuple[str, ...]
    duplicates: tuple[str, ...]
    samples: Mapping[Shard, tuple[int, int]]

    def per_stream(self) -> dict[str, tuple[int, int, int]]:
        """Samples that go, shards that are written anew, and shards that vanish, by stream."""
        found = {}
        for stream, shards in groupby(self.samples, key=lambda shard: shard.stream):
            counts = [self.samples[shard] for shard in shards]
            emptied = sum(stay == 0 for _, stay in counts)
            found[stream] = (sum(go for go, _ in counts), len(counts) - emptied, emptied)
        return found


def find_images(
    corpus: Folder, names: Iterable[str] = (), license: str | None = None, near_duplicates: bool = False
) -> set[str]:
    """uids of the images that are meant.

    Args:
        corpus: where.
        names: uids, or what begins with the first 20 characters of one, as every sample's key does.
        license: all images under it; "" those without one.
        near_duplicates: also images that were dropped because they look like one of these.

    Raises:
        ForgetError: a name is no uid and belongs to no image; or there is nothing under the licence.
    """
    images = _known_images(corpus)
    by_prefix = {uid[:UID_CHARS]: uid for uid in images["uid"].to_pylist()}
    uids = {_resolve(name, by_prefix) for name in names}
    if license is not None:
        licensed = images.filter(pc.equal(images["license"], license))["uid"].to_pylist()
        if not licensed:
            have = ", ".join(sorted(map(repr, pc.unique(images["license"].drop_null()).to_pylist())))
            raise ForgetError(f"no image has the licence {license!r}; there are {have}")
        uids |= set(licensed)
    return uids | set(_near_duplicates(corpus, uids)) if near_duplicates else uids


def make_plan(corpus: Folder, uids: Collection[str]) -> Plan:
    """What forgetting these images would do; changes nothing.

    Raises:
        ForgetError: no sample would be left.
    """
    known = _known_images(corpus)["uid"].to_pylist()
    every = {*uids, *_finished_samples(corpus, uids, known)}
    samples = dict(_losses(corpus, Doomed.of(every)))
    total = sum(len(read_index(corpus, shard, ["key"])) for shard in find_shards(corpus))
    if 0 < total == sum(go for go, _ in samples.values()):
        raise ForgetError(f"this takes every sample: delete {corpus.url} instead")
    duplicates = sorted({*_near_duplicates(corpus, every)} - every)
    return Plan(tuple(sorted(every)), tuple(sorted(every - {*known})), tuple(duplicates), samples)


def forget(corpus: Folder, uids: Collection[str], reason: str) -> Plan:
    """Take images out of a published corpus and keep them out.

    Args:
        corpus: the corpus; nothing else may write to it meanwhile.
        uids: of the images.
        reason: for the list of tombstones.

    Raises:
        ForgetError: no sample would be left.
    """
    finish(corpus)
    plan = make_plan(corpus, uids)
    add_tombstones(corpus, plan.uids, reason)
    finish(corpus)
    return plan


def finish(corpus: Folder) -> None:
    """Carry out what is on the list of tombstones and not done yet."""
    if not is_pending(corpus):
        return
    doomed = _doomed(corpus)
    _clear_away(corpus)
    for name in corpus.list("", ".parquet"):
        _scrub(corpus, name, doomed)
    recount(corpus)
    for shard in find_shards(corpus):
        _scrub_shard(corpus, shard, doomed)
    _close_gaps(corpus)
    manifest, recipe = corpus.read_json("manifest.json"), corpus.read_bytes("recipe.yaml").decode()
    publish(corpus, manifest["name"], recipe, manifest["versions"], packed_digests(corpus))


def _scrub(corpus: Folder, name: str, doomed: Doomed) -> None:
    match name.split("/"):
        case ["meta", "ledger", *_]:
            scrub_ledger(corpus, name, doomed)
        case ["work", "parts", *_]:
            scrub_part(corpus, name, doomed)
        case ["meta", "samples", *_] | [latents.FOLDER, *_]:
            pass  # they go with their shards
        case _ if name != PATH:
            scrub_table(corpus, name, doomed)


def _clear_away(corpus: Folder) -> None:
    """What shows images and is made again by whoever needs it, and what an interruption has left behind."""
    corpus.remove("report.html")
    corpus.remove("work/plan")
    for name in corpus.list():
        if name.rpartition("/")[2].startswith(TEMPORARY):
            corpus.remove(name)
    shards = find_shards(corpus)
    for shard in shards:
        if not corpus.exists(shard.sample_index):
            corpus.remove(shard.tar)  # the copy of a shard whose renaming did not get further
    for name in {*corpus.list("meta/samples", ".parquet")} - {shard.sample_index for shard in shards}:
        corpus.remove(name)
    seen = set[str]()
    for shard in find_shards(corpus):
        if (key := _first_key(corpus, shard)) in seen:
            _remove_shard(corpus, shard)  # renamed already
        seen.add(key)


def _doomed(corpus: Folder) -> Doomed:
    """All that is on the list, and the samples that descend from it."""
    uids = read_tombstones(corpus)
    doomed, keys = Doomed.of(uids), list[str]()
    for shard in find_shards(corpus):
        if corpus.exists(shard.sample_index):
            index = read_index(corpus, shard, _IDENTITY)
            keys += index["key"].filter(pa.array(doomed.rows_naming(index))).to_pylist()
    return Doomed.of(uids, keys)


def _losses(corpus: Folder, doomed: Doomed) -> Iterator[tuple[Shard, tuple[int, int]]]:
    for shard in find_shards(corpus):
        named = doomed.rows_naming(read_index(corpus, shard, _IDENTITY))
        if named.any():
            yield shard, (int(named.sum()), int((~named).sum()))


def _scrub_shard(corpus: Folder, shard: Shard, doomed: Doomed) -> None:
    index = read_index(corpus, shard)
    named = doomed.rows_naming(index.select(_IDENTITY))
    if named.all():
        _remove_shard(corpus, shard)
    elif named.any():
        _write_shard(corpus, shard, shard, index.filter(pa.array(~named)))
    else:
        _mend_marker(corpus, shard, len(index))


def _close_gaps(corpus: Folder) -> None:
    """Number the shards of every stream from 0 again, where some are gone. Their samples stay as they are."""
    for _, of_stream in groupby(find_shards(corpus), key=lambda shard: shard.stream):
        for number, shard in enumerate(of_stream):
            if shard.number != number:
                _write_shard(corpus, shard, Shard(shard.stream, number), read_index(corpus, shard))
                _remove_shard(corpus, shard)


def _write_shard(corpus: Folder, source: Shard, target: Shard, index: pa.Table) -> None:
    """The samples of this index, from one shard to another or in place; what is gone already is left out."""
    had_marker = corpus.exists(_marker_path(source))
    _remove_latents(corpus, source)
    with corpus.open(source.tar) as file:
        spans = {span.key: span for span in iter_samples(cast(BinaryIO, file))}
    kept = [(row, spans[row["key"]]) for row in index.to_pylist() if row["key"] in spans]
    digests = write_shard(corpus, target.tar, _ranges(corpus, source, [span for _, span in kept]))
    placed, end = list[dict[str, Any]](), 0
    for row, span in kept:
        shift = end - span.start
        members = [m | {"offset": span.members[m["name"]].offset + shift} for m in row["members"]]
        placed.append(row | {"shard": target.tar, "index": len(placed), "offset": end, "members": members})
        end += span.end - span.start
    schema = pa.schema([SAMPLES.field(name) for name in index.column_names])  # an older corpus has fewer columns
    corpus.write_table(target.sample_index, pa.Table.from_pylist(placed, schema))
    if had_marker:
        packed(corpus, target, "forgotten", len(placed), digests).write(corpus)


def _ranges(corpus: Folder, shard: Shard, spans: Iterable[SampleSpan]) -> Iterator[bytes]:
    for span in spans:
        for start in range(span.start, span.end, _CHUNK):
            yield corpus.read_bytes(shard.tar, start, min(start + _CHUNK, span.end))


def _mend_marker(corpus: Folder, shard: Shard, samples: int) -> None:
    """Bring the marker of a shard in line that was written when there was no time left for it."""
    if not corpus.exists(_marker_path(shard)):
        return
    marker = ledger.Marker(**corpus.read_json(_marker_path(shard)))
    if marker.outputs[shard.sample_index] != describe(corpus, shard.sample_index):
        with corpus.open(shard.tar) as file:
            digests = vars(digest_of_file(file))
        packed(corpus, shard, "forgotten", samples, digests).write(corpus)


def _remove_shard(corpus: Folder, shard: Shard) -> None:
    _remove_latents(corpus, shard)
    for name in (_marker_path(shard), shard.tar, shard.tar_index, shard.sample_index):
        corpus.remove(name)


def _remove_latents(corpus: Folder, shard: Shard) -> None:
    """An image can be had back from its latents."""
    for folder in (f"{ledger.FOLDER}/latents", latents.FOLDER):
        for name in corpus.list(folder):
            if latents.stem_of(name) == shard.stem:
                corpus.remove(name)


def _marker_path(shard: Shard) -> str:
    return ledger.marker_path(PackStage.name, shard.stem)


def _first_key(corpus: Folder, shard: Shard) -> str:
    return str(read_index(corpus, shard, ["key"])["key"][0].as_py())


def _known_images(corpus: Folder) -> pa.Table:
    """uid and licence of all images of the corpus, kept or not."""
    scores = corpus.list(f"meta/scores/{IngestStage.name}", ".parquet")
    tables = [corpus.read_table(name, ["uid", "license"]) for name in scores]
    for shard in find_shards(corpus):  # the only source of a corpus that came without its ledger
        index = read_index(corpus, shard, ["parents", "license"])
        alone = index.filter(pc.equal(pc.list_value_length(index["parents"]), 1))  # of several, rights are joined
        tables.append(pa.table({"uid": pc.list_flatten(alone["parents"]), "license": alone["license"]}))
        tables.append(_without_license(pc.list_flatten(index["parents"])))
    for name in corpus.list(f"{ledger.FOLDER}/{IngestStage.name}", ".parquet"):  # broken images, too
        uids = corpus.read_table(name, ["uid"])["uid"]
        tables.append(_without_license(uids.filter(pc.not_equal(uids, ""))))
    return pa.concat_tables(tables)


def _without_license(uids: pa.ChunkedArray) -> pa.Table:
    return pa.table({"uid": uids, "license": pa.nulls(len(uids), pa.string())})


def _resolve(name: str, by_prefix: Mapping[str, str]) -> str:
    prefix = name[:UID_CHARS].lower()
    if len(name) == _UID_LENGTH and all(c in "0123456789abcdef" for c in name.lower()):
        return name.lower()
    if len(prefix) == UID_CHARS and prefix in by_prefix:
        return by_prefix[prefix]
    raise ForgetError(
        f"{name!r}: no image of the corpus has a uid that begins so. Give a uid (64 hexadecimal digits), its first "
        f"{UID_CHARS}, or the key of a sample"
    )


def _near_duplicates(corpus: Folder, uids: Collection[str]) -> Iterator[str]:
    """Images that `decide` dropped in favour of one of these."""
    for name in corpus.list(f"{ledger.FOLDER}/{DecideStage.name}", ".parquet"):
        rows = corpus.read_table(name, ["uid", "reason", "detail"])
        rows = rows.filter(pc.equal(rows["reason"], "near_duplicate"))
        yield from (row["uid"] for row in rows.to_pylist() if row["detail"] in uids)


def _finished_samples(corpus: Folder, uids: Collection[str], known: Iterable[str]) -> Iterator[str]:
    """uids of imported samples that show one of the images: their keys begin with their own uid, and no parent's."""
    doomed, by_prefix = Doomed.of(uids), {uid[:UID_CHARS]: uid for uid in known}
    for name in corpus.list("work/images", ".parquet"):
        rows = corpus.read_table(name, ["uid", "ready"])
        yield from rows["uid"].filter(pa.array(doomed.rows_naming(rows))).to_pylist()
    for shard in find_shards(corpus):
        index = read_index(corpus, shard, _IDENTITY)
        for row in index.filter(pa.array(doomed.rows_naming(index))).to_pylist():
            own = row["key"][:UID_CHARS]
            if own in by_prefix and own not in {uid[:UID_CHARS] for uid in row["parents"]}:
                yield by_prefix[own]
