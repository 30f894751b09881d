"""A training loop that keeps its plan right: record some steps, solve beside training, apply if that pays, go on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._arguments import check_fields
from ..placement.errors import InputError, MoeplaceError, RankError
from ..placement.plan import Plan, plan_from_dict, plan_to_dict
from ..profiler import profile
from ..profiler.profile import Recorder
from ..runtime.moe.compression import Compression, quantized_rows
from ..runtime.moe.coordination import wait_everywhere
from ..runtime.moe.data_parallel import expert_layers
from ..runtime.moe.mesh import ExpertMesh
from ..runtime.moe.migrate import Migration, slot_tensors
from .propose import Terms, answer, request

PENDING, KEEP, APPLY = range(3)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def row_dtypes(dtype: torch.dtype, compression: Compression | None) -> tuple[str, str]:
    """What `Objective` calls the types in which rows of `dtype` travel to experts and back."""
    own, rows = DTYPES.get(dtype, "fp32"), quantized_rows(compression)
    names = {} if rows is None else rows.objective
    return names.get("dispatch_dtype", own), names.get("combine_dtype", own)


class PlanChange(Protocol):
    """A change of plan under way: `moeplace.Migration`, or what does the same inside a framework."""

    moves: int
    bytes_moved: int
    pauses: list[float]

    def advance(self, limit_bytes: int | None = None) -> bool: ...

    def cancel(self) -> None: ...


class PlacedModel(Protocol):
    """A model whose plan a `Rebalancer` changes. Every rank calls the same.

    plan: the one in force. mesh: the ranks that go on together. row_dtypes: what `Objective` calls the types in which
    rows travel to experts and back.
    """

    @property
    def plan(self) -> Plan: ...

    @property
    def row_dtypes(self) -> tuple[str, str]: ...

    @property
    def mesh(self) -> ExpertMesh: ...

    def record(self, folder: Path) -> Recorder:
        """A recorder of this rank's routing, to be entered."""
        ...

    def tensors(self) -> Sequence[Tensor]:
        """[rows, ...] of one layer: weights first, and what the optimizer keeps for them."""
        ...

    def change(self, plan: Plan) -> PlanChange: ...


class _ExpertLayers:
    """The layers of placed experts of a model."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        layers = expert_layers(model)
        if not layers:
            raise InputError(f"{type(model).__name__} has no expert layers; parallelize it first")
        self._model, self._optimizer, self._layer = model, optimizer, layers[0][1]

    @property
    def plan(self) -> Plan:
        return self._layer.plan

    @property
    def mesh(self) -> ExpertMesh:
        return self._layer.mesh

    @property
    def row_dtypes(self) -> tuple[str, str]:
        return row_dtypes(next(self._layer.parameters()).dtype, self._layer.compression)

    def record(self, folder: Path) -> Recorder:
        return profile(self._model, folder)

    def tensors(self) -> Sequence[Tensor]:
        return [tensor.value for tensor in slot_tensors(self._layer, self._optimizer)]

    def change(self, plan: Plan) -> PlanChange:
        return Migration(self._model, plan, self._optimizer)


@check_fields
class Rebalancer:
    """Call `step()` on every rank after each step's optimizer.step() and zero_grad().

    Every `every` steps, `record_steps` steps are recorded; a process of the first rank then solves and decides on them,
    and if the decision is to apply, experts move. Meanwhile training goes on; the plan in force changes between two
    steps on all ranks together.

    plan: the plan in force. applied: how often it has changed.

    Args:
        model: as it is called (wrapped or not), with expert layers (`parallelize`, `ExpertParallelMoE`); or a
            `PlacedModel`, as `moeplace.integrations` has them.
        optimizer: whose state moves with the experts; a `PlacedModel` has its own.
        folder: shared by the ranks; gets a folder a round, with the trace, the plan in force, the answer and its
            reason.
        every: steps from one recording to the next.
        record_steps: steps a recording.
        solver: a name of `solver_names()`, None for the one that fits.
        seconds: for solving.
        horizon_steps: how long a plan is expected to stand, default `every`.
        bytes_per_step: of experts, at most, that move in a step; all at once when None.
        say: called on the first rank with one line of news.

    Raises:
        InputError: no expert layers in the model, or counts below 1.
    """

    def __init__(
        self,
        model: nn.Module | PlacedModel,
        optimizer: torch.optim.Optimizer | None,
        folder: str | Path,
        *,
        every: int = 500,
        record_steps: int = 20,
        solver: str | None = None,
        seconds: float = 60.0,
        horizon_steps: float | None = None,
        bytes_per_step: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            self._placed = model
        elif optimizer is None:
            raise InputError("optimizer is None; give the one whose state belongs to the experts of this model")
        else:
            self._placed = _ExpertLayers(model, optimizer)
        for name, value in (("every", every), ("record_steps", record_steps)):
            if value < 1:
                raise InputError(f"{name} ({value}) must be at least 1")
        if every <= record_steps:
            raise InputError(f"every ({every}) must be more than record_steps ({record_steps})")
        self._folder, self._mesh = Path(folder), self._placed.mesh
        self._every, self._record_steps, self._bytes_per_step = every, record_steps, bytes_per_step
        self._solver, self._seconds = solver, seconds
        self._horizon = float(every if horizon_steps is None else horizon_steps)
        self._say = say if say is not None and self._mesh.first else lambda news: None
        self._steps = self._round = self.applied = 0
        self._recorder: Recorder | None = None
        self._solving: subprocess.Popen[bytes] | None = None
        self._unsolved: str | None = None
        """On the first rank, why there will be no answer."""
        self._waiting = False
        self._change: PlanChange | None = None

    @property
    def plan(self) -> Plan:
        return self._placed.plan

    @property
    def _here(self) -> Path:
        return self._folder / f"round-{self._round:04d}"

    def state_dict(self) -> dict[str, int]:
        """Where the schedule stands, for a checkpoint; what is under way is not in it."""
        return {"steps": self._steps, "round": self._round, "applied": self.applied}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from `state_dict`: the next recording begins when it would have."""
        self._steps, self._round, self.applied = int(state["steps"]), int(state["round"]), int(state["applied"])

    def step(self) -> None:
        """Goes on with whatever is under way. Every rank calls it equally often."""
        self._steps += 1
        if self._change is not None:
            self._move(self._change)
        elif self._waiting:
            self._listen()
        elif self._recorder is not None:
            if self._steps % self._every == self._record_steps % self._every:
                self._solve(self._recorder)
        elif self._steps % self._every == 0:
            self._record()

    def close(self) -> None:
        """Ends what is under way, on every rank: a recording, a solve, a migration that has not flipped yet."""
        if self._recorder is not None:
            self._recorder.close(InputError("training ended before the recording was complete"))
        if self._solving is not None:
            self._solving.kill()
            self._solving.wait()
        if self._change is not None:
            self._change.cancel()
        self._recorder = self._solving = self._change = self._unsolved = None
        self._waiting = False

    def _record(self) -> None:
        self._round += 1
        self._recorder = self._placed.record(self._here / "trace")
        self._recorder.__enter__()

    def _solve(self, recorder: Recorder) -> None:
        recorder.close()
        self._recorder, self._waiting = None, True
        wait_everywhere(self._mesh)  # all shards are on disk
        if not self._mesh.first:
            return
        tensors = self._placed.tensors()
        dispatch_dtype, combine_dtype = self._placed.row_dtypes
        terms = Terms(
            self._solver,
            self._seconds,
            self._horizon,
            float(sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors)),
            ranks=tuple(tuple(row) for row in self._mesh.grid.tolist()),
            dispatch_dtype=dispatch_dtype,
            combine_dtype=combine_dtype,
        )
        try:
            arguments = request(self._here, self.plan, terms)
            with (self._here / "solver.log").open("wb") as log:
                self._solving = subprocess.Popen(
                    [sys.executable, *arguments],
                    stdout=log,
                    stderr=log,
                    preexec_fn=lambda: os.nice(10),
                    env=_environment(),
                )
        except (OSError, MoeplaceError) as error:
            # The others wait for an answer: this is one.
            self._unsolved = f"the solver cannot be started ({type(error).__name__}: {error})"
            return
        self._say(f"step {self._steps}: {self._record_steps} steps recorded, solving")

    def _listen(self) -> None:
        """The first rank says whether its process has ended, and with what."""
        message = torch.zeros(2, dtype=torch.int64)
        body = b""
        ended = self._solving is not None and self._solving.poll() is not None
        if ended or self._unsolved is not None:
            plan, reason = None, self._unsolved or ""
            if ended:
                try:
                    plan, reason = answer(self._here)
                except (OSError, MoeplaceError) as error:
                    reason = f"the solver's answer cannot be read ({error})"
            self._say(f"step {self._steps}: {'apply' if plan else 'keep'}: {reason}")
            body = b"" if plan is None else json.dumps(plan_to_dict(plan)).encode()
            message = torch.tensor([KEEP if plan is None else APPLY, len(body)])
            self._solving = self._unsolved = None
        message = self._from_first(message)
        if int(message[0]) == PENDING:
            return
        self._waiting = False
        if int(message[0]) == APPLY:
            own = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else None
            text = self._from_first(torch.empty(int(message[1]), dtype=torch.uint8) if own is None else own)
            plan = plan_from_dict(json.loads(text.numpy().tobytes()))
            self._change = self._placed.change(plan)
            self._move(self._change)

    def _from_first(self, value: Tensor) -> Tensor:
        value = value.to(self._mesh.device)
        if self._mesh.data is not None and self._mesh.rank == 0:
            dist.broadcast(value, int(self._mesh.grid[0, 0]), group=self._mesh.data)
        dist.broadcast(value, self._mesh.members[0], group=self._mesh.group)
        return value.cpu()

    def _move(self, change: PlanChange) -> None:
        try:
            done = change.advance(self._bytes_per_step)
        except RankError as error:
            # All ranks are told the same. If one is gone, the next step says so; if not, training goes on as it was.
            change.cancel()
            self._change = None
            self._say(f"step {self._steps}: {error}")
            return
        if done:
            self._change = None
            self.applied += 1
            moved = f"{change.moves} experts, {change.bytes_moved / 1e6:.1f} MB"
            self._say(f"step {self._steps}: new plan in force; {moved} moved in {len(change.pauses)} steps")


def _environment() -> dict[str, str]:
    """Without what makes a process a rank."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ranks}
