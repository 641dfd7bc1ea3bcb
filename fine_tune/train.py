"""The training loop.

`train_step` is one optimizer update, `train` everything around it, on one device or on as many ranks as
`fine_tune.parallel` has. Which samples a step sees, and every random number drawn for them, follow from the index, the
settings and the step alone, so a run that was cut off and resumed is bit for bit the run that was not, and on another
number of ranks the same but for rounding.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fine_tune.checkpoint import (
    BackgroundSaver,
    NonFiniteError,
    find_checkpoints,
    load_checkpoint,
    save_checkpoint,
    saved_stage,
)
from fine_tune.data import Batch, Loader, SampleSettings, SkipLimit, sample_seed
from fine_tune.held_out import HeldOut
from fine_tune.index import Corpus, CorpusError, CountRule, Index, open_index
from fine_tune.latents import Coverage, open_latents
from fine_tune.metrics import Meter, MetricLog
from fine_tune.objective import compute_loss, encode, make_generators
from fine_tune.optim import learning_rate, set_learning_rate
from fine_tune.order import Plan, stream_shares
from fine_tune.parallel import World, accumulating, check_sharing, whole
from fine_tune.planner import check_memory
from fine_tune.presets import Config
from fine_tune.progress import show_progress, stop_on_signal
from fine_tune.state import Stage, StepRecord, TrainState, build_state, pick_device
from fine_tune.storage import Location, RunFolder
from fine_tune.viewing import plot_losses

log = logging.getLogger(__name__)


class OutOfMemoryError(RuntimeError):
    """The device ran out of memory; the message names three settings that help."""


def train_step(state: TrainState, batches: list[Batch]) -> dict[str, Tensor]:
    """One optimizer update on the packs of this rank. Does not wait for the device. A collective.

    If a loss or gradient of any rank is not finite, the weights stay as they are; `check_records` says so.

    Returns:
        Scalars on the device: `loss`, the weighted loss of this rank's packs, and `grad_norm`.
    """
    denominator = _denominator(state, batches)
    losses, samples = [], []
    for number, stored in enumerate(batches, start=1):
        batch = stored.to(state.device)
        if state.config.model.adapter_dropout:  # the one random thing that takes no generator
            torch.manual_seed(sample_seed(state.config.data.seed, stored.number, "", "dropout"))
        with accumulating(state.network, number == len(batches)):
            generators = make_generators(state, batch)
            latents = encode(state, batch, generators)
            loss, timestep = compute_loss(state, batch, latents, generators, denominator=denominator)
            loss.loss.backward()
        tasks = batch.per_draw([example.task for example in batch.examples])
        state.losses.add(tasks, timestep, loss.weighted, loss.unweighted)
        losses.append(loss.weighted)
        samples += batch.per_draw([str(example) for example in batch.examples])

    optim, first = state.config.optim, state.stage.first_step
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(state.trained.values(), optim.max_grad_norm))
    is_finite = grad_norm.isfinite() & torch.cat(losses).isfinite().all()
    is_broken = state.world.sum((~is_finite).float())
    state.optimizer.found_inf = is_broken  # type: ignore[attr-defined]
    set_learning_rate(state.optimizer, learning_rate(optim, state.step - first, state.config.run.steps - first))
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        state.average.update(state.step)
    state.step += 1
    state.records.append(StepRecord(state.step, samples, torch.cat(losses), grad_norm, is_broken))
    return {"loss": torch.cat(losses).mean(), "grad_norm": grad_norm}


def _denominator(state: TrainState, batches: list[Batch]) -> Tensor:
    """What the sum of all losses of the step, over packs and ranks, is divided by to be their mean."""
    if state.config.flow.reduction == "token":
        config = state.model.config
        patches = sum(h * w for batch in batches for h, w in batch.pack.target_sizes)
        count = patches * config.patch_size**2 * config.in_channels
    else:
        count = sum(len(batch.pack.target_sizes) for batch in batches)
    # DDP averages gradients over ranks; here they are to be added up.
    total = state.world.sum(torch.tensor(float(count)).to(state.device, non_blocking=True))
    return total / state.world.size


def check_records(state: TrainState) -> None:
    """Wait for the device and look at the steps since the last check. A collective.

    Raises:
        NonFiniteError: a loss or gradient was not finite; names the samples, whichever rank had them.
    """
    for record in state.records:
        if not record.is_broken:
            continue
        finite = record.losses.isfinite().tolist()
        bad = [sample for sample, is_finite in zip(record.samples, finite, strict=True) if not is_finite]
        bad, samples = state.world.join(bad), state.world.join(record.samples)
        what = f"the loss of {', '.join(bad)}" if bad else f"the gradient of {', '.join(samples)}"
        raise NonFiniteError(
            f"step {record.step}: {what} is not finite. The weights are as they were before this step, and the last "
            "checkpoint is good. Lower optim.lr, or look at these samples."
        )
    if any(record.step == 1 and record.grad_norm == 0 for record in state.records):
        raise NonFiniteError("step 1: every gradient is 0, so nothing would be learned")
    state.records.clear()


def train(config: Config, force: bool = False, world: World | None = None) -> Location:
    """Train as configured, from the newest checkpoint in the run folder if there is one. All ranks call it.

    Stages follow one another with the same weights, optimizer and average, and each goes on in the data where the one
    before stopped: no sample is seen again before its epoch is over.

    Returns:
        The last checkpoint.

    Raises:
        ConfigError, CorpusError, ResumeError, NonFiniteError, OutOfMemoryError, StorageError: the message says what to
            change.
    """
    world = world or World()
    check_sharing(config, [world.size])
    check_memory(config, world.device or pick_device(config.run.device), world.size)
    run = RunFolder(config.run.folder, config.run.storage_patience)
    run.fetch("metrics.jsonl", "index")
    state = build_state(config, world)
    found = world.share(find_checkpoints(run.location))
    checkpoint = found[-1] if found else None
    if checkpoint:
        state.stage = saved_stage(checkpoint)
    while True:
        state.config = config.at_stage(state.stage.number)
        loop = open_loop(state, run)
        if checkpoint:
            loop.resume(checkpoint, force)
            checkpoint = None
        saved = loop.run()
        if loop.was_stopped or state.stage.number == config.num_stages:
            return saved
        state.stage = Stage(state.stage.number + 1, state.step, loop.loader.plan.cursor(loop.next_pack))


def open_loop(state: TrainState, run: RunFolder) -> Loop:
    """The data and all else that a stage needs; what there is to know about the data is written to the run folder."""
    config, number = state.config, state.stage.number
    log.info("stage %d: up to %d px, to step %s", number, config.data.max_side, f"{config.run.steps:,}")
    corpus = Corpus(config.data.corpus)
    data = config.data
    rule = CountRule(state.tokenizer, data.max_side, data.budget, data.other_sides, config.flow.draws)
    index = open_index(corpus, config.data.split, rule, run.live / "index")
    latents = open_latents(corpus, index, state.vae, rule.sides) if config.data.latents else []
    loader = make_loader(corpus, index, state, latents)
    if state.world.rank == 0:
        folder = run.live if number == 1 else run.live / f"stage-{number}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")
        report_data(folder, index, loader.plan, latents)
    return Loop(state, loader, index, HeldOut.open(corpus, rule, state, run.live), run)


def make_loader(corpus: Corpus, index: Index, state: TrainState, latents: Sequence[Coverage] = ()) -> Loader:
    data = state.config.data
    settings = SampleSettings(
        max_side=data.max_side,
        drop_all=data.drop_all,
        drop_text=data.drop_text,
        drop_images=data.drop_images,
        edit_masks=state.config.flow.weight_mode == "mask",
        draws=state.config.flow.draws,
    )
    return Loader(
        corpus,
        Plan(index, stream_shares(index, data.mixture), data.seed, data.budget, data.block, after=state.stage.after),
        state.tokenizer,
        settings,
        data.seed,
        short_rope_length=state.model.config.original_max_position_embeddings,
        pad=state.device.type == "cuda",  # one shape, for kernels that are compiled for it
        pin=state.device.type == "cuda",
        workers=data.workers,
        prefetch=data.prefetch,
        latents={coverage.side: coverage.cache for coverage in latents if coverage.cache},
    )


def report_data(run: Path, index: Index, plan: Plan, latents: Sequence[Coverage]) -> None:
    """Write `data.json`: what was left out of the index, the mixture asked for and got, how full packs are, and how
    many samples have cached latents.
    """
    skipped = {"counts": index.skips.counts, "examples": [str(skip) for skip in index.skips.examples]}
    report = {"samples": len(index), "skipped": skipped, "mixture": plan.report(), "fill": plan.fill()}
    report["latents"] = [coverage.to_json() for coverage in latents]
    (run / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    for reason, number in index.skips.counts.items():
        log.warning("%d of %d samples left out: %s (see data.json)", number, index.samples_seen, reason)
    for coverage in latents:
        log.info("%s", coverage)


class Loop:
    """The steps of a run, and what is written beside them. `next_pack` is the whole state of the data."""

    def __init__(
        self, state: TrainState, loader: Loader, index: Index, held_out: HeldOut | None, run: RunFolder
    ) -> None:
        self.state, self.loader, self.index, self.held_out, self.run_folder = state, loader, index, held_out, run
        self.next_pack = 0
        self.was_stopped = False
        self.skips = SkipLimit(state.config.data.max_skip_rate)
        self.corpus_version = loader.corpus.version()
        self.problem: Exception | None = None
        self.saver = BackgroundSaver()
        self.metrics: MetricLog | None = None

    def resume(self, checkpoint: Location, force: bool) -> None:
        """Go back to a checkpoint; see `load_checkpoint`."""
        data = load_checkpoint(checkpoint, self.state, self.index.digest, force)
        self.next_pack = data["next_pack"]
        self.loader.plan.go_to(data["place"])
        if self.state.world.rank == 0:  # of all ranks until then
            self.skips.seen, self.skips.skipped = data["seen"], data["skipped"]
        log.info("resuming from %s", checkpoint)

    def run(self) -> Location:
        """Train to the last step; returns the last checkpoint."""
        state, settings, world = self.state, self.state.config.run, self.state.world
        if world.rank == 0:
            self.metrics = MetricLog(self.run_folder.live, state.step, settings.tensorboard)
        meter = Meter(state)
        packs = state.config.data.packs_per_step
        batches = self.loader.batches(self.next_pack, world.rank, world.size)
        with show_progress(state.step, settings.steps, world.rank == 0) as progress, stop_on_signal() as stop:
            if state.step == 0:
                self._observe()
            while state.step < settings.steps and not self._should_stop(stop):
                meter.start_wait()
                with self._explain_new_corpus():
                    step_batches = [next(batches) for _ in range(packs // world.size)]
                meter.stop_wait(step_batches)
                self._count_skips(step_batches)
                with explain_out_of_memory(step_batches):
                    result = train_step(state, step_batches)
                self.next_pack += packs
                if state.step % settings.log_every == 0 or state.step == settings.steps:
                    self._check()
                    line = {**state.losses.read(world.sum), **meter.read(), "skipped": self._totals()[1]}
                    line["grad_norm"] = result["grad_norm"].item()
                    if self.metrics:
                        self.metrics.write(state.step, "train", line)
                    progress(state.step, line["loss"])
                self._observe()
                if settings.save_every and state.step % settings.save_every == 0 and state.step < settings.steps:
                    self._save(settings.save_in_background)
            self.was_stopped = state.step < settings.steps or self._is_anyone_asked(stop)
        batches.close()  # type: ignore[attr-defined]
        checkpoint = self._save()
        if self.metrics:
            self.metrics.close()
            plot_losses(self.run_folder.live).savefig(self.run_folder.live / "loss.png", dpi=120)
        self._publish()
        return checkpoint

    def _should_stop(self, requests: list[int]) -> bool:
        """Whether any rank was asked to stop. Several ranks talk about it only when they wait for each other anyway."""
        if self.state.world.size == 1:
            return bool(requests)
        if self.state.step % self.state.config.run.log_every:
            return False
        return self._is_anyone_asked(requests)

    def _is_anyone_asked(self, requests: list[int]) -> bool:
        return bool(self.state.world.sum(torch.tensor(float(len(requests)), device=self.state.device)) > 0)

    def _observe(self) -> None:
        """Measure the held-out loss and draw samples where it is time to, the first time before the first step.

        On all ranks: where they share the weights, each forward pass needs all of them.
        """
        state, settings = self.state, self.state.config.run
        is_last = state.step == settings.steps
        measures, draws = (
            self.held_out is not None and every and (state.step % every == 0 or is_last)
            for every in (settings.eval_every, settings.sample_every)
        )
        if self.held_out is None or not (measures or draws):
            return
        with state.average.applied() if state.average is not None else nullcontext():
            if measures:
                losses = self.held_out.measure()
                if self.metrics:
                    self.metrics.write(state.step, "held_out", losses)
            if draws:
                self.held_out.draw(self.run_folder.live / "samples" / f"step-{state.step:08d}.png")

    def _count_skips(self, batches: list[Batch]) -> None:
        rank = self.state.world.rank
        for batch in batches:
            for skip in batch.skips:
                log.warning("left out %s", skip)
                with (self.run_folder.live / f"skipped-{rank}.jsonl").open("a") as file:
                    file.write(json.dumps({"step": self.state.step + 1, **vars(skip)}) + "\n")
                if skip.reason == "shard changed":
                    self._check_corpus()
            try:
                self.skips.count(batch)
            except CorpusError as error:
                self.problem = error
        if self.problem and self.state.world.size == 1:
            raise self.problem

    def _totals(self) -> list[int]:
        """Samples seen, and samples left out, by all ranks."""
        return [
            sum(counts) for counts in zip(*self.state.world.gather((self.skips.seen, self.skips.skipped)), strict=True)
        ]

    def _check(self) -> None:
        """Where all ranks look at what went wrong on any of them."""
        check_records(self.state)
        with self.state.world.together():
            if self.problem:
                raise self.problem
            self._check_corpus()

    def _check_corpus(self) -> None:
        """Raises CorpusError if the corpus is another one than when the run began."""
        if self.loader.corpus.version() != self.corpus_version:
            raise CorpusError(
                f"{self.loader.corpus.url} was built again while this run was reading it. Train once more: the run "
                "goes on from its last checkpoint, or says what has changed"
            )

    @contextmanager
    def _explain_new_corpus(self) -> Iterator[None]:
        """Shards and samples that are not where they were: look for the reason."""
        try:
            yield
        except (OSError, LookupError, CorpusError):
            self._check_corpus()
            raise

    def _save(self, in_background: bool = False) -> Location:
        self._check()
        state, run = self.state, self.run_folder.location
        seen, skipped = self._totals()
        data = {
            "digest": self.index.digest,
            "next_pack": self.next_pack,
            "place": self.loader.plan.place(self.next_pack),
            "stage": asdict(state.stage),
            "seen": seen,
            "skipped": skipped,
        }
        self._publish()
        if in_background:
            return self.saver.save(run, state, data, state.config.run.keep)
        self.saver.wait()
        return save_checkpoint(run, state, data, state.config.run.keep)

    def _publish(self) -> None:
        """Copy logs to where the run lives, if that is not here."""
        with self.state.world.together():
            rank = self.state.world.rank
            self.run_folder.publish(f"skipped-{rank}.jsonl" if rank else "**/*")


@contextmanager
def explain_out_of_memory(batches: list[Batch]) -> Iterator[None]:
    """Say what was too large and what can be done about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lengths = [[len(example.sequence) for example in batch.examples] for batch in batches]
        raise OutOfMemoryError(
            f"out of memory on packs with sequences of {lengths} tokens. Set data.budget lower (but not below the "
            "longest sample; data.max_side shortens samples), or model.gradient_checkpointing=full, or train fewer "
            f"weights with model.adapter=lora model.dtype=bfloat16. ({error})"
        ) from error
