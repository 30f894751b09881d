"""What results look like: rows of plain values for JSON, and the tables that show the same to a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .output import Column, Table, figure, milliseconds, number, percent, quantity, seconds
from .routing_split import CountSplit, count_table
from .run_comparison import BASELINE, Comparison, Entry

if TYPE_CHECKING:
    from ..placement.evaluate import Evaluation


# A comparison of plans.


FIGURES = (
    "ideal_share",
    "load_max_mean",
    "load_max_mean_p99",
    "devices_per_token",
    "nodes_per_token",
    "cross_device_fraction",
    "cross_node_fraction",
    "local_transitions",
    "node_local_transitions",
    "step_seconds_mean",
    "step_seconds_grouped",
    "step_seconds_p50",
    "step_seconds_p95",
    "step_seconds_p99",
    "compute_seconds",
    "transfer_seconds",
    "device_bytes_max",
    "node_bytes_max",
    "device_memory_max",
)


GROUPED = Column("step_seconds_grouped", "if grouped\nms", milliseconds)
"""Of counts, where the model limits a token's experts to groups."""
COMPARISON_COLUMNS = (
    Column("solver", "plan", right=False),
    Column("step_seconds_mean", "step ms\nmean", milliseconds),
    Column("step_seconds_p99", "step ms\np99", milliseconds),
    GROUPED,
    Column("ratio", f"time to\n{BASELINE}", number(3)),
    Column("ideal_share", "of the\nideal", percent),
    Column("load_max_mean", "load\nmax/mean", number(3)),
    Column("nodes_per_token", "nodes\na token", number(2)),
    Column("gap", "gap", percent),
    Column("solve_seconds", "solve s", seconds),
    Column("devices_per_token", "devices\na token", number(2)),
    Column("cross_device_fraction", "cross\ndevice", percent),
    Column("cross_node_fraction", "cross\nnode", percent),
    Column("local_transitions", "local\ntransitions", percent),
    Column("step_seconds_p50", "step ms\np50", milliseconds),
    Column("value", "value", figure),
    Column("bound", "bound", figure),
)
"""What decides first: what does not fit beside it stands below."""


MIX = "mix"
"""Rows of all batches together."""
BETWEEN_NODES = ("nodes_per_token", "cross_node_fraction")
RISK = Column("risk_seconds", "risk ms", milliseconds)


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each kind of steps and entry, all steps by their weights first where there are several kinds; keys are
    the same in every row, None where unknown."""
    kinds = [MIX, *comparison.kinds] if len(comparison.kinds) > 1 else [*comparison.kinds]
    return [_row(comparison, entry, kind) for kind in kinds for entry in comparison.entries]


def _row(comparison: Comparison, entry: Entry, kind: str) -> dict[str, Any]:
    plan, evaluation = entry.plan, _judged(entry, kind)
    certificate = None if plan is None else plan.certificate
    summary = {} if evaluation is None else evaluation.summary()
    base = _judged(comparison.baseline, kind)
    row: dict[str, Any] = {
        "solver": entry.name,
        "steps": kind,
        "status": "ok" if plan is not None else "failed",
        "reason": entry.reason.removeprefix(f"{entry.name}: ") or None,
        **{name: summary.get(name) for name in FIGURES},
        "risk": comparison.problem.objective.risk,
        "risk_seconds": None if evaluation is None else comparison.risk(entry, None if kind == MIX else kind),
        "ratio": None,
        "objective": None if certificate is None else certificate.objective,
        "value": None if certificate is None else certificate.value,
        "bound": None if certificate is None else certificate.bound,
        "gap": None if plan is None else plan.gap,
        "noise": None if certificate is None else certificate.noise,
        "noise_gap": None if certificate is None else certificate.noise_gap,
        "proven_optimal": None if plan is None else plan.proven_optimal,
        "stop": None if plan is None else plan.provenance.stop,
        "solve_seconds": None if plan is None or plan.provenance.stop == "given" else plan.provenance.seconds,
    }
    if evaluation is not None and base is not None:
        row["ratio"] = evaluation.mean_seconds / base.mean_seconds
    return row


def _judged(entry: Entry, kind: str) -> Evaluation | None:
    return entry.evaluation if kind == MIX else entry.evaluations.get(kind)


def comparison_tables(comparison: Comparison, rows: list[dict[str, Any]]) -> list[Table]:
    """One table a kind of steps; remarks stand below the last."""
    columns = [column for column in COMPARISON_COLUMNS if column.key not in BETWEEN_NODES or _several_nodes(comparison)]
    if comparison.steps.grouped is None:
        columns.remove(GROUPED)
    if comparison.problem.objective.risk != "mean":
        columns.insert(next(i for i, column in enumerate(columns) if column.key == "ratio"), RISK)
    titles = {kind: f"{kind}: {steps.num_steps} steps" for kind, steps in comparison.kinds.items()}
    titles[MIX] = f"all batches, by their shares of steps ({' and '.join(comparison.kinds)})"
    pool = f"{comparison.pool} pool, " if comparison.pool else ""
    tables = []
    for kind in dict.fromkeys(row["steps"] for row in rows):
        mine = [row for row in rows if row["steps"] == kind]
        tables.append(Table(columns, mine, title=f"{pool}{titles[kind]}"))
    notes = reading_notes(comparison, rows) + failure_notes(comparison, rows)
    last = tables[-1]
    tables[-1] = Table(last.columns, last.rows, last.title, notes)
    if isinstance(comparison.split, CountSplit):
        windows = [row for row in comparison.windows or () if "reason" not in row]
        tables.append(count_table(windows, comparison.split))
    return tables


def _several_nodes(comparison: Comparison) -> bool:
    return comparison.problem.topology.num_nodes > 1


def reading_notes(comparison: Comparison, rows: list[dict[str, Any]]) -> list[str]:
    """What the figures mean and where they come from."""
    from ..placement.cost import prediction_basis

    problem, objective = comparison.problem, comparison.problem.objective
    solvers: dict[str, list[str]] = {}
    for row in _once(comparison, rows):
        if row["objective"]:
            solvers.setdefault(row["objective"], []).append(row["solver"])
    return [
        f"{comparison.split.description}. {objective.execution}, replicas split {objective.split}.",
        *comparison.steps.notes,
        f"Step times: {prediction_basis(problem.model, problem.topology, objective).text}.",
        "Value, bound and gap are of each solver's own objective on the training part:",
        *(f"  {', '.join(names)}: {name}" for name, names in solvers.items()),
    ]


def failure_notes(comparison: Comparison, rows: list[dict[str, Any]]) -> list[str]:
    """Why a solver has no plan, a line each."""
    return [
        f"{row['solver']}: no plan. {row['reason']}" for row in _once(comparison, rows) if row["status"] == "failed"
    ]


def _once(comparison: Comparison, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = rows[0]["steps"]
    return [row for row in rows if row["steps"] == first]


# What the layers of a plan wait for.


LAYERS_SHOWN = 5
"""Layers in a table, the slowest first; JSON has them all."""
DEVICES_NAMED = 2
"""Devices or nodes named in a cell."""


BINDING_COLUMNS = (
    Column("layer", "layer", right=False),
    Column("seconds", "step ms", milliseconds),
    Column("compute", "compute", percent),
    Column("memory", "memory", percent),
    Column("intra", "links in\nnodes", percent),
    Column("inter", "links be-\ntween nodes", percent),
    Column("latency", "latency", percent),
    Column("slowest", "slowest devices,\nin steps", right=False),
    Column("busiest", "busiest links,\nin steps", right=False),
)


def binding_rows(evaluation: Evaluation, moe_layers: Sequence[int]) -> list[dict[str, Any]]:
    """A row a layer: mean seconds of a step, and by phase the fraction of steps and the seconds each term binds, and
    the fraction of steps in which each device or node is the one waited for (those never waited for are left out)."""
    from ..placement.evaluate import PHASES, TERMS, bottleneck_terms

    bottleneck = bottleneck_terms(evaluation)
    rows = []
    for i, layer in enumerate(moe_layers):
        phases = {
            phase: {
                "steps": dict(zip(TERMS, bottleneck.steps[i, p].tolist(), strict=True)),
                "seconds": dict(zip(TERMS, bottleneck.seconds[i, p].tolist(), strict=True)),
                "devices": {g: share for g, share in enumerate(bottleneck.device_steps[i, p].tolist()) if share},
                "nodes": {n: share for n, share in enumerate(bottleneck.node_steps[i, p].tolist()) if share},
            }
            for p, phase in enumerate(PHASES)
        }
        terms = dict(zip(TERMS, bottleneck.layer_seconds()[i].tolist(), strict=True))
        rows.append({"layer": layer, "seconds": sum(terms.values()), "terms": terms, "phases": phases})
    return rows


def binding_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Shares of the step time by term, of all layers together and of the slowest ones."""
    slowest = sorted(rows, key=lambda row: -row["seconds"])[:LAYERS_SHOWN]
    shown = [_cells("all", rows)] + ([_cells(str(row["layer"]), [row]) for row in slowest] if len(rows) > 1 else [])
    notes = [
        f"Shares of the step time by what it waits for; the {len(slowest)} slowest of {len(rows)} layers below all."
    ]
    said = {key for row in shown for key in ("inter", "busiest") if row.get(key)}
    columns = [column for column in BINDING_COLUMNS if column.key not in {"inter", "busiest"} - said]
    return Table(columns, shown, title, notes)


def _cells(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(row["seconds"] for row in rows)
    terms = {term: sum(row["terms"][term] for row in rows) for term in rows[0]["terms"]}
    shares = {term: spent / seconds if seconds else 0.0 for term, spent in terms.items()}
    links = {f"node {n}": share for n, share in _mean(rows, "dispatch", "nodes").items()}
    links |= {str(g): share for g, share in _mean(rows, "dispatch", "devices").items()}
    slowest = {str(g): share for g, share in _mean(rows, "compute", "devices").items()}
    return {"layer": name, "seconds": seconds, **shares, "slowest": _named(slowest), "busiest": _named(links)}


def _mean(rows: list[dict[str, Any]], phase: str, kind: str) -> dict[int, float]:
    means: dict[int, float] = {}
    for row in rows:
        for index, share in row["phases"][phase][kind].items():
            means[index] = means.get(index, 0.0) + share / len(rows)
    return means


def _named(shares: dict[str, float]) -> str | None:
    most = sorted(shares.items(), key=lambda entry: -entry[1])[:DEVICES_NAMED]
    return ", ".join(f"{name} ({percent(share)})" for name, share in most) or None


# What changes of the cluster do to a plan.


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def written_survival(counts: Mapping[str, Mapping[str, int]]) -> str:
    """`devices 3/8, nodes 0/2`."""
    return ", ".join(f"{kind}s {count['survived']}/{count['of']}" for kind, count in counts.items() if count["of"])


WHAT_IF_COLUMNS = (
    Column("change", "change", right=False),
    Column("survives", "every expert\nsurvives", _yes),
    Column("experts_lost", "experts\nlost"),
    Column("lost_load", "their\ntokens", percent),
    Column("degraded_ms", "unrepaired\nms", milliseconds),
    Column("repaired_ms", "repaired\nms", milliseconds),
    Column("repaired_bytes", "to load", quantity("B")),
    Column("slots", "slots"),
    Column("extra_slots", "more on\nsurvivors"),
    Column("ready_ms", "new plan\nms", milliseconds),
    Column("ready_ideal", "new plan, of\nthe ideal", percent),
    Column("ratio", "new plan, of\ntime today", percent),
    Column("ready_moved", "to move", quantity("B")),
    Column("ready_loaded", "to load", quantity("B")),
    Column("ready_survives", "survives\nthen", right=False),
)


def what_if_table(data: Mapping[str, Any], described: str) -> Table:
    """A line a change, and what to read out of them."""
    rows = [_shown(row) for row in data["changes"]]
    columns = [
        c for c in WHAT_IF_COLUMNS if c.key in ("change", "survives") or any(row.get(c.key) is not None for row in rows)
    ]
    now = (
        f"Now: {data['now']['step_seconds_mean'] * 1e3:.3f} ms, {percent(data['now']['ideal_share'])} of the "
        f"force-balanced ideal, in {data['slots']} slots a layer"
    )
    counts = written_survival(data["survives"])
    notes = [f"{now}; single failures in which every expert survives: {counts or 'none, there is one device'}."]
    if any(row["extra_slots"] for row in data["changes"]):
        notes.append("Where survivors need more slots than they have, engines must be started with those.")
    notes += [f"{row['change']}: no new plan. {row['reason']}" for row in data["changes"] if row["reason"]]
    return Table(columns, rows, footnotes=(*notes, described))


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    degraded, repaired, ready = row["degraded"] or {}, row["repaired"] or {}, row["ready"] or {}
    return {
        "change": row["change"],
        "survives": row["survives"],
        "experts_lost": row["experts_lost"],
        "lost_load": row["lost_load"],
        "degraded_ms": degraded.get("step_seconds_mean"),
        "repaired_ms": repaired.get("step_seconds_mean"),
        "repaired_bytes": repaired.get("bytes_reloaded"),
        "slots": ready.get("slots"),
        "extra_slots": row["extra_slots"] or None,
        "ready_ms": ready.get("step_seconds_mean"),
        "ready_ideal": ready.get("ideal_share"),
        "ratio": ready.get("ratio"),
        "ready_moved": ready.get("bytes_moved"),
        "ready_loaded": ready.get("bytes_reloaded"),
        "ready_survives": written_survival(ready["survives"]) if ready else None,
    }


# A front of step time against its price.


PARETO_COLUMNS = (
    Column("point", "plan", right=False),
    Column("best", "", lambda best: "*" if best else "", right=False),
    Column("redundant_slots", "redundant\nslots"),
    Column("device_memory_max", "memory\na device", quantity("B")),
    Column("bytes_moved", "to move", quantity("B")),
    Column("survives", "survives single failures", written_survival, right=False),
    Column("step_seconds_mean", "step ms\nmean", milliseconds),
    Column("step_seconds_p99", "step ms\np99", milliseconds),
    GROUPED,
    Column("ideal_share", "of the\nideal", percent),
    Column("risk_seconds", "judged by\nms", milliseconds),
    Column("ratio", "to the\nfastest", number(3)),
    Column("stored_as", "stored as", right=False),
)


def pareto_table(data: Mapping[str, Any], described: str) -> Table:
    """A line a point."""
    return Table(pareto_columns(data), data["points"], footnotes=(*pareto_notes(data), described))


def pareto_columns(data: Mapping[str, Any]) -> list[Column]:
    """The columns that say something about these points, their name first."""
    points = data["points"]
    asides = ("bytes_moved", "stored_as", GROUPED.key)
    hidden = {key for key in asides if all(point.get(key) is None for point in points)}
    hidden |= {"risk_seconds"} if data["objective"]["risk"] in ("mean", "regret") else set()
    return [column for column in PARETO_COLUMNS if column.key not in hidden]


def pareto_notes(data: Mapping[str, Any]) -> list[str]:
    """What is marked, and which configurations have no plan."""
    moved = "bytes moved, " if any(point["bytes_moved"] is not None for point in data["points"]) else ""
    return [
        f"* no other plan here is at least as good in everything: step time, redundant slots, {moved}device failures "
        "survived, node failures survived.",
        *(f"{refused['point']}: no plan. {refused['reason']}" for refused in data["refused"]),
    ]


# Slots of layers against KV cache.


def slot_table(front: Mapping[str, Any]) -> Table:
    """A line a point of a front of slots, and one for each number that is the same in every layer."""
    columns = [
        Column("mark", "", right=False),
        Column("written", "slots a layer", right=False),
        Column("redundant_experts", "redundant\nexperts"),
        Column("memory_bytes", "memory\na device", quantity("B")),
        Column("cache_lost", "of the\ncache", percent),
        Column("cache_tokens_lost", "cache\ntokens", lambda tokens: f"{tokens:,.0f}"),
        Column("step_seconds", "step ms,\nMoE layers", milliseconds),
        Column("saved", "step time\nsaved", percent),
        Column("throughput", "tokens/s,\ncache full", number(3)),
    ]
    shown: dict[tuple[int, ...], Mapping[str, Any]] = {}
    for point in (*front["points"], *front["even"]):
        shown.setdefault(tuple(point["slots"]), point)
    best, even = (tuple(front[name]["slots"]) for name in ("recommended", "recommended_even"))
    rows = [
        {
            **point,
            "mark": "*" if slots == best else "=" if slots == even else "",
            "written": f"{slots[0]}" if point["even"] else f"{min(slots)} to {max(slots)}",
        }
        for slots, point in sorted(shown.items(), key=lambda entry: entry[1]["memory_bytes"])
    ]
    if all(row["cache_tokens_lost"] is None for row in rows):
        columns = [column for column in columns if column.key != "cache_tokens_lost"]
    beside = (
        f"{front['other_seconds'] * 1e3:.3g} ms of other work a step" if front["other_seconds"] else "MoE layers alone"
    )
    return Table(
        columns,
        rows,
        title="slots against KV cache",
        footnotes=(
            "* recommended: most tokens a second where the cache bounds how many sequences decode at once."
            + ("" if best == even else " = the best one number for every layer."),
            f"Of the cache: of {quantity('B')(front['cache_bytes'])} a device that one slot an expert and the reserve "
            f"leave; redundant experts may take {quantity('B')(front['memory_budget'])}. Time: {beside}.",
        ),
    )
