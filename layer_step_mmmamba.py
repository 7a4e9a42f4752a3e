"""A decoding step of a whole layer as one or two calls of the CPU kernels, where nothing stands in the way.

What does: gradients, other dtypes and devices, padding, many rows, hooks, adapters and whatever else somebody put in
the place of a part. The layer then runs module by module, as it always does while a prompt is read.
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
MIXERS = {  # each layer type's mixer, the linear layers and the other parts of it, with their parameters
    "linear_attention": (
        "mamba", ("in_proj", "out_proj"), {"conv1d": ("weight", "bias"), "norm": ("weight",)}, ("A_log", "dt_bias")
    ),
    "full_attention": ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), {}, ()),
}  # fmt: skip
MLP = ("gate_proj", "up_proj", "down_proj")


class Part(NamedTuple):
    """A module that the kernels stand in for, as it was when its addresses were taken."""

    parent: nn.Module
    name: str
    module: nn.Module
    kind: type
    tensors: tuple[tuple[str, Tensor | None, int], ...]  # name, parameter, address

    @classmethod
    def of(cls, parent: nn.Module, name: str, parameters: tuple[str, ...] = ()) -> "Part":
        module = getattr(parent, name)
        tensors = [(key, getattr(module, key)) for key in parameters]
        # Classes of their own, as quantisation tools have them, may have no address to read from.
        addresses = [tensor.data_ptr() if type(tensor) is nn.Parameter else 0 for _, tensor in tensors]
        tensors = tuple((*named, address) for named, address in zip(tensors, addresses, strict=True))
        return cls(parent, name, module, type(module), tensors)

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

    @property
    def readable(self) -> bool:
        """Whether the kernels can read all parameters."""
        dtypes = [*DTYPES, torch.uint8] if self.kind is QuantizedLinear else [*DTYPES]
        return all(
            type(x) is nn.Parameter and x.device.type == "cpu" and x.is_contiguous() and x.dtype in dtypes
            for _, x, _ in self.tensors
            if x is not None
        )


class Plan(NamedTuple):
    """A layer as the kernels take it."""

    parts: list[Part]
    layer: Layer
    dtype: torch.dtype
    most_rows: int


_plans: WeakKeyDictionary[nn.Module, Plan | None] = WeakKeyDictionary()


def layer_step(
    layer: nn.Module, hidden_states: Tensor, attention_mask, position_embeddings, cache, options: dict
) -> Tensor | None:
    """A decoder layer's output for one token per row, what it keeps moved on; None where its modules must run.

    Args:
        layer: An `MmMambaDecoderLayer`.
        hidden_states: (B, L, D).
        attention_mask, position_embeddings, cache, options: As its `forward` takes them.

    Returns:
        (B, 1, D).
    """
    if hidden_states.device.type != "cpu" or hidden_states.shape[1] != 1 or cache is None:
        return None
    if attention_mask is not None or layer.training or not runs_as_written(hidden_states):
        return None
    plan = _plans.get(layer)
    if plan is None or not all(part.unchanged for part in plan.parts):
        plan = _plans[layer] = _plan(layer)
    if plan is None or plan.dtype != hidden_states.dtype or len(hidden_states) > plan.most_rows:
        return None
    mixer = plan.parts[0].module
    if backend(hidden_states.device, plan.dtype, mixer.config.ssm_implementation).name != "cpu":
        return None
    step = _mamba_step if layer.layer_type == "linear_attention" else _attention_step
    y = step(plan.layer, mixer, hidden_states[:, 0].contiguous(), position_embeddings, cache, options)
    return None if y is None else y[:, None]


def _mamba_step(layer: Layer, mixer: nn.Module, x: Tensor, position_embeddings, cache, options: dict) -> Tensor | None:
    conv_state, state = cache.conv_state(mixer.layer_idx), cache.recurrent_state(mixer.layer_idx)
    if state is None or len(state) != len(x) or conv_state.dtype != x.dtype or state.dtype != torch.float32:
        return None
    if not (conv_state.is_contiguous() and state.is_contiguous()):
        return None
    return kernels().layer_step(layer, x, conv_state, state)


def _attention_step(
    layer: Layer, mixer: nn.Module, x: Tensor, position_embeddings, cache, options: dict
) -> Tensor | None:
    chosen = mixer.config._attn_implementation == "sdpa" and options.get("attention_function") is None
    if not chosen or options.get("attention_weights") is not None:
        return None  # another way to attend was asked for, or what only it can give
    cos, sin = (table[:, 0].to(x.dtype).expand(len(x), -1).contiguous() for table in position_embeddings)
    q, k, v = kernels().attention_projections(layer, x, cos, sin)
    keys, values = cache.update(k, v, mixer.layer_idx)
    if keys.dtype != values.dtype or keys.dtype not in DTYPES or keys.stride(-1) != 1 or values.stride(-1) != 1:
        keys, values = keys.to(x.dtype).contiguous(), values.to(x.dtype).contiguous()
    return kernels().attention_step(layer, x, q, keys, values)


def _plan(layer: nn.Module) -> Plan | None:
    """None where the kernels do not compute what the layer does."""
    name, projections, others, parameters = MIXERS[layer.layer_type]
    mixer, mlp = getattr(layer, name), layer.mlp
    linear = [*((mixer, x) for x in projections), *((mlp, x) for x in MLP)]
    parts = [
        Part.of(layer, name, parameters),
        Part.of(layer, "mlp"),
        Part.of(layer, "input_layernorm", ("weight",)),
        Part.of(layer, "post_attention_layernorm", ("weight",)),
        *(Part.of(mixer, x, of_part) for x, of_part in others.items()),
        *(Part.of(parent, x, ("weight", "bias")) for parent, x in linear),
    ]
    config = mixer.config
    # Other classes than the package's own may compute something else.
    plain = all(
        part.kind.__module__ == type(layer).__module__ if part.parent is layer or part.name in others
        else part.kind in (nn.Linear, QuantizedLinear)
        for part in parts
    )  # fmt: skip
    if config.hidden_act not in SILU or not plain or not all(part.readable and part.unchanged for part in parts):
        return None
    dtype = layer.input_layernorm.weight.dtype
    described = Layer(
        hidden=config.hidden_size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        head_size=config.head_dim, taps=config.conv_kernel, mlp=config.intermediate_size, dtype=DTYPES[dtype],
        norm_eps=layer.input_layernorm.eps, mlp_eps=layer.post_attention_layernorm.eps,
        norm=Vector.of(layer.input_layernorm.weight), mlp_norm=Vector.of(layer.post_attention_layernorm.weight),
    )  # fmt: skip
    for parent, x in linear:
        setattr(described, "out_proj" if x == "o_proj" else x, _matrix(getattr(parent, x)))
    if layer.layer_type == "linear_attention":
        described.mixer_eps, described.mixer_norm = mixer.norm.eps, Vector.of(mixer.norm.weight)
        described.conv_weight, described.conv_bias = Vector.of(mixer.conv1d.weight), Vector.of(mixer.conv1d.bias)
        described.A_log, described.dt_bias = Vector.of(mixer.A_log), Vector.of(mixer.dt_bias)
    quantised = all(type(getattr(*place)) is QuantizedLinear for place in linear)
    return Plan(parts, described, dtype, MOST_ROWS if quantised else FEW_ROWS)


def _matrix(layer: nn.Module) -> Matrix:
    kind = layer.bits if type(layer) is QuantizedLinear else layer.weight.dtype
    return Matrix.of(layer.weight, layer.bias, layer.out_features, layer.in_features, KINDS[kind])
