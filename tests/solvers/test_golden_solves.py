"""The answers written down in golden_solves.json are still those of the package."""

from __future__ import annotations

import pytest
from golden_solves import CASES, answered, differences, recorded_answers

GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("group", GROUPS)
def test_every_answer_is_the_one_written_down(group: str) -> None:
    recorded = recorded_answers()
    cases = [case for case in CASES.values() if case.group == group]
    lines = [line for case in cases for line in differences(case, recorded.get(case.name), answered(case))]
    assert not lines, "\n".join([*lines, "where that is meant: python tests/support/golden_solves.py --write"])


def test_every_answer_written_down_belongs_to_a_case() -> None:
    assert set(recorded_answers()) == set(CASES)


def test_another_value_is_a_difference() -> None:
    case = next(iter(CASES.values()))
    recorded = recorded_answers()[case.name]
    assert differences(case, recorded, recorded) == []
    for name, other in (("value", recorded["value"] * (1 + 1e-6)), ("bound", None), ("plan", "0" * 64)):
        assert len(differences(case, recorded, {**recorded, name: other})) == 1
    assert len(differences(case, recorded, {**recorded, "news": 1.0})) == 1
