"""group: finished samples of neighbouring units become few-shot groups, in parts of their own.

A unit of this stage is a window: consecutive units of one source. Its ledger has a row for every sample that the
window holds of the streams in question: kept with the groups in which it stands, or dropped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from builders.few_shot import samples
from builders.few_shot.grouping import Candidate, Contents, Group, Window
from builders.few_shot.samples import Member, make_sample
from builders.few_shot.signatures import STREAMS, Ungrouped, shown_by
from pipelines import ledger
from pipelines.corpus import read_members
from pipelines.engine import Stage, Task, describe
from pipelines.ledger import LedgerRow, Marker
from pipelines.parts import PartWriter, part_path, part_rows
from pipelines.stages.build import BuildStage
from pipelines.stages.ingest import in_source_order, scores_path, source_of
from pipelines.stages.score import ScoreStage
from schemas.identity import digest_of, generator
from schemas.records import SampleRecord

SCORER = "phash"
_PLACE = ("key", "shard", "offset", "size", "members")


@dataclass(frozen=True)
class Finished:
    """A sample of the window: where it is, and what can be grouped of it, or why nothing can."""

    place: dict[str, Any]
    uid: str
    candidate: Candidate | None
    refused: str = ""
    detail: str = ""

    @property
    def key(self) -> str:
        return str(self.place["key"])


class GroupStage(Stage):
    name = "group"
    version = "1"

    def tasks(self) -> list[Task]:
        if self.recipe.group is None:
            return []
        settings = self.recipe.group.few_shot
        scores = ledger.read_markers(self.corpus, ScoreStage.name)
        same_for_all = [self.version, samples.VERSION, self.recipe.seed, settings.model_dump(mode="json")]
        tasks = []
        for window in self._windows(settings.window_units):
            parts = {unit: _parts(marker) for unit, marker in window.items()}
            hashes = [scores[f"{unit}.{SCORER}"].content for unit in window]
            payload = {"units": {unit: list(found) for unit, found in parts.items()}}
            tasks.append(Task(f"{next(iter(window))}.group", digest_of([same_for_all, parts, hashes]), payload))
        return tasks

    def run(self, task: Task) -> Marker:
        assert self.recipe.group is not None
        finished = self._finished(task.payload["units"])
        places = {sample.key: sample.place for sample in finished}

        @cache
        def contents(candidate: Candidate) -> Contents:
            return self._member(places[candidate.key]).contents

        candidates = [sample.candidate for sample in finished if sample.candidate is not None]
        rng = generator(self.recipe.seed, task.unit, self.name)
        window = Window(candidates, self.recipe.group.few_shot, contents, rng)
        groups = window.groups()
        with PartWriter(self.corpus, task.unit) as writer:
            for group in groups:
                members = [self._member(places[one.key]) for one in (*group.supports, group.query)]
                wording = generator(self.recipe.seed, group.contrast or group.key, self.name)
                writer.write(make_sample(group, members, wording))
        entries = list(_ledger_rows(task.unit, finished, window, groups))
        path = ledger.ledger_path(self.name, task.unit)
        self.corpus.write_table(path, ledger.ledger_table(entries))
        outputs = {**writer.outputs, path: describe(self.corpus, path)}
        return Marker(self.name, task.unit, task.digest, ledger.count(entries), outputs)

    def _windows(self, size: int) -> Iterator[dict[str, Marker]]:
        """Markers of consecutive units of one source, so that a source that grows or is added changes the last ones."""
        units = in_source_order(self.recipe, ledger.read_markers(self.corpus, BuildStage.name))
        for _, of_source in groupby(units.items(), key=lambda item: source_of(item[0])):
            items = list(of_source)
            for start in range(0, len(items), size):
                yield dict(items[start : start + size])

    def _finished(self, units: Mapping[str, Sequence[str]]) -> list[Finished]:
        """All samples in question, in the order of units and streams."""
        found = []
        for unit, streams in units.items():
            hashes = self._hashes(unit)
            for stream in streams:
                found += [_finished(row, hashes) for row in part_rows(self.corpus, stream, unit)]
        return found

    def _hashes(self, unit: str) -> dict[str, tuple[int, int]]:
        """Both perceptual hashes by uid, of the photographs that have them."""
        table = self.corpus.read_table(scores_path(SCORER, unit), ["uid", "phash", "phash_mirror"]).drop_null()
        return {row["uid"]: (row["phash"], row["phash_mirror"]) for row in table.to_pylist()}

    def _member(self, place: Mapping[str, Any]) -> Member:
        return Member.of(read_members(self.corpus, place))


def _parts(marker: Marker) -> dict[str, str]:
    """Content of the parts of a unit that hold samples in question, by stream."""
    paths = {stream: part_path(stream, marker.unit) for stream in STREAMS}
    return {stream: marker.outputs[path]["sha256"] for stream, path in paths.items() if path in marker.outputs}


def _finished(row: dict[str, Any], hashes: Mapping[str, tuple[int, int]]) -> Finished:
    record = SampleRecord.model_validate({name: row[name] for name in SampleRecord.model_fields})
    shown = shown_by(record)
    uid, place = record.parents[0], {name: row[name] for name in _PLACE}
    if isinstance(shown, Ungrouped):
        return Finished(place, uid, None, "not_groupable", shown.reason)
    if uid not in hashes:
        return Finished(place, uid, None, "no_phash")
    given = row["members"][0]
    candidate = Candidate(
        key=record.key,
        signature=shown.signature,
        complete=shown.complete,
        uid=uid,
        is_photo=record.real_input,
        scene=record.scene_id,
        split=record.split,
        phash=hashes[uid][0],
        phash_mirror=hashes[uid][1],
        size=(given["width"], given["height"]),
    )
    return Finished(place, uid, candidate)


def _ledger_rows(
    unit: str, finished: Sequence[Finished], window: Window, groups: Sequence[Group]
) -> Iterator[LedgerRow]:
    """What became of every sample in question."""
    groups_of: dict[str, list[str]] = {}
    for group in groups:
        for member in (*group.supports, group.query):
            groups_of.setdefault(member.key, []).append(group.key)
    for number, sample in enumerate(finished):
        same: tuple[str, int, str, str] = (unit, number, sample.key, sample.uid)
        if sample.key in groups_of:
            yield LedgerRow(*same, "kept", outputs=tuple(groups_of[sample.key]))
        elif sample.candidate is None:
            yield LedgerRow(*same, "dropped", sample.refused, detail=sample.detail)
        else:
            yield LedgerRow(*same, "dropped", "not_drawn" if window.has_partner(sample.candidate) else "no_partner")
