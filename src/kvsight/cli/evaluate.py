"""`kvsight eval`."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvsight.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelOption,
    PlanArgument,
    TextOption,
    load,
    model_of,
    read_windows,
)
from kvsight.console import STDOUT, guarded, print_table, progress, write_json

if TYPE_CHECKING:
    from kvsight.eval.intervals import Estimate


@guarded
def eval_command(
    plan: PlanArgument,
    model: ModelOption = None,
    text: TextOption = None,
    windows: Annotated[int, typer.Option(min=1, help="Judge on this many at most.")] = 6,
    length: LengthOption = 1024,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = None,
) -> None:
    """Judge a plan on text that its calibration never saw."""
    from kvsight.eval.quality import evaluate
    from kvsight.plan import Plan

    loaded = Plan.load(plan)
    with progress() as update:
        network, tokenizer = load(model_of(loaded, model), update, device, dtype)
        ids = read_windows(tokenizer, text, "evaluation", length, windows)
        result = evaluate(network, loaded, ids.split(1), progress=update)
    if json is not None:
        write_json(result.to_json(), json)
    if json == STDOUT:
        return
    figures = {
        "KL against uncompressed (nats)": result.kl,
        "perplexity": result.perplexity,
        "perplexity, uncompressed": result.baseline_perplexity,
        "same top token": result.same_top,
    }
    rows = [(name, f"{figure.mean:.5g}", interval(figure)) for name, figure in figures.items()]
    if result.drift is not None:
        verdict = "unlike calibration" if result.drift.beyond else "like calibration"
        verdict = verdict if result.drift.clear else "too few tokens"
        rows.append(("drift (nats per coordinate)", f"{result.drift.mean:.3g}", verdict))
    sides = f"K {result.key_bits:.3f}, V {result.value_bits:.3f}"
    ratio = f"{result.baseline_bytes / result.cache_bytes:.2f} times smaller"
    rows += [
        ("stored bits per element", f"{result.true_bits:.3f}", sides),
        ("cache bytes", f"{result.cache_bytes:,}", ratio),
        ("cache bytes, uncompressed", f"{result.baseline_bytes:,}", ""),
    ]
    title = f"{result.method} on {len(ids)} windows of {length:,} tokens"
    print_table(("", "mean", "95 % interval"), rows, title)


def interval(figure: "Estimate") -> str:
    return f"{figure.low:.5g} to {figure.high:.5g}" if figure.n > 1 else "one window has none"
