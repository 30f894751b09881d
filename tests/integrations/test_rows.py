"""Rows of experts that frameworks shard: dealt anew, summed over replicas, moved to another plan. On real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from ranks import launch

pytestmark = pytest.mark.slow


def test_rows_get_to_where_another_table_has_them_and_replicas_share_their_gradients(tmp_path: Path) -> None:
    for rank in (found := launch("row_ranks:rows", 3, tmp_path)):
        assert rank["right"] == 20
        assert rank["sums"] < 1e-12
        assert rank["norms"] < 1e-12
        assert rank["half"] == [False, [True, False], [True, True], True, [True, True], True]
        assert rank["bytes"]
        assert rank["moves to the plan in force"] == 0
        assert "the plan in force stays: rank 1: RuntimeError: a rank without its memory" in rank["failed"]
        assert rank["after"] == [True, True]
        assert "new plan and optimizer state: rank" in rank["different"]
    assert [rank["one refuses"].partition(";")[0] for rank in found] == [
        *["new plan and optimizer state: rank 2 refused it"] * 2,
        "state of another shape",
    ]
    assert len(found) == 3
