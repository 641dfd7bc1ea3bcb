"""Few-shot groups: every sample has a decision, groups keep their promises, and a group is a lossless sample."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.annotators.maps import Canny, Lineart
from builders.annotators.stored import Scribble
from builders.base import Rejected, Sample
from builders.condition_maps import MAPS
from builders.degradations import DEGRADATIONS
from builders.edit_pairs.builder import NEEDS, WEIGHTS
from builders.few_shot.grouping import Candidate, Contents, Group, Window, distance
from builders.few_shot.samples import VARIANTS, Member, make_sample
from builders.few_shot.signatures import INVERSE, RULES, STREAMS, Shown, Signature, Ungrouped, noun, shown_by
from builders.registry import BUILDERS
from builders.stylers.procedural import PROCEDURAL
from builders.templates import load_templates
from schemas.codec import decode_raw, decode_rgb
from schemas.groups import FewShot
from schemas.identity import generator, uid_of
from schemas.instructions import lint_instruction, placeholder
from schemas.records import SampleRecord
from schemas.vocabulary import STREAMS as ALL_STREAMS
from tests.builders.subject_images import demo_images

PHOTOS = ("astronaut.png", "coffee.png")
# Everything that a builder can do without a model; the defaults for those that are not here.
QUICK_MAPS = ["lines", "luminance", "palette", "boxes", "segmentation", "referring", "referring_outline"]
PARAMS = {
    "condition_maps": {"maps": QUICK_MAPS, "per_image": len(QUICK_MAPS)},
    "edit_pairs": {"per_image": len(WEIGHTS)},
    "restoration": {"per_image": len(DEGRADATIONS)},
    "style": {"styles": ["poster", "pixel_art"], "per_image": 2},
}
NO_INPUT = ("captions", "text_render")


@cache
def finished() -> list[Sample]:
    """What the builders make of photographs, as far as it has the streams in question."""
    made = []
    for name, kind in BUILDERS.items():
        builder = kind(kind.Params(**PARAMS.get(name, {})))
        for image in () if name in NO_INPUT else demo_images(PHOTOS):
            for attempt in builder.attempts(image.record, generator(1, image.record.uid, name)):
                outcome = builder.build(image, attempt, generator(1, f"{image.record.uid}/{attempt}", name))
                made += [] if isinstance(outcome, Rejected) else outcome
    return [sample for sample in made if sample.record.stream in STREAMS]


# --- signatures ----------------------------------------------------------------------------------------------------


def test_every_sample_of_every_builder_has_a_decision() -> None:
    decisions = [(sample.record, shown_by(sample.record)) for sample in finished()]
    assert "try_off" in {record.ops[-1].name for record, _ in decisions}
    undecided = [r.ops[-1].name for r, d in decisions if isinstance(d, Ungrouped) and d.reason not in RULES.values()]
    assert not undecided
    assert {record.stream for record, _ in decisions} == set(STREAMS)
    assert sum(isinstance(decision, Shown) for _, decision in decisions) > 0.8 * len(decisions)


def test_every_operation_that_a_recipe_can_name_has_a_rule() -> None:
    named = [f"map:{name}" for name in MAPS] + [f"edit_{name}" for name in (*WEIGHTS, *NEEDS)]
    assert not {*named, *(f"degrade_{name}" for name in DEGRADATIONS)} - RULES.keys()
    assert INVERSE.keys() <= RULES.keys()


def test_what_a_rule_counts_is_what_operations_store() -> None:
    stored: dict[str, set[str]] = defaultdict(set)
    for sample in finished():
        stored[sample.record.ops[-1].name] |= json.loads(sample.record.ops[-1].params).keys()
    for detector in (Canny(), Lineart(), Scribble(demo_images(PHOTOS)[0])):
        stored[f"map:{detector.name}"] |= detector.draw(np.random.default_rng(0)).keys()
    for rules in (RULES, INVERSE):
        for name, rule in rules.items():
            if name in stored and not isinstance(rule, str):
                assert rule.keys() <= stored[name] | ({"colour"} if name == "edit_background" else set()), name


def with_params(record: SampleRecord, **params: object) -> SampleRecord:
    """The record as if its last operation had drawn other parameters."""
    op = record.ops[-1]
    changed = op.model_copy(update={"params": json.dumps({**json.loads(op.params), **params})})
    return record.model_copy(update={"ops": (*record.ops[:-1], changed)})


def shown(record: SampleRecord) -> Shown:
    found = shown_by(record)
    assert isinstance(found, Shown)
    return found


def test_other_parameters_and_the_other_direction_are_other_mappings() -> None:
    fine, back = (s.record for s in finished() if s.record.subtask == "palette" and s.record.scene_id == "coffee")
    assert shown(with_params(fine, cells=8)).signature != shown(with_params(fine, cells=16)).signature
    assert shown(with_params(fine, cells=8)) == shown(with_params(fine, cells=8, further=1))
    assert shown(fine).signature != shown(back).signature
    noisy = next(s.record for s in finished() if s.record.subtask == "denoise")
    assert shown(with_params(noisy, severity=0.1)) == shown(with_params(noisy, severity=0.2))
    assert shown(with_params(noisy, severity=0.1)) != shown(with_params(noisy, severity=0.9))
    legends = [shown(with_params(fine, cells=[["cup", c]])) for c in ("red", "blue")]
    assert legends[0] != legends[1]


def test_what_only_words_tell_is_not_complete() -> None:
    edits = [s.record for s in finished() if (s.record.stream, s.record.direction) == ("edit", "forward")]
    edit = next(record for record in edits if "thing" in json.loads(record.ops[-1].params))
    mug, left_mug, white_mug, jug = (
        shown(with_params(edit, thing=thing)) for thing in ("mug", "left mug", "white mug on the table", "jug")
    )
    assert mug.complete and jug.complete
    assert not left_mug.complete and not white_mug.complete
    assert mug.signature == left_mug.signature == white_mug.signature != jug.signature


@pytest.mark.parametrize(
    ("phrase", "head"),
    [
        ("white pot of orange flowers", "pot"),
        ("tower with white bands on the left", "tower"),
        ("person standing on the raft", "standing"),
        ("Cat", "cat"),
        ("", ""),
        ("of", "of"),
    ],
)
def test_a_noun_is_what_stands_before_the_first_preposition(phrase: str, head: str) -> None:
    assert noun(phrase) == head


# --- groups --------------------------------------------------------------------------------------------------------


def candidate(
    number: int, uid: str = "a", scene: str = "s", mapping: tuple[str, int] = ("blur", 0), **fields: object
) -> Candidate:
    subtask, parameter = mapping
    given = {
        "key": f"sample-{number}",
        "signature": Signature("perceive", subtask, "inverse", "", json.dumps({"n": parameter})),
        "complete": True,
        "uid": uid,
        "is_photo": True,
        "scene": scene,
        "split": "train",
        "phash": int(uid_of(uid.encode())[:16], 16),
        "phash_mirror": int(uid_of(uid.encode())[16:32], 16),
        "size": (300, 200),
    }
    return Candidate(**(given | fields))  # type: ignore[arg-type]


def contents_of(one: Candidate) -> Contents:
    """A photograph is the input of all that show it; every output is another one."""
    return (one.uid if one.is_photo else f"input of {one.key}"), f"output of {one.key}"


@st.composite
def windows(draw: st.DrawFn) -> list[Candidate]:
    """Samples of a few photographs, of which some show one scene or look alike, with a few mappings."""
    photos = []
    for i in range(draw(st.integers(1, 12))):
        looks = draw(st.integers(0, 8)) if i else 0
        base = int(uid_of(f"{looks}".encode())[:16], 16)
        photo = {
            "uid": f"photo-{i}",
            "scene": f"scene-{draw(st.integers(0, 9))}",
            "split": draw(st.sampled_from(["train", "train", "val"])),
            "phash": base ^ draw(st.integers(0, 255)),
            "size": draw(st.sampled_from([(300, 200), (320, 200), (200, 300)])),
        }
        photos.append(photo | {"phash_mirror": draw(st.sampled_from([base, photo["phash"] ^ (2**64 - 1)]))})
    samples = draw(
        st.lists(
            st.tuples(
                st.sampled_from(photos),
                st.tuples(st.sampled_from(["blur", "edges"]), st.integers(0, 1)),
                st.booleans(),
                st.booleans(),
            ),
            max_size=60,
        )
    )
    return [
        candidate(i, mapping=mapping, complete=complete, is_photo=is_photo, **photo)
        for i, (photo, mapping, complete, is_photo) in enumerate(samples)
    ]


settings_of = st.builds(
    FewShot,
    shots=st.sampled_from([(1,), (2,), (1, 2)]),
    share=st.floats(0.05, 1.0),
    implicit=st.floats(0, 1),
    contrast=st.floats(0, 1),
    max_uses=st.integers(1, 3),
)


def draw_groups(candidates: list[Candidate], chosen: FewShot, seed: int = 0) -> list[Group]:
    return Window(candidates, chosen, contents_of, np.random.default_rng(seed)).groups()


@settings(max_examples=150)
@given(windows(), settings_of, st.integers(0, 5))
def test_groups_keep_their_promises(candidates: list[Candidate], chosen: FewShot, seed: int) -> None:
    groups = draw_groups(candidates, chosen, seed)
    assert groups == draw_groups(candidates, chosen, seed)
    assert len(groups) <= chosen.share * len(candidates)
    assert len({group.key for group in groups}) == len(groups)
    assert max(Counter(group.query.key for group in groups).values(), default=0) <= 1
    uses = Counter(support.key for group in groups for support in group.supports)
    assert max(uses.values(), default=0) <= chosen.max_uses
    for group in groups:
        members = [*group.supports, group.query]
        assert len(group.supports) in chosen.shots
        assert len({member.pool for member in members}) == 1
        assert len({member.split for member in members}) == 1
        assert len({member.scene for member in members}) == len(members)
        assert all(distance(a, b) > chosen.phash_distance for a, b in combinations(members, 2))
        assert group.explicit or group.query.complete


@settings(max_examples=100)
@given(windows(), settings_of)
def test_an_implicit_instruction_needs_something_to_tell_apart(candidates: list[Candidate], chosen: FewShot) -> None:
    for group in draw_groups(candidates, chosen):
        if group.explicit:
            continue
        query = group.query
        same_task = {c.signature for c in candidates if c.signature.subtask == query.signature.subtask}
        same_photo = {c.signature for c in candidates if query.is_photo and c.is_photo and c.uid == query.uid}
        assert (same_task | same_photo) - {query.signature}


@settings(max_examples=100)
@given(windows(), settings_of)
def test_contrast_groups_ask_two_things_of_one_input(candidates: list[Candidate], chosen: FewShot) -> None:
    groups = draw_groups(candidates, chosen)
    pairs: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        pairs[group.contrast].append(group)
    pairs.pop("", None)
    assert 2 * len(pairs) <= chosen.contrast * len(candidates) + 1
    for pair in pairs.values():
        one, other = pair
        assert contents_of(one.query)[0] == contents_of(other.query)[0]
        assert contents_of(one.query)[1] != contents_of(other.query)[1]
        assert one.query.signature != other.query.signature
        assert len(one.supports) == len(other.supports)
        assert not one.explicit and not other.explicit


def test_a_large_window_has_the_asked_shares() -> None:
    """With enough to choose from, contrast, implicit forms and the number of groups are as the recipe says."""
    candidates = [
        candidate(i, uid=f"photo-{i // 4}", scene=f"scene-{i // 4}", mapping=(["blur", "edges"][i % 2], i // 2 % 2))
        for i in range(2000)
    ]
    groups = draw_groups(candidates, FewShot(share=0.5, contrast=0.1, implicit=0.5))
    assert len(groups) == 1000
    assert sum(bool(group.contrast) for group in groups) == 100
    ordinary = [group for group in groups if not group.contrast]
    assert 0.45 < np.mean([group.explicit for group in ordinary]) < 0.55
    assert 0.4 < np.mean([len(group.supports) == 1 for group in ordinary]) < 0.6


def test_rare_tasks_take_their_turn() -> None:
    candidates = [candidate(i, uid=f"{i}", scene=f"{i}", mapping=("blur", 0)) for i in range(90)]
    candidates += [candidate(100 + i, uid=f"r{i}", scene=f"r{i}", mapping=("rare", 0)) for i in range(5)]
    groups = draw_groups(candidates, FewShot(share=0.1, contrast=0.0))
    assert Counter(group.query.signature.subtask for group in groups) == {"blur": 5, "rare": 4}


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("another split", {"split": "val"}),
        ("another aspect", {"size": (200, 300)}),
        ("the same scene", {"scene": "first"}),
        ("another mapping", {"mapping": ("blur", 1)}),
        ("a photograph that looks alike", {"phash": candidate(0, "first").phash ^ 0b1111}),
        ("a photograph that is its mirror image", {"phash_mirror": candidate(0, "first").phash ^ 0b11}),
        ("the same input", {"is_photo": False}),
    ],
)
def test_no_group_with(what: str, fields: dict[str, object]) -> None:
    one = candidate(0, "first", scene="first")
    fields = {"scene": "second"} | fields
    assert len(draw_groups([one, candidate(1, "second", scene="second")], FewShot(share=1.0, shots=(1,)))) == 2
    same = ("twin", "output") if what == "the same input" else None
    contents = (lambda c: (same[0], c.key)) if same else contents_of
    window = Window([one, candidate(1, "second", **fields)], FewShot(share=1.0), contents, np.random.default_rng(0))
    assert window.groups() == []


def test_wrong_settings_name_the_culprit() -> None:
    for wrong, message in (
        ({"shots": [3]}, "shots"),
        ({"shots": [1, 1]}, "given once"),
        ({"share": 0}, "share"),
        ({"window": 2}, "window"),
    ):
        with pytest.raises(ValueError, match=message):
            FewShot(**wrong)


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", load_templates("few_shot"))
def test_templates_show_every_image(name: str) -> None:
    form, k = name.split("_")
    texts = load_templates("few_shot")[name]
    tags = {f"image_{i}": placeholder(i) for i in range(1, 2 * int(k) + 2)}
    asked = f"Brighten {tags[f'image_{2 * int(k) + 1}']}." if form == "explicit" else ""
    assert len(set(texts)) == len(texts) >= 10
    for text in texts:
        assert ("{instruction}" in text) == (form == "explicit")
        assert lint_instruction(text.format(**tags, instruction=asked), 2 * int(k) + 1) == []


def group_of(*samples: Sample, explicit: bool = False, contrast: str = "") -> tuple[Group, list[Member]]:
    """Any samples as a group; the last one is the query."""
    members = [Member.of(sample.members) for sample in samples]
    candidates = []
    for i, member in enumerate(members):
        candidates.append(candidate(i, key=member.record.key, signature=shown(member.record).signature))
    return Group(tuple(candidates[:-1]), candidates[-1], explicit, contrast), members


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_group_is_a_lossless_sample(stream: str, k: int) -> None:
    groupable = [s for s in finished() if isinstance(shown_by(s.record), Shown)]
    last = next(s for s in groupable if s.record.stream == stream)
    examples = [s for s in groupable if s is not last][:: len(groupable) // 3]
    samples = [*examples[:k], last]
    group, members = group_of(*samples, explicit=True)
    sample = make_sample(group, members, np.random.default_rng(0))
    record, query = sample.record, samples[-1].record
    assert list(sample.images) == list(ALL_STREAMS[f"few_shot_{k}"].image_members)
    names = [n for s in samples for n in s.images if n.startswith(("input_1", "output"))]
    originals = [s.images[n] for s in samples for n in s.images if n.startswith(("input_1", "output"))]
    for name, before, after in zip(names, originals, sample.images.values(), strict=True):
        assert after.startswith(b"\x89PNG")
        np.testing.assert_array_equal(decode_rgb(after), decode_rgb(before), name)
        assert decode_raw(after).dtype == np.uint8
    assert (
        record.instruction.endswith(query.instruction[-5:]) or query.instruction.split("<img>")[0] in record.instruction
    )
    assert len(record.instruction_variants) == VARIANTS
    assert (record.subtask, record.direction) == (f"{stream}_{query.subtask}", query.direction)
    assert record.edit_source_index == (2 * k if query.edit_source_index == 0 else -1)
    assert set(record.parents) == {uid for s in samples for uid in s.record.parents}
    assert json.loads(record.group) == {
        "signature": group.query.signature.to_json(),
        "k": k,
        "explicit": True,
        "supports": [s.record.key for s in samples[:-1]],
        "query": query.key,
        "contrast": "",
    }


def test_rights_are_those_of_all_members() -> None:
    first, *_, last = (s for s in finished() if s.record.stream == "perceive")
    licensed = Sample(last.record.model_copy(update={"license": "CC-BY-4.0", "optout": True}), last.images)
    record = make_sample(*group_of(licensed, first), np.random.default_rng(0)).record
    assert record.license.split(" AND ") == sorted({first.record.license, "CC-BY-4.0"})
    assert record.optout


def test_both_groups_of_a_contrast_pair_are_worded_alike() -> None:
    some = [s for s in finished() if s.record.stream == "perceive"][:4]
    texts = [
        make_sample(*group_of(*pair, contrast="c"), np.random.default_rng(3)).record.instruction
        for pair in (some[:2], some[2:])
    ]
    assert texts[0] == texts[1]


def test_a_group_refuses_foreign_members() -> None:
    some = [s for s in finished() if s.record.stream == "perceive"][:3]
    group, members = group_of(*some[:2])
    with pytest.raises(ValueError, match="other members"):
        make_sample(group, [*members[:-1], Member.of(some[2].members)], np.random.default_rng(0))


def test_every_style_is_a_subtask_of_its_own() -> None:
    """The rule for styles counts no parameter because of that."""
    styled = {s.record.subtask for s in finished() if s.record.stream == "style"}
    assert styled <= PROCEDURAL.keys()
