"""The report says what is in the corpus, runs nothing that comes from it, and can be used with mouse and keys."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.corpus import Shard, iter_index, read_index, summary
from pipelines.funnel import funnel
from pipelines.publish import publish
from pipelines.report import facts, render_report
from pipelines.report.gallery import Gallery
from pipelines.storage import Folder
from schemas.vocabulary import STREAMS
from tests.corpora import STREAM_NAMES, make_corpus

if TYPE_CHECKING:
    from tests.browsing import Browser

HOSTILE = (
    "\"'></script><script>document.title='broken in'</script><img src=x onerror=\"document.title='broken in'\">{{7*7}}"
)
_FREE_TEXTS = ("instruction", "author", "license", "source_url", "template_id")


@pytest.fixture(scope="module")
def corpus(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The small corpus; one sample of it says hostile things wherever a source may put text."""
    root = tmp_path_factory.mktemp("report") / "corpus"
    shutil.copytree(corpus_path, root, ignore=shutil.ignore_patterns("work"))
    folder, shard = Folder(str(root)), Shard("restore", 0)
    index = read_index(folder, shard)
    first, *others = index.to_pylist()
    first |= dict.fromkeys(_FREE_TEXTS, HOSTILE) | {"instruction_variants": [HOSTILE]}
    first["captions"] = dict.fromkeys(first["captions"], HOSTILE)
    first["ops"][0] |= {"params": json.dumps({"input": HOSTILE}), "model": HOSTILE, "revision": HOSTILE}
    folder.write_table(shard.sample_index, pa.Table.from_pylist([first, *others], index.schema))
    return folder


@pytest.fixture(scope="module")
def page(corpus: Folder) -> str:
    return render_report(corpus, per_subtask=3)


class Document(HTMLParser):
    """What a page consists of: elements with their attributes, and the text of some of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._open = tag
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.texts:
            self.texts[self._open][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_no_text_of_the_corpus_becomes_part_of_the_page(page: str) -> None:
    document = Document(page)
    pictures, script = document.texts["script"]
    assert HOSTILE not in page and page.count("broken in") >= 5
    assert [s.get("type") for s in document.all("script")] == ["application/json", None]
    assert set(json.loads(pictures)) >= {i["data-picture"] for i in document.all("img")}
    for tag, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert not (attributes.keys() & {"src", "srcset", "action", "data"}), tag
        assert (attributes.get("href") or "#").startswith("#")
    (policy,) = (m["content"] for m in document.all("meta") if "http-equiv" in m)
    for kind, text in (("script", script), ("style", document.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy


def test_every_picture_and_control_has_a_name(page: str) -> None:
    document = Document(page)
    assert all(image["alt"] for image in document.all("img"))
    assert all(svg["aria-label"] for svg in document.all("svg"))
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert document.all("html") == [{"lang": "en"}]


def test_pictures_are_small_and_of_the_right_shape(page: str) -> None:
    document = Document(page)
    pictures = json.loads(document.texts["script"][0])
    for image in document.all("img"):
        uri = pictures[image["data-picture"]]
        assert uri.startswith("data:image/webp;base64,")
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            assert max(picture.size) <= 384
            if "width" in image:
                wanted = int(image["width"] or 0) / int(image["height"] or 1)
                assert picture.width / picture.height == pytest.approx(wanted, rel=0.02)


def test_the_gallery_has_some_of_every_subtask_and_no_more(page: str, corpus: Folder) -> None:
    kinds = Counter(re.findall(r'<article class="card"[^>]* aria-label="([^"]+)"', page))
    expected = {
        f"{name}, {subtask}": min(3, counts["samples"])
        for name, stream in summary(corpus)["streams"].items()
        for subtask, counts in stream["subtasks"].items()
    }
    assert kinds == expected
    assert f"{summary(corpus)['samples']:,} samples" in page
    for step in funnel(corpus):
        assert f'<th scope="row">{step.name}</th><td>{step.rule}</td><td class="number">{step.entered}</td>' in page


def test_a_card_shows_what_a_sample_of_any_stream_consists_of(tmp_path: Path) -> None:
    gallery = Gallery(make_corpus(tmp_path), per_subtask=2, seed=0)
    assert len(gallery.cards) == 2 * len(STREAM_NAMES)
    for card in gallery.cards:
        stream = STREAMS[card.record["stream"]]
        assert [picture.label for picture in card.inputs] == [
            f"{i} · {role}" for i, role in enumerate(card.record["input_roles"], 1)
        ]
        assert bool(card.mask) == bool(card.weights) == stream.edit_mask
        shown = {*(picture.id for picture in card.inputs), card.output.id}
        assert len(shown) == len(stream.inputs) + 1 and shown <= gallery.pictures.keys()
        assert json.loads(card.json)["key"] == card.record["key"]
    edits = [card for card in gallery.cards if card.record["stream"] == "edit"]
    assert {card.numbers["clip"] for card in edits} == {0.5}


def test_the_same_corpus_gives_the_same_page_and_another_seed_another(corpus: Folder, page: str) -> None:
    def keys(html: str) -> list[str]:
        return re.findall(r"<dt>key</dt><dd><code>([^<]+)", html)

    assert render_report(corpus, per_subtask=3) == page
    another = keys(render_report(corpus, per_subtask=1, seed=1))
    assert len({*another}) == len(another) and another != keys(page)[::3]


def test_distributions_count_every_sample_once(corpus: Folder) -> None:
    found = {d.name: d for d in facts.contents(corpus).distributions if not d.is_score}
    samples = {name: stream["samples"] for name, stream in summary(corpus)["streams"].items()}
    assert found["output size"].samples == found["instruction length"].samples == samples
    rows = [r for t in iter_index(corpus, ["restore"], ["severity", "members"]) for r in t.to_pylist()]
    severities = sorted(r["severity"] for r in rows if r["severity"] >= 0)
    severity = found["severity"]
    assert severity.samples == {"restore": len(severities)}
    assert severity.medians["restore"] == pytest.approx(severities[(len(severities) - 1) // 2], rel=0.01)
    assert severity.edges[0] == pytest.approx(severities[0], rel=0.01)
    assert severity.edges[-1] == pytest.approx(severities[-1], rel=0.01)


def test_yields_account_for_every_attempt_of_the_ledger(corpus: Folder) -> None:
    (builders,) = facts.yields(corpus).values()
    account = facts.accounts(corpus)["build"]
    assert sum(b.attempts for b in builders) == account["inputs"]
    assert sum(b.kept for b in builders) == account["kept"]
    assert sum(b.reasons.total() for b in builders) == account["dropped"]
    assert sum(b.samples for b in builders) == summary(corpus)["samples"]
    for builder in builders:
        assert sum(part.attempts for part in builder.parts.values()) == builder.attempts


def test_mixture_shares_what_is_missing_among_the_rest() -> None:
    shares = {s.name: s for s in facts.mixture({"text_to_image": 10, "edit": 60, "restore": 20, "subject_1": 10})}
    assert {name: s.present for name, s in shares.items()} == pytest.approx(
        {"text_to_image": 0.1, "subject": 0.1, "control": 0, "edit": 0.6, "other": 0.2}
    )
    assert sum(s.requested for s in shares.values()) == pytest.approx(1)
    assert sum(s.drawn for s in shares.values()) == pytest.approx(1)
    assert shares["text_to_image"].drawn == pytest.approx(0.5 / 0.9)
    assert shares["text_to_image"].repeats == pytest.approx(0.5 / 0.9 / 0.1)
    assert shares["control"].samples == shares["control"].repeats == 0


def test_the_command_writes_into_the_corpus_and_a_changed_corpus_loses_the_report(corpus: Folder) -> None:
    def x2i(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["report", corpus.url, "--per-subtask", "1", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert "report.html" in x2i()
    assert corpus.read_bytes("report.html").startswith(b"<!doctype html>")
    manifest = corpus.read_json("manifest.json")
    recipe = corpus.read_bytes("recipe.yaml").decode()
    publish(corpus, manifest["name"], recipe, manifest["versions"])
    assert corpus.exists("report.html")
    publish(corpus, "another name", recipe, manifest["versions"])
    assert not corpus.exists("report.html")
    publish(corpus, manifest["name"], recipe, manifest["versions"])


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browsing = pytest.importorskip(
        "tests.browsing", reason="Chromium of PySide6-WebEngine needs system libraries", exc_type=ImportError
    )
    browser = browsing.Browser()
    yield browser
    browser.close()


@pytest.fixture
def opened(browser: Browser, page: str, tmp_path: Path) -> Iterator[Browser]:
    """The page, freshly loaded; it must not have complained about anything when the test is over."""
    path = tmp_path / "report.html"
    path.write_text(page)
    browser.open(path)
    yield browser
    assert browser.console == []
    assert browser.run("document.title") == "small · x2i corpus"


def visible(browser: Browser) -> list[list[Any]]:
    return browser.run(
        "[...document.querySelectorAll('.card:not([hidden])')].map(c => [c.dataset.stream, c.dataset.split])"
    )


def focused(browser: Browser) -> int:
    return browser.run("[...document.querySelectorAll('.card:not([hidden])')].indexOf(document.activeElement)")


def test_hostile_text_is_shown_as_text(opened: Browser) -> None:
    said = opened.run("[...document.querySelectorAll('.card .instruction')].map(e => e.textContent)")
    assert HOSTILE in said
    assert opened.run("document.querySelectorAll('.card img:not([data-picture])').length") == 0


def test_all_pictures_load(opened: Browser) -> None:
    opened.wait_until("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_filters_by_stream_split_number_and_text(opened: Browser) -> None:
    everything = visible(opened)
    opened.run("(stream.value = 'restore', stream.dispatchEvent(new Event('input', {bubbles: true})))")
    shown = visible(opened)
    assert shown == [card for card in everything if card[0] == "restore"]
    assert opened.run("document.getElementById('shown').textContent") == f"{len(shown)} of {len(everything)}"

    opened.run("(number.value = 'severity', low.value = 0.5, low.dispatchEvent(new Event('input', {bubbles: true})))")
    severities = opened.run(
        "[...document.querySelectorAll('.card')].filter(c => c.dataset.stream === 'restore')"
        ".map(c => JSON.parse(c.dataset.numbers).severity)"
    )
    assert 0 < len(visible(opened)) == sum(s is not None and s >= 0.5 for s in severities) < len(shown)

    opened.press("/")
    for letter in "nothing is like that":
        opened.press(letter)
    opened.wait_until("!document.getElementById('nothing').hidden")
    assert visible(opened) == []
    opened.click("#reset")
    opened.wait_until("document.getElementById('nothing').hidden")
    assert visible(opened) == everything


def test_a_sample_opens_large_and_the_keys_go_through_all(opened: Browser) -> None:
    opened.click(".card:nth-child(2) .output")
    opened.wait_until("document.getElementById('sample').open")
    assert opened.run("position.textContent").startswith("2 of ")
    shown = opened.run("document.querySelector('#large .instruction').textContent")
    assert shown == opened.run("document.querySelector('.card:nth-child(2) .instruction').textContent")
    assert '"stream":' in opened.run("document.querySelector('#large pre').textContent")
    opened.press("Right")
    opened.wait_until("position.textContent.startsWith('3 of ')")
    opened.press("k")
    opened.wait_until("position.textContent.startsWith('2 of ')")
    opened.press("Escape")
    opened.wait_until("!document.getElementById('sample').open")
    assert focused(opened) == 1


def test_the_keyboard_alone_is_enough(opened: Browser) -> None:
    opened.press("j")
    opened.press("j")
    opened.wait_until("document.activeElement.matches('.card:nth-child(2)')")
    assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.press("Down")
    opened.wait_until("document.activeElement.matches('.card:nth-child(n + 3)')")
    column = "document.activeElement.getBoundingClientRect().left"
    assert opened.run(f"{column} === document.querySelector('.card:nth-child(2)').getBoundingClientRect().left")
    opened.press("Enter")
    opened.wait_until("document.getElementById('sample').open")
    opened.press("Escape")
    opened.press("?")
    opened.wait_until("document.getElementById('help').open")
    opened.press("j")
    opened.press("Escape")
    opened.wait_until("!document.getElementById('help').open")
    opened.press("/")
    opened.wait_until("document.activeElement.id === 'search'")
    opened.press("m")
    opened.wait_until("search.value === 'm'")
    assert opened.run("mask.ariaPressed") == "false"


def test_overlays_and_theme_switch(opened: Browser) -> None:
    def shown(overlay: str) -> bool:
        return opened.run(f"getComputedStyle(document.querySelector('.overlay.{overlay}')).display") != "none"

    assert not shown("mask") and not shown("weights")
    opened.click("#mask")
    opened.wait_until("mask.ariaPressed === 'true'")
    assert shown("mask") and not shown("weights")
    opened.press("w")
    opened.press("m")
    opened.wait_until("mask.ariaPressed === 'false'")
    assert shown("weights") and not shown("mask")

    paper = "getComputedStyle(document.body).backgroundColor"
    before = opened.run(paper)
    opened.click("#theme")
    opened.wait_until(f"{paper} !== {before!r}")
    opened.press("t")
    opened.wait_until(f"{paper} === {before!r}")


def test_tables_unfold_and_nothing_is_wider_than_a_phone(opened: Browser) -> None:
    assert opened.run("document.querySelectorAll('.part:not([hidden])').length") == 0
    opened.click(".fold")
    opened.wait_until("document.querySelectorAll('.part:not([hidden])').length > 0")
    assert opened.run("document.querySelector('.fold').ariaExpanded") == "true"
    opened.resize(360, 740)
    opened.wait_until("innerWidth === 360")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    opened.resize(1100, 900)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(opened: Browser, theme: str) -> None:
    """4.5:1, WCAG 2.1 level AA."""
    opened.run(f"document.documentElement.dataset.theme = '{theme}'")
    colours = opened.run(
        "['--paper', '--ink', '--soft', '--accent'].map(name => { document.body.style.color = `var(${name})`;"
        "return getComputedStyle(document.body).color.match(/[0-9]+/g).map(Number) })"
    )
    paper, *inks = (luminance(colour) for colour in colours)
    for ink in inks:
        high, low = max(paper, ink), min(paper, ink)
        assert (high + 0.05) / (low + 0.05) >= 4.5


def luminance(colour: list[float]) -> float:
    """Relative luminance of sRGB, WCAG 2.1."""
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour))
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
