"""`moeplace stats`: what is in a record of routing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..._display import plural
from ..command_line import refuse_idle
from ..options import AsJson, Plot, PlotFile, RoutingPath, output_file, output_option
from ..output import Column, Table, count, emit, number, pairs, percent, working, wrote
from ..plots import record_drawings, show
from ..routing_split import counted, open_recording
from ..save import attempted, end_unwritten

if TYPE_CHECKING:
    from ...placement.statistics import RoutingStatistics

TOP_SUCCESSORS = 4


def stats_command(
    routing: RoutingPath,
    output: Annotated[Path | None, output_option("FILE", "Write the statistics (.npz).", output_file)] = None,
    sample_tokens: Annotated[
        int, typer.Option("--sample-tokens", min=0, help="Tokens kept in the statistics to judge plans on.")
    ] = 200_000,
    plot: Plot = False,
    plot_file: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Count a trace: load by layer, how well a layer predicts the next, workloads.

    A trace of any size is counted in bounded memory, on all cores.

    Example:

      moeplace stats trace -o statistics.npz
    """
    from ...profiler.statistics_file import write_statistics

    with working("counting") as update:
        recording = open_recording(routing)
        if not recording.is_trace:
            refuse_idle(f"with {routing}, which holds counts and no tokens to keep", "sample_tokens")
        statistics = counted(recording, update, sample_tokens)
    unwritten = None
    if output is not None:
        _, unwritten = attempted(lambda: write_statistics(statistics, output))
        if unwritten is None:
            wrote(output)
    data = describe(statistics)
    emit(data, _summary(data), *_tables(data), as_json=as_json)
    if plot or plot_file:
        show(record_drawings(statistics), plot_file, plot and not as_json)
    end_unwritten(unwritten)


def describe(statistics: RoutingStatistics) -> dict[str, Any]:
    """The statistics in figures. Shares are of tokens; `choices` are tokens times k;
    `top_successors` is the share of an expert's tokens that its
    four likeliest successors in the next layer take, mean over experts by load; chance is what four take by load."""
    import numpy as np

    load = statistics.total_load
    mean = load.mean(axis=1)
    imbalance = np.where(mean > 0, load.max(axis=1) / np.where(mean > 0, mean, 1.0), np.nan)
    follow = None if statistics.transitions is None else _top_share(statistics.total_transitions)
    layers = [
        {
            "layer": layer,
            "choices": float(load[i].sum()),
            "tokens": None if statistics.top_k is None else float(load[i].sum()) / statistics.top_k,
            "load_max_mean": float(imbalance[i]),
            "busiest_expert": int(load[i].argmax()),
            "idle_experts": int((load[i] == 0).sum()),
            "top_successors": None if follow is None or i == len(follow) else float(follow[i]),
        }
        for i, layer in enumerate(statistics.moe_layers)
    ]
    by_workload = statistics.workload_load
    total = by_workload.sum()
    workloads = [
        {
            "workload": name or "(untagged)",
            "share": float(by_workload[w].sum() / total) if total else 0.0,
            "windows": int((statistics.window_workload == w).sum()),
            "distance": float(_distance(by_workload[w], load)),
        }
        for w, name in enumerate(statistics.workloads)
    ]
    return {
        "experts": statistics.experts,
        "top_k": statistics.top_k,
        "moe_layers": list(statistics.moe_layers),
        "tokens": statistics.tokens,
        "windows": len(statistics.load),
        "sample_tokens": 0 if statistics.sample is None else statistics.sample.num_tokens,
        "has_transitions": statistics.transitions is not None,
        "has_coactivation": statistics.coactivation is not None,
        "fingerprint": statistics.fingerprint,
        "layers": layers,
        "workloads": workloads,
    }


def _top_share(transitions: Any) -> Any:
    """[L-1] share of tokens that go to their expert's likeliest successors."""
    import numpy as np

    taken = min(TOP_SUCCESSORS, transitions.shape[2])
    top = np.partition(transitions, -taken, axis=2)[:, :, -taken:].sum(axis=(1, 2))
    total = transitions.sum(axis=(1, 2))
    return np.where(total > 0, top / np.where(total > 0, total, 1.0), np.nan)


def _distance(load: Any, other: Any) -> Any:
    """Total variation distance between expert shares, mean over layers."""
    import numpy as np

    def share(values: Any) -> Any:
        total = values.sum(axis=1, keepdims=True)
        return values / np.where(total > 0, total, 1.0)

    return 0.5 * np.abs(share(load) - share(other)).sum(axis=1).mean()


def _summary(data: dict[str, Any]) -> Table:
    """What the record is, and what a plan can gain on it, before the layers."""
    layers = data["layers"]
    uneven = max(layers, key=lambda layer: layer["load_max_mean"])
    measured = [layer["load_max_mean"] for layer in layers if layer["load_max_mean"] == layer["load_max_mean"]]
    counted = f"{data['tokens']:,} tokens in " if data["tokens"] else ""
    idle = sum(layer["idle_experts"] for layer in layers)
    tells = {
        "experts chosen together": data["has_coactivation"],
        "transitions between layers": data["has_transitions"],
        "a sample of tokens": bool(data["sample_tokens"]),
    }
    return pairs(
        {
            "record": f"{counted}{plural(data['windows'], 'window')}, {plural(len(data['workloads']), 'workload')}",
            "model": _model(data),
            "busiest expert": f"{sum(measured) / max(1, len(measured)):.2f} times the mean load over layers, "
            f"{uneven['load_max_mean']:.2f} in layer {uneven['layer']}",
            "idle experts": f"{idle:,} of {len(layers) * data['experts']:,}",
            "tells": ", ".join(what for what, there in tells.items() if there) or "loads alone",
        }
    )


def _model(data: dict[str, Any]) -> str:
    routed = "" if data["top_k"] is None else f", top-{data['top_k']}"
    return f"{len(data['moe_layers'])} layers of {data['experts']} experts{routed}"


def _tables(data: dict[str, Any]) -> list[Table]:
    columns = [
        Column("layer", "layer"),
        Column("tokens", "tokens", count) if data["top_k"] else Column("choices", "tokens x k", count),
        Column("load_max_mean", "expert load\nmax/mean", number(2)),
        Column("busiest_expert", "busiest\nexpert"),
        Column("idle_experts", "idle\nexperts"),
        Column("top_successors", f"share of the {TOP_SUCCESSORS}\nlikeliest successors", percent),
    ]
    layers = Table(
        columns if data["has_transitions"] else columns[:-1],
        data["layers"],
        title=_model(data) + ("" if not data["tokens"] else f", {data['tokens']:,} tokens"),
    )
    workloads = Table(
        (
            Column("workload", "workload", right=False),
            Column("share", "share", percent),
            Column("windows", "windows"),
            Column("distance", "distance from\nthe whole", percent),
        ),
        data["workloads"],
        footnotes=[
            "Distance: share of expert choices that would have to change to match the load of all workloads.",
            f"{data['sample_tokens']:,} tokens kept as a sample. Fingerprint {data['fingerprint'][:12]}.",
        ]
        + ([] if data["has_transitions"] else ["Counts only: no transitions between layers, no co-activation."]),
    )
    return [layers, workloads]
