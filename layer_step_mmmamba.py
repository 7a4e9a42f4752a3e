"""A decoding step of a whole layer as one call of the CPU kernels, where nothing stands in the way.

What does: gradients, other dtypes and devices, padding inside the step, many rows, hooks, adapters and whatever else
somebody put in the place of a part. The layer then runs module by module, as it always does while a prompt is read.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .backends_mmmamba import FEW_ROWS, backend, runs_as_written
from .cpu_mmmamba import DTYPES, KINDS, Layer, Matrix, Vector, kernels
from .quantization_mmmamba import QuantizedLinear


MOST_ROWS = 16  # of a quantised layer; with more a product is no longer bound by reading its weights
SILU = ("silu", "swish")


class Part(NamedTuple):
    """A module that the kernels stand in for, as it was when its addresses were taken."""

    parent: nn.Module
    name: str
    module: nn.Module
    kind: type
    tensors: tuple[tuple[str, Tensor | None, int], ...]  # name, parameter, address

    @classmethod
    def of(cls, parent: nn.Module, name: str, *parameters: str) -> "Part":
        module = getattr(parent, name)
        tensors = ((x, getattr(module, x)) for x in parameters)
        return cls(parent, name, module, type(module), tuple((x, t, 0 if t is None else t.data_ptr()) for x, t in tensors))

    @property
    def unchanged(self) -> bool:
        module = self.module
        if self.parent._modules.get(self.name) is not module or type(module) is not self.kind:
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        for name, tensor, address in self.tensors:
            if getattr(module, name) is not tensor or (tensor is not None and tensor.data_ptr() != address):
                return False
        return True


class Plan(NamedTuple):
    """A layer as the kernels take it."""

    parts: list[Part]
    layer: Layer
    dtype: torch.dtype
    most_rows: int


_plans: WeakKeyDictionary[nn.Module, Plan | None] = WeakKeyDictionary()


def layer_step(layer: nn.Module, hidden_states: Tensor, sequences, cache) -> Tensor | None:
    """A Mamba-2 layer's output for one token per row, its states moved on; None where its modules must run.

    Args:
        layer: An `MmMambaDecoderLayer`.
        hidden_states: (B, L, D).
        sequences: What of the step is padding, or None.
        cache: What was read before, or None.

    Returns:
        (B, 1, D).
    """
    if hidden_states.device.type != "cpu" or hidden_states.shape[1] != 1 or sequences is not None or cache is None:
        return None
    if layer.layer_type != "linear_attention" or not runs_as_written(hidden_states):
        return None
    if backend(hidden_states.device, hidden_states.dtype, layer.mamba.config.ssm_implementation).name != "cpu":
        return None
    plan = _plans.get(layer)
    if plan is None or not all(part.unchanged for part in plan.parts):
        plan = _plans[layer] = _plan(layer)
    rows = len(hidden_states)
    if plan is None or plan.dtype != hidden_states.dtype or rows > plan.most_rows:
        return None
    conv_state, state = cache.conv_state(layer.mamba.layer_idx), cache.recurrent_state(layer.mamba.layer_idx)
    if state is None or len(state) != rows or conv_state.dtype != plan.dtype or state.dtype != torch.float32:
        return None
    if not (conv_state.is_contiguous() and state.is_contiguous()):
        return None
    return kernels().layer_step(plan.layer, hidden_states[:, 0].contiguous(), conv_state, state)[:, None]


def _plan(layer: nn.Module) -> Plan | None:
    """None where the kernels do not compute what the layer does."""
    mixer, mlp, config = layer.mamba, layer.mlp, layer.mamba.config
    linear = [(mixer, "in_proj"), (mixer, "out_proj"), *((mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))]
    if config.hidden_act not in SILU or any(type(getattr(*place)) not in (nn.Linear, QuantizedLinear) for place in linear):
        return None
    parts = [
        Part.of(layer, "mamba", "A_log", "dt_bias"), Part.of(layer, "mlp"), Part.of(layer, "input_layernorm", "weight"),
        Part.of(layer, "post_attention_layernorm", "weight"), Part.of(mixer, "conv1d", "weight", "bias"),
        Part.of(mixer, "norm", "weight"), *(Part.of(*place, "weight", "bias") for place in linear),
    ]  # fmt: skip
    dtype = layer.input_layernorm.weight.dtype
    for part in parts:
        for _, tensor, _ in part.tensors:
            if tensor is not None and not (tensor.device.type == "cpu" and tensor.is_contiguous()):
                return None
            if tensor is not None and tensor.dtype not in (*DTYPES, *([torch.uint8] if part.kind is QuantizedLinear else ())):
                return None
    # Other classes than the package's own may compute something else.
    kinds = (nn.Linear, QuantizedLinear)
    if any(part.kind not in kinds and part.kind.__module__ != type(layer).__module__ for part in parts):
        return None
    if not all(part.unchanged for part in parts):
        return None
    matrices = {name: _matrix(getattr(parent, name)) for parent, name in linear}
    vectors = {
        "norm": layer.input_layernorm.weight, "mlp_norm": layer.post_attention_layernorm.weight,
        "conv_weight": mixer.conv1d.weight, "conv_bias": mixer.conv1d.bias, "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias, "mixer_norm": mixer.norm.weight,
    }  # fmt: skip
    sizes = {
        "hidden": config.hidden_size, "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
        "head_size": config.head_dim, "taps": config.conv_kernel, "mlp": config.intermediate_size,
        "dtype": DTYPES[dtype],
    }  # fmt: skip
    eps = {
        "norm_eps": layer.input_layernorm.eps, "mixer_eps": mixer.norm.eps, "mlp_eps": layer.post_attention_layernorm.eps
    }  # fmt: skip
    vectors = {name: Vector.of(tensor) for name, tensor in vectors.items()}
    quantised = all(type(getattr(*place)) is QuantizedLinear for place in linear)
    return Plan(parts, Layer(**sizes, **eps, **matrices, **vectors), dtype, MOST_ROWS if quantised else FEW_ROWS)


def _matrix(layer: nn.Module) -> Matrix:
    kind = layer.bits if type(layer) is QuantizedLinear else layer.weight.dtype
    return Matrix.of(layer.weight, layer.bias, layer.out_features, layer.in_features, KINDS[kind])
