"""How a checkpoint stores its experts: bits and scales a weight, from what a config says of quantisation.

Formats are those of the packages that write them: compressed-tensors, NVIDIA ModelOpt, AMD Quark, AutoRound, AutoAWQ,
GPTQ, bitsandbytes, HQQ, Quanto, torchao, MLX, ExLlamaV3, msModelSlim for Ascend, SGLang's w4afp8 and int8, and the fp8
and mxfp4 of DeepSeek, Meta, Mistral and OpenAI. Scalars a tensor and GPTQ's order of inputs are not counted.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import InputError
from .model_families import BESIDE

NAMES_OF_DTYPES = {
    "float32": "fp32",
    "fp32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
    "half": "fp16",
}
PLAIN_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}


class Storage(NamedTuple):
    """dtype: a name of `DTYPE_BYTES`. bytes_per_weight: None where it is as common for that dtype. notes: what was
    assumed."""

    dtype: str
    bytes_per_weight: float | None = None
    notes: tuple[str, ...] = ()


class Scheme(NamedTuple):
    """How one matrix is stored. scale: bytes of a scale, with its zero point. span: weights that share one, a whole row
    of the matrix where None, the whole matrix where infinite."""

    dtype: str
    bits: float
    scale: float = 0.0
    span: float | None = math.inf

    def bytes_per_weight(self, columns: int) -> float:
        """Bytes a weight, in a matrix with so many columns."""
        return self.bits / 8 + self.scale / (columns if self.span is None else self.span)


USUAL = {
    "fp8": Scheme("fp8", 8),
    "int8": Scheme("int8", 8),
    "mxfp8": Scheme("mxfp8", 8, 1, 32),
    "int4": Scheme("int4", 4, 2, 128),
    "mxfp4": Scheme("mxfp4", 4, 1, 32),
    "nvfp4": Scheme("nvfp4", 4, 1, 16),
    "nf4": Scheme("nf4", 4, 4, 64),
    "fp4": Scheme("fp4", 4),
}
"""As `DTYPE_BYTES` has them."""

Matcher = Callable[[str], bool]
SchemeOf = Callable[[Sequence[str]], Scheme | None]
"""The scheme of a matrix that goes by any of these names; None where it is not quantised."""


def expert_storage(
    fields: Mapping[str, Any], layers: Sequence[int], ffn: int, width: int, matrices: int, origin: str
) -> Storage:
    """How experts are stored.

    Args:
        fields: `dtype`, `torch_dtype`, `expert_dtype`, `quantization_config`, `compression_config`, `quantization` of a
            config, each as there or None.
        layers: the model's MoE layers. ffn, width: columns of an expert's last matrix, and of the others.
        matrices: how many it has.
        origin: of the config, for errors.

    Raises:
        InputError: a quantisation that is not understood; the message says what to give instead.
    """
    config = fields.get("quantization_config") or fields.get("compression_config") or fields.get("quantization")
    notes: list[str] = []
    plain = _plain(fields, notes, origin)
    stored = fields.get("expert_dtype")
    if not config and stored is None:
        return Storage(plain.dtype, None, tuple(notes))
    if config is not None and not isinstance(config, Mapping):
        raise _not_understood(origin, f"quantization_config is {str(config)[:60]}")
    config = _Fields(config or {})
    stored = config.get("expert_dtype") if stored is None else stored
    for name in ("dequantize", "sparsity_config"):
        if config.get(name) and _mapping(config[name]).get("format") != "dense":
            raise _not_understood(origin, f"quantization_config has {name} {str(config[name])[:60]}")
    if stored is not None and str(stored) not in ("fp8", "None"):
        scheme = {**USUAL, "fp4": USUAL["mxfp4"]}.get(str(stored)) or _plain_scheme(str(stored))
        if scheme is None:
            raise _not_understood(origin, f"expert_dtype is {str(stored)[:60]!r}")
        scheme_of: SchemeOf = lambda names: scheme  # noqa: E731
    elif not config:
        scheme_of = lambda names: USUAL["fp8"]  # noqa: E731
    else:
        scheme_of = _scheme_reader(config, origin)

    unread = [
        name
        for name, value in config.items()
        if value and "." not in name and SPEAKS_OF_PARTS.search(name) and name not in config.read
    ]
    if unread:
        notes.append(f"not read: {', '.join(f'quantization_config.{name}' for name in unread)[:400]}")
    prefixes = _prefixes(config)
    by_layer = [
        (layer, role, scheme_of(_matrix_names(layer, role, prefixes)) or plain)
        for layer in layers
        for role in ("in", "out")
    ]
    weight = {"in": matrices - 1, "out": 1}
    columns = {"in": width, "out": ffn}
    total = sum(weight[role] * scheme.bytes_per_weight(columns[role]) for _, role, scheme in by_layer)
    mean = total / (matrices * len(layers))
    # How many weights are stored in each way; the first named has a tie.
    shares: dict[Scheme, int] = defaultdict(int)
    for _, role, scheme in by_layer:
        shares[scheme] += weight[role]
    schemes = [scheme for scheme, share in shares.items() if share]
    usual = max(schemes, key=shares.__getitem__)
    if len(schemes) > 1:
        dtypes = sorted({scheme.dtype for scheme in schemes})
        notes.append(
            f"experts are stored as {' and '.join(dtypes)} in different layers or matrices: the mean was taken"
        )
    elif usual == plain:
        notes.append("the experts themselves are not quantised")
    single = [name for key in EXCLUSIONS for name in _list(config.get(key)) if SINGLE_EXPERT.search(str(name))]
    if single:
        shown = str(single[0])[:80]
        notes.append(
            f"{len(single)} excluded names, as {shown}, are of single experts; all were taken to be as the first"
        )
    common = USUAL.get(usual.dtype, plain).bytes_per_weight(0 or width)
    return Storage(usual.dtype, None if math.isclose(mean, common, rel_tol=1e-12) else mean, tuple(notes))


class _Fields(dict[str, Any]):
    """A quantisation config that knows which of its fields were asked for."""

    def __init__(self, fields: Mapping[Any, Any]) -> None:
        super().__init__({str(name): value for name, value in fields.items()})
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)


SPEAKS_OF_PARTS = re.compile(r"modul|layer|expert|moe|ignor|exclu|skip|sparsity", re.IGNORECASE)
"""Fields that may say which parts of a model are quantised, or how experts are; with a dot they name such a part."""


def _plain(fields: Mapping[str, Any], notes: list[str], origin: str) -> Scheme:
    """How weights that are not quantised are stored."""
    dtype = fields.get("dtype") or fields.get("torch_dtype")
    if dtype is None or str(dtype) == "auto":
        notes.append("the config does not say its dtype; bf16 was taken")
        return Scheme("bf16", 16)
    scheme = _plain_scheme(str(dtype).removeprefix("torch."))
    if scheme is None and str(dtype).removeprefix("torch.").startswith(("float8", "fp8")):
        return USUAL["fp8"]
    if scheme is None:
        raise _not_understood(origin, f"dtype is {str(dtype)[:60]!r}")
    return scheme


def _plain_scheme(name: str) -> Scheme | None:
    dtype = NAMES_OF_DTYPES.get(name)
    return None if dtype is None else Scheme(dtype, 8 * PLAIN_BYTES[dtype])


def _not_understood(origin: str, what: str) -> InputError:
    return InputError(
        f"{origin}: {what}, a storage of weights that this release does not understand; say how experts are stored "
        "with --expert-dtype (expert_dtype= in Python): nvfp4, int4, int8, mxfp4, mxfp8, fp8, bf16, fp16, fp32"
    )


EXCLUSIONS = ("ignore", "exclude", "exclude_modules", "modules_to_not_convert", "ignored_layers", "skip_modules")
SINGLE_EXPERT = re.compile(r"experts\.[1-9]")


# What each package writes. Each reader takes the quantisation config, and gives the scheme of a matrix by its names.


def _scheme_reader(config: Mapping[str, Any], origin: str) -> SchemeOf:
    method = str(config.get("quant_method") or "").lower().replace("_", "-")
    if not method:
        method = _method_without_name(config)
    for names, reader in READERS.items():
        if method in names:
            return reader(config, origin)
    shown = method or ", ".join(map(str, list(config)[:6]))
    raise _not_understood(origin, f"quantization_config has quant_method {shown[:80]!r}")


def _method_without_name(config: Mapping[str, Any]) -> str:
    """Of configs from before quant_method, or of packages that do without."""
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    if "quant_algo" in config or "quant_algo" in _mapping(config.get("quantization")):
        return "modelopt"
    if "config_groups" in config:
        return "compressed-tensors"
    if "model_quant_type" in config:
        return "ascend"
    if "bits" in config and "group_size" in config and "zero_point" in config:
        return "awq"
    if "bits" in config and "group_size" in config and "desc_act" not in config:
        return "mlx"
    if "bits" in config and "desc_act" in config:
        return "gptq"
    if config.get("qformat_weight") == "fp8_e4m3":
        return "fp8"
    return ""


FORMATS = {"mxfp4-pack-quantized": "mxfp4", "nvfp4-pack-quantized": "nvfp4", "mxfp8-quantized": "mxfp8"}
"""Of compressed-tensors, that say all by themselves."""
UNPACKED = re.compile(r"dense|sparse|bitmask|24$")
"""Formats whose weights take other room than their bits: left as they were, or without those that are 0."""


def _compressed_tensors(config: Mapping[str, Any], origin: str) -> SchemeOf:
    excluded = _matches(config.get("ignore"), origin)
    groups: list[tuple[Sequence[str], Matcher, Scheme]] = []
    listed = config.get("config_groups")
    if not listed and str(config.get("format")) in FORMATS:
        alone = USUAL[FORMATS[str(config["format"])]]
        return lambda names: None if _any(excluded, names) else alone
    if listed == {} and isinstance(config.get("kv_cache_scheme"), Mapping):
        return lambda names: None
    if not isinstance(listed, Mapping) or not listed:
        raise _not_understood(origin, "quantization_config has no config_groups")
    for name, group in listed.items():
        what = f"quantization_config.config_groups.{str(name)[:40]}"
        group = _mapping(group)
        weights = group.get("weights")
        if weights is None:
            continue
        form = str(group.get("format") or config.get("format") or "")
        if UNPACKED.search(form):
            raise _not_understood(origin, f"compressed-tensors' format is {form[:40]!r}")
        scheme = _weights_scheme(_mapping(weights), form)
        if scheme is None:
            raise _not_understood(origin, f"{what}.weights is {str(weights)[:80]}")
        targets = group.get("targets") or ["Linear"]
        if not isinstance(targets, list | tuple):
            raise _not_understood(origin, f"{what}.targets is {str(targets)[:80]}")
        groups.append((targets, _matches(targets, origin), scheme))

    def scheme_of(names: Sequence[str]) -> Scheme | None:
        if _any(excluded, names):
            return None
        by_name = next((scheme for _, matches, scheme in groups if _any(matches, names)), None)
        by_class = next((s for targets, _, s in groups if any(_is_class(target) for target in targets)), None)
        return by_name or by_class

    return scheme_of


def _is_class(target: Any) -> bool:
    """Whether a target is a class of modules that experts are of."""
    return isinstance(target, str) and (target in ("Linear", "FusedMoE") or target.endswith("Experts"))


def _weights_scheme(weights: Mapping[str, Any], kind: str = "") -> Scheme | None:
    """Of compressed-tensors' `weights` arguments."""
    bits, number = weights.get("num_bits"), weights.get("type", "int")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    block = weights.get("block_structure")
    if isinstance(block, str) and (sides := re.fullmatch(r"(\d{1,5})x(\d{1,5})", block)):
        block = [int(sides[1]), int(sides[2])]
    if number == "float" and bits == 4:
        if strategy == "tensor_group" or size == 16 or "nvfp4" in kind:
            return USUAL["nvfp4"]
        return USUAL["mxfp4"] if size in (32, None) or "mxfp4" in kind else None
    if number == "float" and bits == 8 and (size == 32 or "mxfp8" in kind):
        return USUAL["mxfp8"]
    dtype = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}.get((str(number), _whole(bits)))
    if dtype is None:
        return None
    zero = 0 if weights.get("symmetric", True) else _whole(bits) / 8
    if strategy == "block":
        span = _sides(block)
        return Scheme(dtype, _whole(bits), 4 if dtype == "fp8" else 2, span) if span else None
    if strategy in ("tensor", None) and not size:
        return Scheme(dtype, _whole(bits))
    if strategy == "channel" or size == -1:
        return Scheme(dtype, _whole(bits), 2 + zero, None)
    grouped = strategy in ("group", None) and _whole(size)
    return Scheme(dtype, _whole(bits), 2 + zero, _whole(size)) if grouped else None


def _modelopt(config: Mapping[str, Any], origin: str) -> SchemeOf:
    inner = _mapping(config.get("quantization")) or config
    algorithm = str(inner.get("quant_algo") or "").upper()
    excluded = _matches(inner.get("exclude_modules") or inner.get("ignore") or config.get("ignore"), origin)
    layers = _mapping(inner.get("quantized_layers"))
    if algorithm in ("", "MIXED_PRECISION"):
        if not layers:
            if isinstance(config.get("config_groups"), Mapping):
                return _compressed_tensors(config, origin)
            if not algorithm and inner.get("kv_cache_quant_algo"):
                return lambda names: None
            raise _not_understood(origin, f"ModelOpt's quant_algo is {algorithm or 'not there'}")
        schemes = {str(name): _modelopt_scheme(_mapping(entry), origin) for name, entry in layers.items()}
        wild = [(_matches([name], origin), scheme) for name, scheme in schemes.items() if "*" in name][:MOST_PATTERNS]

        def of_layer(names: Sequence[str]) -> Scheme | None:
            for name in names:
                for end in (name, name.rpartition(".experts.")[0] + ".experts", name.rpartition(".experts.")[0]):
                    if end in schemes:
                        return schemes[end]
            return next((scheme for matches, scheme in wild if _any(matches, names)), None)

        return of_layer
    scheme = _modelopt_scheme(inner, origin)
    return lambda names: None if _any(excluded, names) else scheme


def _modelopt_scheme(entry: Mapping[str, Any], origin: str) -> Scheme:
    algorithm, size = str(entry.get("quant_algo") or "").upper(), _group(entry.get("group_size"), 0, origin)
    if algorithm in ("FP8", "W8A8_FP8"):
        return USUAL["fp8"]
    if algorithm.startswith("FP8_PER_CHANNEL"):
        return Scheme("fp8", 8, 4, None)
    if algorithm.startswith("FP8_PB") or algorithm == "FP8_BLOCK_SCALES":
        return Scheme("fp8", 8, 4, 128 * 128)
    if "NVFP4" in algorithm:
        return Scheme("nvfp4", 4, 1, size or 16)
    if "MXFP4" in algorithm:
        return USUAL["mxfp4"]
    if "MXFP8" in algorithm:
        return USUAL["mxfp8"]
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ", "INT4_AWQ", "W4A16", "W4A8"):
        return Scheme("int4", 4, 2, size or 128)
    if algorithm in ("W8A16", "W8A8_SQ_PER_CHANNEL", "INT8_SQ", "W8A8_SQ_PER_TENSOR", "INT8"):
        return Scheme("int8", 8, 2, None)
    raise _not_understood(origin, f"ModelOpt's quant_algo is {algorithm[:60]!r}")


def _integers(config: Mapping[str, Any], origin: str) -> SchemeOf:
    """AWQ, GPTQ, AutoRound and MLX: bits, a group's size, a scale and a zero point a group."""
    method = str(config.get("quant_method") or "").lower()
    excluded = _matches(config.get("modules_to_not_convert"), origin)
    chosen = config.get("modules_in_block_to_quantize")
    included = _matches([name for entry in _list(chosen) for name in _list(entry)], origin) if chosen else None
    blocks = [str(name) for key in BLOCKS for name in _list(config.get(key))]
    if blocks and not any(map(_of_language, blocks)):
        return lambda names: None
    usual = _integer_scheme(config, method, origin)
    own: list[tuple[Matcher, Scheme | None]] = []
    overrides = {**_mapping(config.get("dynamic")), **_mapping(config.get("extra_config"))}
    mlx = "mlx" in method or not method
    if mlx:
        overrides |= {name: entry for name, entry in config.items() if isinstance(entry, Mapping | bool)}
    for name, entry in list(overrides.items())[:MOST_PATTERNS]:
        pattern = str(name)
        signed = pattern.startswith(("-:", "+:"))
        regex = signed or bool(re.search(r"[\\^$(|]|\.\*", pattern))
        matches = _matches([f"re:{pattern[2 * signed :]}" if regex else pattern], origin)
        plain = entry is False or (isinstance(entry, Mapping) and _whole(entry.get("bits")) >= 16)
        if plain or pattern.startswith("-:"):
            own.append((matches, None))
        elif isinstance(entry, Mapping) and "bits" in entry:
            own.append((matches, _integer_scheme({**config, **entry}, method, origin)))

    def scheme_of(names: Sequence[str]) -> Scheme | None:
        if _any(excluded, names) or not (included is None or _any(included, names)):
            return None
        called = [*names, *map(_mlx_name, names)] if mlx else names
        return next((scheme for matches, scheme in own if _any(matches, called)), usual)

    return scheme_of


BLOCKS = ("block_name_to_quantize", "to_quant_block_names")
"""AutoRound's: the stacks of layers that were quantised."""


def _mlx_name(name: str) -> str:
    """What MLX calls the matrix, which has all experts."""
    block, _, leaf = name.partition(".experts.")
    return f"{block}.switch_mlp.{'down_proj' if leaf.endswith(('down_proj', 'w2')) else 'up_proj'}"


def _integer_scheme(config: Mapping[str, Any], method: str, origin: str) -> Scheme:
    said = config.get("bits", config.get("w_bit", config.get("nbits")))
    bits = _whole(said)
    size = config.get("group_size", config.get("q_group_size", -1))
    kind = str(config.get("data_type") or config.get("mode") or "int")
    if kind.startswith(("nv_fp", "nvfp4")):
        return USUAL["nvfp4"]
    if kind.startswith(("mx_fp", "mxfp")):
        return USUAL["mxfp8" if bits == 8 else "mxfp4"]
    if kind.startswith("fp") and bits == 8:
        return USUAL["fp8"]
    dtype = {4: "int4", 8: "int8"}.get(bits)
    if dtype is None or kind not in ("int", "affine", "uint"):
        raise _not_understood(origin, f"quantization_config has {str(said)[:20]} bits of {kind[:40]!r}")
    # GPTQ writes zero points even where they are all alike; AWQ says whether there are any; MLX has a bias in fp16.
    zero = 2.0 if kind == "affine" or not method else bits / 8
    if config.get("zero_point") is False:
        zero = 0.0
    return Scheme(dtype, bits, 2 + zero, None if size in (-1, 0, None) else _group(size, 0, origin))


def _fp8(config: Mapping[str, Any], origin: str) -> SchemeOf:
    fields = ("modules_to_not_convert", "ignored_layers", "ignore", "modules_to_not_quantize")
    excluded = _matches([entry for name in fields for entry in _list(config.get(name))], origin)
    block = config.get("weight_block_size") or config.get("weight_block_structure")
    method = str(config.get("quant_method") or "").lower()
    if "mxfp8" in method:
        scheme = USUAL["mxfp8"]
    elif block:
        scheme = Scheme("fp8", 8, 4, _block(block, origin))
    elif "fbgemm" in method or "ptpc" in method or "w8a8" in method:
        scheme = Scheme("fp8", 8, 4, None)
    else:
        scheme = USUAL["fp8"]
    return lambda names: None if _any(excluded, names) else scheme


def _fp4(config: Mapping[str, Any], origin: str) -> SchemeOf:
    excluded = _matches([*_list(config.get("modules_to_not_convert")), *_list(config.get("ignore"))], origin)
    nvidia = "nvfp4" in (str(config.get("quant_method")).lower(), str(config.get("forward_dtype")).lower())
    scheme = USUAL["nvfp4" if nvidia else "mxfp4"]
    return lambda names: None if _any(excluded, names) else scheme


def _bitsandbytes(config: Mapping[str, Any], origin: str) -> SchemeOf:
    excluded = _matches(config.get("llm_int8_skip_modules"), origin)
    method = str(config.get("quant_method") or "").lower()
    if config.get("load_in_8bit") or config.get("_load_in_8bit") or method.endswith("8bit"):
        scheme = Scheme("int8", 8, 4, None)
    elif not (config.get("load_in_4bit") or config.get("_load_in_4bit") or method.endswith("4bit")):
        raise _not_understood(origin, "bitsandbytes has neither load_in_4bit nor load_in_8bit")
    elif config.get("bnb_4bit_use_double_quant"):
        scheme = Scheme("nf4", 4, 1 + 4 / 256, 64)
    else:
        scheme = USUAL["nf4"]
    return lambda names: None if _any(excluded, names) else scheme


def _int8(config: Mapping[str, Any], origin: str) -> SchemeOf:
    excluded = _matches([*_list(config.get("modules_to_not_convert")), *_list(config.get("ignore"))], origin)
    block = config.get("weight_block_size")
    scheme = Scheme("int8", 8, 4, _block(block, origin)) if block else Scheme("int8", 8, 2, None)
    return lambda names: None if _any(excluded, names) else scheme


def _w4afp8(config: Mapping[str, Any], origin: str) -> SchemeOf:
    """SGLang's: experts of 4 bits with a bf16 scale a group, whatever their activations and the dense layers are."""
    kind = str(config.get("moe_weight_format") or "int4").lower()
    if kind not in ("int4", "mxfp4"):
        raise _not_understood(origin, f"w4afp8 has moe_weight_format {kind[:40]!r}")
    excluded = _matches([entry for name in EXCLUSIONS for entry in _list(config.get(name))], origin)
    scheme = USUAL["mxfp4"] if kind == "mxfp4" else Scheme("int4", 4, 2, _group(config.get("group_size"), 128, origin))
    return lambda names: None if _any(excluded, names) else scheme


def _exl3(config: Mapping[str, Any], origin: str) -> SchemeOf:
    """ExLlamaV3, where its mean of bits is whole: all have as many then. Rows and columns have 2 bytes for signs."""
    bits = config.get("bits")
    dtype = {"4": "int4", "4.0": "int4", "8": "int8", "8.0": "int8"}.get(str(bits))
    if dtype is None or "layer_bits" in config:
        raise _not_understood(origin, f"exl3 has {str(bits)[:20]} bits on the average (4 or 8 for all are read)")
    return lambda names: Scheme(dtype, USUAL[dtype].bits, 4, None)


def _hqq(config: Mapping[str, Any], origin: str) -> SchemeOf:
    excluded = _matches(config.get("skip_modules"), origin)
    inner = _mapping(config.get("quant_config"))
    weights = _mapping(inner.get("weight_quant_params"))
    parts = {str(name): _mapping(_mapping(entry).get("weight_quant_params", entry)) for name, entry in inner.items()}
    by_part = {name: entry for name, entry in parts.items() if "nbits" in entry}
    if not weights and not by_part:
        raise _not_understood(origin, "HQQ's quant_config has no weight_quant_params")

    def scheme(entry: Mapping[str, Any]) -> Scheme:
        bits, dtype = _whole(entry.get("nbits")), {4: "int4", 8: "int8"}.get(_whole(entry.get("nbits")))
        if dtype is None:
            raise _not_understood(origin, f"HQQ has {bits} bits")
        size = entry.get("group_size")
        return Scheme(dtype, bits, 4, None if size is None else _group(size, 0, origin))

    if weights:
        usual = scheme(weights)
        return lambda names: None if _any(excluded, names) else usual
    own = [(_matches([name], origin), scheme(entry)) for name, entry in by_part.items()]
    return lambda names: next((s for matches, s in own if _any(matches, [*names, *map(_hqq_tag, names)])), None)


def _hqq_tag(name: str) -> str:
    """What HQQ calls a matrix in all layers and experts."""
    return ".".join(part for part in name.split(".") if not part.isdigit() and part not in ("model", "layers"))


def _quark(config: Mapping[str, Any], origin: str) -> SchemeOf:
    excluded = _matches(config.get("exclude"), origin)
    usual = _quark_scheme(_mapping(config.get("global_quant_config")), origin)
    own = [
        (_matches([name], origin), _quark_scheme(_mapping(entry), origin))
        for name, entry in list(_mapping(config.get("layer_quant_config")).items())[:MOST_PATTERNS]
    ]

    def scheme_of(names: Sequence[str]) -> Scheme | None:
        if _any(excluded, names):
            return None
        return next((scheme for matches, scheme in own if _any(matches, names)), usual)

    return scheme_of


def _quark_scheme(config: Mapping[str, Any], origin: str) -> Scheme | None:
    weight = config.get("weight")
    if weight is None:
        return None
    # Two steps of quantisation: the last is what is stored.
    entry = _mapping(weight[-1] if isinstance(weight, list | tuple) and weight else weight)
    dtype, span, size = str(entry.get("dtype")), str(entry.get("qscheme")), _whole(entry.get("group_size"))
    small = str(entry.get("scale_format")) == "e8m0" or "e8m0" in str(entry.get("scale_type"))
    if dtype in ("mx", "mxfp4", "fp4") and (small or size in (0, 32)):
        return USUAL["mxfp4"]
    if dtype == "fp4" and size == 16:
        return USUAL["nvfp4"]
    if dtype.startswith(("mxfp8", "fp8_e4m3", "fp8")) and (dtype.startswith("mxfp8") or (small and size == 32)):
        return USUAL["mxfp8"]
    name, bits = next(((n, b) for p, n, b in QUARK_DTYPES if dtype.startswith(p)), ("", 0))
    if not name:
        raise _not_understood(origin, f"Quark's weight has dtype {dtype[:40]!r}")
    if span == "per_group" and size > 0:
        return Scheme(name, bits, 2 if bits == 4 else 4, size)
    return Scheme(name, bits, 4, None) if span == "per_channel" else Scheme(name, bits)


QUARK_DTYPES = (("fp8", "fp8", 8), ("int8", "int8", 8), ("uint8", "int8", 8), ("int4", "int4", 4), ("uint4", "int4", 4))


def _quanto(config: Mapping[str, Any], origin: str) -> SchemeOf:
    excluded = _matches(config.get("modules_to_not_convert"), origin)
    weights = str(config.get("weights"))
    schemes = {
        "int8": Scheme("int8", 8, 2, None),
        "int4": Scheme("int4", 4, 4, 128),
        "float8": Scheme("fp8", 8, 2, None),
    }
    if weights not in schemes:
        raise _not_understood(origin, f"Quanto's weights are {weights[:40]!r}")
    return lambda names: None if _any(excluded, names) else schemes[weights]


def _torchao(config: Mapping[str, Any], origin: str) -> SchemeOf:
    excluded = _matches(config.get("modules_to_not_convert"), origin)
    kind = config.get("quant_type")
    entry: Mapping[str, Any] = {"_type": kind, "_data": config.get("quant_type_kwargs")}
    if isinstance(kind, Mapping):
        entry = _mapping(kind.get("default"))
    arguments = _mapping(entry.get("_data"))
    by_name = _mapping(arguments.get("module_fqn_to_config") or arguments.get("fqn_to_config"))
    own = [
        (_matches([name], origin), None if part is None else _torchao_scheme(_mapping(part), origin))
        for name, part in list(by_name.items())[:MOST_PATTERNS]
        if name != "_default"
    ]
    rest = by_name.get("_default") if by_name else entry
    usual = None if rest is None else _torchao_scheme(_mapping(rest), origin)

    def scheme_of(names: Sequence[str]) -> Scheme | None:
        if _any(excluded, names):
            return None
        return next((scheme for matches, scheme in own if _any(matches, names)), usual)

    return scheme_of


def _torchao_scheme(entry: Mapping[str, Any], origin: str) -> Scheme:
    name = re.sub(r"[^a-z0-9]", "", str(entry.get("_type")).lower()).removesuffix("config")
    data = _mapping(entry.get("_data"))
    scheme = next((USUAL[start] for start in ("nvfp4", "mxfp4") if name.startswith(start)), None)
    if name in TORCHAO_INT4:
        return Scheme("int4", 4, 4, _group(data.get("group_size"), TORCHAO_INT4[name], origin))
    if name in TORCHAO_INTX:
        granularity = _mapping(data.get(TORCHAO_INTX[name]))
        inner, size = _mapping(granularity.get("_data")), None
        if granularity.get("_type", "PerAxis") == "PerGroup":
            size = _group(inner.get("group_size"), 0, origin)
        dtype = str(_mapping(data.get("weight_dtype")).get("_data"))
        if dtype in ("int4", "int8"):
            return Scheme(dtype, USUAL[dtype].bits, 4, size or None)
        raise _not_understood(origin, f"torchao's weight_dtype is {dtype[:40]!r}")
    scheme = scheme or TORCHAO_ROWS.get(name)
    if scheme is None:
        raise _not_understood(origin, f"torchao's quant_type is {str(entry.get('_type'))[:60]!r}")
    return scheme


TORCHAO_INT4 = {
    "int4weightonly": 128,
    "prototypeint4weightonly": 128,
    "float8dynamicactivationint4weight": 128,
    "int8dynamicactivationint4weight": 32,
}
"""By torchao's name, without "config" at its end: weights of a group where it is not said."""
TORCHAO_INTX = {"intxweightonly": "granularity", "int8dynamicactivationintxweight": "weight_granularity"}
"""Of any number of bits; where they say what shares a scale."""
TORCHAO_ROWS = {
    **dict.fromkeys(
        ("int8weightonly", "int8dynamicactivationint8weight", "int8staticactivationint8weight"),
        Scheme("int8", 8, 2, None),
    ),
    "int4dynamicactivationint4weight": Scheme("int4", 4, 4, None),
    **dict.fromkeys(
        ("float8weightonly", "float8dynamicactivationfloat8weight", "float8staticactivationfloat8weight"),
        Scheme("fp8", 8, 4, None),
    ),
}


def _ascend(config: Mapping[str, Any], origin: str) -> SchemeOf:
    """msModelSlim's description: a type for each tensor by name, or one for the model alone."""
    span = _whole(config.get("group_size")) or None

    def scheme(kind: Any) -> Scheme | None:
        name = str(kind).upper()
        if name == "FLOAT":
            return None
        for end in ("MXFP8", "MXFP4"):
            if name.endswith(end):
                return USUAL[end.lower()]
        # A scale and an offset in float32 for each row, or, of four bits, each group of a row.
        if name in ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16"):
            return Scheme("int8", 8, 8, None)
        if name in ("W4A8", "W4A8_DYNAMIC", "W4A16", "W4A4", "W4A4_DYNAMIC"):
            return Scheme("int4", 4, 8, span)
        raise _not_understood(origin, f"msModelSlim's type is {str(kind)[:60]!r}")

    def scheme_of(names: Sequence[str]) -> Scheme | None:
        kind = next((config[f"{name}.weight"] for name in names if f"{name}.weight" in config), None)
        return scheme(config.get("model_quant_type") if kind is None else kind)

    return scheme_of


READERS: Mapping[tuple[str, ...], Callable[[Mapping[str, Any], str], SchemeOf]] = {
    ("compressed-tensors", "compressed-tensor"): _compressed_tensors,
    ("modelopt", "modelopt-fp4", "modelopt-fp8", "modelopt-mixed", "modelopt-mxfp8"): _modelopt,
    ("awq", "awq-marlin", "gptq", "gptq-marlin", "gptqmodel", "auto-round", "auto-round:gptq", "auto-round:awq",
     "auto-round:auto-gptq", "intel/auto-round", "inc", "mlx", "moe-wna16"): _integers,
    ("fp8", "finegrained-fp8", "fbgemm-fp8", "ptpc-fp8", "w8a8-fp8", "mxfp8"): _fp8,
    ("mxfp4", "nvfp4", "fp-quant"): _fp4,
    ("bitsandbytes", "bitsandbytes-4bit", "bitsandbytes-8bit", "bnb"): _bitsandbytes,
    ("eetq", "experts-int8", "w8a8-int8", "blockwise-int8", "int8"): _int8,
    ("w4afp8",): _w4afp8,
    ("exl3",): _exl3,
    ("hqq",): _hqq,
    ("quark",): _quark,
    ("quanto",): _quanto,
    ("torchao",): _torchao,
    ("ascend", "modelslim"): _ascend,
}  # fmt: skip


# Names of modules that a config excludes or treats apart. Experts go by other names in each family and framework.

PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers", "backbone.layers", "layers")
MATRICES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "in": {
        "mlp": ("0.up_proj", "gate_up_proj"),
        "block_sparse_moe": ("0.w1",),
        "feed_forward": ("0.up_proj", "0.w1", "gate_up_proj"),
        "mixer": ("0.up_proj",),
        "ffn": ("0.w1",),
        "moe": ("0.up_proj",),
    },
    "out": {
        "mlp": ("0.down_proj", "down_proj"),
        "block_sparse_moe": ("0.w2",),
        "feed_forward": ("0.down_proj", "0.w2", "down_proj"),
        "mixer": ("0.down_proj",),
        "ffn": ("0.w2",),
        "moe": ("0.down_proj",),
    },
}
"""By block of a layer: of the first expert, or of all together."""
_STEM = re.compile(r"((?:\w+\.){1,6}layers)\.\d{1,5}\.")
MOST_PATTERNS, LONGEST_PATTERN = 4096, 512
MOST_ENTRIES, MOST_PREFIXES = 100_000, 12
REPEATED_REPEAT = re.compile(r"([*+}]\??|\|[^()]*)\)[*+{]")
"""A repetition or a choice inside of a repetition: what regular expressions may take forever on."""


def _matrix_names(layer: int, role: str, prefixes: Sequence[str]) -> list[str]:
    """What a matrix of the layer's first expert may be called."""
    return [
        f"{prefix}.{layer}.{block}.experts.{leaf}"
        for prefix in prefixes
        for block, leaves in MATRICES[role].items()
        for leaf in leaves
    ]


def _prefixes(config: Mapping[str, Any]) -> list[str]:
    """What layers' names may begin with: the usual, and as the config's own names of the language model do."""
    prefixes = dict.fromkeys(PREFIXES)
    entries: list[Any] = [config]
    for entry in entries:
        if len(entries) > MOST_ENTRIES or len(prefixes) > MOST_PREFIXES:
            break
        if isinstance(entry, Mapping):
            entries.extend([*entry, *entry.values()])
        elif isinstance(entry, list | tuple):
            entries.extend(entry)
        elif isinstance(entry, str) and (match := _STEM.match(entry[:LONGEST_PATTERN])) and _of_language(match[1]):
            prefixes[match[1]] = None
    return list(prefixes)


def _of_language(prefix: str) -> bool:
    return not BESIDE.search(prefix) and not re.search(r"encoder|draft|eagle", prefix)


def _any(matches: Matcher, names: Iterable[str]) -> bool:
    return any(matches(name) for name in names)


def _matches(patterns: Any, origin: str) -> Matcher:
    """Whether a module's name is one of those listed, in one of them, or fits a pattern (`re:` or with `*`)."""
    literals: set[str] = set()
    regexes: list[re.Pattern[str]] = []
    for pattern in _list(patterns):
        text = str(pattern)
        if text.startswith("re:") or any(sign in text for sign in "*?["):
            regex = text[3:] if text.startswith("re:") else rf"(?:{_wildcard(text)})(?:\..*)?$"
            if len(text) > LONGEST_PATTERN or len(regexes) >= MOST_PATTERNS or REPEATED_REPEAT.search(text):
                raise _not_understood(origin, f"quantization_config has a pattern {text[:60]!r}")
            try:
                regexes.append(re.compile(regex))
            except (re.error, OverflowError, RecursionError):
                raise _not_understood(origin, f"quantization_config has a pattern {text[:60]!r}") from None
        else:
            literals.add(text.strip("."))
    # How many parts a listed name has, by its first: a name is looked up where one may begin, and not in every part.
    lengths: dict[str, set[int]] = defaultdict(set)
    for literal in literals:
        first, *rest = literal.split(".")
        lengths[first].add(1 + len(rest))
    known: dict[str, bool] = {}

    def listed(name: str) -> bool:
        parts = name.split(".")
        return any(
            ".".join(parts[begin : begin + length]) in literals
            for begin, part in enumerate(parts)
            if part in lengths
            for length in lengths[part]
        )

    def matches(name: str) -> bool:
        if name not in known:
            known[name] = listed(name) or any(regex.match(name) for regex in regexes)
        return known[name]

    return matches if literals or regexes else lambda name: False


def _wildcard(text: str) -> str:
    return re.sub(r"\\[zZ]$", "", fnmatch.translate(re.sub(r"\*+", "*", text)))


def _group(size: Any, usual: int, origin: str) -> int:
    """Weights that share a scale; `usual` where it is not said."""
    if size is not None and not _whole(size):
        raise _not_understood(origin, f"quantization_config has groups of {str(size)[:20]!r} weights")
    return usual if size is None else _whole(size)


def _block(sides: Any, origin: str) -> int:
    """Weights of a block of two sides."""
    if not _sides(sides):
        raise _not_understood(origin, f"quantization_config has blocks of {str(sides)[:60]}")
    return _sides(sides)


def _sides(sides: Any) -> int:
    return _whole(sides[0]) * _whole(sides[1]) if isinstance(sides, list | tuple) and len(sides) == 2 else 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, list | tuple) else []


def _whole(value: Any) -> int:
    """A whole number, or 0 for anything else: what is needed and is not there is then not understood."""
    return value if type(value) is int and 0 <= value < 1 << 31 else 0
