"""Gives exported plans to the engines' own code: what each makes of the file must be the plan.

    pip download --no-deps sglang vllm vllm-ascend        # in a folder outside the project; unzip each wheel there
    python -m benchmarks engine_parsers --sglang DIR --vllm DIR --vllm-ascend DIR --trtllm DIR/llm_args.py

Each option names an unpacked wheel (for TensorRT-LLM, whose wheel is not on PyPI, its tensorrt_llm/llmapi/llm_args.py);
engines without one are skipped and said so. Nothing is downloaded. Each engine runs in its own process, without a GPU.
The parsing code is the engine's, its surroundings are stood in for:

- SGLang: `compute_initial_expert_location_metadata` and all of expert_location.py run as they are, for every rank.
    Stood
  in for: sglang.srt.runtime_context (the server's settings), get_model_architecture (the model's layers and experts)
  and elastic_expanded_world_enabled (False).
- vLLM: the policy classes and `compute_logical_maps` run as they are; our policy is installed by the plugin. Stood in
    for:
  vllm.config.parallel (the policy's name). No release reads a placement file, so no parser of the JSON exists to run.
- vLLM-Ascend: `init_eplb_config`, `expert_file_to_tensor` and `generate_log2phy_map` run as they are, for every rank.
    Stood
  in for: vllm.logger, vllm's determine_expert_map (not reached), Tensor.npu (returns the tensor).
- TensorRT-LLM: `MoeLoadBalancerConfig` runs as it is. Stood in for: StrictBaseModel (pydantic's, extra fields
    forbidden)
  and the Field wrapper (pydantic's).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from runner import Report, child

import moeplace as mp
from moeplace.runtime.exporters.export import export_plan

PLANS = 40


def draw_plan(rng: np.random.Generator) -> mp.Plan:
    """A plan of random shape with dense layers between, no expert twice on a device."""
    devices, per, count = int(rng.choice([2, 4, 8])), int(rng.integers(2, 6)), int(rng.integers(1, 5))
    slots = devices * per
    experts = int(rng.integers(max(per, slots // 2), slots + 1))
    layers = tuple(sorted(rng.choice(9, size=count, replace=False).tolist()))
    rows = []
    while len(rows) < count:
        pool = np.concatenate([np.arange(experts), rng.choice(experts, size=slots - experts)])
        row = rng.permutation(pool)
        if all(len(set(part)) == per for part in row.reshape(devices, per)):
            rows.append(row)
    spec = mp.ModelSpec(layers=count, moe_layers=layers, experts=experts, top_k=2, hidden_size=8, ffn_size=8)
    topology = mp.Topology.preset("gb200-nvl72", devices_per_node=devices)
    return mp.Plan(spec, topology, np.stack(rows), np.repeat(np.arange(devices), per))


def stand_in(name: str, **members: Any) -> None:
    """Registers a module, and packages above it that are not the engine's own."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def load_source(name: str, path: Path) -> Any:
    """Runs one file of an engine as the module it is, without its package's own start-up."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: not a Python file")
    parts = name.split(".")
    for depth in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def refused(call: Any) -> str:
    """The kind of error a call ends with."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is what is asked
        return type(error).__name__
    raise AssertionError("the engine took what it was expected to refuse")


def check_sglang(folder: Path, plans: list[mp.Plan], scratch: Path) -> str:
    import torch

    moe = SimpleNamespace(ep_dispatch_algorithm="static", moe_a2a_backend="deepep", ep_join_mode=None)
    parallel = SimpleNamespace(nnodes=1, elastic_ep_initial_size=None)
    stand_in(
        "sglang.srt.runtime_context",
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_exec=lambda: SimpleNamespace(moe=moe),
        get_parallel=lambda: parallel,
        get_resources=lambda: None,
    )
    stand_in("sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
    stand_in("sglang.srt.model_loader", get_model_architecture=lambda config: (config.model_class, None))
    engine = load_source("sglang.srt.eplb.expert_location", folder / "sglang/srt/eplb/expert_location.py")

    for number, plan in enumerate(plans):
        hidden = plan.moe_layers[-1] + 2
        name = "sglang.pt" if number % 2 else "sglang.json"
        path = export_plan(plan, "sglang", scratch / name, hidden_layers=hidden)
        shape = engine.ModelConfigForExpertLocation(num_layers=hidden, num_logical_experts=plan.model.experts)
        model = SimpleNamespace(
            model_class=SimpleNamespace(get_model_config_for_expert_location=lambda _, shape=shape: shape),
            hf_config=None,
        )
        moe.init_expert_location = str(path)
        moe.ep_num_redundant_experts = plan.num_slots - plan.model.experts
        parallel.ep_size = plan.topology.num_devices
        trivial = engine.ExpertLocationMetadata.init_trivial(model, 0)
        for rank in range(plan.topology.num_devices):
            read = engine.compute_initial_expert_location_metadata(model, rank)
            table = read.physical_to_logical_map.numpy()
            assert np.array_equal(table[list(plan.moe_layers)], plan.physical_to_logical)
            dense = sorted(set(range(hidden)) - set(plan.moe_layers))
            assert torch.equal(read.physical_to_logical_map[dense], trivial.physical_to_logical_map[dense])
            assert read.num_local_physical_experts == (plan.slot_device == rank).sum()
            for row, layer in enumerate(plan.moe_layers):
                served = read.logical_to_rank_dispatch_physical_map[layer].numpy()
                assert np.array_equal(plan.physical_to_logical[row][served], np.arange(plan.model.experts))
    path = export_plan(plan, "sglang", scratch / "sglang.json", hidden_layers=hidden)
    moe.init_expert_location = str(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": 1}))
    return f"an extra key: {refused(lambda: engine.compute_initial_expert_location_metadata(model, 0))}"


def check_vllm(folder: Path, plans: list[mp.Plan], scratch: Path) -> str:
    import typing

    import torch

    from moeplace.runtime.exporters.vllm import PLAN_VARIABLE, install

    stand_in("vllm.config.parallel", EPLBPolicyOption=typing.Literal["default"])
    for package in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
        module = sys.modules.setdefault(package, ModuleType(package))
        module.__path__ = [str(folder / package.replace(".", "/"))]
    policies = importlib.import_module("vllm.distributed.eplb.policy")
    default = policies.EPLB_POLICIES["default"]
    state = folder / "vllm/distributed/eplb/eplb_state.py"
    forms = itertools.cycle((None, "49572", "41141"))
    for plan in plans:
        # The plugin reads the plan and its export alike.
        form = next(forms)
        if form is None:
            plan.save(scratch / "plan.json")
        else:
            export_plan(plan, "vllm", scratch / "plan.json", form=form)
        os.environ[PLAN_VARIABLE] = str(scratch / "plan.json")
        install()
        policy = policies.EPLB_POLICIES["default"]
        assert issubclass(policy, policies.AbstractEplbPolicy)
        layers, experts, devices = plan.model.layers, plan.model.experts, plan.topology.num_devices
        load = torch.randint(0, 1000, (layers, experts), dtype=torch.int32)
        start = torch.tensor([[*range(experts), *[i % experts for i in range(plan.num_slots - experts)]]] * layers)
        arguments = (load, plan.num_slots, 1, 1, devices, start)
        ours, theirs = policy.rebalance_experts(*arguments), default.rebalance_experts(*arguments)
        if isinstance(theirs, tuple):
            table, slots, counts = ours
            assert [part.dtype for part in ours] == [part.dtype for part in theirs]
            assert [part.ndim for part in ours] == [part.ndim for part in theirs]
        else:
            table, maps = ours, extract(state, "compute_logical_maps", {"torch": torch})
            slots, counts = maps(ours, experts)
            assert (table.dtype, table.shape) == (theirs.dtype, theirs.shape)
        assert np.array_equal(table.numpy(), plan.physical_to_logical)
        assert np.array_equal(slots.numpy(), plan.logical_to_physical)
        assert np.array_equal(counts.numpy(), plan.replicas)
    return "three maps" if isinstance(theirs, tuple) else "one map"


def check_vllm_ascend(folder: Path, plans: list[mp.Plan], scratch: Path) -> str:
    import torch

    torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]
    stand_in("vllm.logger", logger=SimpleNamespace(warning=lambda *_: None))
    stand_in("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
    engine = load_source("vllm_ascend.eplb.core.eplb_utils", folder / "vllm_ascend/eplb/core/eplb_utils.py")
    for plan in plans:
        path = export_plan(plan, "vllm-ascend", scratch / "ascend.json")
        config = SimpleNamespace(expert_map_path=str(path), dynamic_eplb=False, num_redundant_experts=0)
        for index, row in enumerate(plan.physical_to_logical):
            for rank in range(plan.topology.num_devices):
                moe = SimpleNamespace(num_experts=plan.model.experts, ep_size=plan.topology.num_devices, ep_rank=rank)
                _, local, served, redundant = engine.init_eplb_config(config, index, moe)
                mine = row[plan.slot_device == rank]
                assert np.array_equal(local.numpy()[mine], np.arange(len(mine)))
                assert int((local >= 0).sum()) == len(mine)
                assert np.array_equal(row[served.numpy()], np.arange(plan.model.experts))
                assert redundant == plan.num_slots - plan.model.experts
    return "ok"


def check_trtllm(file: Path, plans: list[mp.Plan], scratch: Path) -> str:
    import typing

    import pydantic
    import yaml

    strict = type("StrictBaseModel", (pydantic.BaseModel,), {"model_config": pydantic.ConfigDict(extra="forbid")})
    names = {"StrictBaseModel": strict, "Field": pydantic.Field, "PrivateAttr": pydantic.PrivateAttr}
    config_class = extract(file, "MoeLoadBalancerConfig", {**vars(typing), **names})
    for plan in plans:
        path = export_plan(plan, "trtllm", scratch / "trtllm.yaml", extra_layers=[plan.moe_layers[-1] + 1])
        data = yaml.safe_load(path.read_text())
        for rank in range(plan.topology.num_devices):
            config = config_class(**data)
            config.setup(rank, plan.topology.num_devices)
            for row, layer in zip(plan.physical_to_logical, plan.moe_layers, strict=True):
                read = config.get_layer_initial_global_assignments(layer)
                assert read == row.tolist()
                assert set(read) == set(range(plan.model.experts))
                assert read[config.slot_start : config.slot_end] == row[plan.slot_device == rank].tolist()
            assert len(config.get_layer_initial_global_assignments(plan.moe_layers[-1] + 1)) == plan.num_slots
        assert config.layer_updates_per_iter == 0
    return f"an extra field: {refused(lambda: config_class(**data, note=1))}"


def extract(file: Path, name: str, names: dict[str, Any]) -> Any:
    """One class or function of a file, run in a module of the given names."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            module = ModuleType("extracted")
            vars(module).update(names)
            sys.modules["extracted"] = module
            exec(compile(ast.Module([node], []), str(file), "exec"), vars(module))  # noqa: S102
            return vars(module)[name]
    raise SystemExit(f"{file}: has no {name}")


CHECKS = {"sglang": check_sglang, "vllm": check_vllm, "vllm-ascend": check_vllm_ascend, "trtllm": check_trtllm}


def version(path: Path) -> str:
    found = sorted(path.glob("*.dist-info/METADATA")) if path.is_dir() else []
    lines = found[0].read_text(errors="replace").splitlines() if found else []
    return next((line.removeprefix("Version: ") for line in lines if line.startswith("Version: ")), "?")


def check_engines(name: str, engines: Iterable[str], options: argparse.Namespace, report: Report) -> None:
    """Runs each engine's check in a process of its own, where its option says where its code is."""
    table = report.table("engines", ("engine", "version", "found"))
    for engine in engines:
        path = vars(options)[engine.replace("-", "_")]
        if path is None:
            table.row(engine, None, f"skipped: no --{engine} given")
            continue
        done = child(name, "--only", engine, f"--{engine}", path.resolve())
        if done.returncode:
            report.failure = f"{engine}: {done.stderr.strip()[-2500:]}"
        table.row(engine, version(path), "FAILED" if done.returncode else done.stdout.strip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for engine in CHECKS:
        parser.add_argument(f"--{engine}", type=Path)
    parser.add_argument("--only", choices=CHECKS, help=argparse.SUPPRESS)


def run(options: argparse.Namespace, report: Report) -> None:
    if options.only:
        path = vars(options)[options.only.replace("-", "_")]
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as scratch:
            print(CHECKS[options.only](path, [draw_plan(rng) for _ in range(PLANS)], Path(scratch)))
        return
    check_engines("engine_parsers", CHECKS, options, report)
