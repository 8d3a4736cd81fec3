"""Compiled kernels on disk, one file each, so that the next process need not compile them."""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvsight.atomic import replace_file

_log = logging.getLogger("kvsight")
# a thousand kernels and more
_MOST_BYTES = 256 << 20
_PROOF = hashlib.sha256().digest_size
# a hash, and files that are being written
_OURS = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\..*")


def kernel_folder() -> Path | None:
    """$KVSIGHT_CACHE/kernels, else kvsight/kernels in $XDG_CACHE_HOME or ~/.cache; None to keep nothing."""
    own = os.environ.get("KVSIGHT_CACHE")
    if own == "":
        return None
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "kvsight"
    try:
        return root.expanduser() / "kernels"
    except RuntimeError:
        # nobody's home is known
        return None


class Binaries:
    """Files by key, 64 hex digits. One that cannot be read or written, or is damaged, costs time only."""

    def __init__(
        self, folder: Callable[[], Path | None] = kernel_folder, most_bytes: int = _MOST_BYTES
    ) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._said = False

    def read(self, key: str) -> bytes | None:
        """What was written, or None."""
        folder = self.folder()
        if folder is None:
            return None
        try:
            stored = (folder / key).read_bytes()
        except OSError:
            return None
        binary = stored[_PROOF:]
        if hashlib.sha256(binary).digest() != stored[:_PROOF]:
            return None
        # the latest used stay
        with suppress(OSError):
            os.utime(folder / key)
        return binary

    def write(self, key: str, binary: bytes) -> None:
        """Keep it, and drop what was not used for longest while there is too much."""
        folder = self.folder()
        if folder is None:
            return
        try:
            with replace_file(folder / key) as scratch:
                scratch.write_bytes(hashlib.sha256(binary).digest() + binary)
            self._drop(folder)
        except OSError as error:
            if not self._said:
                self._said = True
                _log.warning(
                    "compiled kernels cannot be kept in %s (%s), so every process compiles its own. "
                    "Set KVSIGHT_CACHE to a folder that can be written, or to nothing.",
                    folder,
                    error,
                )

    def _drop(self, folder: Path) -> None:
        held = 0
        for _, size, path in sorted(_files(folder), reverse=True):
            held += size
            if held > self.most_bytes:
                # what others own may stay
                with suppress(OSError):
                    path.unlink()


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """Time of last use, bytes and path of our files; others may remove some meanwhile."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _OURS.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                about = entry.stat()
                found.append((about.st_mtime, about.st_size, Path(entry.path)))
    return found
