"""The training loop.

`train_step` is one optimizer update, `train` everything around it. Which samples a step sees, and every random number
drawn for them, follow from the index, the settings and the step alone, so a run that was cut off and resumed is bit
for bit the run that was not.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_tune.checkpoint import NonFiniteError, find_checkpoints, load_checkpoint, save_checkpoint
from fine_tune.data import Batch, Loader, SampleSettings, SkipLimit
from fine_tune.held_out import HeldOut
from fine_tune.index import Corpus, CountRule, Index, open_index
from fine_tune.metrics import MetricLog, peak_flops, plot_losses, training_flops
from fine_tune.objective import compute_loss, encode, make_generators
from fine_tune.optim import learning_rate
from fine_tune.order import Plan, stream_shares
from fine_tune.presets import Config, ConfigError
from fine_tune.progress import show_progress
from fine_tune.state import StepRecord, TrainState, World, build_state

log = logging.getLogger(__name__)


class OutOfMemoryError(RuntimeError):
    """The device ran out of memory; the message names three settings that help."""


def train_step(state: TrainState, batches: list[Batch]) -> dict[str, Tensor]:
    """One optimizer update on the packs of this rank. Does not wait for the device.

    If a loss or gradient is not finite, the weights stay as they are; `check_records` says so.

    Returns:
        Scalars on the device: `loss`, the weighted loss of this rank's packs, and `grad_norm`.
    """
    denominator = _denominator(state, batches)
    losses, samples = [], []
    for number, stored in enumerate(batches, start=1):
        batch = stored.to(state.device)
        with _gradients_synchronised(state, number == len(batches)):
            generators = make_generators(state, batch)
            latents = encode(state, batch, generators)
            loss, timestep = compute_loss(state, batch, latents, generators, denominator=denominator)
            loss.loss.backward()
        tasks = [example.task for example in batch.examples]
        state.losses.add(tasks, timestep, loss.weighted, loss.unweighted)
        losses.append(loss.weighted)
        samples += [str(example) for example in batch.examples]

    optim = state.config.optim
    grad_norm = torch.nn.utils.clip_grad_norm_(state.trained.values(), optim.max_grad_norm)
    state.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(optim, state.step, state.config.run.steps)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        state.average.update(state.step)
    state.step += 1
    state.records.append(StepRecord(state.step, samples, torch.cat(losses), grad_norm))
    return {"loss": torch.cat(losses).mean(), "grad_norm": grad_norm}


def _denominator(state: TrainState, batches: list[Batch]) -> Tensor:
    """What the sum of all losses of the step, over packs and ranks, is divided by to be their mean."""
    if state.config.flow.reduction == "token":
        config = state.model.config
        patches = sum(h * w for batch in batches for h, w in batch.pack.target_sizes)
        count = patches * config.patch_size**2 * config.in_channels
    else:
        count = sum(len(batch.examples) for batch in batches)
    # DDP averages gradients over ranks; here they are to be added up.
    total = state.world.sum(torch.tensor(float(count)).to(state.device, non_blocking=True))
    return total / state.world.size


def _gradients_synchronised(state: TrainState, is_last: bool) -> Any:
    """Only the last pack of a step exchanges gradients with other ranks."""
    return nullcontext() if is_last or state.world.size == 1 else state.network.no_sync()  # type: ignore[operator]


def check_records(state: TrainState) -> None:
    """Wait for the device and look at the steps since the last check.

    Raises:
        NonFiniteError: a loss or gradient was not finite; names the samples.
    """
    for record in state.records:
        if record.grad_norm.isfinite() and record.losses.isfinite().all():
            continue
        finite = record.losses.isfinite().tolist()
        bad = [sample for sample, is_finite in zip(record.samples, finite, strict=True) if not is_finite]
        what = f"the loss of {', '.join(bad)}" if bad else f"the gradient of {', '.join(record.samples)}"
        raise NonFiniteError(
            f"step {record.step}: {what} is not finite. The weights are as they were before this step, and the last "
            "checkpoint is good. Lower optim.lr, or look at these samples."
        )
    if any(record.step == 1 and record.grad_norm == 0 for record in state.records):
        raise NonFiniteError("step 1: every gradient is 0, so nothing would be learned")
    state.records.clear()


def train(config: Config, force: bool = False, world: World | None = None) -> Path:
    """Train as configured, from the newest checkpoint in the run folder if there is one.

    Returns:
        The last checkpoint.

    Raises:
        ConfigError, CorpusError, ResumeError, NonFiniteError, OutOfMemoryError: the message says what to change.
    """
    world = world or World()
    if config.data.packs_per_step % world.size:
        raise ConfigError(f"data.packs_per_step={config.data.packs_per_step} does not divide by {world.size} ranks")
    run = Path(config.run.folder)
    run.mkdir(parents=True, exist_ok=True)
    state = build_state(config, world)
    corpus = Corpus(config.data.corpus)
    rule = CountRule(state.tokenizer, config.data.max_side, config.data.budget)
    index = open_index(corpus, config.data.split, rule, run / "index")
    loader = make_loader(corpus, index, state)
    loop = Loop(state, loader, index, HeldOut.open(corpus, rule, state, run))
    if checkpoints := find_checkpoints(run):
        loop.resume(checkpoints[-1], force)
    if world.rank == 0:
        (run / "config.json").write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")
        report_data(run, index, loader.plan)
    return loop.run(run)


def make_loader(corpus: Corpus, index: Index, state: TrainState) -> Loader:
    data = state.config.data
    settings = SampleSettings(
        max_side=data.max_side,
        drop_all=data.drop_all,
        drop_text=data.drop_text,
        drop_images=data.drop_images,
        edit_masks=state.config.flow.weight_mode == "mask",
    )
    return Loader(
        corpus,
        Plan(index, stream_shares(index, data.mixture), data.seed, data.budget, data.block),
        state.tokenizer,
        settings,
        data.seed,
        short_rope_length=state.model.config.original_max_position_embeddings,
        pad=state.device.type == "cuda",  # one shape, for kernels that are compiled for it
        workers=data.workers,
        prefetch=data.prefetch,
    )


def report_data(run: Path, index: Index, plan: Plan) -> None:
    """Write `data.json`: what was left out of the index, the mixture asked for and got, and how full packs are."""
    skipped = {"counts": index.skips.counts, "examples": [str(skip) for skip in index.skips.examples]}
    report = {"samples": len(index), "skipped": skipped, "mixture": plan.report(), "fill": plan.fill()}
    (run / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    for reason, number in index.skips.counts.items():
        log.warning("%d of %d samples left out: %s (see data.json)", number, index.samples_seen, reason)


@dataclass
class Loop:
    """The steps of a run, and what is written beside them. `next_pack` is the whole state of the data."""

    state: TrainState
    loader: Loader
    index: Index
    held_out: HeldOut | None
    next_pack: int = 0

    def __post_init__(self) -> None:
        self.skips = SkipLimit(self.state.config.data.max_skip_rate)

    def resume(self, checkpoint: Path, force: bool) -> None:
        """Go back to a checkpoint; see `load_checkpoint`."""
        data = load_checkpoint(checkpoint, self.state, self.index.digest, force)
        self.next_pack = data["next_pack"]
        self.loader.plan.go_to(data["place"])
        self.skips.seen, self.skips.skipped = data["seen"], data["skipped"]
        log.info("resuming from %s", checkpoint)

    def run(self, run: Path) -> Path:
        """Train to the last step; returns the last checkpoint."""
        state, settings, world = self.state, self.state.config.run, self.state.world
        metrics = MetricLog(run, state.step, settings.tensorboard and world.rank == 0) if world.rank == 0 else None
        meter = Meter(state)
        packs = state.config.data.packs_per_step
        batches = self.loader.batches(self.next_pack, world.rank, world.size)
        with show_progress(state.step, settings.steps, world.rank == 0) as progress, stop_on_signal() as stop:
            if state.step == 0:
                self._observe(run, metrics)
            while state.step < settings.steps and not self._should_stop(stop):
                meter.start_wait()
                step_batches = [next(batches) for _ in range(packs // world.size)]
                meter.stop_wait(step_batches)
                self._count_skips(run, step_batches)
                with explain_out_of_memory(step_batches):
                    result = train_step(state, step_batches)
                self.next_pack += packs
                if state.step % settings.log_every == 0 or state.step == settings.steps:
                    check_records(state)
                    line = {**state.losses.read(), **meter.read(), "skipped": self.skips.skipped}
                    line["grad_norm"] = result["grad_norm"].item()
                    if metrics:
                        metrics.write(state.step, "train", line)
                    progress(state.step, line["loss"])
                self._observe(run, metrics)
                if settings.save_every and state.step % settings.save_every == 0 and state.step < settings.steps:
                    self._save(run)
        batches.close()  # type: ignore[attr-defined]
        checkpoint = self._save(run)
        if metrics:
            metrics.close()
            plot_losses(run)
        return checkpoint

    def _should_stop(self, requests: list[int]) -> bool:
        """Whether any rank was asked to stop. Several ranks talk about it only when they wait for each other anyway."""
        if self.state.world.size == 1:
            return bool(requests)
        if self.state.step % self.state.config.run.log_every:
            return False
        return bool(self.state.world.sum(torch.tensor(float(len(requests)), device=self.state.device)) > 0)

    def _observe(self, run: Path, metrics: MetricLog | None) -> None:
        """Measure the held-out loss and draw samples where it is time to, the first time before the first step."""
        state, settings = self.state, self.state.config.run
        if self.held_out is None or metrics is None:
            return
        is_last = state.step == settings.steps
        with state.average.applied() if state.average is not None else nullcontext():
            if settings.eval_every and (state.step % settings.eval_every == 0 or is_last):
                metrics.write(state.step, "held_out", self.held_out.measure())
            if settings.sample_every and (state.step % settings.sample_every == 0 or is_last):
                self.held_out.draw(run / "samples" / f"step-{state.step:08d}.png")

    def _count_skips(self, run: Path, batches: list[Batch]) -> None:
        for batch in batches:
            for skip in batch.skips:
                log.warning("left out %s", skip)
                with (run / f"skipped-{self.state.world.rank}.jsonl").open("a") as file:
                    file.write(json.dumps({"step": self.state.step + 1, **vars(skip)}) + "\n")
            self.skips.count(batch)

    def _save(self, run: Path) -> Path:
        check_records(self.state)
        data = {
            "digest": self.index.digest,
            "next_pack": self.next_pack,
            "place": self.loader.plan.place(self.next_pack),
            "seen": self.skips.seen,
            "skipped": self.skips.skipped,
        }
        if self.state.world.rank:
            return run
        return save_checkpoint(run, self.state, data, self.state.config.run.keep)


class Meter:
    """Speed since the last reading: tokens and steps per second, share of time spent waiting for data, MFU, memory."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.peak = peak_flops(state.device, state.config.run.peak_tflops)
        self._reset()

    def start_wait(self) -> None:
        self._wait_began = time.perf_counter()

    def stop_wait(self, batches: list[Batch]) -> None:
        self._waited += time.perf_counter() - self._wait_began
        self._steps += 1
        for batch in batches:
            self._tokens += batch.pack.num_tokens
            self._flops += training_flops(
                self.state.model.config,
                batch.pack.num_tokens,
                batch.pack.attended_pairs,
                self.state.adapter_parameters,
            )

    def read(self) -> dict[str, Any]:
        """Per rank; call it right after the host has waited for the device."""
        seconds = time.perf_counter() - self._began
        report = {
            "tokens_per_second": self._tokens / seconds,
            "steps_per_second": self._steps / seconds,
            "data_wait": self._waited / seconds,
            "tflops": self._flops / seconds / 1e12,
            "lr": self.state.optimizer.param_groups[0]["lr"],
        }
        if self.peak:
            report["mfu"] = self._flops / seconds / self.peak
        if self.state.device.type == "cuda":
            report["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.state.device) / 1e9
        self._reset()
        return report

    def _reset(self) -> None:
        self._began, self._waited, self._tokens, self._flops, self._steps = time.perf_counter(), 0.0, 0, 0, 0


@contextmanager
def explain_out_of_memory(batches: list[Batch]) -> Iterator[None]:
    """Say what was too large and what can be done about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lengths = [[len(example.sequence) for example in batch.examples] for batch in batches]
        raise OutOfMemoryError(
            f"out of memory on packs with sequences of {lengths} tokens. Set data.budget lower (but not below the "
            "longest sample; data.max_side shortens samples), or model.gradient_checkpointing=true, or train fewer "
            f"weights with model.adapter=lora model.dtype=bfloat16. ({error})"
        ) from error


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that is empty until the process is asked to stop (Ctrl-C, SIGTERM); a second request stops at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received:
            signal.default_int_handler(number, None)
        received.append(number)
        log.warning("stopping after this step; the checkpoint will be saved")

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs this one handles signals
        previous = {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
