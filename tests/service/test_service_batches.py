"""The steps of a deployment, and what a restart of its engine takes: named once, in its policy."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
import moeplace as mp
from moeplace.service.policy import Policy
from moeplace.service.schemas import StepsRequest
from moeplace.service.tasks import default_plan, on_counts


def test_a_policy_names_batches_and_keeps_them() -> None:
    named = {"phase": "prefill", "tokens_per_device": 2048, "weight": 0.1}
    policy = Policy(batches=[named])
    assert policy.asked == (mp.Batch("prefill", tokens_per_device=2048, weight=0.1),)
    assert Policy(**policy.as_document()) == policy
    assert Policy().asked == ()
    assert Policy(step_tokens=512).asked == (mp.Batch("decode", tokens=512),)
    assert StepsRequest(batches=[named]).batches == list(policy.asked)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batches": [{"phase": "train", "tokens": 8}]}, "phase"),
        ({"batches": [{"phase": "decode", "tokens": 8, "wieght": 1}]}, "wieght"),
        ({"batches": [{"phase": "decode", "tokens": 0}]}, "must be from 1"),
        ({"batches": [{"phase": "decode", "tokens": 8}] * 2}, "twice"),
        ({"batches": [{"phase": "decode", "tokens": 8}], "step_tokens": 8}, "give batches"),
    ],
)
def test_a_policy_refuses_what_is_no_batch(fields: dict[str, object], words: str) -> None:
    with pytest.raises(mp.InputError, match=words):
        Policy(**fields)


def test_a_decision_charges_the_restart_that_the_policy_names() -> None:
    model = mp.ModelSpec(layers=2, experts=8, top_k=2, hidden_size=64, ffn_size=64)
    cluster = mp.Topology.preset("h100-hgx", devices_per_node=4)
    load = np.random.default_rng(0).poisson(1000 * np.arange(1, 9), size=(24, 2, 8)).astype(float)
    counts = mp.RoutingStatistics.from_counts(load, top_k=2)
    current = default_plan(model, cluster)
    candidate = mp.solve(mp.Problem(model, cluster, counts), "eplb")
    moving, unknown, restart = (
        on_counts(current, candidate, counts, Policy(**fields)).verdicts[0].migration
        for fields in ({}, {"engine": "sglang"}, {"engine": "sglang", "restart_seconds": 90.0})
    )
    assert (moving.restart, moving.stall) == ("", moving.seconds)
    assert unknown.stall is None
    assert (restart.restart, restart.stall) == ("--init-expert-location", 90.0)
    for fields, words in (({}, "name the engine"), ({"engine": "moeplace"}, "while it runs")):
        with pytest.raises(mp.InputError, match=words):
            Policy(restart_seconds=90.0, **fields)
