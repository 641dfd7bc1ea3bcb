"""Vision-language models that answer a prompt about an image: in this process, or behind an OpenAI-compatible server.

Decoding is greedy everywhere. Beside each answer stands the mean log-probability of its tokens, because a captioner's
confidence tells hallucinated captions from good ones (arXiv:2412.19531).
"""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from builders.annotators.hub import TOKENIZER, as_pictures, auto_processor, check_architecture
from filters.models import (
    CONFIG,
    PREPROCESSOR,
    WEIGHTS,
    Checkpoint,
    ModelMissing,
    dtype_of,
    inference,
    load_pretrained,
    rounded,
)
from schemas.codec import encode_jpeg
from schemas.models import ModelParams, VisionLanguageParams
from schemas.records import UNKNOWN

if TYPE_CHECKING:
    import torch

_TRIES, _PAUSE_S = 4, 2.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_UNUSABLE = frozenset({401, 403, 404})  # wrong key, or no such model: no other image will fare better


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without special tokens.
        tokens: how many it has, with the one that ends it.
        mean_logprob: natural logarithm, mean over the tokens; -1 if the server does not tell.
        finished: False if it was cut off at the limit of tokens.
    """

    text: str
    tokens: int
    mean_logprob: float
    finished: bool


class Captioner(Protocol):
    """A model that writes about images."""

    def answer(self, images: Sequence[np.ndarray], prompt: str, max_tokens: int) -> list[Answer]:
        """One answer per uint8 RGB [H, W, 3] image, in order."""
        ...


class HubCaptioner:
    """A transformers model. One with a chat template is asked in a chat; Florence-2 is given its task token."""

    def __init__(self, params: ModelParams) -> None:
        self.params = params

    @cached_property
    def _processor(self) -> Any:
        processor = auto_processor(self.params)
        processor.tokenizer.padding_side = "left"  # what is generated continues the last token
        return processor

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForImageTextToText

        weights = str(dtype_of(self.params)).removeprefix("torch.")
        return load_pretrained(AutoModelForImageTextToText, self.params, weights=weights)

    def answer(self, images: Sequence[np.ndarray], prompt: str, max_tokens: int) -> list[Answer]:
        """See `Captioner`."""
        confidence = _Confidence()
        with inference(self.params) as device:
            inputs = self._inputs(images, prompt).to(device, dtype_of(self.params))
            sequences = self._model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                logits_processor=[confidence],
                # Greedy, whatever the checkpoint's own generation settings say.
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        written = sequences[:, -len(confidence.chosen) :].cpu()
        return [self._answer(*row, max_tokens) for row in zip(written, confidence.by_image, strict=True)]

    def _inputs(self, images: Sequence[np.ndarray], prompt: str) -> Any:
        pictures = as_pictures(images)
        if not self._processor.chat_template:
            return self._processor(images=pictures, text=[prompt] * len(pictures), padding=True, return_tensors="pt")
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
            for picture in pictures
        ]
        return self._processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def _answer(self, tokens: torch.Tensor, logprobs: torch.Tensor, max_tokens: int) -> Answer:
        ends = np.flatnonzero(np.isin(tokens.numpy(), self._end_tokens))
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        text = self._processor.tokenizer.decode(tokens[:length], skip_special_tokens=True)
        finished = bool(len(ends)) and length < max_tokens  # some models are made to end at the limit
        return Answer(text, length, rounded(logprobs[:length].mean().item()), finished)

    @cached_property
    def _end_tokens(self) -> list[int]:
        ends = self._model.generation_config.eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]


class _Confidence:
    """A logits processor that changes nothing and notes how likely each greedy choice was.

    Keeping the scores of all steps (`output_scores`) instead would cost gigabytes: a vocabulary per token and image.
    """

    def __init__(self) -> None:
        self.chosen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.chosen.append(scores.float().log_softmax(-1).amax(-1).cpu())
        return scores

    @property
    def by_image(self) -> torch.Tensor:
        """float32 [n, steps]."""
        import torch

        return torch.stack(self.chosen, 1)


class ServerCaptioner:
    """Any server that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, ...). Requests run side by side.

    Args:
        base_url: up to and with `/v1`.
        model: as the server calls it.
        key: sent as bearer token, unless empty.
        timeout_s: of one request.
        parallel: requests at a time.
    """

    def __init__(self, base_url: str, model: str, key: str, timeout_s: float, parallel: int) -> None:
        self.base_url, self.model, self.timeout_s, self.parallel = base_url.rstrip("/"), model, timeout_s, parallel
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def check(self) -> None:
        """Ask the server for its models.

        Raises:
            ModelMissing: it does not answer, or has no such model.
        """
        models = [str(model.get("id")) for model in self._call("/models").get("data", [])]
        if self.model not in models:
            raise ModelMissing("model", f"{self.base_url} serves no {self.model!r}; it has {', '.join(models)}")

    def answer(self, images: Sequence[np.ndarray], prompt: str, max_tokens: int) -> list[Answer]:
        """See `Captioner`."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda pixels: self._answer(pixels, prompt, max_tokens), images))

    def _answer(self, pixels: np.ndarray, prompt: str, max_tokens: int) -> Answer:
        picture = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(pixels)).decode()}"
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt}]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 0,
            "logprobs": True,
        }
        reply = self._call("/chat/completions", request)
        choice = reply["choices"][0]
        logprobs = [token["logprob"] for token in (choice.get("logprobs") or {}).get("content") or ()]
        tokens = int((reply.get("usage") or {}).get("completion_tokens", len(logprobs)))
        confidence = rounded(np.mean(logprobs)) if logprobs else UNKNOWN
        return Answer(choice["message"]["content"] or "", tokens, confidence, choice.get("finish_reason") == "stop")

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's reply.

        Raises:
            ModelMissing: the server cannot be used at all.
            ValueError: it refuses this request (an image that it cannot read, say).
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, self._headers)
        problem = ""
        for attempt in range(_TRIES):
            time.sleep(_PAUSE_S * attempt)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                    return dict(json.load(reply))
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read(500).decode(errors='replace').strip()}"
                if error.code not in _BUSY | _UNUSABLE:
                    raise ValueError(f"{self.base_url}{path} refuses: {problem}") from error
                if error.code in _UNUSABLE:
                    break
            except OSError as error:  # no connection, or no answer in time
                problem = str(error)
        raise ModelMissing(
            "base_url", f"{self.base_url}{path} does not answer ({problem}); start the server and run again"
        )


def open_captioner(params: VisionLanguageParams) -> Captioner:
    """The model that a recipe section names; a model in this process loads on first use."""
    return _server(params) if params.base_url else HubCaptioner(params)


def check_captioner(params: VisionLanguageParams, parameter: str = "model") -> None:
    """Check, without loading weights, that the model can be asked.

    Args:
        params: of the recipe section.
        parameter: key that names the model, for messages.

    Raises:
        ModelMissing: it is absent, incomplete or made for something else, or its server does not answer.
    """
    if params.base_url:
        _server(params).check()
        return
    checkpoint = Checkpoint(params, parameter)
    checkpoint.check(CONFIG, WEIGHTS, TOKENIZER, PREPROCESSOR)
    if not params.trust_remote_code:
        check_architecture(checkpoint, "captioner", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


def _server(params: VisionLanguageParams) -> ServerCaptioner:
    key = api_key(params.api_key_env)
    return ServerCaptioner(params.base_url, params.model, key, params.timeout_s, params.batch_size)


def api_key(variable: str) -> str:
    """The value of an environment variable, "" if no name is given.

    Raises:
        ModelMissing: it is not set.
    """
    if variable and not os.environ.get(variable):
        raise ModelMissing("api_key_env", f"the environment variable {variable} is not set")
    return os.environ[variable] if variable else ""
