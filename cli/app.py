"""The command-line program: what commands there are, and how an error ends them."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import _interrupts
from .._lazy import missing_extra
from ..placement.errors import MoeplaceError
from .command_line import Command
from .commands import operate
from .commands.advise import advise_command
from .commands.calibrate import calibrate_command
from .commands.check import check_command
from .commands.compare import compare_command
from .commands.decide import decide_command
from .commands.doctor import doctor_command
from .commands.evaluate import evaluate_command
from .commands.export import export_command
from .commands.import_routing import import_command
from .commands.pareto import pareto_command
from .commands.permute import permute_command
from .commands.plans import plans_app
from .commands.plot import plot_command
from .commands.record import profile_command, record_command
from .commands.report import report_command
from .commands.schema import schema_command
from .commands.serve import serve_command
from .commands.solve import solve_command
from .commands.stats import stats_command
from .commands.tokens import tokens_app
from .commands.topology import topology_app
from .commands.whatif import whatif_command
from .options import grouped
from .output import INTERRUPTION, WRITTEN, interrupted, note, os_reason

REFUSED = 1


class Commands(TyperGroup):
    """A refused input ends in one line on stderr and exit code 1; a wrong call in usage and 2, as click does; Ctrl-C in
    130, with one line on what there is."""

    def main(self, *args: Any, **extra: Any) -> Any:
        WRITTEN.clear()
        INTERRUPTION.clear()
        try:
            return super().main(*args, **extra)
        except SystemExit as end:
            # It came while the line was read.
            if end.code == _interrupts.INTERRUPTED and not INTERRUPTION:
                interrupted("interrupted; nothing was written")
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            answer = super().invoke(ctx)
        except KeyboardInterrupt:
            interrupted(f"interrupted; {_written() or 'nothing was written'}")
            raise typer.Exit(_interrupts.INTERRUPTED) from None
        except (MoeplaceError, MemoryError, ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            reason = _reason(error)
            if reason is None:
                raise
            note(f"error: {' '.join(reason.split())}")
            raise typer.Exit(_interrupts.INTERRUPTED if _interrupts.pressed() else REFUSED) from None
        except typer.Exit:
            if _interrupts.pressed():
                self._end_early()
            raise
        if _interrupts.pressed():
            self._end_early()
        return answer

    def _end_early(self) -> None:
        """After Ctrl-C that a command made the best of: what it has is shown."""
        if not INTERRUPTION:
            interrupted(f"interrupted; what there was by then is shown{f', {_written()}' if WRITTEN else ''}")
        raise typer.Exit(_interrupts.INTERRUPTED)


def _written() -> str:
    return f"{', '.join(WRITTEN)} {'is' if len(WRITTEN) == 1 else 'are'} written" if WRITTEN else ""


def _reason(error: BaseException) -> str | None:
    """What to tell the user; None for a fault of this program."""
    if isinstance(error, MemoryError):
        return "memory ran out; ask for fewer or smaller steps (--steps, --decode, --prefill), or for fewer slots"
    if isinstance(error, OSError):
        return os_reason(error)
    return missing_extra(error) if isinstance(error, ImportError) else str(error)


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
    "  moeplace profile -o trace -- python generate.py\n"
    "  moeplace compare trace --topology h100-hgx --nodes 2 --devices-per-node 4\n"
    "  moeplace solve trace --topology h100-hgx --nodes 2 --devices-per-node 4 --solver search -o plan.json\n"
    "  moeplace export plan.json --for sglang -o init_expert_location.json",
)
# What follows the script's name is the script's own, options included.
app.command("profile", cls=Command, no_args_is_help=True, context_settings={"allow_interspersed_args": False})(
    grouped(profile_command)
)
# Of each command the options that its help begins with: those that most calls have.
CLUSTER_FIRST = ("topology", "nodes", "engine")
for name, command, first in (
    ("record", record_command, ("sglang", "vllm", "seconds", "output", "model")),
    ("import", import_command, ("output", "model", "workloads")),
    ("stats", stats_command, ("output",)),
    ("solve", solve_command, (*CLUSTER_FIRST, "slots", "output")),
    ("evaluate", evaluate_command, ("engine", "decode", "prefill")),
    ("compare", compare_command, (*CLUSTER_FIRST, "solvers", "output")),
    ("decide", decide_command, ("candidates", "current", "engine", "horizon", "deployment")),
    ("pareto", pareto_command, (*CLUSTER_FIRST, "redundant", "output")),
    ("whatif", whatif_command, ("lose", "devices", "engine", "output")),
    ("report", report_command, (*CLUSTER_FIRST, "solvers", "output")),
    ("plot", plot_command, ("output", "engine", "decode", "prefill")),
    ("export", export_command, ("engine", "output", "model_path")),
    ("permute", permute_command, ("plan", "output", "verify")),
    ("check", check_command, ("running",)),
    ("advise", advise_command, (*CLUSTER_FIRST, "slots", "redundant")),
):
    app.command(name, cls=Command, no_args_is_help=True)(grouped(command, first))
app.command("serve", cls=Command)(grouped(serve_command, ("host", "port", "db", "workers")))
app.command("schema", cls=Command)(grouped(schema_command))
app.command("doctor", cls=Command)(grouped(doctor_command, ("file", "plan")))
app.command("calibrate", cls=Command)(grouped(calibrate_command, ("output", "model")))
app.add_typer(tokens_app, name="tokens", no_args_is_help=True)
app.add_typer(topology_app, name="topology", no_args_is_help=True)
app.add_typer(plans_app, name="plans", no_args_is_help=True)
for name, group in (
    ("models", operate.models_app),
    ("topologies", operate.topologies_app),
    ("deployments", operate.deployments_app),
    ("windows", operate.windows_app),
    ("decisions", operate.decisions_app),
    ("webhooks", operate.webhooks_app),
    ("engines", operate.engines_app),
    ("jobs", operate.jobs_app),
):
    app.add_typer(group, name=name, no_args_is_help=True)
app.command("deploy", cls=Command, no_args_is_help=True)(grouped(operate.deploy_command, ("name", "topology", "nodes")))
app.command("approve", cls=Command, no_args_is_help=True)(grouped(operate.approve_command))
app.command("reject", cls=Command, no_args_is_help=True)(grouped(operate.reject_command))
app.command("rollback", cls=Command, no_args_is_help=True)(grouped(operate.rollback_command))


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
    # Who closed a stream wants nothing of it; Python has None in its place.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (to the end)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (to the end)
    _interrupts.listen()
    try:
        app()
    finally:
        _interrupts.deafen()
