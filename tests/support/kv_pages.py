"""Pools full of NaN for the kernels' tests, in every dtype that pages may have."""

from __future__ import annotations

import torch

from kernels.ops import QUANTISED, KVPages
from kernels.reference.torch_ops import quantise


def poisoned_pool(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[torch.Tensor, KVPages]:
    """The bytes of a pool of three layers, page-major, and the middle layer's pages in it.

    All bits are set: every float is NaN, and so is the scale of every quantised key and value.
    """
    entries = num_kv_heads * page_size * head_dim * dtype.itemsize
    scales = num_kv_heads * page_size * 4 if dtype in QUANTISED else 0
    layer_bytes = 2 * (entries + scales)
    pool = torch.full((num_pages, 3 * layer_bytes), 255, dtype=torch.uint8, device=device)

    def part(begin: int, num_bytes: int, kind: torch.dtype, *shape: int) -> torch.Tensor:
        begin += layer_bytes
        return pool[:, begin : begin + num_bytes].view(kind).unflatten(1, shape)

    heads = (num_kv_heads, page_size)
    keys = part(0, entries, dtype, *heads, head_dim)
    values = part(entries, entries, dtype, *heads, head_dim)
    if not scales:
        return pool, KVPages(keys, values)
    key_scales = part(2 * entries, scales, torch.float32, *heads)
    value_scales = part(2 * entries + scales, scales, torch.float32, *heads)
    return pool, KVPages(keys, values, key_scales, value_scales)


def fill_page(pages: KVPages, page: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write the first tokens of a page: `keys, values [N, HKV, D]`."""
    for x, entries, scales in (
        (keys, pages.keys, pages.key_scales),
        (values, pages.values, pages.value_scales),
    ):
        x = x.transpose(0, 1)  # [HKV, N, D]
        if scales is None:
            entries[page, :, : x.shape[1]] = x
        else:
            entries[page, :, : x.shape[1]], scales[page, :, : x.shape[1]] = quantise(
                x, entries.dtype
            )


def as_stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What pages of `dtype` make of keys or values `[..., D]`."""
    if dtype not in QUANTISED:
        return x.to(dtype)
    entries, scales = quantise(x, dtype)
    return entries.float() * scales.unsqueeze(-1)


def read_pages(pages: KVPages) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values in float32, `[num_pages, HKV, page_size, D]`."""
    keys, values = pages.keys.float(), pages.values.float()
    if pages.key_scales is None or pages.value_scales is None:
        return keys, values
    return keys * pages.key_scales.unsqueeze(-1), values * pages.value_scales.unsqueeze(-1)
