"""The state-space maths of the Mamba-2 mixer: its reference in plain torch, and the choice of what runs it.

Letters: B batch, L length, H query heads, K key/value heads, G = H / K heads per group, P head size, N state size,
C channels, W convolution taps, S sequences. Query head h uses key/value head h // G.

    S_t = exp(A dt_t) S_{t-1} + dt_t v_t k_t^T        y_t = S_t q_t        (arXiv 2502.13145, eq. 2)

Matrix products run in the inputs' dtype; decays, states and norms in at least fp32 (`state_dtype`). The functions
below are the `torch` backend. `triton` (our kernels) and `cuda` (mamba_ssm's and causal_conv1d's) have the same five.
"""

import os
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


BACKENDS = ("torch", "triton", "cuda")
CHUNK = 128  # steps between two states that are in memory


class Backend(NamedTuple):
    """One implementation of the mixer's operations; see the functions of the same names in this file."""

    name: str
    causal_conv: Callable
    ssd_scan: Callable
    decode_step: Callable
    gated_rmsnorm: Callable
    add_rmsnorm: Callable


class Sequences:
    """Which steps of a batch belong to which sequence, where that is not simply one whole row each.

    Valid steps are taken out of the batch and laid end to end, so that a state starts at its sequence's first step,
    sees no padding and no neighbour, and ends at its last valid step.

    Args:
        offsets: (S + 1,), where each sequence begins among the steps, and their number T. A sequence may be empty.
        steps: (T,), the place of each step in the flattened batch; None if the batch is these steps.
        shape: (batch, length).
    """

    def __init__(self, offsets: Tensor, steps: Tensor | None, shape: tuple[int, int]):
        self.offsets = offsets
        self.steps = steps
        self.shape = shape
        self.kept = {}  # what a backend works out once for all layers

    @classmethod
    def of_mask(cls, mask: Tensor) -> "Sequences | None":
        """The rows of a padded batch. Args: mask (batch, length), 1 where a step is valid. None if all are."""
        mask = mask.bool()
        if mask.all():
            return None
        return cls(F.pad(mask.sum(1).cumsum(0), (1, 0)), mask.flatten().nonzero().squeeze(1), tuple(mask.shape))

    @classmethod
    def of_positions(cls, position_ids: Tensor) -> "Sequences | None":
        """The sequences of a packed batch, in order over the flattened batch.

        Args:
            position_ids: (batch, length). Wherever they do not go up by one, a sequence begins: the rule by which
                Transformers' attention masks tell packed sequences apart.

        Returns:
            None if every row is one sequence.
        """
        starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
        firsts = starts.flatten().nonzero().squeeze(1)  # (S,)
        if len(firsts) == len(position_ids):
            return None
        return cls(F.pad(firsts, (0, 1), value=starts.numel()), None, tuple(starts.shape))

    def to(self, device, **kwargs) -> "Sequences":
        """The same on another device: Accelerate moves what it hands to a layer that is elsewhere."""
        device = torch.device(device)
        if device == self.offsets.device:
            return self
        if device not in self.kept:
            steps = None if self.steps is None else self.steps.to(device)
            self.kept[device] = Sequences(self.offsets.to(device), steps, self.shape)
        return self.kept[device]

    @cached_property
    def lengths(self) -> Tensor:
        """(S,)"""
        return self.offsets.diff()

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max())

    def take(self, x: Tensor) -> Tensor:
        """Args: x (batch, length, ...). Returns (1, T, ...)."""
        x = x.flatten(0, 1)
        return (x if self.steps is None else x.index_select(0, self.steps))[None]

    def put(self, x: Tensor) -> Tensor:
        """Args: x (1, T, ...). Returns (batch, length, ...), 0 where no step is valid; undoes `take`."""
        x = x[0]
        if self.steps is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.steps, x)
        return x.unflatten(0, self.shape)

    @cached_property
    def _places(self) -> Tensor:
        """(T,), where each step goes if every sequence has a row of `longest` steps."""
        steps = torch.arange(int(self.offsets[-1]), device=self.offsets.device)
        sequence = torch.repeat_interleave(self.lengths)
        return sequence * self.longest + steps - self.offsets[sequence]

    def to_rows(self, x: Tensor) -> Tensor:
        """Args: x (1, T, ...). Returns (S, longest, ...), a row per sequence, 0 behind its end."""
        rows = x.new_zeros(len(self.lengths) * self.longest, *x.shape[2:]).index_copy(0, self._places, x[0])
        return rows.unflatten(0, (len(self.lengths), self.longest))

    def from_rows(self, x: Tensor) -> Tensor:
        """Args: x (S, longest, ...). Returns (1, T, ...); undoes `to_rows`."""
        return x.flatten(0, 1).index_select(0, self._places)[None]

    @cached_property
    def of_like_length(self) -> list[tuple[Tensor, Tensor, "Sequences"]]:
        """Groups whose lengths differ by less than a factor of two, so that little of `to_rows` is empty.

        For each: which sequences (S',), the places of their steps among all (T',), and what belongs together there.
        """
        lengths, offsets = self.lengths.tolist(), self.offsets.tolist()
        groups = {}
        for sequence, length in enumerate(lengths):
            groups.setdefault(length.bit_length(), []).append(sequence)
        found, device = [], self.offsets.device
        for which in groups.values():
            places = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in which])
            ends = torch.tensor([0, *(lengths[i] for i in which)]).cumsum(0)
            group = Sequences(ends.to(device), None, (1, len(places)))
            found.append((torch.tensor(which, device=device), places.to(device), group))
        return found

    def by_groups(self, run: Callable, tensors: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `run(*tensors, state, sequences)` gives, computed for each group of `of_like_length`.

        Args:
            run: Returns (1, T', ...) and states (S', ...).
            tensors: (1, T, ...) each.
            state: (S, ...), or None.
        """
        outputs = []
        for which, places, group in self.of_like_length:
            part = [x.index_select(1, places) for x in tensors]
            outputs.append(run(*part, None if state is None else state.index_select(0, which), group))
        whiches, places, _ = zip(*self.of_like_length, strict=True)
        ys, states = zip(*outputs, strict=True)
        y = torch.cat(ys, 1).index_select(1, torch.cat(places).argsort())
        return y, torch.cat(states).index_select(0, torch.cat(whiches).argsort())

    def attention_kwargs(self) -> dict[str, Tensor | int]:
        """Boundaries of packed sequences as flash attention takes them.

        It would find them in `position_ids`, but once per layer and only in a batch of one row.
        """
        ends = self.offsets.int()
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


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
        if cls not in sequences.kept:
            sequences.kept[cls] = cls.of_offsets(sequences.offsets, x.shape[1])
        return sequences.kept[cls]


# --- the reference ---------------------------------------------------------------------------------------------------


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decays and states for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


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
    if sequences is not None and len(sequences.of_like_length) > 1:
        return sequences.by_groups(lambda x, state, group: causal_conv(x, weight, bias, state, group), (x,), state)
    if sequences is not None:
        x = sequences.to_rows(x)
    length, taps = x.shape[1], weight.shape[1]
    if state is None:
        padded = F.pad(x, (0, 0, taps - 1, 0))  # (S, W - 1 + L, C)
    else:
        padded = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
    out = bias + sum(weight[:, tap] * padded[:, tap : tap + length] for tap in range(taps))
    out = F.silu(out)
    if sequences is None:
        return out, padded[:, length:].transpose(1, 2)
    steps = sequences.lengths[:, None] + torch.arange(taps - 1, device=x.device)  # (S, W - 1)
    last = padded.gather(1, steps[..., None].expand(-1, -1, x.shape[2]))
    return sequences.from_rows(out), last.transpose(1, 2)


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
    if sequences is not None and len(sequences.of_like_length) > 1:
        return sequences.by_groups(
            lambda v, k, q, dt, state, group: ssd_scan(v, k, q, dt, A, state, chunk_size, group), (v, k, q, dt), state
        )
    if sequences is not None:
        v, k, q, dt = (sequences.to_rows(x) for x in (v, k, q, dt))
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
    decay = dt * A.to(acc).view(kv_heads, group, 1)
    state = state.to(acc).unflatten(1, (kv_heads, group))  # (B, K, G, P, N)

    outputs = []
    for start in range(0, length, chunk_size):
        chunk = slice(start, start + chunk_size)
        q_c, k_c, v_c, dt_c = q[..., chunk, :], k[..., chunk, :], v[..., chunk, :], dt[..., chunk]
        steps = dt_c.shape[-1]
        since_start = decay[..., chunk].cumsum(-1)  # (B, K, G, T), log decay from before the chunk

        # 1. What each step reads from earlier steps of its own chunk.
        future = torch.ones(steps, steps, dtype=torch.bool, device=v.device).triu(1)
        between = (since_start[..., :, None] - since_start[..., None, :]).masked_fill(future, -torch.inf)
        scores = (q_c.flatten(2, 3) @ k_c.transpose(-1, -2)).unflatten(2, (group, steps))  # (B, K, G, T, T)
        weights = (scores * (between.exp() * dt_c[..., None, :])).to(v.dtype)
        within = (weights.flatten(2, 3) @ v_c).unflatten(2, (group, steps))  # (B, K, G, T, P)

        # 2. What it reads from the state that entered the chunk.
        carried = q_c @ state.to(q.dtype).transpose(-1, -2)  # (B, K, G, T, P)
        outputs.append(within + carried * since_start.exp()[..., None])

        # 3. The state that leaves the chunk.
        total = since_start[..., -1:]
        written = v_c[:, :, None] * ((total - since_start).exp() * dt_c)[..., None].to(v.dtype)  # (B, K, G, T, P)
        written = written.transpose(2, 3).flatten(3).transpose(-1, -2) @ k_c  # (B, K, G·P, N)
        state = state * total.exp()[..., None] + written.unflatten(2, (group, head_dim))

    if len(outputs) == 1:
        y = outputs[0]
    else:
        y = torch.cat([state.new_empty(batch, kv_heads, group, 0, head_dim), *outputs], dim=3)
    y = y.flatten(1, 2).transpose(1, 2)
    return y if sequences is None else sequences.from_rows(y), state.flatten(1, 2)


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
    shared = (len(conv_weight) - heads * head_dim) // 2
    v, k, q = (x.unflatten(-1, (-1, head_dim)) for x in vkq.split([shared, shared, heads * head_dim], dim=-1))
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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` without bias. One row of fp32 on a CPU, a decoding step, uses all cores.

    BLAS multiplies a single row on one core; the same product as a batch of slices of the weight is spread over them.

    Args:
        x: (..., width).
        weight: (out, width).
    """
    one_row = x.numel() == x.shape[-1] and x.dtype == torch.float32 and x.device.type == "cpu"
    if not one_row or len(weight) % 4 or torch.is_grad_enabled() or not weight.is_contiguous():
        return F.linear(x, weight)
    slices = weight.view(4, -1, weight.shape[1]).transpose(1, 2)  # (4, width, out / 4)
    return torch.bmm(x.reshape(1, 1, -1).expand(4, 1, -1), slices).view(*x.shape[:-1], -1)


TORCH = Backend("torch", causal_conv, ssd_scan, decode_step, gated_rmsnorm, add_rmsnorm)


# --- which backend ---------------------------------------------------------------------------------------------------


ENVIRONMENT = "MMMAMBA_SSM"


@lru_cache
def find(name: str) -> tuple[Backend | None, str]:
    """A backend, or None and why it is not there."""
    if name == "torch":
        return TORCH, "part of the package"
    try:
        if name == "triton":
            from .triton_mmmamba import TRITON as found
        else:
            from .cuda_mmmamba import CUDA as found
    except Exception as error:  # a compiled package that does not fit raises whatever it likes
        return None, f"cannot be imported: {error}"
    return found, "can be imported"


def backend(device: torch.device, dtype: torch.dtype = torch.float32, requested: str = "auto") -> Backend:
    """What runs the mixer's operations.

    Args:
        device: Where the tensors are.
        dtype: Theirs.
        requested: `config.ssm_implementation`: "torch", "triton", "cuda", or "auto" for the fastest that can run. The
            environment variable `MMMAMBA_SSM` wins over it.

    Raises:
        ValueError: if the name is unknown, or the backend asked for cannot run there.
    """
    return _backend(device.type, dtype, os.environ.get(ENVIRONMENT) or requested)


@lru_cache
def _backend(device: str, dtype: torch.dtype, requested: str) -> Backend:
    if requested == "auto":
        return next(find(name)[0] for name in ("triton", "cuda", "torch") if why_not(name, device, dtype) is None)
    if requested not in BACKENDS:
        raise ValueError(f"ssm_implementation={requested!r} is unknown; use auto, {', '.join(BACKENDS)}.")
    interpreted = requested == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    reason = why_not(requested, "cuda" if interpreted else device, dtype)
    if reason is not None:
        raise ValueError(f"The {requested} backend {reason}; use ssm_implementation='auto'.")
    return find(requested)[0]


def why_not(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run tensors of `dtype` on a device of this type; None if it can."""
    if name != "torch" and device != "cuda":
        return f"runs on CUDA devices, and the tensors are on {device}"
    if name != "torch" and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16, and the tensors are {dtype}"
    found, reason = find(name)
    return reason if found is None else None
