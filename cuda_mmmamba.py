"""The operations of `ssm_mmmamba` by the published fused kernels: mamba_ssm's and causal_conv1d's.

They have no grouped keys and values, so those are repeated in memory; sequences of different lengths are padded on the
right, as in the reference. The reference does what they have no kernel for.
"""

import torch
from torch import Tensor

from .ssm_mmmamba import CHUNK_SIZE, TORCH, Backend, Sequences
from .ssm_mmmamba import decode_step as reference_decode_step


try:  # Transformers wants every import outside of `try` installed before it loads a model.
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    raise


def _conv_supported(channels: int, taps: int) -> bool:
    """Whether causal_conv1d has a kernel for a weight of this shape."""
    return 2 <= taps <= 4 and channels % 8 == 0


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """See `ssm_mmmamba.causal_conv`."""
    if sequences is not None or not _conv_supported(*weight.shape) or x.shape[1] == 0:
        return TORCH.causal_conv(x, weight, bias, state, sequences)
    taps = weight.shape[1]
    x = x.contiguous().transpose(1, 2)  # (B, C, L), channels last in memory
    if state is None:
        state = x.new_zeros(*x.shape[:2], taps - 1)
    # Their kernel wants the channels of states last, too.
    initial_states = state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    y = causal_conv1d_fn(x, weight, bias, initial_states=initial_states, activation="silu")
    return y.transpose(1, 2), torch.cat([initial_states, x[..., -(taps - 1) :]], dim=2)[..., -(taps - 1) :]


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
    """See `ssm_mmmamba.ssd_scan`; y is in `v`'s dtype."""
    if sequences is not None and len(sequences.length_buckets) > 1:
        return sequences.run_in_buckets(
            lambda v, k, q, dt, state, bucket: ssd_scan(v, k, q, dt, A, state, chunk_size, bucket),
            (v, k, q, dt),
            state,
        )
    if sequences is not None:
        v, k, q, dt = (sequences.to_padded(x) for x in (v, k, q, dt))
    if v.shape[1] == 0:
        y, state = TORCH.ssd_scan(v, k, q, dt, A, state)
    else:
        group = q.shape[2] // v.shape[2]
        v, k = v.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
        y, state = mamba_chunk_scan_combined(
            v, dt, A, k, q, chunk_size, initial_states=state, return_final_states=True
        )  # (B, L, H, P), (B, H, P, N)
    return y if sequences is None else sequences.from_padded(y), state.float()


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
    """See `ssm_mmmamba.decode_step`."""
    heads, head_dim, state_size = state.shape[1:]
    inner = heads * head_dim
    if not _conv_supported(*conv_weight.shape):
        return reference_decode_step(
            projected, conv_weight, conv_bias, A_log, dt_bias, norm_weight, eps, conv_state, state
        )
    vkq, gate, dt = projected.split([len(conv_weight), inner, heads], dim=-1)
    vkq = causal_conv1d_update(vkq.contiguous(), conv_state, conv_weight, conv_bias, "silu")
    kv_width = (len(conv_weight) - inner) // 2
    v, k, q = (x.unflatten(-1, (-1, head_dim)) for x in vkq.split([kv_width, kv_width, inner], dim=-1))
    group = inner // kv_width
    # One rate, step and bias per head, seen as one per element of the state.
    y = selective_state_update(
        state,
        v.repeat_interleave(group, 1),
        dt[..., None].expand(-1, -1, head_dim),
        -A_log.float().exp()[:, None, None].expand(-1, head_dim, state_size),
        k.repeat_interleave(group, 1),
        q,
        D=state.new_zeros(1).expand(heads, head_dim),  # some versions fail without
        dt_bias=dt_bias[:, None].expand(-1, head_dim),
        dt_softplus=True,
    )
    return gated_rmsnorm(y, gate.unflatten(-1, (-1, head_dim)), norm_weight, eps)


def gated_rmsnorm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ssm_mmmamba.gated_rmsnorm`."""
    out = rmsnorm_fn(y, weight, None, z=gate.contiguous(), eps=eps, norm_before_gate=True)
    return out.to(gate.dtype)


CUDA = Backend("cuda", causal_conv, ssd_scan, gated_rmsnorm, TORCH.add_rmsnorm, decode_step)
