"""Where a model routes: the modules that are handed expert ids and gate weights, and what they are handed."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError, UnsupportedError
from ..placement.model import ModelSpec
from ..placement.model_config import ConfigReading, differing_layers, read_config
from ..placement.model_families import BESIDE

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

logger = logging.getLogger(__name__)

Routing = tuple["Tensor", "Tensor | None"]
Extract = Callable[["Module", tuple[Any, ...], Mapping[str, Any], Any], Routing]
"""(module, args, kwargs, output) of a call -> (expert ids [..., k], gate weights of the same shape or None)."""

INDEX_ARGUMENTS = ("top_k_index", "router_indices", "selected_experts")
WEIGHT_ARGUMENTS = ("top_k_weights", "routing_weights")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


@dataclass(frozen=True, eq=False)
class RouterSite:
    """One layer's routing. layer: absolute index in the model. at_call: read before the call, from its arguments.

    spare_ids: ids from `num_experts` on that stand for no expert: those without weights, or none at all.
    """

    name: str
    layer: int
    module: Module
    num_experts: int
    extract: Extract
    at_call: bool
    spare_ids: int = 0

    @property
    def in_decoder(self) -> bool:
        return "decoder" in self.name.split(".")


def find_sites(
    model: Module,
    routers: str | Sequence[str] | None = None,
    extract: Extract | None = None,
    num_experts: int | None = None,
) -> tuple[RouterSite, ...]:
    """The router sites of `model` by increasing layer.

    Without `routers`, the experts modules of Transformers 5 are looked for: any module whose forward takes
    (hidden_states, top_k_index, top_k_weights), or the same under gpt-oss's names. They are given what the model's own
    router chose, so group limits, correction biases and score functions need no knowledge here. Parts beside the
    language model (vision, audio, speech) are left out; of an encoder and a decoder, the decoder is taken.

    Raises:
        InputError: no MoE layer found, a name that no module has, two routers for one layer, an unknown expert count.
        UnsupportedError: layers with different numbers of experts.
    """
    own = _own_routers(model)
    if routers is None:
        if extract is not None:
            raise InputError("extract= reads the modules named by routers=; give routers= as well")
        modules = [(name, module) for name, module in _modules(model) if experts_arguments(module)]
        modules = modules or [(name, module) for name, module in _modules(model) if name in own]
        if not modules:
            raise InputError(_nothing_found(model))
        modules = [entry for entry in modules if not BESIDE.search(entry[0])] or modules
        if {"encoder", "decoder"} <= {part for name, _ in modules for part in name.split(".")}:
            modules = [entry for entry in modules if "decoder" in entry[0].split(".")]
            logger.warning(
                "%s routes in an encoder and in a decoder, whose tokens are not the same: the decoder is recorded; "
                r"routers=r'encoder\..*%s$' records the encoder",
                type(model).__name__,
                modules[0][0].rpartition(".")[2],
            )
    else:
        modules = _named(model, routers)
    reading = _reading(model)
    layers = _layer_indices([name for name, _ in modules])
    sites = []
    for layer, (name, module) in zip(layers, modules, strict=True):
        names = None if extract is not None else experts_arguments(module)
        count = num_experts or _expert_count(name, module)
        read = _from_arguments(*names) if names else extract or own.get(name, routing_of_call)
        skips = 0 if reading is None or extract is not None else int(reading.fields["zero_experts"])
        if (numbered := getattr(module, "zero_expert_num", None)) is None and skips:
            read = _unless_skipped(read, count)
        spare_ids = numbered or skips or int(names is not None and takes_mask(module))
        site = RouterSite(name, layer, module, count, read, names is not None, spare_ids)
        if reading is not None and site.in_decoder:
            site = replace(site, layer=layer + reading.encoder_layers)
        sites.append(site)
    sites.sort(key=lambda site: site.layer)
    fewest, most = (end(sites, key=lambda site: site.num_experts) for end in (min, max))
    if fewest.num_experts != most.num_experts:
        raise UnsupportedError(
            differing_layers(
                type(model).__name__, "num_experts", fewest.layer, fewest.num_experts, most.layer, most.num_experts
            )
        )
    return tuple(sites)


def experts_arguments(module: Module) -> tuple[str, str] | None:
    """The names of a Transformers experts module's id and weight arguments; None for any other module."""
    try:
        names = list(inspect.signature(type(module).forward).parameters)
    except (TypeError, ValueError):
        return None
    if len(names) < 4 or names[2] not in INDEX_ARGUMENTS or names[3] not in WEIGHT_ARGUMENTS:
        return None
    return names[2], names[3]


def takes_mask(module: Module) -> bool:
    """Whether an experts module is handed a 0 or 1 for each expert, of which a token may have none that is 1."""
    return hasattr(module, "expert_0")


def _from_arguments(index_name: str, weight_name: str) -> Extract:
    def read(module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
        ids = args[1] if len(args) > 1 else kwargs[index_name]
        weights = args[2] if len(args) > 2 else kwargs[weight_name]
        if ids.shape[:-1] == weights.shape and ids.ndim > 2:
            # One-hot (Switch); a token past its expert's capacity has no expert.
            return ids.argmax(dim=-1).where(ids.any(dim=-1), ids.shape[-1]), weights
        return ids, weights

    return read


def _unless_skipped(read: Extract, num_experts: int) -> Extract:
    """For routers that may choose no expert, and then hand on one with a weight of zero (Zaya)."""

    def read_weighted(module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
        ids, weights = read(module, args, kwargs, output)
        assert weights is not None
        return ids.where(weights != 0, num_experts), weights

    return read_weighted


def _own_routers(model: Module) -> dict[str, Extract]:
    """How to read routers whose experts are not handed ids, by name.

    Llama-4's experts are given every token for every expert, scaled by scores that are zero for all but the chosen;
    JetMoe's are given tokens sorted by expert.
    """
    routers: dict[str, Extract] = {}
    for name, block in _modules(model):
        router, experts = getattr(block, "router", None), getattr(block, "experts", None)
        if not isinstance(getattr(router, "top_k", None), int):
            continue
        of_block = f"{name}.router" if name else "router"
        forward = getattr(type(experts), "forward", None)
        if hasattr(experts, "gate_up_proj") and forward is not None:
            if list(inspect.signature(forward).parameters) == ["self", "hidden_states"]:
                routers[of_block] = _dense_routing
        elif hasattr(block, "input_linear") and hasattr(block, "output_linear") and "attention" not in name:
            routers[of_block] = _sorted_routing
    return routers


def _dense_routing(module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
    weights, ids = next(_tensors(output)).topk(module.top_k, dim=-1)  # type: ignore[arg-type]
    return ids, weights


def _sorted_routing(module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
    """From (places of token-expert pairs sorted by expert, their tokens, their weights, pairs of each expert, ...)."""
    import torch

    place, _, weight, counts = output[:4]
    expert = torch.repeat_interleave(torch.as_tensor(counts, device=place.device))
    ids, weights = torch.empty_like(place), torch.empty_like(weight)
    ids[place], weights[place] = expert.to(ids.dtype), weight
    k: Any = module.top_k
    return ids.view(-1, k), weights.view(-1, k)


def routing_of_call(module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
    """What a named module's call says of routing, when no `extract` is given.

    The first integer tensor [..., k] that a floating-point tensor of the same shape stands beside, in the output (a
    router) or else in the arguments (an experts module); failing that, the first integer tensor of two dimensions or
    more in the output, without weights: its experts must then be in order of weight.

    Raises:
        InputError: none of these is there, or there is a number for every expert, as in masks.
    """
    returned, passed = list(_tensors(output)), list(_tensors((*args, *kwargs.values())))
    for tensors in (returned, passed):
        for ids in tensors:
            if _is_index(ids):
                for weights in tensors:
                    if weights.is_floating_point() and weights.shape == ids.shape:
                        _check_ids(module, ids)
                        return ids, weights
    for ids in returned:
        if _is_index(ids):
            return ids, None
    raise InputError(
        f"{type(module).__name__}: no expert ids in its output ({_shapes(returned)}) nor in its arguments "
        f"({_shapes(passed)}); expected an integer tensor [tokens, k]. Pass extract=lambda module, args, kwargs, "
        "output: (ids, weights)"
    )


def _check_ids(module: Module, ids: Tensor) -> None:
    if any(getattr(module, name, None) == ids.shape[-1] > 1 for name in EXPERT_COUNTS):
        raise InputError(
            f"{type(module).__name__}: {_shapes([ids])} has a number for every expert, a mask perhaps, where ids "
            "[tokens, k] were expected. Pass extract=lambda module, args, kwargs, output: (ids, weights)"
        )


def _reading(model: Module) -> ConfigReading | None:
    """What the Transformers config of `model`, or of what it wraps, says; None without one that is understood."""
    config = next((part.config for part in model.modules() if hasattr(getattr(part, "config", None), "to_dict")), None)
    try:
        return None if config is None else read_config(config)
    except InputError:
        return None


def has_experts(model: Module) -> bool:
    """Whether the model's config says that it has experts."""
    return _reading(model) is not None


def spec_of(model: Module, sites: Sequence[RouterSite]) -> ModelSpec | None:
    """The spec from the Transformers config of `model` or of what it wraps, with the layers that really route.

    None for a model without such a config, or, with a warning, where the config cannot be read.

    Raises:
        UnsupportedError: the modules hold another number of experts than the config, as under expert parallelism.
    """
    config = next((part.config for part in model.modules() if hasattr(getattr(part, "config", None), "to_dict")), None)
    if config is None:
        return None
    try:
        spec = ModelSpec.from_config(config)
    except InputError as error:
        logger.warning("the recording will not say how large the model is: %s", error)
        return None
    experts = sites[0].num_experts
    if experts == spec.experts + spec.zero_experts and spec.zero_experts:
        raise UnsupportedError(
            f"the last {spec.zero_experts} of {sites[0].name}'s {experts} experts compute nothing and are not placed; "
            f"leave num_experts= out, or give {spec.experts}"
        )
    if experts != spec.experts:
        raise UnsupportedError(
            f"{sites[0].name} has {experts} experts, the model's config {spec.experts}: an expert-parallel model "
            "numbers its experts by rank. Record the routers instead: routers=<regex of their names>, num_experts="
            f"{spec.experts}"
        )
    layers = tuple(site.layer for site in sites)
    return spec if layers == spec.moe_layers else spec.replace(layers=len(layers), moe_layers=layers)


def _modules(model: Module) -> Iterator[tuple[str, Module]]:
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), module


def _named(model: Module, routers: str | Sequence[str]) -> list[tuple[str, Module]]:
    modules = [(name, module) for name, module in _modules(model) if name]
    if isinstance(routers, str):
        try:
            pattern = re.compile(routers)
        except re.error as error:
            raise InputError(f"routers={routers!r} is not a regular expression: {error}") from None
        matches = [(name, module) for name, module in modules if pattern.search(name)]
    else:
        # A wrapper and what it wraps have one name; the later one is the module itself.
        by_name = dict(modules)
        for name in routers:
            if name not in by_name:
                raise InputError(f"routers: the model has no module {name!r}; {_suggestions(modules)}")
        matches = [(name, by_name[name]) for name in routers]
    if not matches:
        raise InputError(f"routers={routers!r} matches no module of {type(model).__name__}; {_suggestions(modules)}")
    return list(dict(matches).items())


def _suggestions(modules: Sequence[tuple[str, Module]]) -> str:
    likely = [name for name, _ in modules if re.search(r"router|gate|expert|moe", name.rpartition(".")[2], re.I)]
    names = likely or [name for name, _ in modules]
    return "modules it has: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _layer_indices(names: Sequence[str]) -> list[int]:
    """Absolute layers from module names: the first number of the names that tells all of them apart."""
    numbers = [[int(part) for part in name.split(".") if part.isdecimal()] for name in names]
    depth = min(len(places) for places in numbers)
    for place in range(depth):
        column = [places[place] for places in numbers]
        if len(set(column)) == len(column):
            return column
    if depth or len(names) > 1:
        if depth:
            clash = next(
                name for i, name in enumerate(names) if any(numbers[i][0] == other[0] for other in numbers[:i])
            )
            raise InputError(
                f"two routers for one layer ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}; {clash!r} "
                "shares its layer number with another); name the routers of one stack: routers=[...]"
            )
        raise InputError(
            f"no layer number in the module names {', '.join(names[:4])}; name modules like 'layers.3.router' in "
            "routers="
        )
    return [0]


def _expert_count(name: str, module: Module) -> int:
    for field in EXPERT_COUNTS:
        value = getattr(module, field, None)
        if isinstance(value, int) and value > 0:
            return value
    raise InputError(f"{name} ({type(module).__name__}) does not say how many experts it has; pass num_experts=")


def _nothing_found(model: Module) -> str:
    return (
        f"{type(model).__name__} has no MoE layer that is known: looked for modules whose forward takes "
        f"(hidden_states, {' | '.join(INDEX_ARGUMENTS)}, {' | '.join(WEIGHT_ARGUMENTS)}), as Mixtral, OLMoE, "
        "Qwen3-MoE, DeepSeek-V3 and gpt-oss have in Transformers 5. For any other model name its router or experts "
        "modules: routers=<regex or list "
        f"of names>, extract=<function> if needed. {_suggestions([pair for pair in _modules(model) if pair[0]])}"
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _is_index(tensor: Tensor) -> bool:
    import torch

    return tensor.ndim >= 2 and tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors) or "no tensors"
