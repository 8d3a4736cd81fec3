"""What the commands share: progress, one-line failures, tables and files. Nothing here computes."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvsight.atomic import replace_file
from kvsight.errors import KVSightError

P = ParamSpec("P")
R = TypeVar("R")

STDOUT = Path("-")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """The command, with every failure as one line on stderr: exit code 1, or 130 for Ctrl-C.

    Under ``python -X dev -m kvsight`` anything that is not the user's mistake keeps its traceback.
    """

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            line, code = "interrupted", 130
        except BrokenPipeError:
            raise  # the reader of stdout left: typer ends quietly
        except KVSightError as error:
            line, code = str(error), 1
        except OSError as error:
            line, code = f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            line = f"unexpected {type(error).__name__}: {error} (traceback: python -X dev -m kvsight)"
            code = 1
        typer.echo(f"kvsight: {' '.join(line.split())}", err=True)
        raise typer.Exit(code)

    return wrapper


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields update(stage, done, total), which draws one bar per stage on a terminal's stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal  # else rich leaves an empty line in logs
    clock = TimeElapsedColumn()
    with Progress(*columns, clock, console=console, transient=True, disable=hidden) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str, text_columns: int = 1
) -> None:
    """Print rows on stdout; the first columns are text, the others are numbers."""
    out = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        out.add_column(name, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        out.add_row(*row)
    # A pipe has no width: rich would cut the columns at 80.
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(out)


def write_json(content: Mapping[str, Any] | Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write JSON to a file, whole or not at all; the path "-" is stdout."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    if path == STDOUT:
        typer.echo(text)
        return
    if path.exists() and not path.is_file():
        path.write_text(text + "\n", encoding="utf-8")  # a pipe or a device, never to be replaced
        return
    with replace_file(path) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")
