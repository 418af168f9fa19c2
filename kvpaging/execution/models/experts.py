"""A mixture of experts in place of an MLP (Shazeer et al. 2017), as Qwen3-MoE and Mixtral have it.

Knows no family: the names under which a checkpoint keeps the parts are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpaging.execution.model_config import ExpertsConfig
from kvpaging.execution.weights import Parameters


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family calls the parts of an expert."""

    gate: str
    up: str
    down: str


class ExpertsMLP:
    """Each token is computed by a few experts and their results are summed by weight."""

    def __init__(
        self,
        experts: ExpertsConfig,
        hidden_size: int,
        parameters: Parameters,
        names: ExpertNames,
    ) -> None:
        """Load the router and all experts from `parameters` (at the block's prefix)."""
        inner = experts.intermediate_size
        self._ops = parameters.ops
        self._num_chosen = experts.num_chosen
        self._normalize = experts.normalize
        self._router = parameters.whole_linear("gate", experts.num_experts, hidden_size)
        each = [parameters.at(f"experts.{index}.") for index in range(experts.num_experts)]
        self._gate_up = parameters.ops.prepare_experts(
            [one.linear((names.gate, names.up), (inner, inner), hidden_size) for one in each]
        )
        self._down = parameters.ops.prepare_experts(
            [one.linear((names.down,), (hidden_size,), inner) for one in each]
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, H] -> [T, H]`. A token's result depends on its own row only."""
        ops = self._ops
        experts, weights = self._route(x)  # [T, K] each, experts ascending
        expert_of_row = experts.flatten()
        rows = x.repeat_interleave(self._num_chosen, dim=0)  # [T * K, H]
        rows = ops.silu_mul(ops.grouped_linear(rows, self._gate_up, expert_of_row))
        rows = ops.grouped_linear(rows, self._down, expert_of_row)
        parts = rows.view(*experts.shape, -1).float() * weights.unsqueeze(2)
        total = parts[:, 0]
        for chosen in range(1, self._num_chosen):  # one order for every batch size
            total = total + parts[:, chosen]
        return total.to(x.dtype)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token its experts, ascending, int64, and their weights, float32."""
        logits = self._ops.linear_float32(x, self._router)
        probabilities = self._ops.log_softmax(logits).exp()
        # A stable sort, so that a tie takes the lower expert; topk leaves it open.
        chosen = probabilities.sort(dim=1, descending=True, stable=True).indices
        experts = chosen[:, : self._num_chosen].sort(dim=1).values
        weights = probabilities.gather(1, experts)
        if self._normalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return experts, weights
