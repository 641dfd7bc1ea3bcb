"""Opt-outs: headers as servers send them, reservations, and what image files say about themselves."""

from __future__ import annotations

import io
import json
import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from filters.c2pa import decode_cbor
from filters.optout import embedded_optout, robots_optout, tdm_optout

AGENTS = ("x2i", "MyBot")
DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("noai", "noai"),
        ("NoAI", "noai"),
        ("noarchive, noimageai", "noimageai"),
        ("none", "none"),
        ("x2i: noai", "noai"),
        ("X2I:noai", "noai"),
        ("x2i/0.1: noai", "noai"),
        ("googlebot: nofollow, x2i: nosnippet, noindex", "noindex"),
        ("googlebot: noindex, *: noai", "noai"),
        ("max-snippet: 20, noai", "noai"),
        ("max-image-preview: large, unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, noai", "noai"),
        ("unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noindex", "noindex"),
        ("unavailable_after: 2010-06-25T15:00:00Z, noindex", "noindex"),
        ("a-directive-of-tomorrow: 3, noai", "noai"),  # not a user agent: no directive follows it
        ("X-Robots-Tag: noai", "noai"),
        ("noindex nofollow", "noindex"),
        (["nofollow", "noai"], "noai"),
        ("x-robots-tag: googlebot: noai\nX-Robots-Tag: noindex", "noindex"),  # an agent holds for one header only
        ("", ""),
        (None, ""),
        ("all", ""),
        ("nofollow, noarchive", ""),
        ("googlebot: noai", ""),
        ("otherbot: noindex, nofollow, noai", ""),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST", ""),
        ("noaim, xnoai", ""),
    ],
)
def test_robots_headers(header, found):
    assert robots_optout(header, AGENTS, DIRECTIVES) == (f"x-robots-tag: {found}" if found else "")


@pytest.mark.parametrize("header", ["noai, unavailable_after: 25 Jun 2010 15:00:00 PST", "*: noai", "none"])
def test_headers_that_img2dataset_takes_for_a_permission(header):
    """img2dataset 1.x cuts at the first colon and takes what is before it for a user agent."""
    assert robots_optout(header, ("img2dataset",), DIRECTIVES)


def test_case_of_the_user_agent_does_not_matter_on_either_side():
    """img2dataset lowers the header only, so that `MyBot: noai` never reaches the user agent `MyBot`."""
    for header in ("MyBot: noai", "mybot: noai", "MYBOT: NOAI"):
        for agent in ("MyBot", "mybot"):
            assert robots_optout(header, (agent,), DIRECTIVES)


@given(st.text(max_size=80))
def test_no_header_breaks_the_parser_or_hides_a_header_of_its_own(text):
    assert robots_optout([text, "noai"], AGENTS, DIRECTIVES)


@given(st.permutations(["nofollow", "max-snippet: 5", "unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT", "noai"]))
def test_the_order_of_directives_does_not_matter(parts):
    assert robots_optout(", ".join(parts), AGENTS, DIRECTIVES) == "x-robots-tag: noai"
    assert robots_optout("otherbot: " + ", ".join(parts), AGENTS, DIRECTIVES) == ""


@pytest.mark.parametrize("value", [1, "1", " 1 ", True, 1.0, {"tdm-reservation": 1}, '[{"tdm-reservation": 1}]'])
def test_reservations(value):
    assert tdm_optout(value) == "tdm-reservation: 1"


@pytest.mark.parametrize("value", [None, 0, "0", "", False, float("nan"), {"tdm-reservation": 0}, "{}", "[", "maybe"])
def test_no_reservation(value):
    assert tdm_optout(value) == ""


@pytest.mark.parametrize(
    ("url", "reserved"),
    [
        ("https://x.org/art/1.jpg", True),
        ("https://x.org/a.png", True),
        ("https://x.org/a.png?b", True),
        ("", True),
        ("https://x.org/blog/1.jpg", False),
        ("https://x.org/a.pngx", False),
    ],
)
def test_a_sites_reservation_holds_for_its_locations(url, reserved):
    rules = [{"location": "/art/", "tdm-reservation": 1}, {"location": "/*.png$", "tdm-reservation": 1}]
    rules.append({"location": "/", "tdm-reservation": 0})
    assert bool(tdm_optout(json.dumps(rules), url)) == reserved


PROHIBITED = "http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:plus="http://ns.useplus.org/ldf/xmp/1.0/"{}</rdf:RDF></x:xmpmeta>'
)
FORMS = {
    "attribute": ' plus:DataMining="{}"/>',
    "element": "><plus:DataMining>{}</plus:DataMining></rdf:Description>",
    "resource": '><plus:DataMining rdf:resource="{}"/></rdf:Description>',
}


def image(kind: str, xmp: bytes = b"", **options: object) -> bytes:
    file = io.BytesIO()
    given = {"xmp": xmp} if kind in ("JPEG", "WEBP") and xmp else {}
    Image.new("RGB", (32, 24), "teal").save(file, kind, **given, **options)
    return file.getvalue()


def png(xmp: bytes, compressed: bool) -> bytes:
    packed = zlib.compress(xmp) if compressed else xmp
    text = b"XML:com.adobe.xmp\0" + bytes([compressed, 0]) + b"\0\0" + packed
    chunk = struct.pack(">L", len(text)) + b"iTXt" + text + struct.pack(">L", zlib.crc32(b"iTXt" + text))
    plain = image("PNG")
    return plain[:33] + chunk + plain[33:]


@pytest.mark.parametrize("form", FORMS)
def test_plus_data_mining_in_xmp(form):
    xmp = XMP.format(FORMS[form].format(PROHIBITED)).encode()
    for data in (image("JPEG", xmp), image("WEBP", xmp), png(xmp, False), png(xmp, True)):
        assert embedded_optout(data) == "plus:DataMining: DMI-PROHIBITED-AIMLTRAINING"
    allowed = XMP.format(FORMS[form].format("http://ns.useplus.org/ldf/vocab/DMI-ALLOWED")).encode()
    for data in (image("JPEG", allowed), png(allowed, True), image("JPEG"), image("PNG")):
        assert embedded_optout(data) == ""


def text(value: str) -> bytes:
    return (bytes([0x60 + len(value)]) if len(value) < 24 else bytes([0x78, len(value)])) + value.encode()


def cbor(value: object) -> bytes:
    """Maps of texts (RFC 8949 §3.1), all that an assertion needs."""
    if isinstance(value, str):
        return text(value)
    assert isinstance(value, dict) and len(value) < 24
    return bytes([0xA0 + len(value)]) + b"".join(cbor(k) + cbor(v) for k, v in value.items())


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", 8 + len(content)) + kind + content


def superbox(label: str, *boxes: bytes) -> bytes:
    return box(b"jumb", box(b"jumd", bytes(16) + b"\3" + label.encode() + b"\0") + b"".join(boxes))


def manifest(label: str, entries: dict[str, dict[str, str]], as_json: bool = False, filler: int = 0) -> bytes:
    value = {"entries": entries}
    content = box(b"json", json.dumps(value).encode()) if as_json else box(b"cbor", cbor(value))
    thumbnail = superbox("c2pa.thumbnail.claim.jpeg", box(b"bidb", bytes(filler)))
    return superbox("c2pa", superbox("c2pa.assertions", thumbnail, superbox(label, content)))


def in_jpeg(jumbf: bytes, room: int = 60000) -> bytes:
    """Cut into APP11 segments, each of which repeats the header of the box."""
    header, rest, segments = jumbf[:8], jumbf[8:], b""
    for number, start in enumerate(range(0, len(rest), room), 1):
        body = b"JP" + struct.pack(">HL", 1, number) + header + rest[start : start + room]
        segments += b"\xff\xeb" + struct.pack(">H", 2 + len(body)) + body
    plain = image("JPEG")
    return plain[:2] + segments + plain[2:]


def in_png(jumbf: bytes) -> bytes:
    chunk = struct.pack(">L", len(jumbf)) + b"caBX" + jumbf + struct.pack(">L", zlib.crc32(b"caBX" + jumbf))
    plain = image("PNG")
    return plain[:33] + chunk + plain[33:]


@pytest.mark.parametrize(
    ("label", "entry", "use", "refused"),
    [
        ("c2pa.training-mining", "c2pa.ai_generative_training", "notAllowed", True),
        ("c2pa.training-mining", "c2pa.ai_training", "notAllowed", True),
        ("cawg.training-mining", "cawg.data_mining", "notAllowed", True),
        ("cawg.training-mining.v2__1", "cawg.ai_training", "constrained", True),
        ("cawg.training-mining", "cawg.ai_training", "allowed", False),
        ("cawg.training-mining", "cawg.ai_inference", "notAllowed", False),  # not what we do
        ("org.example.training", "c2pa.ai_training", "notAllowed", False),
    ],
)
def test_c2pa_assertions(label, entry, use, refused):
    entries = {"c2pa.other": {"use": "allowed"}, entry: {"constraint_info": "ask", "use": use}}
    expected = f"c2pa: {entry}: {use}" if refused else ""
    for as_json in (False, True):
        jumbf = manifest(label, entries, as_json)
        for data in (in_jpeg(jumbf), in_png(jumbf), in_jpeg(jumbf, room=50)):
            assert embedded_optout(data) == expected


def test_a_c2pa_assertion_is_found_where_segments_cut_it():
    entries = {"c2pa.ai_training": {"use": "notAllowed"}}
    for filler in range(59700, 60000, 7):
        jumbf = manifest("c2pa.training-mining", entries, filler=filler)
        assert embedded_optout(in_jpeg(jumbf)) == "c2pa: c2pa.ai_training: notAllowed"


@given(st.data())
def test_damaged_manifests_raise_nothing(data):
    jumbf = manifest("c2pa.training-mining", {"c2pa.ai_training": {"use": "notAllowed"}})
    at = data.draw(st.integers(0, len(jumbf) - 1))
    damaged = bytearray(jumbf)
    damaged[at] = data.draw(st.integers(0, 255))
    assert isinstance(embedded_optout(in_png(bytes(damaged[: data.draw(st.integers(0, len(jumbf)))]))), str)


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("1864", 100),
        ("1bffffffffffffffff", 18446744073709551615),
        ("3863", -100),
        ("f93c00", 1.0),
        ("fa47c35000", 100000.0),
        ("fb3ff199999999999a", 1.1),
        ("f4", False),
        ("f5", True),
        ("f6", None),
        ("c074323031332d30332d32315432303a30343a30305a", "2013-03-21T20:04:00Z"),
        ("4401020304", b"\1\2\3\4"),
        ("62c3bc", "ü"),
        ("8301820203820405", [1, [2, 3], [4, 5]]),
        ("a26161016162820203", {"a": 1, "b": [2, 3]}),
        ("5f42010243030405ff", b"\1\2\3\4\5"),
        ("7f657374726561646d696e67ff", "streaming"),
        ("9f018202039f0405ffff", [1, [2, 3], [4, 5]]),
        ("bf61610161629f0203ffff", {"a": 1, "b": [2, 3]}),
    ],
)
def test_cbor_as_in_rfc_8949_appendix_a(encoded, value):
    assert decode_cbor(bytes.fromhex(encoded)) == value


@given(st.binary(max_size=40))
def test_no_bytes_raise_anything_but_value_error(data):
    with suppress(ValueError, RecursionError):
        decode_cbor(data)
