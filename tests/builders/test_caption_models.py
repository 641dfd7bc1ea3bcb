"""Captioners: real transformers code on tiny random checkpoints, and the protocol of OpenAI-compatible servers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from builders.annotators import captioners
from builders.annotators.caption import PROMPTS, Caption, CaptionParams
from builders.annotators.captioners import HubCaptioner
from builders.base import SourceImage
from filters.models import ModelMissing, content_revision
from schemas.codec import decode_rgb, encode_jpeg
from schemas.identity import uid_of
from schemas.models import ModelParams
from schemas.records import Captions, ImageRecord
from tests.builders.tiny_annotators import save_florence2, save_qwen_vl
from tests.filters.tiny_models import save_dinov2


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen_vl(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_florence2(tmp_path_factory.mktemp("models") / "florence")


@pytest.fixture(scope="module")
def images(photographs: dict[str, np.ndarray]) -> list[SourceImage]:
    return [_image(photographs[name]) for name in ("cat", "coffee", "china")]


def _image(pixels: np.ndarray, **captions: str) -> SourceImage:
    jpeg = encode_jpeg(pixels)
    height, width = pixels.shape[:2]
    record = ImageRecord(uid=uid_of(jpeg), width=width, height=height, captions=Captions(**captions))
    return SourceImage(record, jpeg)


def test_a_chat_model_answers_each_prompt_the_same_alone_or_in_a_batch(qwen: Path, images: list[SourceImage]) -> None:
    caption = Caption(CaptionParams(model=str(qwen), styles=("short", "long", "tags"), max_tokens=12))
    caption.preflight()
    together = caption.annotate(images)
    assert [found.data["captions"].keys() for found in together] == [{"short", "long", "tags"}] * 3
    assert len({found.data["captions"]["short"]["text"] for found in together}) == 3  # it looks at the image
    assert together == [caption.annotate([image])[0] for image in images]


def test_confidence_is_the_mean_log_probability_of_the_greedy_tokens(qwen: Path, images: list[SourceImage]) -> None:
    captioner = HubCaptioner(ModelParams(model=str(qwen)))
    (answer,) = captioner.answer([images[0].pixels], PROMPTS["short"], 8)
    inputs = captioner._inputs([images[0].pixels], PROMPTS["short"])
    with torch.inference_mode():
        sequence = captioner._model.generate(**inputs, max_new_tokens=8, do_sample=False)
        count = sequence.shape[1] - inputs["input_ids"].shape[1]
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, count, dtype=torch.int32)], 1)
        again = inputs | {
            "input_ids": sequence,
            "attention_mask": torch.ones_like(sequence),
            "mm_token_type_ids": kinds,
        }
        logprobs = captioner._model(**again).logits.log_softmax(-1)[0, -count - 1 : -1]
    chosen = logprobs.gather(1, sequence[0, -count:, None])
    assert (answer.tokens, answer.finished) == (8, False)
    assert answer.mean_logprob == pytest.approx(float(chosen.mean()), abs=1e-4)


def test_half_precision_runs_the_same_way(qwen: Path, images: list[SourceImage]) -> None:
    exact, half = (
        HubCaptioner(ModelParams(model=str(qwen), dtype=dtype)).answer([images[0].pixels], PROMPTS["short"], 1)[0]
        for dtype in ("float32", "bfloat16")
    )
    assert half.text == exact.text
    assert 0 < abs(half.mean_logprob - exact.mean_logprob) < 0.1


def test_florence_is_given_its_tasks(florence: Path, images: list[SourceImage]) -> None:
    caption = Caption(CaptionParams(model=str(florence), max_tokens=12))
    caption.preflight()
    found = caption.annotate(images)
    assert [f.data["captions"].keys() for f in found] == [{"short", "long"}] * 3
    assert found == caption.annotate(images)
    with pytest.raises(ModelMissing, match=r"styles: .*Florence-2, which cannot write tags"):
        Caption(CaptionParams(model=str(florence), styles=("tags",))).preflight()


def test_provenance_pins_the_content(qwen: Path) -> None:
    op = Caption(CaptionParams(model=str(qwen))).op()
    assert (op.name, op.model, op.revision) == ("annotate:caption", str(qwen), content_revision(qwen))
    assert op == Caption(CaptionParams(model=str(qwen), device="cpu", batch_size=3)).op()
    assert op != Caption(CaptionParams(model=str(qwen), max_tokens=3)).op()


def test_what_cannot_caption_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"model: .*there is no"):
        Caption(CaptionParams(model=str(tmp_path / "none"))).preflight()
    with pytest.raises(ModelMissing, match=r"tokenizer.json"):
        Caption(CaptionParams(model=str(save_dinov2(tmp_path / "dino")))).preflight()
    (tmp_path / "dino" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelMissing, match="a dinov2 cannot be the captioner"):
        Caption(CaptionParams(model=str(tmp_path / "dino"))).preflight()
    with pytest.raises(ValidationError, match="no base_url is given"):
        CaptionParams(model="qwen3-vl")


class _Server(ThreadingHTTPServer):
    """Speaks the protocol; `replies` are texts or HTTP status codes, `asked` is what came in."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[tuple[str, str] | int] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send(200, {"object": "list", "data": [{"id": "qwen3-vl", "object": "model"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        reply = self.server.replies.pop(0)
        if isinstance(reply, int):
            self._send(reply, {"error": {"message": "no"}})
            return
        text, reason = reply
        tokens = [{"token": word, "logprob": -0.5} for word in text.split()]
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        usage = {"completion_tokens": len(tokens)}
        self._send(200, {"choices": [choice | {"logprobs": {"content": tokens}}], "usage": usage})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(captioners, "_PAUSE_S", 0.0)
    with _Server() as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def _at(server: _Server, **params: Any) -> Caption:
    return Caption(CaptionParams(model="qwen3-vl", base_url=server.url, batch_size=1, **params))


def test_a_server_is_asked_with_the_picture_and_greedily(
    server: _Server, photographs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_KEY", "secret")
    server.replies = [('"A tabby cat looks  up."', "stop"), ("- Cat\n- Whiskers, cat.", "stop")]
    caption = _at(server, styles=("short", "tags"), api_key_env="CAPTION_KEY", max_pixels=4096)
    caption.preflight()
    image = _image(photographs["cat"], alt="IMG_0042 kitty")
    (found,) = caption.annotate([image])
    short = found.data["captions"]["short"]
    assert short == {
        "text": "A tabby cat looks up.",
        "tokens": 5,
        "mean_logprob": -0.5,
        "finished": True,
        "problem": "",
    }
    asked = server.asked[0]
    assert (asked["model"], asked["temperature"], asked["seed"], asked["logprobs"]) == ("qwen3-vl", 0, 0, True)
    picture, prompt = asked["messages"][0]["content"]
    assert prompt["text"] == PROMPTS["short"]
    sent = decode_rgb(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,")))
    assert 0.9 * 4096 < sent.shape[0] * sent.shape[1] <= 4096
    assert server.keys == ["Bearer secret"] * 2
    assert caption.enrich(image.record, found).captions == Captions(
        short="A tabby cat looks up.", alt="IMG_0042 kitty", tags="cat, whiskers"
    )


def test_people_s_captions_stay_and_bad_answers_are_not_used(
    server: _Server, photographs: dict[str, np.ndarray]
) -> None:
    answers = ["I'm sorry, I cannot help with that.", "A cup stands on a table. It is half", "A cup of coffee."]
    server.replies = [(answers[0], "stop"), (answers[1], "length")]
    image = _image(photographs["coffee"], alt="coffee")
    (found,) = _at(server).annotate([image])
    said = found.data["captions"]
    assert said["short"]["problem"] == "refusal"
    assert (said["long"]["text"], said["long"]["finished"]) == ("A cup stands on a table.", False)
    server.replies = [(answers[2], "stop"), (answers[2], "stop")]
    written = _image(photographs["coffee"], short="My cup.")
    (again,) = _at(server).annotate([written])
    assert _at(server).enrich(written.record, again).captions == Captions(short="My cup.", long="A cup of coffee.")


def test_a_busy_server_is_asked_again_and_a_refusal_costs_one_image(
    server: _Server, photographs: dict[str, np.ndarray]
) -> None:
    image = _image(photographs["cat"])
    server.replies = [503, 429, ("A cat is sitting there.", "stop")]
    (found,) = _at(server, styles=("short",)).annotate([image])
    assert found.data["captions"]["short"]["text"] == "A cat is sitting there."
    server.replies = [400]
    with pytest.raises(ValueError, match="refuses: 400"):
        _at(server, styles=("short",)).annotate([image])
    server.replies = [404]
    with pytest.raises(ModelMissing, match=r"base_url: .*404"):  # no other image would fare better
        _at(server, styles=("short",)).annotate([image])


def test_a_server_that_is_not_there_or_has_another_model(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelMissing, match="serves no 'llava'; it has qwen3-vl"):
        Caption(CaptionParams(model="llava", base_url=server.url)).preflight()
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    with pytest.raises(ModelMissing, match=r"api_key_env: .*CAPTION_KEY is not set"):
        _at(server, api_key_env="CAPTION_KEY").preflight()
    with pytest.raises(ModelMissing, match="start the server"):
        Caption(CaptionParams(model="qwen3-vl", base_url="http://127.0.0.1:9/v1")).preflight()
