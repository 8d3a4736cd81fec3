"""`kvsight bench`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsight.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    load,
    model_of,
    read_windows,
)
from kvsight.console import STDOUT, guarded, print_table, progress, write_json
from kvsight.errors import KVSightError

if TYPE_CHECKING:
    from kvsight.plan import Plan
    from kvsight.records import Records

_KINDS = ("memory", "speed", "break_even")
_QUICK_BITS = 3.0


@guarded
def bench_command(
    plans: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PLAN]...",
            help="Directories of plans of one model.",
            show_default="sight at 3 bits, fitted on the spot",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Keep the records in this directory, and go on from what it holds."
        ),
    ] = None,
    model: ModelOption = None,
    contexts: Annotated[str, typer.Option(help="Context lengths, with commas.")] = "512,1024,2048",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    memory_budget: Annotated[
        str, typer.Option(help="Fill this much with the longest context and the largest batch.")
    ] = "256MB",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = None,
) -> None:
    """Measure memory and speed of plans against the uncompressed cache."""
    from kvsight.eval.caches import arm_of
    from kvsight.eval.conditions import shared_conditions
    from kvsight.eval.running import Bench, Settings, measure
    from kvsight.plan import Plan
    from kvsight.records import Conditions, Records

    settings = Settings(_lengths(contexts), batch, parse_bytes(memory_budget))
    loaded = [Plan.load(path) for path in plans or ()]
    with progress() as update, _directory(output) as directory:
        source = model_of(loaded[0], model) if loaded else model or ""
        network, tokenizer = load(source, update, device, dtype)
        if not loaded:
            typer.echo(f"kvsight: no plan given; fitting sight at {_QUICK_BITS:g} bits", err=True)
            loaded = [_quick_plan(network, tokenizer, update)]
        ids = read_windows(tokenizer, None, "evaluation", 1024, 2).flatten()
        bench = Bench(network, tuple(map(arm_of, loaded)), ids, settings)
        name = Path(source).name if Path(source).is_dir() else source
        shared = shared_conditions(network, name or "pico-8m")
        records = Records.open(directory, Conditions("bench", shared, bench.own_conditions()))
        measure(bench, records, update)
    if json is not None:
        write_json([row for kind in _KINDS for row in records.of(kind)], json)
    if json != STDOUT:
        _print(records)


def parse_bytes(text: str) -> int:
    """Bytes of "256MB", "1.5 GiB" or "4096": units of 1000, or of 1024 with an i."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", text.lower())
    size = 0
    if found is not None:
        number, unit, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))
    if size < 1:
        raise KVSightError(f"a memory budget is a size such as 256MB or 1.5GiB; got {text!r}.")
    return size


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted(int(part) for part in text.split(",")))
    except ValueError:
        raise KVSightError(f"--contexts takes lengths with commas, 512,1024; got {text!r}.") from None


@contextmanager
def _directory(output: Path | None) -> Iterator[Path]:
    """Where records go: as asked, or nowhere that lasts."""
    from tempfile import TemporaryDirectory

    if output is not None:
        yield output
        return
    with TemporaryDirectory() as scratch:
        yield Path(scratch)


def _quick_plan(network: Any, tokenizer: Any, update: Any) -> "Plan":
    from kvsight.fit import fit

    ids = read_windows(tokenizer, None, "calibration", 1024, 8)
    return fit(network, ids.split(1), bits=_QUICK_BITS, progress=update)


def _print(records: "Records") -> None:
    header = ("arm", "tokens", "cache", "resident", "prefill", "coding", "ms per token, 10 to 90 %")
    print_table(header, [_row(records, row) for row in records.of("speed")], "memory and speed")
    fits = [row for row in records.of("memory") if row["key"][1] == "fit"]
    size = f"{fits[0]['budget_bytes'] / 1e6:,.4g} MB"
    columns = ("arm", "longest context", f"largest batch of {fits[0]['at_length']:,}")
    rows = [(row["arm"], _count(row["longest_context"]), _count(row["largest_batch"])) for row in fits]
    print_table(columns, rows, f"what {size} of cache hold")
    for row in records.of("break_even"):
        where = "at no measured context" if row["tokens"] is None else f"from {row['tokens']:,} tokens on"
        typer.echo(f"{row['arm']} decodes no slower than uncompressed {where}")


def _row(records: "Records", row: dict[str, Any]) -> tuple[str, ...]:
    took = records.get("memory", (row["arm"], row["tokens"]))
    assert took is not None, "memory is measured before speed"
    decode = row["decode_ms_per_token"]
    resident = took["resident_bytes"]
    return (
        row["arm"],
        f"{row['tokens']:,}",
        f"{took['cache_bytes'] / 1e6:.2f} MB",
        "" if resident is None else f"{resident / 1e6:.2f} MB",
        f"{row['prefill_ms']['median']:.1f} ms",
        f"{row['encode_ms']['median']:.1f} ms",
        f"{decode['median']:.2f} ({decode['low']:.2f} to {decode['high']:.2f})",
    )


def _count(number: int | None) -> str:
    return "any" if number is None else f"{number:,}"
