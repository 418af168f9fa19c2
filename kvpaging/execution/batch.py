"""One step as tensors: what a model reads besides its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LastRows:
    """The rows of a step whose logits are wanted, each as a sequence of one query."""

    rows: torch.Tensor  # [S] int64, of T
    page_tables: torch.Tensor  # [S, max_pages] int32
    seq_lens: torch.Tensor  # [S] int32
    query_starts: torch.Tensor  # [S + 1] int32


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """T tokens of B sequences, behind each other; see `kernels.ops` for the meaning of each."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int32
    slot_mapping: torch.Tensor  # [T] int64, -1 = padding
    page_tables: torch.Tensor  # [B, max_pages] int32
    seq_lens: torch.Tensor  # [B] int32
    query_starts: torch.Tensor  # [B + 1] int32
    logit_rows: torch.Tensor  # [S] int64, rows of T from which tokens are drawn
    last_rows: LastRows | None = None
    """After the last layer's keys and values nothing but these is computed; None: all T are."""
