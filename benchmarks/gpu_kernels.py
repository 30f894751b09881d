"""Kernels of the expert layer on one GPU: permute, LSH compression, grouped products, and what plans make of them.

    python -m benchmarks gpu_kernels [--tokens 8192 --hidden 4096 --ffn 1536 --experts 16 --top-k 4]
    python -m benchmarks gpu_kernels --device cpu      # small sizes, to see that it works

Times are medians (torch.utils.benchmark). A memory-bound kernel is held against the bytes that it must read and write
at the bandwidth that copying a large tensor reaches here; a product against the rate of one large torch.matmul. "bound"
is that least time, "torch" the nearest thing that torch has in one call or an obvious few. "error": bfloat16 against
the same formula in float32, by the root of mean squares; the rounding of bfloat16 is 0.002 a value.

Plans: the experts of a layer are computed here at the token counts that each of six plans gives each device in a step,
one device after the other; the slowest is the plan's time. "here": what the cost model's form predicts with
coefficients fitted to balanced counts on this machine; "vllm": by the shipped coefficients of vLLM's kernels for this
GPU, where there are any. order: the plans' places from the fastest, measured and predicted.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from runner import Report
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.benchmark import Timer

import moeplace as mp
from moeplace.placement.kernels import FORM, Rows, fitted, predicted
from moeplace.runtime import LSHCompression
from moeplace.runtime.moe.dispatcher import flat, gathered_sum, unpermute
from moeplace.runtime.moe.expert_mlps import Groups, SwiGLU
from moeplace.runtime.moe.layer_placement import LayerPlacement
from moeplace.runtime.moe.lsh import CompressedDispatcher, cluster, rotations
from moeplace.runtime.moe.mesh import ExpertMesh

Run = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    kernel: str
    ms: float
    bound_ms: float
    torch_ms: float | None
    error: float | None


class Bench:
    """The batch, and one rank's layer: T tokens, K experts each, N = T K pairs, D hidden size, F expert FFN size."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.seconds = torch.device(args.device), args.seconds
        tokens, hidden, self.top_k = args.tokens, args.hidden, args.top_k
        spec = mp.ModelSpec(
            layers=1, experts=args.experts, top_k=args.top_k, hidden_size=hidden, ffn_size=args.ffn, expert_dtype="bf16"
        )
        plan = mp.Plan(
            model=spec,
            topology=mp.Topology.preset("h100-hgx", devices_per_node=1),
            physical_to_logical=np.arange(args.experts)[None],
            slot_device=np.zeros(args.experts, dtype=np.int64),
        )
        self.mesh = ExpertMesh.of(init_device_mesh(self.device.type, (1,)))
        self.placement = LayerPlacement.of(plan, 0)
        generator = torch.Generator().manual_seed(0)
        # As in text, some tokens are frequent: near copies of one another.
        kinds = max(1, tokens // 8)
        kind = torch.randint(kinds, (tokens,), generator=generator)
        x = torch.randn(kinds, hidden, generator=generator)[kind] + 0.1 * torch.randn(
            tokens, hidden, generator=generator
        )
        ids = torch.rand(kinds, args.experts, generator=generator).topk(self.top_k).indices[kind]
        self.x = x.to(self.device, torch.bfloat16)
        self.ids = ids.to(self.device)
        self.gate = torch.rand(tokens, self.top_k, generator=generator).to(self.device)
        self.weights = {
            name: (torch.randn(args.experts, *shape, generator=generator) / hidden**0.5).to(self.device, torch.bfloat16)
            for name, shape in SwiGLU().shapes(spec).items()
        }
        self.bandwidth = self._bandwidth()
        self.rate = self._matmul_rate()

    def ms(self, run: Run) -> float:
        timer = Timer("run()", globals={"run": run})
        return float(timer.blocked_autorange(min_run_time=self.seconds).median * 1e3)

    def _bandwidth(self) -> float:
        """Bytes a millisecond of a copy, reading and writing."""
        large = torch.zeros(
            (1 << 29) if self.device.type == "cuda" else (1 << 24), dtype=torch.uint8, device=self.device
        )
        target = torch.empty_like(large)
        return 2 * large.numel() / self.ms(lambda: target.copy_(large))

    def _matmul_rate(self) -> float:
        """Operations a millisecond of a square bfloat16 product."""
        size = 8192 if self.device.type == "cuda" else 512
        a = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        return 2 * size**3 / self.ms(lambda: a @ a)

    def dispatcher(self, compression: LSHCompression | None = None) -> Any:
        plain = flat(self.mesh)
        made: Any = plain
        if compression is not None:
            made = CompressedDispatcher(plain, self.mesh, compression, 0, self.x.shape[1], lambda: 0)
        made.place(self.placement, torch.arange(len(self.placement.expert)), len(self.placement.expert))
        return made


def permute(bench: Bench) -> list[Measured]:
    """Tokens into the order of experts, and weighted sums back."""
    x, ids, gate = bench.x, bench.ids, bench.gate
    pairs, width = ids.numel(), x.shape[1]
    dispatcher = bench.dispatcher()
    metadata = dispatcher.dispatch(x, ids, gate)
    y, _ = dispatcher.receive(metadata)
    row = ids.flatten().argsort(stable=True).div(bench.top_k, rounding_mode="floor")
    weight = gate.flatten()[ids.flatten().argsort(stable=True)]
    assert torch.equal(y, x[row])
    exact = torch.zeros(len(x), width, device=x.device).index_add_(0, row, y.float() * weight[:, None])

    def add() -> Tensor:
        return torch.zeros_like(x).index_add_(0, row, y * weight[:, None].bfloat16())

    up = torch.randn_like(x)

    @torch.enable_grad()
    def with_gradients(total: Callable[[Tensor, Tensor], Tensor]) -> None:
        rows, weights = y.detach().requires_grad_(), metadata.weight_N.detach().requires_grad_()
        total(rows, weights).backward(up)

    row_bytes = 2 * width
    return [
        Measured(
            "permute",
            bench.ms(lambda: dispatcher.receive(dispatcher.dispatch(x, ids, gate))),
            row_bytes * (len(x) + pairs) / bench.bandwidth,
            bench.ms(lambda: x.index_select(0, row)),
            0.0,
        ),
        Measured(
            "unpermute",
            bench.ms(lambda: dispatcher.combine(y, metadata)),
            row_bytes * (len(x) + pairs) / bench.bandwidth,
            bench.ms(add),
            error(dispatcher.combine(y, metadata), exact),
        ),
        Measured(
            "unpermute with its gradients",
            bench.ms(
                lambda: with_gradients(lambda rows, weights: gathered_sum(rows, metadata.token_N, len(x), weights))
            ),
            row_bytes * (2 * len(x) + 3 * pairs) / bench.bandwidth,
            bench.ms(
                lambda: with_gradients(
                    lambda rows, weights: unpermute(rows, metadata.token_N, weights, len(x)).to(rows.dtype)
                )
            ),
            None,
        ),
    ]


def compression(bench: Bench) -> list[Measured]:
    """Hashing and clustering; the whole compressed dispatch and combine."""
    x, ids, gate = bench.x, bench.ids, bench.gate
    settings = LSHCompression(rate=0.2)
    dispatcher = bench.dispatcher(settings)
    metadata = dispatcher.dispatch(x, ids, gate)
    row_ND, _ = dispatcher.receive(metadata)
    directions = rotations(x.shape[1], settings.hashes, settings.dimension, 0).to(x.device)
    projected = x.float() @ directions
    scope = torch.ones_like(ids, dtype=torch.bool)
    most = int(settings.rate * len(x))
    target = torch.tensor(most, device=x.device)
    slots = len(bench.placement.expert)
    row_bytes, rows = 2 * x.shape[1], len(row_ND)
    whole = CompressedDispatcher(flat(bench.mesh), bench.mesh, settings, 0, x.shape[1], lambda: 0)
    whole.place(bench.placement, torch.arange(slots), slots)
    reference = whole.dispatch(x.float(), ids, gate)
    whole_row_ND, _ = whole.receive(reference)
    back = dispatcher.combine(row_ND, metadata)
    return [
        Measured(
            "LSH: projection",
            bench.ms(lambda: x.float() @ directions),
            row_bytes * len(x) / bench.bandwidth,
            bench.ms(lambda: x @ directions.bfloat16()),
            None,
        ),
        Measured(
            "LSH: hashes and clusters",
            bench.ms(
                lambda: cluster(
                    projected, ids, scope, gate, target, slots, settings.dimension, most, settings.lloyd_steps
                )
            ),
            (4 * projected.numel() + 8 * ids.numel()) / bench.bandwidth,
            bench.ms(lambda: ids.flatten().sort(stable=True)),
            None,
        ),
        Measured(
            "LSH: dispatch, whole",
            bench.ms(lambda: dispatcher.receive(dispatcher.dispatch(x, ids, gate))),
            row_bytes * (len(x) + rows) / bench.bandwidth,
            None,
            error(row_ND, whole_row_ND),
        ),
        Measured(
            "LSH: combine, whole",
            bench.ms(lambda: dispatcher.combine(row_ND, metadata)),
            row_bytes * (2 * len(x) + rows) / bench.bandwidth,
            None,
            error(back, whole.combine(whole_row_ND, reference)),
        ),
    ]


def products(bench: Bench) -> list[Measured]:
    """Gate and up, SwiGLU, down, for all experts."""
    dispatcher, kind = bench.dispatcher(), SwiGLU()
    row, count = dispatcher.receive(dispatcher.dispatch(bench.x, bench.ids, bench.gate))
    up = bench.weights["gate_up_proj"].transpose(1, 2)
    ops = 2 * len(row) * up.shape[1] * up.shape[2]
    read = 2 * (row.numel() + up.numel() + len(row) * up.shape[2])
    whole = {name: value.float() for name, value in bench.weights.items()}
    group = Groups(row, count)
    exact = Groups(row.float(), count).product_one_by_one(row.float(), whole["gate_up_proj"].transpose(1, 2))
    return [
        Measured(
            "grouped product",
            bench.ms(lambda: group.product(row, up)),
            max(ops / bench.rate, read / bench.bandwidth),
            bench.ms(lambda: Groups(row, count).product_one_by_one(row, up)),
            error(group.product(row, up), exact),
        ),
        Measured(
            "SwiGLU experts",
            bench.ms(lambda: kind.forward(row, count, bench.weights)),
            max(1.5 * ops / bench.rate, 1.5 * read / bench.bandwidth),
            None,
            error(kind.forward(row, count, bench.weights), kind.forward(row.float(), count, whole)),
        ),
    ]


@dataclass(frozen=True)
class Layer:
    """The layer that plans are compared on, over G devices. tokens: of each device, by the step's name."""

    spec: mp.ModelSpec
    devices: int
    tokens: dict[str, int]


LARGE = Layer(
    mp.ModelSpec(layers=1, experts=128, top_k=8, hidden_size=2048, ffn_size=768, expert_dtype="bf16"),
    8,
    {"decode": 128, "prefill": 4096},
)
SMALL = Layer(
    mp.ModelSpec(layers=1, experts=16, top_k=2, hidden_size=128, ffn_size=64, expert_dtype="bf16"),
    4,
    {"decode": 32, "prefill": 256},
)
GPU_NAMES = {"H100 80GB": "h100-sxm", "H200": "h200-sxm", "B200": "b200-sxm", "A100-SXM": "a100-sxm", "L40S": "l40s"}
"""Parts of the driver's names, and what measured kernels call these GPUs."""


def six_plans(layer: Layer, trace: mp.RoutingTrace) -> dict[str, mp.Plan]:
    """Of unlike quality."""
    topology = mp.Topology.preset("h100-sxm", devices_per_node=layer.devices)
    more = layer.spec.experts + 2 * layer.devices
    asked = [(name, layer.spec.experts) for name in ("contiguous", "round_robin", "random", "eplb")]
    plans = {}
    for solver, slots in [*asked, ("eplb", more), ("search", more)]:
        problem = mp.Problem(trace, topology, model=layer.spec, slots=slots)
        options = {"proposals": 20_000} if solver == "search" else {}
        plans[f"{solver}, {slots} slots"] = mp.solve(problem, solver, seed=0, **options)
    return plans


def skewed_trace(layer: Layer, tokens: int, seed: int) -> mp.RoutingTrace:
    """Experts drawn by chances that differ several times, the same for every seed."""
    chance = np.random.default_rng(0).lognormal(sigma=0.7, size=layer.spec.experts)
    noise = np.random.default_rng(seed).gumbel(size=(tokens, layer.spec.experts))
    ids = np.argsort(-(np.log(chance) + noise), axis=1)[:, : layer.spec.top_k]
    return mp.RoutingTrace.from_arrays(ids[:, None], num_experts=layer.spec.experts, step=np.zeros(tokens, int))


def device_counts(plan: mp.Plan, trace: mp.RoutingTrace) -> list[Any]:
    """Tokens of each slot, a list a device; replicas share an expert's tokens evenly."""
    loads = np.bincount(trace.expert_ids[:, 0].ravel(), minlength=plan.model.experts)
    table, taken = plan.physical_to_logical[0], np.zeros(plan.model.experts, int)
    replicas, counts = np.bincount(table, minlength=plan.model.experts), np.empty(len(table), int)
    for slot, expert in enumerate(table):
        share = (loads[expert] * (taken[expert] + 1)) // replicas[expert]
        counts[slot] = share - (loads[expert] * taken[expert]) // replicas[expert]
        taken[expert] += 1
    return [counts[plan.slot_device == device] for device in range(plan.topology.num_devices)]


def compare_plans(bench: Bench, layer: Layer, report: Report) -> None:
    """Plans' times on this machine against predictions, by step."""
    spec = layer.spec
    most = 2 + -(-(spec.experts + 2 * layer.devices) // layer.devices)
    weights = {
        name: (torch.randn(most, *shape) / spec.hidden_size**0.5).to(bench.device, torch.bfloat16)
        for name, shape in SwiGLU().shapes(spec).items()
    }

    def seconds(counts: Any) -> float:
        count = torch.tensor(counts.tolist(), device=bench.device)
        row = torch.randn(int(counts.sum()), spec.hidden_size, device=bench.device, dtype=torch.bfloat16)
        mine = {name: value[: len(counts)] for name, value in weights.items()}
        timer = Timer("run()", globals={"run": lambda: SwiGLU().forward(row, count, mine)})
        # What others do on the machine only adds to it.
        return float(min(timer.blocked_autorange(min_run_time=bench.seconds).times))

    local = spec.experts // layer.devices
    each = [2**power for power in range(int(np.log2(2 * max(layer.tokens.values()) * spec.top_k / local)) + 1)]
    balanced = [np.full(local, tokens) for tokens in each]
    slower = 1.0 if bench.device.type == "cuda" else 1e3
    fit = fitted([rows_of(layer, balanced, [seconds(counts) for counts in balanced])], slower=slower)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else ""
    gpu = next((known for part, known in GPU_NAMES.items() if part in name), "")
    table = report.table(
        "plans", ("step", "plan", "measured us", "here us", "error %", "vllm us", "error to vllm %", "order"), {}
    )
    plans = six_plans(layer, skewed_trace(layer, 16 * max(layer.tokens.values()), 1))
    for step, tokens in layer.tokens.items():
        judged = skewed_trace(layer, tokens * layer.devices, 2)
        found: dict[str, tuple[float, float, float | None]] = {}
        for plan_name, plan in plans.items():
            counts = device_counts(plan, judged)
            measured = max(seconds(of) for of in counts)
            here = float(predicted(fit, rows_of(layer, counts, [1.0] * len(counts)).terms(FORM)).max())
            vllm = None
            if gpu:
                pairs, hit = [float(of.sum()) for of in counts], [float((of > 0).sum()) for of in counts]
                vllm = float(mp.expert_seconds(spec, gpu, "vllm", pairs, hit).max())
            found[plan_name] = measured, here, vllm
        places = [sorted(found, key=lambda plan, way=way: found[plan][way]) for way in (0, 1)]
        for plan_name, (measured, here, vllm) in found.items():
            table.row(
                step,
                plan_name,
                measured * 1e6,
                here * 1e6,
                100 * (here / measured - 1),
                None if vllm is None else vllm * 1e6,
                None if vllm is None else 100 * (vllm / measured - 1),
                f"{places[0].index(plan_name) + 1}, predicted {places[1].index(plan_name) + 1}",
            )


def rows_of(layer: Layer, counts: list[Any], seconds: list[float]) -> Rows:
    """Rows as tables have them, of one device each; its kernels pass over its own tokens alone."""
    pairs, spec = np.array([float(of.sum()) for of in counts]), layer.spec
    devices = np.full(len(counts), float(layer.devices))
    return Rows(spec.hidden_size, spec.ffn_size, "bf16", pairs, np.array(seconds), pairs, devices, counts)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).square().mean().sqrt() / exact.float().square().mean().sqrt())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--ffn", type=int)
    parser.add_argument("--experts", type=int, help="on this device")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time for each figure")


def run(args: argparse.Namespace, report: Report) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu runs small sizes, to see that it works")
    sizes = {"tokens": 8192, "hidden": 4096, "ffn": 1536, "experts": 16, "top_k": 4}
    small = {"tokens": 512, "hidden": 128, "ffn": 64, "experts": 8, "top_k": 2}
    for name, value in (sizes if args.device == "cuda" else small).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cpu":
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.no_grad():
        bench = Bench(args)
        rows = [*permute(bench), *compression(bench), *products(bench)]
        compare_plans(bench, LARGE if args.device == "cuda" else SMALL, report)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, one thread"
    shapes = ", ".join(f"{key} {getattr(args, key)}" for key in sizes)
    report.note(
        "device",
        f"{name}: copy {bench.bandwidth / 1e6:.3g} GB/s, torch.matmul bfloat16 {bench.rate / 1e9:.3g} TFLOP/s; "
        f"{shapes}",
    )
    formats = dict.fromkeys(("ms", "bound ms", "torch ms", "error"), ".3g")
    table = report.table("kernels", ("kernel", *formats), formats)
    for row in rows:
        table.row(*astuple(row))
    dist.destroy_process_group()
