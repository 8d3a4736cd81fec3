"""`kvsight fit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsight.cli.headline import headline, summary
from kvsight.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    TextOption,
    lasting,
    load,
    parse_method,
    parse_options,
    read_windows,
)
from kvsight.console import STDOUT, guarded, progress, write_json
from kvsight.errors import KVSightError

if TYPE_CHECKING:
    pass


@guarded
def fit_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the new plan.", show_default=False)
    ],
    model: ModelArgument = None,
    bits: Annotated[float | None, typer.Option(help="Stored bits per cached element.")] = None,
    key_bits: Annotated[float | None, typer.Option(help="The same for K alone.")] = None,
    value_bits: Annotated[float | None, typer.Option(help="The same for V alone.")] = None,
    method: Annotated[
        str, typer.Option(help="A name from `kvsight methods`, or one per side: k=NAME,v=NAME.")
    ] = "sight",
    option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the method: name=value. Repeatable.", show_default=False),
    ] = None,
    bytes_: Annotated[
        float | None, typer.Option("--bytes", help="Budget in bytes per token, instead of bits.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Instead of a budget: the smallest plan within this KL.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Text for --max-kl.", show_default="the last eighth of --text"),
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            help="measured, uniform, ratequant, rdkv, weight-norm, weight-norm-spectral or -group.",
            show_default="measured for sight, else uniform",
        ),
    ] = None,
    propagation: Annotated[
        str, typer.Option(help="How damage is followed to the output: gradient, perturbation, none.")
    ] = "gradient",
    min_head_bits: Annotated[float, typer.Option(help="Least bits of any head.")] = 0.0,
    rows: Annotated[
        str, typer.Option(help="free; heads or layers: row sizes that must be equal.")
    ] = "free",
    format_: Annotated[
        list[str] | None,
        typer.Option("--format", help="Allow this format (row, grouped, dense, ...). Repeatable."),
    ] = None,
    protect: Annotated[list[int] | None, typer.Option(help="Keep this layer exact. Repeatable.")] = None,
    sinks: Annotated[
        int | None,
        typer.Option(min=0, help="First tokens kept exact.", show_default="chosen within the budget"),
    ] = None,
    window: Annotated[int, typer.Option(min=0, help="Last tokens kept exact.")] = 0,
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Calibrate on this many at most.")] = 65_536,
    length: LengthOption = 1024,
    positions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest context in tokens that will be served, if longer than --length.",
            show_default="that of --length",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = None,
) -> None:
    """Fit a plan to a model: which codec where, within a budget of stored bits."""
    from kvsight.fit import Constraints, fit
    from kvsight.methods import get

    options = parse_options(option or ())
    named = parse_method(method)
    limits = Constraints(min_head_bits, rows, tuple(format_) if format_ else None, tuple(protect or ()))
    for name in {named} if isinstance(named, str) else set(named.values()):
        get(name)  # a typing error should not cost the loading of a model
    if output.exists() and not (output / "plan.json").is_file():
        raise KVSightError(f"{output} exists and is not a plan; choose another --output.")
    with progress() as update:
        network, tokenizer = load(model or "", update, device, dtype)
        ids = read_windows(tokenizer, text, "calibration", length, max(1, tokens // length))
        judge = None
        if validation is not None:
            judge = read_windows(tokenizer, validation, "evaluation", length, 8).split(1)
        plan = fit(
            network,
            ids.split(1),
            bits=bits,
            key_bits=key_bits,
            value_bits=value_bits,
            bytes=bytes_,
            max_kl=max_kl,
            validation=judge,
            method=named,
            options=options,
            allocate=allocate,
            constraints=limits,
            propagation=propagation,
            sinks=sinks,
            window=window,
            positions=positions,
            progress=update,
            provenance={
                "model": lasting(model),
                "text": "embedded" if text is None else str(text),
            },
        )
        plan.save(output)
    if json is not None:
        write_json({"plan": str(output), **summary(plan)}, json)
    if json != STDOUT:
        typer.echo(f"{output}: {headline(plan)}, calibrated on {ids.numel():,} tokens")
