"""Recording the routing of a script that is not edited (`moeplace profile`) or a running engine (`moeplace record`)."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...placement.errors import InputError
from ..command_line import refuse_idle
from ..options import AsJson, EngineKey, RecorderFolder, output_option, recording_path
from ..output import count, emit, note, pairs, working
from ..parse import read_spec, reader_defaults
from ..save import save_recording

if TYPE_CHECKING:
    from ...placement.statistics import RoutingStatistics
    from ...placement.trace import RoutingTrace
    from ...profiler.engine_servers import EngineServer


class Mode(StrEnum):
    tokens = "tokens"
    counts = "counts"


def profile_command(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="The script to run: python train.py ...", show_default=False),
    ],
    output: Annotated[Path, output_option("PATH", "Folder for the trace, or statistics .npz.", recording_path)],
    mode: Annotated[
        Mode, typer.Option("--mode", help="Every token's experts, or counts by expert and window only.")
    ] = Mode.tokens,
    sample: Annotated[float, typer.Option("--sample", min=0.0, max=1.0, help="Share of sequences recorded.")] = 1.0,
) -> None:
    """Run a Python script and record the routing of the Transformers MoE models in it.

    The script needs no change, and gets everything after -- as it stands. It may be started by torchrun.
    moeplace ends with the script's exit code.

    Example:

      moeplace profile -o trace -- python generate.py --prompts prompts.txt
    """
    from ...profiler.run_script import run_recorded

    code = run_recorded(command, output, mode=mode.value, sample=sample)
    if code == 0:
        note(f"recorded into {output}; `moeplace stats {output}` shows what is in it")
    raise typer.Exit(code)


RECORDER, REQUESTS = "SGLang's recorder", "Requests"


class RecordMode(StrEnum):
    tokens = "tokens"
    counts = "counts"


def record_command(
    output: Annotated[
        Path,
        output_option(
            "PATH", "Folder for the trace, which is made; for counts, the statistics file (.npz).", recording_path
        ),
    ],
    sglang: Annotated[
        str | None,
        typer.Option("--sglang", metavar="URL", help="A running SGLang: http://host:30000.", show_default=False),
    ] = None,
    vllm: Annotated[
        str | None,
        typer.Option("--vllm", metavar="URL", help="A running vLLM: http://host:8000.", show_default=False),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            metavar="N",
            min=0.0,
            help="How long to record; with --prompts, how long to send. Needed without --prompts.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="PATH",
            help="Transformers config.json of the served model, or its folder: kept in the trace, with its layers' "
            "numbers.",
            show_default=False,
        ),
    ] = None,
    key: EngineKey = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.01, help="Seconds to wait for an answer, or for files.")
    ] = 300.0,
    mode: Annotated[
        RecordMode | None,
        typer.Option(
            "--mode",
            metavar="tokens|counts",
            help="Refuse a server whose recorder keeps the other. Default: take what it keeps.",
            show_default=False,
            rich_help_panel=RECORDER,
        ),
    ] = None,
    folder: RecorderFolder = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Send these and record their routing: a prompt a line, or a JSON object with prompt or messages.",
            show_default=False,
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens of an answer.", rich_help_panel=REQUESTS)
    ] = 128,
    concurrency: Annotated[
        int,
        typer.Option(
            "--concurrency", metavar="N", min=1, help="Requests on their way at once.", rich_help_panel=REQUESTS
        ),
    ] = 16,
    as_json: AsJson = False,
) -> None:
    """Record the routing of a running SGLang or vLLM.

    SGLang's own recorder sees the traffic it serves: start the server with --expert-distribution-recorder-mode stat for
    counts, or per_token for every token's experts. It writes on its own machine: run this there, or share the folder.
    With --prompts, requests are sent and their routing comes back with the answers: start vLLM or SGLang with
    --enable-return-routed-experts. vLLM has no other record.

    Example:

      moeplace record --sglang http://localhost:30000 --seconds 60 -o counts.npz
      moeplace record --vllm http://localhost:8000 --prompts prompts.txt --model config.json -o trace
    """
    from ...profiler.engine_servers import EngineServer

    if (sglang is None) == (vllm is None):
        raise typer.BadParameter("give --sglang URL or --vllm URL, one of them")
    if prompts is None and seconds is None:
        raise typer.BadParameter("say how long to record: --seconds N")
    if prompts is None and vllm is not None:
        raise typer.BadParameter("vLLM returns routing with answers only: give --prompts FILE")
    if prompts is None:
        refuse_idle("without --prompts, of which requests are made", "max_tokens", "concurrency")
    else:
        refuse_idle("with --prompts, whose answers bring the routing: it is for SGLang's recorder", "mode", "folder")
    server = EngineServer(sglang or vllm or "", key, timeout)
    if prompts is None:
        assert seconds is not None
        data, record = _recorder(server, seconds, folder, mode)
    else:
        data, record = _requests(
            server, "sglang" if sglang else "vllm", prompts, seconds, max_tokens, concurrency, model
        )
    data |= _save(record, output, model)
    shown = {**data, "tokens": count(data["tokens"]) if data["tokens"] else None}
    emit(data, pairs(shown), as_json=as_json)


def _recorder(
    server: EngineServer, seconds: float, folder: Path | None, mode: RecordMode | None
) -> tuple[dict[str, Any], RoutingTrace | RoutingStatistics]:
    from ...profiler.engine_servers import record_sglang, recorder_folder

    with working(f"recording {server.url}") as update:
        done = record_sglang(
            server,
            seconds,
            recorder_folder(folder),
            expected=None if mode is None else mode.value,
            patience=min(server.timeout, 60.0),
            progress=lambda share: update(f"recording {server.url}", share),
        )
    for line in done.notes:
        note(f"note: {line}")
    return {"engine": "sglang", "mode": done.mode, "read": ", ".join(map(str, done.files))}, done.record


def _requests(
    server: EngineServer,
    engine: Any,
    prompts: Path,
    seconds: float | None,
    max_tokens: int,
    concurrency: int,
    model: Path | None,
) -> tuple[dict[str, Any], RoutingTrace]:
    from ...profiler.engine_servers import read_requests, record_requests
    from ...profiler.readers.routed_experts import read_routed_experts

    with tempfile.TemporaryFile() as file, working(f"asking {server.url}") as update:
        answers = record_requests(
            server,
            engine,
            read_requests(prompts),
            file,
            max_tokens=max_tokens,
            seconds=seconds,
            concurrency=concurrency,
            progress=lambda count: update(f"asking {server.url}: {count:,} answers", None),
        )
        try:
            trace = read_routed_experts(file, **reader_defaults(model))
        except InputError as error:
            hint = "" if model is not None else "; give --model"
            raise InputError(f"answers of {server.url}: {str(error).removeprefix('file: ')}{hint}") from None
    if answers.failed:
        sent = answers.answered + answers.failed
        note(f"note: {answers.failed} of {sent} requests were refused, first {answers.first_failure}")
    return {"engine": engine, "mode": "requests", "answered": answers.answered, "refused": answers.failed}, trace


def _save(record: RoutingTrace | RoutingStatistics, out: Path, model: Path | None) -> dict[str, Any]:
    """Writes the record, and says what it is."""
    from ...profiler.read import Recording

    recording = Recording.of(record, out).of_model(None if model is None else read_spec(model))
    save_recording(recording, out)
    return {
        "kind": "trace" if recording.is_trace else "statistics",
        "file": str(out),
        "tokens": recording.trace.num_tokens if recording.is_trace else recording.statistics().tokens,
        "experts": recording.header.num_experts,
        "moe_layers": list(recording.header.moe_layers),
    }
