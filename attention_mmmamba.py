"""Softmax attention of one new token over keys and values of a fixed size, in Triton.

Transformers' attention functions read a fixed-size cache whole, masked, with keys repeated for every query head. A
recorded step should read what is there, once: here each group's query heads share one pass over the keys and values up
to `length`, which stays on the device so that a captured step serves every length. The pass is split over programs,
whose parts are then put together (flash decoding: arXiv 2311.01282, section 3).
"""

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_mmmamba import block_size, dot, dot_precision


SPLITS = 32


@triton.jit(do_not_specialize=["capacity", "mask_stride"])
def _part_kernel(
    q, k, v, mask, length, sums, scales, capacity, scaling, mask_stride,
    GROUP: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row's and group's heads over one part of the positions: weighted values, their largest score and weight."""
    row_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    read = tl.load(length)
    share = tl.cdiv(tl.cdiv(read, SPLITS), BLOCK) * BLOCK
    begin, end = part * share, tl.minimum((part + 1) * share, read)
    heads = (g < GROUP)[:, None] & (p < P)[None, :]
    q_g = tl.load(q + (row_head * GROUP + g)[:, None] * P + p[None, :], mask=heads, other=0.0)
    best, weight = tl.full((BLOCK_G,), -1e30, tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    values = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    for first in range(begin, end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        inside = j < end
        if MASKED:
            inside = inside & (tl.load(mask + (row_head // KV_HEADS) * mask_stride + j, mask=inside, other=0) != 0)
        places = (row_head * capacity + j)[:, None] * P + p[None, :]
        k_j = tl.load(k + places, mask=inside[:, None] & (p < P)[None, :], other=0.0)
        v_j = tl.load(v + places, mask=inside[:, None] & (p < P)[None, :], other=0.0)
        scores = tl.where(inside[None, :], dot(q_g, tl.trans(k_j), PRECISION) * scaling, -1e30)
        new = tl.maximum(best, tl.max(scores, 1))
        powers = tl.where(inside[None, :], tl.exp(scores - new[:, None]), 0.0)
        fade = tl.exp(best - new)
        weight = weight * fade + tl.sum(powers, 1)
        values = values * fade[:, None] + dot(powers.to(v_j.dtype), v_j, PRECISION)
        best = new
    place = (row_head * SPLITS + part) * GROUP + g
    tl.store(sums + place[:, None] * P + p[None, :], values, mask=heads)
    tl.store(scales + place * 2, best, mask=g < GROUP)
    tl.store(scales + place * 2 + 1, weight, mask=g < GROUP)


@triton.jit
def _whole_kernel(
    sums, scales, out, GROUP: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Puts the parts of one head together."""
    row_head, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, p = tl.arange(0, SPLITS), tl.arange(0, BLOCK_P)
    place = (row_head * SPLITS + s) * GROUP + g
    best, weight = tl.load(scales + place * 2), tl.load(scales + place * 2 + 1)
    fade = tl.exp(best - tl.max(best, 0))
    values = tl.load(sums + place[:, None] * P + p[None, :], mask=(p < P)[None, :], other=0.0)
    result = tl.sum(values * fade[:, None], 0) / tl.maximum(tl.sum(weight * fade, 0), 1e-30)
    tl.store(out + (row_head * GROUP + g) * P + p, result.to(out.dtype.element_ty), mask=p < P)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: Tensor, scaling: float) -> Tensor:
    """Attention of one token.

    Args:
        q: (B, H, P), contiguous.
        k: (B, K, capacity, P), contiguous.
        v: As `k`.
        mask: (B, capacity), bool, whose last axis is contiguous: which positions are seen; all if None.
        length: (1,), int32: positions from there on are not there yet.
        scaling: Of the scores.

    Returns:
        (B, H, P); 0 where a row sees no position.
    """
    (batch, heads, head_dim), (kv_heads, capacity) = q.shape, k.shape[1:3]
    group, block = heads // kv_heads, block_size(head_dim)
    out = torch.empty_like(q)
    sums = torch.empty(batch * kv_heads, SPLITS, group, head_dim, device=q.device)
    scales = torch.empty(batch * kv_heads, SPLITS, group, 2, device=q.device)
    _part_kernel[batch * kv_heads, SPLITS](
        q, k, v, length if mask is None else mask.view(torch.uint8), length, sums, scales, capacity, scaling,
        0 if mask is None else mask.stride(0), GROUP=group, P=head_dim, SPLITS=SPLITS, KV_HEADS=kv_heads,
        BLOCK_G=block_size(group), BLOCK_P=block, BLOCK=64 if block <= 128 else 32, MASKED=mask is not None,
        PRECISION=dot_precision(), num_stages=2 if block <= 128 else 1,
    )  # fmt: skip
    _whole_kernel[batch * kv_heads, group](sums, scales, out, GROUP=group, P=head_dim, SPLITS=SPLITS, BLOCK_P=block)
    return out
