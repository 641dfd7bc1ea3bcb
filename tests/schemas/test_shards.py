import io
import tarfile

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from schemas.shards import (
    BLOCK,
    END_OF_ARCHIVE,
    ShardError,
    encode_member,
    encode_sample,
    header,
    iter_bytes,
    iter_samples,
)
from schemas.vocabulary import STREAMS

KEYS = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True)
SAMPLES = st.dictionaries(KEYS, st.tuples(*[st.binary(min_size=1, max_size=1200)] * 3), min_size=1, max_size=5)


def encode(samples):
    stream = STREAMS["text_to_image"]
    encoded = [encode_sample(k, dict(zip(stream.members, v, strict=True)), stream) for k, v in samples.items()]
    return b"".join(encoded) + END_OF_ARCHIVE


@given(SAMPLES)
def test_offsets_are_exact_and_bytes_survive(samples):
    shard = encode(samples)
    spans = list(iter_bytes(shard))
    assert [s.key for s in spans] == list(samples)
    for span in spans:
        data = tuple(shard[m.offset : m.offset + m.size] for m in span.members.values())
        assert data == samples[span.key]
    assert spans[0].start == 0
    assert [s.end for s in spans] == [*(s.start for s in spans[1:]), len(shard) - len(END_OF_ARCHIVE)]


@given(SAMPLES)
def test_a_sample_is_a_byte_range_that_can_be_moved(samples):
    shard = encode(samples)
    moved = b"".join(shard[s.start : s.end] for s in reversed(list(iter_bytes(shard))))
    assert [s.key for s in iter_bytes(moved)] == list(reversed(samples))


def test_headers_are_plain_ustar_with_fixed_fields():
    shard = encode({"a": (b"1", b"2", b"3")})
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        infos = tar.getmembers()
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode, i.pax_headers == {}) for i in infos} == {
        (0, 0, 0, "", "", 0o644, True)
    }
    assert len(shard) % BLOCK == 0 and shard.endswith(END_OF_ARCHIVE)


def test_webdataset_reads_it(tmp_path):
    path = tmp_path / "text_to_image-000000.tar"
    path.write_bytes(encode({"a-1": (b"jpeg", b"text", b"{}"), "b-2": (b"j", b"t", b"{}")}))
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(s["__key__"], s["output.jpg"], s["txt"]) for s in read] == [("a-1", b"jpeg", b"text"), ("b-2", b"j", b"t")]


def test_what_breaks_readers_is_refused():
    stream = STREAMS["text_to_image"]
    whole = {"output.jpg": b"x", "txt": b"x", "json": b"{}"}
    for key in ("v1.5-0001", "Upper", "ünicode", "a/b", "../a", "", "a" * 65):
        with pytest.raises(ValueError, match="does not match"):
            encode_sample(key, whole, stream)
    with pytest.raises(ShardError, match="needs members"):
        encode_sample("a", {"output.jpg": b"x", "txt": b"x"}, stream)
    with pytest.raises(ShardError, match="empty"):
        encode_sample("a", whole | {"txt": b""}, stream)
    with pytest.raises(ShardError, match="100 bytes"):
        header("a" * 101, 1)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x.jpg", "a/../../x.jpg"])
def test_members_that_leave_the_archive_are_refused(name):
    with pytest.raises(ShardError, match="leaves the archive"):
        list(iter_bytes(encode_member(name, b"x") + END_OF_ARCHIVE))


def test_broken_tars_are_named():
    shard = encode({"a": (b"1" * 600, b"2", b"3")})
    with pytest.raises(ShardError, match="not a readable tar"):
        list(iter_bytes(b"not a tar at all" * 64))
    with pytest.raises(ShardError, match="not a readable tar"):
        list(iter_bytes(shard[:700]))
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(ShardError, match="not a plain file"):
        list(iter_bytes(link.tobuf(tarfile.USTAR_FORMAT) + END_OF_ARCHIVE))
    twice = encode_member("a.jpg", b"1") + encode_member("a.jpg", b"2") + END_OF_ARCHIVE
    with pytest.raises(ShardError, match="occurs twice"):
        list(iter_samples(io.BytesIO(twice)))
