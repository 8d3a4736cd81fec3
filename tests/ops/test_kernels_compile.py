"""Kernels pass Triton's compiler, not only its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interpreter import DEVICE, available

HERE = Path(__file__).parent


@available
@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile them")
def test_every_kernel_compiles(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, HERE / "compiling.py"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["attend_splits", "merge_splits"] * 4 + ["encode_rows"] * 2
