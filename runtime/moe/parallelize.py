"""Transformers models whose experts live by a plan: same weights, same logits, recorded like the original."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..._arguments import check_types
from ...placement.errors import InputError, MoeplaceError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from .compression import LSHCompression
from .coordination import check_consistent
from .data_parallel import exclude_from_ddp
from .expert_mlps import Fused
from .experts import Gradients, MakeDispatcher, PlacedExperts, check_plan
from .layer import ExpertParallelMoE
from .mesh import ExpertMesh

TRIED_EXPERTS, TRIED_ROWS, TRIED_WIDTH = 2, 4, 256
"""Experts, tokens and inner units on which an expert MLP is compared with the module that it stands for."""
TOLERANCE = 1e-4
"""Largest relative difference there: float32 rounding of long sums, far below that of another function."""

WHOLE_BLOCKS = ("DeepseekV3MoE",)
"""Blocks that are gate, experts and shared experts and nothing else: replaced whole, so that the latter overlap."""


@check_types
def parallelize(
    model: nn.Module,
    plan: Plan,
    mesh: DeviceMesh | ExpertMesh,
    *,
    dispatch: str | MakeDispatcher | None = None,
    compression: LSHCompression | None = None,
    gradients: Gradients = "mean",
) -> nn.Module:
    """Spreads the experts of `model` over the mesh as `plan` says, in place.

    Every rank keeps its own experts and all of the rest. Routers stay as they are, so recording (`moeplace.profile`),
    router losses and callbacks work as before. On the meta device the weights are left to a checkpoint
    (`load_checkpoint`).

    What the experts compute is recognised by their class's settings, then compared with the module's own forward on a
    few random rows and random weights of its shapes, on the CPU in float32; so also on the meta device, where weights
    are still missing. The global random state stays as it was.

    DistributedDataParallel leaves the experts alone; `fully_shard` wants `ignored_params=expert_parameters(model)`.
    `save_pretrained` is refused from now on: `save_checkpoint` writes the experts of all ranks.

    Args:
        model: a Transformers 5 model (Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3, gpt-oss and those built like them) with
            the same weights on every rank.
        plan: which experts stand where.
        mesh: all ranks; device g of the plan is its g-th.
        dispatch, compression, gradients: as for `PlacedExperts`.

    Returns:
        The model.

    Raises:
        InputError: no MoE block found; the plan is for another model or number of ranks, lacks a layer, or differs
            between ranks. All errors are raised on every rank.
        UnsupportedError: the mesh leaves ranks out, pipeline stages aside; experts with a function that is not known,
            or that differs from the one it was taken for.
    """
    mesh = ExpertMesh.of(mesh)
    failure: MoeplaceError | None = None
    modules: list[tuple[str, int, nn.Module]] = []
    kinds: list[Fused] = []
    spec = plan.model
    try:
        mesh.check_covers_world()
        modules = _experts(model)
        kinds = [_kind(name, module) for name, _, module in modules]
        spec = _spec(model, modules)
        _check_kinds(modules, kinds, spec)
        check_plan(spec, plan, mesh)
    except MoeplaceError as error:
        failure = error
    check_consistent(
        mesh, "model and plan", f"{plan.fingerprint} {[(name, layer) for name, layer, _ in modules]} {kinds}", failure
    )
    for (name, layer, module), kind in zip(modules, kinds, strict=True):
        weights = dict(module.named_parameters(recurse=False))
        example = next(iter(weights.values()))
        # Experts between latent projections take and give rows of the latent width.
        placed = PlacedExperts(
            spec.replace(expert_input_size=kind.input_size, expert_output_size=kind.output_size),
            plan,
            mesh,
            layer,
            kind=kind,
            dispatch=dispatch,
            compression=compression,
            gradients=gradients,
            dtype=example.dtype,
            seed=None,
        )
        if example.device.type != "meta":
            placed.load_logical(weights)
        placed.requires_grad_(example.requires_grad).train(module.training)
        _replace(model, name, placed)
    exclude_from_ddp(model)
    for part in model.modules():
        # Transformers' own models have this, adapters around them have not.
        if hasattr(type(part), "base_model_prefix"):
            vars(part)["save_pretrained"] = _refuse_saving
    return model


def _refuse_saving(*_: object, **__: object) -> None:
    raise UnsupportedError(
        "save_pretrained (the Transformers Trainer's own saving too) would write this rank's experts as if they were "
        "all. Write a checkpoint with moeplace.runtime.save_checkpoint(path, model, optimizer) on every rank, and give "
        "the Trainer save_strategy='no'; torch.distributed.checkpoint reads it into the model in one process, which "
        "save_pretrained then writes"
    )


def _experts(model: nn.Module) -> list[tuple[str, int, nn.Module]]:
    """(name, layer, module) of every experts module of Transformers: called `experts`, with fused weights."""
    modules = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" and isinstance(getattr(module, "down_proj", None), nn.Parameter):
            number = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
            if number is None:
                raise InputError(f"{name}: no layer number in this name; expected layers.<number>")
            modules.append((name, int(number[1]), module))
    if not modules:
        raise InputError(
            f"{type(model).__name__} has no MoE block that is known: looked for modules named 'experts' with a "
            "parameter 'down_proj', as Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3 and gpt-oss have in Transformers 5. In "
            "any other model put ExpertParallelMoE where its MoE block is, and give it the weights with "
            "experts.load_logical"
        )
    return sorted(modules, key=lambda entry: entry[1])


def _kind(name: str, module: nn.Module) -> Fused:
    def refused(why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{name} ({type(module).__name__}): its function is not known: {why}. Write an expert MLP "
            "(moeplace/runtime/moe/expert_mlps.py) and use ExpertParallelMoE"
        )

    own = dict(module.named_parameters(recurse=False))
    flags = {flag: value for flag, value in vars(module).items() if re.match("(has|is)_", flag)}
    if strange := sorted(flags.keys() - Fused.FLAGS):
        raise refused(f"Transformers declares {strange[0]} = {flags[strange[0]]!r} of it")
    inner = [key for key, _ in module.named_parameters() if key not in own]
    if inner:
        raise refused(f"its part {inner[0]} has weights beside those of the experts")
    gated = bool(flags.get("has_gate", "gate_up_proj" in own))
    first = "gate_up_proj" if gated else "up_proj"
    bias = bool(flags.get("has_bias", "down_proj_bias" in own))
    wanted = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if bias else set())
    if own.keys() != wanted:
        raise refused(f"its weights are {', '.join(sorted(own))}, expected {', '.join(sorted(wanted))}")
    up, down = own[first], own["down_proj"]
    if up.ndim != 3 or down.ndim != 3 or len(up) != len(down):
        raise refused(
            f"{first} has shape {list(up.shape)}, down_proj {list(down.shape)}, expected an expert a row each"
        )
    transposed = bool(flags.get("is_transposed", up.shape[1] != (1 + gated) * down.shape[2]))
    (both, width), (output, ffn) = (
        ((up.shape[2], up.shape[1]), (down.shape[2], down.shape[1])) if transposed else (up.shape[1:], down.shape[1:])
    )
    if both != (1 + gated) * ffn:
        raise refused(f"{first} has shape {list(up.shape)} and down_proj {list(down.shape)}, which do not fit")
    if not callable(getattr(module, "act_fn", None)) and not hasattr(module, "_apply_gate"):
        raise refused("it has neither act_fn nor a gate of its own")
    alone = copy.copy(module)
    alone._parameters = {}
    post_norm = bool(flags.get("has_post_expert_norm", False))
    return Fused(type(module).__name__, gated, transposed, bias, post_norm, width, ffn, output, alone)


def _check_kinds(modules: list[tuple[str, int, nn.Module]], kinds: list[Fused], spec: ModelSpec) -> None:
    """Compares every expert MLP with its module, once for those built alike.

    Raises:
        UnsupportedError: the module gives something else, or does not run on its own.
    """
    compared = set()
    for (name, _, module), kind in zip(modules, kinds, strict=True):
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
    # The class's own definition; the kernels that Transformers puts in its place may want a GPU.
    own = getattr(type(module).forward, "__wrapped__", type(module).forward)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            expected_TD = own(alone, row_TD, expert_TK, weight_TK)
            # The kind takes rows in the order of experts.
            count_S = torch.full((count,), TRIED_ROWS, device="cpu")
            out_KTD = kind.forward(row_TD.repeat(count, 1), count_S, weights).view(count, TRIED_ROWS, -1)
            kind_TD = (out_KTD * weight_TK.T[:, :, None]).sum(dim=0)
            difference = float((kind_TD - expected_TD).abs().max() / expected_TD.abs().max())
        except Exception as error:  # noqa: BLE001  # whatever a model's own code raises
            return f"the two could not be compared ({type(error).__name__}: {error})"
    if difference <= TOLERANCE:
        return None
    return (
        f"computes something else: on random weights in float32 outputs differ by {difference:.2g} of the largest, "
        f"where rounding gives less than {TOLERANCE:g}"
    )


def _spec(model: nn.Module, modules: list[tuple[str, int, nn.Module]]) -> ModelSpec:
    config = next((part.config for part in model.modules() if hasattr(getattr(part, "config", None), "to_dict")), None)
    if config is None:
        raise InputError(f"{type(model).__name__} has no Transformers config")
    layers = tuple(layer for _, layer, _ in modules)
    return ModelSpec.from_config(config).replace(layers=len(layers), moe_layers=layers)


def _replace(model: nn.Module, name: str, placed: PlacedExperts) -> None:
    block_name = name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    if type(block).__name__ not in WHOLE_BLOCKS:
        block.experts = placed
        return
    gate, shared = block.gate, block.shared_experts
    assert isinstance(gate, nn.Module)
    assert isinstance(shared, nn.Module)
    whole = ExpertParallelMoE.around(placed, gate, shared).train(block.training)
    parent, _, last = block_name.rpartition(".")
    setattr(model.get_submodule(parent), last, whole)
