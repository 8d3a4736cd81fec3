"""CUDA C++ compiled at run time by torch's NVRTC, and launched with one structure as its argument."""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from kvsight.errors import KVSightError
from kvsight.ops.binaries import Binaries
from kvsight.ops.builds import Builds, Source, Target

# what kernels call the types of keys, values and queries
NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
NUMBERS_SOURCE, HALVES_SOURCE = (Path(__file__).with_name(f"{name}.cuh") for name in ("numbers", "halves"))
# what a multiprocessor has of shared memory since Hopper, and what every block takes of it unasked
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024


@dataclass(frozen=True)
class Kernel:
    """A kernel on one device, and the dynamic shared memory [bytes] that its blocks get."""

    function: Any
    shared_bytes: int
    device: torch.device

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Queue it on the device's current stream."""
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        # a model may be spread over several devices
        with torch.cuda.device(self.device):
            code = _launcher()(
                self.function, *grid, threads, 1, 1, self.shared_bytes, stream, parameters, None
            )
        torch.cuda._utils._check_cuda(code)


@lru_cache(maxsize=1)
def _launcher() -> Any:
    # loading the driver's library takes longer than a launch
    return torch.cuda._utils._get_gpu_runtime_library().cuLaunchKernel


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many the device has; a few where an emulator stands for it."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compile_cuda(text: str, name: str, options: tuple[str, ...]) -> bytes:
    """Device code (cubin) of CUDA C++. Host work: it needs no context, and lets other threads run."""
    # some of torch's own wrappers give PTX, which the driver compiles once more, in the launching thread
    library = _compiler()
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None
        )
    )
    try:
        listed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), listed):
            log = _output(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            raise RuntimeError(
                f"NVRTC could not compile {name} with {' '.join(options)}: "
                f"{log.rstrip(bytes(1)).decode(errors='replace').strip()}"
            )
        return _output(program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _compiler() -> Any:
    return torch.cuda._utils._get_gpu_rtc_library()


def _output(program: ctypes.c_void_p, size_of: Any, get: Any) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    out = ctypes.create_string_buffer(size.value)
    _check(get(program, out))
    return out.raw


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC failed with error {result}")


@lru_cache(maxsize=16)
def _target(device: torch.device) -> Target:
    version = ctypes.c_int(), ctypes.c_int()
    _check(_compiler().nvrtcVersion(*map(ctypes.byref, version)))
    major, minor = torch.cuda.get_device_capability(device)
    compiler = f"NVRTC {version[0].value}.{version[1].value} of torch {torch.__version__}"
    return Target(compiler, (f"--gpu-architecture=sm_{major}{minor}",))


_builds = Builds(compile_cuda, Binaries())


def build_ahead(sources: Iterable[Source], device: torch.device) -> None:
    """Compile on threads what will be launched on a device; a launch waits for its own kernel only."""
    _builds.start(sources, _target(device))


# torch has no way to unload a module, and a plan has a kernel for each layer
@cache
def compiled(source: Source, shared_bytes: int, device: torch.device) -> Kernel:
    """The kernel of a source for a device; compiled once, also by earlier processes."""
    if not hasattr(torch.cuda, "_compile_kernel"):
        raise KVSightError(
            f"kernels are compiled by torch 2.9 or newer; this is torch {torch.__version__}."
        )
    binary = _builds.binary(source, _target(device))
    with torch.cuda.device(device):
        found: Any = torch.cuda._utils._cuda_load_module(binary, [source.name])
        kernel = found[source.name]
        kernel.set_shared_memory_config(shared_bytes)
    return Kernel(kernel.func, shared_bytes, device)
