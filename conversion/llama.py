"""Llama-shaped language models (Llama, Mistral, SmolLM2, Qwen2, InternLM2 and 3) in this package's terms.

What such a model computes must be sayable in `MmMambaTextConfig`; a model with anything else is refused by its name.
It becomes a teacher that reads text only, or, with a `VisionPlan`, one whose patch embedding and embedding layers are
new (as HoVLE begins, arXiv 2412.16158) and change nothing of what it says about text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from mmmamba.configuration_mmmamba import MmMambaConfig, MmMambaTextConfig, MmMambaVisionConfig
from mmmamba.conversion.hovle import hub_name
from mmmamba.conversion.layouts import ATTENTION, IDENTITY, NORMS_AND_MLP, Checkpoint, Operation, Rule
from mmmamba.conversion.publish import license_of
from mmmamba.conversion.shards import ShardReader, listed, read_json
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.processing_mmmamba import MmMambaProcessor
from mmmamba.tokenization_mmmamba import MmMambaTextTokenizer, MmMambaTokenizerFast, adapted_backend


# Which biases attention has, by model_type: of queries, keys and values, and of the output projection; None asks
# the config's `attention_bias`.
LANGUAGE_MODELS = {
    "llama": (None, None),
    "mistral": (False, False),
    "qwen2": (True, False),
    "internlm3": (None, None),
    "internlm2": (False, False),
}
# Near relations, and what they have that this network has not.
OTHER_MODELS = {
    "cohere": "runs attention and MLP side by side",
    "gemma": "scales embeddings and adds 1 to the weights of norms",
    "gemma2": "scales embeddings and caps logits",
    "gemma3": "scales embeddings and normalises queries and keys",
    "gemma3_text": "scales embeddings and normalises queries and keys",
    "granite": "scales embeddings, residuals and logits",
    "mixtral": "has mixtures of experts",
    "olmo": "has norms without weights",
    "olmo2": "normalises queries and keys",
    "phi3": "fuses projections and may rotate a part of each head",
    "qwen2_moe": "has mixtures of experts",
    "qwen3": "normalises queries and keys",
    "qwen3_moe": "has mixtures of experts",
    "smollm3": "has layers without rotary positions",
}
PICTURE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
PARTS_OF_PICTURES = """{%- elif part['type'] in ('image', 'image_url') -%}
                {%- set said.text = said.text + '<img><IMG_CONTEXT></img>\\n' -%}
            {%- elif part['type'] == 'video' -%}
                {%- set said.text = said.text + '<img></img>\\n' -%}
            """
# Stands before a chat template that knows contents of one text only.
JOIN_PARTS = """{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set said = namespace(text='') -%}
    {%- if message['content'] is string -%}
        {%- set said.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {%- set said.text = said.text + part['text'] -%}
            PICTURES{%- else -%}
                {{- raise_exception("content of type '" + part['type'] + "' cannot be read by this model") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set joined.messages = joined.messages + [dict(message, content=said.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""


@dataclass(frozen=True)
class VisionPlan:
    """With what a language model begins to read pictures.

    Args:
        embedding_layers: New decoder layers before the model's own, the holistic embedding; they pass rows through
            until they are trained.
        image_size: Side of a tile in pixels.
        patch_size: Side of a patch.
        use_pixel_shuffle: Whether four patches become one row.
        max_patches: Most tiles of a picture.
        seed: Of the new weights.
    """

    embedding_layers: int
    image_size: int = 448
    patch_size: int = 14
    use_pixel_shuffle: bool = True
    max_patches: int = 12
    seed: int = 0

    def __post_init__(self):
        if self.embedding_layers < 0:
            raise ValueError(f"embedding_layers={self.embedding_layers} must be at least 0.")


class LoadedTensors:
    """Tensors in memory, read as those of a `ShardReader` are."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.specs = {name: tensor.to("meta") for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def find_gguf(source: Path) -> Path | None:
    """The GGUF file that `source` is, or the only one in it if there is no config.json; None if there is none.

    Raises:
        ValueError: if a folder holds several.
    """
    if source.suffix == ".gguf" and source.is_file():
        return source
    if not source.is_dir() or (source / "config.json").is_file():
        return None
    files = sorted(source.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{source} holds {len(files)} GGUF files; name one of them, such as {files[0]}.")
    return files[0] if files else None


def open_language_model(source: Path, gguf: Path | None, vision: VisionPlan | None = None) -> Checkpoint:
    """A language model, ready to be converted.

    Args:
        source: Its folder, or the GGUF file.
        gguf: The GGUF file, if it is one.
        vision: What it is to read pictures with.

    Raises:
        ValueError: if it is not Llama-shaped, or damaged.
    """
    folder, options = source, {}
    if gguf is not None:
        folder, options = gguf.parent, {"gguf_file": gguf.name}
        _need_gguf()
    original = _read_config(folder, options)
    if gguf is None:
        tensors = ShardReader(folder)
    else:
        _check_rope(gguf)
        tensors = LoadedTensors(_unpacked(folder, options))
    tokenizer, notes = _read_tokenizer(folder, original, gguf, with_pictures=vision is not None)
    config = language_model_config(original)
    if gguf is None and (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        config.text_config.eos_token_id = config.text_config.eos_token_id if ends is None else ends
    new_rows = 0
    if vision is not None:
        if tokenizer is None:
            raise ValueError(f"{source} has no tokenizer, to which --vision adds {', '.join(PICTURE_TOKENS)}.")
        config, new_rows = _with_vision(config, tokenizer, vision)
    elif tokenizer is not None and (highest := max(tokenizer.get_vocab().values())) >= config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {highest} but the model only {config.text_config.vocab_size} rows; take the "
            "tokenizer that belongs to this checkpoint."
        )
    processor = tokenizer
    if vision is not None:
        size = {"height": vision.image_size, "width": vision.image_size}
        image_processor = MmMambaImageProcessor(size=size, max_patches=vision.max_patches)
        processor = MmMambaProcessor(image_processor, tokenizer, tokens_per_tile=config.tokens_per_tile)
    license = _license(folder, gguf)
    return Checkpoint(
        config,
        tensors,
        language_model_rules(config, original.model_type == "internlm2", new_rows),
        partial(_reason_unused, config.tie_word_embeddings),
        new={} if vision is None else new_tensors(config, vision.seed),
        processor=processor,
        base_model=_hub_name(source),
        origin=f"Converted from {source.name}, a {original.model_type} model"
        + (f", with {vision.embedding_layers} new embedding layers and a new patch embedding. " if vision else ". ")
        + f"Its weights keep that model's licence{f', {license}' if license else ''}.",
        license=license,
        notes=notes,
    )


def _license(folder: Path, gguf: Path | None) -> str | None:
    """The licence that a checkpoint's card or GGUF file names, if any."""
    if gguf is None:
        return license_of(folder)
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("general.license")
    return field.contents() if field else license_of(folder)


def _hub_name(source: Path) -> str | None:
    """A checkpoint's name on the Hub: by its place in huggingface_hub's cache, or else its config, or None."""
    folders = [part for part in source.absolute().parts if part.startswith("models--")]
    if folders:
        return hub_name("/".join(folders[-1].split("--")[1:]))
    config = source / "config.json"
    return hub_name(read_json(config).get("_name_or_path")) if config.is_file() else None


def _unpacked(folder: Path, options: dict) -> dict[str, Tensor]:
    """The tensors of a GGUF file in fp32. Raises ValueError if the file cannot be read, or lacks some."""
    if hasattr(transformers, "GgufConfig"):  # since 5.24 weights may stay packed
        options = {**options, "quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # readers of files raise nearly anything
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{options['gguf_file']} is no GGUF file that Transformers can read ({reason:.300})."
        ) from None
    # What a file lacks, Transformers draws at random.
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if missing := sorted(set(loading["missing_keys"]) - tied):
        raise ValueError(
            f"{options['gguf_file']} lacks {listed(missing)}; it may be one part of several (merge them with "
            "llama-gguf-split first) or an incomplete download."
        )
    return model.state_dict()


def _check_rope(gguf: Path) -> None:
    """Raises ValueError if a GGUF file scales rotary positions, which Transformers' reader leaves out."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        kinds = [x.contents() for name, x in reader.fields.items() if name.endswith(".rope.scaling.type")]
        factors = any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors)
    except Exception:  # damaged, which Transformers' reader says in its own words
        return
    if factors or any(kind != "none" for kind in kinds):
        scaling = f"rope.scaling.type={kinds[0]!r}" if kinds else "rope_freqs.weight"
        raise ValueError(
            f"{gguf.name} scales rotary positions ({scaling}), which Transformers' reader of GGUF files leaves out; "
            "convert the model's safetensors instead."
        )


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError('Reading GGUF files needs the gguf package; run `pip install "mmmamba[gguf]"`.') from None


def _read_config(folder: Path, options: dict) -> PreTrainedConfig:
    """The model's configuration, InternLM2's as Llama's. Raises ValueError if it is not Llama-shaped."""
    kind = None if options else read_json(folder / "config.json")["model_type"]
    try:
        if kind == "internlm2":
            config = LlamaConfig(**{k: v for k, v in read_json(folder / "config.json").items() if k != "auto_map"})
            config.model_type = kind
        else:
            if kind in LANGUAGE_MODELS and kind not in CONFIG_MAPPING:
                raise ValueError(f"{kind!r} needs a newer Transformers than {transformers.__version__}")
            config = AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # Transformers and its validators raise nearly anything
        reason = " ".join(str(getattr(error, "__cause__", None) or error).split())
        raise ValueError(f"{folder} has a configuration that Transformers cannot read ({reason}).") from None
    check_language_model(config.model_type)
    return config


def check_language_model(model_type: str) -> None:
    """Raises ValueError for a model that this network cannot be, saying what it has that this has not."""
    is_name = isinstance(model_type, str)
    if is_name and model_type in LANGUAGE_MODELS:
        return
    reason = OTHER_MODELS.get(model_type) if is_name else None
    reason = "is not known here" if reason is None else f"{reason}, which this network does not"
    raise ValueError(
        f"model_type={model_type!r} {reason}; give HoVLE (internvl_chat), the released mmMamba (mmMamba_chat) or a "
        f"language model of Llama's shape ({', '.join(LANGUAGE_MODELS)})."
    )


def language_model_config(original: PreTrainedConfig) -> MmMambaConfig:
    """The configuration of a text-only teacher.

    Args:
        original: Of a Llama-shaped model, as Transformers has it.

    Raises:
        ValueError: naming the setting that this network does not have.
    """

    def refuse(setting: str, reason: str) -> None:
        raise ValueError(
            f"The {original.model_type} model has {setting}={getattr(original, setting)!r:.100}, {reason}, which this "
            "network does not have."
        )

    biases, output_bias = LANGUAGE_MODELS[original.model_type]
    kinds, window = getattr(original, "layer_types", None), getattr(original, "sliding_window", None)
    if kinds and set(kinds) != {"full_attention"}:
        refuse("layer_types", "layers of other kinds than full attention")
    if not kinds and window is not None and window < original.max_position_embeddings:
        refuse("sliding_window", "attention to the last tokens only")
    if original.model_type == "internlm2" and getattr(original, "bias", False):
        refuse("bias", "biases of a fused projection")
    if getattr(original, "quantization_config", None) is not None:
        refuse("quantization_config", "quantised weights")
    rope = dict(original.rope_parameters)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        refuse("rope_parameters", "heads that are rotated in part")
    try:
        return _as_ours(original, rope, biases, output_bias)
    except StrictDataclassError as error:
        raise ValueError(f"The {original.model_type} model cannot be ours: {error.__cause__ or error}") from None


def _as_ours(original: PreTrainedConfig, rope: dict, biases: bool | None, output_bias: bool | None) -> MmMambaConfig:
    text = MmMambaTextConfig(
        vocab_size=original.vocab_size,
        hidden_size=original.hidden_size,
        intermediate_size=original.intermediate_size,
        num_hidden_layers=original.num_hidden_layers,
        num_embedding_layers=0,
        num_attention_heads=original.num_attention_heads,
        num_key_value_heads=original.num_key_value_heads,
        head_dim=getattr(original, "head_dim", None),
        hidden_act=original.hidden_act,
        max_position_embeddings=original.max_position_embeddings,
        initializer_range=original.initializer_range,
        rms_norm_eps=original.rms_norm_eps,
        rope_parameters=rope,
        attention_bias=getattr(original, "attention_bias", False) if biases is None else biases,
        attention_output_bias=getattr(original, "attention_bias", False) if output_bias is None else output_bias,
        mlp_bias=getattr(original, "mlp_bias", False),
        pad_token_id=original.pad_token_id,
        bos_token_id=original.bos_token_id,
        eos_token_id=original.eos_token_id,
    )
    return MmMambaConfig(
        text_config=text,
        vision_config=None,
        image_token_id=None,
        tie_word_embeddings=bool(original.tie_word_embeddings),
    )


def _with_vision(
    config: MmMambaConfig, tokenizer: PreTrainedTokenizerBase, vision: VisionPlan
) -> tuple[MmMambaConfig, int]:
    """The configuration with embedding layers and a patch embedding, and how many rows the token table gets.

    The picture tokens are added to the tokenizer.
    """
    tokenizer.add_special_tokens({"extra_special_tokens": PICTURE_TOKENS}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(PICTURE_TOKENS)
    text = config.text_config.to_dict()
    new_rows = max(0, max(ids) + 1 - text["vocab_size"])
    text |= {
        "vocab_size": text["vocab_size"] + new_rows,
        "num_hidden_layers": text["num_hidden_layers"] + vision.embedding_layers,
        "num_embedding_layers": vision.embedding_layers,
        "layer_types": None,
        "embedding_rope_parameters": text["rope_parameters"],
    }
    side = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    try:
        with_vision = MmMambaConfig(
            text_config=MmMambaTextConfig(**text),
            vision_config=MmMambaVisionConfig(**side, use_pixel_shuffle=vision.use_pixel_shuffle),
            image_token_id=ids[-1],
            tie_word_embeddings=config.tie_word_embeddings,
        )
    except StrictDataclassError as error:
        raise ValueError(f"Pictures cannot be read like this: {error.__cause__ or error}") from None
    return with_vision, new_rows


def new_tensors(config: MmMambaConfig, seed: int) -> dict[str, Tensor]:
    """First weights of the patch embedding and the embedding layers, by name.

    The output projections of the layers' attention and MLPs are zero, so text passes through unchanged.
    """
    small = MmMambaConfig(**{**config.to_dict(), "text_config": config.text_config.to_dict()})
    layers = small.text_config.num_hidden_layers = small.text_config.num_embedding_layers
    small.text_config.layer_types = small.text_config.layer_types[:layers]
    small.text_config.vocab_size, small.image_token_id = 1, 0
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = MmMambaForConditionalGeneration(small)
    tensors = {
        name: tensor.float()
        for name, tensor in model.state_dict().items()
        if name.startswith(("model.layers.", "model.vision_embeddings."))
    }
    for name in tensors:
        if name.split(".", 3)[-1] in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    return tensors


def language_model_rules(config: MmMambaConfig, internlm2: bool = False, new_rows: int = 0) -> list[Rule]:
    """The table of a language model's tensors.

    Args:
        config: The teacher.
        internlm2: Whether tensors have InternLM2's names; else they have Llama's, which are ours.
        new_rows: Rows that token table and head get beyond the checkpoint's: their mean.
    """
    text, first = config.text_config, config.text_config.num_embedding_layers
    tables = {"model.embed_tokens.weight": "model.tok_embeddings.weight", "lm_head.weight": "output.weight"}
    if config.tie_word_embeddings:
        del tables["lm_head.weight"]
    append = Operation(partial(_append_mean_rows, new_rows), partial(_drop_rows, new_rows)) if new_rows else IDENTITY
    rules = [Rule((theirs if internlm2 else ours,), (ours,), append) for ours, theirs in tables.items()]
    rules.append(Rule(("model.norm.weight",), ("model.norm.weight",), IDENTITY))
    of_layer = [*NORMS_AND_MLP, *ATTENTION] if internlm2 else _own_names(config)
    rules += [
        Rule(
            tuple(f"model.layers.{index}.{name}" for name in rule.sources),
            tuple(f"model.layers.{index + first}.{name}" for name in rule.targets),
            rule.operation,
        )
        for index in range(text.num_hidden_layers - first)
        for rule in of_layer
    ]
    return rules


def _own_names(config: MmMambaConfig) -> list[Rule]:
    text = config.text_config
    modules = {f"self_attn.{name}_proj": text.attention_bias for name in "qkv"}
    modules["self_attn.o_proj"] = text.attention_output_bias
    modules |= {f"mlp.{name}_proj": text.mlp_bias for name in ("gate", "up", "down")}
    names = [f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", *modules)]
    names += [f"{name}.bias" for name, has_bias in modules.items() if has_bias]
    return [Rule((name,), (name,), IDENTITY) for name in names]


def _append_mean_rows(new_rows: int, tensors, config) -> list[Tensor]:
    (table,) = tensors
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return [torch.cat([table, mean.expand(new_rows, -1)])]


def _drop_rows(new_rows: int, tensors, config) -> list[Tensor]:
    return [tensors[0][:-new_rows]]


def _reason_unused(tied: bool, name: str) -> str | None:
    if name.endswith("rotary_emb.inv_freq"):
        return "computed from the config"
    return "the token table is the head, too" if tied and name in ("lm_head.weight", "output.weight") else None


def _read_tokenizer(
    folder: Path, original: PreTrainedConfig, gguf: Path | None, with_pictures: bool
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """The tokenizer as one of this package's, and notes on what it lacks."""
    if gguf is None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None, [f"{folder} has no tokenizer; put its files there and convert again to have one."]
    try:
        if original.model_type == "internlm2" and (folder / "tokenizer.model").is_file():  # whose class is remote code
            theirs = MmMambaTokenizerFast.from_pretrained(folder, extra_special_tokens=[])
        else:
            theirs = AutoTokenizer.from_pretrained(folder, **({} if gguf is None else {"gguf_file": gguf.name}))
    except Exception as error:  # as for the configuration
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} has a tokenizer that Transformers cannot read ({reason:.300}).") from None
    if not theirs.is_fast:
        raise ValueError(
            f"{folder} has a tokenizer without a fast version ({type(theirs).__name__}); save it with a "
            "tokenizer.json first."
        )
    if gguf is not None:
        _name_special_tokens(theirs, gguf)
    tokenizer = text_tokenizer(theirs, with_pictures)
    if not tokenizer.chat_template:
        return tokenizer, [f"{folder} has no chat template, so the model continues texts but cannot chat."]
    return tokenizer, []


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Sets the special tokens that a GGUF file names; Transformers 5.17 takes the first of a text for the last.

    Raises:
        ValueError: if the file names one that its vocabulary has not.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = reader.get_field(f"tokenizer.ggml.{key}_token_id")
        if field is None:
            continue
        token = tokenizer.convert_ids_to_tokens(field.contents()) if field.contents() < len(tokenizer) else None
        if token is None:
            raise ValueError(
                f"{gguf.name} names token {field.contents()} as its {name} token, and its vocabulary has "
                f"{len(tokenizer)}; it is damaged."
            )
        setattr(tokenizer, f"{name}_token", token)


def text_tokenizer(theirs: PreTrainedTokenizerBase, with_pictures: bool = False) -> MmMambaTextTokenizer:
    """A fast tokenizer as one of this package's: the same ids, and control tokens that are typed stay text.

    Args:
        theirs: On the `tokenizers` library.
        with_pictures: Whether its chat template is to write the places of pictures.
    """
    template, join_parts = theirs.chat_template, JOIN_PARTS.replace("PICTURES", PARTS_OF_PICTURES * with_pictures)
    if isinstance(template, dict):  # several, by name
        template = {name: join_parts + text for name, text in template.items()}
    elif template:
        template = join_parts + template
    named = {name: str(token) for name, token in theirs.special_tokens_map.items() if isinstance(token, str)}
    named.setdefault("pad_token", named.get("eos_token"))
    return MmMambaTextTokenizer(
        tokenizer_object=adapted_backend(theirs.backend_tokenizer),
        chat_template=template,
        model_max_length=theirs.model_max_length,
        clean_up_tokenization_spaces=theirs.clean_up_tokenization_spaces,
        **{name: token for name, token in named.items() if token is not None},
    )
