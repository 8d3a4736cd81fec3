"""`kvsight show`."""

from typing import TYPE_CHECKING, Any

import typer

from kvsight.cli.headline import headline, summary
from kvsight.cli.options import JsonOption, PlanArgument
from kvsight.console import STDOUT, guarded, print_table, write_json

if TYPE_CHECKING:
    from kvsight.plan import Plan

_BITS = ("data_bits", "meta_bits", "window_bits", "true_bits")


@guarded
def show_command(plan: PlanArgument, json: JsonOption = None) -> None:
    """Show what a plan stores, layer by layer, and where it came from."""
    from kvsight.plan import Plan

    loaded = Plan.load(plan)
    layers = _layers(loaded)
    if json is not None:
        content = {**summary(loaded), "provenance": dict(loaded.provenance), "layers": layers}
        write_json(content, json)
    if json == STDOUT:
        return
    header = ("layer", "side", "codec", "format", "data", "meta", "exact", "bits", "bytes")
    rows = [
        (
            *(str(row[name]) for name in ("layer", "side", "codec", "format")),
            *(f"{row[name]:.3f}" for name in _BITS),
            f"{row['bytes']:,}",
        )
        for row in layers
    ]
    print_table(header, rows, f"{plan}: {headline(loaded)}", text_columns=4)
    size = loaded.nbytes(loaded.reference_length)
    static = loaded.ledger().static_bytes
    typer.echo(f"{size:,} bytes for {loaded.reference_length:,} tokens; {static:,} static bytes")
    for name, value in sorted(loaded.provenance.items()):
        typer.echo(f"{name}: {value or 'embedded'}")


def _layers(plan: "Plan") -> list[dict[str, Any]]:
    """One row per layer and side: bits averaged over its heads, bytes at the reference length."""
    from kvsight.plan import SIDES

    ledger = plan.ledger()
    out: list[dict[str, Any]] = []
    for layer, side in ((layer, side) for layer in plan.layers for side in SIDES):
        heads = [row for row in ledger if (row.layer, row.side) == (layer.index, side)]
        bits = {name: sum(getattr(row, name) for row in heads) / len(heads) for name in _BITS}
        width = sum(len(p.heads) * p.codec.dim for p in layer.side(side))
        elements = width * plan.stored(layer, side, plan.reference_length).visible
        out.append(
            {
                "layer": layer.index,
                "side": side,
                "codec": ", ".join(sorted({row.codec for row in heads})),
                "format": ", ".join(sorted({row.format for row in heads})),
                **bits,
                "bytes": round(bits["true_bits"] * elements / 8),
            }
        )
    return out
