"""The commands. Each one parses, calls the library and prints; heavy modules load inside them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsight import assets
from kvsight.console import STDOUT, guarded, print_table, progress, write_json
from kvsight.errors import KVSightError

if TYPE_CHECKING:
    from torch import Tensor

    from kvsight.doctor import Diagnosis
    from kvsight.eval.intervals import Estimate
    from kvsight.plan import Plan

_BITS = ("data_bits", "meta_bits", "window_bits", "true_bits")

app = typer.Typer(
    name="kvsight",
    help="Compress the KV cache of a transformer by what attention actually sees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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


@app.command("fit")
@guarded
def fit_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the new plan.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Argument(help="Transformers directory or hub name.", show_default="embedded pico-8m"),
    ] = None,
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
            help="measured, uniform, weight-norm, weight-norm-spectral, ratequant or rdkv.",
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
        typer.Option("--format", help="Allow this format (row, grouped, dense). Repeatable."),
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
        network, tokenizer = _load(model or "", update, device, dtype)
        ids = _windows(tokenizer, text, "calibration", length, max(1, tokens // length))
        judge = None
        if validation is not None:
            judge = _windows(tokenizer, validation, "evaluation", length, 8).split(1)
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
            progress=update,
            provenance={
                "model": _lasting(model),
                "text": "embedded" if text is None else str(text),
            },
        )
        plan.save(output)
    if json is not None:
        write_json({"plan": str(output), **_summary(plan)}, json)
    if json != STDOUT:
        typer.echo(f"{output}: {_headline(plan)}, calibrated on {ids.numel():,} tokens")


@app.command("eval")
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
        network, tokenizer = _load(_model_of(loaded, model), update, device, dtype)
        ids = _windows(tokenizer, text, "evaluation", length, windows)
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
    rows = [(name, f"{figure.mean:.5g}", _interval(figure)) for name, figure in figures.items()]
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


@app.command("run")
@guarded
def run_command(
    plan: PlanArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many.")] = 64,
    stock: Annotated[bool, typer.Option("--stock", help="Then also run uncompressed.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Continue a prompt, greedily, with the packed cache."""
    from kvsight.integrations.generation import complete
    from kvsight.plan import Plan

    loaded = Plan.load(plan)
    with progress() as update:
        network, tokenizer = _load(_model_of(loaded, model), update, device, dtype)
        update("generate", 0, 1 + stock)
        packed = complete(network, tokenizer, prompt, max_new_tokens, loaded)
        update("generate", 1, 1 + stock)
        plain = complete(network, tokenizer, prompt, max_new_tokens) if stock else None
    typer.echo(f"{prompt}{packed.text}")
    typer.echo(f"[packed cache: {packed.nbytes:,} bytes for {packed.tokens:,} tokens]")
    if plain is not None:
        typer.echo(f"\n{prompt}{plain.text}")
        typer.echo(f"[uncompressed cache: {plain.nbytes:,} bytes in BF16]")


@app.command("show")
@guarded
def show_command(plan: PlanArgument, json: JsonOption = None) -> None:
    """Show what a plan stores, layer by layer, and where it came from."""
    from kvsight.plan import Plan

    loaded = Plan.load(plan)
    layers = _layers(loaded)
    if json is not None:
        content = {**_summary(loaded), "provenance": dict(loaded.provenance), "layers": layers}
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
    print_table(header, rows, f"{plan}: {_headline(loaded)}", text_columns=4)
    size = loaded.nbytes(loaded.reference_length)
    static = loaded.ledger().static_bytes
    typer.echo(f"{size:,} bytes for {loaded.reference_length:,} tokens; {static:,} static bytes")
    for name, value in sorted(loaded.provenance.items()):
        typer.echo(f"{name}: {value or 'embedded'}")


@app.command("doctor")
@guarded
def doctor_command(
    model: Annotated[
        str | None,
        typer.Argument(help="Transformers directory or hub name.", show_default="embedded pico-8m"),
    ] = None,
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
        network, tokenizer = _load(model or "", update, device, dtype)
        ids = _windows(tokenizer, text, "calibration", length, max(1, tokens // length))
        diagnosis = examine(network, ids.split(1), progress=update)
    if json is not None:
        write_json(diagnosis.to_json(), json)
    if json != STDOUT:
        _print_diagnosis(diagnosis, model)


@app.command("methods")
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


@app.callback()
def set_up() -> None:
    """Compress the KV cache of a transformer by what attention actually sees."""
    import logging

    # warnings of the library look like its other messages
    logging.basicConfig(format="kvsight: %(message)s")


def main() -> None:
    """Entry point of the command line."""
    app(prog_name="kvsight")


def _load(
    source: str, update: Callable[[str, int, int], None], device: str | None, dtype: str | None
) -> tuple[Any, Any]:
    """(model, tokenizer) on the device; an empty source is the embedded model."""
    from kvsight.integrations.loading import load_model, placed

    update("load", 0, 1)
    loaded = load_model(source or None, *placed(device, dtype))
    update("load", 1, 1)
    return loaded


def _model_of(plan: "Plan", override: str | None) -> str:
    return plan.provenance.get("model", "") if override is None else override


def _lasting(model: str | None) -> str:
    """How a plan remembers its model: a directory by its absolute path, found from anywhere."""
    if not model:
        return ""
    directory = Path(model).expanduser()
    return str(directory.resolve()) if directory.is_dir() else model


def _windows(
    tokenizer: Any, path: Path | None, embedded: assets.TextName, length: int, count: int
) -> "Tensor":
    """Token ids [n, length] of the file, or of the embedded text; says so if n is below count."""
    from kvsight.text import read_text, windows

    text = assets.text(embedded) if path is None else read_text(path)
    ids = windows(tokenizer, text, length, count)
    if len(ids) < count:
        typer.echo(f"kvsight: the text gives {len(ids)} of {count} windows of {length}", err=True)
    return ids


def _named(method: Any) -> str:
    """The method of both sides, or of each."""
    return method if isinstance(method, str) else ", ".join(f"{s}: {m}" for s, m in method.items())


def _headline(plan: "Plan") -> str:
    sides = f"K {plan.key_bits:.3f}, V {plan.value_bits:.3f}"
    return f"{_named(plan.method)}, {plan.true_bits:.3f} bits per cached element ({sides})"


def _print_diagnosis(diagnosis: "Diagnosis", model: str | None) -> None:
    """The table, what was found and what was not, and the command to go on with; 80 columns."""
    from kvsight.doctor.layout import HEADER, LEGEND, paragraphs, rows

    figures = diagnosis.figures
    title = f"{figures.model}, {figures.tokens:,} tokens in windows of {figures.length:,}"
    print_table(HEADER, rows(figures), title, text_columns=2)
    typer.echo(LEGEND)
    for paragraph in paragraphs(diagnosis.findings, diagnosis.recommendation, model):
        typer.echo(f"\n{paragraph}")


def _interval(figure: "Estimate") -> str:
    return f"{figure.low:.5g} to {figure.high:.5g}" if figure.n > 1 else "one window has none"


def _summary(plan: "Plan") -> dict[str, Any]:
    return {
        "method": plan.method,
        "true_bits": plan.true_bits,
        "key_bits": plan.key_bits,
        "value_bits": plan.value_bits,
        "reference_length": plan.reference_length,
        "cache_bytes": plan.nbytes(plan.reference_length),
        "static_bytes": plan.ledger().static_bytes,
    }


def _layers(plan: "Plan") -> list[dict[str, Any]]:
    """One row per layer and side: bits averaged over its heads, bytes at the reference length."""
    from kvsight.plan import SIDES

    ledger = plan.ledger()
    out: list[dict[str, Any]] = []
    for layer, side in ((layer, side) for layer in plan.layers for side in SIDES):
        heads = [row for row in ledger if (row.layer, row.side) == (layer.index, side)]
        bits = {name: sum(getattr(row, name) for row in heads) / len(heads) for name in _BITS}
        width = sum(len(p.heads) * p.codec.format.dim for p in layer.side(side))
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
