"""CUDA kernels compiled for the host, with an emulator of their intrinsics."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from kvsight.ops.builds import Source

HERE = Path(__file__).parent / "kernels"


def builder(directory):
    """build(harness, sources, macros) gives launch(grid, arguments, shared_bytes)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")

    @cache
    def build(harness, sources, macros):
        out = directory / f"{harness}{abs(hash((sources, macros)))}.so"
        source = out.with_suffix(".cu")
        source.write_text(Source(sources, "", macros).text)
        options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f'-DKERNEL="{source}"']
        numbers = [f"-D{name}={value}" for name, value in macros if name == "NUMBER"]
        subprocess.run([compiler, *options, *numbers, "-o", out, HERE / harness], check=True)
        library = ctypes.CDLL(str(out))

        def launch(grid, arguments, shared_bytes):
            library.launch(*grid, ctypes.byref(arguments), ctypes.c_long(shared_bytes))

        return launch

    return build
