"""Every MoE model of the installed Transformers is read as it builds it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import moeplace as mp
from moeplace.placement import model_families as table
from moeplace.placement.model_config import read_config

pytest.importorskip("transformers")

import transformers as tf

from tests.support.transformers_families import Built, build, config_of, moe_types

TYPES = moe_types()
TRUE_NOTES = (
    "does not say its dtype",
    "not read: vision_config.num_local_experts",
    "not read: talker_config.text_config.num_local_experts",
    "other experts are not placed",
    "its attention experts are routed apart",
)


def _built(model_type: str) -> Built:
    config_class, model_class = TYPES[model_type]
    assert config_class, f"Transformers has MoE modules in models/{model_type}, and no model type for them"
    config = config_of(model_type, config_class)
    assert model_class, f"no model class is known for {model_type}; add it to the table of the test"
    return build(config, model_class)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(TYPES))
def test_a_config_is_read_as_transformers_builds_it(model_type: str) -> None:
    built = _built(model_type)
    expected = built.spec_fields
    as_file = json.loads(built.config.to_json_string(use_diff=False))
    for config in (built.config, built.config.to_dict(), as_file):
        spec = mp.ModelSpec.from_config(config)
        assert {name: getattr(spec, name) for name in expected} == expected
        assert spec.weights_per_expert + spec.biases_per_expert == built.values_per_expert
    notes = [note for note in read_config(built.config).notes if not any(true in note for true in TRUE_NOTES)]
    assert not notes, "fields that nothing reads; see placement/model_families.py"


SIZES = {
    name
    for family in (table.UNKNOWN, *table.FAMILIES.values())
    for field in ("experts", "top_k", "ffn", "latent", "groups", "top_groups", "shared", "shared_width", "zero")
    for name in getattr(family, field)
} - {"ffn_config.moe_num_experts", "ffn_config.moe_top_k", "ffn_config.ffn_hidden_size"}
SCHEDULES = {
    *table.WORDS, *table.PATTERNS, *table.FLAGS, *table.INDICES, *table.DENSE_HEAD, *table.DENSE_INDICES, *table.STEPS,
    table.PERIOD, table.OFFSET, table.FIRST, table.LAST,
}  # fmt: skip


def _without_one(fields: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field of sizes or schedules, and the config without it."""
    for name, value in fields.items():
        if name in SIZES | SCHEDULES:
            yield name, {other: copy.deepcopy(fields[other]) for other in fields if other != name}
        elif name in table.LANGUAGE_PARTS and isinstance(value, dict):
            for inner, part in _without_one(value):
                yield f"{name}.{inner}", {**copy.deepcopy(dict(fields)), name: part}


@pytest.mark.parametrize("model_type", sorted(name for name in TYPES if not name.endswith("_text")))
def test_a_field_that_is_left_out_is_read_as_transformers_fills_it_told_or_refused(model_type: str) -> None:
    config_class = getattr(tf, TYPES[model_type][0])
    full = config_of(model_type, TYPES[model_type][0]).to_dict()
    told = set(read_config(full).notes)
    for name, fields in _without_one(full):
        try:
            reading = read_config(fields)
        except mp.InputError:
            continue
        if told.issuperset(reading.notes):
            assert reading.fields == read_config(config_class.from_dict(fields)).fields, name
