"""A training loop that keeps its plan right: record some steps, solve beside training, apply if that pays, go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..placement.errors import InputError, RankError
from ..placement.plan import Plan, plan_from_dict, plan_to_dict
from ..profiler import profile
from ..profiler.profile import Recorder
from ..runtime.moe.data_parallel import expert_layers
from ..runtime.moe.migrate import Migration, slot_tensors
from .propose import Terms, answer, request

PENDING, KEEP, APPLY = range(3)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Rebalancer:
    """Call `step()` on every rank after each step's optimizer.step() and zero_grad().

    Every `every` steps, `record_steps` steps are recorded; a process of the first rank then solves and decides on them,
    and if the decision is to apply, experts move. Meanwhile training goes on; the plan in force changes between two
    steps on all ranks together.

    plan: the plan in force. applied: how often it has changed.

    Args:
        model: as it is called (wrapped or not), with expert layers (`parallelize`, `ExpertParallelMoE`).
        optimizer: whose state moves with the experts.
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
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
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
        layers = expert_layers(model)
        if not layers:
            raise InputError(f"{type(model).__name__} has no expert layers; parallelize it first")
        for name, value in (("every", every), ("record_steps", record_steps)):
            if value < 1:
                raise InputError(f"{name} ({value}) must be at least 1")
        if every <= record_steps:
            raise InputError(f"every ({every}) must be more than record_steps ({record_steps})")
        self._model, self._optimizer, self._folder = model, optimizer, Path(folder)
        self._layer = layers[0][1]
        self._mesh = self._layer.mesh
        self._every, self._record_steps, self._bytes_per_step = every, record_steps, bytes_per_step
        self._solver, self._seconds = solver, seconds
        self._horizon = float(every if horizon_steps is None else horizon_steps)
        self._say = say if say is not None and self._mesh.rank == 0 else lambda news: None
        self._steps = self._round = self.applied = 0
        self._recorder: Recorder | None = None
        self._solving: subprocess.Popen[bytes] | None = None
        self._waiting = False
        self._change: Migration | None = None

    @property
    def plan(self) -> Plan:
        return self._layer.plan

    @property
    def _here(self) -> Path:
        return self._folder / f"round-{self._round:04d}"

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
        self._recorder = self._solving = self._change = None
        self._waiting = False

    def _record(self) -> None:
        self._round += 1
        self._recorder = profile(self._model, self._here / "trace")
        self._recorder.__enter__()

    def _solve(self, recorder: Recorder) -> None:
        recorder.close()
        self._recorder, self._waiting = None, True
        dist.barrier(self._mesh.group)  # all shards are on disk
        if self._mesh.rank:
            return
        tensors = slot_tensors(self._layer, self._optimizer)
        terms = Terms(
            self._solver,
            self._seconds,
            self._horizon,
            float(sum(tensor.row_bytes for tensor in tensors)),
            dtype=DTYPES.get(tensors[0].value.dtype, "fp32"),
        )
        arguments = request(self._here, self.plan, terms)
        with (self._here / "solver.log").open("wb") as log:
            self._solving = subprocess.Popen(
                [sys.executable, *arguments], stdout=log, stderr=log, preexec_fn=lambda: os.nice(10), env=_environment()
            )
        self._say(f"step {self._steps}: {self._record_steps} steps recorded, solving")

    def _listen(self) -> None:
        """The first rank says whether its process has ended, and with what."""
        message = torch.zeros(2, dtype=torch.int64)
        body = b""
        if self._solving is not None and self._solving.poll() is not None:
            plan, reason = answer(self._here)
            self._say(f"step {self._steps}: {'apply' if plan else 'keep'}: {reason}")
            body = b"" if plan is None else json.dumps(plan_to_dict(plan)).encode()
            message = torch.tensor([KEEP if plan is None else APPLY, len(body)])
            self._solving = None
        message = self._from_first(message)
        if int(message[0]) == PENDING:
            return
        self._waiting = False
        if int(message[0]) == APPLY:
            own = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else None
            text = self._from_first(torch.empty(int(message[1]), dtype=torch.uint8) if own is None else own)
            plan = plan_from_dict(json.loads(text.numpy().tobytes()))
            self._change = Migration(self._model, plan, self._optimizer)
            self._move(self._change)

    def _from_first(self, value: Tensor) -> Tensor:
        value = value.to(self._mesh.device)
        dist.broadcast(value, self._mesh.members[0], group=self._mesh.group)
        return value.cpu()

    def _move(self, change: Migration) -> None:
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
