"""Eight GPUs that compute nothing: code that depends on CUDA runs on a machine without one, down to its operators.

Tensors on "cuda" are PyTorch's fake tensors: they have shape, type and device and no numbers. Every operator checks
its arguments against its schema and its inputs' shapes, types and devices, forward and backward; what it returns is
as on a GPU. `torch.cuda`'s functions are bound against their real signatures and answer as an H200 would. A Triton
launch is bound against the kernel's signature and not run. Where a program reads a number from the device it is told
1 (True, 1.0) unless a test says otherwise, and as many elements of it are not zero.

`load()` must run before torch is imported.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import inspect
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "rehearsal"
SOURCE = Path(__file__).with_name("fake_cuda.cpp")
NUM_GPUS, GIB = 8, 2**30
FREE, TOTAL = 120 * GIB, 139 * GIB


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def load() -> None:
    """Give PyTorch a CUDA device guard, which is compiled once. Raises RuntimeError without a C++ compiler."""
    torch_lib = torch_folder() / "lib"
    source = zlib.crc32(SOURCE.read_bytes())
    library = BUILD / f"fake_cuda-{importlib.metadata.version('torch')}-{source:08x}.so"
    if not library.exists():
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise RuntimeError("the rehearsal needs a C++ compiler: install g++, or name one with CXX")
        BUILD.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder() / 'include'}", str(SOURCE)]
        subprocess.run([*command, "-o", str(part), f"-L{torch_lib}", "-lc10", "-ltorch_cpu"], check=True)
        part.replace(library)
    # A registration counts only where PyTorch's own libraries are there for it, and are not yet asked.
    for path in [*sorted(torch_lib.glob("libgomp*")), torch_lib / "libc10.so", torch_lib / "libtorch_cpu.so", library]:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def bound(real: Callable, answer: Callable[[], Any]) -> Callable:
    """A function that takes what `real` takes, and nothing else."""
    signature = inspect.signature(real)

    def call(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return answer()

    return call


def stand_in(real: type, answers: dict[str, Any]) -> type:
    """A class with the constructor's arguments and the methods of `real`; they answer None unless it says otherwise."""

    def make(name: str, method: Callable) -> Callable:
        signature = inspect.signature(method)

        def call(self, *args, **kwargs):
            signature.bind(self, *args, **kwargs)
            return answers.get(name)

        return call

    def start(self, *args, **kwargs) -> None:
        inspect.signature(real.__new__).bind(real, *args, **kwargs)

    methods = {name: make(name, method) for name, method in vars(real).items() if inspect.isfunction(method)}
    methods = {name: method for name, method in methods.items() if not name.startswith("__")}
    return type(real.__name__, (), methods | {"__init__": start, "device": None, "stream_id": 0})


def cuda_answers(num_gpus: int) -> dict[str, Any]:
    """What `torch.cuda`'s functions answer on an H200 machine."""
    import torch

    properties = SimpleNamespace(
        name="H200", total_memory=TOTAL, multi_processor_count=132, major=9, minor=0, warp_size=32
    )
    event = stand_in(torch.cuda.Event, {})()
    stream = stand_in(torch.cuda.Stream, {"query": True, "record_event": event})()
    return {
        "is_available": True, "is_initialized": True, "device_count": num_gpus, "current_device": 0, "set_device": None,
        "get_device_capability": (9, 0), "get_device_properties": properties, "get_device_name": properties.name,
        "mem_get_info": (FREE, TOTAL), "memory_allocated": 2 * GIB, "memory_reserved": 3 * GIB,
        "max_memory_allocated": 4 * GIB, "reset_peak_memory_stats": None, "synchronize": None, "empty_cache": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "_lazy_init": None, "current_stream": stream,
        "default_stream": stream, "set_stream": None, "is_bf16_supported": True,
    }  # fmt: skip


@contextmanager
def gpus(num_gpus: int = NUM_GPUS) -> Iterator[None]:
    """This machine has GPUs, as far as `torch.cuda` tells; tensors on them can be made inside `fake_tensors`."""
    import torch

    with ExitStack() as stack:
        for name, answer in cuda_answers(num_gpus).items():
            call = bound(getattr(torch.cuda, name), lambda answer=answer: answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, call))
        event = stand_in(torch.cuda.Event, {"elapsed_time": 1.0, "query": True})
        stream = stand_in(torch.cuda.Stream, {"query": True, "record_event": event()})
        stack.enter_context(mock.patch.multiple(torch.cuda, Event=event, Stream=stream))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        yield


@contextmanager
def fake_tensors(number: int = 1) -> Iterator[None]:
    """Tensors made inside have no numbers, on "cuda" and on "cpu"; real ones that come in from outside become such.

    number: what an integer read from one of them is.
    """
    import torch
    from torch._subclasses import fake_impls
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    # What is read from the device, and sizes that depend on it; fake tensors alone would raise.
    def read(_mode, _func, tensor):
        return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else number

    def nonzero(_mode, _func, tensor):
        return tensor.new_empty((min(number, tensor.numel()), tensor.ndim), dtype=torch.int64)

    def bincount(_mode, _func, tensor, weights=None, minlength=0):
        return tensor.new_empty(max(minlength, 1))

    aten = torch.ops.aten
    answers = {
        aten._local_scalar_dense.default: read, aten.nonzero.default: nonzero, aten.bincount.default: bincount,
    }  # fmt: skip

    def tolist(tensor):
        if tensor.ndim == 0:
            return tensor.item()
        if tensor.ndim == 1:
            return [tensor[0].item()] * len(tensor) if len(tensor) else []
        return [tolist(row) for row in tensor]

    moved: dict[torch.Tensor, torch.Tensor] = {}

    def apply(module, fn, recurse=True):
        """`Module._apply`, which moves models: its own swaps tensors in place, as fake ones cannot be."""
        for child in module.children() if recurse else ():
            child._apply(fn)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in moved:  # tied ones stay tied
                with torch.no_grad():
                    data = fn(parameter)
                if data is parameter:
                    continue
                moved[parameter] = torch.nn.Parameter(data, parameter.requires_grad)
            module._parameters[name] = moved[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
        return module

    class Mode(FakeTensorMode):
        avoid_device_init = True  # it asks `torch.cuda`, which is pretending

    with (
        Mode(allow_non_fake_inputs=True),
        mock.patch.dict(fake_impls.op_implementations_dict, answers),
        mock.patch.object(FakeTensor, "tolist", tolist),
        mock.patch.object(torch.nn.Module, "_apply", apply),
    ):
        yield


@contextmanager
def launches() -> Iterator[list[str]]:
    """Triton kernels are not run: their launches are bound, and named in the list, one entry a launch."""
    import torch
    from triton.runtime.jit import JITFunction, mangle_type

    names: list[str] = []
    options = {"num_warps", "num_stages", "num_ctas", "maxnreg"}

    def launcher(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args, **kwargs) -> None:
            assert all(isinstance(size, int) and size > 0 for size in grid), f"{kernel.fn.__name__}: grid {grid}"
            assert 1 <= len(grid) <= 3 and grid[0] < 2**31
            values = kernel.signature.bind(*args, **{k: v for k, v in kwargs.items() if k not in options}).arguments
            assert values.keys() == kernel.signature.parameters.keys(), f"{kernel.fn.__name__}: {values.keys()}"
            devices = set()
            for parameter in kernel.params:
                value, where = values[parameter.name], f"{kernel.fn.__name__}({parameter.name}=...)"
                if isinstance(value, torch.Tensor):
                    assert not parameter.is_constexpr and parameter.name.endswith("_ptr"), f"{where} is no pointer"
                    devices.add(value.device)
                    mangle_type(value)  # raises for a type that no kernel takes
                elif parameter.is_constexpr:
                    assert isinstance(value, bool | int), f"{where}: a constant of type {type(value).__name__}"
                    named_block = parameter.name.startswith("BLOCK")
                    assert not named_block or value & (value - 1) == 0, f"{where}: {value} is no power of 2"
                elif value is None:
                    assert parameter.name in OPTIONAL, f"{where} is None"
                else:
                    assert not parameter.name.endswith("_ptr"), f"{where}: {value} is no tensor"
                    mangle_type(value)
            assert [device.type for device in devices] == ["cuda"], f"{kernel.fn.__name__}: tensors on {devices}"
            names.append(kernel.fn.__name__)

        return launch

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield names


# Parameters that the kernels compare with None.
OPTIONAL = {"old_ptr", "ref_ptr", "weight_ptr", "allowed_ptr", "logp_ptr", "soft_cap"}


@contextmanager
def processes(world: int = NUM_GPUS, local: int = NUM_GPUS) -> Iterator[None]:
    """This process is the first of `world` that torchrun started, `local` a node; the others are not there.

    What FSDP2 leaves behind is never collected: the storages of fake tensors that it has emptied end the process then.
    """
    import torch.distributed as td
    from torch.testing._internal.distributed.fake_pg import FakeStore

    real_start = td.init_process_group
    signature = inspect.signature(real_start)

    def start(*args, **kwargs) -> None:
        given = signature.bind(*args, **kwargs).arguments
        assert td.BackendConfig(td.Backend(given["backend"])).get_device_backend_map() == BACKENDS
        real_start("fake", store=given["store"], rank=given["rank"], world_size=given["world_size"])

    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local)}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(td, "init_process_group", start),
        mock.patch("rankgrpo.runtime.distributed.rendezvous", lambda _: iter([(FakeStore(), 0, world)])),
    ):
        gc.disable()
        try:
            yield
        finally:
            if td.is_initialized():
                td.destroy_process_group()
            gc.freeze()
            gc.enable()


BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
