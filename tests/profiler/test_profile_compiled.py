"""Models under torch.compile are recorded as they run compiled, however they came to be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from routed_model import EXPERTS, Model, ids_of  # noqa: E402
from small_models import olmoe, tokens  # noqa: E402

from moeplace.profiler.profile import profile  # noqa: E402
from moeplace.profiler.trace_files import read_trace  # noqa: E402

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

NAMED: dict[str, Any] = {"routers": "router", "num_experts": EXPERTS}


class Graphs:
    """A backend that counts what it compiles and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    yield
    torch.compiler.reset()


def expected(tmp_path: Path) -> mp.RoutingTrace:
    model = Model()
    with profile(model, tmp_path / "eager", **NAMED), torch.no_grad():
        for width in (4, 4, 6):
            model(ids_of(2, width))
    return read_trace(tmp_path / "eager")


def run(model: Any) -> None:
    with torch.no_grad():
        for width in (4, 4, 6):
            model(ids_of(2, width))


def check(recorder: Any, tmp_path: Path) -> None:
    trace, eager = read_trace(recorder.trace_path), expected(tmp_path)
    assert recorder.steps == 3
    for column in ("expert_ids", "gate_weights", "sequence", "position", "step"):
        np.testing.assert_array_equal(getattr(trace, column), getattr(eager, column), err_msg=column)


@pytest.mark.parametrize(("way", "warm"), [("function", True), ("method", True), ("parts", True), ("inside", False)])
def test_compiled_models_are_recorded_in_one_graph(way: str, warm: bool, tmp_path: Path) -> None:
    graphs, model = Graphs(), Model()
    called: Any = model
    recorded: Any = model
    if way == "function":
        called = recorded = torch.compile(model, backend=graphs, fullgraph=True)
    elif way == "method":
        model.compile(backend=graphs, fullgraph=True)
    elif way == "parts":
        model.blocks[1].compile(backend=graphs, fullgraph=True)
        model.blocks[3] = torch.compile(model.blocks[3], backend=graphs, fullgraph=True)
    else:
        called = recorded = torch.nn.Sequential(torch.compile(model, backend=graphs, fullgraph=True))
    if warm:
        run(called)
    before = graphs.count
    with profile(recorded, tmp_path / "t", **NAMED) as recorder:
        run(called)
    assert graphs.count > before  # it did run compiled
    check(recorder, tmp_path)
    run(called)
    assert recorder.steps == 3


def test_a_model_compiled_after_recording_began_is_recorded(tmp_path: Path) -> None:
    graphs, model = Graphs(), Model()
    with profile(model, tmp_path / "t", **NAMED) as recorder:
        run(torch.compile(model, backend=graphs))
    assert graphs.count
    check(recorder, tmp_path)


def test_compiled_code_that_cannot_know_the_recorder_is_reported(tmp_path: Path) -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    run(compiled)
    message = "without calling blocks.1.router, blocks.3.router.*Pass the compiled module itself"
    with pytest.raises(mp.UnsupportedError, match=message), profile(model, tmp_path / "t", **NAMED):
        run(compiled)


def test_a_compiled_transformers_model_with_checkpointing_is_recorded_once_a_forward(tmp_path: Path) -> None:
    model = olmoe(use_cache=False, experts_implementation="grouped_mm").train()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    with profile(model, tmp_path / "eager"):
        model(input_ids=tokens(2, 8), attention_mask=mask)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    with profile(compiled, tmp_path / "t") as recorder:
        for _ in range(2):
            loss = compiled(input_ids=tokens(2, 8), attention_mask=mask, labels=tokens(2, 8)).loss
            loss.backward()
    assert (recorder.steps, recorder.tokens) == (2, 28)
    trace, eager = read_trace(tmp_path / "t"), read_trace(tmp_path / "eager")
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([eager.expert_ids] * 2))
    assert recorder.model_spec is not None
    assert recorder.model_spec.moe_layers == (0, 1)
