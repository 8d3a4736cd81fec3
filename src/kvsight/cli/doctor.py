"""`kvsight doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvsight.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    TextOption,
    load,
    read_windows,
)
from kvsight.console import STDOUT, guarded, print_table, progress, write_json

if TYPE_CHECKING:
    from kvsight.doctor import Diagnosis


@guarded
def doctor_command(
    model: ModelArgument = None,
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Read this many at most.")] = 8192,
    length: LengthOption = 1024,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = None,
) -> None:
    """Look at a model before fitting: what its cache is like, and what that means for a plan."""
    from kvsight.doctor import examine

    with progress() as update:
        network, tokenizer = load(model or "", update, device, dtype)
        ids = read_windows(tokenizer, text, "calibration", length, max(1, tokens // length))
        diagnosis = examine(network, ids.split(1), progress=update)
    if json is not None:
        write_json(diagnosis.to_json(), json)
    if json != STDOUT:
        _print_diagnosis(diagnosis, model)


def _print_diagnosis(diagnosis: "Diagnosis", model: str | None) -> None:
    """The table, what was found and what was not, and the command to go on with; 80 columns."""
    from kvsight.doctor.layout import HEADER, LEGEND, paragraphs, rows

    figures = diagnosis.figures
    title = f"{figures.model}, {figures.tokens:,} tokens in windows of {figures.length:,}"
    print_table(HEADER, rows(figures), title, text_columns=2)
    typer.echo(LEGEND)
    for paragraph in paragraphs(diagnosis.findings, diagnosis.recommendation, model):
        typer.echo(f"\n{paragraph}")
