"""What each rank does in test_training_recipes.py: recipes that people train with, around a layer of experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from expert_ranks import inputs, layer_of, losses_of, plan_of, worst_of
from random_plans import SPEC, topology
from ranks import join_group
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import moeplace as mp
from moeplace.runtime import allow_optimizer
from moeplace.runtime.moe.data_parallel import exclude_from_ddp, expert_parameters
from moeplace.runtime.moe.layer import ExpertParallelMoE

REFUSALS = (mp.InputError, mp.UnsupportedError)


def said(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except REFUSALS as refusal:
        return str(refusal)
    except CheckpointException as several:
        return " ".join(str(refusal[0]) for refusal in several.failures.values())
    return ""


class Unknown(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        pass


class Known(Unknown):
    pass


class AdamW8bit(torch.optim.AdamW):
    """Named as those of torchao and bitsandbytes that keep blocks of values in few bits."""


def recipes(rank: int, world: int, folder: Path) -> dict[str, Any]:
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found = {
        "optimizers": optimizers(rank, world, mesh),
        "ddp": said(lambda: losses_of(nn.parallel.DistributedDataParallel(layer_of(mesh, world, number=6)), rank)),
        "scalers": scalers(rank, world, mesh),
        "mixed": mixed(rank, world, mesh),
        "norms": norms(rank, world, mesh),
        "files": files(rank, world, mesh, folder),
        "in memory": in_memory(rank, world, mesh),
        "plans": under_plans(rank, world, mesh),
        "rows": whose_rows(rank, world, mesh, folder),
        "unknown": unknown(rank, world, mesh),
        "deepspeed": said(lambda: next(layer_of(mesh, world).experts.parameters()).group_name),
    }
    dist.destroy_process_group()
    return found


def optimizers(rank: int, world: int, mesh: Any) -> dict[str, str]:
    from transformers.optimization import Adafactor

    allow_optimizer(Known)
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "Adafactor": torch.optim.Adafactor,
        "transformers": Adafactor,
        "LBFGS": torch.optim.LBFGS,
        "Unknown": Unknown,
        "Known": Known,
        "SGD": lambda values: torch.optim.SGD(values, lr=1e-3, momentum=0.9),
        "RMSprop": torch.optim.RMSprop,
        "AdamW8bit": AdamW8bit,
    }
    result = {}
    for name, make in kinds.items():
        layer = layer_of(mesh, world)
        optimizer = make(layer.parameters())
        losses_of(layer, rank)
        result[name] = said(lambda optimizer=optimizer: optimizer.step(lambda: 0.0))
    layer = layer_of(mesh, world)
    losses_of(layer, rank)
    result["Muon"] = said(lambda: torch.optim.Muon(layer.experts.parameters()))
    rest = torch.optim.Adafactor(layer.gate.parameters())
    result["Adafactor of the rest"] = said(rest.step)
    return result


def scalers(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    """A scaler of each rank's own is refused; one that asks all ranks skips the same step on all."""
    result: dict[str, Any] = {}
    for name, make in (("alone", torch.amp.GradScaler), ("sharded", ShardedGradScaler), ("off", torch.amp.GradScaler)):
        layer = layer_of(mesh, world)
        exclude_from_ddp(layer)
        model = nn.parallel.DistributedDataParallel(layer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = make("cpu", init_scale=1024.0, enabled=name != "off")
        before = [value.clone() for value in model.parameters()]
        refusal, scales, kept = "", [], []
        for step in range(2):
            scaler.scale(model(inputs(rank)).square().mean()).backward()
            if step == 0 and rank == 2 and name == "sharded":
                layer.experts.down_proj.grad[:1] = float("inf")

            def take(scaler: Any = scaler, optimizer: Any = optimizer) -> None:
                scaler.step(optimizer)
                scaler.update()

            refusal = said(take)
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            kept.append(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
            if refusal:
                break
        result[name] = {"said": refusal, "scales": scales, "kept": kept}
    return result


def mixed(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    """fully_shard in bfloat16 around float32 experts, against the same layer in bfloat16; and widths that do not go."""
    layer = layer_of(mesh, world)
    model = nn.Sequential(nn.Linear(SPEC.hidden_size, SPEC.hidden_size), layer)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for part in (*model, model):
        fully_shard(part, ignored_params=expert_parameters(model), mp_policy=policy)
    out = model(inputs(rank))
    out.square().mean().backward()
    grads = {name: value.grad.clone() for name, value in layer.experts.named_parameters()}
    kinds = sorted({f"{value.dtype} {value.grad.dtype}" for value in expert_parameters(model)})
    torch.manual_seed(7)
    half = layer_of(mesh, world)
    whole = nn.Sequential(nn.Linear(SPEC.hidden_size, SPEC.hidden_size), half)
    for ours, theirs in zip(whole.parameters(), model.parameters(), strict=True):
        source = theirs.full_tensor() if hasattr(theirs, "full_tensor") else theirs
        with torch.no_grad():
            ours.copy_(source)
    whole = whole.to(torch.bfloat16)
    expected = whole(inputs(rank).bfloat16())
    expected.float().square().mean().backward()
    worst = worst_of(grads, {name: value.grad.float() for name, value in half.experts.named_parameters()})
    narrow = layer_of(mesh, world).to(torch.bfloat16)
    narrow.gate.float()
    return {
        "out": torch.equal(out, expected.float()),
        "dtype": str(out.dtype),
        "kinds": kinds,
        "grads": worst,
        "narrow": said(lambda: narrow(inputs(rank))),
        "plan": plan_of(0, world).topology.num_devices,
    }


def norms(rank: int, world: int, mesh: Any) -> dict[str, str]:
    """Who clips by a norm of this rank's experts is refused, before there are gradients too; who asks none is not."""
    layer = layer_of(mesh, world)
    result = {"no gradients": said(lambda: nn.utils.clip_grad_norm_(layer.parameters(), 1.0))}
    losses_of(layer, rank)
    result["experts"] = said(lambda: nn.utils.clip_grad_norm_(layer.experts.down_proj, 1.0, foreach=False))
    twin = copy.deepcopy(layer)
    losses_of(twin, rank)
    result["copy"] = said(lambda: nn.utils.clip_grad_norm_(twin.parameters(), 1.0))
    half = layer_of(mesh, world).to(torch.bfloat16)
    result["bfloat16"] = said(lambda: nn.utils.clip_grad_norm_(half.parameters(), 1.0))
    values = list(layer.parameters())
    local = nn.utils.get_total_norm([value.grad for value in values])
    result["given"] = said(lambda: nn.utils.clip_grads_with_norm_(values, 1.0, local))
    result["given an iterator"] = said(lambda: nn.utils.clip_grads_with_norm_(layer.parameters(), 1.0, local))
    ours = mp.clip_grad_norm_(layer, float("inf"))
    result["given ours"] = said(lambda: nn.utils.clip_grads_with_norm_(values, 1.0, ours))
    result["value"] = said(lambda: nn.utils.clip_grad_value_(layer.parameters(), 1.0))
    result["infinity"] = said(lambda: nn.utils.clip_grad_norm_(layer.parameters(), float("inf")))
    result["rest"] = said(lambda: nn.utils.clip_grad_norm_(layer.gate.parameters(), 1.0))
    result["ours"] = said(lambda: mp.clip_grad_norm_(layer, 1.0))
    step = torch.compile(torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=False).step, backend="eager")
    before = layer.experts.down_proj.detach().clone()
    result["compiled step"] = said(step)
    assert not torch.equal(before, layer.experts.down_proj)
    return result


def files(rank: int, world: int, mesh: Any, folder: Path) -> dict[str, str]:
    """What would write a rank's experts for all is refused; what writes others, or says that it is a rank's, goes."""
    layer = layer_of(mesh, world)
    exclude_from_ddp(layer)
    wrapped = nn.parallel.DistributedDataParallel(layer)
    state = layer.state_dict()
    attempts: dict[str, Callable[[Any], Any]] = {
        "save": lambda file: torch.save(state, file),
        "on the host": lambda file: torch.save({name: value.cpu().clone() for name, value in state.items()}, file),
        "in bfloat16": lambda file: torch.save({name: value.bfloat16() for name, value in state.items()}, file),
        "wrapped": lambda file: torch.save({"model": wrapped.state_dict()}, file),
        "parameters": lambda file: torch.save(dict(layer.named_parameters()), file),
        "module": lambda file: torch.save(layer, file),
        "safetensors": lambda file: safetensors.torch.save_file(state, file),
        "safetensors model": lambda file: safetensors.torch.save_model(layer, str(file)),
        "safetensors bytes": lambda file: safetensors.torch.save(copy.deepcopy(state)),
        "dcp": lambda file: dcp.save({"model": state}, checkpoint_id=folder / "dcp"),
        "async dcp": lambda file: dcp.async_save({"model": state}, checkpoint_id=folder / "async").result(),
        "rest": lambda file: torch.save(layer.gate.state_dict(), file),
        "of this rank": lambda file: torch.save({n: v.as_subclass(torch.Tensor) for n, v in state.items()}, file),
        "ours": lambda file: mp.save_checkpoint(folder / "ours", layer),
    }
    return {name: said(lambda name=name: attempts[name](folder / f"{name} {rank}")) for name in attempts}


def as_ordinary(state: dict[str, Any]) -> dict[str, Any]:
    """The same dictionary with ordinary tensors in the places of marked ones, as the refusal to write them says."""
    for name, value in state.items():
        if isinstance(value, dict):
            as_ordinary(value)
        elif isinstance(value, torch.Tensor):
            state[name] = value.as_subclass(torch.Tensor)
    return state


def whose_rows(rank: int, world: int, mesh: Any, folder: Path) -> dict[str, Any]:
    """Ordinary tensors: of a whole model, and of this rank's rows with and without a word of whose they are. Into
    optimizers that have never stepped, and that have."""
    result: dict[str, Any] = {}

    def stepped(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[ExpertParallelMoE, torch.optim.Optimizer]:
        layer = layer_of(mesh, world)
        optimizer = make(layer.parameters())
        losses_of(layer, rank)
        optimizer.step()
        optimizer.zero_grad()
        return layer, optimizer

    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "AdamW": torch.optim.AdamW,
        # Its state is there before the first step.
        "Adagrad": torch.optim.Adagrad,
    }
    for kind, make in kinds.items():
        layer, optimizer = stepped(make)
        # As many experts' rows as the whole model has, in their order.
        shapes = {name: (layer.experts.num_experts, *shape) for name, shape in layer.experts.shapes.items()}
        whole = [
            nn.Parameter(torch.ones(shapes.get(name.rpartition(".")[2], value.shape)))
            for name, value in layer.named_parameters()
        ]
        of_whole = make(whole)
        for value in whole:
            value.grad = torch.ones_like(value)
        of_whole.step()
        state = as_ordinary(copy.deepcopy(optimizer.state_dict()))
        bare = {name: value for name, value in state.items() if name != "expert_rows"}
        torch.save(state, folder / f"{kind} {rank}.pt")
        read = torch.load(folder / f"{kind} {rank}.pt", weights_only=True)
        cut = copy.deepcopy(state)
        number = [name for name, _ in layer.named_parameters()].index("experts.down_proj")
        key = next(key for key, value in cut["state"][number].items() if value.ndim)
        cut["state"][number][key] = cut["state"][number][key][..., :1]
        given = {"whole": of_whole.state_dict(), "bare": bare, "cut": cut, "read": read}
        fresh = make(layer.parameters())
        for name, value in given.items():
            for place, into in (("fresh", fresh), ("stepped", optimizer)):
                result[f"{kind} {name} {place}"] = said(lambda into=into, value=value: into.load_state_dict(value))
        result[f"{kind} same"] = all(
            torch.equal(part, fresh.state[parameter][key])
            for parameter, entries in optimizer.state.items()
            for key, part in entries.items()
        )
        model = as_ordinary(layer.state_dict())
        mp.apply(layer, plan_of(1, world), optimizer)
        for name, value in {"read": read, "bare": bare}.items():
            for place, into in (("fresh", fresh), ("stepped", optimizer)):
                attempt = said(lambda into=into, value=value: into.load_state_dict(value))
                result[f"{kind} {name} {place} moved"] = attempt
        result["model moved"] = said(lambda layer=layer, model=model: layer.load_state_dict(model))
        mp.apply(layer, plan_of(0, world), optimizer)
        result["model back"] = said(lambda layer=layer, model=model: layer.load_state_dict(model))
        # Without the dictionary's own word, and as people load a part of a model.
        bare_model = dict(model)
        result["model bare"] = said(lambda layer=layer, model=bare_model: layer.load_state_dict(model))
        part = layer.state_dict()
        part.update({name: torch.zeros(shapes[name.rpartition(".")[2]]) for name in part if "experts" in name})
        result["model updated"] = said(lambda layer=layer, part=part: layer.load_state_dict(part))
    return result


def in_memory(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    """States go on to be compared, copied and loaded, whether assigned or copied, and parameters keep their marks."""
    layer = layer_of(mesh, world)
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(1.0)
    layer.load_state_dict(state)
    equal = all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    loss = losses_of(layer, rank)[0]
    kinds = []
    for given in (state, as_ordinary(copy.deepcopy(state))):
        layer.load_state_dict(given, assign=True)
        kinds.append(type(layer.experts.down_proj).__name__)
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)
    return {
        "equal": equal,
        "kinds": kinds,
        "difference": abs(losses_of(layer, rank)[0] - loss),
        "average": type(averaged.module.experts.down_proj).__name__,
    }


def under_plans(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    """States and averages go by the plan that they were taken under; optimizers by the plans that they were told of."""
    result: dict[str, Any] = {}

    def stepped(told: bool) -> tuple[ExpertParallelMoE, torch.optim.Optimizer, dict[str, Any]]:
        layer = layer_of(mesh, world)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        losses_of(layer, rank)
        optimizer.step()
        optimizer.zero_grad()
        kept = {"model": copy.deepcopy(layer.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}
        kept["average"] = torch.optim.swa_utils.AveragedModel(layer, avg_fn=lambda old, new, _: 0.5 * old + 0.5 * new)
        kept["average"].update_parameters(layer)
        mp.apply(layer, plan_of(1, world), optimizer if told else None)
        return layer, optimizer, kept

    layer, optimizer, kept = stepped(told=True)
    result["model"] = said(lambda: layer.load_state_dict(kept["model"]))
    result["optimizer"] = said(lambda: optimizer.load_state_dict(kept["optimizer"]))
    result["into one that is new"] = said(
        lambda: (fresh := torch.optim.AdamW(layer.parameters())).load_state_dict(kept["optimizer"]) or fresh.step()
    )
    result["average"] = said(lambda: kept["average"].update_parameters(layer))
    with torch.no_grad():
        result["by hand"] = said(
            lambda: 0.5 * kept["model"]["experts.down_proj"] + layer.state_dict()["experts.down_proj"]
        )
        several = [list(state.values())[-2:] for state in (kept["model"], layer.state_dict())]
        result["together"] = said(lambda: torch._foreach_add_(*several))
    result["saved"] = said(lambda: torch.save(optimizer.state_dict(), "/dev/null"))
    mp.apply(kept["average"], plan_of(1, world))
    result["average moved"] = said(lambda: kept["average"].update_parameters(layer))
    mp.apply(layer, plan_of(0, world), optimizer)
    layer.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    result["plain"] = sorted({type(part).__name__ for state in optimizer.state.values() for part in state.values()})
    state = optimizer.state[layer.experts.down_proj]["exp_avg"]
    number = [id(value) for value in layer.parameters()].index(id(layer.experts.down_proj))
    old = kept["optimizer"]["state"][number]["exp_avg"]
    order = layer.experts.rows.experts
    result["rows"] = all(
        torch.equal(state[row], old.as_subclass(torch.Tensor)[old.rows.experts.index(expert)])
        for row, expert in enumerate(order)
    )
    result["back"] = said(optimizer.step)
    layer, optimizer, _ = stepped(told=False)
    losses_of(layer, rank)
    result["not told"] = said(optimizer.step)
    layer, optimizer, _ = stepped(told=True)
    losses_of(layer, rank)
    result["told"] = said(optimizer.step)
    return result


def unknown(rank: int, world: int, mesh: Any) -> dict[str, str]:
    """What goes round a layer in ways that it knows nothing of."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer
    from torch.nn.utils import parametrizations, prune

    layer, x = layer_of(mesh, world), inputs(rank).requires_grad_()
    result = {"twice": said(lambda: torch.autograd.grad(layer(x).square().sum(), x, create_graph=True))}
    result["func"] = said(lambda: torch.func.grad(lambda x: layer(x).sum())(inputs(rank)))
    exclude_from_ddp(layer)
    wrapped = nn.parallel.DistributedDataParallel(layer)

    def joined() -> None:
        with wrapped.join():
            wrapped(inputs(rank))

    result["join"] = said(joined)
    with wrapped.join(enable=False):
        losses_of(wrapped, rank)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    averaging = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=1, warmup_steps=0))
    result["averaging"] = said(averaging.step)
    result["parametrised"] = said(lambda: parametrizations.weight_norm(layer.experts, "down_proj"))
    pruned = layer_of(mesh, world)
    prune.random_unstructured(pruned.experts, "down_proj", 0.5)
    result["pruned"] = said(lambda: pruned(inputs(rank)))
    return result


def in_one_process(rank: int, world: int, folder: Path) -> dict[str, str]:
    """One rank has all experts: their norm is right, and so is what is written if they are in order."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    result = {}
    for name, order in (("in order", range(SPEC.experts)), ("reversed", range(SPEC.experts - 1, -1, -1))):
        plan = mp.Plan(SPEC, topology(1, 1), np.array([order] * SPEC.layers), np.zeros(SPEC.experts, dtype=np.int64))
        layer = ExpertParallelMoE(SPEC, plan, mesh, 4)
        losses_of(layer, rank)
        twin = copy.deepcopy(layer)
        result[f"norm {name}"] = said(lambda layer=layer: nn.utils.clip_grad_norm_(layer.parameters(), 1.0))
        whole = {key: value.detach().clone().as_subclass(torch.Tensor) for key, value in layer.named_parameters()}
        result[f"whole {name}"] = said(lambda layer=layer, whole=whole: layer.load_state_dict(whole, strict=False))
        alone = [nn.Parameter(value.clone()) for value in whole.values()]
        for value in alone:
            value.grad = torch.ones_like(value)
        adam = torch.optim.AdamW(alone)
        adam.step()
        into, of_whole = torch.optim.AdamW(layer.named_parameters()), adam.state_dict()
        result[f"optimizer {name}"] = said(lambda into=into, of_whole=of_whole: into.load_state_dict(of_whole))
        for kind, values in (("state", twin.state_dict()), ("parameters", dict(twin.named_parameters()))):
            result[f"{kind} {name}"] = said(lambda values=values: torch.save(values, folder / "weights"))
            result[f"{kind} {name} dcp"] = said(lambda v=values: dcp.save(v, checkpoint_id=folder / "dcp"))
            result[f"{kind} {name} safetensors"] = said(
                lambda v=values: safetensors.torch.save_file(v, folder / "weights")
            )
    dist.destroy_process_group()
    return result
