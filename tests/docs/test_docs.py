"""The pages in docs/ tell the truth: code runs and prints what they say, links lead somewhere, tables and figures
match."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import FENCE, blocks

import moeplace as mp
from moeplace.placement.bounds import least_device_load, step_seconds_bound
from moeplace.placement.cost import all_to_all_latency
from moeplace.placement.engines import Constraint, engine_profile, target_names
from moeplace.placement.replay import replay
from moeplace.profiler.trace_files import TraceHeader, trace_schema
from moeplace.solvers import chain, exflow, moetuner
from moeplace.solvers.base import Feature
from moeplace.solvers.solve import CHAIN_SECONDS, SOLVERS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SOLVING = ("bounds", "python", "solvers")
"""Pages whose blocks solve for seconds."""
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
READERS = ("polars", "duckdb")
"""Tools that recording.md shows a trace to; their blocks run where they are installed."""

LINK = re.compile(r"\]\(([^)\s]+)\)")


def text(name: str) -> str:
    """A page with runs of white space as one blank."""
    return " ".join((DOCS / name).read_text(encoding="utf-8").split())


def table(name: str, first: str) -> list[list[str]]:
    """The cells of the rows of the table whose header starts with `first`."""
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def run_block(page: Path, index: int, names: dict[str, Any]) -> str:
    """What a block prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks(page)[index][1], f"{page.name}, block {index}", "exec"), names)  # noqa: S102 - our own pages
    return printed.getvalue()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SOLVING else [])
        for page in PAGES
        if "python" in dict(blocks(page))
    ],
)
def test_python_blocks_run_and_print_the_text_below_them(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "import torch" in page.read_text(encoding="utf-8"):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    found = [*blocks(page), ("", "")]
    names: dict[str, Any] = {"__name__": "docs"}
    for i, (kind, code) in enumerate(found):
        if kind == "python" and not any(f"import {name}" in code and find_spec(name) is None for name in READERS):
            expected = found[i + 1][1] if found[i + 1][0] == "text" else ""
            assert run_block(page, i, names) == expected, f"{page.name}, block {i}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_images_and_anchors_exist(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.is_file(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


def test_the_solver_that_contributing_shows_solves(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    page = ROOT / "CONTRIBUTING.md"
    run_block(page, next(i for i, (kind, _) in enumerate(blocks(page)) if kind == "python"), names)
    trace = mp.RoutingTrace.from_arrays(np.random.default_rng(0).integers(4, size=(50, 2, 1)), 4)
    model = mp.ModelSpec(layers=2, experts=4, top_k=1, hidden_size=8, ffn_size=8)
    problem = mp.Problem(
        model, mp.Topology.preset("h100-hgx", devices_per_node=2), mp.RoutingStatistics.from_trace(trace)
    )
    plan = mp.solve(problem, names["Reversed"]())
    assert plan.physical_to_logical.tolist() == [[3, 2, 1, 0]] * 2
    assert plan.provenance.solver == "reversed"


def test_every_figure_is_shown_and_drawn_by_the_script() -> None:
    source = ast.parse((DOCS / "figures" / "draw.py").read_text(encoding="utf-8"))
    functions = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    drawn = {path.stem for path in (DOCS / "figures").glob("*.svg")}
    shown = {Path(link).stem for page in PAGES for link in LINK.findall(page.read_text()) if link.endswith(".svg")}
    assert drawn == shown
    assert drawn <= functions


def test_the_table_of_solvers_is_what_solvers_say_of_themselves() -> None:
    features = (
        Feature.REPLICAS,
        Feature.UNEVEN_SLOTS,
        Feature.LAYER_SLOTS,
        Feature.PINNED,
        Feature.TOLERATES,
        Feature.MOVE_LIMIT,
    )
    reads = {frozenset(): "loads", frozenset({"transitions"}): "transitions"}
    expected = [
        [
            solver.name,
            *("yes" if feature in solver.supports else "no" for feature in features),
            reads[frozenset(need.name.lower() for need in solver.needs)],
        ]
        for solver in SOLVERS
    ]
    assert sorted(row[:8] for row in table("solvers.md", "solver")) == sorted(expected)


def test_limits_and_defaults_quoted_of_solvers_are_the_codes() -> None:
    page = text("solvers.md")
    assert f"{chain.MAX_STATES:,} states" in page
    assert f"{chain.MAX_PLACEMENTS:,} placements and {chain.MAX_PAIRS // 10**6} million pairs a layer" in page
    assert f"{chain.MAX_STEP_SECONDS} seconds of estimated work and {chain.MAX_COUNTS // 10**6} million counts" in page
    assert f"{CHAIN_SECONDS:g} s of estimated work" in page
    assert f"at most {exflow.MAX_PAIRS // 10**6} million" in page
    assert f"at most {moetuner.MAX_LINKS:,}" in page
    assert (moetuner.CHAIN_AUTO, moetuner.CHAIN_LIMIT) == (720, 5040)  # 6! and 7!
    from moeplace.solvers.search import count_search, driver, scenario

    assert f"{driver.PROPOSALS:,} in all by default" in page
    assert f"{count_search.PROPOSALS:,} proposals a layer, or with the time" in page
    assert f"within {100 * count_search.TOLERANCE:g} % of the bound" in page
    assert f"in {driver.ROUNDS} rounds of `proposals / {driver.ROUNDS}`" in page
    assert f"{100 * driver.HOT:g} % to {100 * driver.COLD:g} %" in page
    assert f"{scenario.SCENARIO_TOKENS:,} tokens, at least 4 and at most 64" in page


def test_evaluation_figures_are_all_listed() -> None:
    names: dict[str, Any] = {}
    run_block(DOCS / "cost-model.md", 0, names)
    listed: list[str] = []
    for cell, _ in table("cost-model.md", "name"):
        for name in re.findall(r"`(\w+)`", cell):
            listed.append(listed[-1].rpartition("_")[0] + name if name.startswith("_") else name)
    judged = names["judged"]
    # The one that only models with limited groups have, of steps drawn from counts, stands beside the mean.
    grouped = replace(judged, grouped=judged.step_seconds)
    assert listed == list(grouped.summary())


def test_counts_worked_out_by_hand_are_those_of_the_replay() -> None:
    names: dict[str, Any] = {}
    run_block(DOCS / "cost-model.md", 0, names)
    objective = mp.Objective()
    problem = names["problem"]
    plan = mp.solve(problem, "contiguous")
    (demand,) = replay(plan, names["steps"], names["topology"], objective)
    assert demand.tokens[0, 0, 0] == 6
    assert demand.dispatch.devices[0, 0].tolist() == [6, 5, 3, 2]
    assert demand.dispatch.nodes[0, 0].tolist() == [7, 4]
    flows = demand.dispatch.flows(names["topology"], objective.node_dedup)
    assert (flows.inter[0, 0].max(), flows.intra[0, 0].max()) == (3.5, 3)
    assert all_to_all_latency(names["topology"], node_dedup=True) == pytest.approx(13e-6)
    (coherent,) = replay(plan, names["steps"], names["topology"], problem.objective)
    flows = coherent.dispatch.flows(names["topology"], problem.objective.node_dedup)
    assert (flows.inter[0, 1].max(), flows.intra[0, 1].max()) == (3, 4)


def uneven_case(dedup: bool) -> tuple[mp.Plan, mp.Steps, mp.Problem]:
    """Nodes of one and of two devices, unequal, and a plan with replicas of unequal shares."""
    fast = {"compute": 2e14, "memory": 8e10, "memory_bandwidth": 2e12, "intra_bandwidth": 3e9}
    slow = fast | {"compute": 3e13, "intra_bandwidth": 1e9}
    topology = mp.Topology.from_dict(
        {"nodes": [{"devices": [fast], "inter_bandwidth": 5e8}, {"devices": [fast, slow], "inter_bandwidth": 2e9}]}
    )
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((90, 1, 5)) * np.arange(1, 6), axis=2)[:, :, :2]
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=5, step=np.arange(90) // 30)
    model = mp.ModelSpec(layers=1, experts=5, top_k=2, hidden_size=500, ffn_size=3000)
    statistics = mp.RoutingStatistics.from_trace(trace)
    problem = mp.Problem(model, topology, statistics, mp.Objective(node_dedup=dedup, combine_dtype="fp8"), slots=6)
    table = np.array([[0, 1, 0, 2, 3, 4]])
    plan = mp.Plan(model, topology, table, problem.slot_device, np.array([[0.3, 1, 0.7, 1, 1, 1]]))
    return plan, trace.recorded_steps(), problem


@pytest.mark.parametrize("dedup", [True, False])
def test_the_formulas_as_printed_give_the_step_times(dedup: bool) -> None:
    plan, steps, problem = uneven_case(dedup)
    topology = problem.topology
    x, nodes = plan.device_share[0], np.eye(2)[topology.node_of]
    G, S, V, W = 3, topology.node_size, topology.intra_bandwidth, topology.inter_bandwidth
    expected = []
    for ids in steps.blocks():
        counts = np.bincount(ids.ravel(), minlength=5)
        read = np.zeros(G)
        for slot, expert in enumerate(plan.physical_to_logical[0]):
            read[plan.slot_device[slot]] += 1 - (1 - plan.shares[0, slot]) ** counts[expert]
        F, B = 2 * 3 * 500 * 3000, 3 * 500 * 3000 * 2
        c = np.maximum((counts @ x) * F / topology.compute, read * B / topology.memory_bandwidth)
        r = sum(1 - np.prod(1 - x[chosen[0]], axis=0) for chosen in ids)
        q = sum(1 - np.prod(1 - (x @ nodes)[chosen[0]], axis=0) for chosen in ids) if dedup else r @ nodes
        divisor = S[topology.node_of] if dedup else np.full(G, G)
        u_n, s_n = q * (1 - S / G), S / G * (q.sum() - q)
        u_g, s_g = r * (S[topology.node_of] - 1) / divisor, ((r @ nodes)[topology.node_of] - r) / divisor
        busiest = max((np.maximum(s_n, u_n) / W).max(), (np.maximum(s_g, u_g) / V).max())
        latency = topology.intra_latency * (S.max() - 1) + topology.inter_latency * (1 if dedup else G - S.max())
        expected.append(c.max() + 2 * latency + 500 * (2 + 1) * busiest)
    assert mp.evaluate(plan, steps, problem).step_seconds == pytest.approx(expected, rel=1e-5)


def test_the_step_bound_as_printed_is_the_codes_and_below_the_plan() -> None:
    plan, steps, problem = uneven_case(True)
    topology = problem.topology
    F, B = problem.model.flops_per_token, problem.model.bytes_per_expert
    bound = step_seconds_bound(steps, problem)
    for s, ids in enumerate(steps.blocks()):
        counts = np.bincount(ids.ravel(), minlength=5)
        # Two slots a device hold two experts: one device, one node.
        latency = topology.intra_latency + topology.inter_latency
        links = max((1 - 2 / 3) / topology.inter_bandwidth.sum(), (1 - 1 / 1) / topology.intra_bandwidth.sum())
        transfer = 2 * latency + len(ids) * 500 * 3 * links
        least = [
            counts.sum() * F / topology.compute.sum(),
            least_device_load(counts[None].astype(float), problem.slots_per_device)[0] * F / topology.compute.max(),
            (counts > 0).sum() * B / topology.memory_bandwidth.sum(),
        ]
        assert bound[s] == pytest.approx(transfer + max(least))
    assert (bound <= mp.evaluate(plan, steps, problem).step_seconds).all()


def test_the_columns_of_a_shard_are_listed() -> None:
    schema = trace_schema(TraceHeader(32, 4, (0, 1)), gate_weights=True)
    assert [cell.strip("`") for cell, *_ in table("recording.md", "column")] == schema.names


def test_the_engines_are_what_their_profiles_say() -> None:
    rows = {cells[0]: cells[1:] for cells in table("engines.md", "engine")}
    assert list(rows) == list(target_names())
    for name, cells in rows.items():
        profile = engine_profile(name)
        limits = profile.constraints
        shares = "equal shares" if Constraint.EQUAL_SHARES in limits else "any shares"
        stacked = not limits & {Constraint.SPREAD_REPLICAS, Constraint.NO_REPLICAS}
        assert cells == [
            "yes" if profile.equal_slots else "no",
            "none" if Constraint.NO_REPLICAS in limits else shares,
            "yes" if stacked else "no",
            profile.replica_choices[0],
            "a layer" if profile.layer_rows == "model" else "a MoE layer",
            "yes" if profile.masked_ranks else "no",
        ]
