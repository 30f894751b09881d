"""Published planners of experts copied for one microbatch, imported from copies of their repositories.

Each takes the counts of one layer [source ranks, experts], experts in the order of their homes with as many a rank,
and gives the tokens that each rank computes [experts, ranks]; a rank with tokens of an expert that is not its own has
copied it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Planner = Callable[[IntArray], IntArray]


def moonep(file: Path) -> Planner:
    """MoonEP's reference (tests/planning_reference.py, MIT): exactly even."""
    import torch

    plan = _function(file, "launch_planning_torch_reference", "MoonEP's tests/planning_reference.py")

    def run(counts: IntArray) -> IntArray:
        ranks, experts = counts.shape
        # Every rank may take as much as every other sends, so ranks that send more are cut to the mean.
        capacity = -(-int(counts.sum()) // ranks)
        context = {"rank": 0, "R": ranks, "E": experts, "S": capacity, "K": 1, "NvS_capacity": capacity, "B": experts}
        tokens = torch.from_numpy(counts.astype(np.int32))
        given = plan(context, torch.zeros(capacity, dtype=torch.int32), tokens, return_alloc=True)
        return np.asarray(given.numpy().reshape(ranks, experts).T, dtype=np.int64)

    return run


def llep(file: Path, most: float, least_tokens: int) -> Planner:
    """LLEP's (llep/gpt_oss_llep.py, Apache-2.0). most: load over the mean; least_tokens: of a product of matrices."""
    import torch

    plan = _function(file, "compute_llep_lpt_plan", "llep/gpt_oss_llep.py of LeastLoadedEP")

    def run(counts: IntArray) -> IntArray:
        ranks, experts = counts.shape
        given = plan(torch.from_numpy(counts.sum(axis=0)), ranks, 0, experts // ranks, most, least_tokens)
        quotas = np.zeros((experts, ranks), dtype=np.int64)
        for expert, parts in given.lpt_plan.items():
            for rank, start, end in parts:
                quotas[expert, rank] += end - start
        return quotas

    return run


def ultraep(slots: int) -> Planner:
    """UltraEP's first solver by its description (MIT): experts with most load a replica get replicas until all spare
    slots are used, these go to the ranks with the least load, and replicas share equally. It does not look at homes
    to decide what is copied, so homes change its balance alone."""

    def run(counts: IntArray) -> IntArray:
        ranks, experts = counts.shape
        load, size = counts.sum(axis=0).astype(np.float64), experts // ranks
        replicas = np.ones(experts, dtype=np.int64)
        for _ in range(ranks * slots):
            replicas[np.where(replicas < ranks, load / replicas, -1.0).argmax()] += 1
        hosts = np.arange(experts)[:, None] // size == np.arange(ranks)
        of_rank, free = (hosts * (load / replicas)[:, None]).sum(axis=0), np.full(ranks, slots)
        for expert in np.argsort(-load / replicas, kind="stable"):
            for _ in range(replicas[expert] - 1):
                open_ranks = np.where(~hosts[expert] & (free > 0), of_rank, np.inf)
                rank = int(open_ranks.argmin())
                if np.isfinite(open_ranks[rank]):
                    hosts[expert, rank] = True
                    free[rank] -= 1
                    of_rank[rank] += load[expert] / replicas[expert]
        number, tokens = hosts.sum(axis=1), counts.sum(axis=0)
        extra = (np.cumsum(hosts, axis=1) <= (tokens % number)[:, None]) & hosts
        return np.asarray((tokens // number)[:, None] * hosts + extra)

    return run


def _function(file: Path, name: str, what: str) -> Callable[..., Any]:
    """One function of a module and the classes it names, without the imports of the rest of its package."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and node.name == name)
    ]
    if not any(isinstance(node, ast.FunctionDef) for node in nodes):
        raise SystemExit(f"{file}: has no function {name}; expected {what}")
    import dataclasses
    import typing

    import torch

    plain = [node for node in nodes if not (isinstance(node, ast.ClassDef) and node.bases)]
    space: dict[str, Any] = {"torch": torch, "dataclass": dataclasses.dataclass, **vars(typing)}
    exec(compile(ast.Module(plain, []), str(file), "exec"), space)  # noqa: S102 (a file that the caller names)
    function: Callable[..., Any] = space[name]
    return function
