"""`kvsight compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsight.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    TextOption,
    lasting,
    load,
    read_windows,
)
from kvsight.console import STDOUT, guarded, print_table, progress, write_json

if TYPE_CHECKING:
    from kvsight.records import Records


@guarded
def compare_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the records.", show_default=False)
    ],
    model: ModelArgument = None,
    bits: Annotated[str, typer.Option(help="Budgets in stored bits per cached element.")] = "2,2.5,3,4",
    methods: Annotated[
        str, typer.Option(help="all, or names with options: sight,int:axis=channel,quanto.")
    ] = "all",
    text: TextOption = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file. Repeatable.", show_default="embedded text"),
    ] = None,
    windows: Annotated[int, typer.Option(min=2, help="Judge on this many at most.")] = 6,
    length: LengthOption = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="Calibrate on this many at most.")] = 65_536,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = None,
) -> None:
    """Measure methods at the same stored bits on the same text. A killed run is continued."""
    from kvsight.eval.arms import budgets, contenders, named

    who, skipped = contenders(methods)
    asked = budgets(bits)
    for line in skipped:
        typer.echo(f"kvsight: {line}", err=True)
    from torch import cat, get_num_threads

    from kvsight.eval.compare import Texts, compare
    from kvsight.eval.conditions import shared_conditions
    from kvsight.records import Conditions, Records

    files: list[Path | None] = [*calibration] if calibration else [None]
    with progress() as update:
        network, tokenizer = load(model or "", update, device, dtype)
        share = max(1, tokens // length // len(files))
        seen = cat([read_windows(tokenizer, path, "calibration", length, share) for path in files])
        judged = read_windows(tokenizer, text, "evaluation", length, windows)
        names = ", ".join(_name(path) for path in files), _name(text)
        texts = Texts(seen, judged, names)
        own = {
            **texts.conditions(),
            "methods": named(who),
            "bits": ", ".join(f"{b:g}" for b in asked),
            "threads": get_num_threads(),
        }
        shared = shared_conditions(network, Path(lasting(model)).name or "pico-8m")
        records = Records.open(output, Conditions("compare", shared, own))
        provenance = {"model": lasting(model), "text": names[0]}
        compare(network, texts, who, asked, records, provenance=provenance, progress=update)
    if json is not None:
        write_json(_summary(records), json)
    if json != STDOUT:
        _print(records, f"{shared['model']} on {len(judged)} windows of {length:,} tokens of {names[1]}")


def _name(path: Path | None) -> str:
    return "embedded" if path is None else path.name


def _summary(records: "Records") -> dict[str, Any]:
    """What was measured, without its windows and maps."""
    rows = [
        {n: v for n, v in row.items() if n not in ("kind", "key", "windows")} for row in _sorted(records)
    ]
    plain = {
        kind: [{n: v for n, v in row.items() if n not in ("kind", "key")} for row in records.of(kind)]
        for kind in ("refused", "pair")
    }
    return {"rows": rows, **plain, "frontier": sorted(_best(records))}


def _sorted(records: "Records") -> list[dict[str, Any]]:
    """By budget, the best first; the uncompressed model last."""
    return sorted(records.of("quality"), key=lambda r: (r["budget"] or 16.0, r["kl"]["mean"]))


def _best(records: "Records") -> set[str]:
    from kvsight.eval.compare import quality_rows
    from kvsight.eval.frontier import frontier

    rows = quality_rows(records)
    return {rows[i]["arm"] for i in frontier([(r["true_bits"], r["kl"]["mean"]) for r in rows])}


def _print(records: "Records", title: str) -> None:
    best = _best(records)
    header = ("arm", "bits", "KL (95 % interval)", "KL p99", "perplexity", "same top", "agree", "coding µs")
    print_table(header, [_cells(row, row["arm"] in best) for row in _sorted(records)], title)
    typer.echo("* no other arm has both fewer bits and less KL")
    for row in records.of("refused"):
        typer.echo(f"{row['arm']} refused: {row['reason']}")
    for row in records.of("pair"):
        typer.echo(_verdict(row))


def _cells(row: dict[str, Any], best: bool) -> tuple[str, ...]:
    # what rounding alone costs is not worth its digits
    kl = "0" if abs(row["kl"]["mean"]) < 1e-9 else f"{row['kl']['mean']:.3g}"
    if row["kl"]["low"] is not None and kl != "0":
        kl += f" ({row['kl']['low']:.3g} to {row['kl']['high']:.3g})"
    coding = (row["encode_us_per_token"], row["decode_us_per_token"])
    return (
        f"{row['arm']}{' *' if best else ''}",
        f"{row['true_bits']:.3f}",
        kl,
        "0" if kl == "0" else f"{row['kl_p99']:.3g}",
        f"{row['perplexity']['mean']:.2f}",
        f"{100 * row['same_top']['mean']:.1f} %",
        f"{row['agreement']['mean']:.1f}/{row['agreement_cap']}",
        " + ".join("?" if us is None else f"{us:.0f}" for us in coding),
    )


def _verdict(row: dict[str, Any]) -> str:
    difference, saved = row["difference"], row["bits_saved"]
    word = "more" if difference["mean"] >= 0 else "less"
    line = (
        f"{row['budget']:g} bits: {row['peer']} (stores {row['peer_bits']:.3f}) costs "
        f"{abs(difference['mean']):.4g} {word} KL than {row['ours']}"
    )
    if difference["low"] is not None:
        line += f" (paired difference {difference['low']:.4g} to {difference['high']:.4g})"
    return line if saved is None else f"{line}; bits saved at equal KL: {saved:.2f}"
