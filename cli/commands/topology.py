"""`moeplace topology`: the clusters plans can be made for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..._display import plural
from ...placement.errors import InputError, nearest
from .. import completion
from ..command_line import Command
from ..options import AsJson, TopologyOptions, grouped, output_option, topology_file
from ..output import Column, Table, emit, quantity, wrote
from ..parse import read_topology

if TYPE_CHECKING:
    from ...placement.topology import Topology

topology_app = typer.Typer(
    help="List, show and write clusters.\n\nExample:\n\n  moeplace topology write h100-hgx --nodes 2 -o cluster.yaml"
)

NameOrFile = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        autocompletion=completion.presets,
        help="A preset's name, or a YAML or JSON file.",
        show_default=False,
    ),
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes of the preset. Default: 1.")]
DevicesPerNode = Annotated[
    int | None, typer.Option("--devices-per-node", min=1, help="Devices used in each node of the preset. Default: all.")
]

DEVICE_COLUMNS = (
    Column("compute", "compute\na device", quantity("flop/s")),
    Column("memory", "memory", quantity("B")),
    Column("memory_bandwidth", "memory\nbandwidth", quantity("B/s")),
    Column("intra_bandwidth", "in-node\nlinks", quantity("B/s")),
    Column("inter_bandwidth", "between nodes,\na node", quantity("B/s")),
)
LAUNCH = Column("launch", "launch us", lambda seconds: f"{seconds * 1e6:.3g}")
ERROR = Column("error", "error", lambda error: f"±{error:.0%}".replace("%", " %"))


@topology_app.command("list", cls=Command)
@grouped
def list_command(as_json: AsJson = False) -> None:
    """List the presets, with the achievable rates they stand for.

    Example:

      moeplace topology list
    """
    from ...placement.topology import FORMER_NAMES, PRESETS

    rows = [{"name": name, **box._asdict()} for name, box in PRESETS.items()]
    columns = [Column("name", "preset", right=False), Column("devices", "devices\na node"), *DEVICE_COLUMNS]
    former = ", ".join(f"{old} is {new}" for old, new in FORMER_NAMES.items())
    footnotes = ["Links are one direction; compute is at bf16.", f"Former names are understood: {former}."]
    emit(rows, Table(columns, rows, footnotes=footnotes), as_json=as_json)


@topology_app.command("kernels", cls=Command)
@grouped
def kernels_command(
    gpu: Annotated[str | None, typer.Option("--gpu", help="Of this GPU alone.", show_default=False)] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            autocompletion=completion.engines,
            help="Of this engine alone.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what measured expert kernels are known, and how well they predict what they were not fitted to.

    Example:

      moeplace topology kernels --gpu h100-sxm --for vllm
    """
    from ...placement.kernels import kernel_data, known_kernels

    fits = known_kernels()
    _check_measured("--gpu", gpu, "kernels", {fit.gpu for fit in fits})
    _check_measured("--for", engine, "kernels", {fit.engine for fit in fits})
    rows = [fit._asdict() for fit in fits if gpu in (None, fit.gpu) and engine in (None, fit.engine)]
    names = ("gpu", "engine", "version", "dtype", "shape")
    columns = [
        *(Column(name, name, right=False) for name in names),
        LAUNCH,
        Column("bandwidth", "weights\nread", quantity("B/s")),
        Column("rate", "arithmetic", quantity("flop/s")),
        Column("rows", "rows an\nexpert hit", lambda rows: f"{rows:.3g}"),
        Column("passing", "rows\npassed", quantity("B/s")),
        ERROR,
    ]
    footnotes = [
        f"Coefficients {kernel_data()['source']}.",
        "error: median on token counts left out of the fit; of shape any, on shapes left out.",
    ]
    emit(rows, Table(columns, rows, footnotes=footnotes), as_json=as_json)


@topology_app.command("transfers", cls=Command)
@grouped
def transfers_command(
    gpu: Annotated[str | None, typer.Option("--gpu", help="Of this GPU alone.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Show what measured all-to-alls are known, and how well they predict what they were not fitted to.

    Example:

      moeplace topology transfers --gpu h100-sxm
    """
    from ...placement.transfers import known_transfers, transfer_data

    fits = known_transfers()
    _check_measured("--gpu", gpu, "transfers", {fit.gpu for fit in fits})
    rows = [
        {"gpu": fit.gpu, "kind": fit.kind, "nodes": fit.nodes, "library": fit.library, "phase": phase, **leg._asdict()}
        for fit in fits
        if gpu in (None, fit.gpu)
        for phase, leg in (("dispatch", fit.dispatch), ("combine", fit.combine))
    ]
    columns = [
        *(Column(name, name, right=name == "nodes") for name in ("gpu", "kind", "nodes", "library", "phase")),
        LAUNCH,
        Column("token", "a token\nns", lambda seconds: f"{seconds * 1e9:.3g}"),
        Column("intra", "link inside\na node", quantity("B/s")),
        Column("inter", "link between\nnodes", quantity("B/s")),
        ERROR,
    ]
    footnotes = [
        f"Coefficients {transfer_data()['source']}.",
        "Links: of a device; 0 where the other was measured. error: median on token counts left out of the fit.",
    ]
    emit(rows, Table(columns, rows, footnotes=footnotes), as_json=as_json)


@topology_app.command("show", cls=Command, no_args_is_help=True)
@grouped
def show_command(
    name: NameOrFile, nodes: Nodes = None, devices_per_node: DevicesPerNode = None, as_json: AsJson = False
) -> None:
    """Show a preset, or check and show a topology file.

    Example:

      moeplace topology show h100-hgx --nodes 2
    """
    topology = read_topology(TopologyOptions(topology=name, nodes=nodes, devices_per_node=devices_per_node))
    columns = [Column("nodes", "nodes", right=False), Column("devices", "devices", right=False), *DEVICE_COLUMNS]
    footnotes = [
        f"{topology.name}: {plural(topology.num_devices, 'device')} in {plural(topology.num_nodes, 'node')}. "
        f"A message costs {topology.intra_latency * 1e6:g} us inside a node and {topology.inter_latency * 1e6:g} us "
        "between nodes. "
        "Links are one direction."
    ]
    data = topology.model_dump(mode="json")
    emit(data, Table(columns, _device_rows(topology), footnotes=footnotes), as_json=as_json)


@topology_app.command("write", cls=Command, no_args_is_help=True)
@grouped
def write_command(
    name: NameOrFile,
    output: Annotated[Path, output_option("FILE", "File to write: .yaml, .yml or .json.", topology_file)],
    nodes: Nodes = None,
    devices_per_node: DevicesPerNode = None,
) -> None:
    """Write a preset as a file, to edit for the cluster at hand.

    Example:

      moeplace topology write a100-pcie --nodes 2 -o cluster.yaml
    """
    topology = read_topology(TopologyOptions(topology=name, nodes=nodes, devices_per_node=devices_per_node))
    topology.save(output)
    wrote(output)


def _check_measured(option: str, name: str | None, what: str, known: Collection[str]) -> None:
    """Refuses a name of which nothing was measured."""
    if name is not None and name not in known:
        raise InputError(f"{option} {name}: no {what} measured; {nearest(name, known)}")


def _device_rows(topology: Topology) -> list[dict[str, Any]]:
    """A row for each run of equal devices."""
    rows: list[dict[str, Any]] = []
    rank = 0
    for index, node in enumerate(topology.nodes):
        for device in node.devices:
            fields = {**device.model_dump(), "inter_bandwidth": node.inter_bandwidth}
            if rows and rows[-1]["fields"] == fields:
                rows[-1].update(last_node=index, last_device=rank)
            else:
                rows.append(
                    {"fields": fields, "first_node": index, "last_node": index, "first": rank, "last_device": rank}
                )
            rank += 1
    return [
        {
            **row["fields"],
            "nodes": _range(row["first_node"], row["last_node"]),
            "devices": _range(row["first"], row["last_device"]),
        }
        for row in rows
    ]


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
