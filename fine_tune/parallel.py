"""Several devices that train as one: under torchrun, or as workers of Ray Train.

Adapters are trained with DDP: what is exchanged is small. Every weight in float32 is trained with FSDP2 (`fully_shard`,
arXiv:2304.11277): weights, gradients, moments and averages are cut over the ranks. On one device neither is there.
What is learned does not depend on the number of ranks, only on how sums are rounded.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fine_tune.presets import Config, ConfigError

if TYPE_CHECKING:
    from fine_tune.model import OmniGen

log = logging.getLogger(__name__)


class RankError(RuntimeError):
    """Something failed on a rank and all of them know; names the rank."""


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        device: of this rank; None leaves the choice to `run.device`.
        group: process group (gloo) for messages between hosts.
        spare: another one, for another thread; see `beside`.

    Every method but `beside` is a collective: all ranks call it, or none.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    group: dist.ProcessGroup | None = None
    spare: dist.ProcessGroup | None = None

    def beside(self) -> World:
        """The same ranks for another thread: what two threads say over one group gets mixed up."""
        return replace(self, group=self.spare)

    def sum(self, value: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Small values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def join(self, values: list[Any]) -> list[Any]:
        """Those of all ranks, one after the other."""
        return [value for of_rank in self.gather(values) for value in of_rank]

    def share(self, value: Any) -> Any:
        """The value of rank 0."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank fails on all of them, so that none waits for another.

        Raises:
            RankError: it failed elsewhere.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self.gather(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message:
                raise RankError(f"rank {rank}: {message}")


@contextmanager
def join_torchrun(config: Config) -> Iterator[World]:
    """The ranks that torchrun has started; a world of one without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    device = _torchrun_device(config.run.device)
    dist.init_process_group(
        _backend(device), timeout=_timeout(config), device_id=device if device.type == "cuda" else None
    )
    yield _world(device, config)
    dist.destroy_process_group()  # not after an error: the others may be waiting for this rank, and it for them


def join_ray(config: Config) -> World:
    """The workers of Ray Train, whose process group Ray has made."""
    from ray.train.torch import get_device

    device: Any = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or collectives of all ranks meet on device 0 and wait forever
    return _world(device, config)


def _world(device: torch.device, config: Config) -> World:
    group, spare = (cast(Any, dist.new_group(backend="gloo", timeout=_timeout(config))) for _ in range(2))
    return World(dist.get_rank(), dist.get_world_size(), device, group, spare)


def _torchrun_device(name: str) -> torch.device:
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _timeout(config: Config) -> timedelta:
    return timedelta(seconds=config.parallel.timeout)


def check_sharing(config: Config, ranks: Iterable[int]) -> None:
    """ConfigError if one of these numbers of ranks cannot share the packs of a step evenly, in any stage."""
    steps = {config.at_stage(number).data.packs_per_step for number in range(1, config.num_stages + 1)}
    together = math.gcd(*steps)
    if uneven := [str(number) for number in ranks if together % number]:
        even = ", ".join(str(number) for number in range(1, together + 1) if together % number == 0)
        packs = ", ".join(map(str, sorted(steps)))
        raise ConfigError(f"data.packs_per_step={packs} does not divide by {', '.join(uneven)} ranks; {even} would do")


def is_sharded(config: Config) -> bool:
    """Whether several ranks share the weights of a run (FSDP2) or each has all of them (DDP)."""
    return config.model.adapter == "none" and config.model.dtype == "float32"


def parallelise(model: OmniGen, world: World, device: torch.device, config: Config) -> nn.Module:
    """The module to call for training; the parameters of `model` itself may be other ones afterwards."""
    if world.size == 1:
        return model
    if is_sharded(config):
        return _shard(model, world, device)
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def _shard(model: OmniGen, world: World, device: torch.device) -> nn.Module:
    """FSDP2 per block. Masters are float32; blocks are gathered as what autocast would make of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("ranks",))
    compute = torch.bfloat16 if device.type == "cuda" else None
    in_blocks = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Embeddings of time need their float32 weights; autocast is on for the other layers outside of blocks.
    elsewhere = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=in_blocks)
    # By default the outermost weights stay gathered after a forward pass. If the moving average is measured and then
    # taken out of the model again, the next step would go on with it.
    fully_shard(model, mesh=mesh, mp_policy=elsewhere, reshard_after_forward=True)
    for method in ("encode_condition", "forward_cached"):
        register_fsdp_forward_method(model, method)
    return model


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A small tensor that ranks hold parts of, complete on each. A collective."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def accumulating(network: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """With DDP only the last pack of a step exchanges gradients.

    FSDP2 does so for every pack: gradients that wait whole for the last one would take the memory that it saves.
    """
    if isinstance(network, nn.parallel.DistributedDataParallel) and not is_last:
        return network.no_sync()
    return nullcontext()
