"""Training with and without the LSH-compressed all-to-all: loss curves, seconds a step, rows and bytes sent.

    python -m benchmarks compressed_training --out runs/lsh --text TEXT/*.txt --runs plain lsh:rate=0.2 --json
    runs.jsonl torchrun --nproc-per-node 4 -m benchmarks compressed_training --out runs/lsh --runs plain
    lsh:rate=0.2,residual=none

A run is NAME or NAME:field=value,... with fields of LSHCompression, `rows` (int8, int4, fp8: what rows travel in, alone
or with LSH's fields) and `seed`, `dispatch`. The model is the one of examples/train_moe.py. `--senders` is how many
ranks the batch is divided over; with fewer processes, each takes several senders' parts one after the other and adds up
gradients, so that what is clustered together stays the same. What plain dispatch would send is less with fewer devices,
and so is what `rate` allows: `--devices` has one process send as so many would. Then `part` (forward, backward, inputs)
compresses but one part, `first_layer` only the layers from one on, `after` and `until` only the optimizer steps after
one, up to one. Held-out loss is that of the model as it is, without compression. A row stands for an entry of a run's
loss curve; rows sent and computed, pairs and errors are those of rank 0's latest pass over all layers. `--rounds`
repeats all runs, for times on a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from emulated_devices import PartlyCompressed, compress_parts
from runner import Report, Table
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import OlmoeForCausalLM
from transformers.utils import logging

import moeplace as mp
from moeplace.runtime import (
    CompressionStatistics,
    LSHCompression,
    QuantizedRows,
    clip_grad_norm_,
    load_checkpoint,
    save_checkpoint,
)
from moeplace.runtime.moe.data_parallel import expert_layers
from moeplace.runtime.moe.dispatcher import AllToAllDispatcher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from train_expert_parallel import index_order
from train_moe import BUILT_IN, VOCABULARY, Domain, batches, build_model, load_domains


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer and checkpoints")
    parser.add_argument("--text", nargs="+", default=list(BUILT_IN), metavar="FILE", help="as for train_moe.py")
    parser.add_argument("--batch", type=int, default=4, help="sequences a sender and step")
    parser.add_argument("--nodes", type=int, default=1, help="hosts that the ranks stand on, equally many each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16, help="a layer")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens of the tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="of runs that do not say theirs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--devices", type=int, default=1, help="that one process stands for")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--every", type=int, default=25, help="steps between entries of the loss curve")
    parser.add_argument("--held-out", type=int, default=8, help="sequences of each domain")
    parser.add_argument("--save", action="store_true", help="the last weights of each run, in OUT/NAME-SEED")
    parser.add_argument(
        "--resume", action="store_true", help="write each run at every entry of its curve, and go on from there"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--runs", nargs="+", default=["plain", "lsh:rate=0.2"], metavar="NAME[:field=value,...]")


def run_of(text: str) -> tuple[str, dict[str, Any]]:
    """NAME and fields: numbers and None as such, the rest as words."""
    name, _, rest = text.partition(":")
    fields: dict[str, Any] = {}
    for entry in filter(None, rest.split(",")):
        key, _, value = entry.partition("=")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    return name, fields


def compression_from(fields: dict[str, Any], seed: int) -> LSHCompression | QuantizedRows | None:
    """Of a run's fields, what none of them is left for: plain dispatch."""
    own = dict(fields)
    rows = QuantizedRows.of(own.pop("rows"), own.pop("group_size", 32)) if "rows" in own else None
    return LSHCompression(**own, rows=rows, seed=seed) if own else rows


def held_out(model: torch.nn.Module, domains: list[Domain], sequences: int, ranks: int) -> float:
    """Mean loss in nats a token, equal over domains, with rows as they are; each rank takes its part of the
    sequences."""
    model.train(False)
    for _, layer in expert_layers(model):
        if isinstance(layer.forward, PartlyCompressed):
            layer.forward.enabled = False
        elif isinstance(layer.dispatcher, AllToAllDispatcher):
            layer.dispatcher.quantize(None)
    total = torch.zeros(2)
    with torch.no_grad():
        for domain in domains:
            spread = torch.linspace(0, len(domain.held_out) - 1, sequences).long()
            mine = domain.held_out[spread][dist.get_rank() :: ranks]
            # Every rank calls the model equally often.
            for _ in range(-(-sequences // ranks) - len(mine)):
                mine = torch.cat([mine, mine[:1]])
            loss = model(input_ids=mine, labels=mine).loss
            total += torch.tensor([float(loss) * len(mine), len(mine)])
    dist.all_reduce(total)
    model.train()
    for _, layer in expert_layers(model):
        if isinstance(layer.compression, QuantizedRows) and isinstance(layer.dispatcher, AllToAllDispatcher):
            layer.dispatcher.quantize(layer.compression)
    return float(total[0] / total[1])


SEEN = (
    "plain_rows",
    "sent_rows",
    "plain_bytes",
    "sent_bytes",
    "pairs",
    "clusters",
    "clustered",
    "refused",
    "error",
    "scale",
    "rows_computed",
)
"""What compression tells of a pass: sums over layers, and the means of error and scale."""


def compression_of(model: torch.nn.Module) -> dict[str, float]:
    """This rank's latest pass over all layers that compressed."""
    carrying = [
        layer.forward.dispatcher if isinstance(layer.forward, PartlyCompressed) else layer.dispatcher
        for _, layer in expert_layers(model)
    ]
    seen = [dispatcher for dispatcher in carrying if getattr(dispatcher, "statistics", None) is not None]
    if not seen:
        return {}
    result: dict[str, float] = {key: sum(getattr(one.statistics, key) for one in seen) for key in SEEN[:4]}
    if not isinstance(seen[0].statistics, CompressionStatistics):
        return result
    result |= {key: sum(getattr(one.statistics, key) for one in seen) for key in SEEN[4:-3]}
    return result | {
        "error": statistics.fmean(one.statistics.error for one in seen),
        "scale": statistics.fmean(one.statistics.scale for one in seen),
        "rows_computed": sum(int(one.counts.sum()) for one in seen),
    }


def spread_model(
    args: argparse.Namespace,
    tokenizer: Any,
    mesh: DeviceMesh,
    settings: LSHCompression | QuantizedRows | None,
    dispatch: str | None = None,
    seed: int = 0,
) -> OlmoeForCausalLM:
    """The example's model with its experts in index order over the mesh."""
    torch.manual_seed(seed)
    model = build_model(args, tokenizer)
    topology = mp.Topology.preset("a100-pcie", nodes=args.nodes, devices_per_node=dist.get_world_size() // args.nodes)
    plan = index_order(mp.ModelSpec.from_config(model.config), topology)
    mp.parallelize(model, plan, mesh, dispatch=dispatch, compression=settings)
    return model


STEP = 3
"""Where an entry of a loss curve says its step."""


def add_trained_arguments(parser: argparse.ArgumentParser) -> None:
    """For benchmarks that measure a model as it was trained here."""
    add_model_arguments(parser)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="that the benchmark compressed_training wrote with --save"
    )
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--senders", type=int, default=4, help="batches to measure")


def trained_model(options: argparse.Namespace) -> tuple[Any, list[torch.Tensor]]:
    """The model of `--checkpoint` in this one process, and a batch of held-out sequences for each sender."""
    options.load = None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    domains, tokenizer = load_domains(options, options.vocabulary)
    model = spread_model(options, tokenizer, init_device_mesh("cpu", (1,)), None)
    load_checkpoint(options.checkpoint, model)
    sequences = []
    for sender in range(options.senders):
        places = range(sender * options.batch, sender * options.batch + len(domains))
        parts = [domain.held_out[i % len(domain.held_out)] for i, domain in zip(places, domains, strict=True)]
        sequences.append(torch.stack((parts * options.batch)[: options.batch]))
    return model, sequences


class Unfinished:
    """A run's loss curve so far, and the weights and optimizer state of its last entry, in a folder."""

    def __init__(self, path: Path) -> None:
        self._path, self._curve = path, path / "curve.json"
        self.curve: list[list[Any]] = json.loads(self._curve.read_text()) if self._curve.is_file() else []

    def folder(self, step: int) -> Path:
        return self._path / str(step)

    def save(self, curve: list[list[Any]], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """The curve is written last: what it names is whole."""
        save_checkpoint(self.folder(curve[-1][STEP]), model, optimizer)
        if not dist.get_rank():
            written = self._curve.with_suffix(".new")
            written.write_text(json.dumps(curve))
            written.replace(self._curve)
            for entry in curve[:-1]:
                shutil.rmtree(self.folder(entry[STEP]), ignore_errors=True)
        dist.barrier()


def train(
    name: str,
    fields: dict[str, Any],
    args: argparse.Namespace,
    domains: list[Domain],
    tokenizer: Any,
    mesh: DeviceMesh,
    table: Table | None,
) -> None:
    """One run; its loss curve goes to the table, where this rank has it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    seed, dispatch = fields.pop("seed", args.seed), fields.pop("dispatch", None)
    unfinished = Unfinished(args.out / f"unfinished-{name}-{seed}") if args.resume else None
    curve = [] if unfinished is None else unfinished.curve
    done = curve[-1][STEP] if curve else 0
    if "warm_up" in fields:
        # Optimizer steps are counted from the start of the process.
        fields["warm_up"] = max(0, fields["warm_up"] - done)
    after, until = fields.pop("after", 0), fields.pop("until", args.steps)
    parts = {key: fields.pop(key) for key in ("part", "first_layer") if key in fields}
    settings = compression_from(fields, seed)
    emulated = args.devices > 1 and settings is not None
    model = spread_model(args, tokenizer, mesh, None if emulated else settings, dispatch, seed)
    carriers = compress_parts(model, settings, args.devices, **parts) if emulated and settings is not None else []
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if unfinished is not None and done:
        load_checkpoint(unfinished.folder(done), model, optimizer)
    turns = args.senders // ranks
    streams = [batches(domains, args.batch, seed=seed * args.senders + rank * turns + turn) for turn in range(turns)]
    seconds: list[float] = []
    losses: list[float] = []
    for row in curve:
        if table is not None:
            table.row(*row)
    for _ in range(done):
        for stream in streams:
            next(stream)
    for step in range(done + 1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / max(1, min(100, args.steps // 10)))
        clock = time.perf_counter()
        for carrier in carriers:
            carrier.enabled = after < step <= until
        for turn, stream in enumerate(streams):
            tokens = next(stream)
            with nullcontext() if turn == turns - 1 else parallel.no_sync():
                output = parallel(input_ids=tokens, labels=tokens, output_router_logits=True)
                (output.loss / turns).backward()
            losses.append(
                float(output.loss.detach()) - model.config.router_aux_loss_coef * float(output.aux_loss.detach())
            )
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - clock)
        if step % args.every == 0 or step == args.steps:
            loss = torch.tensor(statistics.fmean(losses))
            dist.all_reduce(loss)
            seen, losses = compression_of(model), []
            held = held_out(model, domains, args.held_out, ranks) if args.held_out else None
            spent = statistics.median(seconds[-args.every :])
            curve.append([name, seed, dispatch, step, float(loss) / ranks, held, spent, *map(seen.get, SEEN)])
            if table is not None:
                table.row(*curve[-1])
            if unfinished is not None:
                unfinished.save(curve, model, optimizer)
    if args.save:
        save_checkpoint(args.out / f"{name}-{seed}", model)


def run(options: argparse.Namespace, report: Report) -> None:
    options.load = None
    options.out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    if options.senders % ranks or ranks % options.nodes:
        sys.exit(
            f"--senders {options.senders}, {ranks} ranks, --nodes {options.nodes}: each must divide the one before"
        )
    if options.devices > 1 and ranks > 1:
        sys.exit(f"--devices {options.devices} is what one process stands for; there are {ranks}")
    columns = ("run", "seed", "dispatch", "step", "training loss", "held-out loss", "seconds a step", *SEEN)
    table = None if dist.get_rank() else report.table("Loss", columns, {"seconds a step": ".3f"})
    domains, tokenizer = load_domains(options, options.vocabulary)
    mesh = init_device_mesh("cpu", (ranks,) if options.nodes == 1 else (options.nodes, ranks // options.nodes))
    for _ in range(options.rounds):
        for text in options.runs:
            train(*run_of(text), options, domains, tokenizer, mesh, table)
    dist.destroy_process_group()
