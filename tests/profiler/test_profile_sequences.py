"""Padding is dropped, and sequences are told apart through prefill, decode, packing and interleaved generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from small_models import RouterWitness, gpt_oss, mixtral, olmoe, tokens  # noqa: E402

from moeplace.profiler.profile import profile  # noqa: E402
from moeplace.profiler.trace_files import read_trace  # noqa: E402

torch.set_num_threads(1)

LENGTHS = (3, 6, 5)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return olmoe(use_cache=True)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of rows of LENGTHS tokens, padded with 0 to 6."""
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(6 - length, 6)
        ids[row, where] = tokens(1, length, seed=row)[0]
        mask[row, where] = 1
    return ids, mask


def by_sequence(trace: mp.RoutingTrace) -> dict[int, tuple[list[int], np.ndarray]]:
    """{sequence: (positions, [n, L, k] ids)} in order of position."""
    result = {}
    for number in np.unique(trace.sequence):
        mine = np.flatnonzero(trace.sequence == number)
        mine = mine[np.argsort(trace.position[mine], kind="stable")]
        result[int(number)] = (trace.position[mine].tolist(), trace.expert_ids[mine])
    return result


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positional", [False, True])
def test_padding_is_dropped(model: torch.nn.Module, side: str, positional: bool, tmp_path: Path) -> None:
    ids, mask = padded(side)
    witness = RouterWitness(model)
    with profile(model, tmp_path / "t") as recorder, torch.no_grad():
        if positional:
            model(ids, mask)
        else:
            model(input_ids=ids, attention_mask=mask)
    trace = read_trace(tmp_path / "t")
    expected, _ = witness.routing(0)
    np.testing.assert_array_equal(trace.expert_ids, expected[mask.numpy().reshape(-1) == 1])
    assert [positions for positions, _ in by_sequence(trace).values()] == [list(range(n)) for n in LENGTHS]
    assert recorder.tokens == sum(LENGTHS)


def test_padding_is_dropped_from_counts(model: torch.nn.Module, tmp_path: Path) -> None:
    ids, mask = padded("left")
    with profile(model, tmp_path / "c.npz", mode="counts") as recorder, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        assert recorder.tokens == sum(LENGTHS)
    with profile(model, tmp_path / "t"), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    counted = mp.RoutingStatistics.from_trace(read_trace(tmp_path / "t"))
    np.testing.assert_array_equal(recorder.statistics().total_load, counted.total_load)


@pytest.mark.parametrize("kind", ["additive", "boolean"])
def test_padding_is_told_from_a_four_dimensional_mask(model: torch.nn.Module, kind: str, tmp_path: Path) -> None:
    ids, mask = padded("left")
    attend = torch.tril(torch.ones(6, 6, dtype=torch.bool)) & mask[:, None, None, :].bool()
    four = attend if kind == "boolean" else torch.zeros(attend.shape).masked_fill(~attend, torch.finfo(torch.float).min)
    with profile(model, tmp_path / "t") as recorder, torch.no_grad():
        model(input_ids=ids, attention_mask=four)
    assert recorder.tokens == sum(LENGTHS)
    assert [len(positions) for positions, _ in by_sequence(read_trace(tmp_path / "t")).values()] == list(LENGTHS)


@pytest.mark.parametrize("build", [olmoe, gpt_oss, mixtral])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens_belong_to_the_sequences_of_their_prompts(build: type, cache: str, tmp_path: Path) -> None:
    generator = build(use_cache=True)
    ids, mask = padded("left")
    with profile(generator, tmp_path / "t") as recorder:
        output = generator.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, cache_implementation=cache
        )
        generator.generate(input_ids=ids[:1, 3:], max_new_tokens=2, do_sample=False, cache_implementation=cache)
    assert recorder.steps == 4 + 2
    found = by_sequence(read_trace(tmp_path / "t"))
    # The last token generated is never fed back, so a prompt of n tokens gives n + 3 routed tokens.
    assert [positions for positions, _ in found.values()] == [list(range(n)) for n in (6, 9, 8, 4)]
    # Each sequence's routing is that of the same text run alone, without cache or padding.
    for row, length in enumerate(LENGTHS):
        text = output[row, 6 - length : -1][None]
        with profile(generator, tmp_path / f"alone{row}"), torch.no_grad():
            generator(input_ids=text, use_cache=False)
        alone = read_trace(tmp_path / f"alone{row}").expert_ids
        assert (np.sort(alone) == np.sort(found[row][1])).mean() > 0.98  # a tie may fall otherwise by rounding


def test_calls_that_continue_caches_may_be_interleaved(model: torch.nn.Module, tmp_path: Path) -> None:
    with profile(model, tmp_path / "t"), torch.no_grad():
        first = model(input_ids=tokens(2, 4)).past_key_values
        second = model(input_ids=tokens(2, 3, 1)).past_key_values
        for seed in range(2):
            model(input_ids=tokens(2, 1, seed), past_key_values=first)
            model(input_ids=tokens(2, 2, seed), past_key_values=second)
    positions = [found for found, _ in by_sequence(read_trace(tmp_path / "t")).values()]
    assert positions == [list(range(6)), list(range(6)), list(range(7)), list(range(7))]


def test_a_cache_filled_before_the_block_gives_new_sequences_at_its_length(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    with torch.no_grad():
        cache = model(input_ids=tokens(2, 4)).past_key_values
        with profile(model, tmp_path / "t"):
            model(input_ids=tokens(2, 1), past_key_values=cache)
            model(input_ids=tokens(2, 1), past_key_values=cache)
    assert [found for found, _ in by_sequence(read_trace(tmp_path / "t")).values()] == [[4, 5], [4, 5]]


def test_packed_rows_are_parted_where_positions_start_again(model: torch.nn.Module, tmp_path: Path) -> None:
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 2]])
    with profile(model, tmp_path / "t"), torch.no_grad():
        model(input_ids=tokens(2, 7), position_ids=position)
    trace = read_trace(tmp_path / "t")
    np.testing.assert_array_equal(trace.position, position.numpy().reshape(-1))
    np.testing.assert_array_equal(trace.sequence, np.repeat([0, 1, 2, 3, 4], [3, 4, 2, 2, 3]))


def test_embeddings_as_input_are_rows_of_positions(model: torch.nn.Module, tmp_path: Path) -> None:
    embedded = model.get_input_embeddings()(tokens(2, 5)).detach()
    with profile(model, tmp_path / "t"), torch.no_grad():
        model(inputs_embeds=embedded)
    trace = read_trace(tmp_path / "t")
    np.testing.assert_array_equal(trace.sequence, np.repeat([0, 1], 5))


@pytest.mark.parametrize("mode", ["tokens", "counts"])
def test_sampling_takes_whole_sequences_and_the_same_on_every_run(
    model: torch.nn.Module, mode: str, tmp_path: Path
) -> None:
    loads = []
    for run in range(2):
        out = tmp_path / f"run{run}"
        with profile(model, out, mode=mode, sample=0.5) as recorder, torch.no_grad():  # type: ignore[arg-type]
            cache = model(input_ids=tokens(40, 3)).past_key_values
            model(input_ids=tokens(40, 1), past_key_values=cache)
        loads.append(recorder.statistics().total_load)
        assert recorder.tokens % 4 == 0  # a sequence is recorded to its end or not at all
        assert 8 * 4 <= recorder.tokens <= 32 * 4
    np.testing.assert_array_equal(loads[0], loads[1])


def test_both_modes_sample_the_same_sequences(model: torch.nn.Module, tmp_path: Path) -> None:
    loads = []
    for mode in ("tokens", "counts"):
        with profile(model, tmp_path / mode, mode=mode, sample=0.3) as recorder, torch.no_grad():  # type: ignore[arg-type]
            model(input_ids=tokens(30, 3))
            model(input_ids=tokens(30, 2, 1))
        loads.append(recorder.statistics().total_load)
    np.testing.assert_array_equal(loads[0], loads[1])


def test_workload_tags_what_follows(model: torch.nn.Module, tmp_path: Path) -> None:
    with profile(model, tmp_path / "t", workload="chat") as recorder, torch.no_grad():
        model(input_ids=tokens(2, 3))
        recorder.workload = "code"
        model(input_ids=tokens(1, 4))
    trace = read_trace(tmp_path / "t")
    tags = np.array(trace.workloads)[trace.workload]
    assert tags.tolist() == ["chat"] * 6 + ["code"] * 4
