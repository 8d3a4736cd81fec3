"""Colours by role, for light and for dark. Figures are drawn in the light ones, each of them unique, so
that a page can put a CSS variable in a colour's place."""

from collections.abc import Mapping, Sequence

LIGHT: Mapping[str, str] = {
    "ink": "#1b2027",
    "muted": "#5b6571",
    "line": "#d3d9e0",
    "page": "#fefefe",
    "ours": "#0b62d6",
    "key": "#0d7d86",
    "value": "#c4500a",
    "other1": "#b4470f",
    "other2": "#187a3a",
    "other3": "#7d4bd1",
    "other4": "#8a6400",
    "other5": "#bf2f6f",
    "other6": "#0f7480",
    "other7": "#a02c2c",
    "other8": "#59677a",
}
DARK: Mapping[str, str] = {
    "ink": "#e7ecf2",
    "muted": "#a0abb8",
    "line": "#3a434e",
    "page": "#12161c",
    "ours": "#5aa2ff",
    "key": "#45c4cf",
    "value": "#ff9654",
    "other1": "#f0904f",
    "other2": "#4cc774",
    "other3": "#b794ff",
    "other4": "#d9b23c",
    "other5": "#ff84b7",
    "other6": "#4cc3d1",
    "other7": "#ff8480",
    "other8": "#a3b3c7",
}
_OTHERS = tuple(name for name in LIGHT if name.startswith("other"))


def colours(names: Sequence[str], ours: Sequence[str]) -> dict[str, str]:
    """A light colour for every name, ours apart from the others'."""
    others = [name for name in names if name not in ours]
    given = {name: LIGHT[_OTHERS[i % len(_OTHERS)]] for i, name in enumerate(others)}
    return given | dict.fromkeys(ours, LIGHT["ours"])


def variables(theme: Mapping[str, str]) -> str:
    """As CSS declarations."""
    return " ".join(f"--{name}: {value};" for name, value in theme.items())


def themed(svg: str) -> str:
    """An SVG drawn in the light colours, with the page's variables in their place."""
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    return svg
