"""A checkpoint larger than a rank's memory, read by each rank's own rows and written again: peak memory and bytes.

Ranks are processes of one machine on Gloo. A rank's peak is that of its process (VmHWM), less what it had before. With
`--many` and `--sparse` four ranks of so many run at once, on torch's fake process group, over files that are holes but
for two numbers at each expert tensor's begin: a checkpoint of any size needs hardly any disk, and that every row is its
own expert's is still seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers as tf
from forked_ranks import on_ranks
from runner import Report
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime.moe.data_parallel import expert_layers
from moeplace.runtime.permute.checkpoint import read_weight_headers

EXPERTS, TOP_K = 64, 4


def config_of(layers: int, hidden: int, ffn: int) -> tf.Qwen3MoeConfig:
    return tf.Qwen3MoeConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=ffn, moe_intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        decoder_sparse_step=1, use_cache=False, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip


def on_meta(config: tf.Qwen3MoeConfig) -> Any:
    with torch.device("meta"):
        return tf.Qwen3MoeForCausalLM(config).to(torch.bfloat16)


def expert_shapes(hidden: int, ffn: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}


def write_holes(path: Path, layer: int, hidden: int, ffn: int) -> dict[str, int]:
    """One layer's experts, zeros but for 1 + layer and 1 + expert, the first two numbers of each tensor.

    Returns:
        Bytes by name.
    """
    names = [
        (expert, f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight", shape)
        for expert in range(EXPERTS)
        for name, shape in expert_shapes(hidden, ffn).items()
    ]
    size = 2 * ffn * hidden
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for number, (_, name, shape) in enumerate(names):
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [number * size, (number + 1) * size]}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        begin = file.tell()
        for number, (expert, _, _) in enumerate(names):
            file.seek(begin + number * size)
            marks = torch.tensor([1 + layer, 1 + expert], dtype=torch.bfloat16)
            file.write(marks.view(torch.uint8).numpy().tobytes())
        file.truncate(begin + len(names) * size)
    return {name: size for _, name, _ in names}


def rows_are_their_experts(model: Any) -> bool:
    """Whether each row of a model read from `write_holes` has the numbers of its own expert, once for each matrix."""
    for _, layer in expert_layers(model):
        for value, matrices in ((layer.gate_up_proj, 2), (layer.down_proj, 1)):
            for row, expert in zip(value.detach(), layer.row_expert.tolist(), strict=True):
                if float(row.sum(dtype=torch.float32)) != matrices * (2 + layer.layer + expert):
                    return False
    return True


def write_checkpoint(rank: int, ranks: int, folder: Path, shape: tuple[int, int, int], sparse: bool = False) -> int:
    """A checkpoint as hubs have it, a file a layer and one for the rest; experts differ by where in a draw they begin.

    Returns:
        Bytes of all tensors.
    """
    config = config_of(*shape)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    hidden, ffn = config.hidden_size, config.moe_intermediate_size
    generator = torch.Generator().manual_seed(0)
    others = {
        name: (torch.randn(value.shape, generator=generator) / 50).to(torch.bfloat16)
        for name, value in on_meta(config).state_dict().items()
        if ".experts." not in name
    }
    place, total = {}, 0
    for layer in range(-1, config.num_hidden_layers):
        file = f"model-{layer + 2:05}-of-{config.num_hidden_layers + 1:05}.safetensors"
        tensors = others
        if layer >= 0 and sparse:
            sizes = write_holes(folder / file, layer, hidden, ffn)
            place |= dict.fromkeys(sizes, file)
            total += sum(sizes.values())
            continue
        if layer >= 0:
            drawn = (torch.randn(ffn * hidden + 4096, generator=generator) / 50).to(torch.bfloat16)
            tensors = {}
            for expert in range(EXPERTS):
                for number, (name, size) in enumerate(expert_shapes(hidden, ffn).items()):
                    start = 3 * expert + number
                    content = drawn[start : start + ffn * hidden].clone().view(size)
                    tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = content
        save_file(tensors, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, file)
        total += sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak_bytes() -> int:
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))


def reset_peak() -> int:
    """Forgets the peak so far; gives what the process has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def bytes_read() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/io").open() if line.startswith("rchar"))


def load_and_export(
    rank: int, ranks: int, source: str, target: str | None, shape: tuple[int, int, int], sparse: bool = False
) -> dict[str, float]:
    """target: None where the ranks are torch's fake ones, which cannot write together."""
    mesh = init_device_mesh("cpu", (ranks,))
    config = config_of(*shape)
    model = on_meta(config)
    spec = mp.ModelSpec.from_config(config)
    plan = mp.Plan(
        model=spec,
        topology=mp.Topology.preset("h100-sxm", nodes=max(ranks // 8, 1), devices_per_node=min(ranks, 8)),
        physical_to_logical=np.stack([np.random.default_rng(layer).permutation(EXPERTS) for layer in range(shape[0])]),
        slot_device=np.arange(EXPERTS) * ranks // EXPERTS,
    )
    before, read, began = reset_peak(), bytes_read(), time.perf_counter()
    mp.parallelize(model, plan, mesh, weights=source)
    loaded = time.perf_counter() - began
    figures = {
        "own": sum(value.nbytes for value in model.parameters()),
        "peak": peak_bytes() - before,
        "read": bytes_read() - read,
        "seconds": loaded,
        "right": float(not sparse or rows_are_their_experts(model)),
    }
    if target is None:
        return figures
    before, began = reset_peak(), time.perf_counter()
    mp.export_hf(model, target)
    figures |= {"export peak": peak_bytes() - before, "export seconds": time.perf_counter() - began}
    dist.barrier()
    return figures


def some_of_many(
    rank: int, ranks: int, many: int, source: str, shape: tuple[int, int, int], sparse: bool
) -> dict[str, float]:
    """Some of `many` ranks of torch's fake process group, evenly spread over them; each of all would read as much."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank * many // ranks, world_size=many)
    return load_and_export(rank, many, source, None, shape, sparse)


def same_bytes(source: Path, target: Path) -> bool:
    """Whether both folders hold the same tensors, compared one by one."""
    from safetensors import safe_open

    def places(folder: Path) -> dict[str, Path]:
        return {tensor.name: tensor.file for header in read_weight_headers(folder) for tensor in header.tensors}

    here, there = places(source), places(target)
    if here.keys() != there.keys():
        return False
    for file in sorted(set(here.values())):
        with safe_open(file, "pt") as one:
            for name in one.keys():  # noqa: SIM118  # not a dictionary
                with safe_open(there[name], "pt") as other:
                    if not torch.equal(one.get_tensor(name), other.get_tensor(name)):
                        return False
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--many", type=int, default=0, help="measure one rank of so many instead, without exporting")
    parser.add_argument("--sparse", action="store_true", help="with --many: of a checkpoint of holes, by --ranks ranks")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written and removed again")


def run(options: argparse.Namespace, report: Report) -> None:
    if options.sparse and not options.many:
        sys.exit(
            "--sparse is of a checkpoint that is too large for --ranks ranks alone; say of how many they are: --many"
        )
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        shape = (options.layers, options.hidden, options.ffn)
        # In a process of its own: what it allocates and frees would be there again for the ranks.
        total = on_ranks(write_checkpoint, 1, folder / "in", shape, options.sparse)[0]
        ranks = options.many or options.ranks
        together = options.ranks if options.sparse else 1
        if options.many:
            parts = on_ranks(some_of_many, together, options.many, str(folder / "in"), shape, options.sparse)
            if not all(part["right"] for part in parts):
                report.failure = "a row holds another expert than its own"
        else:
            parts = on_ranks(load_and_export, ranks, str(folder / "in"), str(folder / "out"), shape)
            if not same_bytes(folder / "in", folder / "out"):
                report.failure = "the exported files hold other tensors than the checkpoint"
    finally:
        shutil.rmtree(folder)
    columns = {
        "checkpoint GB": total,
        "a rank's own weights GB": max(part["own"] for part in parts),
        "read by a rank GB": max(part["read"] for part in parts),
        "peak while loading GB": max(part["peak"] for part in parts),
        "peak while exporting, beside the weights GB": max(part.get("export peak", 0) for part in parts) or None,
    }
    seconds = {
        "load s": max(part["seconds"] for part in parts),
        "export s": max(part.get("export seconds", 0) for part in parts) or None,
    }
    table = report.table(
        "Loading a rank's own rows",
        ("ranks", *columns, *seconds),
        dict.fromkeys(columns, ".3f") | dict.fromkeys(seconds, ".1f"),
    )
    gigabytes = [None if value is None else value * 1e-9 for value in columns.values()]
    table.row(f"{together} of {ranks}" if options.many else str(ranks), *gigabytes, *seconds.values())
