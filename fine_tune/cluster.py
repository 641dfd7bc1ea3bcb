"""A run on the workers of a Ray cluster (Ray Train V2), started again when one of them is lost."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fine_tune.checkpoint import NonFiniteError, ResumeError
from fine_tune.layouts import CheckpointError
from fine_tune.parallel import check_sharing, join_ray
from fine_tune.presets import Config, ConfigError
from fine_tune.storage import Location

log = logging.getLogger(__name__)

# All ranks raise these alike, and starting them again would not help.
_LASTING = (ConfigError, CheckpointError, ResumeError, NonFiniteError)


class ClusterError(RuntimeError):
    """What ended a run on a cluster."""


def train_on_ray(
    config: Config, workers: tuple[int, int], address: str | None = None, force: bool = False, cpus: float = 1
) -> Location:
    """Train on a number of workers, from the newest checkpoint in the run folder if there is one.

    Whatever the number of workers, the order of the data is the same. Ray keeps its records in `<run folder>/ray`.

    Args:
        config: as for one device; local paths must be the same on all machines.
        workers: fewest and most; where they differ, as many as the cluster has room for at any time.
        address: of the cluster; None starts Ray on this machine.
        cpus: of each worker.

    Returns:
        The last checkpoint.

    Raises:
        ConfigError: numbers of workers that do not share the packs of a step evenly, or no room for the fewest.
        ClusterError: the run failed as often as `parallel.max_failures` allows, or for a reason that would recur.
    """
    config = _absolute(config)
    check_sharing(config, range(workers[0], workers[1] + 1))
    import ray
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    if not ray.is_initialized():
        ray.init(address=address or "local", include_dashboard=None if address else False)
    have = ray.cluster_resources()
    use_gpu = config.run.device == "cuda" or (not config.run.device and have.get("GPU", 0) > 0)
    if not config.run.device:
        _check_room(have, "GPU" if use_gpu else "CPU", workers[0] * (1 if use_gpu else cpus))
    records = Location.of(config.run.folder) / "ray"
    trainer: Any = TorchTrainer(
        cast(Any, _work),
        train_loop_config={"settings": config.to_dict(), "force": force},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(config.parallel.timeout)),
        scaling_config=ScalingConfig(
            num_workers=cast(int, workers[0] if workers[0] == workers[1] else workers),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=records.path,
            storage_filesystem=PyFileSystem(FSSpecHandler(records.fs)),
            failure_config=FailureConfig(max_failures=config.parallel.max_failures),
        ),
    )
    try:
        found: dict[str, Any] = trainer.fit().return_value
    except TrainingFailedError as error:
        raise ClusterError(_first_cause(error)) from error
    if "failure" in found:
        raise ClusterError(found["failure"])
    return Location(found["checkpoint"])


def _work(task: dict[str, Any]) -> dict[str, str]:
    """What each worker runs. Ray starts all of them again after an exception; one that would recur is returned."""
    from fine_tune.train import train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = Config.from_dict(task["settings"])
    try:
        return {"checkpoint": str(train(config, task["force"], join_ray(config)))}
    except _LASTING as error:
        return {"failure": str(error)}


def _check_room(resources: dict[str, float], kind: str, wanted: float) -> None:
    if (have := resources.get(kind, 0)) < wanted:
        raise ConfigError(
            f"the workers need {wanted:g} {kind}s, and the cluster has {have:g}: lower --workers, or, where it "
            "grows by itself, say what to wait for with run.device=cuda or cpu"
        )


def _absolute(config: Config) -> Config:
    """Workers run in a folder of their own."""

    def place(name: str) -> str:
        is_here = bool(name) and "://" not in name and Path(name).exists()
        return str(Path(name).absolute()) if is_here else name

    model = config.model
    return replace(
        config,
        model=replace(model, source=place(model.source), vae=place(model.vae), tokenizer=place(model.tokenizer)),
        data=replace(config.data, corpus=place(config.data.corpus)),
        run=replace(config.run, folder=str(Location.of(config.run.folder))),
    )


def _first_cause(error: Exception) -> str:
    """Of the ranks that failed, the one that did so by itself: when one is lost the others lose their connection."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}  # as Ray wraps them

    def is_collateral(rank: int) -> bool:
        cause = causes[rank]
        return isinstance(cause, RuntimeError) and not type(cause).__module__.startswith("fine_tune")

    first = min(causes, key=lambda rank: (is_collateral(rank), rank), default=None)
    return str(error) if first is None else f"rank {first}: {causes[first]}"
