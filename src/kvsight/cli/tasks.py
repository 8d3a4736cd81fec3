"""`kvsight tasks`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsight import assets
from kvsight.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, load, model_of
from kvsight.console import STDOUT, guarded, print_table, progress, write_json

if TYPE_CHECKING:
    from kvsight.eval.tasks.base import Source
    from kvsight.records import Row


@guarded
def tasks_command(
    plans: Annotated[list[Path], typer.Argument(help="Directories of plans.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the records.", show_default=False)
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="all, or some of lambada, last-word, books, copy, induction, recall, continuation."
        ),
    ] = "all",
    model: ModelOption = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text file, a whole book at best. Repeatable.", show_default="embedded text"
        ),
    ] = None,
    lambada: Annotated[
        Path | None,
        typer.Option(help='Passages, a JSON object {"text": ...} per line.', show_default=False),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Samples of every task.", show_default="6 to 128, by task"),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Longest context.", show_default="the model's limit, at most 8192"),
    ] = None,
    generate: Annotated[int, typer.Option(min=1, help="Tokens of a continuation.")] = 512,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = None,
) -> None:
    """Ask the model to do things with plans and without, and compare sample by sample."""
    from kvsight.eval.tasks.arms import packed_arm
    from kvsight.eval.tasks.base import Setting, context_length
    from kvsight.eval.tasks.registry import chosen, possible
    from kvsight.eval.tasks.run import run_tasks
    from kvsight.plan import Plan

    wanted = chosen(tasks)
    loaded = [Plan.load(path) for path in plans]
    source = model_of(loaded[0], model)
    with progress() as update:
        network, tokenizer = load(source, update, device, dtype)
        arms = [packed_arm(network, plan) for plan in loaded]
        setting = Setting(
            network,
            tokenizer,
            _texts(text),
            None if lambada is None else _read(lambada),
            samples,
            context_length(network, length),
            generate,
        )
        ready, lacking = possible(wanted, setting)
        for task in lacking:
            typer.echo(f"kvsight: {task.name} is skipped; it needs --{task.needs} FILE", err=True)
        rows = run_tasks(output, ready, arms, setting, Path(source).name or "pico-8m", update)
    if json is not None:
        write_json(rows, json)
    if json != STDOUT:
        _print_rows(rows)


def _texts(paths: list[Path] | None) -> "tuple[Source, ...]":
    from kvsight.eval.tasks.base import Source

    if not paths:
        return (Source("embedded", assets.text("evaluation")),)
    return tuple(_read(path) for path in paths)


def _read(path: Path) -> "Source":
    from kvsight.eval.tasks.base import Source
    from kvsight.text import read_text

    return Source(path.stem, read_text(path))


def _print_rows(rows: "list[Row]") -> None:
    """A line for the metric of each task and plan, and for whatever else its samples carry."""
    uncompressed = {row["task"]: row for row in rows if row["difference"] is None}
    lines = []
    for row in rows:
        before = uncompressed[row["task"]]
        figures = [(row["metric"], before["value"], row["value"], row["difference"])]
        for name, extra in row["detail"].items():
            if "value" in extra:
                figures.append((name, before["detail"][name]["value"], extra["value"], extra["difference"]))
        lines += [
            (row["task"], row["arm"], *_cells(*figure)) for figure in figures if figure[3] is not None
        ]
    header = ("task", "plan", "metric", "uncompressed", "packed", "difference", "95 % interval", "n")
    print_table(header, lines, "Packed against uncompressed, paired over samples", text_columns=3)


def _cells(
    metric: str, before: dict[str, Any], packed: dict[str, Any], change: dict[str, Any]
) -> tuple[str, ...]:
    interval = "one sample has none"
    if change["low"] is not None:
        interval = f"{change['low']:+.4f} to {change['high']:+.4f}"
    means = f"{before['mean']:.4g}", f"{packed['mean']:.4g}", f"{change['mean']:+.4f}"
    return metric, *means, interval, str(change["n"])
