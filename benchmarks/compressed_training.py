"""Training with and without the LSH-compressed all-to-all: loss curves, seconds a step, rows and bytes sent.

    python -m benchmarks compressed_training --out runs/lsh --text TEXT/*.txt --runs plain lsh:rate=0.2 --json runs.jsonl
    torchrun --nproc-per-node 4 -m benchmarks compressed_training --out runs/lsh --runs plain lsh:rate=0.2,residual=none

A run is NAME or NAME:field=value,... with fields of LSHCompression, and `seed`, `dispatch`. The model is the one of examples/train_moe.py.
`--senders` is how many ranks the batch is divided over; with fewer processes, each takes several senders' parts one after the
other and adds up gradients, so that what is clustered together stays the same. (What plain dispatch would send is less
with fewer devices, and so is what `rate` allows.) Held-out loss is that of the model as it is, without compression. A row stands
for an entry of a run's loss curve; rows sent and computed, pairs and errors are those of rank 0's latest pass over all layers. `--rounds` repeats all runs, for times on a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import ast
import os
import statistics
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from runner import Report, Table
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import OlmoeForCausalLM
from transformers.utils import logging

import moeplace as mp
from moeplace.runtime import LSHCompression, clip_grad_norm_, save_checkpoint
from moeplace.runtime.moe.data_parallel import expert_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from train_expert_parallel import index_order
from train_moe import BUILT_IN, Domain, batches, build_model, load_domains


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer and checkpoints")
    parser.add_argument("--text", nargs="+", default=list(BUILT_IN), metavar="FILE", help="as for train_moe.py")
    parser.add_argument("--batch", type=int, default=4, help="sequences a sender and step")
    parser.add_argument("--nodes", type=int, default=1, help="hosts that the ranks stand on, equally many each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16, help="a layer")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--seed", type=int, default=0, help="of runs that do not say theirs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--every", type=int, default=25, help="steps between entries of the loss curve")
    parser.add_argument("--held-out", type=int, default=8, help="sequences of each domain")
    parser.add_argument("--save", action="store_true", help="the last weights of each run, in OUT/NAME-SEED")
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


def held_out(model: torch.nn.Module, domains: list[Domain], sequences: int, ranks: int) -> float:
    """Mean loss in nats a token, equal over domains; each rank takes its part of the sequences."""
    model.train(False)
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
    """This rank's latest pass over all layers."""
    found = [getattr(layer.dispatcher, "statistics", None) for _, layer in expert_layers(model)]
    seen = [part for part in found if part is not None]
    if not seen:
        return {}
    result: dict[str, float] = {key: sum(getattr(part, key) for part in seen) for key in SEEN[:-3]}
    return result | {
        "error": statistics.fmean(part.error for part in seen),
        "scale": statistics.fmean(part.scale for part in seen),
        "rows_computed": sum(int(layer.dispatcher.counts.sum()) for _, layer in expert_layers(model)),
    }


def spread_model(
    args: argparse.Namespace,
    tokenizer: Any,
    mesh: DeviceMesh,
    settings: LSHCompression | None,
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
    settings = LSHCompression(**fields, seed=seed) if fields else None
    model = spread_model(args, tokenizer, mesh, settings, dispatch, seed)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    parts = args.senders // ranks
    streams = [batches(domains, args.batch, seed=seed * args.senders + rank * parts + part) for part in range(parts)]
    seconds: list[float] = []
    losses: list[float] = []
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / max(1, min(100, args.steps // 10)))
        clock = time.perf_counter()
        for part, stream in enumerate(streams):
            tokens = next(stream)
            with nullcontext() if part == parts - 1 else parallel.no_sync():
                output = parallel(input_ids=tokens, labels=tokens, output_router_logits=True)
                (output.loss / parts).backward()
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
            held = held_out(model, domains, args.held_out, ranks) if args.held_out else None
            seen, losses = compression_of(model), []
            if table is not None:
                spent = statistics.median(seconds[-args.every :])
                table.row(
                    name, seed, dispatch, step, float(loss) / ranks, held, spent, *(seen.get(key) for key in SEEN)
                )
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
    columns = ("run", "seed", "dispatch", "step", "training loss", "held-out loss", "seconds a step", *SEEN)
    table = None if dist.get_rank() else report.table("Loss", columns, {"seconds a step": ".3f"})
    domains, tokenizer = load_domains(options)
    mesh = init_device_mesh("cpu", (ranks,) if options.nodes == 1 else (options.nodes, ranks // options.nodes))
    for _ in range(options.rounds):
        for text in options.runs:
            train(*run_of(text), options, domains, tokenizer, mesh, table)
    dist.destroy_process_group()
