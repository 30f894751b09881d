"""Every MoE family of the installed Transformers: what of it is read, recorded, permuted and parallelized exactly.

Each is built by its real class from a tiny random config. Exact means: the spec is that of the modules; recorded ids
are those that the experts were called with; logits are those of the original after permuting its checkpoint, and over
ranks. What is not exact says the refusal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from runner import HERE, Report

import moeplace as mp

sys.path.insert(0, str(HERE.parent / "tests" / "support"))

LAYERS, EXPERTS, TOP_K, VOCABULARY, HIDDEN = 4, 8, 2, 160, 64
COLUMNS = ("family", "spec", "profile", "permute", "parallelize")
EXACT = "exact"
TOLERANCE = 2e-4
"""Largest difference of logits, relative to the largest: float32 sums in another order."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size.*|ngram_vocab_size_base", VOCABULARY),
    (r"mamba_num_heads|mamba_n_heads", 8),
    (r"mamba_head_dim|mamba_d_head", 16),
    (r"(linear_)?num_(key_)?heads|(num_|encoder_|decoder_)?(attention_|sliding_attention_)?heads|n_heads", 4),
    (r"linear_num_value_heads", 4),
    (r"index_n_heads|indexer_n_heads", 4),
    (r".*(num_key_value_heads|kv_n_heads)", 2),
    (r"qk_(rope|nope)_head_dim", 16),
    (r".*head_dim|d_kv", 16),
    (r".*lora_rank|.*_rank|hc_lowrank|dt_rank", 16),
    (r"hidden_size|(text|out|output|thinker)_hidden_size|d_model|n_embd|emb_dim|embed_dim", HIDDEN),
    (r"adapter_(in|out|input)_(dim|size)", HIDDEN),
    (r".*(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|_dim|_width|_size|expert_dims)", 32),
    (r"(n_routed|num_local|num|moe_num|num_routed)_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|experts_per_token", TOP_K),
    (r"n_group|num_expert_groups?|router_n_groups", 4),
    (r"topk_group|topk_groups|num_limited_groups", 2),
    (r"max_position_embeddings|model_max_length|max_seq_len", 256),
    (r"(n|num)_groups|mamba_n_groups|o_groups", 2),
    (r"zero_expert_num", 4),
    (r"index_topk|sliding_window|.*chunk_size", 16),
)  # fmt: skip
DEPTHS = re.compile(
    r"num_hidden_layers|num_layers|n_layers|n_layer|(en|de)coder_layers|num_decoder_layers|depth|max_window_layers"
)
DENSE = re.compile(r"first_k_dense_replace|num_dense_layers|dense_mlp_idx|n_dense_layers|moe_layer_num_skipped")
KEPT: Mapping[str, Mapping[str, Any]] = {
    "doge": {"num_experts": 16},
    "llama4_text": {"moe_layers": [1, 3]},
    "switch_transformers": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "dbrx": {"clip_qkv": 8.0},
    "step3p5": {"sliding_window": 16},
    "dots3_note": {"qk_nope_head_dim": 48, "head_dim": 64},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 16], "head_dim": 128}},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
    "hy_v4_vl": {"text_config": {"rope_parameters": {"mrope_section": [4, 2, 2]}}},
    "inkling2_loop": {
        "text_config": {
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 3,
            "loop_num_passes": 2,
        }
    },
    "mistral4": {"head_dim": 32},
}
"""By model type, what stays as it is here, also in parts of the config."""


def tiny(fields: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with sizes that build in no time, all kinds of layers among those that stay."""
    depth = max(
        (v for k, v in fields.items() if DEPTHS.fullmatch(k) and type(v) is int and k != "max_window_layers"), default=0
    )
    lists = [
        v for k, v in fields.items() if isinstance(v, list) and len(v) >= depth > 1 and k != "mtp_layers_block_type"
    ]
    own_numbers = [v for v in lists if v == list(range(len(v)))]
    layers = _representatives([v for v in lists if v not in own_numbers], depth)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            inner = kept.get(name, {})
            small[name] = (
                {}
                if name == "per_layer_config"
                else value
                if re.search("rope|label", name)
                else tiny(value, {**kept, **inner})
            ) | inner
        elif name in kept:
            small[name] = kept[name]
        elif value in own_numbers:
            small[name] = value[:LAYERS]
        elif any(value is entry for entry in lists):
            small[name] = [value[layer] for layer in layers]
        elif type(value) is not int or value in (0, -1):
            small[name] = value
        elif DEPTHS.fullmatch(name):
            small[name] = LAYERS
        elif DENSE.fullmatch(name):
            small[name] = min(value, 1)
        elif re.fullmatch(r".*(token_id|token_index|(?<!_per)_token)", name):
            small[name] = value if value < 3 else VOCABULARY - 1
        else:
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
            small[name] = min(value, size)
    if fields.get("head_dim") == fields.get("qk_rope_head_dim") != None and "head_dim" in small:  # noqa: E711
        small["head_dim"] = small["qk_rope_head_dim"]
    heads = fields.get("num_attention_heads")
    if "num_key_value_heads" in small and fields["num_key_value_heads"] == heads:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "mrope_section" in (fields.get("rope_parameters") or {}):
        small["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    if "qk_head_dim" in small:
        small["qk_head_dim"] = small["qk_rope_head_dim"] + small["qk_nope_head_dim"]
    if "moe_layer_end_index" in small:
        small["moe_layer_end_index"] = LAYERS - 1
    for name in ("moe_layers", "mlp_only_layers", "ple_layer_ids", "no_rope_layers"):
        if isinstance(small.get(name), list) and len(small[name]) != LAYERS:
            small[name] = [layer for layer in small[name] if layer < LAYERS]
    return small


def _representatives(lists: Sequence[Sequence[Any]], depth: int) -> list[int]:
    """LAYERS layers of `depth` among which every kind of layer is, in order."""
    kinds: dict[str, int] = {}
    for layer in range(depth):
        kinds.setdefault(str([entry[layer] for entry in lists]), layer)
    first = list(kinds.values())[-LAYERS:]
    rest = [layer for layer in range(depth) if layer not in first]
    return sorted((first + rest)[: min(LAYERS, depth)])


def build(model_type: str, config_class: str, model_class: str) -> Any:
    """The family's model with every weight and buffer drawn."""
    import torch
    import transformers as tf
    from transformers_families import config_of

    config = config_of(model_type, config_class)
    config = type(config).from_dict(tiny(config.to_dict(), KEPT.get(model_type, {})))
    torch.manual_seed(0)
    kind = getattr(tf, model_class)
    model = (
        (kind._from_config(config, dtype=torch.float32) if hasattr(kind, "_from_config") else kind(config))
        .float()
        .eval()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() and parameter.is_floating_point() and parameter.ndim > 1:
                parameter.normal_(std=0.15)
        for name, buffer in model.named_buffers():
            if re.search("correction_bias|expert_bias", name):
                buffer.uniform_(0, 0.3)
            if name.endswith("tid2eid"):
                buffer.copy_(torch.rand(len(buffer), EXPERTS).argsort(1)[:, : buffer.shape[1]])
    return model


def call(model: Any) -> Any:
    """Outputs on a few prompts."""
    import inspect

    import torch

    ids = torch.randint(5, VOCABULARY - 20, (2, 9), generator=torch.Generator().manual_seed(1))
    arguments = {"input_ids": ids}
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        arguments["decoder_input_ids"] = ids[:, :7] if "canvas" not in type(model).__name__ else ids
    torch.manual_seed(5)
    with torch.no_grad():
        return model(**arguments)


def language_model(model: Any) -> Any:
    """The part that is called with tokens, of a model that only generates."""
    return getattr(model, "thinker", model)


def logits(model: Any) -> Any:
    output = call(language_model(model))
    value = getattr(output, "logits", None)
    return value if value is not None else getattr(output, "last_hidden_state", output[0])


def difference(first: Any, second: Any) -> float:
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-9))


def _plan(spec: mp.ModelSpec, devices: int) -> mp.Plan:
    """A drawn order of experts; with groups, of whole groups and inside them."""
    rng, size = np.random.default_rng(3), spec.experts // spec.groups
    devices = devices if spec.experts % devices == 0 else 1
    table = np.stack(
        [
            np.concatenate([rng.permutation(size) + group * size for group in rng.permutation(spec.groups)])
            for _ in range(spec.layers)
        ]
    )
    topology = mp.Topology.preset("h100-hgx", devices_per_node=devices)
    return mp.Plan(spec, topology, table, np.repeat(np.arange(devices), spec.experts // devices))


def check_spec(model: Any, built: Any) -> str:
    spec = mp.ModelSpec.from_config(model.config)
    wrong = [f"{k} is {getattr(spec, k)}, built {v}" for k, v in built.spec_fields.items() if getattr(spec, k) != v]
    return f"WRONG: {'; '.join(wrong)}" if wrong else EXACT


def check_profile(model: Any, folder: Path) -> str:
    """Against what the experts' own modules were called with, or, of routers that hand on no ids, their logits."""
    model = language_model(model)
    calls, handles = _watched(model)
    counts = False
    try:
        with mp.profile(model, folder / "trace"):
            call(model)
    except mp.UnsupportedError as error:
        if "mode='counts'" not in str(error):
            raise
        counts = True
        calls.clear()
        with mp.profile(model, folder / "counts.npz", mode="counts"):
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    said = [np.concatenate(parts) for parts in calls.values()]
    if counts:
        load = mp.read_statistics(folder / "counts.npz").total_load
        expected = np.stack([np.bincount(part[part < load.shape[1]], minlength=load.shape[1]) for part in said])
        return f"{EXACT} in counts" if np.array_equal(load, expected) else "WRONG: other counts than were called"
    ids = np.asarray(mp.read_trace(folder / "trace").expert_ids)
    same = len(said) == ids.shape[1] and all(
        np.array_equal(np.sort(ids[:, i], axis=1), np.sort(part, axis=1)) for i, part in enumerate(said)
    )
    return EXACT if same else "WRONG: other experts than were called"


def _watched(model: Any) -> tuple[dict[str, list[Any]], list[Any]]:
    """Ids [T, k] by module, one after the other call, that the language model's experts are handed. No expert is one
    past the last."""
    from moeplace.placement.model_families import BESIDE
    from moeplace.profiler.families import experts_arguments

    calls: dict[str, list[Any]] = {}
    handles: list[Any] = []
    modules = [(name, module) for name, module in model.named_modules() if not BESIDE.search(name)]
    if any("decoder" in name.split(".") for name, module in modules if experts_arguments(module)):
        modules = [(name, module) for name, module in modules if "decoder" in name.split(".")]

    def hear(name: str, ids: Any) -> None:
        calls.setdefault(name, []).append(ids.reshape(-1, ids.shape[-1]).numpy())

    for name, module in modules:
        if names := experts_arguments(module):

            def before(module: Any, args: Any, kwargs: Any, name: str = name, names: Any = names) -> None:
                ids, weights = (args[i + 1] if len(args) > i + 1 else kwargs[key] for i, key in enumerate(names))
                if ids.ndim > weights.ndim:
                    ids = ids.argmax(-1).where(ids.any(-1), ids.shape[-1])
                hear(name, ids.where(weights != 0, len(module.down_proj)) if hasattr(module, "down_proj") else ids)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    for name, module in modules if not handles else ():
        if name.endswith("router") and "attention" not in name:

            def after(module: Any, _: Any, output: Any, name: str = name) -> None:
                hear(name, output[-1].topk(module.top_k, dim=-1).indices)

            handles.append(module.register_forward_hook(after))
    return calls, handles


def check_permute(model: Any, folder: Path) -> str:
    from moeplace.runtime.permute.checkpoint import permute_checkpoint

    source, target = folder / "model", folder / "permuted"
    model.save_pretrained(source)
    spec = mp.ModelSpec.from_config(source)
    permute_checkpoint(source, _plan(spec, 2), target)
    first, second = (type(model).from_pretrained(path, dtype="float32").eval() for path in (source, target))
    again = type(model).from_pretrained(source, dtype="float32").eval()
    if (drawn := difference(logits(first), logits(again))) > TOLERANCE:
        return f"not comparable: loaded twice, the original's own logits differ by {drawn:.1e}"
    changed = difference(logits(first), logits(second))
    same = all(
        bool((a == b).all()) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    if same:
        return "WRONG: nothing moved"
    return EXACT if changed <= TOLERANCE else f"WRONG: logits differ by {changed:.1e}"


def check_parallelize(model: Any, folder: Path) -> str:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    expected = logits(model)
    spec = mp.ModelSpec.from_config(model.config)
    mp.parallelize(model, _plan(spec, 1), init_device_mesh("cpu", (1,)))
    changed = difference(expected, logits(model))
    return EXACT if changed <= TOLERANCE else f"WRONG: logits differ by {changed:.1e}"


def refusal(check: Callable[[], str], folder: Path) -> str:
    """The check's word, or the refusal that it ended in, without the folder's name. Other errors are wrong."""
    try:
        return check()
    except mp.MoeplaceError as error:
        return f"refused: {error}".replace(f"{folder}/", "")
    except Exception as error:  # noqa: BLE001  # whatever a model's own code raises
        return f"WRONG: {type(error).__name__}: {error}"


def families() -> dict[str, tuple[str, str, str]]:
    """(model type, config class, model class) by Transformers' module: of the whole model where it has parts."""
    from transformers.models.auto import configuration_auto
    from transformers_families import moe_types

    chosen: dict[str, tuple[str, str, str]] = {"llama4": ("llama4_text", "Llama4TextConfig", "Llama4ForCausalLM")}
    for model_type, classes in sorted(moe_types().items(), key=lambda item: (len(item[0]), item[0])):
        module = configuration_auto.model_type_to_module_name(model_type)
        chosen.setdefault(module, (model_type, *classes))
    return dict(sorted(chosen.items()))


def one_family(family: str) -> tuple[str, ...]:
    """A row of the table."""
    from transformers_families import build as facts

    model_type, config_class, model_class = families()[family]
    try:
        model = build(model_type, config_class, model_class)
        logits(model)
    except Exception as error:  # noqa: BLE001  # the config may have been shrunk to what no model takes
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        print(
            family,
            where.tb_frame.f_code.co_filename[-50:] if where else "",
            where.tb_lineno if where else "",
            file=sys.stderr,
        )
        return (family, f"not built: {type(error).__name__}: {error}", *["not built"] * 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return (
            family,
            refusal(lambda: check_spec(model, facts(model.config, model_class)), folder),
            refusal(lambda: check_profile(model, folder), folder),
            refusal(lambda: check_permute(model, folder), folder),
            refusal(lambda: check_parallelize(model, folder), folder),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="*", metavar="FAMILY", help="these families")


def run(options: argparse.Namespace, report: Report) -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    table = report.table("families", COLUMNS)
    words = []
    for family in options.only or families():
        with contextlib.redirect_stdout(sys.stderr):
            row = one_family(family)
        words.append(row[1:])
        table.row(*(" ".join(cell.split()).replace("|", "/")[:170] for cell in row))
    exact = [sum(row[i].startswith(EXACT) for row in words) for i in range(4)]
    wrong = [sum(row[i].startswith("WRONG") for row in words) for i in range(4)]
    total = report.table("totals", ("of", *COLUMNS[1:]))
    total.row(f"{len(words)}, exact", *map(str, exact))
    total.row("wrong", *map(str, wrong))
