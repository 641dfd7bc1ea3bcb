"""Edit pairs with models: what an inpainter and an editor add, and what detector, CLIP and judge refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from builders.base import Rejected, Sample
from builders.edit_pairs import EditPairs, EditPairsParams
from builders.edit_pairs.edit import Presence
from builders.edit_pairs.gates import blocks
from builders.edit_pairs.model_gates import (
    CRITERIA,
    Direction,
    DirectionParams,
    Judge,
    JudgeParams,
    Pair,
    Recheck,
    RecheckParams,
    combined_score,
    direction,
    read_scores,
)
from filters.models import ModelMissing
from schemas.codec import decode_raw, decode_rgb
from schemas.identity import generator
from tests.builders.test_edit_pairs import ball_in_the_sky, two_flowers
from tests.builders.tiny_annotators import save_owlv2
from tests.builders.tiny_editors import save_inpainter, save_instruct_pix2pix
from tests.filters.tiny_models import save_clip

TINY = {"steps": 1, "resolution": 64}


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"model": str(save_inpainter(tmp_path_factory.mktemp("models") / "inpainter")), **TINY}


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"model": str(save_instruct_pix2pix(tmp_path_factory.mktemp("models") / "editor")), **TINY}


class Answering(BaseHTTPRequestHandler):
    """A server with one model, `judge`, that always says what `said` holds."""

    said = ""
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "judge"}]})

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._reply({"choices": [{"message": {"content": self.said}, "finish_reason": "stop"}]})

    def _reply(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[tuple[type[Answering], str]]:
    handler = type("Handler", (Answering,), {"asked": []})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def build(name: str, builder: EditPairs, seed: int = 0) -> list[Sample] | Rejected:
    image = two_flowers()
    return builder.build(image, name, generator(seed, f"{image.record.uid}/{name}", builder.name))


def decoded(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    before, after = (decode_rgb(sample.images[name]) for name in ("input_1.jpg", "output.jpg"))
    return before, after, decode_raw(sample.images["edit_mask.png"]) > 0


# --- operations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"), [("replace", "inpainter"), ("material", "editor"), ("restyle_scene", "editor")]
)
def test_an_operation_without_its_model_is_an_error_of_the_recipe(name: str, model: str) -> None:
    with pytest.raises(ValidationError, match=f"operation '{name}' needs a model; add `{model}:"):
        EditPairsParams(operations=[name])


def test_models_are_checked_before_the_start_and_reserve_their_gpus(editor: dict[str, Any]) -> None:
    params = {"editor": editor | {"num_gpus": 0.5}, "inpainter": {"model": "/nowhere", "num_gpus": 0.25}}
    builder = EditPairs(EditPairsParams(**params))
    assert builder.num_gpus == 0.75
    with pytest.raises(ModelMissing, match=r"^inpainter\.model: '/nowhere'"):
        builder.preflight()
    with pytest.raises(ModelMissing, match=r"^gates\.recheck\.model: '/nowhere'"):
        EditPairs(EditPairsParams(editor=editor, gates={"recheck": {"model": "/nowhere"}})).preflight()


def test_replace_changes_the_thing_alone_and_says_by_what_it_was_made(inpainter: dict[str, Any]) -> None:
    builder = EditPairs(
        EditPairsParams(operations=["replace"], inpainter=inpainter, replacements={"f": ["dahlia", "rose"]})
    )
    builder.preflight()
    samples = build("replace", builder)
    assert not isinstance(samples, Rejected)
    forward, inverse = samples
    before, after, mask = decoded(forward)
    changed = blocks((before != after).any(axis=2))
    assert changed.any() and not (changed & ~blocks(mask)).any() and not blocks(mask).all()
    assert "rose" in forward.record.instruction and "dahlia" in forward.record.instruction
    assert inverse.images["output.jpg"] == forward.images["input_1.jpg"] and inverse.record.real_output
    op = forward.record.ops[-1]
    assert op.model == inpainter["model"] and op.revision.startswith("sha256:")
    again = build("replace", EditPairs(builder.params))
    assert not isinstance(again, Rejected) and [s.members for s in again] == [s.members for s in samples]


def test_an_inpainter_is_tried_where_the_surroundings_are_structured(inpainter: dict[str, Any]) -> None:
    without, with_model = (
        build("remove", EditPairs(EditPairsParams(operations=["remove"], inpainter=i))) for i in (None, inpainter)
    )
    assert isinstance(without, Rejected) and without.reason == "structured_surroundings"
    # What a random model makes is found out by the gates, which judge what was made and not whether to try.
    assert isinstance(with_model, Rejected) and with_model.reason == "still_there"
    assert json.loads(with_model.detail)["seam"] > 4


class Sepia:
    """An editor that follows no instruction, but keeps everything in its place."""

    def edit(self, image: np.ndarray, instruction: str, rng: np.random.Generator) -> np.ndarray:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        return np.rint(grey * np.array([0.9, 0.7, 0.4])).astype(np.uint8)


@pytest.mark.parametrize("name", ["material", "surroundings", "restyle_scene"])
def test_editor_operations_keep_what_is_outside_of_their_mask(editor: dict[str, Any], name: str) -> None:
    builder = EditPairs(EditPairsParams(operations=[name], editor=editor))
    builder.editor = Sepia()
    samples = build(name, builder)
    assert not isinstance(samples, Rejected), samples
    (sample,) = samples  # what it was before cannot be told: there is no way back
    before, after, mask = decoded(sample)
    assert not (blocks((before != after).any(axis=2)) & ~blocks(mask)).any()
    assert mask.all() == (name == "restyle_scene") and sample.record.aligned
    assert sample.record.ops[-1].model == editor["model"]


@pytest.mark.parametrize("name", ["material", "surroundings", "restyle_scene"])
def test_an_editor_that_loses_the_picture_is_refused(editor: dict[str, Any], name: str) -> None:
    outcome = build(name, EditPairs(EditPairsParams(operations=[name], editor=editor)))
    assert isinstance(outcome, Rejected) and outcome.reason == "misaligned" and outcome.value > 0.5


# --- gates ---------------------------------------------------------------------------------------------------------


def test_a_thing_is_gone_if_the_detector_finds_it_in_the_source_alone(tmp_path: Path) -> None:
    recheck = Recheck(RecheckParams(model=str(save_owlv2(tmp_path / "owl")), min_score=0.01))
    recheck.preflight()
    source, target = two_flowers().pixels, cv2.resize(ball_in_the_sky().pixels, (420, 350))
    (boxes,) = recheck._grounder.ground([source], [["flower"]], 0.01)
    x0, y0, x1, y1 = (max(0, round(side)) for side in boxes[0].box)
    region = np.zeros(source.shape[:2], bool)
    region[y0:y1, x0:x1] = True

    def check(before: np.ndarray, after: np.ndarray, in_target: bool) -> tuple[str, dict[str, float]]:
        presence = Presence("flower", region, in_target)
        finding = recheck.check(Pair(before, after, region, presences=[presence]))
        return finding.fault, finding.scores

    assert check(source, source, False)[0] == "still_found"
    assert check(source, source, True)[0] == "found_before"
    blank = np.zeros_like(source)
    for after in (target, blank):
        fault, scores = check(source, after, False)
        assert scores["old_found_before"] > 0.5
        assert fault == ("still_found" if scores["old_found_after"] > 0.2 else "")
    corner = np.zeros_like(region)
    corner[:2, :2] = True
    lost = Presence("flower", corner, True)
    assert recheck.check(Pair(source, target, region, presences=[lost])).fault == "not_found"
    assert recheck.check(Pair(source, target, region)).scores == {}


def test_a_grounder_has_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for name in ("model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).touch()
    with pytest.raises(ModelMissing, match="a bert is no detector; use owlvit"):
        Recheck(RecheckParams(model=str(tmp_path))).preflight()


def test_clip_compares_the_change_of_picture_and_caption(tmp_path: Path) -> None:
    model = {"model": str(save_clip(tmp_path / "clip"))}
    source, target = two_flowers().pixels, cv2.resize(ball_in_the_sky().pixels, (420, 350))
    mask = np.ones(source.shape[:2], bool)
    there, back = (("a photo of a cat", "a photo of a cup"), ("a photo of a cup", "a photo of a cat"))

    def check(least: float, captions: tuple[str, str] | None) -> Any:
        gate = Direction(DirectionParams(**model, min=least))
        gate.preflight()
        return gate.check(Pair(source, target, mask, captions=captions))

    value = check(-1, there).scores["clip_direction"]
    assert value != 0 and check(-1, back).scores["clip_direction"] == pytest.approx(-value, abs=1e-3)
    assert check(value + 0.01, there).fault == "wrong_direction_of_change" and not check(value - 0.01, there).fault
    assert check(1, None).fault == ""


def test_direction_is_the_cosine_of_differences() -> None:
    step = np.array([[0, 0, 0], [1, 2, 2]], float)
    assert direction(step, 5 * step + 1) == 1 and direction(step, -step) == -1
    assert direction(step, np.array([[0, 0, 0], [2, 1, -2]], float)) == 0
    assert direction(step, np.ones((2, 3))) == 0


SCORE = st.floats(0, 10)


@given(st.fixed_dictionaries(dict.fromkeys(CRITERIA, SCORE)))
def test_the_worst_aspects_decide(scores: dict[str, float]) -> None:
    combined = combined_score(scores)
    assert min(scores.values()) - 1e-3 <= combined <= max(scores.values()) + 1e-3
    assert combined_score(scores | {"follow": 0.0}) == 0 == combined_score(scores | {"artifacts": 0.0})
    assert read_scores(f"It is {{}} fine.\n{json.dumps(scores)}") == scores


@pytest.mark.parametrize(
    "text",
    ["", "I cannot help with that.", '{"follow": 9}', "[9, 9, 9, 9]",
     '{"follow": 9, "consistency": 9, "naturalness": 9, "artifacts": 11}',
     '{"follow": "good", "consistency": 9, "naturalness": 9, "artifacts": 9}'],
)  # fmt: skip
def test_an_answer_without_all_scores_says_nothing(text: str) -> None:
    assert read_scores(text) is None


def test_a_judge_sees_both_pictures_and_the_request(
    server: tuple[type[Answering], str], inpainter: dict[str, Any]
) -> None:
    handler, url = server
    params = EditPairsParams(
        operations=["replace"],
        inpainter=inpainter,
        replacements={"f": ["dahlia", "rose"]},
        gates={"judge": {"model": "judge", "base_url": url}},
    )
    builder = EditPairs(params)
    builder.preflight()
    handler.said = 'The dahlia is a rose now.\n{"follow": 9, "consistency": 8, "naturalness": 5, "artifacts": 8}'
    samples = build("replace", builder)
    assert not isinstance(samples, Rejected)
    assert json.loads(samples[0].record.scores)["judge"] == pytest.approx(40**0.5, abs=1e-3)
    picture, question = handler.asked[0]["messages"][0]["content"]
    assert "Replace the dahlia with a rose." in question["text"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")

    handler.said = '{"follow": 2, "consistency": 8, "naturalness": 9, "artifacts": 8}'
    refused = build("replace", builder)
    assert isinstance(refused, Rejected) and refused.reason == "judge" and refused.value == 4.0
    kept = json.loads(refused.detail)
    assert kept["judge_follow"] == 2 and kept["said"] == handler.said and kept["l1_inside"] > 0

    handler.said = "I cannot rate pictures."
    unclear = build("replace", builder)
    assert isinstance(unclear, Rejected) and unclear.reason == "judge_unreadable"
    assert json.loads(unclear.detail)["said"] == handler.said


def test_a_judge_that_is_not_served_is_named(server: tuple[type[Answering], str]) -> None:
    with pytest.raises(ModelMissing, match="serves no 'other'; it has judge"):
        Judge(JudgeParams(model="other", base_url=server[1])).preflight()
