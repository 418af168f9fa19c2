"""Rotary position embeddings (Su et al. 2021) and their stretched forms, as one table.

The frequencies are fixed at start from `max_model_len`. Forms that would choose them by the length
of the text at hand (dynamic NTK, LongRoPE's two sets) choose once, for the longest text that this
server admits: a key in the cache was already turned and can't be turned again when its sequence
grows, and pages are shared by sequences of all lengths.

Everything is computed in float64 and rounded once. Knows nothing of layers or checkpoints.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from kvpaging.base.errors import ConfigError
from kvpaging.execution.model_config import RopeConfig

_CHUNK_POSITIONS: Final = 8192
"""Positions whose angles are held in float64 at a time."""


def cos_sin_table(rope: RopeConfig, max_model_len: int, device: torch.device) -> torch.Tensor:
    """`[max_model_len, rotary_dim]` float32: cosines of the frequencies, then their sines.

    The attention factor of yarn and LongRoPE is multiplied in, once for queries and once for keys.
    """
    frequencies, attention_factor = inverse_frequencies(rope, max_model_len)
    half = len(frequencies)
    table = torch.empty(max_model_len, 2 * half, dtype=torch.float32)
    for start in range(0, max_model_len, _CHUNK_POSITIONS):
        rows = table[start : start + _CHUNK_POSITIONS]
        positions = torch.arange(start, start + len(rows), dtype=torch.float64)
        angles = torch.outer(positions, frequencies)
        rows[:, :half] = angles.cos() * attention_factor
        rows[:, half:] = angles.sin() * attention_factor
    return table.to(device)


def inverse_frequencies(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Radians per position, `[rotary_dim / 2]` float64, and the factor on cosines and sines."""
    match rope.kind:
        case "default":
            return _plain(rope.theta, rope.rotary_dim), 1.0
        case "linear":
            return _plain(rope.theta, rope.rotary_dim) / (rope.factor or 1.0), 1.0
        case "dynamic":
            return _dynamic(rope, max_model_len), 1.0
        case "llama3":
            return _llama3(rope), 1.0
        case "yarn":
            return _yarn(rope), _yarn_attention_factor(rope)
        case "longrope":
            return _longrope(rope, max_model_len), _longrope_attention_factor(rope)
    raise ConfigError(f"RoPE type {rope.kind!r} is not supported")


def _plain(theta: float, rotary_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return theta**-exponents


def _dynamic(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    """A larger base for longer texts ("NTK-aware", bloc97 and emozilla 2023)."""
    factor, trained = rope.factor or 1.0, rope.max_position_embeddings
    stretch = factor * max(max_model_len, trained) / trained - (factor - 1)
    theta = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return _plain(theta, rope.rotary_dim)


def _llama3(rope: RopeConfig) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1)."""
    frequencies = _plain(rope.theta, rope.rotary_dim)
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / (rope.factor or 1.0))


def _yarn_factor(rope: RopeConfig) -> float:
    return rope.factor or rope.max_position_embeddings / rope.original_max_position_embeddings


def _yarn(rope: RopeConfig) -> torch.Tensor:
    """YaRN (Peng et al. 2023, section 3.2): a ramp between kept and stretched, by dimension."""
    frequencies = _plain(rope.theta, rope.rotary_dim)

    def dimension_of(rotations: float) -> float:
        """The dimension that makes this many rotations within the trained length."""
        wavelength_ratio = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength_ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step rather than a division by zero
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float64) - low) / (high - low)
    stretched = ramp.clamp(0.0, 1.0)
    return frequencies * (1 - stretched + stretched / _yarn_factor(rope))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Sharper attention for longer texts (YaRN, section 3.4; `mscale` is DeepSeek's variant)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _yarn_factor(rope)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    """LongRoPE (Ding et al. 2024): a searched factor per frequency, one set for long texts."""
    is_long = max_model_len > rope.original_max_position_embeddings
    factors = torch.tensor(rope.long_factor if is_long else rope.short_factor, dtype=torch.float64)
    return _plain(rope.theta, rope.rotary_dim) / factors


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    original = rope.original_max_position_embeddings
    factor = rope.factor or rope.max_position_embeddings / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
