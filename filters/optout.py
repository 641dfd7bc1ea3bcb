"""Opt-outs: what a server or a file says about the use of an image for training.

A reason is a short text such as `x-robots-tag: noai`, "" if there is none. An opt-out counts wherever it is found and
whether or not it is signed; that none is found proves nothing, because most hosts strip metadata.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import urlsplit

from filters.c2pa import training_mining
from schemas.containers import PNG_SIGNATURE, png_chunks

# Google, "Robots meta tag, data-nosnippet, and X-Robots-Tag specifications"; noai and noimageai are DeviantArt's.
_RULES = {"all", "none", "noindex", "nofollow", "noarchive", "nocache", "nosnippet", "noimageindex", "notranslate"} | {
    *("indexifembedded", "noodp", "noydir", "noai", "noimageai"),
    *("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"),
}
# http://ns.useplus.org/ldf/vocab/: DMI-PROHIBITED, DMI-PROHIBITED-AIMLTRAINING, …-SEECONSTRAINT and so on. The
# exception for search engines prohibits training as well.
_PLUS = re.compile(rb"DataMining\b[^<]{0,40}?[>\"'](?:https?://ns\.useplus\.org/ldf/vocab/)?(DMI-PROHIBITED[A-Z-]*)")
_XMP_BYTES = 16 << 20
_TRAINING = ("data_mining", "ai_training", "ai_generative_training")
_REFUSED = ("notAllowed", "constrained")


def robots_optout(headers: Any, user_agents: Collection[str], directives: Collection[str]) -> str:
    """The first directive of `X-Robots-Tag` headers that refuses the use.

    A header is `[user-agent:] directive, directive, …`; servers may join several into one, and a user agent then
    holds up to the next one. Letter case does not matter. `unavailable_after` is not looked at: it depends on the day.

    Args:
        headers: value of one header, or of several: a list, or text with a line (optionally with the header's name)
            each. None for none.
        user_agents: product tokens whose rules concern us, beside `*` and rules for everybody.
        directives: those that refuse; `none` stands for `noindex`.
    """
    refusing = {directive.lower() for directive in directives}
    refusing |= {"none"} if "noindex" in refusing else set()
    agents = {agent.lower() for agent in user_agents} | {"*"}
    for header in _lines(headers):
        for directive in _directives(header, agents, _RULES | refusing):
            if directive in refusing:
                return f"x-robots-tag: {directive}"
    return ""


def _lines(headers: Any) -> Iterator[str]:
    values = headers if isinstance(headers, (list, tuple)) else [headers]
    for value in values:
        for line in str(value if value is not None else "").lower().splitlines():
            yield line.strip().removeprefix("x-robots-tag:")


def _directives(header: str, agents: Collection[str], known: Collection[str]) -> Iterator[str]:
    """Names of the directives that hold for one of the agents.

    A colon stands after a user agent, inside a date, or after a directive that takes a value. It follows a user agent
    exactly if what comes next is a directive; so a directive that nobody knows yet cannot hide those behind it.
    """
    concerned = True
    for part in header.split(","):
        name, _, rest = part.partition(":")
        if name.strip() not in known and _first_word(rest) in known:
            concerned = name.strip().partition("/")[0] in agents
            name = rest.partition(":")[0]
        if concerned:
            yield from name.split()


def _first_word(text: str) -> str:
    return next(iter(re.findall(r"[^\s:]+", text)), "")


def tdm_optout(value: Any, url: str = "") -> str:
    """A reservation of text and data mining (W3C TDMRep): the header `tdm-reservation: 1`, or a site's `tdmrep.json`.

    Args:
        value: the header's value, or the JSON as text or parsed: an object, or a list of objects with a `location`.
        url: of the image. Rules for other locations do not count; where several match, one that reserves is enough.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ""
    rules = value if isinstance(value, list) else [value]
    return "tdm-reservation: 1" if any(_reserves(rule, url) for rule in rules) else ""


def _reserves(rule: Any, url: str) -> bool:
    if isinstance(rule, dict):
        if url and not _is_at(str(rule.get("location", "/")), urlsplit(url).path or "/"):
            return False
        rule = rule.get("tdm-reservation")
    return str(rule).strip().lower() in ("1", "1.0", "true")


def _is_at(location: str, path: str) -> bool:
    """Whether a path matches a location: a prefix with `*` for any text, and `$` for the end (as in robots.txt)."""
    pattern = re.escape(location.removesuffix("$")).replace(r"\*", ".*")
    return bool(re.match(pattern + ("$" if location.endswith("$") else ""), path))


def embedded_optout(data: bytes) -> str:
    """What an image file says about itself: IPTC/PLUS Data Mining in its XMP, or a C2PA training-mining assertion.

    Read from JPEG, PNG, WebP and TIFF; of a GIF, XMP only.

    Args:
        data: the file.
    """
    for xmp in (data, *_compressed_text(data)):
        if match := _PLUS.search(xmp):
            return f"plus:DataMining: {match[1].decode()}"
    for name, use in training_mining(data):
        if name.rpartition(".")[2] in _TRAINING and use in _REFUSED:
            return f"c2pa: {name}: {use}"
    return ""


def _compressed_text(data: bytes) -> Iterator[bytes]:
    """The compressed international texts of a PNG, where XMP may be (PNG §11.3.3.4)."""
    if not data.startswith(PNG_SIGNATURE):
        return
    for kind, start, end in png_chunks(data):
        keyword, _, rest = data[start + 8 : end - 4].partition(b"\0")
        if kind == b"iTXt" and keyword == b"XML:com.adobe.xmp" and rest.startswith(b"\1\0"):
            packed = rest[2:].split(b"\0", 2)[-1]
            try:
                yield zlib.decompressobj().decompress(packed, _XMP_BYTES)
            except zlib.error:
                continue
