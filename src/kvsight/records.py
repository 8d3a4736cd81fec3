"""Measured numbers with their provenance: an append-only JSON-lines file that a killed run continues.

Line kinds: ``provenance`` says under which conditions a command measured, every other line is one
record with a ``key`` that names what was measured. Numbers of different models, texts or versions never
share a file: opening one under other conditions is refused.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kvsight.errors import KVSightError

FILE = "records.jsonl"
Row = dict[str, Any]
Key = tuple[str | int | float, ...]


@dataclass(frozen=True)
class Conditions:
    """Under which a command measures: ``shared`` holds for the whole file, ``own`` for the command."""

    command: str
    shared: Mapping[str, str | int | float]
    own: Mapping[str, str | int | float]


@dataclass(frozen=True, eq=False)
class Records:
    """The records of one directory, in the order of measuring; ``append`` is on disk when it returns."""

    path: Path
    rows: list[Row]
    _keys: dict[tuple[str, Key], Row] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """What is there; a missing file or a damaged line raises ``KVSightError``."""
        path = directory / FILE
        if not path.is_file():
            raise KVSightError(f"{directory} has no {FILE}; run `kvsight compare -o {directory}` first.")
        rows = [_parse(path, number, line) for number, line in _whole_lines(path)]
        return cls(path, rows, {_identity(row): row for row in rows if row["kind"] != "provenance"})

    @classmethod
    def open(cls, directory: Path, conditions: Conditions) -> Self:
        """Start or continue the file. A line that a killed run left unfinished is dropped.

        Raises ``KVSightError`` where the file was measured under other conditions.
        """
        path = directory / FILE
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            path.touch()
        _drop_torn_end(path)
        records = cls.read(directory)
        _check(records, conditions)
        if not any(row["command"] == conditions.command for row in records.of("provenance")):
            records._write({"kind": "provenance", **_plain(conditions)})
        return records

    def of(self, kind: str) -> Iterator[Row]:
        """All records of a kind."""
        return (row for row in self.rows if row["kind"] == kind)

    def get(self, kind: str, key: Key) -> Row | None:
        """The record of this name, or None while it is unmeasured."""
        return self._keys.get((kind, key))

    def append(self, kind: str, key: Key, content: Mapping[str, Any]) -> Row:
        """Add one record; a name is measured once."""
        if (kind, key) in self._keys:
            raise KVSightError(f"{self.path} already holds {kind} {key}; records are never rewritten.")
        row = {"kind": kind, "key": list(key), **content}
        self._write(row)
        self._keys[kind, key] = row
        return row

    def _write(self, row: Row) -> None:
        # one write, so that a kill leaves at most one torn line
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())
        self.rows.append(row)


def _whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line:
            yield number, line.decode("utf-8", errors="replace")


def _parse(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict) or "kind" not in row or (row["kind"] != "provenance" and "key" not in row):
        raise KVSightError(f"{path}, line {number}: not a record. Mend or delete the line, then run again.")
    return row


def _identity(row: Row) -> tuple[str, Key]:
    return row["kind"], tuple(row["key"])


def _drop_torn_end(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("rb+") as file:
            file.truncate(whole)


def _plain(conditions: Conditions) -> Row:
    return {
        "command": conditions.command,
        "shared": dict(conditions.shared),
        "own": dict(conditions.own),
    }


def _check(records: Records, conditions: Conditions) -> None:
    for row in records.of("provenance"):
        pairs = [(row["shared"], conditions.shared)]
        if row["command"] == conditions.command:
            pairs.append((row["own"], conditions.own))
        for there, here in pairs:
            for name in sorted({*there, *here}):
                if there.get(name) != here.get(name):
                    raise KVSightError(
                        f"{records.path} was measured with {name} {there.get(name)!r}; this run has "
                        f"{here.get(name)!r}. Choose another -o, or repeat the former conditions."
                    )
