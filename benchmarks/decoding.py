"""Decoding over ranks on real Gloo processes: how far from the whole model, and what it sends against what is predicted.

    python -m benchmarks decoding equality [--plans 100] [--ranks 4 8]
    python -m benchmarks decoding traffic [--steps 20] [--seconds 5] [--solvers contiguous exflow search]

equality: small Mixtral and OLMoE models with random weights under random plans (replicas, unequal and zero shares, devices
without slots), one, two or four experts a token, flat and node-aware; ranks have different numbers of prompts, some none;
half of them compute tokens that stay while others travel.
Every iteration's logits are compared with those of the whole model in float64 on the whole sequences; an error is the largest
difference over the largest value. Beside it stands what the whole model in float32 does.

traffic: the held-out decode steps of examples/data/olmoe_small drive a model of its shape (8 layers, 32 experts; top-2, and
top-1 with the first choice) on two nodes of two ranks, under plans solved on the other sequences. Rows that ranks have sent
are counted, and stand beside the copies that the cost model predicts for the same steps. Bytes are for a hidden size of 2,048
in bfloat16; keys and values for one key-value head in eight (512 values together) and for full multi-head attention (4,096).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from forked_ranks import on_ranks
from runner import Report
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.placement.replay import device_traffic
from moeplace.runtime import ContextCoherentDecoder, DispatchCombineDecoder

RECORDED = Path(__file__).resolve().parents[1] / "examples" / "data" / "olmoe_small"
MODES: dict[str, Any] = {
    "dispatch_combine": DispatchCombineDecoder,
    "context_coherent": ContextCoherentDecoder,
}
NEW = 5
"""Iterations of a batch whose logits are compared."""
VOCABULARY, HIDDEN, SEQUENCES = 97, 2048, 16

Figures = dict[str, float]


def model_of(family: str, layers: int, experts: int, top_k: int, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": top_k,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    if family == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=experts, **shape)).eval()
    return tf.OlmoeForCausalLM(tf.OlmoeConfig(num_experts=experts, **shape)).eval()


def spec_of(model: Any) -> mp.ModelSpec:
    return mp.ModelSpec.from_config(model.config)


def random_plan(rng: np.random.Generator, ranks: int, spec: mp.ModelSpec) -> mp.Plan:
    slots = spec.experts + int(rng.integers(0, 2 * ranks))
    extra = slots - spec.experts
    table = np.stack(
        [
            rng.permutation(np.concatenate([np.arange(spec.experts), rng.integers(spec.experts, size=extra)]))
            for _ in range(spec.layers)
        ]
    )
    shares = rng.random(table.shape) * (rng.random(table.shape) > 0.15)
    for row, share in zip(table, shares, strict=True):
        share[np.isin(row, np.flatnonzero(np.bincount(row, weights=share) == 0))] = 1.0
        share /= np.bincount(row, weights=share)[row]
    return mp.Plan(
        model=spec,
        topology=mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=ranks // 2),
        physical_to_logical=table,
        slot_device=np.sort(rng.integers(ranks, size=slots)),
        shares=shares,
    )


@torch.no_grad()
def equality(rank: int, ranks: int, plans: int) -> Figures:
    """{mode: worst error, mode + " tokens": tokens that differ, "float32": worst error of the whole model}."""
    meshes = init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (2, ranks // 2))
    worst: Figures = {"float32": 0.0, "iterations": 0.0}
    for number in range(plans):
        rng = np.random.default_rng([ranks, number])
        model = model_of(("mixtral", "olmoe")[number % 2], 2, 8, (1, 2, 4)[number % 3], seed=number)
        whole = copy.deepcopy(model).double()
        whole.set_experts_implementation("eager")  # grouped products know no float64
        single = copy.deepcopy(model)
        count = rng.integers(0, 4, size=ranks) * (rng.random(ranks) > 0.2)
        count[number % ranks] += 1
        width = rng.integers(3, 8, size=ranks)
        prompts = [
            torch.from_numpy(rng.integers(1, VOCABULARY, size=(n, w))) for n, w in zip(count, width, strict=True)
        ]
        plan = random_plan(rng, ranks, spec_of(model))
        for mode, kind in MODES.items():
            given = {"overlap": (number + rank) % 2 == 0} if mode == "context_coherent" else {}
            decoder = kind(model, plan, meshes[number // 2 % 2], **given)
            state = decoder.start(prompts[rank], NEW)
            heard = [(state.sequence_R, state.logits_RV)]
            tokens = [state.token_B]
            for _ in range(NEW):
                decoder.step(state)
                heard.append((state.sequence_R, state.logits_RV))
                tokens.append(state.token_B)
            decoder.drain(state)
            rows = [
                torch.cat([row, torch.stack(tokens)[:, b]]) for b, row in enumerate(row for p in prompts for row in p)
            ]
            length = [len(row) for p in prompts for row in p]
            for b, row in enumerate(rows):
                here = [(i, sequence == b) for i, (sequence, _) in enumerate(heard) if bool((sequence == b).any())]
                if not here:
                    continue
                expected = whole(input_ids=row[None]).logits[0]
                rounded = single(input_ids=row[None]).logits[0]
                for i, mine in here:
                    goal = expected[length[b] - 1 + i]
                    worst[mode] = max(worst.get(mode, 0.0), error(heard[i][1][mine][0], goal))
                    worst["float32"] = max(worst["float32"], error(rounded[length[b] - 1 + i], goal))
                    key = f"{mode} tokens"
                    worst[key] = worst.get(key, 0.0) + float(goal.argmax() != row[length[b] + i])
                    worst["iterations"] += 0.5
    return worst


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def traffic(rank: int, ranks: int, cases: list[tuple[str, mp.Plan, str]], routing: np.ndarray[Any, Any]) -> Figures:
    """Rows sent by this rank, by plan, mode and part; "... between" those that cross nodes. routing: [S, B, L, K]."""
    mesh = init_device_mesh("cpu", (2, ranks // 2))
    flat = init_device_mesh("cpu", (ranks,))
    found: Figures = {}
    for name, plan, mode in cases:
        decoder = MODES[mode](
            model_of("olmoe", routing.shape[2], 32, routing.shape[3]), plan, mesh if routing.shape[3] > 1 else flat
        )
        state = decoder.start(torch.ones(SEQUENCES, 2, dtype=torch.int64), len(routing))
        decoder.statistics.reset()
        for ids in torch.from_numpy(routing.astype(np.int64)):
            weight = torch.arange(ids.shape[2], 0, -1.0).expand(ids.transpose(0, 1).shape)
            decoder.step(state, routing=(ids.transpose(0, 1), weight))
        decoder.drain(state)
        away = plan.topology.node_of != plan.topology.node_of[rank]
        for part in ("dispatch", "combine", "gather"):
            rows = decoder.statistics.copies.get(part, np.zeros(ranks, np.int64))
            found[f"{name} {mode} {part}"] = float(rows.sum())
            found[f"{name} {mode} {part} between"] = float(rows[away].sum())
        found[f"{name} {mode} exchanges"] = sum(decoder.statistics.all_to_alls.values()) / ranks
    return found


def show_equality(args: argparse.Namespace, report: Report) -> None:
    formats = {"logits compared": ",.0f"} | dict.fromkeys((*MODES, "one process, float32"), ".1e")
    columns = ("ranks", "plans", *formats, "tokens that differ")
    table = report.table("Equality of decoding with the whole model", columns, formats)
    for ranks in args.ranks:
        parts = on_ranks(equality, ranks, args.plans)
        worst = {name: max(part.get(name, 0.0) for part in parts) for name in (*MODES, "float32")}
        differ = sum(part.get(f"{mode} tokens", 0.0) for part in parts for mode in MODES)
        compared = 2 * sum(part["iterations"] for part in parts)
        table.row(ranks, args.plans, compared, *(worst[name] for name in (*MODES, "float32")), int(differ))


def show_traffic(args: argparse.Namespace, report: Report) -> None:
    trace = mp.read_trace(RECORDED)
    train, held = trace.split(by="sequence", held_out=0.25, seed=0)
    topology = mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=2)
    ranks, batch = topology.num_devices, SEQUENCES * topology.num_devices
    steps = held.decode_steps(concurrency=batch, steps=args.steps, seed=0)
    formats = {
        "top-k": "",
        "plan": "",
        "mode": "",
        "exchanges a layer": "g",
        "rows a token and layer": ".4f",
        "predicted": ".4f",
        "between nodes": ".4f",
        "predicted between nodes": ".4f",
        "KB a token between nodes": ".1f",
        "with keys and values of 512": ".1f",
        "of 4,096": ".1f",
    }
    table = report.table("What decoding sends, measured and predicted", formats, formats)
    for top_k in (2, 1):
        model = mp.ModelSpec(
            layers=trace.num_layers, experts=trace.num_experts, top_k=top_k, hidden_size=32, ffn_size=48
        )
        chosen = steps.expert_ids[:, :, :top_k]
        routing = chosen.reshape(args.steps, batch, trace.num_layers, top_k)
        fitted = mp.RoutingTrace.from_arrays(
            train.expert_ids[:, :, :top_k], train.num_experts, sequence=train.sequence, position=train.position
        )
        judged = mp.placement.steps.Steps(
            expert_ids=chosen,
            offsets=steps.offsets,
            num_experts=trace.num_experts,
            moe_layers=tuple(range(trace.num_layers)),
            source=np.tile(np.repeat(np.arange(ranks), SEQUENCES), args.steps),
        )
        cases = []
        for mode in MODES:
            problem = mp.Problem(
                model=model.replace(hidden_size=HIDDEN, ffn_size=1024),
                topology=topology,
                statistics=mp.RoutingStatistics.from_trace(fitted),
                objective=mp.Objective(execution=mode),
            )
            for solver in args.solvers:
                solved = mp.solve(problem, solver, seconds=args.seconds, seed=0)
                placed = mp.Plan(model, topology, solved.physical_to_logical, solved.slot_device)
                cases.append((solver, placed, mode))
        sent = on_ranks(traffic, ranks, cases, routing)
        total = {name: sum(part[name] for part in sent) for name in sent[0]}
        for name, plan, mode in cases:
            objective = mp.Objective(execution=mode, node_dedup=top_k > 1)
            predicted = device_traffic(plan, judged, topology, objective)
            matrix = predicted.dispatch + (0.0 if predicted.combine is None else predicted.combine)
            away = topology.node_of[:, None] != topology.node_of[None, :]
            unit = args.steps * batch * trace.num_layers
            label = f"{name} {mode}"
            rows = {
                p: (total[f"{label} {p}"], total[f"{label} {p} between"]) for p in ("dispatch", "combine", "gather")
            }
            moved, crossed = (rows["dispatch"][i] + rows["combine"][i] for i in (0, 1))
            gathered = rows["gather"][1] / unit * trace.num_layers
            kilobytes = crossed / unit * trace.num_layers * 2 * HIDDEN / 1e3
            table.row(
                top_k,
                name,
                mode,
                total[f"{label} exchanges"] / args.steps / trace.num_layers,
                moved / unit,
                matrix.sum() / batch / trace.num_layers,
                crossed / unit,
                matrix[away].sum() / batch / trace.num_layers,
                kilobytes,
                kilobytes + gathered * 2 * 512 / 1e3,
                kilobytes + gathered * 2 * 2 * HIDDEN / 1e3,
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True)
    equal = commands.add_parser("equality")
    equal.add_argument("--plans", type=int, default=100)
    equal.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    equal.set_defaults(show=show_equality)
    sent = commands.add_parser("traffic")
    sent.add_argument("--steps", type=int, default=20)
    sent.add_argument("--seconds", type=float, default=5.0, help="for a solve")
    sent.add_argument("--solvers", nargs="+", default=["contiguous", "exflow", "search"])
    sent.set_defaults(show=show_traffic)


def run(options: argparse.Namespace, report: Report) -> None:
    options.show(options, report)
