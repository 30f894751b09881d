"""Every MoE model of the installed Transformers is read as it builds it."""

from __future__ import annotations

import json

import pytest

import moeplace as mp
from moeplace.placement.model_config import read_config

pytest.importorskip("transformers")

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
