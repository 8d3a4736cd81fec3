"""Bits that one method saves at equal KL against others: a table from results of quality.py and peers.py.

Bits at a KL come from log-linear interpolation along a method's frontier (its configurations that no
cheaper one beats), which flatters methods of few configurations. Intervals are paired: the same windows
are drawn for both sides, with replacement.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

_TARGETS = (0.15, 0.1, 0.07, 0.05, 0.035, 0.02, 0.014, 0.01, 0.006)
_DRAWS = 2000


def main() -> None:
    options = _options()
    ours = _points([row for path in options.ours for row in _rows(path) if row["spec"] == options.spec])
    peers: dict[str, list[tuple[float, np.ndarray]]] = {}
    for path in options.peers:
        for row in _rows(path):
            peers.setdefault(str(row["peer"]), []).extend(_points([row]))
    groups = {"the best of them": list(peers.values()), **{name: [peers[name]] for name in sorted(peers)}}
    names = list(groups)
    draws = np.random.default_rng(0).integers(0, len(ours[0][1]), (_DRAWS, len(ours[0][1])))
    print("| KL | ours, bits | " + " | ".join(names) + " |")
    print("|" + "---|" * (len(names) + 2))
    rows: list[dict[str, Any]] = []
    for target in _TARGETS:
        mine = bits_at(ours, target, None)
        cells = []
        for name in names:
            found = _saved(ours, groups[name], target, draws)
            cells.append("" if found is None else "{:.2f} ({:.2f} to {:.2f})".format(*found))
            rows.append({"kl": target, "against": name, "bits": mine, "saved": found})
        print(f"| {target:g} | {mine:.2f} | " + " | ".join(cells) + " |")
    if options.json is not None:
        options.json.write_text(json.dumps({"ours": options.spec, "rows": rows}, indent=1) + "\n")


def _saved(
    ours: list[tuple[float, np.ndarray]],
    theirs: list[list[tuple[float, np.ndarray]]],
    target: float,
    draws: np.ndarray,
) -> tuple[float, float, float] | None:
    """Bits saved against the cheapest peer on all windows, and percentiles 2.5 and 97.5 over draws."""

    def saved(windows: np.ndarray | None) -> float:
        cheapest = np.array([bits_at(points, target, windows) for points in theirs])
        known = cheapest[np.isfinite(cheapest)]
        return float(known.min()) - bits_at(ours, target, windows) if len(known) else float("nan")

    whole = saved(None)
    if not np.isfinite(whole):
        return None
    low, high = np.nanpercentile(np.array([saved(d) for d in draws]), (2.5, 97.5))
    return whole, float(low), float(high)


def bits_at(points: list[tuple[float, np.ndarray]], target: float, windows: np.ndarray | None) -> float:
    """Bits where the frontier crosses a KL; NaN outside of what was measured."""
    pick = slice(None) if windows is None else windows
    frontier: list[tuple[float, float]] = []
    for bits, kl in sorted((bits, float(np.log(kl[pick].mean()))) for bits, kl in points):
        if not frontier or kl < frontier[-1][1]:
            frontier.append((bits, kl))
    rates, logs = (np.array(column) for column in zip(*frontier, strict=True))
    return float(np.interp(-np.log(target), -logs, rates, left=np.nan, right=np.nan))


def _points(rows: list[dict[str, Any]]) -> list[tuple[float, np.ndarray]]:
    return [(row["true_bits"], np.array([window["kl"] for window in row["windows"]])) for row in rows]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def _options() -> argparse.Namespace:
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out.add_argument("--ours", type=Path, nargs="+", required=True, help="results of quality.py")
    out.add_argument("--peers", type=Path, nargs="+", required=True, help="results of peers.py")
    out.add_argument("--spec", default="sight", help="which method of --ours")
    out.add_argument("--json", type=Path, default=None)
    return out.parse_args()


if __name__ == "__main__":
    main()
