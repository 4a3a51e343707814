"""Data parallelism over torchrun's processes: who I am, sums over everybody, and models split among all.

Every process takes a share of the prompts. Losses are divided by the count of the whole step, so summed gradients equal
those of one process that saw every prompt. The model is either whole on every process (`sum_gradients`), or its
parameters, gradients and optimizer state are split with FSDP2 (`shard_model`). A split model computes only when all
processes do: each forward gathers and each backward sums together, so everybody makes equally many of both.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.multiprocessing import _prctl_pr_set_pdeathsig
from transformers.modeling_layers import GradientCheckpointingLayer

from rankgrpo.config import ParallelConfig
from rankgrpo.errors import ConfigError, ParallelError
from rankgrpo.files.malloc import keep_freed_memory


@dataclass(frozen=True, slots=True)
class Parallel:
    """Place of this process; dp_world is 1 without torchrun."""

    dp_rank: int
    dp_world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and shows progress."""
        return self.dp_rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over the processes, in float64."""
        if self.dp_world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        td.all_reduce(total)
        return total.tolist()

    def max(self, value: int) -> int:
        """The largest of the processes' values, on all of them."""
        if self.dp_world == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        td.all_reduce(largest, td.ReduceOp.MAX)
        return int(largest)

    def gather(self, texts: list[str]) -> list[list[str]]:
        """Every process's texts, by process, on all of them."""
        if self.dp_world == 1:
            return [texts]
        # As bytes: gather_object would pickle.
        own = torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.dp_world)]
        td.all_gather(sizes, torch.tensor([len(own)], device=self.device))
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.dp_world)]
        td.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))))
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]


def device_here() -> torch.device:
    """The device that a single process of this machine would compute on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start_parallel() -> Parallel:
    """Join torchrun's process group (NCCL on GPUs, gloo on CPUs), or run alone when torchrun did not start us.

    Raises ParallelError when the processes cannot reach each other.
    """
    # Adam's moments of embedding rows that go unused decay to denormal numbers, which a CPU computes some hundred times
    # slower: a step takes twice as long after 2,500. Worker threads inherit the mode, so it is set before any is made.
    torch.set_flush_denormal(True)
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ParallelError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. Start at "
                f"most one process a GPU (NPROC, or torchrun's --nproc-per-node)"
            )
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "WORLD_SIZE" not in os.environ:
        return Parallel(0, 1, device)
    if not td.is_initialized():
        try:
            store, dp_rank, dp_world = meeting_place()
            # gloo beside NCCL: what is offloaded to host memory is reduced there.
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            td.init_process_group(backend, store=store, rank=dp_rank, world_size=dp_world)
        except (td.DistNetworkError, td.DistStoreError) as error:
            raise ParallelError(
                f"the processes cannot meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
                f"({str(error).splitlines()[0]}). If the port is in use, take another one (torchrun --master-port, or "
                f"--standalone on one machine); if it is not, check that every node reaches this address"
            ) from error
        # torchrun's children outlive it when it is killed, and would go on writing beside those of the next start.
        _prctl_pr_set_pdeathsig(signal.SIGKILL)
    return Parallel(td.get_rank(), td.get_world_size(), device)


def meeting_place() -> tuple[td.Store, int, int]:
    """The store that torchrun's processes meet in, this process's rank and the number of processes.

    torchrun 2.13 keeps one store over its restarts, in which processes that start again would find the addresses of
    the dead and wait for them. Nodes count their restarts apart, so several of them need its own remedy
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment).
    """
    store, dp_rank, dp_world = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(dp_world):
        store = td.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store, dp_rank, dp_world


def leave_parallel() -> None:
    """Leave torchrun's process group, if this process is in one: the last thing that a process does.

    For processes that end in the same place. Without it gloo's threads may free the last collective's tensors while
    Python ends, and the process aborts (SIGABRT) after all its work was done (seen with torch 2.13 and Python 3.11). A
    process that fails alone must not come here: NCCL would wait for the others.
    """
    if td.is_initialized():
        td.destroy_process_group()


def lost_contact(error: RuntimeError) -> bool:
    """Is this what a process meets when another one of the run has died?"""
    return isinstance(error, td.DistError) or "gloo" in str(error)


def wait_for_all(parallel: Parallel) -> None:
    """Return once every process is here."""
    parallel.sum([0.0])


# ---------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Sharding:
    """How a model is split among the processes."""

    mesh: DeviceMesh
    """With one axis the model is split over it; with two it is copied along the first and split along the second."""
    cpu_offload: bool
    parallel: Parallel


def make_sharding(config: ParallelConfig, parallel: Parallel) -> Sharding | None:
    """What parallel.shard means for these processes; None when every process holds the whole model.

    Raises ConfigError for what these processes cannot do.
    """
    kind, world, local = config.shard, parallel.dp_world, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "auto":
        several_gpus = parallel.device.type == "cuda" and world > 1
        kind = ("hybrid" if 1 < local < world else "full") if several_gpus else "none"
    if kind == "none":
        if config.cpu_offload:
            raise ConfigError("parallel.cpu_offload: belongs to a split model: needs parallel.shard = full or hybrid")
        return None
    if not td.is_initialized():
        raise ConfigError(
            f"parallel.shard: {kind!r} splits the model among the processes of torchrun, and this one was started "
            f"alone; use torchrun (make does, with NPROC of 2 and more), or parallel.shard=none"
        )
    if world % local:
        raise ConfigError(
            f"parallel.shard: every node needs as many processes, got {world} of them, {local} on this node"
        )
    shape = {"shard": world} if kind == "full" else {"replicate": world // local, "shard": local}
    mesh = init_device_mesh(parallel.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    return Sharding(mesh, config.cpu_offload, parallel)


def shard_model(model: nn.Module, sharding: Sharding, *, bfloat16: bool) -> None:
    """Split a transformers model with FSDP2, a transformer block at a time and the rest as one; gradients are summed.

    With bfloat16 computation and gathering are in bfloat16; parameters, their gradients' sums and the optimizer's state
    stay float32. Tied embeddings belong to the rest, so they stay tied. Frozen models free the rest after a forward.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no transformer blocks to split; use parallel.shard=none")
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    on_gpu = sharding.parallel.device.type == "cuda"
    options = {
        "mesh": sharding.mesh,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if sharding.cpu_offload else OffloadPolicy(),
    }
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, reshard_after_forward=True if frozen else None, **options)
    for module in (*blocks, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # dividing by one is a NCCL operation that gloo lacks


def sum_gradients(model: nn.Module, parallel: Parallel) -> None:
    """Replace every gradient by its sum over the processes; those of a split model are sums already."""
    if parallel.dp_world == 1 or isinstance(model, FSDPModule):
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # this process had no group with a gradient, the others may have
            parameter.grad = torch.zeros_like(parameter)
    for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
        grads = [parameter.grad for parameter in trained if parameter.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in grads])  # one message: a small model is all latency
        td.all_reduce(flat)
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def reshard(model: nn.Module) -> None:
    """Give up what a forward without a backward left whole: it stands under the parameter's name, where an optimizer or
    a checkpoint that is loaded would take it for the process's own part."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def split_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by name, each process's own part of a split model; tied ones come once."""
    reshard(model)
    return dict(model.named_parameters())


@torch.no_grad()
def full_parameters(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, whole, one at a time, in the order of named_parameters; tied ones come once.

    Of a sharded model every process must take all of them, in step with the others; each is gathered when it is asked
    for and nothing keeps it, so there is never a second copy of the model. With `dtype` it is cast before it is
    gathered. Whole parameters are the model's own tensors: read them, do not write.
    """
    for name, parameter in split_parameters(model).items():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):  # an offloaded shard is gathered on the device, where it is wanted
            yield name, tensor.to(tensor.device_mesh.device_type, dtype or tensor.dtype).full_tensor()
        else:
            yield name, tensor.to(dtype or tensor.dtype)


# ---------------------------------------------------------------------------------------------------------- metrics
