"""How figures are drawn: their style, and their bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from kvsight.report.theme import LIGHT

# inches: of a screen, of a phone
WIDE, NARROW = 7.4, 3.7
_DPI = 160


@dataclass(frozen=True)
class Drawing:
    """A figure by name; ``alt`` says in words what it shows, ``draw`` makes it for a width in inches."""

    name: str
    alt: str
    draw: Callable[[float], Figure]


@dataclass(frozen=True)
class Drawn:
    """A drawing's bytes: SVG documents for a screen and for a phone, and a picture of the first.

    Text stays text. The same records give the same bytes.
    """

    name: str
    alt: str
    wide: str
    narrow: str
    png: bytes


def draw(drawing: Drawing) -> Drawn:
    with _style(f"{drawing.name} wide"):
        figure = drawing.draw(WIDE)
        wide = _svg(figure)
        # placed once: the layout is half of the time
        figure.set_layout_engine("none")
        picture = _png(figure)
    with _style(f"{drawing.name} narrow"):
        narrow = _svg(drawing.draw(NARROW))
    return Drawn(drawing.name, drawing.alt, wide, narrow, picture)


def _svg(figure: Figure) -> str:
    out = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    return out.getvalue()


def _png(figure: Figure) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return out.getvalue()


@contextmanager
def _style(salt: str) -> Iterator[None]:
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 8.5,
        "axes.labelsize": 8.5,
        "axes.titlesize": 8.5,
        "axes.titlelocation": "left",
        "axes.edgecolor": LIGHT["line"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.titlecolor": LIGHT["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LIGHT["line"],
        "grid.linewidth": 0.5,
        "text.color": LIGHT["ink"],
        "xtick.color": LIGHT["line"],
        "ytick.color": LIGHT["line"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["muted"],
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with matplotlib.rc_context(settings):
        yield


def canvas(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plain(x: float, _: Any = None) -> str:
    """A tick as it is read: 0.01, not 10⁻²."""
    return f"{x:g}"
