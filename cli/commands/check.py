"""`moeplace check`: is the map that an engine runs with the plan's, sound in itself, and that of its weights?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...placement.errors import EngineError, InputError
from .. import completion
from ..command_line import refuse_idle
from ..options import AsJson, EngineKey, PlanFileOptions, RecorderFolder, ServerOptions, StoreOptions
from ..output import Column, Table, emit, working
from ..parse import whole_numbers
from ..remote import check_plan_options, is_file, plan_context, read_plan

if TYPE_CHECKING:
    from ...placement.model import ModelSpec
    from ...placement.plan import Plan
    from ...placement.topology import Topology
    from ...runtime.exporters.running import Finding

COLUMNS = (Column("kind", "kind", right=False), Column("layer", "layer"), Column("text", "what is wrong", right=False))


def check_command(
    running: Annotated[
        str,
        typer.Option(
            "--running",
            metavar="URL|FILE",
            help="What runs: an SGLang server started with --expert-distribution-recorder-mode per_pass, or a dump: of "
            "that recorder, vLLM's load statistics, vLLM-Ascend's expert_map_record_path, or a placement file.",
            show_default=False,
        ),
    ],
    storage: StoreOptions,
    remote: ServerOptions,
    files: PlanFileOptions,
    plan: Annotated[
        str | None,
        typer.Argument(
            metavar="PLAN",
            autocompletion=completion.plans,
            help="The plan that should run, as for `moeplace evaluate`. Without it the map is checked by itself, for "
            "--plan-model on --plan-topology.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="DIR",
            help="A dump of what the ranks hold: of mp.write_expert_fingerprints inside the engine, or its sharded "
            "state (SGLang's save_sharded_model, vLLM's save_sharded_state). Slots are compared with the map.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="DIR",
            help="With --weights: what experts' weights should be, the model's checkpoint, or a dump of the same "
            "engine without a plan where it stores them in its own form. Default: slots are compared with each other.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="LIST",
            help="With --weights: MoE layers to compare, as 3,10-12. Default: all.",
            show_default=False,
        ),
    ] = None,
    folder: RecorderFolder = None,
    key: EngineKey = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", metavar="S", min=0.1, help="Seconds a call of the server may take."),
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Compare the map an engine runs with a plan, with itself, and with the weights in its slots.

    Finds experts missing, unknown or twice on a rank, layers that run another layer's map, other experts than planned,
    and a plan that was not applied; of a server also the settings that replicas need. With --weights also slots that
    hold another expert's or another layer's weights than the map says. Ends with 1 where something is wrong.

    Example:

      moeplace check plan.json --running http://localhost:30000 --folder /tmp/recorder
      moeplace check plan.json --running expert_distribution_recorder_1700000000.0_0.pt
      moeplace check --running expert_map.json --plan-model config.json --plan-topology h100-hgx:2x8
      moeplace check plan.json --running dump.pt --weights /tmp/sharded --reference DeepSeek-V3
    """
    from ...runtime.exporters import running as maps

    if weights is None and (reference is not None or layers is not None):
        raise InputError("--reference and --layers are for --weights: give a dump of the ranks' weights")
    from_server = running.startswith(("http://", "https://"))
    if not from_server:
        refuse_idle(f"with {running}, which is a file: it goes with the URL of a server", "folder", "key", "timeout")
    if plan is not None:
        check_plan_options([plan], remote.server)
    if plan is None or is_file(plan):
        refuse_idle("without a PLAN that the service has", "server")
    context = plan_context(files)
    expected = None if plan is None else read_plan(plan, storage.db, remote.server, **context)
    model, topology = _shape(expected, context)
    findings: list[Finding] = []
    dumps = [Path(running)]
    if from_server:
        with working(f"asking {running}"):
            dumps, findings = _recorded(running, key, timeout, folder, expected)
    rows = maps.read_running(dumps[0], model)
    findings += [
        maps.Finding("ranks", None, f"{dump} has another map than {dumps[0]}")
        for dump in dumps[1:]
        if maps.read_running(dump, model) != rows
    ]
    slots = () if expected is None else expected.slots_per_device.sum(axis=0)
    lost = [rank for rank, count in enumerate(slots) if not count]
    findings += maps.check_map(rows, model.experts, topology.num_devices, lost)
    findings += [] if expected is None else maps.compare_map(rows, expected)
    notes: list[str] = []
    compared: list[int] = []
    if weights is not None:
        wrong, notes, compared = _weights(weights, reference, layers, rows, model)
        findings += wrong
    table = [{"kind": finding.kind, "layer": finding.layer, "text": finding.text} for finding in findings]
    verdict = "nothing is wrong" if not findings else f"{len(findings)} findings"
    if expected is not None and not findings:
        verdict = "what runs is the plan" if from_server else "its map is the plan's"
    data: dict[str, Any] = {
        "running": running,
        "read": [str(dump) for dump in dumps],
        "layers": len(rows),
        "sound": not findings,
        "weights": None if weights is None else {"layers": compared, "notes": notes},
    }
    footnotes = [f"{dumps[0]}: {verdict}."]
    if compared:
        footnotes.append(f"{weights}: weights of {len(compared)} layers were compared.")
    footnotes += [f"{note}." for note in notes]
    emit({**data, "findings": table}, Table(COLUMNS, table, footnotes=tuple(footnotes)), as_json=as_json)
    if findings:
        raise typer.Exit(1)


def _weights(
    folder: Path, reference: Path | None, chosen: str | None, rows: dict[int, list[int]], model: ModelSpec
) -> tuple[list[Finding], list[str], list[int]]:
    """What is wrong with the weights in slots, what could not be compared, and the layers that were."""
    from ...runtime.exporters.running import check_weights, fits, read_weights, reference_weights

    chosen_layers = whole_numbers("--layers", chosen)
    layers = [layer for layer in rows if chosen_layers is None or layer in chosen_layers]
    if not layers:
        raise InputError(f"--layers {chosen}: none of them is a MoE layer; those are {', '.join(map(str, rows))}")
    with working(f"reading {folder}") as update:
        running, _ = read_weights(folder, layers)
        experts = None
        if reference is not None:
            for asked in (list(running), list(model.moe_layers)):
                experts = reference_weights(
                    reference, model, asked, lambda done, total: update(f"reading {reference}", done / total)
                )
                if len(asked) == model.layers or fits(rows, running, experts):
                    break  # Whose weights a slot has instead, other layers may say.
    findings, notes = check_weights(rows, running, experts, model.experts)
    return findings, notes, list(running)


def _shape(plan: Plan | None, context: dict[str, Any]) -> tuple[ModelSpec, Topology]:
    if plan is not None:
        return plan.model, plan.topology
    if context["model"] is None or context["topology"] is None:
        raise InputError(
            "a map alone does not say its model and cluster: give PLAN, or --plan-model and --plan-topology"
        )
    return context["model"], context["topology"]


def _recorded(
    url: str, key: str | None, timeout: float, folder: Path | None, plan: Plan | None
) -> tuple[list[Path], list[Finding]]:
    """The dumps of the server's recorder, and what is wrong with its settings."""
    from ...profiler.engine_servers import EngineServer, dump_sglang, recorder_folder, server_info
    from ...runtime.exporters.running import compare_settings

    server = EngineServer(url, key, timeout)
    info = server_info(server)
    mode = info.get("expert_distribution_recorder_mode")
    if mode not in ("per_pass", "per_token"):
        raise EngineError(
            f"{url}: SGLang says which map it runs in records of mode per_pass or per_token, this server's is "
            f"{mode or 'off'}; start it with --expert-distribution-recorder-mode per_pass, or give a dump"
        )
    files, _, _ = dump_sglang(server, 0.0, recorder_folder(folder), patience=min(timeout, 60.0))
    return files, [] if plan is None else compare_settings(info, plan)
