"""A decoding step of a whole layer as one or two calls of the CPU kernels, where nothing stands in the way.

A layer runs module by module while a prompt is read, and where there are gradients, other dtypes or devices, padding,
many rows, hooks, adapters, or whatever else somebody put in the place of a part.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backends_mmmamba import FEW_ROWS, backend, runs_as_written
from .cpu_mmmamba import DTYPES, KINDS, Layer, Matrix, Vector, kernels, packed_shape
from .quantization_mmmamba import QuantizedLinear


MOST_ROWS = 16  # of a quantised layer; with more a product is no longer bound by reading its weights
LINEAR = (nn.Linear, QuantizedLinear)


class Part(NamedTuple):
    """A module that the kernels stand in for.

    Attributes:
        parent: Its parent's name; "" is the layer.
        name: Its own.
        kinds: The classes it may have, or the name of one of the package's network.
        uses: Parameters and numbers of it that the kernels use.
    """

    parent: str
    name: str
    kinds: tuple[type, ...] | str
    uses: tuple[str, ...] = ()

    def accepts(self, kind: type) -> bool:
        """Whether a module of this class computes what the kernels do."""
        # Somebody put another function in its place, or around it.
        if kind.forward.__module__ != kind.__module__ or hasattr(kind.forward, "__wrapped__"):
            return False
        if isinstance(self.kinds, tuple):
            return kind in self.kinds
        return kind.__name__ == self.kinds and kind.__module__.rpartition(".")[2] == "modeling_mmmamba"


def _linear(parent: str, *names: str) -> list[Part]:
    return [Part(parent, name, LINEAR, ("weight", "bias")) for name in names]


COMMON = (
    Part("", "input_layernorm", "MmMambaRMSNorm", ("weight", "eps")),
    Part("", "post_attention_layernorm", "MmMambaRMSNorm", ("weight", "eps")),
    Part("", "mlp", "MmMambaMLP"),
    Part("mlp", "act_fn", (nn.SiLU, type(ACT2FN["silu"]))),
    *_linear("mlp", "gate_proj", "up_proj", "down_proj"),
)
PARTS = {  # of each type of layer, parents first
    "linear_attention": (
        Part("", "mamba", "MmMambaMixer", ("A_log", "dt_bias")),
        Part("mamba", "conv1d", "MmMambaConv", ("weight", "bias")),
        Part("mamba", "norm", "MmMambaGatedRMSNorm", ("weight", "eps")),
        *_linear("mamba", "in_proj", "out_proj"),
        *COMMON,
    ),
    "full_attention": (
        Part("", "self_attn", "MmMambaAttention", ("scaling",)),
        *_linear("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        *COMMON,
    ),
}


class Plan(NamedTuple):
    """A layer as the kernels take it."""

    layer: Layer
    dtype: torch.dtype
    most_rows: int


# Each layer's facts and its plan, which hold nothing that would keep a model in memory.
_plans: WeakKeyDictionary[nn.Module, tuple[list, Plan | None]] = WeakKeyDictionary()


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
    if not runs_as_written(hidden_states):  # first: a graph that is being made may serve any length
        return None
    if hidden_states.device.type != "cpu" or hidden_states.dtype not in DTYPES or cache is None:
        return None
    rows, length, width = hidden_states.shape
    if length != 1 or rows > MOST_ROWS or attention_mask is not None or layer.training:
        return None
    facts = _facts(layer)
    if facts is None:
        return None
    known = _plans.get(layer)
    if known is None or known[0] != facts:
        known = _plans[layer] = facts, _plan(layer)
    plan = known[1]
    if plan is None or plan.dtype != hidden_states.dtype or rows > plan.most_rows or width != plan.layer.hidden:
        return None
    mixer = layer.mamba if layer.layer_type == "linear_attention" else layer.self_attn
    if backend(hidden_states.device, plan.dtype, mixer.config.ssm_implementation).name != "cpu":
        return None
    step = _mamba_step if layer.layer_type == "linear_attention" else _attention_step
    y = step(plan.layer, mixer, hidden_states[:, 0].contiguous(), position_embeddings, cache, options)
    return None if y is None else y[:, None]


def _mamba_step(layer: Layer, mixer: nn.Module, x: Tensor, position_embeddings, cache, options: dict) -> Tensor | None:
    conv_state, state = cache.conv_state(mixer.layer_idx), cache.recurrent_state(mixer.layer_idx)
    if state is None or conv_state.dtype != x.dtype or state.dtype != torch.float32:
        return None
    size, channels = layer.head_size, (layer.heads + 2 * layer.kv_heads) * layer.head_size
    if state.shape != (len(x), layer.heads, size, size) or conv_state.shape != (len(x), channels, layer.taps - 1):
        return None  # a cache of another batch or model: the modules say so
    if not (conv_state.is_contiguous() and state.is_contiguous()):
        return None
    return kernels().layer_step(layer, x, conv_state, state)


def _attention_step(
    layer: Layer, mixer: nn.Module, x: Tensor, position_embeddings, cache, options: dict
) -> Tensor | None:
    chosen = mixer.config._attn_implementation == "sdpa" and options.get("attention_function") is None
    if not chosen or options.get("attention_weights") is not None:
        return None  # another way to attend was asked for, or what only it can give
    if not ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers."):
        return None  # somebody registered their own
    cos, sin = (table[:, 0].to(x.dtype).expand(len(x), -1).contiguous() for table in position_embeddings)
    q, k, v = kernels().attention_projections(layer, x, cos, sin)
    keys, values = cache.update(k, v, mixer.layer_idx)
    if keys.dtype != values.dtype or keys.dtype not in DTYPES or keys.stride(-1) != 1 or values.stride(-1) != 1:
        keys, values = keys.to(x.dtype).contiguous(), values.to(x.dtype).contiguous()
    return kernels().attention_step(layer, x, q, keys, values)


def _facts(layer: nn.Module) -> list | None:
    """What a plan is true of: classes, numbers, and each parameter's place and form; None if something is in the way.

    They are compared at every step, so that whatever is done to a model takes effect at once.
    """
    modules, facts = {"": layer}, []
    for part in PARTS[layer.layer_type]:
        module = modules[part.name] = modules[part.parent]._modules.get(part.name)
        if module is None or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        facts += [type(module), type(module).forward]
        for name in part.uses:
            used = module._parameters[name] if name in module._parameters else getattr(module, name, None)
            if type(used) is nn.Parameter:
                facts.append((used.data_ptr(), used.dtype, used.shape, used.is_contiguous()))
            elif isinstance(used, Tensor):
                return None  # classes of their own, as quantisation tools have them, may have no address
            else:
                facts.append(used)
    return facts


def _plan(layer: nn.Module) -> Plan | None:
    """None where the kernels do not compute what the layer does."""
    modules, parts = {"": layer}, PARTS[layer.layer_type]
    for part in parts:
        modules[part.name] = modules[part.parent]._modules[part.name]
    if not all(part.accepts(type(modules[part.name])) for part in parts):
        return None
    mixer = modules[parts[0].name]
    config, first, second = mixer.config, layer.input_layernorm, layer.post_attention_layernorm
    hidden, mlp, size = config.hidden_size, layer.mlp.gate_proj.out_features, config.head_dim
    heads, kv_heads, taps = config.num_attention_heads, config.num_key_value_heads, config.conv_kernel
    inner, shared = heads * size, kv_heads * size
    linear = {
        "in_proj": (2 * shared + 2 * inner + heads, hidden), "out_proj": (hidden, inner),
        "q_proj": (inner, hidden), "k_proj": (shared, hidden), "v_proj": (shared, hidden), "o_proj": (hidden, inner),
        "gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp),
    }  # fmt: skip
    linear = {name: (modules[name], *shape) for name, shape in linear.items() if name in modules}
    vectors = {"norm": (first.weight, (hidden,)), "mlp_norm": (second.weight, (hidden,))}
    if layer.layer_type == "linear_attention":
        channels, conv = inner + 2 * shared, mixer.conv1d
        vectors |= {
            "conv_weight": (conv.weight, (channels, 1, taps)), "conv_bias": (conv.bias, (channels,)),
            "A_log": (mixer.A_log, (heads,)), "dt_bias": (mixer.dt_bias, (heads,)),
            "mixer_norm": (mixer.norm.weight, (size,)),
        }  # fmt: skip
    elif mixer.scaling != size**-0.5:
        return None
    if not all(_readable(x, shape, DTYPES) for x, shape in vectors.values()):
        return None
    if not all(_is_linear(module, *shape) for module, *shape in linear.values()):
        return None
    dtype = first.weight.dtype
    described = Layer(
        hidden=hidden, heads=heads, kv_heads=kv_heads, head_size=size, taps=taps, mlp=mlp, dtype=DTYPES[dtype],
        norm_eps=first.eps, mlp_eps=second.eps, **{name: Vector.of(x) for name, (x, _) in vectors.items()},
    )  # fmt: skip
    if layer.layer_type == "linear_attention":
        described.mixer_eps = mixer.norm.eps
    for name, (module, rows, columns) in linear.items():
        kind = KINDS[module.bits if type(module) is QuantizedLinear else module.weight.dtype]
        matrix = Matrix.of(module.weight, module.bias, rows, columns, kind)
        setattr(described, "out_proj" if name == "o_proj" else name, matrix)
    quantised = all(type(module) is QuantizedLinear for module, *_ in linear.values())
    return Plan(described, dtype, MOST_ROWS if quantised else FEW_ROWS[dtype])


def _readable(x: Any, shape: tuple[int, ...], dtypes) -> bool:
    """Whether `x` is a parameter of this shape that the kernels can read."""
    if type(x) is not nn.Parameter or x.shape != shape or x.dtype not in dtypes:
        return False
    return x.device.type == "cpu" and x.is_contiguous() and x.data_ptr() != 0


def _is_linear(layer: nn.Module, rows: int, columns: int) -> bool:
    if layer.bias is not None and not _readable(layer.bias, (rows,), DTYPES):
        return False
    if type(layer) is nn.Linear:
        return _readable(layer.weight, (rows, columns), DTYPES)
    if (layer.out_features, layer.in_features) != (rows, columns):
        return False
    return _readable(layer.weight, packed_shape(rows, columns, layer.bits), (torch.uint8,))
