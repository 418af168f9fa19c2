"""Weights in fewer bits, the same for all paths: what a number becomes, and what it stands for."""

from __future__ import annotations

import torch

from kernels.errors import ShapeError

INT8_LARGEST = 127
"""Symmetric: -128 is not used."""
MAX_INT8_FEATURES = 65536
"""In-features of an int8 weight at most: longer sums might not fit into 32 bits."""

_ROWS_AT_ONCE = 512
"""Rows that are float32 at a time: within the caches."""


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take `[N, K]` floats to int8 `[N, K]` and a float32 scale for each row, `[N]`.

    `int8 * scale` is the nearest such number to the weight; a row's largest magnitude becomes 127.

    Raises:
        ValueError: the weight holds NaN or infinities.
    """
    whole = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = weight[start : start + _ROWS_AT_ONCE].float()
        largest = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))
        if not bool(largest.isfinite().all()):
            raise ValueError("the weight holds NaN or infinities, which int8 can't")
        scale = largest / INT8_LARGEST
        scales[start : start + len(rows)] = scale
        # So small a row that its inverse overflows: zeros.
        inverse = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, 1 / scale)
        whole[start : start + len(rows)] = (rows * inverse[:, None]).round_()
    return whole, scales


def no_int8_rows() -> ShapeError:
    """What `Linear.rows` of an int8 weight raises."""
    return ShapeError("an int8 weight gives no rows: an embedding is kept in the model's dtype")
