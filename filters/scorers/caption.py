"""What a caption says about its own quality: length, language, repetition, refusals, meta-talk and private data.

No model of the image is involved; whether the caption fits the picture is for the image–text scorers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa

from filters.scorers.base import Scorer, ScorerInput, ScorerParams

# Scripts written without spaces count one word per character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+(?:['’-][^\W_]+)*")
_NGRAM = 3
_TASK = r"(?:assist|help|identify|describe|provide|view|see|process|generate|fulfil)"
_REFUSAL = re.compile(
    r"\bi(?:['’]m| am) (?:very |so |really )?sorry\b"
    rf"|\bi(?:['’]m| am) (?:not able|unable) to {_TASK}\b"
    rf"|\bi (?:can(?:no|['’])?t|won['’]t) {_TASK}\b"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model|assistant)\b"
    r"|\bno image (?:was |has been |is )?(?:provided|attached|uploaded)\b"
    r"|\b(?:please|could you) (?:provide|upload|share) (?:an?|the|your) image\b",
    re.IGNORECASE,
)
_PICTURE = r"(?:image|picture|photo|photograph|scene|illustration|drawing|screenshot)"
_META_TALK = re.compile(
    rf"\b(?:the|this|that|provided|given|above) {_PICTURE}(?: itself| here)? "
    r"(?:show|depict|display|portray|capture|feature|present|illustrate|highlight|contain|showcase|include)s?\b"
    rf"|\bin (?:the|this) {_PICTURE}\b"
    rf"|\b(?:here is|this is|here's) (?:an?|the) (?:\w+ )?(?:caption|description|{_PICTURE})\b"
    rf"|\b(?:we|you|one) can see\b|\bcan be seen in (?:the|this) {_PICTURE}\b",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}")
_IPV4 = re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\.?\d)")
# Area 000, 666 and 9xx, group 00 and serial 0000 are never assigned (US Social Security Administration).
_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])")
_CARD = re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
# International with +, North American, or national with a leading 0: nobody writes a year or a count that way.
_PHONE = re.compile(
    r"(?<![\w+.-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,11}"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"
    r"|0\d{2,4}[ /-]\d{3,4}(?:[ -]?\d{2,4}){1,2})(?![\w-]|\.\d)"
)


def words(text: str) -> list[str]:
    """The words of a text, in lower case; of Chinese and Japanese, the characters."""
    return _WORD.findall(text.lower())


def repetition(tokens: Sequence[str]) -> float:
    """Share of 3-grams that occurred before, 0..1: what a captioner stuck in a loop produces.

    With fewer than three words, the share of repeated words. (1 - distinct-3; Li et al., "A Diversity-Promoting
    Objective Function for Neural Conversation Models", NAACL 2016.)
    """
    size = _NGRAM if len(tokens) >= _NGRAM else 1
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def personal_data(text: str) -> Iterator[tuple[str, str]]:
    """(kind, match) of each e-mail address, IPv4 address, US social security number, IBAN, payment card, phone number.

    Cards must pass the Luhn check (ISO/IEC 7812-1, annex B) and IBANs the MOD 97-10 check (ISO 13616, ISO/IEC 7064).
    Names and street addresses are not looked for. What one kind has taken is not counted as another.
    """
    kinds = {"email": _EMAIL, "ipv4": _IPV4, "ssn": _SSN, "iban": _IBAN, "card": _CARD, "phone": _PHONE}
    checks = {"iban": _is_iban, "card": _passes_luhn}
    for kind, pattern in kinds.items():
        found = [m[0] for m in pattern.finditer(text) if checks.get(kind, bool)(m[0])]
        for match in found:
            text = text.replace(match, "\n", 1)
            yield kind, match


def _passes_luhn(text: str) -> bool:
    digits = [int(c) for c in text if c.isdigit()][::-1]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[1::2]]
    return any(digits) and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    compact = text.replace(" ", "")
    moved = compact[4:] + compact[:4]
    return int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


class Caption(Scorer):
    """Columns about `Captions.best()`, null where there is none.

    * `caption_words`, `caption_chars`: length (DataComp's basic filter asks for more than 2 words and 5 characters).
    * `caption_language`, `caption_language_score`: ISO 639-1 code and its probability, by py3langid over all the
      languages that it knows. Unreliable for a handful of words.
    * `caption_repetition`: see `repetition`.
    * `caption_refusal`, `caption_meta_talk`: 1 where a captioner refused ("I'm sorry, but I can't …"), or talks about
      the picture instead of what is in it ("The image shows …"); else 0. English only.
    * `caption_pii`: number of matches of `personal_data`.
    """

    name: ClassVar[str] = "caption"
    version: ClassVar[str] = "1"
    Params: ClassVar[type[ScorerParams]] = ScorerParams

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {
            "caption_words": pa.int32(),
            "caption_chars": pa.int32(),
            "caption_language": pa.string(),
            "caption_language_score": pa.float32(),
            "caption_repetition": pa.float32(),
            "caption_refusal": pa.float32(),
            "caption_meta_talk": pa.float32(),
            "caption_pii": pa.int32(),
        }

    @property
    def batch_size(self) -> int:
        return 64

    @cached_property
    def _identifier(self) -> Any:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def score(self, items: Sequence[ScorerInput]) -> list[dict[str, Any]]:
        return [self._score(item.captions.best().strip()) for item in items]

    def _score(self, text: str) -> dict[str, Any]:
        if not text:
            return dict.fromkeys(self.columns)
        tokens = words(text)
        language, probability = self._identifier.classify(text)
        return {
            "caption_words": len(tokens),
            "caption_chars": len(text),
            "caption_language": language,
            "caption_language_score": probability,
            "caption_repetition": repetition(tokens),
            "caption_refusal": float(bool(_REFUSAL.search(text))),
            "caption_meta_talk": float(bool(_META_TALK.search(text))),
            "caption_pii": sum(1 for _ in personal_data(text)),
        }
