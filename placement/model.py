"""What of a mixture-of-experts model matters for placing its experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, model_validator

from .._display import data_size
from .errors import InputError
from .files import read_text
from .validation import Record

DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "mxfp4": 0.53125, "fp4": 0.5}
"""Bytes a value, block scales included (mxfp4: one 8-bit scale per 32 values)."""


MOST_LAYERS, MOST_EXPERTS = 4096, 65_536
"""Far beyond any model: larger numbers come from mistakes, or from those who want memory used up."""


class ModelSpec(Record):
    """Shape of a model's MoE layers.

    layers: L, MoE layers only. experts: E, routed experts a layer. top_k: k, experts a token and layer.
    hidden_size, ffn_size: widths of the residual stream and of one expert. groups: expert groups of group-limited
    routing (DeepSeek `n_group`), 1 without. expert_dtype: how expert weights are stored. moe_layers: the model's
    absolute layer indices; when not given 0..L-1, and in a `Problem` those of the routing. matrices: weight matrices an
    expert has (3 for SwiGLU, 2 for GELU).

    Example:
        >>> import moeplace as mp
        >>> mp.ModelSpec(layers=16, experts=64, top_k=8, hidden_size=2048, ffn_size=1024).bytes_per_expert
        12582912.0
        >>> mp.ModelSpec.from_config("path/to/model/config.json")  # doctest: +SKIP
    """

    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    experts: Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
    top_k: PositiveInt
    hidden_size: PositiveInt
    ffn_size: PositiveInt
    groups: PositiveInt = 1
    expert_dtype: str = "bf16"
    matrices: PositiveInt = 3
    moe_layers: tuple[int, ...] = ()
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _no_layers_named(cls, data: Any) -> Any:
        if isinstance(data, dict) and "moe_layers" in data and data["moe_layers"] in (None, (), []):
            return {name: value for name, value in data.items() if name != "moe_layers"}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.moe_layers:
            # Set past pydantic, which would take it for given by the caller.
            self.__dict__["moe_layers"] = tuple(range(self.layers))
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) must not exceed experts ({self.experts})")
        if self.experts % self.groups:
            raise ValueError(f"experts ({self.experts}) must be divisible by groups ({self.groups})")
        if self.expert_dtype not in DTYPE_BYTES:
            raise ValueError(f"expert_dtype ({self.expert_dtype!r}) must be one of {', '.join(DTYPE_BYTES)}")
        if len(self.moe_layers) != self.layers:
            raise ValueError(f"moe_layers names {len(self.moe_layers)} layers, layers is {self.layers}")
        if any(b <= a for a, b in zip(self.moe_layers, self.moe_layers[1:], strict=False)) or self.moe_layers[0] < 0:
            raise ValueError(f"moe_layers {self.moe_layers} must be non-negative and increasing")
        return self

    @property
    def title(self) -> str:
        """`olmoe, 16 layers, 64 experts, top-8, 0.0126 GB an expert`."""
        shape = f"{self.layers} layers, {self.experts} experts, top-{self.top_k}"
        return f"{self.name + ', ' if self.name else ''}{shape}, {data_size(self.bytes_per_expert)} an expert"

    @property
    def names_layers(self) -> bool:
        """Whether moe_layers was given. Where not, they are a guess that gives way to the layers of recorded
        routing."""
        return "moe_layers" in self.model_fields_set

    def of_routing(self, experts: int, moe_layers: tuple[int, ...], top_k: int | None = None) -> ModelSpec:
        """This model with the layers that routing names, where it was not itself told which layers hold experts.

        Args:
            experts: E of the routing. moe_layers: its layers. top_k: experts a token, where the routing says.

        Raises:
            InputError: the routing is of another model; the field that differs is named.
        """
        model = self
        if not self.names_layers and len(moe_layers) == self.layers and moe_layers != self.moe_layers:
            model = self.replace(moe_layers=moe_layers)
        fields = {
            "experts": (experts, model.experts),
            "layers": (len(moe_layers), model.layers),
            "moe_layers": (moe_layers, model.moe_layers),
            "top_k": (top_k or model.top_k, model.top_k),
        }
        for name, (recorded, expected) in fields.items():
            if recorded != expected:
                hint = "; leave them out of ModelSpec, or give it the same moe_layers" if name == "moe_layers" else ""
                raise InputError(
                    f"the routing was recorded on another model: {name} is {recorded}, "
                    f"ModelSpec.{name} is {expected}{hint}"
                )
        return model

    @property
    def bytes_per_expert(self) -> float:
        """Bytes of one expert's weights in one layer."""
        return self.matrices * self.hidden_size * self.ffn_size * DTYPE_BYTES[self.expert_dtype]

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of one token in one expert (a multiply-add counts two)."""
        return 2.0 * self.matrices * self.hidden_size * self.ffn_size

    @classmethod
    def from_config(cls, config: str | Path | Mapping[str, Any] | Any) -> ModelSpec:
        """Reads a Transformers `config.json` (a path, its folder, a dict, or a PretrainedConfig).

        Knows Mixtral, OLMoE, Qwen2/3-MoE, DeepSeek-V2/V3, gpt-oss and configs that use the same field names.

        Raises:
            InputError: the file is missing or no MoE fields are found; the message names the fields looked for.
        """
        fields, origin = _config_fields(config)
        return cls(**_spec_fields(fields, origin))


def hidden_layers(config: str | Path | Mapping[str, Any] | Any) -> int:
    """`num_hidden_layers` of a Transformers config (see `ModelSpec.from_config`): MoE and dense layers together.

    Raises:
        InputError: no such file, or no such field.
    """
    fields, origin = _config_fields(config)
    inner = fields["text_config"] if isinstance(fields.get("text_config"), Mapping) else fields
    count = inner.get("num_hidden_layers")
    if type(count) is not int or count < 1:
        raise InputError(f"{origin}: num_hidden_layers is {str(count)[:40]}, expected a whole number of at least 1")
    return count


def _config_fields(config: Any) -> tuple[Mapping[str, Any], str]:
    if isinstance(config, Mapping):
        return config, "config"
    if hasattr(config, "to_dict"):
        return config.to_dict(), type(config).__name__
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(read_text(path, limit_bytes=1 << 24))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields, str(path)


_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k")
_FFN = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")


def _spec_fields(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    if isinstance(fields.get("text_config"), Mapping):
        fields = fields["text_config"]

    def first(names: tuple[str, ...]) -> int:
        for name in names:
            if isinstance(fields.get(name), int):
                return int(fields[name])
        raise InputError(
            f"{origin}: none of the fields {', '.join(names)} is there; is this a mixture-of-experts model?"
        )

    quantisation = fields.get("quantization_config")
    method = str(quantisation.get("quant_method", "")) if isinstance(quantisation, Mapping) else ""
    moe_layers = _moe_layers(fields, first(("num_hidden_layers",)), origin)
    return {
        "layers": len(moe_layers),
        "moe_layers": moe_layers,
        "experts": first(_EXPERTS),
        "top_k": first(_TOP_K),
        "hidden_size": first(("hidden_size",)),
        "ffn_size": first(_FFN),
        "groups": _whole(fields, "n_group", origin) or _whole(fields, "num_expert_groups", origin) or 1,
        "expert_dtype": method if method in DTYPE_BYTES else "bf16",
        "name": str(fields.get("_name_or_path") or fields.get("model_type") or ""),
    }


def _moe_layers(fields: Mapping[str, Any], hidden_layers: int, origin: str) -> tuple[int, ...]:
    """Absolute indices of the layers that hold experts: DeepSeek's dense head, Qwen's sparse step and dense list, a 0
    or 1 for each layer (MiMo-V2, MiniMax-M3), or a word for each."""
    listed = fields.get("mlp_only_layers") or ()
    if not isinstance(listed, list | tuple) or not all(type(layer) is int for layer in listed):
        raise _not_understood(fields, "mlp_only_layers", origin, "a list of layer numbers")
    dense = set(range(_whole(fields, "first_k_dense_replace", origin) or 0)) | set(listed)
    kinds = fields.get("mlp_layer_types")
    if isinstance(kinds, list) and len(kinds) == hidden_layers:
        layers = [i for i, kind in enumerate(kinds) if kind == "sparse"]
    elif isinstance(flags := fields.get("moe_layer_freq"), list | tuple):
        if len(flags) != hidden_layers or not all(type(flag) in (int, bool) and flag in (0, 1) for flag in flags):
            wanted = f"a step, or a list of {hidden_layers} numbers, 1 for a layer with experts and 0 for one without"
            raise _not_understood(fields, "moe_layer_freq", origin, wanted)
        layers = [i for i, flag in enumerate(flags) if flag and i not in dense]
    else:
        sparse = _whole(fields, "decoder_sparse_step", origin)
        step = sparse or _whole(fields, "moe_layer_freq", origin) or 1
        offset = 1 if sparse else 0
        layers = [i for i in range(hidden_layers) if i not in dense and (i + offset) % step == 0]
    if not layers:
        raise InputError(
            f"{origin}: none of its {hidden_layers} layers holds experts; is this a mixture-of-experts model?"
        )
    return tuple(layers)


def _whole(fields: Mapping[str, Any], name: str, origin: str) -> int | None:
    """A field that is a whole number, or not there."""
    value = fields.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise _not_understood(fields, name, origin, "a whole number")
    return value


def _not_understood(fields: Mapping[str, Any], name: str, origin: str, wanted: str) -> InputError:
    text = str(fields[name])
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    return InputError(f"{origin}: {name} is {shown}, expected {wanted}")
