"""Poses: OpenPose and ViTPose with random weights, and skeletons of known keypoints."""

import json

import numpy as np
import pytest
import skimage.data
import torch
from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation, VitPoseImageProcessor

from builders.annotators.annotator import Artefact
from builders.annotators.pose import KEYPOINTS, PoseEstimator, is_person
from builders.annotators.stored import Pose
from builders.base import Rejected, SourceImage
from schemas.codec import encode_jpeg
from schemas.identity import uid_of
from schemas.records import Entity, ImageRecord
from tests.builders import map_models

RNG = np.random.default_rng
ASTRONAUT = np.ascontiguousarray(skimage.data.astronaut()[:201, 100:361])


def source(pixels, entities=(), **fields):
    jpeg = encode_jpeg(pixels)
    size = {"width": pixels.shape[1], "height": pixels.shape[0]}
    return SourceImage(ImageRecord(uid=uid_of(jpeg), entities=entities, **size), jpeg, **fields)


def with_people(*people, size=(256, 320)):
    artefact = Artefact({"people": [{"keypoints": person} for person in people]})
    return source(np.zeros((*size, 3), np.uint8), artefacts={"pose": artefact})


def standing(x=160.0, score=0.9):
    offsets = (
        *((0, 40), (0, 70), (-25, 70), (-35, 110), (-40, 145), (25, 70), (35, 110), (40, 145)),
        *((-15, 145), (-17, 190), (-18, 235), (15, 145), (17, 190), (18, 235)),
        *((-6, 34), (6, 34), (-14, 38), (14, 38)),
    )
    return [[x + dx, float(y), score] for dx, y in offsets]


def test_openpose_runs_from_a_directory(tmp_path):
    """Random heat maps have many peaks, now and then enough of them in a row for a person."""
    folder = map_models.save_openpose(tmp_path)
    made = PoseEstimator(PoseEstimator.Params(model=str(folder), resolution=64, device="cpu"))
    made.preflight()
    strips = [source(np.ascontiguousarray(ASTRONAUT[:, x : x + 140])) for x in (0, 70, 160, 250)]
    found = made.annotate(strips)
    assert found[1:2] == made.annotate(strips[1:2])
    assert json.loads(json.dumps(found[0].data)) == found[0].data
    people = [person for strip in found for person in strip.data["people"]]
    assert people
    for person in people:
        x, y, score = np.array(person["keypoints"]).T
        assert len(x) == len(KEYPOINTS)
        assert (x >= 0).all() and (x < 140).all() and (y >= 0).all() and (y < 201).all()
        assert set(x[score == 0]) | set(y[score == 0]) <= {0.0}


def save_vitpose(folder):
    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=[64, 48], out_features=["stage2"]
    )
    model = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17, scale_factor=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(folder)
    return folder


def test_vitpose_looks_into_the_boxes_of_people(tmp_path):
    made = PoseEstimator(PoseEstimator.Params(model=str(save_vitpose(tmp_path)), detector="vitpose", device="cpu"))
    made.preflight()
    woman = Entity(phrase="a smiling woman", box=(60, 10, 200, 190))
    flag = Entity(phrase="a flag", label="flag", box=(0, 0, 60, 190))
    found, nobody = made.annotate([source(ASTRONAUT, (woman, flag)), source(ASTRONAUT, (flag,))])
    assert nobody.data["people"] == []
    (person,) = found.data["people"]
    points = np.array(person["keypoints"])
    assert points.shape == (18, 3)
    # the box of 140 x 180 stretched to 3:4 and by a quarter (the processor's way)
    assert (points[:, 0] > 30).all() and (points[:, 0] < 230).all()
    np.testing.assert_allclose(points[1, :2], (points[2, :2] + points[5, :2]) / 2, atol=0.02)


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("person", True),
        ("a smiling woman", True),
        ("The Man.", True),
        ("snowman", False),
        ("a man's hat", False),
        ("", False),
    ],
)
def test_people_are_known_by_their_last_word(name, yes):
    assert is_person(name) is yes


def test_skeletons_are_those_of_controlnet_aux():
    """At 512 pixels our drawing is what ControlNets were trained on."""
    from controlnet_aux.open_pose.body import Keypoint
    from controlnet_aux.open_pose.util import draw_bodypose

    person = [[2 * x, 2 * y, s] for x, y, s in standing(128)]
    person[4] = [0.0, 0.0, 0.0]
    image = with_people(person, size=(512, 512))
    found = Pose(image)(image.pixels, RNG(0)).image
    normalised = [Keypoint(x / 512, y / 512) if s else None for x, y, s in person]
    expected = draw_bodypose(np.zeros((512, 512, 3), np.uint8), normalised)
    assert expected.any() and (found == expected).all(-1).mean() > 0.999


def test_joints_are_drawn_at_their_pixels():
    image = with_people(standing())
    found = Pose(image)(image.pixels, RNG(0)).image
    for (x, y, _), hue in zip(standing(), Pose.hues, strict=True):
        assert found[int(y), int(x)].tolist() == list(hue)


def test_poses_without_enough_joints_are_refused():
    assert Pose(with_people())(np.zeros((9, 9, 3), np.uint8), RNG(0)) == Rejected("no_people")
    unsure = with_people(standing(score=0.2), [*standing()[:5], *[[0.0, 0.0, 0.0]] * 13])
    assert Pose(unsure)(unsure.pixels, RNG(0)) == Rejected("keypoints_too_low", 5.0)
