"""Models for llama.cpp with random weights: a Llama of our teacher's shape, and a Mamba-2 hybrid as Granite-4 H.

The hybrid is as large as the Llama: attention without positions in one layer of ten, Mamba-2 of twice the hidden size
elsewhere, and an MLP that is narrower by what the wider mixers take (`arguments.SIZES` has our shapes). Heads are not
tied to the embeddings. How long a step takes does not depend on what the weights are.

The names of tensors and settings are those that llama.cpp's own converter writes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmmamba.benchmarks.arguments import SIZES


FORMATS = {16: "F16", 8: "Q8_0", 4: "Q4_0"}  # by bits; of all matrices, head and embeddings included
ARCHITECTURES = {"llama": "llama", "granite": "granitehybrid"}
ELEMENTS_AT_ONCE = 1 << 22
STATE_SIZE, MAMBA_HEAD_DIM, MAMBA_GROUPS, CONV_KERNEL = 128, 64, 1, 4  # of the hybrid


class Spec(NamedTuple):
    """A tensor to come: its shape, and what its elements are: `normal` of a deviation, or `constant`."""

    shape: tuple[int, ...]
    is_matrix: bool  # stored in the file's format; others in fp32
    deviation: float = 0.02
    mean: float = 0.0


def granite_shape(size: str) -> dict:
    """Widths of the hybrid: `inner`, `mamba_heads`, `channels` of the convolution, `mlp`, its attention layers."""
    layers, hidden, mlp, *_ = SIZES[size]
    inner = 2 * hidden
    return {
        "inner": inner,
        "mamba_heads": inner // MAMBA_HEAD_DIM,
        "channels": inner + 2 * MAMBA_GROUPS * STATE_SIZE,
        "mlp": mlp * 3 // 4,
        "attention_layers": [i for i in range(layers) if i % 10 == min(5, layers // 2)],
    }


def vocabulary_size(model: str, size: str) -> int:
    """Tokens; llama.cpp's converter pads the hybrid's to a multiple of eight."""
    vocabulary = SIZES[size][5]
    return vocabulary if model == "llama" else -(-vocabulary // 8) * 8


def tensor_specs(model: str, size: str) -> dict[str, Spec]:
    """All tensors of a model of `ARCHITECTURES` and `SIZES`, by name."""
    layers, hidden, mlp, heads, kv_heads, _ = SIZES[size]
    shared, vocabulary = kv_heads * hidden // heads, vocabulary_size(model, size)
    granite = granite_shape(size)
    mlp = granite["mlp"] if model == "granite" else mlp
    norm = Spec((hidden,), False, 0.0, 1.0)
    specs = {"token_embd.weight": Spec((vocabulary, hidden), True)}
    for i in range(layers):
        layer = {"attn_norm.weight": norm}
        if model == "llama" or i in granite["attention_layers"]:
            layer |= {
                "attn_q.weight": Spec((hidden, hidden), True),
                "attn_k.weight": Spec((shared, hidden), True),
                "attn_v.weight": Spec((shared, hidden), True),
                "attn_output.weight": Spec((hidden, hidden), True),
            }
        else:
            inner, mamba_heads, channels = (granite[name] for name in ("inner", "mamba_heads", "channels"))
            layer |= {
                "ssm_in.weight": Spec((inner + channels + mamba_heads, hidden), True),
                "ssm_conv1d.weight": Spec((channels, CONV_KERNEL), False, 0.3),
                "ssm_conv1d.bias": Spec((channels,), False),
                "ssm_dt.bias": Spec((mamba_heads,), False, 1.0, -4.0),
                "ssm_a": Spec((mamba_heads, 1), False, 0.0, -1.0),
                "ssm_d": Spec((mamba_heads, 1), False, 0.0, 1.0),
                "ssm_norm.weight": Spec((MAMBA_GROUPS, inner // MAMBA_GROUPS), False, 0.0, 1.0),
                "ssm_out.weight": Spec((hidden, inner), True),
            }
        layer |= {
            "ffn_norm.weight": norm,
            "ffn_gate.weight": Spec((mlp, hidden), True),
            "ffn_up.weight": Spec((mlp, hidden), True),
            "ffn_down.weight": Spec((hidden, mlp), True),
        }
        specs |= {f"blk.{i}.{name}": spec for name, spec in layer.items()}
    return specs | {"output_norm.weight": norm, "output.weight": Spec((vocabulary, hidden), True)}


def cache_bytes(model: str, size: str, context: int) -> tuple[int, int]:
    """Bytes of keys and values after so many tokens, in llama.cpp's fp16, and of states, in fp32."""
    layers, hidden, _, heads, kv_heads, _ = SIZES[size]
    granite = granite_shape(size)
    attention_layers = layers if model == "llama" else len(granite["attention_layers"])
    state = granite["inner"] * STATE_SIZE + granite["channels"] * (CONV_KERNEL - 1)
    key_value = attention_layers * 2 * (kv_heads * hidden // heads) * context * 2
    return key_value, (layers - attention_layers) * state * 4


def file_bytes(model: str, size: str, bits: int) -> int:
    """Bytes of a model's tensors."""
    elements = {True: 0, False: 0}
    for spec in tensor_specs(model, size).values():
        elements[spec.is_matrix] += int(np.prod(spec.shape))
    return int(elements[True] * {16: 2, 8: 34 / 32, 4: 18 / 32}[bits]) + 4 * elements[False]


def step_bytes(model: str, size: str, bits: int, context: int) -> int:
    """Least bytes of one step: all weights, one row of the embeddings, keys and values; states are written, too."""
    _, hidden, *_ = SIZES[size]
    row = hidden * {16: 2, 8: 34 / 32, 4: 18 / 32}[bits]
    key_value, states = cache_bytes(model, size, context)
    weights = file_bytes(model, size, bits) - row * (vocabulary_size(model, size) - 1)
    return int(weights) + key_value + 2 * states


def import_gguf():
    """The package `gguf`. Raises ValueError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "llama.cpp's models are written with gguf, which is not installed; run `pip install gguf`."
        ) from None
    return gguf


def write_gguf(file: Path, model: str, size: str, bits: int) -> None:
    """Writes a model tensor by tensor; the file is there whole, or not at all.

    Args:
        file: To make.
        model: Of `ARCHITECTURES`.
        size: Of `SIZES`.
        bits: Of `FORMATS`.

    Raises:
        ValueError: if `gguf` is not installed.
    """
    gguf = import_gguf()
    matrix_type = gguf.GGMLQuantizationType[FORMATS[bits]]
    types = {True: matrix_type, False: gguf.GGMLQuantizationType.F32}
    specs = tensor_specs(model, size)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.new")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURES[model])
    _add_settings(writer, model, size)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{FORMATS[bits]}"))
    for name, spec in specs.items():
        shape = gguf.quant_shape_to_byte_shape(spec.shape, types[spec.is_matrix])
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), types[spec.is_matrix])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        random = np.random.default_rng(0)
        for spec in specs.values():
            writer.write_tensor_data(_random_bytes(random, spec, types[spec.is_matrix], gguf))
        writer.close()
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _add_settings(writer, model: str, size: str) -> None:
    layers, hidden, mlp, heads, kv_heads, _ = SIZES[size]
    writer.add_name(f"{model} of random weights")
    writer.add_vocab_size(vocabulary_size(model, size))
    writer.add_tokenizer_model("no_vocab")  # tokens have numbers and no text, all that llama-bench needs
    writer.add_context_length(2**20)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    if model == "llama":
        writer.add_feed_forward_length(mlp)
        writer.add_head_count_kv(kv_heads)
        writer.add_rope_freq_base(1e6)
        return
    granite = granite_shape(size)
    writer.add_feed_forward_length(granite["mlp"])
    writer.add_head_count_kv([kv_heads if i in granite["attention_layers"] else 0 for i in range(layers)])
    writer.add_rope_scaling_finetuned(False)  # llama.cpp's sign for attention without positions
    writer.add_ssm_conv_kernel(CONV_KERNEL)
    writer.add_ssm_state_size(STATE_SIZE)
    writer.add_ssm_group_count(MAMBA_GROUPS)
    writer.add_ssm_inner_size(granite["inner"])
    writer.add_ssm_time_step_rank(granite["mamba_heads"])


def _random_bytes(random: np.random.Generator, spec: Spec, kind, gguf) -> np.ndarray:
    """A tensor's bytes, (rows, bytes of a row), made a few rows at a time: fp32 takes several times their memory."""
    rows, columns = int(np.prod(spec.shape[:-1])), spec.shape[-1]
    at_once = max(1, ELEMENTS_AT_ONCE // columns)
    parts = []
    for first in range(0, rows, at_once):
        values = random.standard_normal((min(at_once, rows - first), columns), dtype=np.float32)
        values = values * np.float32(spec.deviation) + np.float32(spec.mean)
        parts.append(gguf.quants.quantize(values, kind).view(np.uint8))
    return np.concatenate(parts)
