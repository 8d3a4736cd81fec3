"""Kernels are compiled once: by one thread of many, and not where an earlier process kept them."""

import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch

from kvsight.ops import nvrtc
from kvsight.ops.binaries import Binaries, kernel_folder
from kvsight.ops.builds import Builds, Source, Target

HOPPER = Target("NVRTC 13.0", ("--gpu-architecture=sm_90",))
NOWHERE = Binaries(lambda: None)


def source(name, *macros):
    return Source((), name, macros)


class Compiler:
    """Stands for NVRTC: counts, and can be held up."""

    def __init__(self):
        self.calls, self.broken = [], False
        self.going = threading.Event()
        self.going.set()

    def __call__(self, text, name, options):
        self.calls.append(name)
        assert self.going.wait(10)
        if self.broken:
            raise ValueError(f"no {name}")
        return f"{name} {text} {options}".encode()


@pytest.fixture
def compiler():
    return Compiler()


def finished(builds):
    """Wait for the threads."""
    until = time.monotonic() + 10
    while builds._workers:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_source_has_its_macros_first(tmp_path):
    files = tmp_path / "a.cuh", tmp_path / "b.cu"
    for file in files:
        file.write_text(f"{file.stem} µ")
    text = Source(files, "f", (("N", 3), ("LIST", "KIND(0)"))).text
    assert text == "#define N 3\n#define LIST KIND(0)\na µ\nb µ"


def test_whoever_asks_it_is_built_once(compiler):
    compiler.going.clear()
    builds = Builds(compiler, NOWHERE, workers=3)
    names = [f"k{i}" for i in range(6)]
    builds.start([source(name) for name in names], HOPPER)
    got = {}

    def ask(i):
        got[i] = [builds.binary(source(name), HOPPER) for name in names]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    builds.start([source(name) for name in names], HOPPER)
    compiler.going.set()
    for thread in threads:
        thread.join()
    finished(builds)
    assert sorted(compiler.calls) == names
    assert [binary.split()[0].decode() for binary in got[0]] == names
    assert all(binaries == got[0] for binaries in got.values())


def test_threads_build_side_by_side_in_order_and_end(compiler):
    compiler.going.clear()
    builds = Builds(compiler, NOWHERE, workers=2)
    before = threading.active_count()
    builds.start([source(f"k{i}") for i in range(5)], HOPPER)
    assert threading.active_count() == before + 2
    until = time.monotonic() + 10
    while len(compiler.calls) < 2:
        assert time.monotonic() < until
    assert set(compiler.calls) == {"k0", "k1"}
    # nobody waits for what no thread has begun
    threading.Timer(0.01, compiler.going.set).start()
    builds.binary(source("k4"), HOPPER)
    finished(builds)
    assert sorted(compiler.calls) == ["k0", "k1", "k2", "k3", "k4"]
    assert compiler.calls.index("k2") < compiler.calls.index("k3")


def test_what_fails_on_a_thread_fails_where_it_is_wanted(compiler, tmp_path):
    compiler.broken = True
    builds = Builds(compiler, Binaries(lambda: tmp_path), workers=1)
    builds.start([source("bad"), source("worse")], HOPPER)
    finished(builds)
    for _ in range(2):
        with pytest.raises(ValueError, match="no bad"):
            builds.binary(source("bad"), HOPPER)
    compiler.broken = False
    assert builds.binary(source("worse"), HOPPER).startswith(b"worse")
    assert len(list(tmp_path.iterdir())) == 1


def test_another_process_reads_what_one_compiled(compiler, tmp_path):
    kept = Binaries(lambda: tmp_path / "not yet" / "there")
    first = Builds(compiler, kept).binary(source("k"), HOPPER)
    builds = Builds(compiler, kept, workers=1)
    builds.start([source("k")], HOPPER)
    finished(builds)
    assert builds.binary(source("k"), HOPPER) == first
    assert compiler.calls == ["k"]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_compiled_again(damage, compiler, tmp_path):
    kept = Binaries(lambda: tmp_path)
    wanted = Builds(compiler, kept).binary(source("k"), HOPPER)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert Builds(compiler, kept).binary(source("k"), HOPPER) == wanted
    assert Builds(compiler, kept).binary(source("k"), HOPPER) == wanted
    assert compiler.calls == ["k", "k"]


def test_all_that_matters_is_in_the_key(compiler, tmp_path):
    kept = Binaries(lambda: tmp_path)
    subjects = [
        (source("k"), HOPPER),
        (source("l"), HOPPER),
        (source("k", ("N", 1)), HOPPER),
        (source("k"), Target(HOPPER.compiler, ("--gpu-architecture=sm_100",))),
        (source("k"), Target("NVRTC 12.8", HOPPER.options)),
    ]
    for subject in subjects:
        Builds(compiler, kept).binary(*subject)
    assert len(compiler.calls) == len(list(tmp_path.iterdir())) == len(subjects)
    (tmp_path / "a.cu").write_text("one")
    changing = Source((tmp_path / "a.cu",), "k", ())
    one = Builds(compiler, kept).binary(changing, HOPPER)
    (tmp_path / "a.cu").write_text("two")
    assert Builds(compiler, kept).binary(changing, HOPPER) != one


def test_a_folder_that_cannot_be_written_costs_time_only(compiler, tmp_path, caplog):
    (tmp_path / "file").touch()
    kept = Binaries(lambda: tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING, logger="kvsight"):
        for name in ("k", "k", "l"):
            assert Builds(compiler, kept).binary(source(name), HOPPER)
    assert compiler.calls == ["k", "k", "l"]
    (said,) = caplog.messages
    assert "cannot be kept in" in said and "Set KVSIGHT_CACHE" in said


def test_the_folder_keeps_what_was_used_last(tmp_path):
    kept = Binaries(lambda: tmp_path, most_bytes=3 * (100 + 32))
    keys = [f"{i:064x}" for i in range(4)]
    for i, key in enumerate(keys[:3]):
        kept.write(key, bytes(100))
        os.utime(tmp_path / key, (i, i))
    assert kept.read(keys[0]) == bytes(100)
    kept.write(keys[3], bytes(100))
    assert {path.name for path in tmp_path.iterdir()} == {keys[0], keys[2], keys[3]}
    assert kept.read(keys[1]) is None


def test_files_of_others_stay_in_the_folder(tmp_path):
    for name in ("results.bin", "0" * 63, ".config"):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, (0, 0))
    kept = Binaries(lambda: tmp_path, most_bytes=200)
    for i in range(4):
        kept.write(f"{i:064x}", bytes(100))
    assert {path.name for path in tmp_path.iterdir()} == {"results.bin", "0" * 63, ".config", f"{3:064x}"}


def test_a_kernel_is_loaded_once_however_many_there_are(monkeypatch):
    class Loaded:
        func = None

        def set_shared_memory_config(self, nbytes):
            pass

    loads = []

    def load(binary, names):
        loads.append(binary)
        return {name: Loaded() for name in names}

    monkeypatch.setattr(nvrtc, "_target", lambda device: HOPPER)
    monkeypatch.setattr(nvrtc._builds, "binary", lambda source, target: source.name.encode())
    monkeypatch.setattr(torch.cuda._utils, "_cuda_load_module", load)
    monkeypatch.setattr(torch.cuda, "_compile_kernel", None, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for _ in range(2):
        for i in range(300):
            nvrtc.compiled(source(f"loaded{i}"), 0, torch.device("cuda", 0))
    assert len(loads) == 300


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KVSIGHT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert kernel_folder() == tmp_path / ".cache" / "kvsight" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert kernel_folder() == type(tmp_path)("/x/kvsight/kernels")
    monkeypatch.setenv("KVSIGHT_CACHE", "~/own")
    assert kernel_folder() == tmp_path / "own" / "kernels"
    monkeypatch.setenv("KVSIGHT_CACHE", "")
    assert kernel_folder() is None


SLOW = """
import os, threading, time
from kvsight.ops.binaries import Binaries
from kvsight.ops.builds import Builds, Source, Target

def compile(text, name, options):
    os.write(1, f"{name} ".encode())
    begun.set()
    time.sleep(0.2)
    return b""

begun = threading.Event()
builds = Builds(compile, Binaries(lambda: None), workers=2)
builds.start([Source((), f"k{i}", ()) for i in range(200)], Target("", ()))
assert begun.wait(10)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_program_can_end_while_kernels_are_compiled():
    done = run(SLOW)
    assert done.returncode == 0, done.stderr
    # what was begun, not all of it
    assert 1 <= len(done.stdout.split()) <= 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_builds_for_itself():
    code = """
pid = os.fork()
if pid == 0:
    builds.binary(Source((), "k0", ()), Target("", ()))
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""
    done = run(f"import warnings\nwarnings.simplefilter('ignore')\n{SLOW}{code}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("k0") == 2


class Library:
    """What NVRTC does for ``compile_cuda``."""

    def __init__(self):
        self.options, self.alive = (), 0

    def nvrtcCreateProgram(self, program, text, name, *headers):
        self.alive += 1
        self.text = text
        return 0

    def nvrtcCompileProgram(self, program, count, options):
        self.options = tuple(options[:count])
        return int(b"oops" in self.text)

    def nvrtcDestroyProgram(self, program):
        self.alive -= 1
        return 0

    def __getattr__(self, name):
        found = b"line 1\nline 2\0" if "Log" in name else b"\x7fELF\0\0device code\0"

        def call(program, out):
            if name.endswith("Size"):
                out._obj.value = len(found)
            else:
                out.raw = found
            return 0

        return call


def test_device_code_comes_whole_and_a_log_with_the_error(monkeypatch):
    library = Library()
    monkeypatch.setattr(nvrtc, "_compiler", lambda: library)
    options = ("--gpu-architecture=sm_90", "-G")
    assert nvrtc.compile_cuda("fine", "f", options) == b"\x7fELF\0\0device code\0"
    assert library.options == (b"--gpu-architecture=sm_90", b"-G")
    with pytest.raises(RuntimeError, match=r"could not compile f with .*sm_90 -G: line 1\nline 2$"):
        nvrtc.compile_cuda("oops", "f", options)
    assert library.alive == 0
