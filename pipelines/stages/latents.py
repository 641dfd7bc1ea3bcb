"""latents: the posterior moments of every input image and target of a shard, by the VAE of the model to be trained.

One task per shard and side. Like scores, latents are artefacts: they outlive `work/` and other recipes, until the shard
that they were made of is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from filters.models import CONFIG, Checkpoint
from pipelines.corpus import Shard, read_index
from pipelines.engine import Kept, Outcome, Quarantined, RowStage, Task
from pipelines.ledger import Marker
from pipelines.stages.pack import packed_digests
from pipelines.storage import Folder
from schemas.identity import digest_of
from schemas.latents import RULE, Latents, folder_of, stem_of

if TYPE_CHECKING:
    from pipelines.latents import Encoder, LatentWriter

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True)
class LatentRow:
    """A row of this stage: one sample of a shard, as its sample index has it, to be encoded at one side."""

    input: str
    uid: str
    sample: dict[str, Any]
    side: int


class LatentsStage(RowStage):
    name = "latents"
    version = "1"

    def tasks(self) -> list[Task]:
        if self.recipe.latents is None:
            return []
        shards = shard_digests(self.corpus)
        return [self._task(shard, shards[shard], side) for side in self.wanted.sides for shard in sorted(shards)]

    def _task(self, shard: Shard, sha256: str, side: int) -> Task:
        vae = self.encoder.vae.digest
        made = {"vae": vae, "rule": RULE, "side": side, "dtype": self.wanted.dtype, "shard_sha256": sha256}
        folder = folder_of(vae, side)
        payload = {"stream": shard.stream, "number": shard.number, "folder": folder, "made": made}
        unit = f"{shard.stem}.{folder.rpartition('/')[2]}"
        return Task(unit, digest_of([self.version, made]), payload, self.wanted.num_gpus)

    def preflight(self) -> None:
        """Raises ModelMissing unless the VAE is there; loads nothing."""
        if self.recipe.latents is not None and self.wanted.checkpoint_name:
            prefix = f"{self.wanted.subfolder}/" if self.wanted.subfolder else ""
            needed = ([prefix + name for name in choice] for choice in (CONFIG, _WEIGHTS))
            Checkpoint(self.wanted.params, "vae").check(*needed)

    def rows(self, task: Task) -> Iterator[LatentRow]:
        shard = _shard(task)
        columns = ("key", "shard", "offset", "size", "members", "edit_source_index")
        for batch in read_index(self.corpus, shard, columns).to_batches(max_chunksize=1024):
            for sample in batch.to_pylist():
                yield LatentRow(f"{shard.tar}::{sample['key']}", "", sample, task.payload["made"]["side"])

    def process(self, row: LatentRow) -> Outcome:
        from fine_tune.index import SampleError

        try:
            return Kept(), self.encoder.encode(row.sample, row.side)
        except SampleError as error:  # for which the trainer leaves the sample out, too
            return Quarantined(error.reason, str(error)), None

    def writer(self, task: Task) -> LatentWriter:
        from pipelines.latents import LatentWriter

        return LatentWriter(self.corpus, task.payload["folder"], _shard(task), task.payload["made"], self.wanted.vae)

    def is_superseded(self, marker: Marker) -> bool:
        """What another recipe or `x2i latents` has asked for stays while there is the shard that it was made of."""
        made_of = {(stem_of(name), made.get("shard_sha256")) for name, made in marker.outputs.items()}
        present = {(shard.stem, sha256) for shard, sha256 in shard_digests(self.corpus).items()}
        return not made_of & present

    @property
    def wanted(self) -> Latents:
        assert self.recipe.latents is not None
        return self.recipe.latents

    @cached_property
    def encoder(self) -> Encoder:
        from pipelines.latents import Encoder

        return Encoder(self.corpus, self.wanted)


def shard_digests(corpus: Folder) -> dict[Shard, str]:
    """sha256 of every shard: as packed, or by the manifest of a corpus that came without its ledger."""
    found = {stem_of(name): digest.sha256 for name, digest in packed_digests(corpus).items()}
    if not found and corpus.exists("manifest.json"):
        streams = corpus.read_json("manifest.json")["streams"].values()
        found = {stem_of(shard["name"]): shard["sha256"] for stream in streams for shard in stream["shards"]}
    parts = {stem: stem.rpartition("-") for stem in found}
    return {Shard(stream, int(number)): found[stem] for stem, (stream, _, number) in parts.items()}


def _shard(task: Task) -> Shard:
    return Shard(task.payload["stream"], task.payload["number"])
