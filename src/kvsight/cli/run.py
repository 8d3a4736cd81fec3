"""`kvsight run`."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvsight.cli.options import DeviceOption, DtypeOption, ModelOption, PlanArgument, load, model_of
from kvsight.console import guarded, progress

if TYPE_CHECKING:
    pass


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
        network, tokenizer = load(model_of(loaded, model), update, device, dtype)
        update("generate", 0, 1 + stock)
        packed = complete(network, tokenizer, prompt, max_new_tokens, loaded)
        update("generate", 1, 1 + stock)
        plain = complete(network, tokenizer, prompt, max_new_tokens) if stock else None
    typer.echo(f"{prompt}{packed.text}")
    typer.echo(f"[packed cache: {packed.nbytes:,} bytes for {packed.tokens:,} tokens]")
    if plain is not None:
        typer.echo(f"\n{prompt}{plain.text}")
        typer.echo(f"[uncompressed cache: {plain.nbytes:,} bytes in BF16]")
