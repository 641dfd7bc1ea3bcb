"""pair: entities of different photographs that show the same subject, from what `crop_features` found in all units.

Three steps, one after the other: *match* compares all crops (one task, over columns and embeddings only), a *judge*
looks at the pairs that are left (a task per unit, on GPUs; only if the recipe has one), and *choose* limits how often a
photograph is used and writes the pairs of every unit. An answer of the judge stands for as long as the judge and what
it was shown are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.annotators.annotator import Annotator
from builders.annotators.crop_features import CropFeatures, read_features, square_crop
from builders.annotators.same_subject import SameSubject, Verdict
from builders.base import SourceImage
from builders.ready import ReadyImage
from filters.decide import split_of
from filters.models import Checkpoint
from filters.pairs import CROPS, Question, band_of, choose, match, questions, sides, verify
from pipelines import ledger
from pipelines.artefacts import Artefacts
from pipelines.engine import Context, Stage, Task, describe
from pipelines.ledger import Marker
from pipelines.stages.annotate import AnnotateStage, annotators_of
from pipelines.stages.ingest import IngestStage, images_path, in_source_order
from pipelines.stages.kept import AnyImages
from pipelines.storage import Folder
from schemas.arrow import LEDGER
from schemas.decide import Splits
from schemas.identity import digest_of
from schemas.pairs import Judge, Pairing
from schemas.records import Entity, Pair

_CANDIDATES = "meta/pairs/candidates.parquet"
_MATCH, CHOOSE = "match", "choose"  # units of the first and of the last step
_HASHES = ("phash", "phash_mirror")
_CHOSEN = ("row", "uid", "entity", "other_unit", "other_row", "other", "other_entity", "similarity", "evidence")
_ANSWERS = pa.schema(
    [
        *((f"{name}_{side}", kind) for side in "ab" for name, kind in (("uid", pa.string()), ("entity", pa.int32()))),
        ("seen", pa.string()),  # digest of what the judge was shown
        ("same", pa.bool_()),  # null: neither yes nor no
        ("text", pa.string()),
        ("mean_logprob", pa.float64()),
    ]
)


def pairs_path(unit: str) -> str:
    """The pairs whose target is in a unit."""
    return f"meta/pairs/chosen/{unit}.parquet"


def answers_path(unit: str) -> str:
    """What the judge said of the pairs whose first photograph is in a unit."""
    return f"meta/pairs/answers/{unit}.parquet"


class PairStage(Stage):
    """Only the last step counts: its ledger has a row per candidate, with the similarity and who vouches for it."""

    name = "pair"
    version = "1"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._planned: tuple[str, dict[str, list[_Planned]]] = ("", {})

    @property
    def rules(self) -> Pairing:
        """The section of the recipe, which has to have one."""
        assert self.recipe.pair is not None
        return self.recipe.pair

    def tasks(self) -> list[Task]:
        if self.recipe.pair is None:
            return []
        units = in_source_order(self.recipe, ledger.read_markers(self.corpus, IngestStage.name))
        work, judge = self._work(units), self.rules.judge
        spec = judge_spec(judge) if judge else ""
        limits = self.rules.model_dump(
            include={"max_per_image": True, "max_reuse": True, "judge": {"others", "min_yes"}}
        )
        tasks = [Task(_MATCH, work, {"units": list(units)})]
        if judge:
            asked = [work, spec, judge.others]
            payload = {"work": work, "spec": spec}
            tasks += [
                Task(f"{unit}.judge", digest_of([*asked, unit]), payload | {"unit": unit}, judge.num_gpus, 1)
                for unit in units
            ]
        return [*tasks, Task(CHOOSE, digest_of([work, spec, limits]), {"units": list(units)}, phase=2)]

    def run(self, task: Task) -> Marker:
        steps = {_MATCH: self._match, CHOOSE: self._choose}
        return steps.get(task.unit, self._ask)(task)

    def _work(self, units: Mapping[str, Marker]) -> str:
        """Digest of all that decides which pairs are left."""
        found = ledger.read_markers(self.corpus, AnnotateStage.name)
        rules = self.rules.model_dump(mode="json", exclude={"max_per_image", "max_reuse", "judge", "band"})
        content = [(unit, made.content, found[f"{unit}.{CropFeatures.name}"].content) for unit, made in units.items()]
        return digest_of([self.version, rules, self._band, self.recipe.decide.splits.model_dump(mode="json"), content])

    @property
    def _band(self) -> tuple[float, float]:
        return band_of(self.rules, self.recipe.annotators()[CropFeatures.name].model)

    def _match(self, task: Task) -> Marker:
        tables, vectors = zip(*map(self._crops, task.payload["units"]), strict=True)
        known = [part for part in vectors if len(part)] or [np.zeros((0, 1), np.float16)]
        candidates = match(pa.concat_tables(tables), np.concatenate(known), self.rules, self._band)
        self.corpus.write_table(_CANDIDATES, candidates)
        return _marker(task, {_CANDIDATES: describe(self.corpus, _CANDIDATES)})

    def _crops(self, unit: str) -> tuple[pa.Table, np.ndarray]:
        """The embedded entities of a unit as `CROPS`, and float16 [n, d]."""
        rows: list[dict[str, Any]] = []
        vectors = []
        images = self.corpus.read_table(images_path(unit), ["row", "uid", "scene_id"]).to_pylist()
        with Artefacts(self.corpus, CropFeatures.name, unit) as artefacts:
            for image in images:
                if (found := artefacts.get(image["row"])) is None:
                    continue
                scene = image["scene_id"] or image["uid"]
                split = split_of(scene, self.recipe.decide.splits)
                shared = {"unit": unit, "row": image["row"], "uid": image["uid"], "scene_id": scene, "split": split}
                shared |= {name: int(found.data[name], 16) for name in _HASHES}
                for entity in found.data["entities"]:
                    own = {name: entity[name] for name in ("entity", "noun", "subject_id")}
                    rows.append({**shared, **own, **{f"crop_{name}": int(entity[name], 16) for name in _HASHES}})
                if found.data["entities"]:
                    vectors.append(read_features(found))
        return pa.Table.from_pylist(rows, CROPS), np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float16)

    def _ask(self, task: Task) -> Marker:
        """Ask about the pairs whose first crop is in this unit; what was asked before is not asked again."""
        unit, spec = task.payload["unit"], task.payload["spec"]
        earlier = _earlier_answers(self.corpus, unit, spec)
        rows = [row for batch in self._batches(unit, task.payload["work"]) for row in self._answer(batch, earlier)]
        path = answers_path(unit)
        self.corpus.write_table(path, pa.Table.from_pylist(rows, _ANSWERS.with_metadata({"spec": spec})))
        return _marker(task, {path: describe(self.corpus, path)})

    def _batches(self, unit: str, work: str) -> Iterator[list[_Asked]]:
        """The questions of a unit with their photographs, those about one noun together."""
        assert self.rules.judge is not None
        size = self.rules.judge.batch_size
        with AnyImages(self.corpus, self.recipe.decide.splits, annotators_of(self.recipe)) as images:
            for noun, group in groupby(self._plan(work).get(unit, []), key=lambda planned: planned.noun):
                same_noun = list(group)
                for start in range(0, len(same_noun), size):
                    batch = same_noun[start : start + size]
                    yield [_Asked(noun, p.question, tuple(images.read(*place) for place in p.places)) for p in batch]

    def _answer(self, batch: list[_Asked], earlier: Mapping[str, Verdict]) -> Iterator[dict[str, Any]]:
        new = [asked for asked in batch if asked.seen not in earlier]
        said = self._judge.ask(batch[0].noun, [asked.crops for asked in new]) if new else []
        verdicts = {**earlier, **{asked.seen: verdict for asked, verdict in zip(new, said, strict=True)}}
        for asked in batch:
            (uid_a, entity_a), (uid_b, entity_b) = asked.question
            who = {"uid_a": uid_a, "entity_a": entity_a, "uid_b": uid_b, "entity_b": entity_b, "seen": asked.seen}
            yield {**who, **asdict(verdicts[asked.seen])}

    @cached_property
    def _judge(self) -> SameSubject:
        assert self.rules.judge is not None
        return SameSubject(self.rules.judge)

    def _plan(self, work: str) -> dict[str, list[_Planned]]:
        """What to ask in each unit, sorted by noun; made once for all units of a worker."""
        if self._planned[0] != work:
            assert self.rules.judge is not None
            table = self.corpus.read_table(_CANDIDATES)
            place = {side: at for row in table.to_pylist() for side, at in zip(sides(row), _places(row), strict=True)}
            asked = questions(table, self.rules.judge.others)
            plan: dict[str, list[_Planned]] = defaultdict(list)
            for noun, question in sorted((noun, question) for question, noun in asked.items()):
                places = place[question[0]], place[question[1]]
                plan[places[0][0]].append(_Planned(noun, question, places))
            self._planned = (work, dict(plan))
        return self._planned[1]

    def _choose(self, task: Task) -> Marker:
        candidates, judge = self.corpus.read_table(_CANDIDATES), self.rules.judge
        if judge:
            candidates = verify(candidates, self._all_answers(task.payload["units"]), judge.min_yes)
        candidates = choose(candidates, self.rules)
        outputs: dict[str, dict[str, Any]] = {}
        for unit, rows in _by_unit(candidates, task.payload["units"]):
            chosen = rows.filter(pc.equal(rows["reason"], "")).select(_CHOSEN)
            path, account = pairs_path(unit), ledger.ledger_path(self.name, unit)
            self.corpus.write_table(path, chosen)
            self.corpus.write_table(account, _ledger_rows(rows))
            others = sorted(set(chosen["other_unit"].to_pylist()))
            outputs[path] = describe(self.corpus, path) | {"others": others}
            outputs[account] = describe(self.corpus, account)
        kept = pc.sum(pc.equal(candidates["reason"], "")).as_py() or 0
        counts = {"inputs": len(candidates), "kept": kept, "dropped": len(candidates) - kept, "quarantined": 0}
        return Marker(self.name, task.unit, task.digest, counts, outputs)

    def _all_answers(self, units: Iterable[str]) -> dict[Question, bool | None]:
        rows = (row for unit in units for row in self.corpus.read_table(answers_path(unit)).to_pylist())
        return {((row["uid_a"], row["entity_a"]), (row["uid_b"], row["entity_b"])): row["same"] for row in rows}


@dataclass(frozen=True)
class _Planned:
    """A question, and unit and row of its two photographs."""

    noun: str
    question: Question
    places: tuple[tuple[str, int], tuple[str, int]]


@dataclass(frozen=True)
class _Asked:
    """A question with its two photographs."""

    noun: str
    question: Question
    images: tuple[SourceImage, ...]

    @property
    def entities(self) -> list[Entity]:
        return [image.record.entities[side[1]] for image, side in zip(self.images, self.question, strict=True)]

    @cached_property
    def seen(self) -> str:
        """Digest of what the judge is shown."""
        uids = [image.record.uid for image in self.images]
        return digest_of([self.noun, uids, [entity.box for entity in self.entities]])

    @property
    def crops(self) -> tuple[np.ndarray, np.ndarray]:
        one, two = self.entities
        return square_crop(self.images[0].pixels, one, False), square_crop(self.images[1].pixels, two, False)


def judge_spec(judge: Judge) -> str:
    """Digest of all that decides an answer, except for what is shown."""
    left_out = {"batch_size", "others", "min_yes", "revision", *judge.resources}
    revision = judge.revision if judge.base_url else Checkpoint(judge).revision
    return digest_of([SameSubject.version, judge.model_dump(mode="json", exclude=left_out), revision])


def paired(
    corpus: Folder,
    unit: str,
    splits: Splits,
    annotators: Mapping[str, Annotator],
    images: Iterable[tuple[int, SourceImage | ReadyImage]],
) -> Iterator[tuple[int, SourceImage | ReadyImage]]:
    """The images of a unit, each with its pairs and the photographs that they name.

    Args:
        corpus: whose pairs have been chosen.
        unit, splits, annotators: see `pipelines.stages.kept.UnitImages`.
        images: rows and images of the unit.
    """
    pairs = defaultdict(list)
    for row in corpus.read_table(pairs_path(unit)).to_pylist():
        pairs[row["row"]].append(row)
    with AnyImages(corpus, splits, annotators) as elsewhere:
        for number, image in images:
            if isinstance(image, SourceImage) and number in pairs:
                found = tuple(Pair(**{name: row[name] for name in Pair.model_fields}) for row in pairs[number])
                others = {row["other"]: (row["other_unit"], row["other_row"]) for row in pairs[number]}
                yield (
                    number,
                    replace(
                        image,
                        record=image.record.model_copy(update={"pairs": found}),
                        others={uid: elsewhere.read(*place) for uid, place in others.items()},
                    ),
                )
            else:
                yield number, image


def _marker(task: Task, outputs: dict[str, dict[str, Any]]) -> Marker:
    """Of a step that accounts for nothing: candidates are counted when they are chosen."""
    return Marker(PairStage.name, task.unit, task.digest, ledger.totals([]), outputs)


def _places(row: Mapping[str, Any]) -> tuple[tuple[str, int], tuple[str, int]]:
    """Unit and row of a candidate's target and reference."""
    return (row["unit"], row["row"]), (row["other_unit"], row["other_row"])


def _earlier_answers(corpus: Folder, unit: str, spec: str) -> dict[str, Verdict]:
    """What the same judge said, by what it was shown."""
    if not corpus.exists(answers_path(unit)):
        return {}
    table = corpus.read_table(answers_path(unit))
    if table.schema.metadata[b"spec"].decode() != spec:
        return {}
    return {row["seen"]: Verdict(row["same"], row["text"], row["mean_logprob"]) for row in table.to_pylist()}


def _by_unit(candidates: pa.Table, units: Iterable[str]) -> Iterator[tuple[str, pa.Table]]:
    """The candidates of every unit, sorted by target and reference."""
    order = ("unit", "row", "entity", "other", "other_entity")
    candidates = candidates.sort_by([(name, "ascending") for name in order]).combine_chunks()
    names = candidates["unit"].to_numpy(zero_copy_only=False)
    for unit in units:
        start, end = np.searchsorted(names, unit, "left"), np.searchsorted(names, unit, "right")
        yield unit, candidates.slice(start, end - start)


def _ledger_rows(candidates: pa.Table) -> pa.Table:
    inputs = [f"{a[0]}/{a[1]} {b[0]}/{b[1]}" for a, b in map(sides, candidates.to_pylist())]
    columns = {name: candidates[name] for name in ("unit", "row", "uid", "reason")}
    return pa.table(
        columns
        | {
            "input": pa.array(inputs, pa.string()),
            "status": pc.if_else(pc.equal(candidates["reason"], ""), "kept", "dropped"),
            "value": candidates["similarity"],
            "detail": candidates["evidence"],
            "outputs": pa.array([[]] * len(candidates), pa.list_(pa.string())),
        },
        schema=LEDGER,
    )
