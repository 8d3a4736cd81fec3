"""What every benchmark records, and how it loads its model."""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import kvsight
from kvsight import assets
from kvsight.atomic import replace_file
from kvsight.text import read_text, windows


def parser(description: str) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--model", default=None, help="transformers directory or hub name")
    out.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    out.add_argument("--json", type=Path, default=None, help="write the result to this file")
    return out


def calibration_ids(tokenizer: Any, files: Sequence[Path], tokens: int) -> torch.Tensor:
    """Windows [n, 1024], the same number from each file, or from the embedded text without files."""
    texts = [read_text(path) for path in files] or [assets.text("calibration")]
    share = tokens // 1024 // len(texts)
    return torch.cat([windows(tokenizer, text, 1024, share) for text in texts])


def environment() -> dict[str, Any]:
    """Where and when a number was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "kvsight": kvsight.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "kernels": _kernels(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _driver() -> str | None:
    """Version of the NVIDIA driver, if there is one."""
    if not torch.cuda.is_available():
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip()


def _kernels() -> str:
    """A hash of the CUDA sources, which change more often than the version."""
    sources = sorted(Path(kvsight.__file__).parent.glob("ops/**/*.cu*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def milliseconds(run: Callable[[], object]) -> float:
    """Of ``run`` on the current CUDA stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def wall_milliseconds(run: Callable[[], object]) -> float:
    """Of ``run`` on the host."""
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def write(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        with replace_file(path) as scratch:
            scratch.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
