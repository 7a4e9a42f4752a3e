"""The Mamba-2 mixer in vLLM: vLLM's kernels and state cache, with the weights as they lie in the checkpoint.

Shapes: T tokens of all requests of a step, D hidden size, H query heads, K key/value heads, P head size; H and K are
those of one process where heads are spread over several (tensor parallelism).
"""

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name  # how vLLM's own mixers name themselves to their custom op
from vllm.v1.kv_cache_interface import KVCacheSpec

from mmmamba.configuration_mmmamba import MmMambaTextConfig


class MmMambaMixer(MambaMixer2):
    """Mamba-2 with grouped keys and values (arXiv 2502.13145, section 3 and eq. 2).

    vLLM's mixer shares B and C between heads; here keys and values are shared and queries are not. The projection and
    the convolution stay as small as the checkpoint has them; only their outputs are repeated, for the scan.

    Args:
        config: Of the decoder.
        vllm_config: Of the engine.
        prefix: Name of this module, which is also that of its states.
    """

    def __init__(self, config: MmMambaTextConfig, vllm_config: VllmConfig, prefix: str):
        if vllm_config.cache_config.use_replayssm:
            raise ValueError("use_replayssm=True is for models whose heads share B; leave it out.")
        processes = get_tensor_model_parallel_world_size()
        groups = kv_heads(config, processes)
        inner, shared = config.num_attention_heads * config.head_dim, groups * config.head_dim
        super().__init__(
            hidden_size=config.hidden_size,
            ssm_state_size=config.head_dim,
            conv_kernel_size=config.conv_kernel,
            intermediate_size=inner,
            use_conv_bias=True,
            use_bias=False,
            n_groups=groups,  # so that projection, convolution and its state have the checkpoint's size
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            use_rms_norm=False,  # the norm is below
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        self.config = config
        # In the checkpoint's order, so that it is read as it is, and adapters (LoRA) of it, too.
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [shared, shared, inner, inner, config.num_attention_heads],
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.in_proj",
        )
        self.conv1d = MergedColumnParallelLinear(
            config.conv_kernel, [shared, shared, inner], bias=True, quant_config=None, prefix=f"{prefix}.conv1d"
        )
        self.conv1d.weight.data = self.conv1d.weight.data.unsqueeze(1)  # (channels, 1, taps), as in the checkpoint
        self.conv_weights = self.conv1d.weight.data.squeeze(1)
        skip = torch.zeros_like(self.D)
        del self.D  # there is no skip connection, and none in checkpoints
        self.register_buffer("D", skip, persistent=False)
        self.norm = GatedRMSNorm(config.head_dim, config.ssm_norm_eps)
        self.vkq_sizes = [size // processes for size in (shared, shared, inner)]
        self.sizes = [sum(self.vkq_sizes), inner // processes, config.num_attention_heads // processes]  # …, gate, dt
        # What vLLM's part works on: v|k|q and dt, without the gate; and one group per head behind the convolution.
        self.n_groups = config.num_attention_heads
        self.tped_intermediate_size = 0
        self.split_hidden_states_B_C_fn = self._values_keys_queries

    def _values_keys_queries(self, vkq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, 2 K P + H P) to values, keys and queries of (T, H P) each: x, B and C in Mamba-2's terms."""
        v, k, q = vkq.split(self.vkq_sizes, dim=-1)
        return self._for_each_head(v), self._for_each_head(k), q.contiguous()

    def _for_each_head(self, x: Tensor) -> Tensor:
        heads, repeats = x.unflatten(-1, (-1, self.head_dim)), self.vkq_sizes[2] // self.vkq_sizes[0]
        return heads[:, :, None].expand(-1, -1, repeats, -1).reshape(len(x), -1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Args: hidden_states (T, D). Returns the same shape."""
        projected, _ = self.in_proj(hidden_states)
        y = projected.new_empty(len(projected), self.sizes[1])
        torch.ops.vllm.mamba_mixer2(projected, y, _encode_layer_name(self.prefix))
        gate = projected.split(self.sizes, dim=-1)[1]
        return self.out_proj(self.norm(y, gate))[0]

    def conv_ssm_forward(self, projected_states: Tensor, output: Tensor) -> None:
        """Convolution and scan or step. Args: projected_states (T, v|k|q|gate|dt); output (T, H P), written to."""
        vkq, _, dt = projected_states.split(self.sizes, dim=-1)
        super().conv_ssm_forward(torch.cat([vkq, dt], dim=-1), output)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        if current_platform.is_cpu():
            # vLLM's scan on CPUs gives the last state alone, so prompts must be cut where a state is to be kept.
            return MambaBase.get_kv_cache_spec(self, vllm_config)
        return super().get_kv_cache_spec(vllm_config)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.model_config.dtype, self.cache_config)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.config, get_tensor_model_parallel_world_size(), self.num_spec)


class GatedRMSNorm(nn.Module):
    """RMSNorm over the head size with one weight for all heads, then the SiLU gate (vLLM's own gates first)."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(head_dim), requires_grad=False), eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Args: y and gate (T, H P). Returns the same shape in the gate's dtype."""
        heads = y.float().unflatten(-1, (-1, len(self.weight)))
        normed = nn.functional.rms_norm(heads, self.weight.shape, self.weight.float(), self.eps)
        return (normed.flatten(-2) * nn.functional.silu(gate.float())).to(gate.dtype)


def kv_heads(config: MmMambaTextConfig, processes: int) -> int:
    """Key/value heads of all processes together: each process has at least one, so few heads are on several.

    Raises:
        ValueError: if the heads cannot be spread over so many processes.
    """
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % processes or (shared % processes and processes % shared):
        raise ValueError(
            f"tensor_parallel_size={processes} does not fit {heads} heads and {shared} key/value heads; give a number "
            f"that divides {heads}, and divides {shared} or is a multiple of it."
        )
    return max(shared, processes)


def state_shapes(config: MmMambaTextConfig, processes: int, draft_tokens: int = 0) -> tuple[tuple[int, ...], ...]:
    """Shapes of a layer's convolution state and recurrent state of one conversation in one process."""
    return MambaStateShapeCalculator.mamba2_state_shape(
        tp_world_size=processes,
        intermediate_size=config.num_attention_heads * config.head_dim,
        n_groups=kv_heads(config, processes),
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        state_size=config.head_dim,
        conv_kernel=config.conv_kernel,
        num_spec=draft_tokens,
    )


def state_dtypes(dtype: torch.dtype, cache_config: CacheConfig) -> tuple[torch.dtype, ...]:
    """Dtypes of the two states; recurrent ones are fp32 unless the engine is told otherwise: bf16 loses steps."""
    recurrent = cache_config.mamba_ssm_cache_dtype
    return MambaStateDtypeCalculator.mamba2_state_dtype(
        dtype, cache_config.mamba_cache_dtype, "float32" if recurrent == "auto" else recurrent
    )
