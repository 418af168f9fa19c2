"""Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in torch.

A counter-based generator: the number is a function of (key, counter), so nothing is stored and
nothing is shared between requests. Knows nothing about what the numbers are for.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox_4x32(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four 32-bit words for each counter under each key.

    Args:
        counter: four int64 tensors `[R]` that hold unsigned 32-bit words.
        key: two such tensors.

    Returns:
        Four such tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps as a signed number, but its 64 bits are those of the unsigned one.
        low_product = c0 * _MULTIPLIERS[0]
        high_product = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high_product >> 32) & _LOW) ^ c1 ^ k0,
            high_product & _LOW,
            ((low_product >> 32) & _LOW) ^ c3 ^ k1,
            low_product & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def uniform(
    seeds: torch.Tensor, output_indices: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """One number in [0, 1) per row, float64 `[R]`, from (seed, output index, position) alone.

    The seed's 64 bits are the key, low word first; the counter is (position, output index, 0, 0).
    53 bits of the first two words become the fraction.
    """
    seeds = seeds.to(torch.int64)
    zero = torch.zeros_like(seeds)
    counter = [
        positions.to(torch.int64) & _LOW,
        output_indices.to(torch.int64) & _LOW,
        zero,
        zero,
    ]
    first, second, _, _ = philox_4x32(counter, [seeds & _LOW, (seeds >> 32) & _LOW])
    return ((first >> 5) * 2**26 + (second >> 6)).to(torch.float64) * 2.0**-53
