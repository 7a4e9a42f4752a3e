"""The state-space maths of the Mamba-2 mixer in plain torch: what the other backends are tested against.

Letters: B batch, L length, H query heads, K key/value heads, G = H / K heads per group, P head size, N state size,
C channels, W convolution taps, S sequences, T their valid steps. Query head h uses key/value head h // G.

    S_t = exp(A dt_t) S_{t-1} + dt_t v_t k_t^T        y_t = S_t q_t        (arXiv 2502.13145, eq. 2)

Matrix products run in the inputs' dtype; decays, states and norms in at least fp32 (`state_dtype`).
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


ENVIRONMENT = "MMMAMBA_SSM"  # the environment variable that overrides `config.ssm_implementation`
CHUNK_SIZE = 128  # steps whose products are matrix products, between two states in memory


class Backend(NamedTuple):
    """One implementation of the mixer's operations; the functions of the same names in this file say what they do."""

    name: str
    causal_conv: Callable
    ssd_scan: Callable
    gated_rmsnorm: Callable
    add_rmsnorm: Callable
    decode_step: Callable | None  # a whole step of the mixer in few launches; None where nothing is fused


# --- padded and packed batches ---------------------------------------------------------------------------------------


class Sequences:
    """Which steps of a batch belong to which sequence, if it is padded or packed.

    Backends get all valid steps in one row, sequence after sequence, as flash attention's `varlen` functions do: a
    state starts at its sequence's first step, sees no padding and no neighbour, and ends at the last valid step.

    Args:
        cu_seqlens: (S + 1,), int64, cumulative lengths: sequence s is steps cu_seqlens[s] to cu_seqlens[s + 1] of the
            packed row. A sequence may be empty.
        indices: (T,), int64, where each packed step stands in the flattened batch; None if they are the same.
        shape: (batch, length) of the batch.
    """

    def __init__(self, cu_seqlens: Tensor, indices: Tensor | None, shape: tuple[int, int]):
        self.cu_seqlens = cu_seqlens
        self.indices = indices
        self.shape = shape
        self.derived = {}  # what backends derive from the boundaries, once for all layers

    @classmethod
    def from_attention_mask(cls, mask: Tensor, length: int) -> "Sequences | None":
        """The rows of a padded batch, by an attention mask for its last `length` steps.

        Args:
            mask: (batch, past + length), 1 where a step is valid; or (batch, 1, length, past + length), as attention
                takes it, True or 0.0 where a step sees another.
            length: Steps at hand.

        Returns:
            None if all steps are valid.

        Raises:
            ValueError: if it is neither, or hides more of a step's past than padding.
        """
        if mask.ndim == 4:
            visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, -length:]  # (batch, queries, keys)
            mask = visible[:, -1]
            causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() & mask[:, None]
            alike = torch.equal(visible & mask[..., None], causal & mask[..., None])
            # Rows of padding see nothing, or everything, which softmax bears better.
            if not alike or (~mask & visible.any(-1) & ~visible.all(-1)).any():
                raise ValueError("The 4-D attention_mask hides more of the past than padding, which no state forgets.")
        if mask.ndim != 2 or mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; Mamba-2 layers need (batch, tokens so far), and "
                f"{length} tokens are given."
            )
        return cls.from_mask(mask[:, -length:])

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Sequences | None":
        """The rows of a padded batch. Waits for the device.

        Args:
            mask: (batch, length), 1 where a step is valid; padding may stand anywhere.

        Returns:
            None if every step is valid.
        """
        mask = mask.bool()
        if torch.compiler.is_compiling() and mask.device.type != "cuda":  # kernels need valid steps end to end
            return AlignedRows(mask)
        if mask.all():
            return None
        return cls(F.pad(mask.sum(1).cumsum(0), (1, 0)), mask.flatten().nonzero().squeeze(1), tuple(mask.shape))

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> "Sequences | None":
        """The sequences of a packed batch, in order over the flattened batch. Waits for the device.

        Args:
            position_ids: (batch, length). Wherever they do not go up by one, a sequence begins: the rule by which
                Transformers' attention masks tell packed sequences apart.

        Returns:
            None if every row is one sequence.
        """
        starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
        first_steps = starts.flatten().nonzero().squeeze(1)  # (S,)
        if len(first_steps) == len(position_ids):
            return None
        return cls(F.pad(first_steps, (0, 1), value=starts.numel()), None, tuple(starts.shape))

    def to(self, device: torch.device | str | int, **kwargs) -> "Sequences":
        """The same on another device, copied once. Accelerate calls this as it would a tensor's `to`."""
        device = torch.device(device)
        if device == self.cu_seqlens.device:
            return self
        if device not in self.derived:
            indices = None if self.indices is None else self.indices.to(device)
            self.derived[device] = Sequences(self.cu_seqlens.to(device), indices, self.shape)
        return self.derived[device]

    @cached_property
    def lengths(self) -> Tensor:
        """(S,), int64."""
        return self.cu_seqlens.diff()

    @cached_property
    def max_length(self) -> int:
        return int(self.lengths.max())

    def pack(self, x: Tensor) -> Tensor:
        """All valid steps in one row. Args: x (batch, length, ...). Returns (1, T, ...)."""
        x = x.flatten(0, 1)
        return (x if self.indices is None else x.index_select(0, self.indices))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Undoes `pack`. Args: x (1, T, ...). Returns (batch, length, ...), 0 where a step is padding."""
        x = x[0]
        if self.indices is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.indices, x)
        return x.unflatten(0, self.shape)

    @cached_property
    def _padded_indices(self) -> Tensor:
        """(T,), where each packed step stands in the flattened (S, max_length)."""
        steps = torch.arange(int(self.cu_seqlens[-1]), device=self.cu_seqlens.device)
        sequence_ids = torch.repeat_interleave(self.lengths)
        return sequence_ids * self.max_length + steps - self.cu_seqlens[sequence_ids]

    def to_padded(self, x: Tensor) -> Tensor:
        """One row for each sequence. Args: x (1, T, ...). Returns (S, max_length, ...), 0 behind a sequence's end."""
        padded = x.new_zeros(len(self.lengths) * self.max_length, *x.shape[2:])
        return padded.index_copy(0, self._padded_indices, x[0]).unflatten(0, (len(self.lengths), self.max_length))

    def from_padded(self, x: Tensor) -> Tensor:
        """Undoes `to_padded`. Args: x (S, max_length, ...). Returns (1, T, ...)."""
        return x.flatten(0, 1).index_select(0, self._padded_indices)[None]

    @cached_property
    def length_buckets(self) -> list[tuple[Tensor, Tensor, "Sequences"]]:
        """The sequences by length, which differs by less than a factor of two in a bucket: `to_padded` pads little.

        For each bucket: the ids of its sequences (S',), the packed steps that are theirs (T',), and these alone as
        `Sequences`.
        """
        lengths, cu_seqlens = self.lengths.tolist(), self.cu_seqlens.tolist()
        ids_by_size = {}
        for sequence_id, length in enumerate(lengths):
            ids_by_size.setdefault(length.bit_length(), []).append(sequence_id)
        buckets, device = [], self.cu_seqlens.device
        for ids in ids_by_size.values():
            steps = torch.cat([torch.arange(cu_seqlens[i], cu_seqlens[i + 1]) for i in ids])
            bucket_cu_seqlens = torch.tensor([0, *(lengths[i] for i in ids)]).cumsum(0)
            bucket = Sequences(bucket_cu_seqlens.to(device), None, (1, len(steps)))
            buckets.append((torch.tensor(ids, device=device), steps.to(device), bucket))
        return buckets

    def run_in_buckets(
        self, function: Callable, tensors: tuple[Tensor, ...], state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What `function(*tensors, state, self)` returns, computed bucket by bucket.

        Args:
            function: Returns y (1, T', ...) and the last states (S', ...).
            tensors: (1, T, ...) each.
            state: (S, ...), or None.
        """
        outputs = []
        for ids, steps, bucket in self.length_buckets:
            inputs = [x.index_select(1, steps) for x in tensors]
            outputs.append(function(*inputs, None if state is None else state.index_select(0, ids), bucket))
        ids, steps, _ = zip(*self.length_buckets, strict=True)
        ys, states = zip(*outputs, strict=True)
        y = torch.cat(ys, 1).index_select(1, torch.cat(steps).argsort())
        return y, torch.cat(states).index_select(0, torch.cat(ids).argsort())

    def attention_kwargs(self) -> dict[str, Tensor | int]:
        """Boundaries of packed sequences under the names that Transformers' flash attention reads.

        It would find them in `position_ids` itself, but once per layer and only in a batch of one row.
        """
        cu_seqlens = self.cu_seqlens.int()
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
        }


class AlignedRows(Sequences):
    """The rows of a padded batch without a look at the mask's values, for graphs that serve every mask.

    The packed row holds each row's valid steps and then its padding.

    Args:
        mask: (batch, length), bool.
    """

    length_buckets = ()

    def __init__(self, mask: Tensor):
        self.shape = tuple(mask.shape)
        self.mask, self.order = mask, mask.int().argsort(dim=1, descending=True, stable=True)  # valid steps first
        self.valid, self.lengths = mask.gather(1, self.order), mask.sum(1)
        self.derived = {}

    def pack(self, x: Tensor) -> Tensor:
        return _take_steps(x, self.order).flatten(0, 1)[None]

    def unpack(self, x: Tensor) -> Tensor:
        x = _take_steps(x[0].unflatten(0, self.shape), self.order.argsort(dim=1))
        return x * self.mask.view(*self.shape, *[1] * (x.ndim - 2))

    def to_padded(self, x: Tensor) -> Tensor:
        x = x[0].unflatten(0, self.shape)
        return x * self.valid.view(*self.shape, *[1] * (x.ndim - 2))

    def from_padded(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[None]


def _take_steps(x: Tensor, indices: Tensor) -> Tensor:
    """Args: x (batch, length, ...); indices (batch, length). Returns the shape of x."""
    indices = indices.view(*indices.shape, *[1] * (x.ndim - 2)).expand_as(x)
    return x.gather(1, indices)


# --- operations ------------------------------------------------------------------------------------------------------


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decays and states for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _reverse_cumsum(x: Tensor) -> Tensor:
    """Sums over what lies behind each element of the last axis, the element left out: sum_{s > t} x_s."""
    return F.pad(x[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


def decay_between(log_decay: Tensor, block: int = 16) -> Tensor:
    """What is left of each step's write when a later step reads it, the matrix L of arXiv 2405.21060, eq. 5.

    A difference of two cumulative sums loses the digits of a short segment that follows a large step; and its gradient
    adds and takes away what does not decay between the two. Here every segment is a sum of its own elements: long ones
    are put together from the end of j's block, the blocks between, and the start of i's block.

    Args:
        log_decay: (..., T), at most 0.
        block: Length of segments that are summed one by one.

    Returns:
        (..., T, T): exp(sum_{j < t <= i} log_decay_t) at [i, j], 0 where j > i.
    """
    length = log_decay.shape[-1]
    if length <= block:
        return _summed_one_by_one(log_decay)
    blocks = F.pad(log_decay, (0, -length % block)).unflatten(-1, (-1, block))  # (..., T / block, block)
    from_start, to_end = blocks.cumsum(-1).exp(), _reverse_cumsum(blocks).exp()
    # Over the whole blocks between J and I; 0 where I is not behind J, as everywhere in the row of the first block.
    between = F.pad(decay_between(blocks.sum(-1), block)[..., :-1, :], (0, 0, 1, 0))
    to_block = to_end[..., None, :, :] * between[..., None]  # from step j to the start of block I: (..., I, J, j)
    decay = from_start[..., None, None] * to_block[..., None, :, :]  # (..., I, i, J, j)
    decay.diagonal(dim1=-4, dim2=-2).copy_(decay_between(blocks, block).movedim(-3, -1))
    return decay.flatten(-4, -3).flatten(-2)[..., :length, :length]


def _summed_one_by_one(log_decay: Tensor) -> Tensor:
    """`decay_between` in one piece of any length."""
    length = log_decay.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril()
    segments = log_decay[..., None].masked_fill(~causal.tril(-1), 0).cumsum(-2)
    return segments.masked_fill(~causal, -torch.inf).exp()


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU, from and to a state.

    Args:
        x: (B, L, C); with `sequences`, their steps (1, T, C).
        weight: (C, W); the last tap meets the current step.
        bias: (C,).
        state: (S, C, W - 1), the inputs before each row or sequence; zeros if None.
        sequences: What belongs together, if not each row.

    Returns:
        The shape of `x`, and the state after each row or sequence, (S, C, W - 1).
    """
    if sequences is not None and len(sequences.length_buckets) > 1:
        return sequences.run_in_buckets(
            lambda x, state, bucket: causal_conv(x, weight, bias, state, bucket), (x,), state
        )
    if sequences is not None:
        x = sequences.to_padded(x)
    length, taps = x.shape[1], weight.shape[1]
    if state is None:
        padded = F.pad(x, (0, 0, taps - 1, 0))  # (S, W - 1 + L, C)
    else:
        padded = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
    out = bias + sum(weight[:, tap] * padded[:, tap : tap + length] for tap in range(taps))
    out = F.silu(out)
    if sequences is None:
        return out, padded[:, length:].transpose(1, 2)
    last_steps = sequences.lengths[:, None] + torch.arange(taps - 1, device=x.device)  # (S, W - 1)
    last = padded.gather(1, last_steps[..., None].expand(-1, -1, x.shape[2]))
    return sequences.from_padded(out), last.transpose(1, 2)


def ssd_scan(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    dt: Tensor,
    A: Tensor,
    state: Tensor | None,
    chunk_size: int = CHUNK_SIZE,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences, one chunk of matrix products at a time (arXiv 2405.21060, section 6).

    Args:
        v: (B, L, K, P); with `sequences`, B = 1 and L = T.
        k: (B, L, K, N).
        q: (B, L, H, N).
        dt: (B, L, H), step sizes after softplus; 0 leaves the state as it is.
        A: (H,), negative decay rates.
        state: (S, H, P, N), the state before the first step of each row or sequence; zeros if None.
        chunk_size: Steps per chunk; changes speed and memory, not the result.
        sequences: What belongs together, if not each row.

    Returns:
        y of shape (B, L, H, P), in `v`'s dtype or wider, and the last states (S, H, P, N) in `state_dtype`.
    """
    if sequences is not None and len(sequences.length_buckets) > 1:
        return sequences.run_in_buckets(
            lambda v, k, q, dt, state, bucket: ssd_scan(v, k, q, dt, A, state, chunk_size, bucket),
            (v, k, q, dt),
            state,
        )
    if sequences is not None:
        v, k, q, dt = (sequences.to_padded(x) for x in (v, k, q, dt))
    if v.dtype == torch.float16:  # products and states may leave its range
        v, k, q = v.float(), k.float(), q.float()
    batch, length, kv_heads, head_dim = v.shape
    heads, state_size = q.shape[2:]
    group = heads // kv_heads
    acc = state_dtype(v.dtype)
    if state is None:
        state = v.new_zeros(batch, heads, head_dim, state_size, dtype=acc)

    # One copy to head-major order, so that every product below is a plain batched matmul.
    q = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)  # (B, K, G, L, N)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, L, ·)
    dt = dt.to(acc).permute(0, 2, 1).unflatten(1, (kv_heads, group))  # (B, K, G, L)
    log_decay = dt * A.to(acc).view(kv_heads, group, 1)
    state = state.to(acc).unflatten(1, (kv_heads, group))  # (B, K, G, P, N)
    if torch.compiler.is_compiling():
        y, state = _scan_all_chunks(v, k, q, dt, log_decay, state, chunk_size)
        y = y.flatten(1, 2).transpose(1, 2)
        return y if sequences is None else sequences.from_padded(y), state.flatten(1, 2)

    outputs = []
    for start in range(0, length, chunk_size):
        chunk = slice(start, start + chunk_size)
        q_c, k_c, v_c, dt_c = q[..., chunk, :], k[..., chunk, :], v[..., chunk, :], dt[..., chunk]
        steps, decay_c = dt_c.shape[-1], log_decay[..., chunk]
        from_start = decay_c.cumsum(-1).exp()[..., None]  # (B, K, G, T, 1), what is left of the state that entered

        # 1. What each step reads from earlier steps of its own chunk.
        scores = (q_c.flatten(2, 3) @ k_c.transpose(-1, -2)).unflatten(2, (group, steps))  # (B, K, G, T, T)
        weights = (scores * (decay_between(decay_c) * dt_c[..., None, :])).to(v.dtype)
        within = (weights.flatten(2, 3) @ v_c).unflatten(2, (group, steps))  # (B, K, G, T, P)

        # 2. What it reads from the state that entered the chunk.
        carried = q_c @ state.to(q.dtype).transpose(-1, -2)  # (B, K, G, T, P)
        outputs.append(within + carried * from_start)

        # 3. The state that leaves the chunk.
        to_end = (_reverse_cumsum(decay_c).exp() * dt_c)[..., None]
        written = v_c[:, :, None] * to_end.to(v.dtype)  # (B, K, G, T, P)
        written = written.transpose(2, 3).flatten(3).transpose(-1, -2) @ k_c  # (B, K, G·P, N)
        state = state * from_start[..., -1:, :] + written.unflatten(2, (group, head_dim))

    if len(outputs) == 1:
        y = outputs[0]
    else:
        y = torch.cat([state.new_empty(batch, kv_heads, group, 0, head_dim), *outputs], dim=3)
    y = y.flatten(1, 2).transpose(1, 2)
    return y if sequences is None else sequences.from_padded(y), state.flatten(1, 2)


def _scan_all_chunks(
    v: Tensor, k: Tensor, q: Tensor, dt: Tensor, log_decay: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` over all chunks at once: a graph without a loop serves every length, at the cost of more memory.

    Args:
        v, k: (B, K, L, ·).
        q: (B, K, G, L, N).
        dt, log_decay: (B, K, G, L).
        state: (B, K, G, P, N).

    Returns:
        y (B, K, G, L, P), and the last states.
    """
    length = q.shape[3]
    chunks = (length + chunk_size - 1) // chunk_size + 1  # never one, since a graph for one would serve no more
    padding = chunks * chunk_size - length

    def split(x: Tensor) -> Tensor:
        """(..., L, ·) to (..., chunks, T, ·); steps of size 0 at the end change nothing."""
        return F.pad(x, (0, 0, 0, padding)).unflatten(-2, (chunks, chunk_size))

    q, k, v = split(q), split(k)[:, :, None], split(v)[:, :, None]  # (B, K, G or 1, chunks, T, ·)
    dt, log_decay = split(dt[..., None])[..., 0], split(log_decay[..., None])[..., 0]  # (B, K, G, chunks, T)
    weights = (q @ k.transpose(-1, -2)) * (_summed_one_by_one(log_decay) * dt[..., None, :])
    to_end = (_reverse_cumsum(log_decay).exp() * dt)[..., None]
    written = (v * to_end.to(v.dtype)).transpose(-1, -2) @ k  # (B, K, G, chunks, P, N)
    # Before each chunk, and behind the last one: the first state and what earlier chunks wrote, as far as it is left.
    states = torch.cat([state[:, :, :, None], written.to(state.dtype)], dim=3)
    left = _summed_one_by_one(F.pad(log_decay.sum(-1), (1, 0)))  # (B, K, G, chunks + 1, chunks + 1)
    states = (left @ states.flatten(-2)).unflatten(-1, state.shape[-2:])
    carried = q @ states[:, :, :, :-1].to(q.dtype).transpose(-1, -2)
    y = weights.to(v.dtype) @ v + carried * log_decay.cumsum(-1).exp()[..., None]
    return y.flatten(3, 4)[:, :, :, :length], states[:, :, :, -1]


def ssd_step(v: Tensor, k: Tensor, q: Tensor, dt: Tensor, A: Tensor, state: Tensor) -> Tensor:
    """One step of the recurrence; `state` changes in place.

    Args:
        v, k, q, dt, A: as `ssd_scan` without L: (B, K, P), (B, K, N), (B, H, N), (B, H), (H,).
        state: (B, H, P, N), in `state_dtype`.

    Returns:
        y (B, H, P) in the state's dtype.
    """
    group = q.shape[1] // v.shape[1]
    v, k, q, dt, A = (x.to(state.dtype) for x in (v, k, q, dt, A))
    written = dt[..., None] * v.repeat_interleave(group, 1)  # (B, H, P)
    state.mul_((dt * A).exp()[..., None, None])
    state.addcmul_(written[..., None], k.repeat_interleave(group, 1)[..., None, :])
    return (state @ q[..., None]).squeeze(-1)


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
    """One step of the mixer between its two projections; both states change in place. No gradient.

    The reference of the other backends' fused steps; `TORCH.decode_step` is None, since nothing is fused here.

    Args:
        projected: (B, C + H * P + H), what the input projection gives: v|k|q, gate, dt before bias and softplus.
        conv_weight: (C, W), with C = (2 K + H) P.
        conv_bias: (C,).
        A_log: (H,).
        dt_bias: (H,).
        norm_weight: (P,).
        eps: The norm's.
        conv_state: (B, C, W - 1), in the dtype of `projected`.
        state: (B, H, P, P), in `state_dtype`.

    Returns:
        (B, H, P) in the dtype of `projected`.
    """
    heads, head_dim = state.shape[1:3]
    vkq, gate, dt = projected.split([len(conv_weight), heads * head_dim, heads], dim=-1)
    dt = F.softplus(dt.to(state.dtype) + dt_bias.to(state.dtype))
    window = torch.cat([conv_state, vkq[..., None]], dim=-1)  # (B, C, W)
    conv_state.copy_(window[..., 1:])
    vkq = F.silu((window * conv_weight).sum(-1) + conv_bias)
    kv_width = (len(conv_weight) - heads * head_dim) // 2
    v, k, q = (x.unflatten(-1, (-1, head_dim)) for x in vkq.split([kv_width, kv_width, heads * head_dim], dim=-1))
    y = ssd_step(v, k, q, dt, -A_log.to(state.dtype).exp(), state)
    return gated_rmsnorm(y, gate.unflatten(-1, (-1, head_dim)), norm_weight, eps)


def gated_rmsnorm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the head size, then the SiLU gate.

    Args:
        y: (..., H, P), in any float dtype.
        gate: (..., H, P), in the dtype of the result.
        weight: (P,), shared by all heads.
        eps: Added to the mean square.

    Returns:
        (..., H, P) in the dtype of `gate`.
    """
    acc = state_dtype(gate.dtype)
    y = y.to(acc)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(acc)
    return (y * F.silu(gate.to(acc))).to(gate.dtype)


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream, and the RMS norm of the sum, as Llama's.

    Args:
        x: (..., width).
        residual: (..., width).
        weight: (width,).
        eps: Added to the mean square.

    Returns:
        The normed sum and the sum, (..., width) each.
    """
    total = residual + x
    wide = total.to(state_dtype(total.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(total.dtype), total


TORCH = Backend("torch", causal_conv, ssd_scan, gated_rmsnorm, add_rmsnorm, decode_step=None)
