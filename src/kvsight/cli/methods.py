"""`kvsight methods`."""

from typing import TYPE_CHECKING

import typer

from kvsight.cli.options import JsonOption
from kvsight.console import STDOUT, guarded, write_json

if TYPE_CHECKING:
    pass


@guarded
def methods_command(json: JsonOption = None) -> None:
    """List what `fit --method` takes, with its options and their defaults."""
    from kvsight.methods import available

    infos = list(available().values())
    if json is not None:
        content = [
            {"name": i.name, "summary": i.summary, "paper": i.paper, "options": dict(i.options)}
            for i in infos
        ]
        write_json(content, json)
    if json == STDOUT:
        return
    for info in infos:
        typer.echo(f"{info.name}: {info.summary}")
        if info.paper:
            typer.echo(f"    {info.paper}")
        for name, default in info.options.items():
            typer.echo(f"    --option {name}={default}")
