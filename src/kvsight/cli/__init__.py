"""The commands. Each one parses, calls the library and prints; heavy modules load inside them."""

import typer

from kvsight.cli.bench import bench_command
from kvsight.cli.compare import compare_command
from kvsight.cli.doctor import doctor_command
from kvsight.cli.evaluate import eval_command
from kvsight.cli.fit import fit_command
from kvsight.cli.methods import methods_command
from kvsight.cli.report import report_command
from kvsight.cli.run import run_command
from kvsight.cli.show import show_command
from kvsight.cli.tasks import tasks_command

app = typer.Typer(
    name="kvsight",
    help="Compress the KV cache of a transformer by what attention actually sees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("fit")(fit_command)
app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("tasks")(tasks_command)
app.command("run")(run_command)
app.command("show")(show_command)
app.command("doctor")(doctor_command)
app.command("bench")(bench_command)
app.command("report")(report_command)
app.command("methods")(methods_command)


@app.callback()
def set_up() -> None:
    """Compress the KV cache of a transformer by what attention actually sees."""
    import logging

    # warnings of the library look like its other messages
    logging.basicConfig(format="kvsight: %(message)s")


def main() -> None:
    """Entry point of the command line."""
    app(prog_name="kvsight")
