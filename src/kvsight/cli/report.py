"""`kvsight report`."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsight.console import guarded
from kvsight.errors import KVSightError

if TYPE_CHECKING:
    pass


@guarded
def report_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of records.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page.", show_default="DIR/report.html")
    ] = None,
) -> None:
    """Make one page of what compare, tasks and bench measured, and its figures as SVG and PNG."""
    if find_spec("matplotlib") is None:
        raise KVSightError("a report needs matplotlib; run: pip install 'kvsight[report]'.")
    from kvsight.report.build import build

    report = build(directory, output)
    typer.echo(str(report.path))
    for line in report.headlines:
        typer.echo(line)
