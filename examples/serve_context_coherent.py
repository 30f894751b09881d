"""Generate with experts spread over ranks, tokens going to their experts and back, and tokens staying with their
experts.

    torchrun --nproc-per-node 4 examples/serve_context_coherent.py --out runs/serve --nodes 2
    torchrun --nproc-per-node 8 examples/serve_context_coherent.py --out runs/serve --model CHECKPOINT --text
    prompts.txt

Without --model a small Qwen3-MoE with random weights serves, with random prompts. Routing of the prompts is recorded, a
plan solved for tokens that stay (`context_coherent`), and the same prompts are continued three times: with experts in
index order and with the plan, tokens going and coming back, and with the plan and tokens that stay. All must give the
same tokens. The table says how fast each was and what it sent; what is gathered are keys and values of new tokens, to
all ranks.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import moeplace as mp
from moeplace.runtime import Decoder, DecodeStatistics


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the recorded routing and the plan")
    parser.add_argument("--model", help="Transformers checkpoint (default: a small model with random weights)")
    parser.add_argument("--text", type=Path, help="text to take prompts from (default: random tokens)")
    parser.add_argument("--plan", type=Path, help="plan to serve by (default: record and solve)")
    parser.add_argument("--nodes", type=int, default=1, help="the ranks are so many nodes of equal size")
    parser.add_argument("--topology", default="a100-pcie", help="preset whose figures judge plans")
    parser.add_argument("--solver", default="search", help="one of moeplace's, to solve with")
    parser.add_argument("--seconds", type=float, default=5.0, help="for the solve")
    parser.add_argument("--prompts", type=int, default=8, help="a rank")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def small_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=1,
        num_experts=16,
        num_experts_per_tok=2,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def draw_prompts(args: argparse.Namespace, vocabulary: int, rank: int) -> torch.Tensor:
    """[prompts, tokens] of this rank."""
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank)
    shape = (args.prompts, args.prompt_tokens)
    if args.text is None:
        return torch.randint(1, vocabulary, shape, generator=generator)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    if len(ids) <= args.prompt_tokens:
        sys.exit(f"--text {args.text}: {len(ids)} tokens; give more than --prompt-tokens {args.prompt_tokens}")
    starts = torch.randint(len(ids) - args.prompt_tokens, (args.prompts,), generator=generator)
    return torch.stack([ids[start : start + args.prompt_tokens] for start in starts])


def solve_plan(args: argparse.Namespace, model: torch.nn.Module, prompts: torch.Tensor) -> mp.Plan:
    """Every rank records its prompts; the first solves, and all read the plan."""
    with mp.profile(model, args.out / "trace"), torch.no_grad():
        model(input_ids=prompts)
    dist.barrier()
    if dist.get_rank() == 0:
        topology = mp.Topology.preset(
            args.topology, nodes=args.nodes, devices_per_node=dist.get_world_size() // args.nodes
        )
        problem = mp.Problem(
            model=mp.ModelSpec.from_config(model.config),
            topology=topology,
            statistics=mp.RoutingStatistics.from_trace(mp.read_trace(args.out / "trace")),
            objective=mp.Objective(execution="context_coherent"),
        )
        mp.solve(problem, args.solver, seconds=args.seconds, seed=args.seed).save(args.out / "plan.json")
    dist.barrier()
    return mp.Plan.load(args.out / "plan.json")


@dataclass(frozen=True)
class Served:
    tokens: torch.Tensor
    seconds: float
    sent: list[DecodeStatistics]


def serve(decoder: Decoder, prompts: torch.Tensor, new_tokens: int) -> Served:
    decoder.generate(prompts, 2)  # connections are made at the first message
    decoder.statistics.reset()
    dist.barrier()
    began = time.perf_counter()
    tokens = decoder.generate(prompts, new_tokens)
    dist.barrier()
    seconds = time.perf_counter() - began
    sent: list[DecodeStatistics] = [decoder.statistics] * dist.get_world_size()
    dist.all_gather_object(sent, decoder.statistics)
    return Served(tokens, seconds, sent)


def row(name: str, served: Served, plan: mp.Plan, layers: int) -> str:
    """Tokens a second, all-to-alls a layer, and kB a generated token in all and between nodes."""
    first = served.sent[0]
    made = sum(part.tokens for part in served.sent)
    node_of = plan.topology.node_of

    def kilobytes(*parts: str, between_nodes: bool = False) -> str:
        total = sum(
            part.bytes_sent(*parts, to=np.flatnonzero(node_of != node_of[rank]) if between_nodes else None)
            for rank, part in enumerate(served.sent)
        )
        return f"{total / made / 1e3:.2f}"

    decode = ("dispatch", "combine", "gather", "ids")
    cells = (
        name,
        f"{served.tokens.shape[0] * len(served.sent) * first.iterations / served.seconds:,.0f}",
        f"{sum(first.all_to_alls.values()) / first.iterations / layers:g}",
        *(kilobytes(part) for part in ("dispatch", "combine", "gather")),
        kilobytes(*decode, between_nodes=True),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks % args.nodes:
        sys.exit(f"--nodes {args.nodes}: {ranks} ranks cannot be spread over so many nodes evenly")
    torch.manual_seed(args.seed)
    model = small_model() if args.model is None else AutoModelForCausalLM.from_pretrained(args.model)
    model.train(False).to("cuda" if cuda else "cpu")
    prompts = draw_prompts(args, model.config.vocab_size, rank).to(model.device)
    shape, names = ((args.nodes, ranks // args.nodes), ("node", "device")) if args.nodes > 1 else ((ranks,), None)
    mesh = init_device_mesh("cuda" if cuda else "cpu", shape, mesh_dim_names=names)
    plan = mp.Plan.load(args.plan) if args.plan else solve_plan(args, model, prompts)
    spec = plan.model
    index_order = mp.Plan(
        model=spec,
        topology=plan.topology,
        physical_to_logical=np.tile(np.arange(spec.experts), (spec.layers, 1)),
        slot_device=np.arange(spec.experts) * ranks // spec.experts,
    )

    going = mp.DispatchCombineDecoder(model, index_order, mesh)  # moeplace: spreads the model's experts
    served = {"index order, dispatch_combine": serve(going, prompts, args.new_tokens)}
    mp.apply(model, plan)  # moeplace: experts move to where the plan has them
    served["plan, dispatch_combine"] = serve(going, prompts, args.new_tokens)
    staying = mp.ContextCoherentDecoder(model, plan, mesh)  # moeplace
    served["plan, context_coherent"] = serve(staying, prompts, args.new_tokens)

    first = next(iter(served.values())).tokens
    equal = torch.tensor(all(torch.equal(first, other.tokens) for other in served.values()), device=mesh.device_type)
    every = [torch.empty_like(equal) for _ in range(ranks)]
    dist.all_gather(every, equal)
    if not rank:
        print(
            "| experts and mode | tokens/s | all-to-alls a layer | kB a token: dispatch | combine | gather | between "
            "nodes |"
        )
        print("|---|---|---|---|---|---|---|")
        for name, one in served.items():
            print(row(name, one, plan, spec.layers))
        print("the same tokens in all three" if all(every) else "DIFFERENT tokens")
    dist.destroy_process_group()
    if not all(every):
        sys.exit(1)


if __name__ == "__main__":
    main()
