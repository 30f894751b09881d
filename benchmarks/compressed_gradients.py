"""Where compression's error of gradients comes from: forward or backward, routing that changes, inputs, late layers.

    python -m benchmarks compressed_training --out runs/lsh --text TEXT/*.txt --save --runs plain
    python -m benchmarks compressed_gradients --out runs/lsh --text TEXT/*.txt --checkpoint runs/lsh/plain-0

One batch (--batch sequences) of held-out text through a trained model, as --devices would send it, against the same
without compression. Errors are roots of mean squares of the difference over that of the exact: of layers' outputs, of
the gradient of the experts' inputs and of the weights' gradients. Means over layers and --senders batches; LSH's also
over rotations. With routing frozen each token has the experts of the exact pass, with the gate weights of its own. The
weights' gradients are those of all senders' batches together, as a step has them.

The second table says what members of a cluster have in common: how far tokens are from their mean, |x - c| over |x|,
and how far the gradients of their outputs are from theirs, beside what that would be of gradients that have nothing in
common, the root of 1 - clusters over members.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from compressed_training import add_trained_arguments, trained_model
from emulated_devices import Part, PartlyCompressed, compress_parts
from runner import Report
from torch import Tensor, nn

from moeplace.runtime import LSHCompression, QuantizedRows
from moeplace.runtime.moe.data_parallel import expert_layers
from moeplace.runtime.moe.lsh import CompressedMetadata

Settings = LSHCompression | QuantizedRows
COLUMNS = ("routing that changed", "outputs", "inputs' gradient", "experts' gradient", "routers'", "other weights'")


class Pass:
    """Outputs, gradients and routing of the model's layers in one forward and backward.

    outputs, inputs: [T, D] of each layer's experts, the latter gradients. experts, gates: [T, K] of each layer. read,
    told: [T, D] what experts read, and the gradients of their outputs.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, frozen: Pass | None = None) -> None:
        self.outputs: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.experts: list[Tensor] = []
        self.gates: list[Tensor] = []
        self.told: list[Tensor] = []
        layers = [layer for _, layer in expert_layers(model)]
        read: list[Tensor] = []
        told: list[Tensor] = []

        def before(_: nn.Module, given: Any) -> Any:
            # A view of its own: what flows into it comes from the experts alone, not from the router.
            x = given[0].view_as(given[0])
            x.retain_grad()
            read.append(x)
            return x, *given[1:]

        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            self.outputs.append(output.detach().flatten(0, -2))
            output.retain_grad()
            told.append(output)

        def routed(_: nn.Module, __: Any, result: Any) -> Any:
            logits, weights, chosen = result
            self.experts.append(chosen)
            self.gates.append(weights.detach())
            if frozen is None:
                return result
            chosen = frozen.experts[len(self.experts) - 1]
            probabilities = logits.float().softmax(dim=-1).gather(-1, chosen)
            if model.config.norm_topk_prob:
                probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
            return logits, probabilities.to(weights.dtype), chosen

        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_pre_hook(before).remove)
                hooks.callback(layer.register_forward_hook(after).remove)
            for name, module in model.named_modules():
                if name.endswith("mlp.gate"):
                    hooks.callback(module.register_forward_hook(routed).remove)
            model(input_ids=tokens, labels=tokens, output_router_logits=True).loss.backward()
        for grads, values in ((self.inputs, read), (self.told, told)):
            for value in values:
                assert value.grad is not None
                grads.append(value.grad.flatten(0, -2))
        self.read = [x.detach().flatten(0, -2) for x in read]


def kind_of(name: str) -> str:
    """Which of the table's columns a weight's gradient belongs to."""
    if ".experts." in name:
        return "experts' gradient"
    return "routers'" if name.endswith("mlp.gate.weight") else "other weights'"


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    square = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
    return (square / sum(float(b.double().square().sum()) for b in exact)) ** 0.5


def gradients_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Of all weights by kind, and sets them to zero."""
    found: dict[str, list[Tensor]] = {}
    for name, value in model.named_parameters():
        if value.grad is not None:
            found.setdefault(kind_of(name), []).append(value.grad)
            value.grad = None
    return found


def errors_of(
    model: Any, batches: list[Tensor], exact: list[Pass], weights: dict[str, list[Tensor]], frozen: bool
) -> dict[str, float]:
    """Of the model as it is, by column."""
    passes = [Pass(model, tokens, one if frozen else None) for tokens, one in zip(batches, exact, strict=True)]
    found = gradients_of(model)

    def mean(error: Callable[[Pass, Pass, int], float]) -> float:
        layers = range(len(exact[0].outputs))
        return statistics.fmean(error(a, b, n) for a, b in zip(passes, exact, strict=True) for n in layers)

    return {
        "routing that changed": mean(lambda a, b, n: _differing(a.experts[n], b.experts[n])),
        "outputs": mean(lambda a, b, n: relative([a.outputs[n]], [b.outputs[n]])),
        "inputs' gradient": mean(lambda a, b, n: relative([a.inputs[n]], [b.inputs[n]])),
        **{kind: relative(found[kind], weights[kind]) for kind in COLUMNS[3:]},
    }


def _differing(a_TK: Tensor, b_TK: Tensor) -> float:
    return float((a_TK.sort(dim=1).values != b_TK.sort(dim=1).values).any(dim=1).float().mean())


def in_common(model: Any, exact: list[Pass], rate: float, lloyd_steps: int, devices: int) -> tuple[float, ...]:
    """Of members of clusters: (how many there are of one, |x - c| over |x|, the same of their outputs' gradients, and
    of gradients that have nothing in common)."""
    size, inputs, gradients, nothing = [], [], [], []
    settings = LSHCompression(rate=rate, lloyd_steps=lloyd_steps)
    for number, (_, layer) in enumerate(expert_layers(model)):
        dispatcher = PartlyCompressed(layer, settings, devices).dispatcher
        for one in exact:
            gate_TK = one.gates[number].float()
            metadata = dispatcher.dispatch(one.read[number], one.experts[number], gate_TK)
            dispatcher.receive(metadata)
            assert isinstance(metadata, CompressedMetadata)
            row_N = metadata.row_TK.flatten()
            member_n = (row_N < len(metadata.slot_M)).nonzero().flatten()
            token_n = member_n.div(gate_TK.shape[1], rounding_mode="floor")
            told_nD = one.told[number][token_n] * gate_TK.flatten()[member_n, None]
            clusters = len(row_N[member_n].unique())
            size.append(len(member_n) / clusters)
            inputs.append(_from_mean(one.read[number][token_n], row_N[member_n]))
            gradients.append(_from_mean(told_nD, row_N[member_n]))
            nothing.append((1 - clusters / len(member_n)) ** 0.5)
    return tuple(map(statistics.fmean, (size, inputs, gradients, nothing)))


def _from_mean(value_nD: Tensor, row_n: Tensor) -> float:
    rows = int(row_n.max()) + 1
    sum_MD = value_nD.new_zeros(rows, value_nD.shape[1]).index_add_(0, row_n, value_nD)
    mean_MD = sum_MD / torch.bincount(row_n, minlength=rows).clamp(min=1)[:, None]
    return relative([mean_MD[row_n]], [value_nD])


def cases(layers: int) -> list[tuple[str, Settings, Part, int, bool]]:
    """(name, settings, what is compressed, from which layer on, whether routing is frozen)."""
    hashes = LSHCompression(rate=0.2, lloyd_steps=0)
    lsh = LSHCompression(rate=0.2)
    int4, int8 = QuantizedRows.of("int4"), QuantizedRows.of("int8")
    return [
        ("hashes alone, 20 % of rows", hashes, "all", 0, False),
        ("routing frozen", hashes, "all", 0, True),
        ("forward only", hashes, "forward", 0, False),
        ("backward only", hashes, "backward", 0, False),
        ("experts' inputs only", hashes, "inputs", 0, False),
        ("late half of layers", hashes, "all", layers // 2, False),
        ("late half of layers, backward only", hashes, "backward", layers // 2, False),
        ("Lloyd, 20 % of rows", lsh, "all", 0, False),
        ("routing frozen", lsh, "all", 0, True),
        ("forward only", lsh, "forward", 0, False),
        ("backward only", lsh, "backward", 0, False),
        ("experts' inputs only", lsh, "inputs", 0, False),
        ("Lloyd, 50 % of rows", LSHCompression(rate=0.5), "all", 0, False),
        ("hashes alone, 74 % of rows, int4", LSHCompression(rate=0.74, lloyd_steps=0, rows=int4), "all", 0, False),
        ("Lloyd, 70 % of rows, int4", LSHCompression(rate=0.7, rows=int4), "all", 0, False),
        ("Lloyd, 35 % of rows, int8", LSHCompression(rate=0.35, rows=int8), "all", 0, False),
        ("int4", int4, "all", 0, False),
        ("routing frozen", int4, "all", 0, True),
        ("forward only", QuantizedRows("int4", "int4", None), "all", 0, False),
        ("backward only", QuantizedRows(None, None, "int4"), "all", 0, False),
        ("fp8", QuantizedRows.of("fp8"), "all", 0, False),
        ("int8", int8, "all", 0, False),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained_arguments(parser)
    parser.add_argument("--rotations", type=int, default=2, help="to average over")


def run(options: argparse.Namespace, report: Report) -> None:
    model, batches = trained_model(options)
    exact = [Pass(model, tokens) for tokens in batches]
    weights = gradients_of(model)
    table = report.table("Errors of gradients", ("compressed", *COLUMNS), dict.fromkeys(COLUMNS, ".3f"))
    own = [layer.forward for _, layer in expert_layers(model)]
    for name, settings, part, first_layer, frozen in cases(options.layers):
        lossy = isinstance(settings, LSHCompression)
        trials = []
        for seed in range(options.rotations if lossy else 1):
            chosen = replace(settings, seed=seed) if isinstance(settings, LSHCompression) else settings
            compress_parts(model, chosen, options.devices, part, first_layer)
            trials.append(errors_of(model, batches, exact, weights, frozen))
            for (_, layer), forward in zip(expert_layers(model), own, strict=True):
                layer.forward = forward  # type: ignore[method-assign]
        table.row(name, *(statistics.fmean(trial[column] for trial in trials) for column in COLUMNS))
    formats = {"members of one": ".1f"} | dict.fromkeys(("tokens", "gradients", "nothing in common"), ".3f")
    common = report.table("What members of a cluster have in common", ("clusters", *formats), formats)
    for name, rate, steps in (("hashes alone, 20 %", 0.2, 0), ("Lloyd, 20 %", 0.2, 2), ("Lloyd, 50 %", 0.5, 2)):
        with torch.no_grad():
            common.row(name, *in_common(model, exact, rate, steps, options.devices))
    dist.destroy_process_group()
