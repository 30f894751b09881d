"""Recording a command without editing it: `run_recorded(["python", "train.py"], out="trace")`.

Every Python process the command starts (`python -m mod` and the ranks of torchrun included) waits for the first forward
call of a Transformers MoE model, records from that call on, and completes the recording when it exits. A process that
is killed (SIGKILL, SIGTERM) keeps the shards it had completed.
"""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError
from .families import has_experts
from .profile import MODES, Mode, profile
from .recorders import merge_counts

if TYPE_CHECKING:
    from torch.nn import Module

SETTINGS = "MOEPLACE_RECORD"
"""Environment variable with the settings of a recorded command, as JSON."""

CALLED = {"transformers.modeling_utils": "PreTrainedModel", "torch._dynamo.eval_frame": "OptimizedModule"}
"""The classes whose calls may be a first forward, by the module they are in."""

FAILURE, REFUSAL = "failed-", "refused-"
"""Files by which a command's processes tell of recordings that failed, and of MoE models that were not recorded."""

logger = logging.getLogger(__name__)


def run_recorded(command: Sequence[str], out: str | Path, mode: Mode = "tokens", sample: float = 1.0) -> int:
    """Runs `command`, recording the first Transformers MoE model that each of its Python processes calls.

    out, mode, sample: as `profile` takes them; in mode "counts" the ranks are summed when the command has ended. The
    command's input and output are those of this process.

    Returns the command's exit code (128 + n after signal n); 1 if it succeeded but recording failed, which the log
    says. A failure of recording does not stop the command.

    Raises:
        InputError: the command is empty or not found, a setting is out of range, `out` holds a recording; or the
            command succeeded and no forward call of a Transformers MoE model was seen in it.
    """
    if not command:
        raise InputError("no command given; expected something like: python train.py")
    if mode not in MODES or not 0.0 < sample <= 1.0:
        raise InputError(f"mode ({mode!r}) must be tokens or counts, and sample ({sample}) above 0 and at most 1")
    target = Path(out).absolute()
    statistics = target if target.suffix == ".npz" else target / "statistics.npz"
    if _recorded(target, statistics, mode) or (mode == "tokens" and target.is_file()):
        raise InputError(f"out: {target} already holds a recording; give another name, or remove it")
    with tempfile.TemporaryDirectory(prefix="moeplace-") as name:
        folder = Path(name)
        shutil.copyfile(Path(__file__).with_name("hooks_bootstrap.py"), folder / "sitecustomize.py")
        settings = {"out": str(target), "mode": mode, "sample": sample, "folder": name}
        code = _run(command, settings)
        failures, refusals = (
            [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{kind}*"))]
            for kind in (FAILURE, REFUSAL)
        )
    if mode == "counts" and list(statistics.parent.glob(f"{statistics.stem}-rank*.npz")):
        merge_counts(statistics)
    for failure in failures:
        logger.error("recording failed: %s", failure)
    if code == 0 and not failures and not _recorded(target, statistics, mode):
        if refusals:
            raise InputError(f"{' '.join(command)}: nothing was recorded; {refusals[0].strip()}")
        raise InputError(
            f"{' '.join(command)}: no forward call of a Transformers MoE model was seen. The model must run in a "
            "Python process that can import moeplace and was started without -I, -E or -S; to record any other model, "
            "use moeplace.profile(..., routers=...) in the script"
        )
    return code or int(bool(failures))


def _recorded(target: Path, statistics: Path, mode: str) -> bool:
    return statistics.exists() if mode == "counts" else any(target.glob("*.parquet"))


def _run(command: Sequence[str], settings: dict[str, Any]) -> int:
    # Where the path has no "python", this interpreter is meant.
    program = shutil.which(command[0]) or (sys.executable if command[0] in ("python", "python3") else None)
    if program is None:
        raise InputError(f"{command[0]!r}: no such command")
    path = [settings["folder"], *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, SETTINGS: json.dumps(settings), "PYTHONPATH": os.pathsep.join(path)}
    with subprocess.Popen([program, *command[1:]], env=environment) as process:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue  # the command was interrupted as well, and decides how it ends
            except BaseException:
                process.terminate()
                raise
    return 128 - code if code < 0 else code


def imported(module: ModuleType) -> None:
    """Called in the command's processes with each module of `CALLED` once it has been imported."""
    global _attachment
    settings = os.environ.get(SETTINGS)
    if settings is None:
        return
    _attachment = _attachment or _Attachment(json.loads(settings))
    _attachment.watch(getattr(module, CALLED[module.__name__]))


class _Attachment:
    """Attaches a recorder at the first call of an MoE model, once in a process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._watched: list[tuple[type, Any]] = []
        self._other: set[type] = set()
        self._done = False

    def watch(self, owner: type) -> None:
        """Looks at every model of class `owner` that is called, until the first that routes."""
        if self._done:
            return
        original: Callable[..., Any] = owner.__call__
        self._watched.append((owner, owner.__dict__.get("__call__")))
        consider = self._consider

        def call(model: Module, *args: Any, **kwargs: Any) -> Any:
            consider(model)
            return original(model, *args, **kwargs)

        owner.__call__ = call  # type: ignore[method-assign]

    def _consider(self, model: Module) -> None:
        import torch

        if torch.compiler.is_compiling() or self._done:
            return
        inner = getattr(model, "_orig_mod", model)
        transformers = sys.modules.get("transformers.modeling_utils")
        if transformers is None or not isinstance(inner, transformers.PreTrainedModel) or type(inner) in self._other:
            return
        if inner.config.is_encoder_decoder and "decoder_input_ids" not in inspect.signature(inner.forward).parameters:
            return  # an encoder or a decoder alone, as in generate: the whole is recorded
        settings = self._settings
        try:
            recorder = profile(model, settings["out"], mode=settings["mode"], sample=settings["sample"], reduce=False)
        except InputError as error:
            self._other.add(type(inner))
            logger.info("not recording %s: %s", type(inner).__name__, error)
            if has_experts(inner):
                self._tell(REFUSAL, error)
            return
        except Exception as error:  # noqa: BLE001 - whatever recording fails at, the script goes on
            self._end()
            self._report(error)
            return
        self._end()
        recorder.on_error = self._report
        try:
            recorder.__enter__()
        except Exception as error:  # noqa: BLE001 - as above
            self._report(error)
        else:
            atexit.register(self._finish, recorder.close, os.getpid())

    def _end(self) -> None:
        self._done = True
        while self._watched:
            owner, original = self._watched.pop()
            if original is None:
                del owner.__call__
            else:
                owner.__call__ = original  # type: ignore[method-assign]

    def _finish(self, close: Callable[[], None], process: int) -> None:
        if os.getpid() != process:
            return  # a fork of the process that records
        try:
            close()
        except Exception as error:  # noqa: BLE001 - at exit nobody is left to handle it
            self._report(error)

    def _report(self, error: Exception) -> None:
        """Tells the waiting `run_recorded`; the script goes on."""
        self._tell(FAILURE, error)

    def _tell(self, kind: str, error: Exception) -> None:
        file = Path(self._settings["folder"]) / f"{kind}{os.getpid()}"
        # The first error is the cause; that nothing was recorded, which closing finds, follows from it.
        if file.parent.is_dir() and not file.exists():
            file.write_text(f"process {os.getpid()}: {type(error).__name__}: {error}\n", encoding="utf-8")


_attachment: _Attachment | None = None
