"""From a directory of records to files."""

from dataclasses import dataclass
from pathlib import Path

from kvsight.atomic import replace_file
from kvsight.records import Records
from kvsight.report.contents import contents
from kvsight.report.drawing import draw
from kvsight.report.figures import drawings
from kvsight.report.page import headlines, page


@dataclass(frozen=True)
class Report:
    """Where the page is, and what our plans cost, a line for every budget."""

    path: Path
    headlines: list[str]


def build(directory: Path, path: Path | None = None) -> Report:
    """Write the page (default: report.html in the directory) and figures/*.svg, *.png beside it.

    Raises ``KVSightError`` where the directory holds no measurements.
    """
    found = contents(Records.read(directory))
    path = directory / "report.html" if path is None else path
    figures = [draw(drawing) for drawing in drawings(found)]
    for figure in figures:
        _write(path.parent / "figures" / f"{figure.name}.svg", figure.wide.encode())
        _write(path.parent / "figures" / f"{figure.name}.png", figure.png)
    _write(path, page(found, figures).encode())
    return Report(path, headlines(found))


def _write(path: Path, content: bytes) -> None:
    with replace_file(path) as scratch:
        scratch.write_bytes(content)
