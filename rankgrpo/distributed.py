"""Data parallelism over torchrun's processes: who I am, and sums over everybody.

Every process holds the whole model and a share of the prompts. Losses are divided by the count of the whole step, so
summed gradients equal those of one process that saw every prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


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


def start_parallel() -> Parallel:
    """Join torchrun's process group (NCCL on GPUs, gloo on CPUs), or run alone when torchrun did not start us."""
    # Adam's moments of embedding rows that go unused decay to denormal numbers, which a CPU computes some hundred times
    # slower: a step takes twice as long after 2,500. Worker threads inherit the mode, so it is set before any is made.
    torch.set_flush_denormal(True)
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Parallel(0, 1, device)
    if not td.is_initialized():
        td.init_process_group("nccl" if on_gpu else "gloo")
    return Parallel(td.get_rank(), td.get_world_size(), device)


def sum_gradients(model: nn.Module, parallel: Parallel) -> None:
    """Replace every gradient by its sum over the processes."""
    if parallel.dp_world == 1:
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


@torch.no_grad()
def full_parameters(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, whole, one at a time, in the order of named_parameters; tied ones come once.

    Of a sharded model every process must take all of them, in step with the others; each is gathered when it is asked
    for and nothing keeps it, so there is never a second copy of the model. With `dtype` it is cast before it is
    gathered. Whole parameters are the model's own tensors: read them, do not write.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward without a backward left whole is under the parameter's name
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):  # an offloaded shard is gathered on the device, where it is wanted
            yield name, tensor.to(tensor.device_mesh.device_type, dtype or tensor.dtype).full_tensor()
        else:
            yield name, tensor.to(dtype or tensor.dtype)


class Means:
    """Named weighted means and sums over micro-batches and processes.

    Example: ``means.add("list/items_mean", total, count)``, ``means.add_sum("loss/policy", value)``

    All processes must hold the same names when they reduce: declare in `names` those that a process may have nothing
    to add to.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.pairs: dict[str, list[float]] = {name: [0.0, 0.0] for name in names}
        self.sums: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        pair = self.pairs.setdefault(name, [0.0, 0.0])
        pair[0] += float(total)
        pair[1] += float(count)

    def add_sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def reduce(self, parallel: Parallel) -> dict[str, float]:
        """Means and sums over all processes; a mean of nothing is left out."""
        names, sum_names = sorted(self.pairs), sorted(self.sums)
        flat = [value for name in names for value in self.pairs[name]] + [self.sums[name] for name in sum_names]
        values = parallel.sum(flat)
        pairs = zip(names, values[0 : 2 * len(names) : 2], values[1 : 2 * len(names) : 2], strict=True)
        means = {name: total / count for name, total, count in pairs if count > 0}
        return means | dict(zip(sum_names, values[2 * len(names) :], strict=True))


def wait_for_all(parallel: Parallel) -> None:
    """Return once every process is here."""
    if parallel.dp_world > 1:
        td.barrier()
