"""The arguments that commands share, and what they stand for."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsight import assets
from kvsight.errors import KVSightError

if TYPE_CHECKING:
    from torch import Tensor

    from kvsight.plan import Plan


ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Transformers directory or hub name.", show_default="embedded pico-8m"),
]
PlanArgument = Annotated[Path, typer.Argument(help="Directory of a plan.", show_default=False)]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Transformers directory or hub name.", show_default="the plan's model"),
]
TextOption = Annotated[Path | None, typer.Option(help="UTF-8 text file.", show_default="embedded text")]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda where there is one, else cpu"),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on cpu, else the model's own"),
]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Write JSON to this file, or to - for stdout.", show_default=False),
]


def parse_method(text: str) -> str | dict[str, str]:
    """A name for both sides, or ``k=NAME,v=NAME``."""
    if "=" not in text:
        return text
    sides = parse_options(text.split(","))
    if sides.keys() != {"k", "v"}:
        raise KVSightError(f"--method takes a name, or k=NAME,v=NAME; got {text!r}.")
    return sides


def parse_options(pairs: Iterable[str]) -> dict[str, str]:
    """name=value pairs as a mapping; the method turns the values into its own types."""
    options: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise KVSightError(f"--option takes name=value; got {pair!r}.")
        if name in options:
            raise KVSightError(f"--option {name} is given twice; give it once.")
        options[name] = value
    return options


def load(
    source: str, update: Callable[[str, int, int], None], device: str | None, dtype: str | None
) -> tuple[Any, Any]:
    """(model, tokenizer) on the device; an empty source is the embedded model."""
    from kvsight.integrations.loading import load_model, placed

    update("load", 0, 1)
    loaded = load_model(source or None, *placed(device, dtype))
    update("load", 1, 1)
    return loaded


def model_of(plan: "Plan", override: str | None) -> str:
    return plan.provenance.get("model", "") if override is None else override


def lasting(model: str | None) -> str:
    """How a plan remembers its model: a directory by its absolute path, found from anywhere."""
    if not model:
        return ""
    directory = Path(model).expanduser()
    return str(directory.resolve()) if directory.is_dir() else model


def read_windows(
    tokenizer: Any, path: Path | None, embedded: assets.TextName, length: int, count: int
) -> "Tensor":
    """Token ids [n, length] of the file, or of the embedded text; says so if n is below count."""
    from kvsight.text import read_text, windows

    text = assets.text(embedded) if path is None else read_text(path)
    ids = windows(tokenizer, text, length, count)
    if len(ids) < count:
        typer.echo(f"kvsight: the text gives {len(ids)} of {count} windows of {length}", err=True)
    return ids
