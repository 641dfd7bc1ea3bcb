"""Do few-shot groups hold what they promise: one mapping, no scene twice, no other split, no example too often?"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from builders.few_shot.signatures import STREAMS, Shown, shown_by
from pipelines.corpus import Shard, read_index
from pipelines.findings import Finding
from pipelines.storage import Folder
from schemas.groups import FewShot, Grouping
from schemas.records import SampleRecord

_KEYS = {"signature", "k", "explicit", "supports", "query", "contrast"}
_NO_GROUP = "{}"  # of samples that came to the corpus ready-made


@dataclass(frozen=True)
class _Group:
    """A group as it is published; `described` is its JSON."""

    path: str
    split: str
    instruction: str
    parents: frozenset[str]
    described: dict[str, Any]

    @property
    def members(self) -> list[str]:
        return [*self.described["supports"], self.described["query"]]


@dataclass(frozen=True)
class _Member:
    """What lint has to know of a sample that stands in a group."""

    scene: str
    split: str
    parents: frozenset[str]
    signature: dict[str, Any] | None


def lint_groups(corpus: Folder, shards: Sequence[Shard]) -> list[Finding]:
    """Findings in all few-shot groups; none if the corpus has no groups.

    Args:
        corpus: the corpus.
        shards: those with a sample index.
    """
    groups, findings = list[_Group](), list[Finding]()
    for shard in shards:
        if shard.stream.startswith("few_shot"):
            for row in read_index(corpus, shard).to_pylist():
                if row["group"] == _NO_GROUP:
                    continue
                path, described = f"{shard.tar}::{row['key']}", json.loads(row["group"])
                if set(described) == _KEYS and f"few_shot_{len(described['supports'])}" == shard.stream:
                    groups.append(_Group(path, row["split"], row["instruction"], frozenset(row["parents"]), described))
                else:
                    findings.append(Finding(path, "group", f"{row['group']} does not describe a group of its stream"))
    if not groups:
        return findings
    members = _read_members(corpus, shards, {key for group in groups for key in group.members})
    for group in groups:
        findings += [Finding(group.path, "group", problem) for problem in _lint_group(group, members)]
    return sorted([*findings, *_lint_uses(groups, _settings(corpus)), *_lint_contrast(groups)])


def _settings(corpus: Folder) -> FewShot:
    plain = yaml.safe_load(corpus.read_bytes("recipe.yaml"))
    return Grouping.model_validate(plain.get("group") or {}).few_shot


def _read_members(corpus: Folder, shards: Iterable[Shard], keys: set[str]) -> dict[str, _Member]:
    wanted = pa.array(sorted(keys), pa.string())
    members = {}
    for shard in shards:
        if shard.stream not in STREAMS:
            continue
        index = read_index(corpus, shard)
        for row in index.filter(pc.is_in(index["key"], wanted)).to_pylist():
            shown = shown_by(SampleRecord.model_validate({name: row[name] for name in SampleRecord.model_fields}))
            signature = shown.signature.to_json() if isinstance(shown, Shown) else None
            members[row["key"]] = _Member(row["scene_id"], row["split"], frozenset(row["parents"]), signature)
    return members


def _lint_group(group: _Group, members: dict[str, _Member]) -> Iterator[str]:
    if missing := [key for key in group.members if key not in members]:
        yield f"{', '.join(missing)} is not in the corpus"
        return
    found = [members[key] for key in group.members]
    if twice := [scene for scene, n in Counter(member.scene for member in found).items() if n > 1]:
        yield f"scene {', '.join(twice)} occurs more than once"
    if splits := {member.split for member in found} - {group.split}:
        yield f"is in {group.split}, but has members of {', '.join(sorted(splits))}"
    if any(member.signature != group.described["signature"] for member in found):
        yield "not all members show its mapping"
    if frozenset[str]().union(*(member.parents for member in found)) != group.parents:
        yield "its parents are not those of its members"
    if group.described["k"] != len(group.described["supports"]):
        yield f"k is {group.described['k']}, the examples are {len(group.described['supports'])}"


def _lint_uses(groups: Sequence[_Group], settings: FewShot) -> Iterator[Finding]:
    """Which samples are asked for, or shown, too often; the last group is to blame."""
    for role, most in (("query", 1), ("supports", settings.max_uses)):
        paths = defaultdict[str, list[str]](list)
        for group in groups:
            for key in [group.described["query"]] if role == "query" else group.described["supports"]:
                paths[key].append(group.path)
        for key, used in paths.items():
            if len(used) > most:
                detail = f"{key} is among the {role} of {len(used)} groups, more than {most}"
                yield Finding(used[-1], "group", detail)


def _lint_contrast(groups: Sequence[_Group]) -> Iterator[Finding]:
    """The groups of a contrast pair ask the same of one photograph, and nothing but the examples tells what."""
    pairs = defaultdict[str, list[_Group]](list)
    for group in groups:
        pairs[group.described["contrast"]].append(group)
    pairs.pop("", None)
    for pair in pairs.values():
        signatures = [json.dumps(group.described["signature"], sort_keys=True) for group in pair]
        instructions = {group.instruction for group in pair}
        explicit = any(group.described["explicit"] for group in pair)
        if len(pair) != 2 or len(set(signatures)) != 2 or len(instructions) != 1 or explicit:
            yield Finding(pair[-1].path, "group", "is no contrast: one instruction, two groups, two mappings")
