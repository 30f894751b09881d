"""Transformers models whose experts live by a plan: same weights, same logits, recorded like the original."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..._arguments import check_types
from ...placement.errors import InputError, MoeplaceError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.model_families import BESIDE
from ...placement.plan import Plan
from .compression import Compression, LSHCompression
from .coordination import check_consistent
from .data_parallel import exclude_from_ddp
from .expert_mlps import Fused
from .experts import Gradients, MakeDispatcher, PlacedExperts, Replicas, check_plan
from .layer import ExpertParallelMoE
from .managers import note_replaced
from .mesh import ExpertMesh
from .weights import load_weights, materialise

TRIED_EXPERTS, TRIED_ROWS, TRIED_WIDTH = 2, 4, 256
"""Experts, tokens and inner units on which an expert MLP is compared with the module that it stands for."""
TOLERANCE = 1e-4
"""Largest relative difference there: float32 rounding of long sums, far below that of another function."""

WHOLE_BLOCKS = ("DeepseekV3MoE",)
"""Blocks that are gate, experts and shared experts and nothing else: replaced whole, so that the latter overlap."""
SCORED_BLOCKS = ("Llama4TextMoe",)
"""Blocks that hand every token to every expert, scaled by its score: replaced whole, so that only the chosen travel."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
COMPUTED = {"torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
"""Types of weights that experts are computed with; others are those of quantised ones."""


@dataclass(frozen=True)
class _Experts:
    """The experts of one layer. names: of the modules that hold them, several where parts of a model share weights."""

    names: tuple[str, ...]
    layer: int
    modules: tuple[nn.Module, ...]


@check_types
def parallelize(
    model: nn.Module,
    plan: Plan,
    mesh: DeviceMesh | ExpertMesh,
    *,
    dispatch: str | MakeDispatcher | None = None,
    compression: Compression | None = None,
    replica_choice: Replicas = "share",
    capacity_factor: float | None = None,
    padded_tokens: int | None = None,
    gradients: Gradients = "mean",
    shard_experts: bool = False,
    chunks: int = 1,
    delay_weight_gradients: bool = False,
    weights: str | Path | None = None,
) -> nn.Module:
    """Spreads the experts of `model` over the mesh as `plan` says, in place.

    Every rank keeps its own experts and all of the rest. Routers stay as they are, so recording (`moeplace.profile`),
    router losses and callbacks work as before. A model on the meta device gets memory here, on the mesh's device, so
    that no rank ever holds all experts: with `weights`, or followed by `load_checkpoint`.

    What the experts compute is recognised by their class's settings, then compared with the module's own forward on a
    few random rows and random weights of its shapes, on the CPU in float32; so also on the meta device, where weights
    are still missing. The global random state stays as it was.

    DistributedDataParallel leaves the experts alone; `fully_shard` wants `ignored_params=expert_parameters(model)`.
    `save_pretrained` is refused from now on: `export_hf` and `save_checkpoint` write the experts of all ranks.

    Args:
        model: a Transformers 5 model (Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3, gpt-oss and those built like them) with
            the same weights on every rank.
        plan: which experts stand where.
        mesh: all ranks; device g of the plan is its g-th.
        dispatch, compression, replica_choice, capacity_factor, padded_tokens, gradients, shard_experts, chunks,
            delay_weight_gradients: as for `PlacedExperts`.
        weights: a folder of safetensors to read them from, each rank its own experts' alone; they need not be in the
            model, which may be on the meta device (`with torch.device("meta"): AutoModelForCausalLM.from_config(...)`).

    Returns:
        The model.

    Raises:
        InputError: no MoE block found; the plan is for another model or number of ranks, lacks a layer, or differs
            between ranks, as may the model's weights. All errors are raised on every rank.
        UnsupportedError: the mesh leaves ranks out; experts with a function that is not known,
            or that differs from the one it was taken for; weights that are quantised.
    """
    mesh = ExpertMesh.of(mesh)
    failure: MoeplaceError | None = None
    moe_experts: list[_Experts] = []
    kinds: list[Fused] = []
    spec = plan.model
    try:
        mesh.check_covers_world()
        moe_experts = _experts(model)
        blocks = [model.get_submodule(experts.names[0].rpartition(".")[0]) for experts in moe_experts]
        kinds = [_kind(e.names[0], e.modules[0], block) for e, block in zip(moe_experts, blocks, strict=True)]
        spec = _spec(model, moe_experts)
        _check_kinds(moe_experts, kinds, spec)
        check_plan(spec, plan, mesh)
        if spec.zero_experts and isinstance(compression, LSHCompression):
            raise UnsupportedError("LSHCompression does not know experts without weights (zero_experts): leave it out")
    except MoeplaceError as error:
        failure = error
    said = f"{plan.fingerprint} {[(experts.names, experts.layer) for experts in moe_experts]} {kinds}"
    check_consistent(mesh, "model and plan", said, failure)
    if weights is None:
        # Else a rank's experts would be of another model than the others', and replicas of an expert never equal.
        check_consistent(mesh, "weights of the model (one seed, or one checkpoint, on every rank)", _weight_sums(model))
    for experts, kind in zip(moe_experts, kinds, strict=True):
        module = experts.modules[0]
        # Some have rows for experts without weights as well.
        values = {name: value[: spec.experts] for name, value in module.named_parameters(recurse=False)}
        example = next(iter(values.values()))
        # Experts between latent projections take and give rows of the latent width.
        placed = PlacedExperts(
            spec.replace(expert_input_size=kind.input_size, expert_output_size=kind.output_size),
            plan,
            mesh,
            experts.layer,
            kind=kind,
            dispatch=dispatch,
            compression=compression,
            replica_choice=replica_choice,
            capacity_factor=capacity_factor,
            padded_tokens=padded_tokens,
            gradients=gradients,
            shard_experts=shard_experts,
            chunks=chunks,
            delay_weight_gradients=delay_weight_gradients,
            dtype=example.dtype,
            seed=None,
        )
        rows = {name: len(value) - spec.experts for name, value in module.named_parameters(recurse=False)}
        placed.unused_rows = {name: more for name, more in rows.items() if more}
        if example.device.type != "meta" and weights is None:
            placed.load_logical(values)
        placed.train(module.training)
        for name, value in module.named_parameters(recurse=False):
            placed.get_parameter(name).requires_grad_(value.requires_grad)
        if kind.post_norm:
            # Every rank has it, as all that is no expert.
            placed.add_module("post_expert_norm", module.get_submodule("post_expert_norm"))
        for name in experts.names:
            _replace(model, name, placed)
        for module in experts.modules:
            note_replaced(module.parameters(recurse=False))
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        materialise(model, mesh.device)
    if weights is not None:
        try:
            load_weights(model, weights)
        except MoeplaceError as error:
            failure = error
        check_consistent(mesh, "weights", str(weights), failure)
    exclude_from_ddp(model)
    for part in model.modules():
        # Transformers' own models have this, adapters around them have not.
        if hasattr(type(part), "base_model_prefix"):
            vars(part)["save_pretrained"] = _refuse_saving
    return model


SUMMED = 1 << 24
"""Bytes at once, where they are summed one by one: that takes 8 times as many on the way."""


@torch.no_grad()
def _weight_sums(model: nn.Module) -> str:
    """Of the bits of every parameter and buffer of floating point that a rank has whole, in whole numbers, which no
    order of terms changes."""
    sums: list[Tensor] = []
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point() and not value.is_meta and type(value) in (Tensor, nn.Parameter, nn.Buffer):
            bits = value.detach().flatten().view(torch.uint8)
            if len(bits) % 8 == 0 and bits.storage_offset() % 8 == 0:
                sums.append(bits.view(torch.int64).sum())
            else:
                sums += [part.sum() for part in torch.split(bits, SUMMED)]
    return str([int(part) for part in sums])


def _refuse_saving(*_: object, **__: object) -> None:
    raise UnsupportedError(
        "save_pretrained (the Transformers Trainer's own saving too) would write this rank's experts as if they were "
        "all. On every rank, moeplace.runtime.export_hf(model, folder) writes what from_pretrained reads, and "
        "moeplace.runtime.save_checkpoint(path, model, optimizer) what training resumes from; moeplace.training's "
        "ExpertTrainer does both in the Trainer's place"
    )


def _experts(model: nn.Module) -> list[_Experts]:
    """Every experts module of Transformers' language models: called `experts`, with fused weights."""
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" and isinstance(getattr(module, "down_proj", None), nn.Parameter)
    ]
    modules = [entry for entry in modules if not BESIDE.search(entry[0])] or modules
    if not modules:
        raise InputError(
            f"{type(model).__name__} has no MoE block that is known: looked for modules named 'experts' with a "
            "parameter 'down_proj', as Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3 and gpt-oss have in Transformers 5. In "
            "any other model put ExpertParallelMoE where its MoE block is, and give it the weights with "
            "experts.load_logical"
        )
    by_layer: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        number = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
        if number is None:
            raise InputError(f"{name}: no layer number in this name; expected layers.<number>")
        same = by_layer.setdefault(int(number[1]), [])
        if same and same[0][1].down_proj is not module.down_proj:
            raise UnsupportedError(
                f"{same[0][0]} and {name} both hold experts of layer {number[1]}, each its own; which of them the plan "
                "is of is not known"
            )
        same.append((name, module))
    return [
        _Experts(tuple(name for name, _ in same), layer, tuple(module for _, module in same))
        for layer, same in sorted(by_layer.items())
    ]


def _kind(name: str, module: nn.Module, block: nn.Module) -> Fused:
    def refused(why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{name} ({type(module).__name__}): its function is not known: {why}. Write an expert MLP "
            "(moeplace/runtime/moe/expert_mlps.py) and use ExpertParallelMoE"
        )

    whole = type(block).__name__ in (*WHOLE_BLOCKS, *SCORED_BLOCKS)
    for part, called in ((module, "it"), (block, "its block"))[: 1 + whole]:
        if "forward" in vars(part):
            raise refused(f"{called} has another forward than its class, as accelerate's device_map gives it")
        if hooks := [kind for kind in HOOKS if getattr(part, kind)]:
            raise refused(f"{called} has {hooks[0].strip('_').replace('_', ' ')}, which would be lost")
    own = dict(module.named_parameters(recurse=False))
    flags = {flag: value for flag, value in vars(module).items() if re.match("(has|is)_", flag)}
    if strange := sorted(flags.keys() - Fused.FLAGS):
        raise refused(f"Transformers declares {strange[0]} = {flags[strange[0]]!r} of it")
    norm = "post_expert_norm." if flags.get("has_post_expert_norm") else " "
    inner = [key for key, _ in module.named_parameters() if key not in own and not key.startswith(norm)]
    if inner:
        raise refused(f"its part {inner[0]} has weights beside those of the experts")
    gated = bool(flags.get("has_gate", "gate_up_proj" in own))
    first = "gate_up_proj" if gated else "up_proj"
    bias = bool(flags.get("has_bias", "down_proj_bias" in own))
    needed = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if bias else set())
    if own.keys() != needed:
        raise refused(f"its weights are {', '.join(sorted(own))}, expected {', '.join(sorted(needed))}")
    up, down = own[first], own["down_proj"]
    if other := sorted({str(value.dtype) for value in own.values()} - COMPUTED):
        raise refused(f"its weights are {other[0]}; quantised ones are to be written in bfloat16 first")
    if up.ndim != 3 or down.ndim != 3 or len(up) not in (len(down), len(down) + (_zero_experts(module))):
        raise refused(
            f"{first} has shape {list(up.shape)}, down_proj {list(down.shape)}, expected an expert a row each"
        )
    transposed = bool(flags.get("is_transposed", up.shape[1] != (1 + gated) * down.shape[2]))
    (both, width), (output, ffn) = (
        ((up.shape[2], up.shape[1]), (down.shape[2], down.shape[1])) if transposed else (up.shape[1:], down.shape[1:])
    )
    if both != (1 + gated) * ffn:
        raise refused(f"{first} has shape {list(up.shape)} and down_proj {list(down.shape)}, which do not fit")
    scored = _takes_rows_alone(type(module).forward)
    if scored and (type(block).__name__ not in SCORED_BLOCKS or getattr(block, "top_k", 0) != 1):
        raise refused(f"it takes rows of all experts, and its block is no {SCORED_BLOCKS[0]} of one expert a token")
    if not callable(getattr(module, "act_fn", None)) and not hasattr(module, "_apply_gate"):
        raise refused("it has neither act_fn nor a gate of its own")
    alone = copy.copy(module)
    alone._parameters = {}
    post_norm = bool(flags.get("has_post_expert_norm", False))
    return Fused(type(module).__name__, gated, transposed, bias, post_norm, width, ffn, output, alone)


def _zero_experts(module: nn.Module) -> int:
    count = getattr(module, "zero_expert_num", 0)
    return count if isinstance(count, int) else 0


def _check_kinds(moe_experts: list[_Experts], kinds: list[Fused], spec: ModelSpec) -> None:
    """Compares every expert MLP with its module, once for those built alike.

    Raises:
        UnsupportedError: the module gives something else, or does not run on its own.
    """
    compared = set()
    pairs = [
        (*pair, kind)
        for e, kind in zip(moe_experts, kinds, strict=True)
        for pair in zip(e.names, e.modules, strict=True)
    ]
    for name, module, kind in pairs:
        settings = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters()}
        built = f"{type(module)} {kind} {shapes} {settings} {module}"
        if built in compared:
            continue
        compared.add(built)
        # Few inner units tell functions apart as well as all do, in a fraction of the time; a refusal rests on all.
        narrow = replace(kind, ffn_size=min(kind.ffn_size, TRIED_WIDTH))
        failure = _difference(module, narrow, spec)
        if failure is not None and kind.ffn_size > TRIED_WIDTH:
            failure = _difference(module, kind, spec)
        if failure is not None:
            raise UnsupportedError(
                f"{name} ({type(module).__name__}) was taken for {kind}, but {failure}. Write an expert MLP "
                "(moeplace/runtime/moe/expert_mlps.py) and use ExpertParallelMoE"
            )


@torch.no_grad()
def _difference(module: nn.Module, kind: Fused, spec: ModelSpec) -> str | None:
    """What tells `kind` from the module's own forward, on random rows and weights; None where nothing does."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    count = min(TRIED_EXPERTS, spec.experts)
    # Large enough to reach the bends and limits of activations.
    row_TD = 4.0 * drawn(TRIED_ROWS, kind.input_size)
    expert_TK = torch.arange(count, device="cpu").repeat(TRIED_ROWS, 1)
    weight_TK = drawn(TRIED_ROWS, count)
    shapes = {key: (count, *shape) for key, shape in kind.shapes(spec).items()}
    weights = {
        # Matrices in either orientation: sums of as many terms as the wider side has stay near one, or below.
        key: drawn(*shape) * (max(shape[1:]) ** -0.5 if len(shape) > 2 else 1.0)
        for key, shape in shapes.items()
    }
    # Parameters that the kind does not know take part as well; what they do must then show.
    others = {key: drawn(*value.shape) for key, value in module.named_parameters(recurse=False) if key not in weights}
    alone = copy.copy(module)
    alone._parameters = {key: nn.Parameter(value, requires_grad=False) for key, value in {**weights, **others}.items()}
    if kind.post_norm:
        # In float32, and with weights, which a model on the meta device has not.
        norm = copy.deepcopy(module.get_submodule("post_expert_norm")).to_empty(device="cpu").float()
        norm.load_state_dict({key: 1 + 0.1 * drawn(*value.shape) for key, value in norm.state_dict().items()})
        alone._modules = {**module._modules, "post_expert_norm": norm}
        kind = replace(kind, module=alone)
    # The class's own definition; the kernels that Transformers puts in its place may want a GPU.
    own = getattr(type(module).forward, "__wrapped__", type(module).forward)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            # The kind takes rows in the order of experts, as do the modules of some blocks.
            count_S, row_ND = torch.full((count,), TRIED_ROWS, device="cpu"), row_TD.repeat(count, 1)
            kind_TD = kind.forward(row_ND, count_S, weights)
            if _takes_rows_alone(own):
                expected_TD = own(alone, row_ND)
            else:
                expected_TD = own(alone, row_TD, expert_TK, weight_TK)
                kind_TD = (kind_TD.view(count, TRIED_ROWS, -1) * weight_TK.T[:, :, None]).sum(dim=0)
            difference = float((kind_TD - expected_TD).abs().max() / expected_TD.abs().max())
        except Exception as error:  # noqa: BLE001  # whatever a model's own code raises
            return f"the two could not be compared ({type(error).__name__}: {error})"
    if difference <= TOLERANCE:
        return None
    return (
        f"computes something else: on random weights in float32 outputs differ by {difference:.2g} of the largest, "
        f"where rounding gives less than {TOLERANCE:g}"
    )


def _takes_rows_alone(forward: Callable[..., Any]) -> bool:
    """Whether experts are handed no choice: rows for all of them, one expert's behind another's."""
    return list(inspect.signature(forward).parameters) == ["self", "hidden_states"]


def _spec(model: nn.Module, moe_experts: list[_Experts]) -> ModelSpec:
    config = next((part.config for part in model.modules() if hasattr(getattr(part, "config", None), "to_dict")), None)
    if config is None:
        raise InputError(f"{type(model).__name__} has no Transformers config")
    layers = tuple(experts.layer for experts in moe_experts)
    return ModelSpec.from_config(config).replace(layers=len(layers), moe_layers=layers)


def _replace(model: nn.Module, name: str, placed: PlacedExperts) -> None:
    block_name = name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    if type(block).__name__ in SCORED_BLOCKS:
        whole: nn.Module = _ScoredMoE(block, placed)
    elif type(block).__name__ in WHOLE_BLOCKS:
        gate, shared = block.gate, block.shared_experts
        assert isinstance(gate, nn.Module)
        assert isinstance(shared, nn.Module)
        whole = ExpertParallelMoE.around(placed, gate, shared)
    else:
        block.experts = placed
        return
    parent, _, last = block_name.rpartition(".")
    setattr(model.get_submodule(parent), last, whole.train(block.training))


class _ScoredMoE(nn.Module):
    """Llama-4's MoE block: what an expert is given, not what it gives, is scaled by its score.

    Scores of all experts but the chosen are zero, and so is what experts without biases make of zeros.
    """

    def __init__(self, block: nn.Module, placed: PlacedExperts) -> None:
        super().__init__()
        self.router, self.experts = block.get_submodule("router"), placed
        self.shared_expert = block.get_submodule("shared_expert")

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        row_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        score_TE, logit_TE = self.router(row_TD)
        score_T1, expert_T1 = score_TE.max(dim=-1, keepdim=True)
        out_TD = self.experts(row_TD * score_T1, expert_T1, torch.ones_like(score_T1))
        shared_TD: Tensor = self.shared_expert(row_TD)
        return shared_TD + out_TD, logit_TE
