"""The same operations as `ssm_mmmamba`, as Triton kernels: nothing to compile at install.

Rows of a batch, padded rows and packed sequences are one case here: tokens lie in one flat axis, and `Chunks` says
which of them belong together. Letters as in `ssm_mmmamba`, and T tokens in all, S sequences.

The scan (arXiv 2405.21060, section 6) is three kernels: what each chunk writes to the state, the states passed from
chunk to chunk, what each step reads. Query heads read the key/value head of their group in place. Its gradient
recomputes the states, so that only inputs are kept. With s the log decay since the start of a chunk, a pair j <= i of
steps carries E = exp(s_i - s_j) dt_j (q_i . k_j)(dy_i . v_j); the gradient of the log decay at t is the sum of what
crosses t: pairs inside the chunk, reads of what came in, writes that go out, and what passes through.

Launches have fixed block sizes: a first call compiles each kernel once per dtype and model, whatever the lengths, and
tries nothing out.
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
    """How T flat tokens are cut into pieces of at most `CHUNK` steps of one sequence, as our kernels read them.

    Attributes:
        table: (chunks, 3), int32: first token, token after the last, sequence. Entries after the last are empty.
        offsets: (S + 1,), int32: where each sequence begins, and T.
        first: (S,), int32: the first chunk of each sequence.
        count: (S,), int32: how many chunks it has.
    """

    table: Tensor
    offsets: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of_offsets(cls, offsets: Tensor, tokens: int) -> "Chunks":
        """Args: offsets (S + 1,), ascending, from 0 to `tokens`. Does not wait for the device."""
        lengths = offsets.diff()
        count = (lengths + CHUNK - 1) // CHUNK
        ends = count.cumsum(0)
        index = torch.arange(tokens // CHUNK + len(lengths), device=offsets.device)
        sequence = torch.searchsorted(ends, index, right=True).clamp(max=len(lengths) - 1)
        start = offsets[sequence] + (index - (ends - count)[sequence]) * CHUNK
        end = torch.minimum(start + CHUNK, offsets[sequence + 1])
        start = torch.minimum(start, end)  # beyond the last chunk: empty
        table = torch.stack([start, end, sequence], 1)
        return cls(table.int(), offsets.int(), (ends - count).int(), count.int())

    @classmethod
    @lru_cache(maxsize=64)
    def of_rows(cls, rows: int, length: int, device: torch.device) -> "Chunks":
        """Rows of `length` valid steps each."""
        return cls.of_offsets(torch.arange(rows + 1, device=device) * length, rows * length)

    @classmethod
    def of(cls, x: Tensor, sequences: Sequences | None) -> "Chunks":
        """Those of x (B, L, ...), or of `sequences` whose steps it holds, (1, T, ...)."""
        if sequences is None:
            return cls.of_rows(*x.shape[:2], x.device)
        if cls not in sequences.derived:
            sequences.derived[cls] = cls.of_offsets(sequences.cu_seqlens, x.shape[1])
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
def _tile(base, rows, stride, inside, columns, width):
    """Rows `rows` of a matrix, zeros outside."""
    places = base + rows[:, None] * stride + columns[None, :]
    return tl.load(places, mask=inside[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    if INTERPRETED:  # its bf16 is a bare uint16; the products of two bf16 numbers are exact in fp32
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _mixed_dot(a, b, PRECISION: tl.constexpr):
    """With b, which may be a state in fp32, in a's dtype; unless that is fp16, whose range a state may leave."""
    if a.dtype == tl.float16 and b.dtype == tl.float32:
        return dot(a.to(tl.float32), b, "tf32")
    else:
        return dot(a, b.to(a.dtype), PRECISION)


@triton.jit
def _bounds(table, chunk):
    return tl.load(table + 3 * chunk).to(tl.int64), tl.load(table + 3 * chunk + 1).to(tl.int64)


@triton.jit(do_not_specialize=["tokens"])
def _decay_kernel(dt, A, since, table, tokens, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """since (H, T): the log decay from the start of the chunk up to and with each step."""
    head = tl.program_id(1)
    start, end = _bounds(table, tl.program_id(0))
    t = start + tl.arange(0, CHUNK)
    step = tl.load(dt + t * HEADS + head, mask=t < end, other=0.0)
    tl.store(since + head * tokens + t, tl.cumsum(step * tl.load(A + head), 0), mask=t < end)


@triton.jit(do_not_specialize=["tokens"])
def _chunk_outer_kernel(
    left, right, dt, since, out, table, left_stride, right_stride, tokens,
    HEADS: tl.constexpr, LEFT_GROUP: tl.constexpr, RIGHT_GROUP: tl.constexpr, WRITTEN: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (chunks, H, P, N): the sum over a chunk's steps of weight * left right^T.

    Of v and k, weighted by dt and the decay after the step: what the chunk writes to the state (WRITTEN). Of dy and q,
    weighted by the decay before the step: the gradient of the state that comes in.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = _bounds(table, chunk)
    if start >= end:
        return
    p, n = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    since += head * tokens
    total = tl.load(since + end - 1)
    sums = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for begin in range(start, end, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        inside = t < end
        decay = tl.load(since + t, mask=inside, other=0.0)
        if WRITTEN:
            weight = tl.exp(total - decay) * tl.load(dt + t * HEADS + head, mask=inside, other=0.0)
        else:
            weight = tl.exp(decay)
        ours = _tile(left + (head // LEFT_GROUP) * P, t, left_stride, inside, p, P)
        theirs = _tile(right + (head // RIGHT_GROUP) * N, t, right_stride, inside, n, N)
        theirs = (theirs * weight[:, None]).to(theirs.dtype)
        sums += dot(tl.trans(ours), theirs, PRECISION)
    out += (chunk.to(tl.int64) * HEADS + head) * P * N
    tl.store(out + p[:, None] * N + n[None, :], sums, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _pass_kernel(
    states, initial, final, since, table, first, count, tokens,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Puts in place of what each chunk adds to the state the state that it meets; `final` is what the last one leaves.

    Gradients obey the same recurrence from the last chunk to the first (REVERSE).
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    own = (sequence.to(tl.int64) * HEADS + head) * SIZE + e
    running = tl.load(initial + own, mask=e < SIZE, other=0.0)
    begin, chunks = tl.load(first + sequence), tl.load(count + sequence)
    for index in range(chunks):
        if REVERSE:
            chunk = begin + chunks - 1 - index
        else:
            chunk = begin + index
        place = states + (chunk.to(tl.int64) * HEADS + head) * SIZE + e
        added = tl.load(place, mask=e < SIZE, other=0.0)
        tl.store(place, running, mask=e < SIZE)
        last = tl.load(table + 3 * chunk + 1) - 1
        running = running * tl.exp(tl.load(since + head * tokens + last)) + added
    tl.store(final + own, running, mask=e < SIZE)


@triton.jit
def _against(
    a, i, a_stride, a_in, b, j, b_stride, b_in, WIDTH: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr
):
    """Rows i of a times rows j of b transposed, over their common width."""
    sums = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for first in range(0, WIDTH, INNER):
        w = first + tl.arange(0, INNER)
        ours = _tile(a, i, a_stride, a_in, w, WIDTH)
        theirs = tl.trans(_tile(b, j, b_stride, b_in, w, WIDTH))
        sums += _mixed_dot(ours, theirs, PRECISION)
    return sums


@triton.jit
def _through(
    a, i, a_stride, a_in, b, columns, b_stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows i of a times the matrix b (HEIGHT, WIDTH), some of its columns."""
    sums = tl.zeros((i.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, HEIGHT, INNER):
        w = first + tl.arange(0, INNER)
        ours = _tile(a, i, a_stride, a_in, w, HEIGHT)
        sums += _mixed_dot(ours, _tile(b, w, b_stride, w < HEIGHT, columns, WIDTH), PRECISION)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _output_kernel(
    v, k, q, dt, since, states, y, table, v_stride, k_stride, q_stride, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    OUT: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (T, H, P): what each step reads from the state that met its chunk, and from earlier steps of the chunk."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = _bounds(table, chunk)
    parts: tl.constexpr = (P + OUT - 1) // OUT
    begin = start + (tl.program_id(2) // parts) * BLOCK
    if begin >= end:
        return
    p = (tl.program_id(2) % parts) * OUT + tl.arange(0, OUT)
    i = begin + tl.arange(0, BLOCK)
    v, k, q, since = v + (head // GROUP) * P, k + (head // GROUP) * N, q + head * N, since + head * tokens
    states += (chunk.to(tl.int64) * HEADS + head) * P * N
    s_i = tl.load(since + i, mask=i < end, other=0.0)
    sums = _against(q, i, q_stride, i < end, states, p, N, p < P, N, INNER, PRECISION) * tl.exp(s_i)[:, None]
    for other in range(start, begin + 1, BLOCK):
        j = other + tl.arange(0, BLOCK)
        s_j = tl.load(since + j, mask=j < end, other=0.0)
        dt_j = tl.load(dt + j * HEADS + head, mask=j < end, other=0.0)
        scores = _against(q, i, q_stride, i < end, k, j, k_stride, j < end, N, INNER, PRECISION)
        weights = scores * tl.exp(s_i[:, None] - s_j[None, :]) * dt_j[None, :]
        weights = tl.where(i[:, None] >= j[None, :], weights, 0.0)  # the decay towards the past overflows
        v_j = _tile(v, j, v_stride, j < end, p, P)
        sums += dot(weights.to(v_j.dtype), v_j, PRECISION)
    out = y + (i * HEADS + head)[:, None] * P + p[None, :]
    tl.store(out, sums.to(y.dtype.element_ty), mask=(i < end)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _query_gradient_kernel(
    v, k, q, dy, dt, since, states, dq, reads, table, v_stride, k_stride, q_stride, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    OUT: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (T, H, N), and reads (H, T): for each step i the sum over j of E, with what it read of the state."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = _bounds(table, chunk)
    begin = start + tl.program_id(2) * BLOCK
    if begin >= end:
        return
    i, n = begin + tl.arange(0, BLOCK), tl.arange(0, OUT)
    v, k, since = v + (head // GROUP) * P, k + (head // GROUP) * N, since + head * tokens
    q, dy = q + head * N, dy + head * P
    states += (chunk.to(tl.int64) * HEADS + head) * P * N
    s_i = tl.load(since + i, mask=i < end, other=0.0)
    sums = _through(dy, i, HEADS * P, i < end, states, n, N, P, N, INNER, PRECISION) * tl.exp(s_i)[:, None]
    read = tl.sum(_tile(q, i, q_stride, i < end, n, N).to(tl.float32) * sums, 1)
    for other in range(start, begin + 1, BLOCK):
        j = other + tl.arange(0, BLOCK)
        s_j = tl.load(since + j, mask=j < end, other=0.0)
        dt_j = tl.load(dt + j * HEADS + head, mask=j < end, other=0.0)
        gains = _against(dy, i, HEADS * P, i < end, v, j, v_stride, j < end, P, INNER, PRECISION)
        gains *= tl.exp(s_i[:, None] - s_j[None, :]) * dt_j[None, :]
        gains = tl.where(i[:, None] >= j[None, :], gains, 0.0)
        read += tl.sum(gains * _against(q, i, q_stride, i < end, k, j, k_stride, j < end, N, INNER, PRECISION), 1)
        k_j = _tile(k, j, k_stride, j < end, n, N)
        sums += dot(gains.to(k_j.dtype), k_j, PRECISION)
    out = dq + (i * HEADS + head)[:, None] * N + n[None, :]
    tl.store(out, sums.to(dq.dtype.element_ty), mask=(i < end)[:, None] & (n < N)[None, :])
    tl.store(reads + head * tokens + i, read, mask=i < end)


@triton.jit(do_not_specialize=["tokens"])
def _key_gradient_kernel(
    v, k, q, dy, dt, since, dstates, dk, pairs, writes, table, v_stride, k_stride, q_stride, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    OUT: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (T, K, N), summed over the group's heads.

    And for each head and step j, over dt_j: pairs (H, T), the sum over i of E; writes (H, T), what it wrote to the
    state that leaves.
    """
    chunk, shared = tl.program_id(0), tl.program_id(1)
    start, end = _bounds(table, chunk)
    begin = start + tl.program_id(2) * BLOCK
    if begin >= end:
        return
    j, n = begin + tl.arange(0, BLOCK), tl.arange(0, OUT)
    v, k = v + shared * P, k + shared * N
    sums = tl.zeros((BLOCK, OUT), tl.float32)
    for head in range(shared * GROUP, (shared + 1) * GROUP):
        s_j = tl.load(since + head * tokens + j, mask=j < end, other=0.0)
        dt_j = tl.load(dt + j * HEADS + head, mask=j < end, other=0.0)
        remains = tl.exp(tl.load(since + head * tokens + end - 1) - s_j)
        dstate = dstates + (chunk.to(tl.int64) * HEADS + head) * P * N
        leaving = _through(v, j, v_stride, j < end, dstate, n, N, P, N, INNER, PRECISION) * remains[:, None]
        write = tl.sum(_tile(k, j, k_stride, j < end, n, N).to(tl.float32) * leaving, 1)
        tl.store(writes + head * tokens + j, write, mask=j < end)
        sums += dt_j[:, None] * leaving
        pair = tl.zeros((BLOCK,), tl.float32)
        for other in range(begin, end, BLOCK):
            i = other + tl.arange(0, BLOCK)
            s_i = tl.load(since + head * tokens + i, mask=i < end, other=0.0)
            gains = _against(v, j, v_stride, j < end, dy + head * P, i, HEADS * P, i < end, P, INNER, PRECISION)
            crosses = (i[None, :] >= j[:, None]) & (i < end)[None, :]
            gains = tl.where(crosses, gains * tl.exp(s_i[None, :] - s_j[:, None]), 0.0)
            pair += tl.sum(
                gains * _against(k, j, k_stride, j < end, q + head * N, i, q_stride, i < end, N, INNER, PRECISION), 1
            )
            q_i = _tile(q + head * N, i, q_stride, i < end, n, N)
            sums += dot((gains * dt_j[:, None]).to(q_i.dtype), q_i, PRECISION)
        tl.store(pairs + head * tokens + j, pair, mask=j < end)
    out = dk + (j * (HEADS // GROUP) + shared)[:, None] * N + n[None, :]
    tl.store(out, sums.to(dk.dtype.element_ty), mask=(j < end)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _value_gradient_kernel(
    k, q, dy, dt, since, dstates, dv, table, k_stride, q_stride, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    OUT: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv (T, K, P), summed over the group's heads."""
    chunk, shared = tl.program_id(0), tl.program_id(1)
    start, end = _bounds(table, chunk)
    parts: tl.constexpr = (P + OUT - 1) // OUT
    begin = start + (tl.program_id(2) // parts) * BLOCK
    if begin >= end:
        return
    p = (tl.program_id(2) % parts) * OUT + tl.arange(0, OUT)
    j = begin + tl.arange(0, BLOCK)
    k += shared * N
    sums = tl.zeros((BLOCK, OUT), tl.float32)
    for head in range(shared * GROUP, (shared + 1) * GROUP):
        s_j = tl.load(since + head * tokens + j, mask=j < end, other=0.0)
        dt_j = tl.load(dt + j * HEADS + head, mask=j < end, other=0.0)
        remains = tl.exp(tl.load(since + head * tokens + end - 1) - s_j) * dt_j
        dstate = dstates + (chunk.to(tl.int64) * HEADS + head) * P * N
        sums += _against(k, j, k_stride, j < end, dstate, p, N, p < P, N, INNER, PRECISION) * remains[:, None]
        for other in range(begin, end, BLOCK):
            i = other + tl.arange(0, BLOCK)
            s_i = tl.load(since + head * tokens + i, mask=i < end, other=0.0)
            scores = _against(k, j, k_stride, j < end, q + head * N, i, q_stride, i < end, N, INNER, PRECISION)
            crosses = (i[None, :] >= j[:, None]) & (i < end)[None, :]
            scores = tl.where(crosses, scores * tl.exp(s_i[None, :] - s_j[:, None]) * dt_j[:, None], 0.0)
            dy_i = _tile(dy + head * P, i, HEADS * P, i < end, p, P)
            sums += dot(scores.to(dy_i.dtype), dy_i, PRECISION)
    out = dv + (j * (HEADS // GROUP) + shared)[:, None] * P + p[None, :]
    tl.store(out, sums.to(dv.dtype.element_ty), mask=(j < end)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _step_gradient_kernel(
    dt, A, since, states, dstates, reads, pairs, writes, ddt, dA, table, tokens,
    HEADS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ddt (T, H), and dA (chunks, H) to be summed over chunks."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, end = _bounds(table, chunk)
    if start >= end:
        tl.store(dA + chunk * HEADS + head, 0.0)
        return
    through = tl.zeros((BLOCK,), tl.float32)
    both = (chunk.to(tl.int64) * HEADS + head) * SIZE
    for first in range(0, SIZE, BLOCK):
        e = first + tl.arange(0, BLOCK)
        came = tl.load(states + both + e, mask=e < SIZE, other=0.0)
        through += came * tl.load(dstates + both + e, mask=e < SIZE, other=0.0)
    passed = tl.sum(through, 0) * tl.exp(tl.load(since + head * tokens + end - 1))
    t = start + tl.arange(0, CHUNK)
    inside = t < end
    step = tl.load(dt + t * HEADS + head, mask=inside, other=0.0)
    read = tl.load(reads + head * tokens + t, mask=inside, other=0.0)
    pair = tl.load(pairs + head * tokens + t, mask=inside, other=0.0)
    write = tl.load(writes + head * tokens + t, mask=inside, other=0.0)
    # What crosses t from before it to t or after: reads less pairs that begin at t or after; writes before t.
    crossing = tl.cumsum(read - step * pair, 0, reverse=True) + tl.cumsum(step * write, 0) - step * write + passed
    tl.store(ddt + t * HEADS + head, pair + write + tl.load(A + head) * crossing, mask=inside)
    tl.store(dA + chunk * HEADS + head, tl.sum(tl.where(inside, step * crossing, 0.0), 0))


class _Scan(torch.autograd.Function):
    """v (T, K, P), k (T, K, N), q (T, H, N), dt (T, H), state (S, H, P, N); last axes contiguous, fp32 from dt on."""

    @staticmethod
    def sizes(v: Tensor, k: Tensor, q: Tensor) -> dict:
        heads, head_dim, state_size = q.shape[1], v.shape[2], k.shape[2]
        # Products without tensor cores, and wide heads, leave registers for smaller blocks only.
        small = v.dtype == torch.float32 or max(head_dim, state_size) > 128
        return {
            "HEADS": heads, "P": head_dim, "N": state_size, "BLOCK": 32 if small else 64,
            "PRECISION": dot_precision(), "num_stages": 1, "num_warps": 4,
        }  # fmt: skip

    @staticmethod
    def states(v, k, q, dt, A, state, chunks, sizes) -> tuple[Tensor, Tensor, Tensor]:
        """Log decays (H, T), the state that meets each chunk (chunks, H, P, N), the last states (S, H, P, N)."""
        group = q.shape[1] // v.shape[1]
        since = torch.empty(q.shape[1], len(dt), device=dt.device)
        _decay_kernel[len(chunks.table), q.shape[1]](
            dt, A, since, chunks.table, len(dt), HEADS=q.shape[1], CHUNK=CHUNK, num_warps=4
        )
        states = _Scan.outer(v, k, dt, since, chunks, sizes, LEFT_GROUP=group, RIGHT_GROUP=group, WRITTEN=True)
        return since, states, _Scan.passed(states, state, since, chunks, REVERSE=False)

    @staticmethod
    def outer(left, right, dt, since, chunks, sizes, **options) -> Tensor:
        """See `_chunk_outer_kernel`; (chunks, H, P, N)."""
        heads, head_dim, state_size = sizes["HEADS"], sizes["P"], sizes["N"]
        block = min(64, block_size(head_dim))
        out = torch.empty(len(chunks.table), heads, head_dim, state_size, device=dt.device)
        _chunk_outer_kernel[len(out), heads, triton.cdiv(head_dim, block)](
            left, right, dt, since, out, chunks.table, left.stride(0), right.stride(0), len(dt),
            BLOCK_P=block, BLOCK_N=block_size(state_size), **sizes | {"BLOCK": 32}, **options,
        )  # fmt: skip
        return out

    @staticmethod
    def passed(states, initial, since, chunks, **options) -> Tensor:
        """See `_pass_kernel`; the last states (S, H, P, N)."""
        heads, size = states.shape[1], states[0, 0].numel()
        last = torch.empty_like(initial)
        _pass_kernel[len(initial), heads, triton.cdiv(size, 1024)](
            states, initial, last, since, chunks.table, chunks.first, chunks.count, since.shape[1],
            HEADS=heads, SIZE=size, BLOCK=1024, **options,
        )  # fmt: skip
        return last

    @staticmethod
    def forward(ctx, v, k, q, dt, A, state, chunks):
        sizes, group = _Scan.sizes(v, k, q), q.shape[1] // v.shape[1]
        since, states, last = _Scan.states(v, k, q, dt, A, state, chunks, sizes)
        y = torch.empty(*q.shape[:2], v.shape[2], device=v.device, dtype=v.dtype)
        out = min(64, block_size(v.shape[2]))
        blocks = CHUNK // sizes["BLOCK"] * triton.cdiv(v.shape[2], out)
        _output_kernel[len(states), q.shape[1], blocks](
            v, k, q, dt, since, states, y, chunks.table, v.stride(0), k.stride(0), q.stride(0), len(dt),
            GROUP=group, OUT=out, INNER=min(64, block_size(k.shape[2])), **sizes,
        )  # fmt: skip
        ctx.save_for_backward(v, k, q, dt, A, state)
        ctx.chunks = chunks
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        (v, k, q, dt, A, state), chunks = ctx.saved_tensors, ctx.chunks
        sizes, heads, kv_heads = _Scan.sizes(v, k, q), q.shape[1], v.shape[1]
        dy = dy.contiguous()
        since, states, _ = _Scan.states(v, k, q, dt, A, state, chunks, sizes)
        dstates = _Scan.outer(dy, q, dt, since, chunks, sizes, LEFT_GROUP=1, RIGHT_GROUP=1, WRITTEN=False)
        dstate = _Scan.passed(dstates, dlast.contiguous(), since, chunks, REVERSE=True)

        dv, dk, dq = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (v, k, q))
        reads, pairs, writes = torch.empty(3, *since.shape, device=dt.device)
        count, blocks = len(states), CHUNK // sizes["BLOCK"]
        strides = (v.stride(0), k.stride(0), q.stride(0), len(dt))
        width = block_size(k.shape[2])
        options = sizes | {"GROUP": heads // kv_heads, "INNER": min(64, width), "OUT": width}
        options["num_warps"] = 8 if width > 64 else 4
        _query_gradient_kernel[count, heads, blocks](
            v, k, q, dy, dt, since, states, dq, reads, chunks.table, *strides, **options
        )
        _key_gradient_kernel[count, kv_heads, blocks](
            v, k, q, dy, dt, since, dstates, dk, pairs, writes, chunks.table, *strides, **options
        )
        options |= {"OUT": min(64, block_size(v.shape[2])), "num_warps": 4}
        _value_gradient_kernel[count, kv_heads, blocks * triton.cdiv(v.shape[2], options["OUT"])](
            k, q, dy, dt, since, dstates, dv, chunks.table, *strides[1:], **options
        )
        ddt, dA = torch.empty_like(dt), torch.empty(count, heads, device=dt.device)
        _step_gradient_kernel[count, heads](
            dt, A, since, states, dstates, reads, pairs, writes, ddt, dA, chunks.table, len(dt),
            HEADS=heads, SIZE=states[0, 0].numel(), CHUNK=CHUNK, BLOCK=1024,
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
        state = torch.zeros(len(chunks.count), q.shape[2], v.shape[3], k.shape[3], device=v.device)
    flat = (_rows(x.flatten(0, 1)) for x in (v, k, q, dt.float().contiguous()))
    y, last = _Scan.apply(*flat, A.float().contiguous(), state.float().contiguous(), chunks)
    return y.unflatten(0, v.shape[:2]), last


# --- convolution ----------------------------------------------------------------------------------------------------


@triton.jit
def _before_silu(x, weight, bias, state, t, begin, inside, c, stride, C, TAPS: tl.constexpr):
    """The convolution at steps t (steps, 1) of channels c (1, channels); `state` holds the steps before `begin`."""
    sums = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32) + tl.zeros(t.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        source = t - (TAPS - 1) + tap
        given = tl.load(x + source * stride + c, mask=inside & (source >= begin) & (c < C), other=0.0)
        kept = state + c * (TAPS - 1) + (source - begin + TAPS - 1)
        kept = tl.load(kept, mask=inside & (source < begin) & (c < C), other=0.0)
        sums += tl.load(weight + c * TAPS + tap, mask=c < C, other=0.0).to(tl.float32) * tl.where(
            source >= begin, given, kept
        ).to(tl.float32)
    return sums


@triton.jit
def _conv_kernel(
    x, weight, bias, state, y, last, table, offsets, stride, C,
    TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (T, C), some steps of a chunk, and the state (S, C, W - 1) behind the last step of a sequence."""
    start, end = _bounds(table, tl.program_id(0))
    start += tl.program_id(2) * STEPS
    if start >= end:
        return
    sequence = tl.load(table + 3 * tl.program_id(0) + 2).to(tl.int64)
    begin, finish = tl.load(offsets + sequence).to(tl.int64), tl.load(offsets + sequence + 1).to(tl.int64)
    state += sequence * C * (TAPS - 1)
    t = (start + tl.arange(0, STEPS))[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    z = _before_silu(x, weight, bias, state, t, begin, t < end, c, stride, C, TAPS)
    tl.store(y + t * C + c, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=(t < end) & (c < C))
    if end == finish and start + STEPS >= end:
        for column in tl.static_range(TAPS - 1):
            source = finish - (TAPS - 1) + column + tl.zeros(c.shape, tl.int64)
            given = tl.load(x + source * stride + c, mask=(source >= begin) & (c < C), other=0.0)
            kept = state + c * (TAPS - 1) + (source - begin + TAPS - 1)
            kept = tl.load(kept, mask=(source < begin) & (c < C), other=0.0)
            tl.store(
                last + (sequence * C + c) * (TAPS - 1) + column, tl.where(source >= begin, given, kept), mask=c < C
            )


@triton.jit
def _conv_gradient_kernel(
    x, weight, bias, state, dy, dlast, dx, dstate, dweight, dbias, table, offsets, stride, C,
    TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr, OF_STATE: tl.constexpr,
):  # fmt: skip
    """Gradients of some steps of a chunk and what they add to those of weight and bias; or (OF_STATE) of a state."""
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    if OF_STATE:
        sequence = tl.program_id(0).to(tl.int64)
        begin, finish = tl.load(offsets + sequence).to(tl.int64), tl.load(offsets + sequence + 1).to(tl.int64)
        start, end = begin - (TAPS - 1), begin
    else:
        start, end = _bounds(table, tl.program_id(0))
        start += tl.program_id(2) * STEPS
        if start >= end:
            return
        end = tl.minimum(end, start + STEPS)
        sequence = tl.load(table + 3 * tl.program_id(0) + 2).to(tl.int64)
        begin, finish = tl.load(offsets + sequence).to(tl.int64), tl.load(offsets + sequence + 1).to(tl.int64)
    state += sequence * C * (TAPS - 1)
    s = (start + tl.arange(0, STEPS))[:, None]  # the inputs whose gradient is wanted
    wanted = (s < end) & (c < C)
    kept = s - (finish - (TAPS - 1))  # their place in the last state
    kept_place = dlast + (sequence * C + c) * (TAPS - 1) + kept
    sums = tl.load(kept_place, mask=wanted & (kept >= 0), other=0.0).to(tl.float32)
    for shift in tl.static_range(TAPS):  # the steps that read them
        t = s + shift
        inside = (t >= begin) & (t < finish) & wanted
        z = _before_silu(x, weight, bias, state, t, begin, inside, c, stride, C, TAPS)
        gate = tl.sigmoid(z)
        dz = tl.load(dy + t * C + c, mask=inside, other=0.0).to(tl.float32) * gate * (1 + z * (1 - gate))
        tap = tl.load(weight + c * TAPS + (TAPS - 1 - shift), mask=c < C, other=0.0).to(tl.float32)
        sums += tap * dz
        if not OF_STATE:
            if shift == 0:
                part = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * C + c
                tl.store(dbias + part, tl.sum(dz, 0)[None, :], mask=c < C)
                for back in tl.static_range(TAPS):
                    source = t - (TAPS - 1) + back
                    given = tl.load(x + source * stride + c, mask=inside & (source >= begin), other=0.0)
                    old = state + c * (TAPS - 1) + (source - begin + TAPS - 1)
                    old = tl.load(old, mask=inside & (source < begin), other=0.0)
                    grown = tl.sum(dz * tl.where(source >= begin, given, old).to(tl.float32), 0)[None, :]
                    tl.store(dweight + part * TAPS + back, grown, mask=c < C)
    if OF_STATE:
        place = dstate + (sequence * C + c) * (TAPS - 1) + (s - start)
        tl.store(place, sums.to(dstate.dtype.element_ty), mask=wanted)
    else:
        tl.store(dx + s * C + c, sums.to(dx.dtype.element_ty), mask=wanted)


class _Conv(torch.autograd.Function):
    """x (T, C) with contiguous rows, state (S, C, W - 1); see `causal_conv`."""

    @staticmethod
    def forward(ctx, x, weight, bias, state, chunks):
        y, channels = torch.empty(x.shape, device=x.device, dtype=x.dtype), x.shape[1]
        last = state.clone()  # stays where a sequence has no step
        _conv_kernel[len(chunks.table), triton.cdiv(channels, 64), CHUNK // CONV_STEPS](
            x, weight, bias, state, y, last, chunks.table, chunks.offsets, x.stride(0), channels,
            TAPS=weight.shape[1], STEPS=CONV_STEPS, BLOCK_C=64,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, state)
        ctx.chunks = chunks
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        (x, weight, bias, state), chunks = ctx.saved_tensors, ctx.chunks
        (channels, taps), parts = weight.shape, CHUNK // CONV_STEPS
        dx, dstate = torch.empty(x.shape, device=x.device, dtype=x.dtype), torch.empty_like(state)
        # Parts without steps leave their sums as they are.
        dweight = torch.zeros(len(chunks.table) * parts, channels, taps, device=x.device)
        dbias = torch.zeros(len(dweight), channels, device=x.device)
        arguments = (
            x, weight, bias, state, dy.contiguous(), dlast.contiguous(), dx, dstate, dweight, dbias,
            chunks.table, chunks.offsets, x.stride(0), channels,
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
        state = x.new_zeros(len(chunks.count), x.shape[2], weight.shape[1] - 1)
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
    y_r = _tile(y, r, P, r < rows, p, P).to(tl.float32)
    g_r = _tile(gate, (r // HEADS) * gate_stride + (r % HEADS) * P, 1, r < rows, p, P).to(tl.float32)
    scale = tl.rsqrt(tl.sum(y_r * y_r, 1) / P + eps)
    result = y_r * scale[:, None] * tl.load(weight + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    result *= g_r * tl.sigmoid(g_r)
    places = out + r[:, None] * P + p[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _gated_norm_gradient_kernel(
    y, gate, weight, dout, dy, dgate, dweight, gate_stride, rows, eps,
    HEADS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    p = tl.arange(0, BLOCK_P)
    w = tl.load(weight + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    grown = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        y_r, d_r = _tile(y, r, P, r < rows, p, P).to(tl.float32), _tile(dout, r, P, r < rows, p, P).to(tl.float32)
        g_r = _tile(gate, (r // HEADS) * gate_stride + (r % HEADS) * P, 1, r < rows, p, P).to(tl.float32)
        scale = tl.rsqrt(tl.sum(y_r * y_r, 1) / P + eps)[:, None]
        normed, opened = y_r * scale, tl.sigmoid(g_r)
        grown += tl.sum(d_r * normed * g_r * opened, 0)
        d_gate = d_r * normed * w * opened * (1 + g_r * (1 - opened))
        d_normed = d_r * w * g_r * opened
        d_y = scale * (d_normed - normed * (tl.sum(d_normed * normed, 1) / P)[:, None])
        places, mask = r[:, None] * P + p[None, :], (r < rows)[:, None] & (p < P)[None, :]
        tl.store(dy + places, d_y.to(dy.dtype.element_ty), mask=mask)
        tl.store(dgate + places, d_gate.to(dgate.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0) * P + p, grown, mask=p < P)


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
    grown = tl.zeros((BLOCK,), tl.float32)
    for index in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        row = index * width
        x_r = tl.load(total + row + d, mask=d < width, other=0.0).to(tl.float32)
        d_r = tl.load(dnormed + row + d, mask=d < width, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x_r * x_r, 0) / width + eps)
        normed = x_r * scale
        grown += d_r * normed
        d_r *= w
        d_x = scale * (d_r - normed * (tl.sum(d_r * normed, 0) / width))
        d_x += tl.load(dtotal + row + d, mask=d < width, other=0.0).to(tl.float32)
        tl.store(dx + row + d, d_x.to(dx.dtype.element_ty), mask=d < width)
    tl.store(dweight + tl.program_id(0) * width + d, grown, mask=d < width)


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
    given = (tensor.reshape(rows).contiguous() for tensor in (x, residual))
    normed, total = _AddNorm.apply(*given, weight.contiguous(), eps)
    return normed.view(x.shape), total.view(x.shape)


# --- decoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _conv_step(x, weight, bias, state, c, C, inside, TAPS: tl.constexpr):
    """SiLU of the convolution at one step for channels c; `state` as it was before the step."""
    sums = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        kept = tl.load(state + c * (TAPS - 1) + tap, mask=inside, other=0.0).to(tl.float32)
        sums += tl.load(weight + c * TAPS + tap, mask=inside, other=0.0).to(tl.float32) * kept
    now = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    sums += tl.load(weight + c * TAPS + TAPS - 1, mask=inside, other=0.0).to(tl.float32) * now
    # Rounded as the convolution of a whole sequence is.
    return (sums * tl.sigmoid(sums)).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _softplus(x):
    grown = tl.exp(tl.minimum(x, 20.0))
    rounded = 1 + grown
    exact = rounded == 1  # small steps matter: log(1 + e) with the rounding of 1 + e undone
    log1p = tl.where(exact, grown, tl.log(rounded) * grown / tl.where(exact, 1.0, rounded - 1))
    return tl.where(x > 20, x, log1p)


@triton.jit
def _decode_kernel(
    projected, conv_weight, conv_bias, A_log, dt_bias, norm_weight, conv_state, state, out, stride, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAPS: tl.constexpr,
):  # fmt: skip
    """One step of a group's heads, from the input projection to the gated norm; both states change in place."""
    row, shared = tl.program_id(0).to(tl.int64), tl.program_id(1)
    KV: tl.constexpr = HEADS // GROUP
    C: tl.constexpr = (2 * KV + HEADS) * P
    x, conv_state = projected + row * stride, conv_state + row * C * (TAPS - 1)
    p = tl.arange(0, BLOCK_P)
    v = _conv_step(x, conv_weight, conv_bias, conv_state, shared * P + p, C, p < P, TAPS)
    for head in range(shared * GROUP, (shared + 1) * GROUP):
        dt = tl.load(x + C + HEADS * P + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
        dt = _softplus(dt)
        decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * dt)
        y = tl.zeros((BLOCK_P,), tl.float32)
        for first in tl.static_range(0, P, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            k = _conv_step(x, conv_weight, conv_bias, conv_state, (KV + shared) * P + n, C, n < P, TAPS)
            q = _conv_step(x, conv_weight, conv_bias, conv_state, (2 * KV + head) * P + n, C, n < P, TAPS)
            places = state + ((row * HEADS + head) * P + p[:, None]) * P + n[None, :]
            inside = (p < P)[:, None] & (n < P)[None, :]
            S = tl.load(places, mask=inside, other=0.0) * decay + (dt * v)[:, None] * k[None, :]
            tl.store(places, S, mask=inside)
            y += tl.sum(S * q[None, :], 1)
        gate = tl.load(x + C + head * P + p, mask=p < P, other=0.0).to(tl.float32)
        y *= tl.rsqrt(tl.sum(y * y, 0) / P + eps) * tl.load(norm_weight + p, mask=p < P, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
        tl.store(out + (row * HEADS + head) * P + p, y.to(out.dtype.element_ty), mask=p < P)
    # The convolution's states of the group's channels move up by one, once every thread has read them.
    tl.debug_barrier()
    for part in tl.static_range(GROUP + 2):
        if part < 2:
            c = (part * KV + shared) * P + p
        else:
            c = (2 * KV + shared * GROUP + part - 2) * P + p
        tap = tl.arange(0, BLOCK_TAPS)[None, :]
        places = conv_state + c[:, None] * (TAPS - 1) + tap
        later = tl.load(places + 1, mask=(p < P)[:, None] & (tap < TAPS - 2), other=0.0)
        now = tl.load(x + c, mask=p < P, other=0.0)
        tl.debug_barrier()
        tl.store(places, tl.where(tap == TAPS - 2, now[:, None], later), mask=(p < P)[:, None] & (tap < TAPS - 1))


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
