"""Balance by the router in training: a bias moved without a loss; auxiliary losses over the whole batch or by sequence.

Both watch the routers of the layers of experts, and count over all ranks. T tokens of this rank, E experts, K a token,
L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...placement.errors import InputError, nearest
from .coordination import sum_everywhere
from .data_parallel import expert_layers
from .experts import PlacedExperts
from .mesh import ExpertMesh

Scope = Literal["batch", "sequence"]
BIASES = ("e_score_correction_bias", "expert_bias", "bias")
"""What routers call the bias that only decides who is chosen: Transformers', Megatron-LM's and torchtitan's, ours."""


class BiasBalancing:
    """Balance without a loss (Wang et al. 2024, DeepSeek-V3): after each step, the bias of an expert with more tokens
    than the mean falls by `rate`, that of one with fewer rises. Every rank makes one and calls `step()` as often.

    The bias is a buffer of the router, the same on all ranks; it decides who is chosen and is no part of gate weights.

    tokens_per_expert: [L, E] of the step before, over all ranks, in the order of layers.

    Args:
        model: with layers of placed experts whose routers have such a bias, wrapped or not.
        rate: of one step.

    Raises:
        InputError: a router has no such bias.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        self._layers = _layers(model)
        self._rate = rate
        self._biases = [_bias(model, name, module) for name, module in self._layers]
        mesh = self._layers[0][1].mesh
        self._counts = [torch.zeros(m.num_experts, dtype=torch.int64, device=mesh.device) for _, m in self._layers]
        self.tokens_per_expert = torch.stack(self._counts)
        self._hooks = [
            module.register_forward_pre_hook(self._counting(place)) for place, (_, module) in enumerate(self._layers)
        ]

    def _counting(self, place: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module.training and not _recomputing():
                chosen = args[1].flatten()
                self._counts[place].scatter_add_(0, chosen.long(), torch.ones_like(chosen, dtype=torch.int64))

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Moves the biases by the tokens since the last step; call after optimizer.step()."""
        total_LE = sum_everywhere(self._layers[0][1].mesh, torch.stack(self._counts))
        self.tokens_per_expert = total_LE
        for bias_E, total_E, count_E in zip(self._biases, total_LE, self._counts, strict=True):
            bias_E.add_(self._rate * torch.sign(total_E.float().mean() - total_E))
            count_E.zero_()

    def close(self) -> None:
        """Stops counting."""
        for hook in self._hooks:
            hook.remove()


def balance_loss(
    score_TE: Tensor, expert_TK: Tensor, *, mesh: ExpertMesh | None = None, sequence_length: int | None = None
) -> Tensor:
    """E sum_e f_e P_e / K: f_e how many tokens chose an expert, P_e its mean part of the scores (Shazeer et al. 2017,
    Fedus et al. 2021; by sequence as DeepSeek-V3, equations 17 to 20). 1 where all is even.

    Args:
        score_TE: softmax or sigmoid scores.
        expert_TK: who was chosen.
        mesh: count over the tokens of all its ranks; the mean of the losses of all ranks is then that of the whole
            batch, to the gradient. Without, over this rank's.
        sequence_length: of the sequences that the tokens are, one behind another; the mean of theirs.

    Raises:
        InputError: both, or tokens that are no whole sequences.
    """
    # Numbers of tokens are no numbers of half precision.
    score_TE = score_TE.float()
    tokens, experts = score_TE.shape
    part_TE = score_TE / score_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    chosen_TE = torch.zeros_like(score_TE).scatter_(1, expert_TK, 1.0)
    scale = experts / expert_TK.shape[1]
    if sequence_length is not None:
        if mesh is not None or sequence_length < 1 or tokens % sequence_length:
            raise InputError(
                f"balance_loss: sequence_length ({sequence_length}) must divide {tokens} tokens; it goes without mesh"
            )
        shape = (-1, sequence_length, experts)
        return scale * (chosen_TE.view(shape).mean(1) * part_TE.view(shape).mean(1)).sum(dim=1).mean()
    counts = torch.cat([chosen_TE.sum(dim=0), score_TE.new_tensor([float(tokens), 1.0])]).detach()
    if mesh is not None:
        counts = sum_everywhere(mesh, counts)
    total, ranks = counts[-2].clamp(min=1.0), counts[-1]
    return scale * ranks * ((counts[:-2] / total) * part_TE.sum(dim=0) / total).sum()


class BalanceLoss:
    """The auxiliary loss of all layers: `(loss + balance()).backward()`, on every rank.

    Args:
        model: with layers of placed experts whose routers give (logits, weights, ids), as ours and Transformers' do.
        coefficient: of the mean over layers.
        scores: "softmax" or "sigmoid", as the router has it.
        over: "batch", the tokens of all ranks in this forward, or "sequence", each on its own.
        sequence_length: for "sequence".

    Raises:
        InputError: an unknown setting, or a layer without such a router.
    """

    def __init__(
        self,
        model: nn.Module,
        coefficient: float = 0.01,
        *,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        over: Scope = "batch",
        sequence_length: int | None = None,
    ) -> None:
        if over not in get_args(Scope):
            raise InputError(f"over {over!r} is unknown; {nearest(str(over), get_args(Scope))}")
        if scores not in ("softmax", "sigmoid"):
            raise InputError(f"scores {scores!r} is unknown; {nearest(str(scores), ('softmax', 'sigmoid'))}")
        if (over == "sequence") != (sequence_length is not None):
            raise InputError("sequence_length goes with over='sequence', and is needed there")
        self._coefficient, self._scores, self._sequence_length = coefficient, scores, sequence_length
        layers = _layers(model)
        self._mesh = layers[0][1].mesh if over == "batch" else None
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._hooks = [_router(model, name).register_forward_hook(self._see) for name, _ in layers]

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not _recomputing():
            logits, _, chosen = output
            self._seen.append((logits, chosen))

    def __call__(self) -> Tensor:
        """The loss of the forward passes since the last call, which are forgotten.

        Raises:
            InputError: none was seen.
        """
        if not self._seen:
            raise InputError("BalanceLoss saw no forward pass with gradients since it was last asked")
        losses = []
        for logits, chosen in self._seen:
            logit_TE = logits.reshape(-1, logits.shape[-1]).float()
            score_TE = logit_TE.softmax(dim=-1) if self._scores == "softmax" else logit_TE.sigmoid()
            expert_TK = chosen.reshape(len(score_TE), -1)
            losses.append(balance_loss(score_TE, expert_TK, mesh=self._mesh, sequence_length=self._sequence_length))
        self._seen = []
        return self._coefficient * torch.stack(losses).mean()

    def close(self) -> None:
        """Stops watching."""
        for hook in self._hooks:
            hook.remove()


def _recomputing() -> bool:
    """Whether this forward is activation checkpointing's second, in backward."""
    return torch._C._current_graph_task_id() != -1


def _layers(model: nn.Module) -> list[tuple[str, PlacedExperts]]:
    layers = expert_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no layer of placed experts; build or parallelize it first")
    return layers


def _beside(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the block that the experts called `name` are in, those of the experts aside."""
    block = model.get_submodule(name.rpartition(".")[0])
    for path, module in block.named_modules():
        if not path.split(".")[0].endswith("experts"):
            yield path, module


def _bias(model: nn.Module, name: str, module: PlacedExperts) -> Tensor:
    for _, part in _beside(model, name):
        for key in BIASES:
            value = dict(part.named_buffers(recurse=False)).get(key)
            if value is not None and value.shape == (module.num_experts,):
                return value
    raise InputError(
        f"{name}: no router with a buffer {', '.join(BIASES)} of {module.num_experts} values beside it; "
        "BiasBalancing wants routers whose bias decides who is chosen (SigmoidRouter, DeepSeek-V3's)"
    )


def _router(model: nn.Module, name: str) -> nn.Module:
    for path, part in _beside(model, name):
        if path in ("gate", "router"):
            return part
    raise InputError(f"{name}: no module 'gate' or 'router' beside it; call balance_loss with its scores instead")
