"""CUDA C++ compiled at run time by NVRTC through torch, and launched with one structure as its argument."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvsight.errors import KVSightError

# what kernels call the types of keys, values and queries
NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
NUMBERS_SOURCE = Path(__file__).with_name("numbers.cuh")
# what a multiprocessor has of shared memory since Hopper, and what every block takes of it unasked
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024


@dataclass(frozen=True)
class Kernel:
    """A kernel on one device, and the dynamic shared memory [bytes] that its blocks get."""

    function: Any
    shared_bytes: int

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Queue it on torch's current stream."""
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = _launcher()(self.function, *grid, threads, 1, 1, self.shared_bytes, stream, parameters, None)
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


def joined(sources: Sequence[Path], macros: tuple[tuple[str, int | str], ...]) -> str:
    """The text of source files, one behind another, after definitions of macros."""
    defined = "".join(f"#define {name} {value}\n" for name, value in macros)
    return defined + "\n".join(source.read_text(encoding="utf-8") for source in sources)


@lru_cache(maxsize=256)
def compiled(
    sources: tuple[Path, ...], name: str, macros: tuple[tuple[str, int | str], ...], shared_bytes: int
) -> Kernel:
    """The kernel ``name`` of joined sources for the current device; compiled once per set of macros."""
    if not hasattr(torch.cuda, "_compile_kernel"):
        raise KVSightError(
            f"kernels are compiled by torch 2.9 or newer; this is torch {torch.__version__}."
        )
    kernel = torch.cuda._compile_kernel(joined(sources, macros), name)
    kernel.set_shared_memory_config(shared_bytes)
    return Kernel(kernel.func, shared_bytes)
