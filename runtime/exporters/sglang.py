"""SGLang's `--init-expert-location` file, as JSON or as a tensor file (.pt), and static shares for a fork of it.

Format: `compute_initial_expert_location_metadata` in sglang/srt/eplb/expert_location.py (read in 0.5.23): the file's
suffix decides between `torch.load` (.pt) and JSON (.json), and it holds {"physical_to_logical_map": [layers][slots]}
and no other key, for every key is passed on as an argument. Row i is the model's layer i, dense layers included; SGLang
checks neither the number of rows nor that experts are covered. It routes on logical experts and maps them afterwards,
so expert groups of the model do not restrict a plan. Among replicas it prefers one on the token's own GPU, then one on
its node, where its all-to-all backend allows; equal shares are what is left. Ranks that are lost keep their numbers:
its elasticity-aware EPLB leaves expert 0 in their slots, as is written here for devices without any.

Shares: HYGON-AI's sglang-das (pull request 386; docs and benchmark/eplb/prepare_static_lp.py) divides an expert's
tokens among its replicas by a second tensor file, {"physical_to_logical_map" [layers, slots], "physical_mass" float32
[layers, slots]}, named by SGLANG_EXPERIMENTAL_LPLB_STATIC_PROBS, with `--ep-dispatch-algorithm lp`. Masses count
against those of the same expert's other replicas; the map must be exactly the one served.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..._tensor_files import array_of
from ..._types import FloatArray, IntArray
from ...placement.engines import engine_profile
from ...placement.errors import FileFormatError, InputError
from ...placement.model import ModelSpec
from ...placement.plan import Plan, equal_shares
from ...placement.topology import Topology
from .base import Usage, checked, every_node, expert_row, load_content, model_rows, plan_of_rows, quoted, tensor_file

KEY, MASS = "physical_to_logical_map", "physical_mass"
SUFFIXES = (".json", ".pt")


class SGLang:
    """Rows of dense layers hold expert i mod E, as SGLang's own trivial map has them."""

    name = "sglang"
    profile = engine_profile("sglang")

    def content(self, plan: Plan, *, hidden_layers: int | None = None, suffix: str = ".json") -> str | bytes:
        """hidden_layers: `num_hidden_layers` of the model; wanted when dense layers follow the last MoE layer."""
        if suffix not in SUFFIXES:
            raise InputError(f"SGLang tells formats by the file's name: it ends in .json or .pt, not {suffix!r}")
        table = model_rows(plan, with_lost_ranks(plan), hidden_layers)
        return tensor_file("a .pt file", **{KEY: table}) if suffix == ".pt" else json.dumps({KEY: table.tolist()})

    def recognises(self, content: Any) -> bool:
        return isinstance(content, dict) and KEY in content and MASS not in content

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads the rows of the model's MoE layers; ranks with nothing but expert 0 are lost ones, which is warned of.

        Raises:
            FileFormatError: no such key, another key beside it, too few rows, a row of the wrong length, an id out of
                range, a layer that misses an expert; the row is named.
        """
        data = load_content(path)
        if not isinstance(data, dict) or set(data) != {KEY}:
            fields = sorted(map(str, data))[:5] if isinstance(data, dict) else type(data).__name__
            raise FileFormatError(
                f"{path}: expected one key {KEY!r} holding a list, found {fields}; SGLang takes no other key"
            )
        plan = plan_of_rows(_moe_rows(data[KEY], path, model), str(path), model, topology)
        ranks = lost_ranks(plan.physical_to_logical, topology.num_devices)
        if not len(ranks):
            return plan
        warnings.warn(
            f"{path}: ranks {', '.join(map(str, ranks))} hold expert 0 alone: taken for lost ranks, without slots",
            stacklevel=2,
        )
        left = ~np.isin(plan.slot_device, ranks)
        table = plan.physical_to_logical[:, left]
        return Plan(model=model, topology=topology, physical_to_logical=table, slot_device=plan.slot_device[left])

    def usage(self, plan: Plan, path: Path, model_path: str = "MODEL") -> str:
        return Usage(
            sglang_commands(plan, model_path, f"--init-expert-location {quoted(path)}"),
            files=every_node(path, plan),
            applied="each rank logs 'init_expert_location from init_by_mapping' at start; with the environment's "
            f"SGLANG_LOG_EXPERT_LOCATION_METADATA=1 also the map. {checked('URL|DUMP')}",
            back="restart without --init-expert-location and --ep-num-redundant-experts.",
            notes=(
                "Leave --enable-eplb out: it would move experts away from the plan.",
                "SGLang ignores the option, without a word, for model classes that do not declare expert locations: "
                "Mixtral and OLMoE as of 0.5.23. Permute the checkpoint for those.",
            ),
        ).text()


class SGLangShares:
    """A plan's own shares, for forks of SGLang that serve them."""

    name = "sglang-lp"
    profile = engine_profile("sglang-lp")

    def content(self, plan: Plan, *, part: str = "shares", hidden_layers: int | None = None) -> bytes:
        """part: "shares", the file of masses, or "map", the placement that goes with it. hidden_layers: as SGLang's."""
        if part not in ("shares", "map"):
            raise InputError(f"part {part!r} is neither 'shares' nor 'map'")
        table = model_rows(plan, plan.physical_to_logical, hidden_layers)
        if part == "map":
            return tensor_file("a .pt file", **{KEY: table})
        mass = equal_shares(table, plan.model.experts)
        mass[list(plan.moe_layers)] = plan.shares
        return tensor_file("a .pt file", **{KEY: table, MASS: (mass / plan.model.experts).astype(np.float32)})

    def recognises(self, content: Any) -> bool:
        return isinstance(content, dict) and KEY in content and MASS in content

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads map and masses, or a map alone, whose shares are equal.

        Raises:
            FileFormatError: as `SGLang.read`, or masses that are no shares; the layer and expert are named.
        """
        data = load_content(path)
        if not isinstance(data, dict) or KEY not in data or not set(data) <= {KEY, MASS}:
            raise FileFormatError(f"{path}: expected {KEY!r} and {MASS!r}")
        rows = _moe_rows(data[KEY], path, model)
        shares = _shares(data[MASS], np.array(rows), path, model) if MASS in data else np.empty(0)
        return plan_of_rows(rows, str(path), model, topology, shares=shares)

    def usage(self, plan: Plan, path: Path, model_path: str = "MODEL") -> str:
        table = path.with_name(f"{path.stem}-map.pt")
        options = f"--init-expert-location {quoted(table)} --ep-dispatch-algorithm lp"
        served = sglang_commands(plan, model_path, options)
        return Usage(
            [f"SGLANG_EXPERIMENTAL_LPLB_STATIC_PROBS={quoted(path)} {line}" for line in served],
            files=f"{every_node(path, plan)} So must {quoted(table)}: `moeplace export PLAN --for sglang-lp --part map "
            f"-o {quoted(table)}` writes it.",
            applied=f"the server ends at start where map and shares do not fit each other. {checked('URL|DUMP')}",
            back="restart without the variable and --ep-dispatch-algorithm lp: replicas then take equal shares.",
            notes=("HYGON-AI's sglang-das, on HIP; other SGLangs solve an LP a batch and read no shares.",),
        ).text()


def sglang_commands(plan: Plan, model_path: str, options: str) -> list[str]:
    """The command of each node."""
    devices, nodes, redundant = plan.topology.num_devices, plan.topology.num_nodes, _redundant(plan)
    line = f"python -m sglang.launch_server --model-path {quoted(model_path)} --tp-size {devices} --ep-size {devices}"
    if redundant:
        # Without an all-to-all backend releases before 0.5.20 answered wrongly with replicas.
        line += f" --moe-a2a-backend deepep --ep-num-redundant-experts {redundant}"
    line += f" {options}"
    if nodes == 1:
        return [line]
    return [f"{line} --nnodes {nodes} --node-rank {node} --dist-init-addr HEAD:20000" for node in range(nodes)]


def _redundant(plan: Plan) -> int:
    """Slots beyond one an expert, those of lost ranks among them."""
    return int(with_lost_ranks(plan).shape[1]) - plan.model.experts


def lost_ranks(table: IntArray, devices: int) -> IntArray:
    """Ranks of a slot table [L, P] that are lost: several slots with expert 0 alone in every layer, while others have
    it too."""
    ranks = table.reshape(len(table), devices, -1)
    empty = (ranks == 0).all(axis=(0, 2))
    rest = (ranks[:, ~empty] == 0).any(axis=(1, 2)).all()
    return np.flatnonzero(empty) if ranks.shape[2] > 1 and rest else np.empty(0, np.int64)


def with_lost_ranks(plan: Plan) -> IntArray:
    """[L, P] the slot table with as many slots on every device, expert 0 in those of devices that have none."""
    counts = np.bincount(plan.slot_device, minlength=plan.topology.num_devices)
    rows = np.zeros((plan.model.layers, len(counts), int(counts.max())), dtype=np.int64)
    rows[:, counts > 0] = plan.physical_to_logical.reshape(plan.model.layers, -1, int(counts.max()))
    return rows.reshape(plan.model.layers, -1)


def _moe_rows(table: Any, path: Path, model: ModelSpec) -> list[list[int]]:
    """Checked rows of the model's MoE layers, out of rows of all layers."""
    if isinstance(table, str | int | float | dict | None):
        raise FileFormatError(f"{path}: {KEY} is {str(table)[:40]!r}, expected a row of expert ids for each layer")
    if not isinstance(table, list):
        table = array_of(path, KEY, table, 2).tolist()
    last = model.moe_layers[-1]
    if len(table) <= last:
        raise FileFormatError(
            f"{path}: {len(table)} rows, the model's last MoE layer is {last}; SGLang counts dense layers too"
        )
    slots = len(expert_row(table[0], f"{path}: {KEY}[0]", model))
    rows = [expert_row(row, f"{path}: {KEY}[{index}]", model, slots) for index, row in enumerate(table)]
    return [rows[layer] for layer in model.moe_layers]


def _shares(mass: Any, rows: IntArray, path: Path, model: ModelSpec) -> FloatArray:
    """[L, P] shares from masses of all layers; an expert without mass is served equally."""
    import torch

    if not isinstance(mass, torch.Tensor) or mass.ndim != 2 or not mass.is_floating_point():
        raise FileFormatError(f"{path}: {MASS} must be a tensor of fractions in 2 dimensions")
    values = mass.double().numpy()
    if values.shape[0] <= model.moe_layers[-1] or values.shape[1] != rows.shape[1]:
        raise FileFormatError(f"{path}: {MASS} has shape {values.shape}, the map has {rows.shape[1]} slots a layer")
    values = values[list(model.moe_layers)]
    if not np.isfinite(values).all() or (values < 0).any():
        raise FileFormatError(f"{path}: {MASS} must be finite and not negative")
    total = np.zeros((len(rows), model.experts))
    layer = np.arange(len(rows))[:, None]
    np.add.at(total, (layer, rows), values)
    own = total[layer, rows]
    return np.where(own > 0, values / np.where(own > 0, own, 1.0), equal_shares(rows, model.experts))
