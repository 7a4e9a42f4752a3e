"""Seeds Mamba-2 mixers from attention weights (arXiv 2502.13145, section 3.2).

Queries, keys, values and the output projection are inherited. The other parameters start so that the mixer is as close
to linear attention as it can be: the convolution is the identity, step sizes depend on their bias alone, and the decay
is exp(-e · step size).
"""

import copy
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.publish import (
    Provenance,
    check_model_folder,
    check_unquantized,
    check_weights,
    license_of,
    whole_folder,
    write_model_folder,
)
from mmmamba.conversion.shards import ShardReader, ShardWriter, is_finite, listed


STRATEGIES = ("head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked")
GATE_GAIN = 2**-2.5
STEP_SIZE_RANGE = (1e-3, 1e-1)
_ATTENTION_WEIGHTS = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
_ATTENTION_BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "vkq")


def attention_layers(num_layers: int, num_attention: int, strategy: str) -> list[int]:
    """Which layers stay attention (arXiv 2502.13145, section 3.4).

    Args:
        num_layers: Decoder layers, embedding layers included.
        num_attention: How many of them stay attention.
        strategy: `head` counts from the input, `tail` from the output; `interleaved` puts one attention layer into
            each of `num_attention` equal blocks (at the end counted from), `stacked` puts all of them together.

    Raises:
        ValueError: for an unknown strategy or an impossible number.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
    if not 0 <= num_attention <= num_layers:
        raise ValueError(f"num_attention={num_attention} must lie between 0 and the model's {num_layers} layers.")
    if strategy.endswith("stacked"):
        head = range(num_attention)
    else:
        head = [block * num_layers // num_attention for block in range(num_attention)]
    if strategy.startswith("tail"):
        return sorted(num_layers - 1 - index for index in head)
    return list(head)


def seed_mixer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    num_heads: int,
    conv_kernel: int = 2,
    seed: int = 0,
    layer: int = 0,
    initialization: str = "mimic",
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The parameters of one Mamba-2 mixer, from one attention layer.

    Args:
        q: (heads · head_dim, hidden), the query projection.
        k: (key/value heads · head_dim, hidden).
        v: (key/value heads · head_dim, hidden).
        o: (hidden, heads · head_dim).
        num_heads: Query heads.
        conv_kernel: Taps of the mixer's convolution.
        seed: The random gate and step sizes depend on this and on `layer` alone.
        layer: Index of the layer.
        initialization: `mimic` as published; `inherited` starts convolution, decays and gate as a Mamba-2 model from
            scratch does; `scratch` queries, keys and values, too (the ablations of arXiv 2502.13145, table 4).
        biases: Of values, keys and queries, in this order, each of as many elements as its projection has rows. The
            convolution's bias becomes theirs, as its last tap is 1: the mixer's own projection has none.

    Returns:
        `in_proj.weight` (rows v, k, q, gate, dt), `conv1d.{weight,bias}`, `A_log`, `dt_bias`, `norm.weight` and
        `out_proj.weight`, in the dtype of `q`.
    """
    # Drawn on the CPU in fp32, so that the values do not depend on device and dtype.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    query_rows, hidden = q.shape
    gate = torch.empty(query_rows, hidden, device="cpu")
    torch.nn.init.xavier_uniform_(gate, gain=GATE_GAIN, generator=generator)
    low, high = (math.log(step) for step in STEP_SIZE_RANGE)
    steps = torch.exp(low + (high - low) * torch.rand(num_heads, generator=generator))
    dt_bias = steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus

    channels = len(v) + len(k) + len(q)
    dt = torch.zeros(num_heads, hidden, device="cpu")
    A_log = torch.ones(num_heads, device="cpu")
    kernel, bias = torch.zeros(channels, 1, conv_kernel, device="cpu"), torch.zeros(channels, device="cpu")
    kernel[..., -1] = 1
    if initialization != "mimic":
        # The published initial values of Mamba-2 (arXiv 2405.21060): torch's own for projections and convolution.
        A_log = A_log.uniform_(1, 16, generator=generator).log()
        bound = conv_kernel**-0.5
        for tensor in (kernel, bias):
            tensor.uniform_(-bound, bound, generator=generator)
        for tensor in (gate, dt):
            tensor.uniform_(-(hidden**-0.5), hidden**-0.5, generator=generator)
    if biases is not None and initialization != "scratch":
        bias = torch.cat([x.float() for x in biases])
    if initialization == "scratch":
        v, k, q = (
            torch.empty(x.shape, device="cpu").uniform_(-(hidden**-0.5), hidden**-0.5, generator=generator).to(x)
            for x in (v, k, q)
        )
    return {
        "in_proj.weight": torch.cat([v, k, q, gate.to(q), dt.to(q)]),
        "conv1d.weight": kernel.to(q),
        "conv1d.bias": bias.to(q),
        "A_log": A_log.to(q),
        "dt_bias": dt_bias.to(q),
        "norm.weight": q.new_ones(query_rows // num_heads),
        "out_proj.weight": o,
    }


def seeded_config(config: MmMambaConfig, attention: Collection[int]) -> MmMambaConfig:
    """A copy of the teacher's configuration where all layers but `attention` are Mamba-2.

    Raises:
        ValueError: if the teacher has Mamba-2 layers already, or biases that mixers cannot have, or a layer does not
            exist.
    """
    layer_types = config.text_config.layer_types
    if linear := [index for index, kind in enumerate(layer_types) if kind != "full_attention"]:
        raise ValueError(
            f"The teacher's layers {listed([str(i) for i in linear])} are Mamba-2 already; seed from a model whose "
            "layers are all attention."
        )
    if config.text_config.attention_output_bias and len(set(attention)) < len(layer_types):
        raise ValueError(
            "The teacher has attention_output_bias=True, and a Mamba-2 mixer has no bias behind its heads to inherit "
            "it; give a teacher without."
        )
    if absent := sorted(index for index in attention if not 0 <= index < len(layer_types)):
        raise ValueError(
            f"There is no layer {', '.join(map(str, absent))}; the teacher's are 0 to {len(layer_types) - 1}."
        )
    student = copy.deepcopy(config)
    student.text_config.layer_types = [
        "full_attention" if index in attention else "linear_attention" for index in range(len(layer_types))
    ]
    return student


def seed_state_dict(
    tensors: Mapping[str, Tensor],
    config: MmMambaConfig,
    attention: Collection[int],
    seed: int = 0,
    initialization: str = "mimic",
) -> tuple[dict[str, Tensor], MmMambaConfig]:
    """A student's state dict and configuration, from a teacher's.

    Args:
        tensors: The teacher's state dict; what is inherited is shared, not copied.
        config: The teacher's configuration.
        attention: Layers that stay attention; empty for the linear model.
        seed: Seed of the new parameters.
        initialization: See `seed_mixer`.

    Raises:
        ValueError: as `seeded_config`.
    """
    student = seeded_config(config, attention)
    replaced = _replaced_names(student)
    seeded = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    for layer in _seeded_layers(student):
        seeded |= _seed_layer(tensors, student, layer, seed, initialization)
    return seeded, student


def seed_folder(
    teacher: str | Path,
    destination: str | Path,
    attention: Collection[int] = (),
    strategy: str | None = None,
    num_attention: int | None = None,
    seed: int = 0,
    progress: bool = False,
    initialization: str = "mimic",
) -> MmMambaConfig:
    """Makes a student's model folder from a teacher's, one tensor at a time.

    Args:
        teacher: A model folder of this package, all attention.
        destination: Folder to make; must not exist.
        attention: Layers that stay attention; none makes the linear model.
        strategy: Instead of `attention`: places `num_attention` layers, see `attention_layers`.
        num_attention: How many layers stay attention, with `strategy`.
        seed: Seed of the new parameters.
        progress: Whether to draw a progress bar.
        initialization: See `seed_mixer`.

    Returns:
        The student's configuration.

    Raises:
        ValueError: if the teacher is no model folder of this package, is damaged, or has Mamba-2 layers.
        FileExistsError: if the destination exists.
    """
    teacher, destination = Path(teacher), Path(destination)
    check_model_folder(teacher)
    check_unquantized(teacher)
    with whole_folder(destination) as folder:
        config = MmMambaConfig.from_pretrained(teacher)
        if strategy is not None:
            attention = attention_layers(config.text_config.num_hidden_layers, num_attention, strategy)
        student = seeded_config(config, attention)
        reader = ShardReader(teacher)
        check_weights(reader, config)

        planned, _ = seed_state_dict(reader.specs, config, attention)
        replaced = _replaced_names(student)
        non_finite = []
        progress_bar = tqdm(total=len(planned), desc="Seeding", unit=" tensors", disable=not progress)
        with progress_bar, ShardWriter(folder, planned) as writer:

            def read(name: str) -> Tensor:
                tensor = reader[name]
                if not is_finite(tensor):
                    non_finite.append(name)
                return tensor

            for name in reader.specs:
                if name not in replaced:
                    writer.write(name, read(name))
                    progress_bar.update()
            for layer in _seeded_layers(student):
                names = _attention_names(layer, student.text_config.attention_bias)
                sources = {name: read(name) for name in names}
                for name, tensor in _seed_layer(sources, student, layer, seed, initialization).items():
                    writer.write(name, tensor)
                    progress_bar.update()
        if non_finite:
            raise ValueError(f"NaN or infinite values in {listed(non_finite)}; the teacher is damaged.")
        write_model_folder(
            folder,
            student,
            name=destination.name,
            companions=teacher,
            provenance=Provenance(
                base_model_relation=None,
                origin=f"Its Mamba-2 mixers were seeded from {teacher.name} (seed {seed}) and are not trained yet.",
                license=license_of(teacher),
            ),
        )
    return student


def _attention_names(layer: int, has_biases: bool) -> list[str]:
    names = _ATTENTION_WEIGHTS + (_ATTENTION_BIASES if has_biases else ())
    return [f"model.layers.{layer}.{name}" for name in names]


def _seeded_layers(student: MmMambaConfig) -> list[int]:
    layer_types = student.text_config.layer_types
    return [index for index, kind in enumerate(layer_types) if kind == "linear_attention"]


def _replaced_names(student: MmMambaConfig) -> set[str]:
    """The teacher's tensors that seeding replaces."""
    has_biases = student.text_config.attention_bias
    return {name for layer in _seeded_layers(student) for name in _attention_names(layer, has_biases)}


def _seed_layer(
    tensors: Mapping[str, Tensor], student: MmMambaConfig, layer: int, seed: int, initialization: str = "mimic"
) -> dict[str, Tensor]:
    text = student.text_config
    weights = [tensors[name] for name in _attention_names(layer, text.attention_bias)]
    mixer = seed_mixer(
        *weights[:4],
        num_heads=text.num_attention_heads,
        conv_kernel=text.conv_kernel,
        seed=seed,
        layer=layer,
        initialization=initialization,
        biases=tuple(weights[4:]) or None,
    )
    return {f"model.layers.{layer}.mamba.{name}": tensor for name, tensor in mixer.items()}
