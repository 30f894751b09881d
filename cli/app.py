"""The command-line program: what commands there are, and how an error ends them."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..placement.errors import MoeplaceError
from .commands.calibrate import calibrate_command
from .commands.check import check_command
from .commands.compare import compare_command
from .commands.decide import decide_command
from .commands.evaluate import evaluate_command
from .commands.export import export_command
from .commands.import_routing import import_command
from .commands.pareto import pareto_command
from .commands.permute import permute_command
from .commands.plans import plans_app
from .commands.profile import profile_command
from .commands.record import record_command
from .commands.report import report_command
from .commands.serve import serve_command
from .commands.solve import solve_command
from .commands.stats import stats_command
from .commands.tokens import tokens_app
from .commands.topology import topology_app
from .commands.whatif import whatif_command
from .options import grouped
from .output import note

DOMAIN_ERROR = 1


class Commands(TyperGroup):
    """A refused input ends in one line on stderr and exit code 1; a wrong call in usage and 2, as click does."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoeplaceError as error:
            note(f"error: {' '.join(str(error).split())}")
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            note(f"error: {error}")
        raise typer.Exit(DOMAIN_ERROR)


app = typer.Typer(
    name="moeplace",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Expert placement for mixture-of-experts models.\n\n"
    "Record routing, solve for a placement, judge it on held-out steps, export it.\n\n"
    "Example:\n\n"
    "  moeplace profile --out trace -- python generate.py\n"
    "  moeplace compare trace --topology h100-hgx --nodes 2 --devices-per-node 4\n"
    "  moeplace solve trace --topology h100-hgx --nodes 2 --devices-per-node 4 --solver search -o plan.json\n"
    "  moeplace export plan.json --for sglang -o init_expert_location.json",
)
# What follows the script's name is the script's own, options included.
app.command("profile", no_args_is_help=True, context_settings={"allow_interspersed_args": False})(
    grouped(profile_command)
)
for name, command in (
    ("record", record_command),
    ("import", import_command),
    ("stats", stats_command),
    ("solve", solve_command),
    ("evaluate", evaluate_command),
    ("compare", compare_command),
    ("decide", decide_command),
    ("pareto", pareto_command),
    ("whatif", whatif_command),
    ("report", report_command),
    ("export", export_command),
    ("permute", permute_command),
    ("check", check_command),
):
    app.command(name, no_args_is_help=True)(grouped(command))
app.command("serve")(grouped(serve_command))
app.command("calibrate")(grouped(calibrate_command))
app.add_typer(tokens_app, name="tokens", no_args_is_help=True)
app.add_typer(topology_app, name="topology", no_args_is_help=True)
app.add_typer(plans_app, name="plans", no_args_is_help=True)


def _print_version(asked: bool) -> None:
    if asked:
        from ..placement.version import __version__

        typer.echo(f"moeplace {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `moeplace` script."""
    app()
