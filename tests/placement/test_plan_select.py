"""A plan of some layers: what a pipeline stage holds."""

from __future__ import annotations

import numpy as np
import pytest

import moeplace as mp


def plan() -> mp.Plan:
    model = mp.ModelSpec(layers=3, experts=4, top_k=2, hidden_size=8, ffn_size=8, moe_layers=(1, 3, 5))
    table = np.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, 3], [0, 2, 1, 3, 1]])
    shares = np.array([[0.25, 1, 1, 1, 0.75], [0.5, 1, 1, 1, 0.5], [1, 1, 0.1, 1, 0.9]])
    return mp.Plan(model, mp.Topology.preset("h100-sxm", devices_per_node=2), table, np.array([0, 0, 0, 1, 1]), shares)


def test_a_selection_places_its_layers_as_before() -> None:
    whole = plan()
    part = whole.select([5, 1])
    assert part.moe_layers == part.model.moe_layers == (1, 5)
    assert part.physical_to_logical.tolist() == whole.physical_to_logical[[0, 2]].tolist()
    assert part.shares.tolist() == whole.shares[[0, 2]].tolist()
    assert part.slot_device.tolist() == whole.slot_device.tolist()


@pytest.mark.parametrize(("layers", "words"), [([2], "layer 2 is not among them"), ([], "expected"), ([1, 1], "each")])
def test_layers_that_the_plan_does_not_place_are_refused(layers: list[int], words: str) -> None:
    with pytest.raises(mp.InputError, match=words):
        plan().select(layers)
