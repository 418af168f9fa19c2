"""How decode attention on a GPU splits keys, and the memory that takes. Needs no Triton."""

from __future__ import annotations

from typing import Final

SPLIT: Final = 256
"""Keys after which a row's sums start anew, at absolute positions. A part of the numerics."""
FEW_QUERIES: Final = 16
"""So many queries may go to the decode kernel, one program each, whoever they belong to."""
_FLOAT_BYTES: Final = 4
_STATE_FLOATS: Final = 2


def part_bytes(num_seqs: int, num_keys: int, num_heads: int, head_dim: int) -> int:
    """The most that one call of `paged_attention` keeps of splits before it merges them.

    `num_seqs`: of the call, at most; `num_keys`: what its page tables can hold, not what the
    sequences have.
    """
    num_splits = -(-num_keys // SPLIT)
    if num_splits <= 1:
        return 0
    rows = max(num_seqs, FEW_QUERIES)
    return rows * num_heads * num_splits * (head_dim + _STATE_FLOATS) * _FLOAT_BYTES
