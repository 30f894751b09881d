"""What of a mixture-of-experts model matters for placing its experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from .._arguments import check_methods
from .._display import data_size
from .errors import InputError
from .validation import Record

DTYPE_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "mxfp8": 1.0 + 1 / 32,
    "int4": 0.5 + 2 / 128,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
    "nf4": 0.5 + 4 / 64,
    "fp4": 0.5,
}
"""Bytes a value, with the scales a checkpoint commonly has: a byte for 32 values (mxfp8, mxfp4) or 16 (nvfp4), two for
128 (int4), four for 64 (nf4). The scales of fp8 and int8 stand for whole rows or blocks and count nothing here."""

GROUPED_BYTES = {"int8": 1.0, "int4": 0.5, "fp8": 1.0}
"""Bytes a value, without scales, of types that rows travel in by groups."""


def row_value_bytes(dtype: str) -> float:
    """Bytes a value of a row that travels: a name of `DTYPE_BYTES`, or as `int8/32` one of `GROUPED_BYTES` by groups of
    so many values with a scale of two bytes each.

    Raises:
        ValueError: no such type.
    """
    if dtype in DTYPE_BYTES:
        return DTYPE_BYTES[dtype]
    name, _, group = dtype.partition("/")
    if name in GROUPED_BYTES and re.fullmatch("[0-9]{1,6}", group) and int(group) >= 2:
        return GROUPED_BYTES[name] + 2 / int(group)
    raise ValueError(
        f"must be one of {', '.join(DTYPE_BYTES)}, or {', '.join(GROUPED_BYTES)} by groups of values: int8/32"
    )


DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""PyTorch's names of dtypes in `DTYPE_BYTES`."""


MOST_LAYERS, MOST_EXPERTS = 4096, 65_536
"""Far beyond any model: larger numbers come from mistakes, or from those who want memory used up."""


@check_methods
class ModelSpec(Record):
    """Shape of a model's MoE layers.

    layers: L, MoE layers only. experts: E, routed experts a layer. top_k: k, experts a token and layer.
    hidden_size, ffn_size: widths of the residual stream and of one expert. groups: expert groups of group-limited
    routing (DeepSeek `n_group`), 1 without; top_groups: of how many of them a token's experts are (`topk_group`), 0
    where that is not known. expert_dtype: how expert weights are stored, with scales as common for it.
    moe_layers: the model's absolute layer indices; when not given 0..L-1, and in a `Problem` those of the routing.
    matrices: weight matrices an expert has (3 for SwiGLU, 2 for GELU).

    expert_input_size, expert_output_size: widths of the rows that an expert takes and gives, where the model projects
    them to a latent width; hidden_size when left out. expert_bias: whether an expert's matrices have biases.
    bytes_per_weight: bytes a stored weight takes with its share of scales, where these are not as common for
    expert_dtype. shared_experts: experts a layer that every token visits, zero_experts: experts without weights that
    stand after the E routed ones in the router's numbering; neither are placed.

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
    expert_input_size: NonNegativeInt = 0
    expert_output_size: NonNegativeInt = 0
    expert_bias: bool = False
    bytes_per_weight: Annotated[PositiveFloat, Field(le=8)] | None = None
    shared_experts: NonNegativeInt = 0
    zero_experts: Annotated[int, Field(ge=0, le=MOST_EXPERTS)] = 0
    top_groups: NonNegativeInt = 0

    @field_validator("expert_dtype")
    @classmethod
    def _short_name(cls, dtype: str) -> str:
        return DTYPE_NAMES.get(dtype, dtype)

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
        for width in ("expert_input_size", "expert_output_size"):
            self.__dict__[width] = getattr(self, width) or self.hidden_size
        if self.top_k > self.experts + self.zero_experts:
            raise ValueError(f"top_k ({self.top_k}) must not exceed experts ({self.experts + self.zero_experts})")
        if self.experts % self.groups:
            raise ValueError(f"experts ({self.experts}) must be divisible by groups ({self.groups})")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups ({self.top_groups}) must not exceed groups ({self.groups})")
        if self.limits_groups and self.top_k > self.top_groups * (self.experts // self.groups):
            raise ValueError(
                f"top_k ({self.top_k}) experts do not fit into top_groups ({self.top_groups}) groups of "
                f"{self.experts // self.groups}"
            )
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
    def limits_groups(self) -> bool:
        """Whether a token's experts are known to be of fewer groups than there are."""
        return 0 < self.top_groups < self.groups

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

    def replace(self, **changes: Any) -> ModelSpec:
        """A changed copy, validated again. Another expert_dtype has its own bytes a weight."""
        if "expert_dtype" in changes:
            changes = {"bytes_per_weight": None, **changes}
        return super().replace(**changes)

    @property
    def weights_per_expert(self) -> int:
        """Values in one expert's matrices: all but the last take its input, the last gives its output."""
        return self.ffn_size * ((self.matrices - 1) * self.expert_input_size + self.expert_output_size)

    @property
    def biases_per_expert(self) -> int:
        """Values in the biases of one expert's matrices."""
        return ((self.matrices - 1) * self.ffn_size + self.expert_output_size) * self.expert_bias

    @property
    def bytes_per_expert(self) -> float:
        """Bytes of one expert's weights in one layer; biases are not quantised."""
        each = self.bytes_per_weight or DTYPE_BYTES[self.expert_dtype]
        return self.weights_per_expert * each + self.biases_per_expert * max(2.0, DTYPE_BYTES[self.expert_dtype])

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of one token in one expert (a multiply-add counts two)."""
        return 2.0 * self.weights_per_expert

    @property
    def left_out(self) -> set[str]:
        plain: dict[str, Any] = {"expert_input_size": self.hidden_size, "expert_output_size": self.hidden_size}
        plain |= {"expert_bias": False, "bytes_per_weight": None, "shared_experts": 0, "zero_experts": 0}
        plain |= {"top_groups": 0}
        return {name for name, value in plain.items() if getattr(self, name) == value}

    @classmethod
    def from_config(cls, config: str | Path | Mapping[str, Any] | Any, expert_dtype: str | None = None) -> ModelSpec:
        """Reads a Transformers `config.json` (a path, its folder, a dict, or a PretrainedConfig).

        Knows the MoE model types of Transformers 5 and others that are released with their own code
        (`placement/model_families.py` has the table); an unknown type is read by its fields' names. What was assumed,
        and fields that speak of experts, layers or quantisation and were not read, `read_config` says.

        Args:
            config: what to read. expert_dtype: how experts are stored, in place of what the config says of it.

        Raises:
            InputError: the file is missing, no MoE fields are there, or one is not understood; the field is named.
        """
        # The table of model families, which plans do not need.
        from .model_config import read_config

        return cls(**read_config(config, expert_dtype).fields)
