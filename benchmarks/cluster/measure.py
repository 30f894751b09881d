"""Step times of plans, on the ranks of a cluster: started by `placements.py` under torchrun.

measure.py calibrate FOLDER TOKENS      writes FOLDER/calibration.json
measure.py run FOLDER                   runs what FOLDER/work.json says, and writes FOLDER/times.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import plans
import torch
import torch.distributed as dist
from devices import Slowed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moeplace as mp
from moeplace.runtime import calibrate
from moeplace.runtime.moe.expert_mlps import SwiGLU


class Blocked:
    """Seconds this rank spends inside all-to-alls: between the call and its return, and in waiting for it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inner = dist.all_to_all_single
        dist.all_to_all_single = self._timed

    def _timed(self, *given: Any, **options: Any) -> Any:
        began = time.perf_counter()
        work = self._inner(*given, **options)
        self.seconds += time.perf_counter() - began
        return None if work is None else _Waiting(self, work)


class _Waiting:
    def __init__(self, blocked: Blocked, work: Any) -> None:
        self._blocked, self._work = blocked, work

    def wait(self) -> None:
        began = time.perf_counter()
        self._work.wait()
        self._blocked.seconds += time.perf_counter() - began


class RecordedRouter(nn.Module):
    """Sends tokens where the trained model sent them. Gate weights were not recorded: the highest gets most."""

    def __init__(self) -> None:
        super().__init__()
        self.expert_TK: Tensor = torch.empty(0)

    def forward(self, x_TD: Tensor) -> tuple[None, Tensor, Tensor]:
        weight_TK = torch.tensor([0.6, 0.4]).expand(len(x_TD), 2)
        return None, weight_TK, self.expert_TK


class Layers(nn.Module):
    """The MoE layers of the model under one plan, each with a norm before it and a residual around it."""

    def __init__(self, plan: mp.Plan, mesh: DeviceMesh, dispatch: str, replica_choice: Any, **settings: Any) -> None:
        super().__init__()
        kind = SwiGLU() if settings.pop("real", False) else Slowed()
        settings |= {"kind": kind, "dispatch": dispatch, "replica_choice": replica_choice}
        self.layers = nn.ModuleList(
            mp.ExpertParallelMoE(plan.model, plan, mesh, layer, router=RecordedRouter(), **settings)
            for layer in plan.moe_layers
        )

    def forward(self, x_TD: Tensor, expert_TLK: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            layer.gate.expert_TK = expert_TLK[:, index]
            x_TD = x_TD + layer(nn.functional.rms_norm(x_TD, x_TD.shape[-1:]))
        return x_TD


class Passes:
    """Steps of one plan on this rank's tokens. `coherent`: values a token of context to share, None for
    dispatch_combine. `replica_choice`: "share" or "balanced". `settings`: more of the layers' (chunks,
    delay_weight_gradients), "real" for experts of no emulated device."""

    def __init__(
        self,
        plan: mp.Plan,
        mesh: DeviceMesh,
        run: dict[str, Any],
        coherent: int | None,
        replica_choice: str,
        settings: dict[str, Any],
    ) -> None:
        self.backward, self.coherent = run["pass"] == "forward and backward", coherent
        self.layers: Any
        if coherent is None:
            self.layers = Layers(plan, mesh, run["dispatch"], replica_choice, **settings)
        else:
            from coherent import CoherentLayers

            self.layers = CoherentLayers(plan, mesh, run["dispatch"], coherent)

    def step(self, x_TD: Tensor, here_T: Tensor, expert_BLK: Tensor) -> None:
        """here_T: which of the step's B tokens are at home on this rank."""
        if self.backward:
            self.layers(x_TD.requires_grad_(), expert_BLK[here_T]).square().mean().backward()
            self.layers.zero_grad(set_to_none=True)
            return
        with torch.no_grad():
            if self.coherent is None:
                self.layers(x_TD, expert_BLK[here_T])
            else:
                self.layers(x_TD, here_T, expert_BLK)


def main(what: str, folder: Path, tokens: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if what == "calibrate":
        measure_devices(folder, tokens)
    else:
        run_plans(folder)
    dist.barrier()
    dist.destroy_process_group()


def measure_devices(folder: Path, tokens: int) -> None:
    """What `moeplace calibrate` does, on devices like those of the runs."""
    here = plans.SPEC.experts // dist.get_world_size()
    found = calibrate(plans.SPEC, kind=Slowed(), experts=here, tokens=tokens, uniform=True, listen=_note)
    if dist.get_rank() == 0:
        (folder / "calibration.json").write_text(json.dumps(found.to_dict() | {"remarks": found.remarks}))


def _note(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)


def run_plans(folder: Path) -> None:
    work = json.loads((folder / "work.json").read_text())
    rank, world, local = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (world // local, local), mesh_dim_names=("node", "device"))
    blocked = Blocked()
    found = []
    for run in work["runs"]:
        routing = np.load(folder / run["routing"])
        expert_STLK = torch.from_numpy(routing["expert_ids"].astype(np.int64))
        models = {
            name: Passes(
                mp.Plan.load(folder / file),
                mesh,
                run,
                run["coherent"].get(name),
                "balanced" if name in run["balanced"] else "share",
                run["settings"].get(name, {}),
            )
            for name, file in run["plans"].items()
        }
        here = torch.from_numpy(np.flatnonzero(routing["source"] == rank))
        torch.manual_seed(rank)
        x_TD = torch.randn(len(here), routing["hidden"])
        for passes in models.values():
            passes.step(x_TD, here, expert_STLK[0])
        names = list(models)
        for step, expert_TLK in enumerate(expert_STLK):
            first = step % len(names)
            for name in names[first:] + names[:first]:
                dist.barrier()
                blocked.seconds, began = 0.0, time.perf_counter()
                models[name].step(x_TD, here, expert_TLK)
                mine = torch.tensor([time.perf_counter() - began, -blocked.seconds])
                dist.all_reduce(mine, dist.ReduceOp.MAX)
                row = {"run": run["name"], "plan": name, "step": step}
                found.append(row | {"seconds": float(mine[0]), "blocked": -float(mine[1])})
        _note(f"{run['name']}: measured")
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if sys.argv[1] == "calibrate" else 0)
