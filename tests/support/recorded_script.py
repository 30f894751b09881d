"""Run by test_profile_script as a user's training script: it knows nothing of recording."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from small_models import olmoe, tokens
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)


def main(what: str, folder: Path) -> None:
    rank = int(os.environ.get("RANK", 0))
    if what == "ranks":
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=90),
        )
    dense = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=97)
    )
    dense(input_ids=tokens(1, 3))
    model = called = olmoe(use_cache=False).train()
    if what == "ranks":
        called = torch.nn.parallel.DistributedDataParallel(model)
    if what == "compiled":
        called = torch.compile(model, backend="eager")
    if what == "odd":
        model.config.n_group = [4]
    if what == "spoiled":
        (folder / "out").mkdir()
        (folder / "out" / "rank00000-00000.parquet").write_bytes(b"")
    for step in range(3):
        loss = called(input_ids=tokens(2, 6, seed=10 * rank + step), labels=tokens(2, 6)).loss
        # Gloo's worker threads and the interpreter's end can wait for each other after gradients were reduced.
        if what != "ranks":
            loss.backward()
    if what == "ranks":
        torch.distributed.destroy_process_group()
    (folder / f"finished{rank}").touch()
    if what == "failing":
        sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
