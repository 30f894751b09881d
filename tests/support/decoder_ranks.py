"""What each rank does in test_decoder.py."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers as tf
from family_ranks import spec_of
from random_plans import random_plan
from ranks import join_group
from small_models import FAMILIES, mixtral, olmoe, tokens
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.placement.replay import device_traffic
from moeplace.runtime import ContextCoherentDecoder, DispatchCombineDecoder, LSHCompression, QuantizedRows
from moeplace.runtime.moe.dispatcher import AllToAllDispatcher

NEW = 6
"""Tokens generated."""

DECODERS: tuple[Any, ...] = (ContextCoherentDecoder, DispatchCombineDecoder)


def prompts(rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of a rank's prompts, padded on the left; rank 1 has none."""
    count = (2, 0, 3, 1)[rank % 4]
    ids = tokens(count, 4 + rank, seed=100 * seed + rank)
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, : row % 3] = 0
        ids[row, : row % 3] = 0
    return ids, mask


def generated(model: Any, rank: int, seed: int = 0, **settings: Any) -> torch.Tensor:
    """What the whole model generates for a rank's prompts, in one process."""
    ids, mask = prompts(rank, seed)
    if not len(ids):
        return ids.new_empty(0, ids.shape[1] + NEW)
    result = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **settings)
    assert isinstance(result, torch.Tensor)
    return result


def logits_error(decoder: Any, whole: Any, rank: int, world: int) -> float:
    """Largest difference of every iteration's logits from the whole model's on the whole sequences, over its
    largest."""
    ids, mask = prompts(rank)
    sequences = [row[keep.bool()] for r in range(world) for row, keep in zip(*prompts(r), strict=True)]
    state = decoder.start(ids, NEW, attention_mask=mask)
    worst = 0.0
    for _ in range(NEW):
        for row, number in zip(state.logits_RV, state.sequence_R.tolist(), strict=True):
            expected = whole(input_ids=sequences[number][None]).logits[0, -1]
            worst = max(worst, float((row - expected).abs().max() / expected.abs().max()))
        sequences = [torch.cat([row, token[None]]) for row, token in zip(sequences, state.token_B, strict=True)]
        decoder.step(state)
    decoder.drain(state)
    return worst


@torch.no_grad()
def families(rank: int, world: int, folder: Path) -> dict[str, Any]:
    join_group(rank, world, folder)
    meshes = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world // 2, 2))
    found: dict[str, Any] = {}
    for number, (name, (build, layers)) in enumerate(FAMILIES.items()):
        # Shorter than what is generated, so that it matters.
        whole = build(**({"sliding_window": 5} if name in ("gpt_oss", "mixtral") else {}))
        expected = generated(whole, rank)
        found[name] = {"distinct": len(expected[:, -NEW:].unique())}
        for mesh in meshes:
            for kind in DECODERS:
                plan = random_plan(np.random.default_rng([number, mesh.ndim]), 2, world // 2, spec_of(whole, layers))
                decoder = kind(copy.deepcopy(whole), plan, mesh)
                ids, mask = prompts(rank)
                made = decoder.generate(ids, NEW, attention_mask=mask)
                found[name][f"{kind.__name__} {mesh.ndim}"] = {
                    "equal": torch.equal(made, expected),
                    "logits": logits_error(decoder, whole, rank, world) if mesh.ndim == 2 else 0.0,
                }
    dist.destroy_process_group()
    return found


@torch.no_grad()
def plans(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Random plans with replicas, one, two and four experts a token; some ranks overlap and some do not."""
    join_group(rank, world, folder)
    meshes = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    different = []
    for number in range(18):
        top_k = (1, 2, 4)[number % 3]
        build = (mixtral, olmoe)[number % 2]
        whole = build(num_experts_per_tok=top_k)
        rng = np.random.default_rng([7, number])
        plan = random_plan(rng, 2, world // 2, spec_of(whole, (0, 1)))
        dispatch = (None, "flat")[number // 9]
        mesh, overlap = meshes[number // 3 % 2], (number + rank) % 2 == 0
        decoder = ContextCoherentDecoder(copy.deepcopy(whole), plan, mesh, dispatch=dispatch, overlap=overlap)
        ids, mask = prompts(rank, number)
        made = decoder.generate(ids, NEW, attention_mask=mask)
        if not torch.equal(made, generated(whole, rank, number)):
            different.append(number)
    dist.destroy_process_group()
    return {"different": different}


@torch.no_grad()
def behaviours(rank: int, world: int, folder: Path) -> dict[str, Any]:
    join_group(rank, world, folder)
    flat, deep = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    found: dict[str, Any] = {}
    for check in (copies, exchanges, one_expert, ends, half_precision, new_plan, refusals):
        found[check.__name__] = check(rank, world, flat, deep)
    dist.destroy_process_group()
    return found


def drawn_routing(
    rng: np.random.Generator, layers: int, sequences: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = np.stack([[rng.permutation(8)[:top_k] for _ in range(sequences)] for _ in range(layers)])
    weights = np.broadcast_to(np.arange(top_k, 0, -1) / top_k, ids.shape)
    return torch.from_numpy(ids), torch.from_numpy(weights.copy()).float()


def copies(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """Copies between devices under drawn routing, all ranks together, and what the cost model counts for it."""
    count_G = [len(prompts(r)[0]) for r in range(world)]
    source = np.repeat(np.arange(world), count_G)
    result = {}
    for number, (top_k, mesh) in enumerate([(1, flat), (2, flat), (4, flat), (4, deep)]):
        model = olmoe(num_experts_per_tok=top_k)
        rng = np.random.default_rng([3, number])
        plan = random_plan(rng, 2, world // 2, spec_of(model, (0, 1)), most_extra=0)
        routing = [drawn_routing(rng, 2, len(source), top_k) for _ in range(NEW)]
        steps = mp.placement.steps.Steps(
            expert_ids=torch.cat([ids.transpose(0, 1) for ids, _ in routing]).numpy().astype(np.uint16),
            offsets=np.arange(NEW + 1) * len(source),
            num_experts=8,
            moe_layers=(0, 1),
            source=np.tile(source, NEW),
        )
        for kind in DECODERS:
            decoder = kind(copy.deepcopy(model), plan, mesh)
            ids, mask = prompts(rank)
            state = decoder.start(ids, NEW, attention_mask=mask)
            decoder.statistics.reset()
            for choice in routing:
                decoder.step(state, routing=choice)
            decoder.drain(state)
            execution = "context_coherent" if kind is ContextCoherentDecoder else "dispatch_combine"
            objective = mp.Objective(execution=execution, node_dedup=mesh is deep)
            expected = device_traffic(plan, steps, plan.topology, objective)
            sent = decoder.statistics.copies
            for part, goal in (("dispatch", expected.dispatch), ("combine", expected.combine)):
                mine = torch.from_numpy(sent.get(part, np.zeros(world, np.int64)))
                table = [torch.empty_like(mine) for _ in range(world)]
                dist.all_gather(table, mine)
                matrix = torch.stack(table).numpy()
                wanted = np.zeros((world, world)) if goal is None else goal * NEW
                if mesh is deep:  # which rank of a node takes a copy in is a convention of its own
                    matrix, wanted = (
                        m.reshape(2, world // 2, 2, world // 2).sum(axis=(1, 3)) for m in (matrix, wanted)
                    )
                    np.fill_diagonal(matrix, 0)
                    np.fill_diagonal(wanted, 0)
                result[f"{execution} top-{top_k} {mesh.ndim} {part}"] = [matrix.tolist(), wanted.round(6).tolist()]
    return result


def exchanges(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """All-to-alls a layer and iteration, and rows of keys and values sent."""
    result: dict[str, Any] = {}
    for top_k in (1, 2):
        for mesh in (flat, deep):
            for kind in DECODERS:
                model = mixtral(num_experts_per_tok=top_k)
                decoder = kind(
                    model, random_plan(np.random.default_rng(1), 2, world // 2, spec_of(model, (0, 1))), mesh
                )
                ids, mask = prompts(rank)
                decoder.generate(ids, NEW, attention_mask=mask)
                statistics = decoder.statistics
                layers = 2 * statistics.iterations
                result[f"{kind.__name__} top-{top_k} {mesh.ndim}"] = {
                    "all_to_alls": {part: n / layers for part, n in statistics.all_to_alls.items()},
                    "gathered": statistics.copies.get("gather", np.zeros(world, np.int64)).tolist(),
                    "iterations": statistics.iterations,
                    "tokens": statistics.tokens,
                    "row_bytes": int(statistics.bytes["gather"].sum() / max(statistics.copies["gather"].sum(), 1))
                    if "gather" in statistics.bytes
                    else 0,
                    "seconds": sorted(part for part, seconds in statistics.seconds.items() if seconds > 0),
                }
    return result


def one_expert(rank: int, world: int, flat: Any, deep: Any) -> list[float]:
    """All tokens to one expert, or to the same two: the logits are those of dispatch and combine."""
    result = []
    for ids in ([[3]], [[3, 5]]):
        model = mixtral(num_experts_per_tok=len(ids[0]))
        plan = random_plan(np.random.default_rng(2), 2, world // 2, spec_of(model, (0, 1)))
        routing = (
            torch.tensor(ids).expand(2, 6, len(ids[0])),
            torch.tensor([[0.7, 0.3][: len(ids[0])]]).expand(2, 6, -1),
        )
        logits = []
        for kind in DECODERS:
            decoder = kind(copy.deepcopy(model), plan, deep)
            state = decoder.start(*prompts(rank)[:1], 2, attention_mask=prompts(rank)[1])
            for _ in range(2):
                decoder.step(state, token_B=torch.arange(6) + 5, routing=routing)
            decoder.drain(state)
            every: list[Any] = [None] * world
            dist.all_gather_object(every, dict(zip(state.sequence_R.tolist(), state.logits_RV, strict=True)))
            logits.append({number: row for part in every for number, row in part.items()})
        assert sorted(logits[0]) == sorted(logits[1]) == list(range(6))
        result.append(max(float((logits[0][i] - logits[1][i]).abs().max()) for i in range(6)))
    return result


def ends(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """A token that ends sequences, at different moments."""
    whole = mixtral()
    every = torch.cat([generated(whole, r)[:, -NEW:] for r in range(world)])
    end = int(every[0, 2])
    expected = generated(whole, rank, eos_token_id=end)
    decoder = ContextCoherentDecoder(
        whole, random_plan(np.random.default_rng(4), 2, world // 2, spec_of(whole, (0, 1))), deep
    )
    ids, mask = prompts(rank)
    made = decoder.generate(ids, NEW, attention_mask=mask, eos_token_id=end)
    width = expected.shape[1]
    return {
        "equal": torch.equal(made[:, :width], expected) and bool((made[:, width:] == 0).all()),
        "ended": int((every == end).any(dim=1).sum()),
        "tokens": decoder.statistics.tokens,
    }


def half_precision(rank: int, world: int, flat: Any, deep: Any) -> float:
    """bfloat16 logits of both modes, by the root of the mean square of their difference."""
    model = olmoe().bfloat16()
    plan = random_plan(np.random.default_rng(6), 2, world // 2, spec_of(model, (0, 1)))
    found = []
    for kind in DECODERS:
        decoder = kind(copy.deepcopy(model), plan, flat)
        state = decoder.start(prompts(rank)[0], 2, attention_mask=prompts(rank)[1])
        for _ in range(2):
            decoder.step(state, token_B=torch.arange(6) + 5)
        decoder.drain(state)
        every: list[Any] = [None] * world
        dist.all_gather_object(every, dict(zip(state.sequence_R.tolist(), state.logits_RV.float(), strict=True)))
        merged = {number: row for part in every for number, row in part.items()}
        found.append(torch.stack([merged[i] for i in range(6)]))
    return float((found[0] - found[1]).square().mean().sqrt() / found[1].square().mean().sqrt())


def new_plan(rank: int, world: int, flat: Any, deep: Any) -> bool:
    """A plan that comes into force between two generations."""
    whole = olmoe()
    spec = spec_of(whole, (0, 1))
    expected = generated(whole, rank)
    first, second = (random_plan(np.random.default_rng(seed), 2, world // 2, spec) for seed in (8, 9))
    decoder = ContextCoherentDecoder(whole, first, flat)
    ids, mask = prompts(rank)
    before = decoder.generate(ids, NEW, attention_mask=mask)
    mp.apply(whole, second)
    return torch.equal(before, expected) and torch.equal(decoder.generate(ids, NEW, attention_mask=mask), expected)


def refusals(rank: int, world: int, flat: Any, deep: Any) -> dict[str, list[str]]:
    model = olmoe()
    spec = spec_of(model, (0, 1))
    rng = np.random.default_rng(0)
    good, other_plan = random_plan(rng, 2, world // 2, spec), random_plan(rng, 2, world // 2, spec)
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    squeezed = mp.parallelize(olmoe(), good, flat, compression=LSHCompression()).eval()
    narrowed = mp.parallelize(olmoe(), good, flat, compression=QuantizedRows(group_size=8)).eval()
    spread = mp.parallelize(olmoe(), good, flat)
    flexible = mixtral()
    flexible.set_attn_implementation("flex_attention")
    long_rope = olmoe(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    decoder = ContextCoherentDecoder(olmoe(), good, flat)
    ids = tokens(2, 4)

    def full() -> None:
        state = decoder.start(ids, 1)
        try:
            for _ in range(2):
                decoder.step(state)
        finally:
            decoder.drain(state)

    def stepped(**arguments: Any) -> None:
        state = decoder.start(ids, 2)
        try:
            decoder.step(state, **arguments)
        finally:
            decoder.drain(state)

    cases: dict[str, Callable[[], Any]] = {
        "training": lambda: ContextCoherentDecoder(olmoe().train(), good, flat),
        "family": lambda: ContextCoherentDecoder(llama, good, flat),
        "headless": lambda: ContextCoherentDecoder(olmoe().model, good, flat),
        "attention": lambda: ContextCoherentDecoder(flexible, good, flat),
        "rope": lambda: ContextCoherentDecoder(long_rope, good, flat),
        "other": lambda: ContextCoherentDecoder(model, random_plan(rng, 2, 2, spec.replace(hidden_size=32)), flat),
        "ranks": lambda: ContextCoherentDecoder(model, random_plan(np.random.default_rng(0), 1, world + 1, spec), flat),
        "layer": lambda: ContextCoherentDecoder(
            model, random_plan(rng, 2, 2, spec.replace(layers=1, moe_layers=(0,))), flat
        ),
        "different": lambda: ContextCoherentDecoder(model, other_plan if rank == 2 else good, flat),
        "spread": lambda: ContextCoherentDecoder(spread, other_plan, flat),
        "compressed": lambda: ContextCoherentDecoder(squeezed, good, flat),
        "quantized": lambda: ContextCoherentDecoder(narrowed, good, flat),
        "compressing": lambda: ContextCoherentDecoder(
            model, good, flat, dispatch=lambda mesh: AllToAllDispatcher(mesh, two_stage=False)
        ),
        "one_refuses": lambda: ContextCoherentDecoder(model.train() if rank == 3 else olmoe(), good, flat),
        "none": lambda: decoder.generate(ids[:0], 2),
        "no_new": lambda: decoder.generate(ids, 0),
        "shape": lambda: decoder.generate(ids[0], 2),
        "mask": lambda: decoder.generate(ids, 2, attention_mask=torch.tensor([[1, 1, 1, 0]]).expand(2, 4)),
        "empty": lambda: decoder.generate(ids, 2, attention_mask=torch.zeros(2, 4)),
        "unequal": lambda: decoder.generate(ids, 3 if rank == 2 else 2),
        "full": full,
        "float": lambda: decoder.generate(ids.float(), 2),
        "fraction": lambda: decoder.generate(ids, 2.5),  # type: ignore[arg-type]
        # One rank alone would fail in its embedding, and the others wait.
        "unknown token": lambda: decoder.generate(ids + (1000 if rank == 1 else 0), 2),
        "negative token": lambda: decoder.generate(ids - 1000, 2),
        "step tokens": lambda: stepped(token_B=torch.full((2 * world,), 1000)),
        "step shape": lambda: stepped(token_B=torch.zeros(1, dtype=torch.int64)),
        "step routing": lambda: stepped(
            routing=(torch.full((2, 2 * world, 2), -1), torch.full((2, 2 * world, 2), 0.5))
        ),
        "step routing shape": lambda: stepped(
            routing=(torch.zeros(1, 2 * world, 2, dtype=torch.int64), torch.zeros(1, 2 * world, 2))
        ),
    }
    said = {}
    for name, attempt in cases.items():
        try:
            attempt()
        except mp.MoeplaceError as refusal:
            said[name] = [type(refusal).__name__, str(refusal)]
    ContextCoherentDecoder(spread, good, flat)  # the plan it has is taken
    return said


def killed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Rank 2 dies while all decode."""
    join_group(rank, world, folder, timeout=timedelta(seconds=4))
    model = mixtral()
    plan = random_plan(np.random.default_rng(0), 2, world // 2, spec_of(model, (0, 1)))
    decoder = ContextCoherentDecoder(model, plan, init_device_mesh("cpu", (world,)))
    ids, mask = prompts(rank)
    state = decoder.start(ids, 20, attention_mask=mask)
    began = time.monotonic()
    try:
        for iteration in range(20):
            if rank == 2 and iteration == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            decoder.step(state)
    except mp.RankError as lost:
        return {"said": str(lost), "seconds": time.monotonic() - began}
    return {"said": "", "seconds": 0.0}
