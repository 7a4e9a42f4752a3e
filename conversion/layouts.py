"""Upstream checkpoint layouts, as tables of names and a few tensor operations.

Three upstream layouts are read: HoVLE (every mixer is attention), the released mmMamba (attention or fused Mamba-2)
and upstream's training student (Mamba-2 with separate projections). They differ in their mixers only. Row orders were
checked against tensors that upstream's own code produced (tests/golden).
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmmamba.configuration_mmmamba import MmMambaConfig, MmMambaTextConfig


class Operation(NamedTuple):
    """How upstream tensors become ours and back; each side takes (tensors, text config) and returns a list."""

    read: Callable[[Sequence[Tensor], MmMambaTextConfig], list[Tensor]]
    write: Callable[[Sequence[Tensor], MmMambaTextConfig], list[Tensor]]


class Rule(NamedTuple):
    """One line of a table: upstream names, our names, and the operation between them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operation: Operation


class Checkpoint(NamedTuple):
    """What is to be converted.

    Attributes:
        config: The model in this package's terms.
        tensors: A `ShardReader`, or what reads tensors like one.
        rules: How tensors become ours.
        reason_unused: Why a tensor that no rule reads is left out, by its name; None if it is not known to be unused.
        unused_rows: The same for rows of tensors that are used.
        new: Our tensors that the checkpoint does not have.
        processor: Processor, image processor or tokenizer, as `write_model_folder` takes them.
        chat_template: To be written even without a tokenizer.
        base_model: The model's name on the Hub, if known.
        license: Of the model, as the Hub names it, if known.
        origin: A sentence on where the model comes from.
        license: Of its weights, by the Hub's name; None if it is not known.
        notes: What the folder lacks and how to add it.
    """

    config: MmMambaConfig
    tensors: Any
    rules: list[Rule]
    reason_unused: Callable[[str], str | None]
    unused_rows: dict[str, str] = {}  # noqa: RUF012
    new: dict[str, Tensor] = {}  # noqa: RUF012
    processor: Any = None
    chat_template: str | None = None
    base_model: str | None = None
    license: str | None = "mit"  # HoVLE's and mmMamba's
    origin: str = ""
    license: str | None = "mit"  # of HoVLE and the released mmMamba
    notes: list[str] = []  # noqa: RUF012


def _identity(tensors, config):
    return list(tensors)


def _deinterleave(tensors, config):
    """`wqkv` holds, per key/value head, its query heads, its key and its value, `head_dim` rows each."""
    per_head = config.num_attention_heads // config.num_key_value_heads
    groups = tensors[0].unflatten(0, (config.num_key_value_heads, per_head + 2, config.head_dim))
    return [part.flatten(0, 2) for part in groups.split([per_head, 1, 1], dim=1)]


def _interleave(tensors, config):
    groups = [x.unflatten(0, (config.num_key_value_heads, -1, config.head_dim)) for x in tensors]
    return [torch.cat(groups, dim=1).flatten(0, 2)]


def _concatenate(tensors, config):
    return [torch.cat(list(tensors))]


def _split_in_proj(tensors, config):
    query_rows = config.num_attention_heads * config.head_dim
    key_rows = config.num_key_value_heads * config.head_dim
    return list(tensors[0].split([key_rows, key_rows, query_rows, query_rows, config.num_attention_heads]))


def _drop_class_row(tensors, config):
    return [tensors[0][:, 1:]]


def _add_class_row(tensors, config):
    return [torch.cat([torch.zeros_like(tensors[0][:, :1]), tensors[0]], dim=1)]


def _split_tables(special_rows, tensors, config):
    return list(tensors[0].split([len(tensors[0]) - special_rows, special_rows]))


IDENTITY = Operation(_identity, _identity)
SPLIT_QKV = Operation(_deinterleave, _interleave)
CONCATENATE_ROWS = Operation(_concatenate, _split_in_proj)
DROP_CLASS_ROW = Operation(_drop_class_row, _add_class_row)


def _renames(names: Mapping[str, str]) -> list[Rule]:
    return [Rule((source,), (target,), IDENTITY) for source, target in names.items()]


# Inside a layer, for any mixer.
NORMS_AND_MLP = _renames(
    {
        "attention_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "feed_forward.w1.weight": "mlp.gate_proj.weight",
        "feed_forward.w3.weight": "mlp.up_proj.weight",
        "feed_forward.w2.weight": "mlp.down_proj.weight",
    }
)
ATTENTION = [
    Rule(
        ("attention.wqkv.weight",),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        SPLIT_QKV,
    ),
    Rule(("attention.wo.weight",), ("self_attn.o_proj.weight",), IDENTITY),
]
_MAMBA_SHARED = {
    "attention.conv1d.weight": "mamba.conv1d.weight",
    "attention.conv1d.bias": "mamba.conv1d.bias",
    "attention.A_log_bias": "mamba.A_log",
    "attention.dt_bias": "mamba.dt_bias",
    "attention.o_proj.weight": "mamba.out_proj.weight",
}
MAMBA = _renames(
    {
        "attention.wvkqgdt.weight": "mamba.in_proj.weight",
        "attention.g_norm_swish_gate.weight": "mamba.norm.weight",
        **_MAMBA_SHARED,
    }
)
STUDENT = [
    Rule(
        tuple(f"attention.{name}.weight" for name in ("v_proj", "k_proj", "q_proj", "g_proj", "in_proj")),
        ("mamba.in_proj.weight",),
        CONCATENATE_ROWS,
    ),
    *_renames({"attention.g_norm.weight": "mamba.norm.weight", **_MAMBA_SHARED}),
]

# Outside the layers.
_VISION = ("embedding_model.vision_embeddings", "model.vision_embeddings")
EMBEDDINGS_AND_HEAD = [
    Rule(
        (f"{_VISION[0]}.position_embedding",),
        (f"{_VISION[1]}.position_embedding",),
        DROP_CLASS_ROW,
    ),
    *_renames(
        {
            f"{_VISION[0]}.patch_embedding.weight": f"{_VISION[1]}.patch_embedding.weight",
            f"{_VISION[0]}.patch_embedding.bias": f"{_VISION[1]}.patch_embedding.bias",
            "language_model.model.norm.weight": "model.norm.weight",
            "language_model.output.weight": "lm_head.weight",
        }
    ),
]
PROJECTOR = _renames(
    {
        f"embedding_model.pixel_shuffle_proj.{i}.{kind}": f"{_VISION[1]}.projector.{i}.{kind}"
        for i in (0, 2)
        for kind in ("weight", "bias")
    }
)

# Upstream tensors that never reach an output, and why.
UNUSED = {
    r"embedding_model\.vision_embeddings\.class_embedding": "no class token enters the decoder",
    r"language_model\.model\.tok_embeddings\.weight": "the language layers always receive embedded rows",
    r".*\.attention\.[qkv]_proj_shadow\.weight": "frozen copies that only the distillation used",
    r".*\.rotary_emb\.inv_freq": "computed from the config",
}
# A row of a used tensor that is left out, too.
UNUSED_ROWS = {
    "embedding_model.vision_embeddings.position_embedding": "row 0 belongs to the class token, which never enters"
}


def reason_unused(name: str) -> str | None:
    """Why an upstream tensor is left out, or None if it is not known to be unused."""
    return next((reason for pattern, reason in UNUSED.items() if re.fullmatch(pattern, name)), None)


def upstream_layer(index: int, num_embedding_layers: int) -> str:
    """Upstream's prefix of decoder layer `index`, counted over both stacks."""
    if index < num_embedding_layers:
        return f"embedding_model.encoder.{index}"
    return f"language_model.model.layers.{index - num_embedding_layers}"


def is_student_layer(prefix: str, names: Collection[str]) -> bool:
    """Whether the layer is stored as upstream's training student, with separate projections."""
    return f"{prefix}.attention.g_proj.weight" in names


def upstream_rules(
    config: MmMambaTextConfig, names: Collection[str], special_rows: int = 0, projector: bool = False
) -> list[Rule]:
    """The full table for one model.

    Args:
        config: The decoder, with `layer_types` as in the checkpoint.
        names: Tensor names of the checkpoint; they show which Mamba-2 layers are a training student's.
        special_rows: Rows of the table of special tokens, which is appended to the text table.
        projector: Whether the model has the MLP after the pixel shuffle.
    """
    text_table, special_table = (f"embedding_model.{kind}_text_embeddings.weight" for kind in ("llm", "special"))
    if special_rows:
        tables = Rule(
            (text_table, special_table),
            ("model.embed_tokens.weight",),
            Operation(_concatenate, partial(_split_tables, special_rows)),
        )
    else:
        tables = Rule((text_table,), ("model.embed_tokens.weight",), IDENTITY)
    rules = [*EMBEDDINGS_AND_HEAD, tables, *(PROJECTOR if projector else ())]
    for index, layer_type in enumerate(config.layer_types):
        prefix = upstream_layer(index, config.num_embedding_layers)
        if layer_type == "full_attention":
            mixer = ATTENTION
        else:
            mixer = STUDENT if is_student_layer(prefix, names) else MAMBA
        rules += [
            Rule(
                tuple(f"{prefix}.{name}" for name in rule.sources),
                tuple(f"model.layers.{index}.{name}" for name in rule.targets),
                rule.operation,
            )
            for rule in (*NORMS_AND_MLP, *mixer)
        ]
    return rules


def from_training_student(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's training mixer as ours.

    Args:
        tensors: One layer's `{q,k,v,o,g,in}_proj.weight`, `g_norm.weight`, `conv1d.{weight,bias}`, `A_log_bias` and
            `dt_bias`; other entries are ignored.

    Returns:
        `in_proj.weight` (rows v, k, q, gate, dt), `conv1d.{weight,bias}`, `A_log`, `dt_bias`, `norm.weight` and
        `out_proj.weight`, the parameters of `MmMambaMixer`.

    Raises:
        ValueError: if a tensor is missing.
    """
    ours = {}
    for rule in STUDENT:
        sources = [name.removeprefix("attention.") for name in rule.sources]
        if missing := [name for name in sources if name not in tensors]:
            raise ValueError(f"The training mixer lacks {', '.join(missing)}; give all tensors of one layer.")
        # These operations need no sizes, hence no config.
        parts = rule.operation.read([tensors[name] for name in sources], None)
        ours |= {target.removeprefix("mamba."): part for target, part in zip(rule.targets, parts, strict=True)}
    return ours
