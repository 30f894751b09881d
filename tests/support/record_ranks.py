"""Run by torchrun from test_profile_distributed: records on every rank, plain and wrapped, both modes."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from small_models import olmoe, tokens
from torch.distributed.fsdp import fully_shard

from moeplace.profiler.profile import profile


def batch(rank: int, step: int) -> torch.Tensor:
    return tokens(2, 4 + rank, seed=10 * rank + step)


def main(out: Path, rendezvous: str) -> None:
    import os

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=90))
    model = olmoe(use_cache=False)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    with profile(parallel, out / "tokens") as recorder:
        for step in range(3):
            recorder.workload = "even" if step % 2 == 0 else "odd"
            parallel(input_ids=batch(rank, step), labels=batch(rank, step)).loss.backward()
    assert recorder.steps == 3
    with profile(model, out / "counts", mode="counts", window_steps=2) as recorder, torch.no_grad():
        # Ranks differ in steps and workloads, so in the windows they have: the sum must not depend on it.
        for step in range(3 + rank):
            recorder.workload = f"rank{rank}" if step == 2 else "shared"
            model(input_ids=batch(rank, step))
    shared = recorder.statistics()
    totals = [torch.zeros_like(torch.from_numpy(shared.total_load)) for _ in range(world)]
    dist.all_gather(totals, torch.from_numpy(shared.total_load))
    assert all(torch.equal(total, totals[0]) for total in totals)
    recorder = profile(model, out / "apart", mode="counts", window_steps=2, reduce=False)
    with recorder, torch.no_grad():
        model(input_ids=batch(rank, 0))
    # One rank fails: it must not wait for the others, and keeps its own counts.
    failing = profile(model, out / "failing", mode="counts")
    try:
        with failing, torch.no_grad():
            model(input_ids=batch(rank, 0))
            raise KeyError("the script's own")
    except KeyError:
        pass
    sharded = olmoe(use_cache=False)
    for layer in sharded.model.layers:
        fully_shard(layer.mlp.experts)
        fully_shard(layer)
    fully_shard(sharded)
    with profile(sharded, out / "sharded"):
        for step in range(3):
            sharded(input_ids=batch(rank, step), labels=batch(rank, step)).loss.backward()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
