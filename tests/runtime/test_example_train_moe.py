"""The training example, run as a user runs it: a tiny model on the standard library's own text."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

import moeplace as mp

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.long]

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_moe.py"
STEPS, BATCH, SEQUENCE = 60, 4, 256
LAYERS, EXPERTS, TOP_K = 2, 8, 2
RECORDED = 1024  # tokens a domain


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the example in a process of its own, away from the checkout, on one thread."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )


class Trained(NamedTuple):
    out: Path
    text: Path
    run: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One training run on two domains, a file of source code and Python's help topics."""
    folder = tmp_path_factory.mktemp("train_moe")
    text = folder / "argparse_source.txt"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    out = folder / "run"
    shape = ("--layers", LAYERS, "--experts", EXPERTS, "--top-k", TOP_K, "--hidden", 64)
    size = ("--steps", STEPS, "--batch", BATCH, "--record-tokens", RECORDED, "--device", "cpu")
    return Trained(out, text, run_script("--out", out, "--text", text, "pydoc", *shape, *size))


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_moe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_moe"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_training_lowers_the_loss_and_reports_routing_churn(trained: Trained) -> None:
    reports = re.findall(r"step (\d+)/60  loss ([\d.]+)  .*churn ([\d.]+)%  [\d,]+ tokens/s", trained.run.stderr)
    assert [int(step) for step, _, _ in reports] == [50, 60], trained.run.stderr
    early, late = (float(loss) for _, loss, _ in reports)
    assert late < early - 0.3
    assert all(0 < float(churn) <= 100 for _, _, churn in reports)


def test_the_checkpoint_is_a_whole_transformers_model_of_the_asked_shape(trained: Trained) -> None:
    from transformers import AutoTokenizer, OlmoeForCausalLM

    checkpoint = trained.out / f"checkpoint-{STEPS}"
    model = OlmoeForCausalLM.from_pretrained(checkpoint, local_files_only=True)
    shape = (model.config.num_hidden_layers, model.config.num_experts, model.config.num_experts_per_tok)
    assert shape == (LAYERS, EXPERTS, TOP_K)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    assert tokenizer.decode(tokenizer("def café():\n    pass")["input_ids"]) == "def café():\n    pass"
    assert not list(trained.out.glob(".*")), "an unfinished checkpoint was left behind"


def test_held_out_routing_is_recorded_as_the_model_computed_it(trained: Trained) -> None:
    import torch
    from transformers import OlmoeForCausalLM

    assert trained.run.returncode == 0, trained.run.stderr
    losses = dict(re.findall(r"held-out loss  (\S+)  ([\d.]+)", trained.run.stdout))
    assert set(losses) == {"argparse_source", "pydoc"}
    assert all(3 < float(loss) < 8.3 for loss in losses.values()), losses  # ln(4096) = 8.32 is knowing nothing

    trace = mp.read_trace(trained.out / "trace")
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (
        2 * RECORDED,
        LAYERS,
        TOP_K,
        EXPERTS,
    )
    assert [trace.workloads[code] for code in trace.workload[:: trace.num_tokens - 1]] == ["argparse_source", "pydoc"]
    assert np.bincount(trace.sequence).tolist() == [SEQUENCE] * (2 * RECORDED // SEQUENCE)

    checkpoint = trained.out / f"checkpoint-{STEPS}"
    model = OlmoeForCausalLM.from_pretrained(checkpoint, local_files_only=True)
    settings = argparse.Namespace(text=[str(trained.text), "pydoc"], out=trained.out, load=checkpoint)
    domains, _ = script().load_domains(settings)
    for name, loss in losses.items():
        held_out = next(domain.held_out for domain in domains if domain.name == name)
        spread = torch.linspace(0, len(held_out) - 1, RECORDED // SEQUENCE).long()
        with torch.no_grad():
            output = model(input_ids=held_out[spread], labels=held_out[spread])
            logits = model(input_ids=held_out[spread], output_router_logits=True).router_logits
        assert float(output.loss) == pytest.approx(float(loss), abs=2e-3)
        chosen = torch.stack(list(logits), dim=1).topk(TOP_K, dim=-1).indices.sort(dim=-1).values.numpy()
        recorded = np.sort(trace.expert_ids[trace.workload == trace.workloads.index(name)], axis=-1)
        assert (recorded == chosen).mean() > 0.999  # another thread count may break a near-tie the other way


def test_a_loaded_checkpoint_is_recorded_again_without_training(trained: Trained, tmp_path: Path) -> None:
    checkpoint = trained.out / f"checkpoint-{STEPS}"
    arguments = ("--text", trained.text, "pydoc", "--record-tokens", RECORDED, "--batch", BATCH, "--device", "cpu")
    again = run_script("--out", tmp_path, "--load", checkpoint, *arguments)
    assert again.returncode == 0, again.stderr
    assert "step " not in again.stderr
    assert again.stdout == trained.run.stdout
    assert mp.read_trace(tmp_path / "trace").fingerprint == mp.read_trace(trained.out / "trace").fingerprint


def test_batches_draw_evenly_from_the_domains_and_never_from_the_held_out_tail(tmp_path: Path) -> None:
    import torch

    train_moe = script()
    sources = []
    for i in range(3):
        sources.append(str(tmp_path / f"domain{i}.txt"))
        Path(sources[-1]).write_text("".join(f"{i}{n:06d}\n" for n in range(20_000)), encoding="utf-8")
    domains, tokenizer = train_moe.load_domains(argparse.Namespace(text=sources, out=tmp_path, load=None))
    stream = train_moe.batches(domains, 4, seed=0)
    windows = torch.cat([next(stream) for _ in range(30)])
    drawn = [0, 0, 0]
    for window in windows:
        numbers = re.findall(r"^(\d)(\d{6})$", tokenizer.decode(window), flags=re.MULTILINE)[1:-1]
        assert len({which for which, _ in numbers}) == 1
        drawn[int(numbers[0][0])] += 1
        assert max(int(number) for _, number in numbers) < 18_000
    assert drawn == [40, 40, 40]


def test_docstrings_and_source_of_a_module_share_no_text(tmp_path: Path) -> None:
    train_moe = script()
    module = tmp_path / "module.py"
    module.write_text(
        '"""Top words."""\nX = 1  # kept\n\ndef f():\n    """Inner words,\n    two lines."""\n    return X\n'
    )
    assert train_moe.source_part(module, docstrings=True) == "Top words.\n\nInner words,\ntwo lines."
    assert train_moe.source_part(module, docstrings=False) == "X = 1  # kept\ndef f():\n    return X"
    module.write_text("def broken(:\n")
    assert train_moe.source_part(module, docstrings=False) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "--text nowhere.txt: no such file; give text files or words of pydoc"),
        (("--text", "pydoc", "pydoc"), "2 sources but the names pydoc"),
        (("--text", "{short}"), "short: 1 tokens; about 2560 are needed"),
        (("--hidden", "100"), "--hidden 100: expected a multiple of 32"),
        (("--experts", "4", "--top-k", "5"), "--top-k 5: expected at most --experts 4"),
        (("--steps", "0"), "--steps 0: expected 1 or more"),
        (("--load", "nowhere"), "--load nowhere: no config.json there"),
        (("--trace", "{short}"), "short.txt: exists already; remove it or give another folder"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a", encoding="utf-8")
    given = [argument.replace("{short}", str(short)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path / "out"), *given])
    with pytest.raises(SystemExit) as refusal:
        script().main()
    assert message in f"{refusal.value.code} {capsys.readouterr().err}"
