"""The operations of `ssm_mmmamba` as Triton kernels: nothing to compile at install.

Rows of a batch, padded rows and packed sequences are one case here: steps lie in one flat axis, and `Chunks` says
which of them belong together. Letters as in `ssm_mmmamba`; T is all steps.

The scan (arXiv 2405.21060, section 6) is four kernels, named as in Mamba-2: log decays (chunk cumsum), what each chunk
writes to the state (chunk state), the states passed from chunk to chunk (state passing), what each step reads (chunk
scan). Query heads read the key/value head of their group in place. The backward pass recomputes the states, so that
only inputs are saved.

The log decay between two steps j <= i of a chunk is a difference of cumulative sums, which are therefore held as two
fp32 numbers each. Its gradient is decay * dt_j (q_i . k_j)(dy_i . v_j); that of the log decay at one step t is the sum
of what crosses t: pairs j < t <= i, reads at t or later of the state that entered the chunk, writes before t to the
state that leaves it, and the state that passes through.

Launches have fixed block sizes: a first call compiles each kernel once per dtype and model, whatever the lengths;
nothing is autotuned.
"""

import os
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ssm_mmmamba import CHUNK_SIZE, Backend, Sequences


try:  # Transformers wants every import outside of `try` installed before it loads a model.
    import triton
    import triton.language as tl
except ImportError:
    raise


CHUNK = CHUNK_SIZE
CONV_STEPS = 32  # steps of a chunk that one program convolves
NORM_PROGRAMS = 512  # programs that share the rows of a norm's gradient
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Chunks(NamedTuple):
    """How T packed steps are cut into chunks of at most `CHUNK` steps of one sequence.

    Attributes:
        table: (chunks, 3), int32: first step, step after the last, sequence. Rows after the last chunk are empty.
        cu_seqlens: (S + 1,), int32: where each sequence begins, and T.
        first_chunk: (S,), int32: the first chunk of each sequence.
        num_chunks: (S,), int32: how many chunks it has.
    """

    table: Tensor
    cu_seqlens: Tensor
    first_chunk: Tensor
    num_chunks: Tensor

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, tokens: int) -> "Chunks":
        """Args: cu_seqlens (S + 1,), ascending, from 0 to `tokens`. Does not wait for the device."""
        lengths = cu_seqlens.diff()
        num_chunks = (lengths + CHUNK - 1) // CHUNK
        cu_chunks = num_chunks.cumsum(0)
        first_chunk = cu_chunks - num_chunks
        chunk = torch.arange(tokens // CHUNK + len(lengths), device=cu_seqlens.device)  # as many as there may be
        sequence = torch.searchsorted(cu_chunks, chunk, right=True).clamp(max=len(lengths) - 1)
        start = cu_seqlens[sequence] + (chunk - first_chunk[sequence]) * CHUNK
        end = torch.minimum(start + CHUNK, cu_seqlens[sequence + 1])
        start = torch.minimum(start, end)  # beyond the last chunk: empty
        table = torch.stack([start, end, sequence], 1)
        return cls(table.int(), cu_seqlens.int(), first_chunk.int(), num_chunks.int())

    @classmethod
    @lru_cache(maxsize=64)
    def from_rows(cls, rows: int, length: int, device: torch.device) -> "Chunks":
        """Rows of `length` valid steps each."""
        return cls.from_cu_seqlens(torch.arange(rows + 1, device=device) * length, rows * length)

    @classmethod
    def of(cls, x: Tensor, sequences: Sequences | None) -> "Chunks":
        """Those of the rows of x (B, L, ...), or of the `sequences` packed in x (1, T, ...)."""
        if sequences is None:
            return cls.from_rows(*x.shape[:2], x.device)
        if cls not in sequences.derived:
            sequences.derived[cls] = cls.from_cu_seqlens(sequences.cu_seqlens, x.shape[1])
        return sequences.derived[cls]


def _rows(x: Tensor) -> Tensor:
    """x (T, ...), copied unless each row is contiguous in itself; how far apart rows are does not matter."""
    step = 1
    for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
        if size > 1 and stride != step:
            return x.contiguous()
        step *= size
    return x


def block_size(size: int, minimum: int = 16) -> int:
    """The power of two that holds `size`; `tl.dot` needs at least 16."""
    return max(minimum, triton.next_power_of_2(size))


def dot_precision() -> str:
    """`input_precision` of fp32 products, by `torch.set_float32_matmul_precision`."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# --- scan -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_tile(base, rows, stride, row_mask, columns, width):
    """Rows `rows` of a matrix whose rows are `stride` apart, zeros outside."""
    mask = row_mask[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`tl.dot` that works in Triton's interpreter, too."""
    if INTERPRETED:  # its bf16 is a bare uint16; the products of two bf16 numbers are exact in fp32
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _dot_in_dtype_of_a(a, b, PRECISION: tl.constexpr):
    """With b, which may be a state in fp32, in a's dtype; unless that is fp16, whose range a state may leave."""
    if a.dtype == tl.float16 and b.dtype == tl.float32:
        return dot(a.to(tl.float32), b, "tf32")
    else:
        return dot(a, b.to(a.dtype), PRECISION)


@triton.jit
def _matmul(
    a, a_rows, a_stride, a_mask, b, b_columns, b_stride,
    INNER: tl.constexpr, WIDTH: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a times columns of the matrix b (INNER, WIDTH)."""
    acc = tl.zeros((a_rows.shape[0], b_columns.shape[0]), tl.float32)
    for first in range(0, INNER, BLOCK_INNER):
        w = first + tl.arange(0, BLOCK_INNER)
        a_tile = _load_tile(a, a_rows, a_stride, a_mask, w, INNER)
        acc += _dot_in_dtype_of_a(a_tile, _load_tile(b, w, b_stride, w < INNER, b_columns, WIDTH), PRECISION)
    return acc


@triton.jit
def _matmul_transposed(
    a, a_rows, a_stride, a_mask, b, b_rows, b_stride, b_mask,
    INNER: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a times rows of b, both of width INNER."""
    acc = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for first in range(0, INNER, BLOCK_INNER):
        w = first + tl.arange(0, BLOCK_INNER)
        a_tile = _load_tile(a, a_rows, a_stride, a_mask, w, INNER)
        b_tile = tl.trans(_load_tile(b, b_rows, b_stride, b_mask, w, INNER))
        acc += _dot_in_dtype_of_a(a_tile, b_tile, PRECISION)
    return acc


@triton.jit
def _chunk_bounds(table, chunk):
    return tl.load(table + 3 * chunk).to(tl.int64), tl.load(table + 3 * chunk + 1).to(tl.int64)


@triton.jit
def _log_decay(dA_cumsum, rest_offset, t, mask):
    """The log decay from the chunk's start through steps t, as two fp32 numbers whose sum it is."""
    return tl.load(dA_cumsum + t, mask=mask, other=0.0), tl.load(dA_cumsum + rest_offset + t, mask=mask, other=0.0)


@triton.jit
def _decay_between(high_to, rest_to, high_from, rest_from):
    """The decay between two steps of a chunk. Both differences are exact enough for any segment, however short."""
    return tl.exp((high_to - high_from) + (rest_to - rest_from))


@triton.jit(do_not_specialize=["tokens"])
def _chunk_cumsum_kernel(dt, A, dA_cumsum, table, tokens, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """dA_cumsum (2, H, T): the log decay from the chunk's start through each step, summed in fp64, and what rounding
    it to fp32 leaves over.

    In fp32 alone a large step takes the digits of the short segments behind it.
    """
    head = tl.program_id(1)
    start, end = _chunk_bounds(table, tl.program_id(0))
    t = start + tl.arange(0, CHUNK)
    dA = tl.load(dt + t * HEADS + head, mask=t < end, other=0.0) * tl.load(A + head)
    dA = tl.where(dA < -128, -128.0, dA)  # exp(-128) is 0 in fp32: bounds the sum; NaN stays
    exact = tl.cumsum(dA.to(tl.float64), 0)
    high = exact.to(tl.float32)
    tl.store(dA_cumsum + head * tokens + t, high, mask=t < end)
    tl.store(dA_cumsum + (HEADS + head) * tokens + t, (exact - high.to(tl.float64)).to(tl.float32), mask=t < end)


@triton.jit(do_not_specialize=["tokens"])
def _chunk_state_kernel(
    left, right, dt, dA_cumsum, out, table, left_stride, right_stride, tokens,
    HEADS: tl.constexpr, LEFT_GROUP: tl.constexpr, RIGHT_GROUP: tl.constexpr, WRITTEN: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (chunks, H, P, N): the sum over a chunk's steps of weight * left right^T.

    Of v and k, weighted by dt and the decay after the step: what the chunk writes to the state (WRITTEN). Of dy and q,
    weighted by the decay up to the step: the gradient of the state that enters.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = _chunk_bounds(table, chunk)
    if start >= end:
        return
    p, n = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    dA_cumsum += head * tokens
    rest_offset = HEADS * tokens
    end_high, end_rest = _log_decay(dA_cumsum, rest_offset, end - 1, True)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = t < end
        high, rest = _log_decay(dA_cumsum, rest_offset, t, mask)
        if WRITTEN:
            weight = _decay_between(end_high, end_rest, high, rest)
            weight *= tl.load(dt + t * HEADS + head, mask=mask, other=0.0)
        else:
            weight = tl.exp(high)
        left_t = _load_tile(left + (head // LEFT_GROUP) * P, t, left_stride, mask, p, P)
        right_t = _load_tile(right + (head // RIGHT_GROUP) * N, t, right_stride, mask, n, N)
        # Outside of the chunk the decay overflows.
        right_t = tl.where(mask[:, None], right_t * weight[:, None], 0.0).to(right_t.dtype)
        acc += dot(tl.trans(left_t), right_t, PRECISION)
    out += (chunk.to(tl.int64) * HEADS + head) * P * N
    tl.store(out + p[:, None] * N + n[None, :], acc, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _state_passing_kernel(
    states, initial, final, dA_cumsum, table, first_chunk, num_chunks, tokens,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replaces what each chunk adds to the state by the state that enters it; `final` is what leaves the last one.

    Gradients obey the same recurrence from the last chunk to the first (REVERSE).
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    own = (sequence.to(tl.int64) * HEADS + head) * SIZE + e
    state = tl.load(initial + own, mask=e < SIZE, other=0.0)
    first, chunks = tl.load(first_chunk + sequence), tl.load(num_chunks + sequence)
    for index in range(chunks):
        if REVERSE:
            chunk = first + chunks - 1 - index
        else:
            chunk = first + index
        pointers = states + (chunk.to(tl.int64) * HEADS + head) * SIZE + e
        added = tl.load(pointers, mask=e < SIZE, other=0.0)
        tl.store(pointers, state, mask=e < SIZE)
        last = tl.load(table + 3 * chunk + 1) - 1
        state = state * tl.exp(tl.load(dA_cumsum + head * tokens + last)) + added
    tl.store(final + own, state, mask=e < SIZE)


@triton.jit(do_not_specialize=["tokens"])
def _chunk_scan_kernel(
    v, k, q, dt, dA_cumsum, states, y, table, v_stride, k_stride, q_stride, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (T, H, P): what each step reads from the state that entered its chunk, and from earlier steps of the chunk."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = _chunk_bounds(table, chunk)
    p_blocks: tl.constexpr = (P + BLOCK_OUT - 1) // BLOCK_OUT
    first_i = start + (tl.program_id(2) // p_blocks) * BLOCK_T
    if first_i >= end:
        return
    p = (tl.program_id(2) % p_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = first_i + tl.arange(0, BLOCK_T)
    v, k, q, dA_cumsum = v + (head // GROUP) * P, k + (head // GROUP) * N, q + head * N, dA_cumsum + head * tokens
    rest_offset = HEADS * tokens
    states += (chunk.to(tl.int64) * HEADS + head) * P * N
    high_i, rest_i = _log_decay(dA_cumsum, rest_offset, i, i < end)
    acc = _matmul_transposed(q, i, q_stride, i < end, states, p, N, p < P, N, BLOCK_INNER, PRECISION)
    acc *= tl.exp(high_i)[:, None]
    for first_j in range(start, first_i + 1, BLOCK_T):
        j = first_j + tl.arange(0, BLOCK_T)
        high_j, rest_j = _log_decay(dA_cumsum, rest_offset, j, j < end)
        dt_j = tl.load(dt + j * HEADS + head, mask=j < end, other=0.0)
        scores = _matmul_transposed(q, i, q_stride, i < end, k, j, k_stride, j < end, N, BLOCK_INNER, PRECISION)
        weights = scores * _decay_between(high_i[:, None], rest_i[:, None], high_j[None, :], rest_j[None, :])
        weights *= dt_j[None, :]
        weights = tl.where(i[:, None] >= j[None, :], weights, 0.0)  # the decay towards the past overflows
        v_j = _load_tile(v, j, v_stride, j < end, p, P)
        acc += dot(weights.to(v_j.dtype), v_j, PRECISION)
    pointers = y + (i * HEADS + head)[:, None] * P + p[None, :]
    tl.store(pointers, acc.to(y.dtype.element_ty), mask=(i < end)[:, None] & (p < P)[None, :])


@triton.jit
def _dscores(
    v, k, q, dy, dt, i, high_i, rest_i, j, dA_cumsum, rest_offset, end, v_stride, k_stride, q_stride,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For steps i and j of a head: the gradients of q_i . k_j, and of the log decay between them."""
    high_j, rest_j = _log_decay(dA_cumsum, rest_offset, j, j < end)
    dt_j = tl.load(dt + j * HEADS, mask=j < end, other=0.0)
    dscores = _matmul_transposed(dy, i, HEADS * P, i < end, v, j, v_stride, j < end, P, BLOCK_INNER, PRECISION)
    dscores *= _decay_between(high_i[:, None], rest_i[:, None], high_j[None, :], rest_j[None, :]) * dt_j[None, :]
    dscores = tl.where((i[:, None] >= j[None, :]) & (i < end)[:, None], dscores, 0.0)
    scores = _matmul_transposed(q, i, q_stride, i < end, k, j, k_stride, j < end, N, BLOCK_INNER, PRECISION)
    return dscores, dscores * scores


@triton.jit(do_not_specialize=["tokens"])
def _dq_kernel(
    v, k, q, dy, dt, dA_cumsum, states, dq, dprefix, dsegments, table, v_stride, k_stride, q_stride, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (T, H, N), and two parts of the gradient of the log decay.

    dprefix (H, T): for each step the gradient of the log decay from the chunk's start, from what it read of the state.
    dsegments (CHUNK / BLOCK_T, H, T): of each step t, from the pairs j < t <= i with i in this block.
    """
    chunk, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = _chunk_bounds(table, chunk)
    first_i = start + block * BLOCK_T
    if first_i >= end:
        return
    i, n = first_i + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_OUT)
    v, k, dA_cumsum = v + (head // GROUP) * P, k + (head // GROUP) * N, dA_cumsum + head * tokens
    q, dy, dt = q + head * N, dy + head * P, dt + head
    rest_offset = HEADS * tokens
    states += (chunk.to(tl.int64) * HEADS + head) * P * N
    dsegments += (block * HEADS + head).to(tl.int64) * tokens
    high_i, rest_i = _log_decay(dA_cumsum, rest_offset, i, i < end)
    acc = _matmul(dy, i, HEADS * P, i < end, states, n, N, P, N, BLOCK_INNER, PRECISION) * tl.exp(high_i)[:, None]
    read = tl.sum(_load_tile(q, i, q_stride, i < end, n, N).to(tl.float32) * acc, 1)
    tl.store(dprefix + head * tokens + i, read, mask=i < end)
    # dsegments of steps t of this block: pairs with i from t on, and j in this block before t, or in an earlier one.
    dscores, dsegment = _dscores(
        v, k, q, dy, dt, i, high_i, rest_i, i, dA_cumsum, rest_offset, end, v_stride, k_stride, q_stride,
        HEADS, P, N, BLOCK_INNER, PRECISION,
    )  # fmt: skip
    from_t = tl.cumsum(dsegment, 0, reverse=True)
    within = tl.sum(tl.where(i[:, None] > i[None, :], from_t, 0.0), 1)
    k_i = _load_tile(k, i, k_stride, i < end, n, N)
    acc += dot(dscores.to(k_i.dtype), k_i, PRECISION)
    # Of steps t of an earlier block: pairs with j before t. They are stored at t = j + 1: the sum through j, with
    # nothing to be taken away from it again, which would cost digits.
    earlier, of_i = 0.0, tl.zeros((BLOCK_T,), tl.float32)
    for first_j in range(start, first_i, BLOCK_T):
        j = first_j + tl.arange(0, BLOCK_T)
        dscores, dsegment = _dscores(
            v, k, q, dy, dt, i, high_i, rest_i, j, dA_cumsum, rest_offset, end, v_stride, k_stride, q_stride,
            HEADS, P, N, BLOCK_INNER, PRECISION,
        )  # fmt: skip
        of_j = tl.sum(dsegment, 0)
        tl.store(dsegments + j + 1, earlier + tl.cumsum(of_j, 0), mask=j + 1 < first_i)
        earlier += tl.sum(of_j, 0)
        of_i += tl.sum(dsegment, 1)
        k_j = _load_tile(k, j, k_stride, j < end, n, N)
        acc += dot(dscores.to(k_j.dtype), k_j, PRECISION)
    tl.store(dsegments + i, tl.cumsum(of_i, 0, reverse=True) + within, mask=i < end)
    pointers = dq + (i * HEADS + head)[:, None] * N + n[None, :]
    tl.store(pointers, acc.to(dq.dtype.element_ty), mask=(i < end)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _dk_kernel(
    v, k, q, dy, dt, dA_cumsum, dstates, dk, ddt_direct, dsuffix, table, v_stride, k_stride, q_stride, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (T, K, N), summed over the group's heads; and of each head and step:

    ddt_direct (H, T): the gradient of dt as the weight of the step's write.
    dsuffix (H, T): that of the log decay to the chunk's end, from what the step wrote to the state.
    """
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    start, end = _chunk_bounds(table, chunk)
    first_j = start + tl.program_id(2) * BLOCK_T
    if first_j >= end:
        return
    j, n = first_j + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_OUT)
    v, k, rest_offset = v + kv_head * P, k + kv_head * N, HEADS * tokens
    acc = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        high_j, rest_j = _log_decay(dA_cumsum + head * tokens, rest_offset, j, j < end)
        end_high, end_rest = _log_decay(dA_cumsum + head * tokens, rest_offset, end - 1, True)
        dt_j = tl.load(dt + j * HEADS + head, mask=j < end, other=0.0)
        dstate = dstates + (chunk.to(tl.int64) * HEADS + head) * P * N
        dwrite = _matmul(v, j, v_stride, j < end, dstate, n, N, P, N, BLOCK_INNER, PRECISION)
        dwrite *= _decay_between(end_high, end_rest, high_j, rest_j)[:, None]
        ddt_j = tl.sum(_load_tile(k, j, k_stride, j < end, n, N).to(tl.float32) * dwrite, 1)
        tl.store(dsuffix + head * tokens + j, dt_j * ddt_j, mask=j < end)
        acc += dt_j[:, None] * dwrite
        for first_i in range(first_j, end, BLOCK_T):
            i = first_i + tl.arange(0, BLOCK_T)
            high_i, rest_i = _log_decay(dA_cumsum + head * tokens, rest_offset, i, i < end)
            dscores = _matmul_transposed(
                v, j, v_stride, j < end, dy + head * P, i, HEADS * P, i < end, P, BLOCK_INNER, PRECISION
            )
            dscores *= _decay_between(high_i[None, :], rest_i[None, :], high_j[:, None], rest_j[:, None])
            dscores = tl.where((i[None, :] >= j[:, None]) & (i < end)[None, :], dscores, 0.0)
            scores = _matmul_transposed(
                k, j, k_stride, j < end, q + head * N, i, q_stride, i < end, N, BLOCK_INNER, PRECISION
            )
            ddt_j += tl.sum(dscores * scores, 1)
            q_i = _load_tile(q + head * N, i, q_stride, i < end, n, N)
            acc += dot((dscores * dt_j[:, None]).to(q_i.dtype), q_i, PRECISION)
        tl.store(ddt_direct + head * tokens + j, ddt_j, mask=j < end)
    pointers = dk + (j * (HEADS // GROUP) + kv_head)[:, None] * N + n[None, :]
    tl.store(pointers, acc.to(dk.dtype.element_ty), mask=(j < end)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _dv_kernel(
    k, q, dy, dt, dA_cumsum, dstates, dv, table, k_stride, q_stride, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv (T, K, P), summed over the group's heads."""
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    start, end = _chunk_bounds(table, chunk)
    p_blocks: tl.constexpr = (P + BLOCK_OUT - 1) // BLOCK_OUT
    first_j = start + (tl.program_id(2) // p_blocks) * BLOCK_T
    if first_j >= end:
        return
    p = (tl.program_id(2) % p_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    j = first_j + tl.arange(0, BLOCK_T)
    k, rest_offset = k + kv_head * N, HEADS * tokens
    acc = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        high_j, rest_j = _log_decay(dA_cumsum + head * tokens, rest_offset, j, j < end)
        end_high, end_rest = _log_decay(dA_cumsum + head * tokens, rest_offset, end - 1, True)
        dt_j = tl.load(dt + j * HEADS + head, mask=j < end, other=0.0)
        to_end = _decay_between(end_high, end_rest, high_j, rest_j) * dt_j
        dstate = dstates + (chunk.to(tl.int64) * HEADS + head) * P * N
        acc += (
            _matmul_transposed(k, j, k_stride, j < end, dstate, p, N, p < P, N, BLOCK_INNER, PRECISION)
            * to_end[:, None]
        )
        for first_i in range(first_j, end, BLOCK_T):
            i = first_i + tl.arange(0, BLOCK_T)
            high_i, rest_i = _log_decay(dA_cumsum + head * tokens, rest_offset, i, i < end)
            weights = _matmul_transposed(
                k, j, k_stride, j < end, q + head * N, i, q_stride, i < end, N, BLOCK_INNER, PRECISION
            )
            weights *= _decay_between(high_i[None, :], rest_i[None, :], high_j[:, None], rest_j[:, None])
            mask = (i[None, :] >= j[:, None]) & (i < end)[None, :]
            weights = tl.where(mask, weights * dt_j[:, None], 0.0)
            dy_i = _load_tile(dy + head * P, i, HEADS * P, i < end, p, P)
            acc += dot(weights.to(dy_i.dtype), dy_i, PRECISION)
    pointers = dv + (j * (HEADS // GROUP) + kv_head)[:, None] * P + p[None, :]
    tl.store(pointers, acc.to(dv.dtype.element_ty), mask=(j < end)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _ddt_kernel(
    dt, A, dA_cumsum, states, dstates, dprefix, dsuffix, dsegments, ddt_direct, ddt, dA, table, tokens,
    HEADS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ddt (T, H), and dA (chunks, H), to be summed over chunks.

    The log decay at t is part of the whole chunk's, of prefixes that end at t or later, of suffixes after steps before
    t, and of segments between pairs on either side of t: only what crosses t is added, nothing is taken away again.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = _chunk_bounds(table, chunk)
    if start >= end:
        tl.store(dA + chunk * HEADS + head, 0.0)
        return
    products = tl.zeros((BLOCK,), tl.float32)
    of_chunk = (chunk.to(tl.int64) * HEADS + head) * SIZE
    for first in range(0, SIZE, BLOCK):
        e = first + tl.arange(0, BLOCK)
        state = tl.load(states + of_chunk + e, mask=e < SIZE, other=0.0)
        products += state * tl.load(dstates + of_chunk + e, mask=e < SIZE, other=0.0)
    crossing = tl.sum(products, 0) * tl.exp(tl.load(dA_cumsum + head * tokens + end - 1))  # by the state that enters
    t = start + tl.arange(0, CHUNK)
    mask, later = t < end, (t < end) & (t > start)
    crossing += tl.cumsum(tl.load(dprefix + head * tokens + t, mask=mask, other=0.0), 0, reverse=True)
    crossing += tl.cumsum(tl.load(dsuffix + head * tokens + t - 1, mask=later, other=0.0), 0)
    for block in tl.static_range(CHUNK // BLOCK_T):
        pointers = dsegments + (block * HEADS + head).to(tl.int64) * tokens + t
        written = later & (start + block * BLOCK_T < end) & (t < start + (block + 1) * BLOCK_T)
        crossing += tl.load(pointers, mask=written, other=0.0)
    step = tl.load(dt + t * HEADS + head, mask=mask, other=0.0)
    direct = tl.load(ddt_direct + head * tokens + t, mask=mask, other=0.0)
    tl.store(ddt + t * HEADS + head, direct + tl.load(A + head) * crossing, mask=mask)
    tl.store(dA + chunk * HEADS + head, tl.sum(tl.where(mask, step * crossing, 0.0), 0))


class _Scan(torch.autograd.Function):
    """v (T, K, P), k (T, K, N), q (T, H, N), dt (T, H), state (S, H, P, N); last axes contiguous, fp32 from dt on."""

    @staticmethod
    def constants(v: Tensor, k: Tensor, q: Tensor) -> dict:
        heads, head_dim, state_size = q.shape[1], v.shape[2], k.shape[2]
        # Products without tensor cores, and wide heads, leave registers for smaller blocks only. Products of 64 rows
        # use Hopper's wgmma, and where tiles are narrower than that, ptxas 12.8 (that of Triton 3.6) makes the
        # descriptors of shared memory from a wrong register.
        narrow = min(block_size(head_dim), block_size(state_size)) < 64
        small = v.dtype == torch.float32 or max(head_dim, state_size) > 128 or narrow
        return {
            "HEADS": heads, "P": head_dim, "N": state_size, "BLOCK_T": 32 if small else 64,
            "PRECISION": dot_precision(), "num_stages": 1, "num_warps": 4,
        }  # fmt: skip

    @staticmethod
    def entering_states(v, k, q, dt, A, state, chunks, constants) -> tuple[Tensor, Tensor, Tensor]:
        """Log decays (2, H, T), the state that enters each chunk (chunks, H, P, N), the last states (S, H, P, N)."""
        group = q.shape[1] // v.shape[1]
        dA_cumsum = torch.empty(2, q.shape[1], len(dt), device=dt.device)
        _chunk_cumsum_kernel[len(chunks.table), q.shape[1]](
            dt, A, dA_cumsum, chunks.table, len(dt), HEADS=q.shape[1], CHUNK=CHUNK, num_warps=4
        )
        states = _Scan.chunk_states(
            v, k, dt, dA_cumsum, chunks, constants, LEFT_GROUP=group, RIGHT_GROUP=group, WRITTEN=True
        )
        return dA_cumsum, states, _Scan.pass_states(states, state, dA_cumsum, chunks, REVERSE=False)

    @staticmethod
    def chunk_states(left, right, dt, dA_cumsum, chunks, constants, **options) -> Tensor:
        """See `_chunk_state_kernel`; (chunks, H, P, N)."""
        heads, head_dim, state_size = constants["HEADS"], constants["P"], constants["N"]
        block = min(64, block_size(head_dim))
        out = torch.empty(len(chunks.table), heads, head_dim, state_size, device=dt.device)
        _chunk_state_kernel[len(out), heads, triton.cdiv(head_dim, block)](
            left, right, dt, dA_cumsum, out, chunks.table, left.stride(0), right.stride(0), len(dt),
            BLOCK_P=block, BLOCK_N=block_size(state_size), **constants | {"BLOCK_T": 32}, **options,
        )  # fmt: skip
        return out

    @staticmethod
    def pass_states(states, initial, dA_cumsum, chunks, **options) -> Tensor:
        """See `_state_passing_kernel`; the last states (S, H, P, N)."""
        heads, size = states.shape[1], states[0, 0].numel()
        final = torch.empty_like(initial)
        _state_passing_kernel[len(initial), heads, triton.cdiv(size, 1024)](
            states, initial, final, dA_cumsum, chunks.table, chunks.first_chunk, chunks.num_chunks,
            dA_cumsum.shape[2], HEADS=heads, SIZE=size, BLOCK=1024, **options,
        )  # fmt: skip
        return final

    @staticmethod
    def forward(ctx, v, k, q, dt, A, state, chunks):
        constants, group = _Scan.constants(v, k, q), q.shape[1] // v.shape[1]
        dA_cumsum, states, final = _Scan.entering_states(v, k, q, dt, A, state, chunks, constants)
        y = torch.empty(*q.shape[:2], v.shape[2], device=v.device, dtype=v.dtype)
        block_out = min(64, block_size(v.shape[2]))
        blocks = CHUNK // constants["BLOCK_T"] * triton.cdiv(v.shape[2], block_out)
        _chunk_scan_kernel[len(states), q.shape[1], blocks](
            v, k, q, dt, dA_cumsum, states, y, chunks.table, v.stride(0), k.stride(0), q.stride(0), len(dt),
            GROUP=group, BLOCK_OUT=block_out, BLOCK_INNER=min(64, block_size(k.shape[2])), **constants,
        )  # fmt: skip
        ctx.save_for_backward(v, k, q, dt, A, state)
        ctx.chunks = chunks
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        (v, k, q, dt, A, state), chunks = ctx.saved_tensors, ctx.chunks
        constants, heads, kv_heads = _Scan.constants(v, k, q), q.shape[1], v.shape[1]
        dy = dy.contiguous()
        dA_cumsum, states, _ = _Scan.entering_states(v, k, q, dt, A, state, chunks, constants)
        dstates = _Scan.chunk_states(
            dy, q, dt, dA_cumsum, chunks, constants, LEFT_GROUP=1, RIGHT_GROUP=1, WRITTEN=False
        )
        dstate = _Scan.pass_states(dstates, dfinal.contiguous(), dA_cumsum, chunks, REVERSE=True)

        dv, dk, dq = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (v, k, q))
        count, blocks = len(states), CHUNK // constants["BLOCK_T"]
        dprefix, dsuffix, ddt_direct = torch.empty(3, heads, len(dt), device=dt.device)
        dsegments = torch.empty(blocks, heads, len(dt), device=dt.device)
        strides = (v.stride(0), k.stride(0), q.stride(0), len(dt))
        width = block_size(k.shape[2])
        options = constants | {"GROUP": heads // kv_heads, "BLOCK_INNER": min(64, width), "BLOCK_OUT": width}
        options["num_warps"] = 8 if width > 64 else 4
        _dq_kernel[count, heads, blocks](
            v, k, q, dy, dt, dA_cumsum, states, dq, dprefix, dsegments, chunks.table, *strides, **options
        )
        _dk_kernel[count, kv_heads, blocks](
            v, k, q, dy, dt, dA_cumsum, dstates, dk, ddt_direct, dsuffix, chunks.table, *strides, **options
        )
        options |= {"BLOCK_OUT": min(64, block_size(v.shape[2])), "num_warps": 4}
        _dv_kernel[count, kv_heads, blocks * triton.cdiv(v.shape[2], options["BLOCK_OUT"])](
            k, q, dy, dt, dA_cumsum, dstates, dv, chunks.table, *strides[1:], **options
        )
        ddt, dA = torch.empty_like(dt), torch.empty(count, heads, device=dt.device)
        _ddt_kernel[count, heads](
            dt, A, dA_cumsum, states, dstates, dprefix, dsuffix, dsegments, ddt_direct, ddt, dA, chunks.table,
            len(dt), HEADS=heads, SIZE=states[0, 0].numel(), CHUNK=CHUNK, BLOCK_T=constants["BLOCK_T"], BLOCK=1024,
        )  # fmt: skip
        return dv, dk, dq, ddt, dA.sum(0), dstate, None


def ssd_scan(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    dt: Tensor,
    A: Tensor,
    state: Tensor | None,
    chunk_size: int = CHUNK,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """See `ssm_mmmamba.ssd_scan`; y is in `v`'s dtype. `chunk_size` is the reference's: blocks here are fixed."""
    chunks = Chunks.of(v, sequences)
    if state is None:
        state = torch.zeros(len(chunks.num_chunks), q.shape[2], v.shape[3], k.shape[3], device=v.device)
    flat = (_rows(x.flatten(0, 1)) for x in (v, k, q, dt.float().contiguous()))
    y, last = _Scan.apply(*flat, A.float().contiguous(), state.float().contiguous(), chunks)
    return y.unflatten(0, v.shape[:2]), last


# --- convolution ----------------------------------------------------------------------------------------------------


@triton.jit
def _conv_input(x, state, t, begin, mask, c, stride, TAPS: tl.constexpr):
    """Inputs of channels c at steps t (steps, 1); before the sequence's first step, `begin`, from the state."""
    from_x = tl.load(x + t * stride + c, mask=mask & (t >= begin), other=0.0)
    from_state = tl.load(state + c * (TAPS - 1) + (t - begin + TAPS - 1), mask=mask & (t < begin), other=0.0)
    return tl.where(t >= begin, from_x, from_state)


@triton.jit
def _conv_before_silu(x, weight, bias, state, t, begin, mask, c, stride, C, TAPS: tl.constexpr):
    """The convolution at steps t (steps, 1) of channels c (1, channels)."""
    acc = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32) + tl.zeros(t.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        x_t = _conv_input(x, state, t - (TAPS - 1) + tap, begin, mask & (c < C), c, stride, TAPS).to(tl.float32)
        acc += tl.load(weight + c * TAPS + tap, mask=c < C, other=0.0).to(tl.float32) * x_t
    return acc


@triton.jit
def _sequence_bounds(cu_seqlens, sequence):
    return tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)


@triton.jit
def _conv_kernel(
    x, weight, bias, state, y, final, table, cu_seqlens, stride, C,
    TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (T, C), some steps of a chunk; and final (S, C, W - 1), the state behind the last step of a sequence."""
    start, end = _chunk_bounds(table, tl.program_id(0))
    start += tl.program_id(2) * STEPS
    if start >= end:
        return
    sequence = tl.load(table + 3 * tl.program_id(0) + 2).to(tl.int64)
    seq_begin, seq_end = _sequence_bounds(cu_seqlens, sequence)
    state += sequence * C * (TAPS - 1)
    t = (start + tl.arange(0, STEPS))[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    z = _conv_before_silu(x, weight, bias, state, t, seq_begin, t < end, c, stride, C, TAPS)
    tl.store(y + t * C + c, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=(t < end) & (c < C))
    if end == seq_end and start + STEPS >= end:
        for tap in tl.static_range(TAPS - 1):
            last_t = seq_end - (TAPS - 1) + tap + tl.zeros(c.shape, tl.int64)
            x_t = _conv_input(x, state, last_t, seq_begin, c < C, c, stride, TAPS)
            tl.store(final + (sequence * C + c) * (TAPS - 1) + tap, x_t, mask=c < C)


@triton.jit
def _conv_gradient_kernel(
    x, weight, bias, state, dy, dfinal, dx, dstate, dweight, dbias, table, cu_seqlens, stride, C,
    TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr, OF_STATE: tl.constexpr,
):  # fmt: skip
    """dx of some steps of a chunk, and what they add to dweight and dbias; or (OF_STATE) dstate of a sequence."""
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    if OF_STATE:
        sequence = tl.program_id(0).to(tl.int64)
        seq_begin, seq_end = _sequence_bounds(cu_seqlens, sequence)
        start, end = seq_begin - (TAPS - 1), seq_begin
    else:
        start, end = _chunk_bounds(table, tl.program_id(0))
        start += tl.program_id(2) * STEPS
        if start >= end:
            return
        end = tl.minimum(end, start + STEPS)
        sequence = tl.load(table + 3 * tl.program_id(0) + 2).to(tl.int64)
        seq_begin, seq_end = _sequence_bounds(cu_seqlens, sequence)
    state += sequence * C * (TAPS - 1)
    s = (start + tl.arange(0, STEPS))[:, None]  # the inputs whose gradient is wanted
    s_mask = (s < end) & (c < C)
    in_final = s - (seq_end - (TAPS - 1))  # the last inputs are the final state
    pointers = dfinal + (sequence * C + c) * (TAPS - 1) + in_final
    acc = tl.load(pointers, mask=s_mask & (in_final >= 0), other=0.0).to(tl.float32)
    for shift in tl.static_range(TAPS):  # the steps t that read them
        t = s + shift
        mask = (t >= seq_begin) & (t < seq_end) & s_mask
        z = _conv_before_silu(x, weight, bias, state, t, seq_begin, mask, c, stride, C, TAPS)
        sigmoid = tl.sigmoid(z)
        dz = tl.load(dy + t * C + c, mask=mask, other=0.0).to(tl.float32) * sigmoid * (1 + z * (1 - sigmoid))
        acc += tl.load(weight + c * TAPS + (TAPS - 1 - shift), mask=c < C, other=0.0).to(tl.float32) * dz
        if not OF_STATE:
            if shift == 0:
                part = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * C + c
                tl.store(dbias + part, tl.sum(dz, 0)[None, :], mask=c < C)
                for tap in tl.static_range(TAPS):
                    x_t = _conv_input(x, state, t - (TAPS - 1) + tap, seq_begin, mask, c, stride, TAPS)
                    dtap = tl.sum(dz * x_t.to(tl.float32), 0)[None, :]
                    tl.store(dweight + part * TAPS + tap, dtap, mask=c < C)
    if OF_STATE:
        pointers = dstate + (sequence * C + c) * (TAPS - 1) + (s - start)
        tl.store(pointers, acc.to(dstate.dtype.element_ty), mask=s_mask)
    else:
        tl.store(dx + s * C + c, acc.to(dx.dtype.element_ty), mask=s_mask)


class _Conv(torch.autograd.Function):
    """x (T, C) with contiguous rows, state (S, C, W - 1); see `causal_conv`."""

    @staticmethod
    def forward(ctx, x, weight, bias, state, chunks):
        y, channels = torch.empty(x.shape, device=x.device, dtype=x.dtype), x.shape[1]
        final = state.clone()  # stays where a sequence has no step
        _conv_kernel[len(chunks.table), triton.cdiv(channels, 64), CHUNK // CONV_STEPS](
            x, weight, bias, state, y, final, chunks.table, chunks.cu_seqlens, x.stride(0), channels,
            TAPS=weight.shape[1], STEPS=CONV_STEPS, BLOCK_C=64,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, state)
        ctx.chunks = chunks
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        (x, weight, bias, state), chunks = ctx.saved_tensors, ctx.chunks
        (channels, taps), parts = weight.shape, CHUNK // CONV_STEPS
        dx, dstate = torch.empty(x.shape, device=x.device, dtype=x.dtype), torch.empty_like(state)
        # Parts of a chunk without steps write nothing.
        dweight = torch.zeros(len(chunks.table) * parts, channels, taps, device=x.device)
        dbias = torch.zeros(len(dweight), channels, device=x.device)
        arguments = (
            x, weight, bias, state, dy.contiguous(), dfinal.contiguous(), dx, dstate, dweight, dbias,
            chunks.table, chunks.cu_seqlens, x.stride(0), channels,
        )  # fmt: skip
        blocks = triton.cdiv(channels, 64)
        options = {"TAPS": taps, "BLOCK_C": 64}
        _conv_gradient_kernel[len(chunks.table), blocks, parts](
            *arguments, **options, STEPS=CONV_STEPS, OF_STATE=False, num_warps=8
        )
        _conv_gradient_kernel[len(state), blocks](*arguments, **options, STEPS=block_size(taps - 1, 1), OF_STATE=True)
        return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype), dstate, None


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """See `ssm_mmmamba.causal_conv`."""
    chunks = Chunks.of(x, sequences)
    if state is None:
        state = x.new_zeros(len(chunks.num_chunks), x.shape[2], weight.shape[1] - 1)
    y, last = _Conv.apply(
        _rows(x.flatten(0, 1)), weight.contiguous(), bias.contiguous(), state.to(x.dtype).contiguous(), chunks
    )
    return y.unflatten(0, x.shape[:2]), last


# --- norms ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _gated_norm_kernel(
    y, gate, weight, out, gate_stride, rows, eps, HEADS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    r, p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_P)
    y_r = _load_tile(y, r, P, r < rows, p, P).to(tl.float32)
    g_r = _load_tile(gate, (r // HEADS) * gate_stride + (r % HEADS) * P, 1, r < rows, p, P).to(tl.float32)
    scale = tl.rsqrt(tl.sum(y_r * y_r, 1) / P + eps)
    result = y_r * scale[:, None] * tl.load(weight + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    result *= g_r * tl.sigmoid(g_r)
    pointers = out + r[:, None] * P + p[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _gated_norm_gradient_kernel(
    y, gate, weight, dout, dy, dgate, dweight, gate_stride, rows, eps,
    HEADS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    p = tl.arange(0, BLOCK_P)
    w = tl.load(weight + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    dweight_acc = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        y_r, d_r = (
            _load_tile(y, r, P, r < rows, p, P).to(tl.float32),
            _load_tile(dout, r, P, r < rows, p, P).to(tl.float32),
        )
        g_r = _load_tile(gate, (r // HEADS) * gate_stride + (r % HEADS) * P, 1, r < rows, p, P).to(tl.float32)
        scale = tl.rsqrt(tl.sum(y_r * y_r, 1) / P + eps)[:, None]
        normed, sigmoid = y_r * scale, tl.sigmoid(g_r)
        dweight_acc += tl.sum(d_r * normed * g_r * sigmoid, 0)
        d_gate = d_r * normed * w * sigmoid * (1 + g_r * (1 - sigmoid))
        d_normed = d_r * w * g_r * sigmoid
        d_y = scale * (d_normed - normed * (tl.sum(d_normed * normed, 1) / P)[:, None])
        offsets, mask = r[:, None] * P + p[None, :], (r < rows)[:, None] & (p < P)[None, :]
        tl.store(dy + offsets, d_y.to(dy.dtype.element_ty), mask=mask)
        tl.store(dgate + offsets, d_gate.to(dgate.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0) * P + p, dweight_acc, mask=p < P)


class _GatedNorm(torch.autograd.Function):
    """y (T, H, P), gate (T, H * P) with contiguous rows."""

    @staticmethod
    def forward(ctx, y, gate, weight, eps):
        (tokens, heads, head_dim), rows = y.shape, max(1, 4096 // block_size(y.shape[2]))
        out = torch.empty(tokens, heads, head_dim, device=y.device, dtype=gate.dtype)
        _gated_norm_kernel[(triton.cdiv(tokens * heads, rows),)](
            y, gate, weight, out, gate.stride(0), tokens * heads, eps,
            HEADS=heads, P=head_dim, BLOCK_P=block_size(head_dim), ROWS=rows,
        )  # fmt: skip
        ctx.save_for_backward(y, gate, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, gate, weight = ctx.saved_tensors
        (tokens, heads, head_dim), rows = y.shape, max(1, 2048 // block_size(y.shape[2]))
        programs = min(NORM_PROGRAMS, triton.cdiv(tokens * heads, rows))
        dy, dgate = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (y, gate))
        dweight = torch.empty(programs, head_dim, device=y.device)
        _gated_norm_gradient_kernel[(programs,)](
            y, gate, weight, dout.contiguous(), dy, dgate, dweight, gate.stride(0), tokens * heads, ctx.eps,
            HEADS=heads, P=head_dim, BLOCK_P=block_size(head_dim), ROWS=rows,
        )  # fmt: skip
        return dy, dgate, dweight.sum(0).to(weight.dtype), None


def gated_rmsnorm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ssm_mmmamba.gated_rmsnorm`; the heads of `gate` lie side by side."""
    heads = y.shape[-2:]
    gate = _rows(gate.flatten(-2).flatten(0, -2))
    out = _GatedNorm.apply(y.reshape(-1, *heads).contiguous(), gate, weight.contiguous(), eps)
    return out.view(y.shape)


@triton.jit
def _norm_kernel(x, residual, weight, normed, total, width, eps, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64) * width, tl.arange(0, BLOCK)
    x_r = tl.load(x + row + d, mask=d < width, other=0.0).to(tl.float32)
    x_r = (x_r + tl.load(residual + row + d, mask=d < width, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
    tl.store(total + row + d, x_r, mask=d < width)
    x_r = x_r.to(tl.float32)
    x_r *= tl.rsqrt(tl.sum(x_r * x_r, 0) / width + eps)
    # As Llama's: the row is rounded to its dtype before the weight.
    out = x_r.to(total.dtype.element_ty).to(tl.float32)
    out *= tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
    tl.store(normed + row + d, out.to(normed.dtype.element_ty), mask=d < width)


@triton.jit(do_not_specialize=["rows"])
def _norm_gradient_kernel(total, weight, dnormed, dtotal, dx, dweight, rows, width, eps, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
    dweight_acc = tl.zeros((BLOCK,), tl.float32)
    for index in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        row = index * width
        x_r = tl.load(total + row + d, mask=d < width, other=0.0).to(tl.float32)
        d_r = tl.load(dnormed + row + d, mask=d < width, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x_r * x_r, 0) / width + eps)
        normed = x_r * scale
        dweight_acc += d_r * normed
        d_r *= w
        d_x = scale * (d_r - normed * (tl.sum(d_r * normed, 0) / width))
        d_x += tl.load(dtotal + row + d, mask=d < width, other=0.0).to(tl.float32)
        tl.store(dx + row + d, d_x.to(dx.dtype.element_ty), mask=d < width)
    tl.store(dweight + tl.program_id(0) * width + d, dweight_acc, mask=d < width)


class _AddNorm(torch.autograd.Function):
    """x and residual (rows, width)."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        rows, width = x.shape
        # The residual stream may be wider than what is added to it, as under autocast.
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
        normed = torch.empty_like(x, dtype=torch.promote_types(total.dtype, weight.dtype))
        _norm_kernel[(rows,)](x, residual, weight, normed, total, width, eps, BLOCK=block_size(width))
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.dtypes = eps, (x.dtype, residual.dtype)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed, dtotal):
        total, weight = ctx.saved_tensors
        rows, width = total.shape
        programs = min(NORM_PROGRAMS, rows)
        dx, dweight = torch.empty_like(total), torch.empty(programs, width, device=total.device)
        _norm_gradient_kernel[(programs,)](
            total, weight, dnormed.contiguous(), dtotal.contiguous(), dx, dweight, rows, width, ctx.eps,
            BLOCK=block_size(width),
        )  # fmt: skip
        return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dweight.sum(0).to(weight.dtype), None


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ssm_mmmamba.add_rmsnorm`."""
    rows = (-1, x.shape[-1])
    flat = (tensor.reshape(rows).contiguous() for tensor in (x, residual))
    normed, total = _AddNorm.apply(*flat, weight.contiguous(), eps)
    return normed.view(x.shape), total.view(x.shape)


# --- decoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _conv_step(x, weight, bias, state, c, mask, TAPS: tl.constexpr):
    """SiLU of the convolution at one step for channels c; `state` as it was before the step."""
    z = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        earlier = tl.load(state + c * (TAPS - 1) + tap, mask=mask, other=0.0).to(tl.float32)
        z += tl.load(weight + c * TAPS + tap, mask=mask, other=0.0).to(tl.float32) * earlier
    current = tl.load(x + c, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(weight + c * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32) * current
    # Rounded as the convolution of a whole sequence is.
    return (z * tl.sigmoid(z)).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _softplus(x):
    exp = tl.exp(tl.minimum(x, 20.0))
    total = 1 + exp
    tiny = total == 1  # small steps matter: log1p(exp), the rounding of 1 + exp undone
    log1p = tl.where(tiny, exp, tl.log(total) * exp / tl.where(tiny, 1.0, total - 1))
    return tl.where(x > 20, x, log1p)


@triton.jit
def _decode_kernel(
    projected, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state, out, stride, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAPS: tl.constexpr,
):  # fmt: skip
    """One step of a group's heads, from the input projection to the gated norm; both states change in place."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    KV: tl.constexpr = HEADS // GROUP
    C: tl.constexpr = (2 * KV + HEADS) * P
    x, conv_state = projected + row * stride, conv_state + row * C * (TAPS - 1)
    p = tl.arange(0, BLOCK_P)
    v = _conv_step(x, conv_weight, conv_bias, conv_state, kv_head * P + p, p < P, TAPS)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        dt = tl.load(x + C + HEADS * P + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
        dt = _softplus(dt)
        decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * dt)
        y = tl.zeros((BLOCK_P,), tl.float32)
        for first in tl.static_range(0, P, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            k = _conv_step(x, conv_weight, conv_bias, conv_state, (KV + kv_head) * P + n, n < P, TAPS)
            q = _conv_step(x, conv_weight, conv_bias, conv_state, (2 * KV + head) * P + n, n < P, TAPS)
            pointers = state + ((row * HEADS + head) * P + p[:, None]) * P + n[None, :]
            mask = (p < P)[:, None] & (n < P)[None, :]
            S = tl.load(pointers, mask=mask, other=0.0) * decay + (dt * v)[:, None] * k[None, :]
            tl.store(pointers, S, mask=mask)
            y += tl.sum(S * q[None, :], 1)
        gate = tl.load(x + C + head * P + p, mask=p < P, other=0.0).to(tl.float32)
        y *= tl.rsqrt(tl.sum(y * y, 0) / P + eps) * tl.load(norm_weight + p, mask=p < P, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
        tl.store(out + (row * HEADS + head) * P + p, y.to(out.dtype.element_ty), mask=p < P)
    # The convolution's states of the group's channels move up by one, once every thread has read them.
    tl.debug_barrier()
    for part in tl.static_range(GROUP + 2):
        if part < 2:
            c = (part * KV + kv_head) * P + p
        else:
            c = (2 * KV + kv_head * GROUP + part - 2) * P + p
        tap = tl.arange(0, BLOCK_TAPS)[None, :]
        pointers = conv_state + c[:, None] * (TAPS - 1) + tap
        later = tl.load(pointers + 1, mask=(p < P)[:, None] & (tap < TAPS - 2), other=0.0)
        current = tl.load(x + c, mask=p < P, other=0.0)
        tl.debug_barrier()
        tl.store(
            pointers, tl.where(tap == TAPS - 2, current[:, None], later), mask=(p < P)[:, None] & (tap < TAPS - 1)
        )


def decode_step(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    conv_state: Tensor,
    state: Tensor,
) -> Tensor:
    """See `ssm_mmmamba.decode_step`; one launch. Weights, states and rows of `projected` are contiguous."""
    (batch, heads, head_dim, _), (channels, taps) = state.shape, conv_weight.shape
    out = torch.empty(batch, heads, head_dim, device=projected.device, dtype=projected.dtype)
    kv_heads, block = (channels // head_dim - heads) // 2, block_size(head_dim)
    _decode_kernel[batch, kv_heads](
        projected, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state, out,
        projected.stride(0), eps, HEADS=heads, GROUP=heads // kv_heads, P=head_dim, TAPS=taps,
        BLOCK_P=block, BLOCK_N=min(block, 64), BLOCK_TAPS=block_size(taps - 1, 1), num_warps=8,
    )  # fmt: skip
    return out


def _on_its_device(operation: Callable) -> Callable:
    """Triton launches on the current device: that of the first argument."""

    @wraps(operation)
    def run(x: Tensor, *args, **kwargs):
        with torch.cuda.device_of(x):
            return operation(x, *args, **kwargs)

    return run


OPERATIONS = (causal_conv, ssd_scan, gated_rmsnorm, add_rmsnorm, decode_step)
TRITON = Backend("triton", *map(_on_its_device, OPERATIONS))
