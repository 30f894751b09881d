"""Train a small mixture of experts with its experts spread over ranks, and let moeplace keep their places right
meanwhile.

    torchrun --nproc-per-node 2 examples/train_expert_parallel.py --out runs/parallel
    torchrun --nproc-per-node 8 examples/train_expert_parallel.py --out runs/parallel --topology h100-hgx

The model and text are those of train_moe.py. Experts start in index order; every `--every` steps some steps are
recorded, a process beside training solves for a better plan on them, and if it pays for its migration, experts and
their optimizer state move between two steps. What is special about it is marked `moeplace`; the rest is an ordinary
DistributedDataParallel script.
"""

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from train_moe import BUILT_IN, SEQUENCE, batches, build_model, load_domains
from transformers.utils import logging

import moeplace as mp


def index_order(spec: mp.ModelSpec, topology: mp.Topology) -> mp.Plan:
    """Expert after expert on device after device, as most engines place them."""
    devices = topology.num_devices
    return mp.Plan(
        model=spec,
        topology=topology,
        physical_to_logical=np.tile(np.arange(spec.experts), (spec.layers, 1)),
        slot_device=np.arange(spec.experts) * devices // spec.experts,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer, rounds and checkpoints")
    parser.add_argument("--text", nargs="+", default=list(BUILT_IN), metavar="FILE", help="as for train_moe.py")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4, help=f"sequences of {SEQUENCE} tokens, a rank and step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16, help="a layer")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=96, help="a multiple of 32")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--topology", default="a100-pcie", help="preset whose figures judge plans; 8 devices a node at most"
    )
    parser.add_argument("--every", type=int, default=250, help="steps from one recording to the next")
    parser.add_argument("--record-steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0, help="for a solve")
    parser.add_argument("--horizon", type=float, default=10_000.0, help="steps a plan is expected to stand")
    parser.add_argument("--bytes-per-step", type=int, help="spread a migration so (default: all at once)")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="of any number of ranks, under any plan")
    args = parser.parse_args()
    args.load = None
    return args


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank:
        dist.barrier()
    domains, tokenizer = load_domains(args)  # the first rank trains the tokenizer, the others find it
    if not rank:
        dist.barrier()

    def say(news: str) -> None:
        if not rank:
            print(news, file=sys.stderr, flush=True)

    torch.manual_seed(args.seed)
    model = build_model(args, tokenizer)
    mesh = init_device_mesh("cuda" if cuda else "cpu", (ranks,))
    nodes = -(-ranks // 8)
    topology = mp.Topology.preset(args.topology, nodes=nodes, devices_per_node=ranks // nodes)  # moeplace
    mp.parallelize(model, index_order(mp.ModelSpec.from_config(model.config), topology), mesh)  # moeplace
    torch.nn.Module.to(model, mesh.device_type)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    if args.resume:
        mp.load_checkpoint(args.resume, parallel, optimizer)  # moeplace
    rebalancer = mp.Rebalancer(  # moeplace
        parallel,
        optimizer,
        args.out / "rounds",
        every=args.every,
        record_steps=args.record_steps,
        seconds=args.seconds,
        horizon_steps=args.horizon,
        bytes_per_step=args.bytes_per_step,
        say=say,
    )
    clock = time.perf_counter()
    for step, batch in enumerate(batches(domains, args.batch, seed=args.seed * ranks + rank), start=1):
        tokens = batch.to(model.device)
        output = parallel(input_ids=tokens, labels=tokens, output_router_logits=True)
        output.loss.backward()
        mp.clip_grad_norm_(model, 1.0)  # moeplace: one norm over all ranks' experts
        optimizer.step()
        optimizer.zero_grad()
        rebalancer.step()  # moeplace
        if step % 50 == 0 or step == args.steps:
            loss = output.loss.detach()
            dist.all_reduce(loss)
            rate = ranks * tokens.numel() * (step % 50 or 50) / (time.perf_counter() - clock)
            say(f"step {step}/{args.steps}  loss {float(loss) / ranks:.3f}  {rate:,.0f} tokens/s")
            clock = time.perf_counter()
        if step % args.save_every == 0 or step == args.steps:
            mp.save_checkpoint(args.out / f"checkpoint-{step}", parallel, optimizer)  # moeplace
        if step == args.steps:
            break
    rebalancer.close()
    if not rank:
        rebalancer.plan.save(args.out / "plan.json")
        print(f"{rebalancer.applied} changes of plan; the last is in {args.out / 'plan.json'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
