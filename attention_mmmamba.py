"""Softmax attention of one new token over keys and values of a fixed size, in Triton.

Transformers' attention functions read a fixed-size cache whole, masked, with keys repeated for every query head. A
recorded step should read what is there, once: here each group's query heads share one pass over the keys and values up
to `length`, which stays on the device so that a captured step serves every length. The pass is split over programs,
whose results are then combined (flash decoding: arXiv 2311.01282, section 3).
"""

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_mmmamba import block_size, dot, dot_precision


SPLITS = 32  # programs that share the positions of one row and group


@triton.jit(do_not_specialize=["capacity", "mask_stride"])
def _split_kernel(
    q, k, v, mask, length, split_acc, split_softmax, capacity, scaling, mask_stride,
    GROUP: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads of one row and group over one split of the positions."""
    row_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    filled = tl.load(length)
    split_length = tl.cdiv(tl.cdiv(filled, SPLITS), BLOCK) * BLOCK
    begin, end = split * split_length, tl.minimum((split + 1) * split_length, filled)
    heads = (g < GROUP)[:, None] & (p < P)[None, :]
    q_g = tl.load(q + (row_head * GROUP + g)[:, None] * P + p[None, :], mask=heads, other=0.0)
    row_max, row_sum = tl.full((BLOCK_G,), -1e30, tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    for first in range(begin, end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        seen = j < end
        if MASKED:
            seen = seen & (tl.load(mask + (row_head // KV_HEADS) * mask_stride + j, mask=seen, other=0) != 0)
        offsets = (row_head * capacity + j)[:, None] * P + p[None, :]
        k_j = tl.load(k + offsets, mask=seen[:, None] & (p < P)[None, :], other=0.0)
        v_j = tl.load(v + offsets, mask=seen[:, None] & (p < P)[None, :], other=0.0)
        scores = tl.where(seen[None, :], dot(q_g, tl.trans(k_j), PRECISION) * scaling, -1e30)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp(scores - new_max[:, None]), 0.0)
        alpha = tl.exp(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(weights, 1)
        acc = acc * alpha[:, None] + dot(weights.to(v_j.dtype), v_j, PRECISION)
        row_max = new_max
    split_head = (row_head * SPLITS + split) * GROUP + g
    tl.store(split_acc + split_head[:, None] * P + p[None, :], acc, mask=heads)
    tl.store(split_softmax + split_head * 2, row_max, mask=g < GROUP)
    tl.store(split_softmax + split_head * 2 + 1, row_sum, mask=g < GROUP)


@triton.jit
def _combine_kernel(
    split_acc, split_softmax, out, GROUP: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Puts the splits of one head together."""
    row_head, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, p = tl.arange(0, SPLITS), tl.arange(0, BLOCK_P)
    split_head = (row_head * SPLITS + s) * GROUP + g
    row_max, row_sum = tl.load(split_softmax + split_head * 2), tl.load(split_softmax + split_head * 2 + 1)
    alpha = tl.exp(row_max - tl.max(row_max, 0))
    acc = tl.load(split_acc + split_head[:, None] * P + p[None, :], mask=(p < P)[None, :], other=0.0)
    result = tl.sum(acc * alpha[:, None], 0) / tl.maximum(tl.sum(row_sum * alpha, 0), 1e-30)
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
    split_acc = torch.empty(batch * kv_heads, SPLITS, group, head_dim, device=q.device)
    split_softmax = torch.empty(batch * kv_heads, SPLITS, group, 2, device=q.device)
    _split_kernel[batch * kv_heads, SPLITS](
        q, k, v, length if mask is None else mask.view(torch.uint8), length, split_acc, split_softmax, capacity,
        scaling, 0 if mask is None else mask.stride(0), GROUP=group, P=head_dim, SPLITS=SPLITS, KV_HEADS=kv_heads,
        BLOCK_G=block_size(group), BLOCK_P=block, BLOCK=64 if block <= 128 else 32, MASKED=mask is not None,
        PRECISION=dot_precision(), num_stages=2 if block <= 128 else 1,
    )  # fmt: skip
    _combine_kernel[batch * kv_heads, group](
        split_acc, split_softmax, out, GROUP=group, P=head_dim, SPLITS=SPLITS, BLOCK_P=block
    )
    return out
