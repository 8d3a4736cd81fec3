"""Kernels compiled once each: on threads before they are wanted, or by whoever wants them first."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from kvsight.ops.binaries import Binaries

# each takes about 50 MB while it compiles
_MOST_WORKERS = 16

Macros = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class Source:
    """The function ``name`` of CUDA C++ files, one behind another after definitions of ``macros``."""

    files: tuple[Path, ...]
    name: str
    macros: Macros

    @property
    def text(self) -> str:
        defined = "".join(f"#define {name} {value}\n" for name, value in self.macros)
        return defined + "\n".join(file.read_text(encoding="utf-8") for file in self.files)


@dataclass(frozen=True)
class Target:
    """Who compiles, with which options, and so for what."""

    compiler: str
    options: tuple[str, ...]

    def key(self, source: Source, text: str) -> str:
        """Tells apart all that can give another binary."""
        return sha256("\0".join((self.compiler, *self.options, source.name, text)).encode()).hexdigest()


Compile = Callable[[str, str, tuple[str, ...]], bytes]


class Builds:
    """Binaries of sources, by targets.

    ``compile`` takes a text, the name of its kernel and options; it runs on threads, several at a time.
    A child process may be forked once ``start`` has begun threads, or where none is building.
    """

    def __init__(self, compile: Compile, kept: Binaries, workers: int | None = None) -> None:
        self._compile, self._kept = compile, kept
        self._most_workers = workers or min(_MOST_WORKERS, _processors())
        self._forks = False
        self._clear()

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._builds: dict[tuple[Source, Target], _Build] = {}
        self._waiting: deque[_Build] = deque()
        self._workers = 0

    def start(self, sources: Iterable[Source], target: Target) -> None:
        """Build those that nobody asked for yet on threads, in this order."""
        with self._lock:
            for source in sources:
                if (source, target) not in self._builds:
                    build = self._builds[source, target] = _Build(source, target)
                    self._waiting.append(build)
            missing = min(self._most_workers, self._workers + len(self._waiting)) - self._workers
            if missing > 0 and not self._forks and hasattr(os, "register_at_fork"):
                # a child process has none of the threads
                os.register_at_fork(after_in_child=self._clear)
                self._forks = True
            # where threads cannot be had, whoever wants a kernel builds it
            with suppress(RuntimeError):
                for _ in range(missing):
                    threading.Thread(target=self._work, name="kvsight-build", daemon=False).start()
                    self._workers += 1

    def binary(self, source: Source, target: Target) -> bytes:
        """Built now, if no thread has begun to; waits for one that has. Raises what ``compile`` does."""
        with self._lock:
            build = self._builds.setdefault((source, target), _Build(source, target))
        with build.lock:
            return self._made(build)

    def _work(self) -> None:
        while True:
            with self._lock:
                # these threads are no daemons, as a compiler must not be cut off: at exit they end early
                if not self._waiting or not threading.main_thread().is_alive():
                    self._workers -= 1
                    return
                build = self._waiting.popleft()
            if build.lock.acquire(blocking=False):
                try:
                    # whoever wants it tries again, and gets the error
                    with suppress(Exception):
                        self._made(build)
                finally:
                    build.lock.release()

    def _made(self, build: "_Build") -> bytes:
        if build.binary is None:
            source, target, text = build.source, build.target, build.source.text
            key = target.key(source, text)
            build.binary = self._kept.read(key)
            if build.binary is None:
                build.binary = self._compile(text, source.name, target.options)
                self._kept.write(key, build.binary)
        return build.binary


class _Build:
    """A binary, or who is at it: ``lock`` is held meanwhile."""

    def __init__(self, source: Source, target: Target) -> None:
        self.source, self.target = source, target
        self.lock = threading.Lock()
        self.binary: bytes | None = None


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
