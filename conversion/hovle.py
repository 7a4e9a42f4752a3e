"""Upstream's checkpoints (HoVLE, released mmMamba): config.json, tokenizer and templates in this package's terms."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin

from mmmamba.configuration_mmmamba import MOST_LAYERS, MmMambaConfig, MmMambaTextConfig, MmMambaVisionConfig
from mmmamba.conversion.layouts import (
    UNUSED_ROWS,
    Checkpoint,
    is_student_layer,
    reason_unused,
    upstream_layer,
    upstream_rules,
)
from mmmamba.conversion.publish import PACKAGE
from mmmamba.conversion.shards import ShardReader
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor
from mmmamba.processing_mmmamba import MmMambaProcessor
from mmmamba.tokenization_mmmamba import MmMambaTokenizer


# model_type of the model, of its embedding stack, of its language stack.
HOVLE = ("internvl_chat", "holistic_embedding", "internlm2")
RELEASED = ("mmMamba_chat", "mmMamba_embedding", "mmMamba")
BOS_LINE = "{{- bos_token if bos_token is defined else '' -}}\n"  # of the chat templates
LAYER_TYPES = {"mha": "full_attention", "mamba2": "linear_attention"}
# Upstream switches that change the network and that neither published model turns on.
_UNSUPPORTED = {
    "embedding_config": ("attention_bias", "mlp_bias", "use_ls"),
    "llm_config": ("bias", "attention_bias", "tie_word_embeddings"),
}
_SHARED_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_act")


# Types of upstream's entries. Entries that are left out here are checked where they are used.
_TYPES = {
    bool: ("dynamic_image_size", "normalize_encoder_output", "use_pixel_shuffle_proj", "use_thumbnail"),
    dict: ("rope_scaling", "special_token_maps"),
    float: ("downsample_ratio", "initializer_range", "rms_norm_eps", "rope_theta"),
    int: (
        "force_image_size", "hidden_size", "image_size", "img_context_token_id", "intermediate_size", "llm_vocab_size",
        "max_dynamic_patch", "max_position_embeddings", "min_dynamic_patch", "num_attention_heads", "num_channels",
        "num_hidden_layers", "num_key_value_heads", "patch_size", "vocab_size",
    ),
    list: ("layers_block_type",),
    str: ("_name_or_path", "hidden_act", "model_type", "pixel_shuffle_loc", "template"),
}  # fmt: skip
_TYPE_OF = {key: kind for kind, keys in _TYPES.items() for key in keys}
_TYPE_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a finite number",
    int: "a whole number",
    list: "a list",
    str: "a text",
}


class Upstream(NamedTuple):
    """What an upstream config.json says.

    Attributes:
        config: The model in this package's terms.
        template: Name of the conversation template.
        special_tokens: Token to id, for the rows appended to the text table.
        tiling: `min_patches`, `max_patches` and `use_thumbnail` of the image processor.
        kind: Name of the layout, for messages.
        base_model: The model's name on the Hub, if the config has it.
    """

    config: MmMambaConfig
    template: str
    special_tokens: dict[str, int]
    tiling: dict[str, Any]
    kind: str
    base_model: str | None


class _Section:
    """One dictionary of the upstream config; a missing entry, or one of another type, is an error that names it."""

    def __init__(self, name: str, values: dict):
        self.name, self.values = name, values

    def __getitem__(self, key: str):
        if key not in self.values:
            raise ValueError(f"config.json lacks {self.path(key)}, which the conversion needs; add it.")
        return self._checked(key, self.values[key])

    def get(self, key: str, default=None):
        value = self.values.get(key, default)
        return value if value is None else self._checked(key, value)

    def _checked(self, key: str, value):
        kind = _TYPE_OF.get(key)
        is_number = type(value) in (int, float) and -1e300 < value < 1e300  # NaN is not
        if kind is not None and not (is_number if kind is float else type(value) is kind):
            raise ValueError(f"config.json has {self.path(key)}={value!r:.200}; it must be {_TYPE_NAMES[kind]}.")
        return value

    def path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def section(self, key: str) -> "_Section":
        if not isinstance(self[key], dict):
            raise ValueError(f"config.json: {self.path(key)} must be an object, not {self[key]!r}.")
        return _Section(self.path(key), self[key])


def read_upstream_config(values: dict) -> Upstream:
    """Maps an upstream config.json.

    Args:
        values: The parsed file.

    Raises:
        ValueError: if it is neither HoVLE's nor the released mmMamba's, or sets what this network does not have.
    """
    root = _Section("", values)
    kind = root.get("model_type")
    if kind == MmMambaConfig.model_type:
        raise ValueError("SRC is in this package's layout already; load it as it is.")
    layouts = {layout[0]: layout for layout in (HOVLE, RELEASED)}
    if kind not in layouts:
        raise ValueError(
            f"config.json has model_type={kind!r}; expected {HOVLE[0]!r} (HoVLE) or {RELEASED[0]!r} (mmMamba)."
        )
    embedding, llm = root.section("embedding_config"), root.section("llm_config")
    for section, expected in zip((embedding, llm), layouts[kind][1:], strict=True):
        if section["model_type"] != expected:
            raise ValueError(
                f"config.json has {section.path('model_type')}={section['model_type']!r}; only {expected!r} can be "
                f"converted with model_type={kind!r}."
            )
    for section in (embedding, llm):
        for key in _UNSUPPORTED[section.name]:
            if section.get(key):
                raise ValueError(f"config.json sets {section.path(key)}, which this network does not have.")
    for key in _SHARED_SIZES:
        if embedding[key] != llm[key]:
            raise ValueError(
                f"config.json gives embedding_config.{key}={embedding[key]!r} but llm_config.{key}={llm[key]!r}; "
                "both stacks are one decoder here, so they must be equal."
            )
    special_tokens = embedding.get("special_token_maps") or {}
    vocab_size = embedding["llm_vocab_size"] + len(special_tokens)
    if vocab_size != llm["vocab_size"]:
        raise ValueError(
            f"config.json gives {embedding['llm_vocab_size']} text tokens and {len(special_tokens)} special tokens "
            f"but llm_config.vocab_size={llm['vocab_size']}; the output head must have one row per token."
        )
    if not all(type(index) is int for index in special_tokens.values()):
        raise ValueError(
            f"config.json: embedding_config.special_token_maps={special_tokens!r:.200} must have whole ids."
        )
    if sorted(special_tokens.values()) != list(range(embedding["llm_vocab_size"], vocab_size)):
        raise ValueError(
            f"config.json numbers special_token_maps as {sorted(special_tokens.values())}; expected the ids that "
            f"follow the text table, {embedding['llm_vocab_size']} to {vocab_size - 1}."
        )

    layer_types = []
    for section in (embedding, llm):
        if not 0 <= section["num_hidden_layers"] <= MOST_LAYERS:
            raise ValueError(
                f"config.json has {section.path('num_hidden_layers')}={section['num_hidden_layers']}; give 0 to "
                f"{MOST_LAYERS}."
            )
        block_types = section.get("layers_block_type") or ["mha"] * section["num_hidden_layers"]
        if unknown := sorted({str(name) for name in block_types} - set(LAYER_TYPES)):
            raise ValueError(
                f"config.json: {section.path('layers_block_type')} holds {unknown}; known are {list(LAYER_TYPES)}."
            )
        if len(block_types) != section["num_hidden_layers"]:
            raise ValueError(
                f"config.json: {section.path('layers_block_type')} has {len(block_types)} entries but "
                f"num_hidden_layers={section['num_hidden_layers']}."
            )
        layer_types += [LAYER_TYPES[name] for name in block_types]

    try:
        text = MmMambaTextConfig(
            vocab_size=vocab_size,
            hidden_size=llm["hidden_size"],
            intermediate_size=llm["intermediate_size"],
            num_hidden_layers=len(layer_types),
            num_embedding_layers=embedding["num_hidden_layers"],
            layer_types=layer_types,
            num_attention_heads=llm["num_attention_heads"],
            num_key_value_heads=llm["num_key_value_heads"],
            hidden_act=llm["hidden_act"],
            max_position_embeddings=llm["max_position_embeddings"],
            initializer_range=llm.get("initializer_range", 0.02),
            rms_norm_eps=llm["rms_norm_eps"],
            embedding_rms_norm_eps=embedding["rms_norm_eps"],
            rope_parameters=_rope(llm, llm["max_position_embeddings"]),
            embedding_rope_parameters=_rope(embedding, llm["max_position_embeddings"]),
            normalize_embedding_output=bool(root.get("normalize_encoder_output")),
            pad_token_id=llm.get("pad_token_id", 2),
            bos_token_id=llm.get("bos_token_id", 1),
            eos_token_id=llm.get("eos_token_id", 2),
        )
        config = MmMambaConfig(
            text_config=text, vision_config=_vision(root, embedding), image_token_id=embedding["img_context_token_id"]
        )
    except StrictDataclassError as error:
        raise ValueError(f"config.json does not describe a model: {error.__cause__ or error}") from error
    tiling = {
        "min_patches": root.get("min_dynamic_patch", 1),
        "max_patches": root.get("max_dynamic_patch", 12) if root.get("dynamic_image_size", True) else 1,
        "use_thumbnail": bool(root.get("use_thumbnail", True)),
    }
    return Upstream(
        config,
        template=root.get("template") or "internlm2-chat",
        special_tokens=special_tokens,
        tiling=tiling,
        kind="HoVLE's" if kind == HOVLE[0] else "the released mmMamba's",
        base_model=hub_name(root.get("_name_or_path")),
    )


def hub_name(name: str | None) -> str | None:
    """A name on the Hub, which has exactly one slash; None for the local paths that training scripts leave there."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) else None


def _rope(section: _Section, max_position_embeddings: int) -> dict:
    parameters = {"rope_type": "default", "rope_theta": float(section["rope_theta"])}
    scaling = section.get("rope_scaling")
    if not scaling:
        return parameters
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind not in ("dynamic", "linear") or type(factor) not in (int, float):
        raise ValueError(
            f"config.json has {section.path('rope_scaling')}={scaling!r}; only 'dynamic' and 'linear' with a number "
            "as factor are known upstream."
        )
    if kind == "dynamic" and section["max_position_embeddings"] != max_position_embeddings:
        raise ValueError(
            f"config.json scales {section.name} dynamically from {section['max_position_embeddings']} positions but "
            f"the language layers from {max_position_embeddings}; one length serves both here, so make them equal."
        )
    return parameters | {"rope_type": kind, "factor": float(factor)}


def _vision(root: _Section, embedding: _Section) -> MmMambaVisionConfig:
    shuffled = bool(embedding.get("use_pixel_shuffle_proj"))
    loc = embedding.get("pixel_shuffle_loc", "pre")
    if loc not in ("pre", "post") or (loc == "post" and not shuffled):
        raise ValueError(
            f"config.json has pixel_shuffle_loc={loc!r} with use_pixel_shuffle_proj={shuffled}; known are 'pre', and "
            "'post' where pixels are shuffled."
        )
    ratio = root.get("downsample_ratio", embedding.get("downsample_ratio", 0.5))
    if not math.isclose(ratio, 0.5 if shuffled else 1.0):
        raise ValueError(
            f"config.json has downsample_ratio={ratio} with use_pixel_shuffle_proj={shuffled}; a tile has "
            f"{'0.5' if shuffled else '1.0'} here, so that its rows fit its place in the prompt."
        )
    size = root.get("force_image_size") or embedding["image_size"]
    if size != embedding["image_size"]:
        raise ValueError(
            f"config.json has force_image_size={size} but a position table for {embedding['image_size']} pixels; "
            "tiles of another size than the table's cannot be converted."
        )
    return MmMambaVisionConfig(
        image_size=size,
        patch_size=embedding["patch_size"],
        num_channels=embedding.get("num_channels", 3),
        use_pixel_shuffle=shuffled,
        pixel_shuffle_loc=loc,
    )


def open_upstream(source: Path, values: dict) -> Checkpoint:
    """An upstream checkpoint folder, ready to be converted.

    Args:
        source: The folder.
        values: Its parsed config.json.

    Raises:
        ValueError: if config, weights' files or tokenizer are not understood.
    """
    upstream = read_upstream_config(values)
    processor, notes = _processor(source, upstream)
    reader = ShardReader(source)
    config = _apply_student_layers(upstream.config, reader.specs)
    rules = upstream_rules(
        config.text_config,
        reader.specs,
        special_rows=len(upstream.special_tokens),
        projector=config.vision_config.use_pixel_shuffle,
    )
    return Checkpoint(
        config,
        reader,
        rules,
        reason_unused,
        unused_rows={f"{name} (row 0)": reason for name, reason in UNUSED_ROWS.items()},
        processor=processor,
        chat_template=chat_template(upstream.template),
        base_model=upstream.base_model,
        origin=f"Converted from {upstream.base_model or 'a checkpoint'} in {upstream.kind} layout.",
        notes=notes,
    )


def _apply_student_layers(config: MmMambaConfig, names) -> MmMambaConfig:
    """Sets the layers that are stored as a training student's to Mamba-2: the teacher's config may come with them."""
    text = config.text_config
    for index in range(text.num_hidden_layers):
        if is_student_layer(upstream_layer(index, text.num_embedding_layers), names):
            text.layer_types[index] = "linear_attention"
    return config


def chat_template(name: str, with_bos_token: bool = True) -> str:
    """The Jinja text of a conversation template of upstream. Raises ValueError for an unknown name.

    Args:
        name: Upstream's name of it.
        with_bos_token: Whether it begins with the tokenizer's beginning token.
    """
    # Hermes-2 is the same text under another name.
    files = dict.fromkeys(("internlm2-chat", "Hermes-2"), PACKAGE / "chat_template.jinja")
    files |= {file.stem: file for file in (Path(__file__).parent / "chat_templates").glob("*.jinja")}
    if name not in files:
        raise ValueError(f"config.json has template={name!r}; the known templates are {', '.join(sorted(files))}.")
    text = files[name].read_text(encoding="utf-8")
    return text if with_bos_token else text.replace(BOS_LINE, "")


def _processor(source: Path, upstream: Upstream) -> tuple[ProcessorMixin | BaseImageProcessor, list[str]]:
    """The processor of a converted model, or its image processor if there is no tokenizer, and a note about that."""
    size = upstream.config.vision_config.image_size
    image_processor = MmMambaImageProcessor(size={"height": size, "width": size}, **upstream.tiling)
    if not (source / "tokenizer.model").is_file():
        return image_processor, [
            f"{source} has no tokenizer.model, so the model has neither tokenizer nor processor and does not know "
            "where an answer ends; put the tokenizer's files there and convert again to have them."
        ]
    tokenizer = MmMambaTokenizer.from_pretrained(source)
    _check_tokenizer(tokenizer, upstream)
    tokenizer.chat_template = chat_template(upstream.template, tokenizer.add_bos_token)
    tokens_per_tile = upstream.config.vision_config.tokens_per_tile
    return MmMambaProcessor(image_processor, tokenizer, tokens_per_tile=tokens_per_tile), []


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, upstream: Upstream) -> None:
    expected = upstream.special_tokens | {"<IMG_CONTEXT>": upstream.config.image_token_id}
    for token, index in expected.items():
        found = tokenizer.get_vocab().get(token)
        if found != index:
            raise ValueError(
                f"The tokenizer gives {token} the id {found} but config.json says {index}; take the tokenizer that "
                "belongs to this checkpoint."
            )
    vocab_size = upstream.config.text_config.vocab_size
    if (highest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {highest} but the model only {vocab_size} rows; take the tokenizer that "
            "belongs to this checkpoint."
        )
