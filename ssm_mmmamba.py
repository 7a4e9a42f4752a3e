"""The state-space maths of the Mamba-2 mixer, in plain torch.

Letters: B batch, L length, H query heads, K key/value heads, G = H / K heads per group, P head size, N state size,
C channels, W convolution taps. Query head h uses key/value head h // G.

    S_t = exp(A dt_t) S_{t-1} + dt_t v_t k_t^T        y_t = S_t q_t        (arXiv 2502.13145, eq. 2)

Matrix products run in the inputs' dtype; decays, states and norms in at least fp32 (`state_dtype`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decays and states for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU, from and to a state.

    Args:
        x: (B, L, C), valid steps first.
        weight: (C, W); the last tap meets the current step.
        bias: (C,).
        state: (B, C, W - 1), the inputs before `x`; zeros if None.
        lengths: (B,), how many of the L steps are valid; all if None.

    Returns:
        (B, L, C), and the state after the last valid step, (B, C, W - 1).
    """
    length, taps = x.shape[1], weight.shape[1]
    if state is None:
        padded = F.pad(x, (0, 0, taps - 1, 0))  # (B, W - 1 + L, C)
    else:
        padded = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
    out = bias + sum(weight[:, tap] * padded[:, tap : tap + length] for tap in range(taps))
    if lengths is None:
        last = padded[:, length:]
    else:
        steps = lengths[:, None] + torch.arange(taps - 1, device=x.device)  # (B, W - 1)
        last = padded.gather(1, steps[..., None].expand(-1, -1, x.shape[2]))
    return F.silu(out), last.transpose(1, 2)


def ssd_scan(
    v: Tensor, k: Tensor, q: Tensor, dt: Tensor, A: Tensor, state: Tensor | None, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The recurrence over a whole sequence, one chunk of matrix products at a time (arXiv 2405.21060, section 6).

    Args:
        v: (B, L, K, P).
        k: (B, L, K, N).
        q: (B, L, H, N).
        dt: (B, L, H), step sizes after softplus; 0 leaves the state as it is.
        A: (H,), negative decay rates.
        state: (B, H, P, N), the state before the first step; zeros if None.
        chunk_size: Steps per chunk; changes speed and memory, not the result.

    Returns:
        y of shape (B, L, H, P) and the last state (B, H, P, N), both in `state_dtype`.
    """
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

    y = torch.cat(outputs, dim=3) if len(outputs) > 1 else outputs[0]
    return y.flatten(1, 2).transpose(1, 2), state.flatten(1, 2)


def ssd_step(v: Tensor, k: Tensor, q: Tensor, dt: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence.

    Args and returns as `ssd_scan` without L: v (B, K, P), k (B, K, N), q (B, H, N), dt (B, H), state (B, H, P, N).
    """
    kv_heads, group = v.shape[1], q.shape[1] // v.shape[1]
    acc = state_dtype(v.dtype)
    state, dt = state.to(acc), dt.to(acc)
    written = (v.to(acc)[..., :, None] * k.to(acc)[..., None, :]).unsqueeze(2)  # (B, K, 1, P, N)
    written = (written * dt.unflatten(1, (kv_heads, group))[..., None, None]).flatten(1, 2)
    state = state * (dt * A.to(acc)).exp()[..., None, None] + written
    return (state @ q.to(acc)[..., None]).squeeze(-1), state


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
