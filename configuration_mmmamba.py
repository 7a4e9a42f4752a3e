"""Configuration of mmMamba models: one decoder stack, whose input comes from a patch embedding and a token embedding.

`layer_types` distinguishes the models: all `full_attention` is the teacher (HoVLE), all `linear_attention` the linear
student, a mixture the hybrid student (arXiv 2502.13145, section 3).
"""

import math
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .quantization_mmmamba import MmMambaQuantizationConfig


LAYER_TYPES = ("full_attention", "linear_attention")
SSM_IMPLEMENTATIONS = ("auto", "torch", "cpu", "triton", "cuda")


ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
# No model is as large; beyond, sizes of tensors overflow or lists of layers fill the memory.
MOST_LAYERS, LARGEST_SIZE, LARGEST_TILE, LARGEST_CHANNELS = 1000, 2**24, 2**13, 2**8


def _check_positive(config: PreTrainedConfig, *names: str, largest: float = LARGEST_SIZE) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:  # NaN is not, either
            raise ValueError(f"{name}={value} is not a positive number; give a value above 0.")
        if value > largest:
            raise ValueError(f"{name}={str(value)[:30]} is larger than any model's; give at most {largest}.")


def _check_rope(name: str, parameters: dict) -> None:
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"{name} has rope_type={kind!r}, which is unknown; use one of {', '.join(ROPE_TYPES)}.")
    if "rope_theta" not in parameters:
        raise ValueError(f"{name}={parameters!r} lacks rope_theta; give a table with rope_type and rope_theta.")
    for key in ("rope_theta", "factor"):
        value = parameters.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} has {key}={value!r}, which is not a positive number; give a value above 0.")


def _check_inherited(config: PreTrainedConfig, others: dict) -> None:
    """What Transformers' own base class takes without looking: `dtype`, and labels, of which it makes a list."""
    for dtype in (config.dtype, others.get("dtype"), others.get("torch_dtype")):
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"dtype={dtype!r} is none that weights can have; use float32, bfloat16 or float16.")
    if others.get("num_labels") not in (None, 2):
        raise ValueError("num_labels is for classifiers, which this model is none of; leave it out.")


def _check_known(ssm_implementation: str) -> None:
    if ssm_implementation not in SSM_IMPLEMENTATIONS:
        raise ValueError(
            f"ssm_implementation={ssm_implementation!r} is unknown; use {', '.join(SSM_IMPLEMENTATIONS)}."
        )


@strict
class MmMambaVisionConfig(PreTrainedConfig):
    """The patch embedding, which turns a picture tile into rows of the decoder's input.

    Args:
        image_size: Side of a square tile, in pixels.
        patch_size: Side of a square patch, in pixels; must divide `image_size`.
        num_channels: Colour channels of a tile.
        use_pixel_shuffle: Whether 2x2 neighbouring patches are concatenated and projected to one row, which divides
            the number of rows by four.
        pixel_shuffle_loc: Where that happens: "pre", before the embedding layers, or "post", behind them (HoVLE-HD),
            so that embedding layers read four patches where language layers read one row.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "mmmamba_vision"
    base_config_key = "vision_config"

    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    use_pixel_shuffle: bool = True
    pixel_shuffle_loc: str = "pre"
    initializer_range: float = 0.02

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Number of decoder positions that one tile takes in the prompt."""
        return self.patches_per_side**2 // (4 if self.use_pixel_shuffle else 1)

    @property
    def patches_per_token(self) -> int:
        """Positions of the embedding layers for one image token of the prompt: 4 in HoVLE-HD, else 1."""
        return 4 if self.use_pixel_shuffle and self.pixel_shuffle_loc == "post" else 1

    @property
    def extra_positions_per_tile(self) -> int:
        """Positions that a tile takes in the embedding layers beyond its tokens: 0 but in HoVLE-HD."""
        return self.tokens_per_tile * (self.patches_per_token - 1)

    def __post_init__(self, **kwargs):
        _check_inherited(self, kwargs)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuses sizes that no model can have. Raises ValueError."""
        _check_positive(self, "image_size", "patch_size", largest=LARGEST_TILE)
        _check_positive(self, "num_channels", largest=LARGEST_CHANNELS)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; choose sizes where "
                "patches fill the tile."
            )
        if self.pixel_shuffle_loc not in ("pre", "post"):
            raise ValueError(f"pixel_shuffle_loc={self.pixel_shuffle_loc!r} is unknown; use 'pre' or 'post'.")
        if self.use_pixel_shuffle and self.patches_per_side % 2:
            raise ValueError(
                f"use_pixel_shuffle needs an even number of patches per side, but image_size={self.image_size} and "
                f"patch_size={self.patch_size} give {self.patches_per_side}; change one or turn use_pixel_shuffle off."
            )


@strict
class MmMambaTextConfig(PreTrainedConfig):
    """The decoder stack: holistic embedding layers followed by language layers.

    Args:
        vocab_size: Rows of the token embedding and of the output head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU MLP.
        num_hidden_layers: Number of decoder layers, embedding layers included.
        num_embedding_layers: How many of the first layers form the holistic embedding.
        layer_types: `"full_attention"` or `"linear_attention"` (Mamba-2) per layer; all attention if not given.
        num_attention_heads: Query heads of both mixers.
        num_key_value_heads: Key/value heads of both mixers (grouped-query attention).
        head_dim: Size of a head; also the state size of the Mamba-2 mixer. `hidden_size / num_attention_heads` if
            not given.
        rope_parameters: RoPE of the language layers.
        embedding_rope_parameters: RoPE of the embedding layers.
        rms_norm_eps: Epsilon of the RMS norms of the language layers.
        embedding_rms_norm_eps: The same for the embedding layers; `rms_norm_eps` if not given.
        normalize_embedding_output: Whether hidden states are divided by their L2 norm between the two stacks.
        attention_bias: Whether queries, keys and values of attention layers have biases.
        attention_output_bias: Whether their output projection has one; as `attention_bias` if not given.
        conv_kernel: Taps of the mixer's causal convolution.
        ssm_chunk_size: Steps of a chunk of the chunked scan.
        ssm_norm_eps: Epsilon of the mixer's gated norm.
        ssm_implementation: Backend of the mixer: "torch", "cpu", "triton", "cuda" (mamba_ssm), or "auto" for the
            fastest that runs on the device of the tensors.
        prefill_chunk_size: Tokens of a prompt that are read at once; chosen by device, batch and length if not given.
            Peak memory grows with it, not with the prompt.
    """

    model_type = "mmmamba_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 92553
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_embedding_layers: int = 8
    layer_types: list[str] | None = None
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    embedding_rms_norm_eps: float | None = None
    rope_parameters: dict | None = None
    embedding_rope_parameters: dict | None = None
    normalize_embedding_output: bool = False
    attention_dropout: float = 0.0
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    conv_kernel: int = 2
    ssm_chunk_size: int = 128
    ssm_norm_eps: float = 1e-5
    ssm_implementation: str = "auto"
    prefill_chunk_size: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 2
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        _check_inherited(self, kwargs)
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * min(self.num_hidden_layers, MOST_LAYERS + 1)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 1_000_000.0}
        if self.embedding_rope_parameters is None:
            self.embedding_rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.embedding_rms_norm_eps is None:
            self.embedding_rms_norm_eps = self.rms_norm_eps
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuses sizes that no model can have. Raises ValueError."""
        _check_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "head_dim", "ssm_chunk_size", "conv_kernel",
        )  # fmt: skip
        _check_positive(self, "num_hidden_layers", largest=MOST_LAYERS)
        _check_positive(self, "max_position_embeddings", largest=2**40)
        _check_positive(self, "rms_norm_eps", "embedding_rms_norm_eps", "ssm_norm_eps", largest=1)
        if self.num_attention_heads * self.head_dim > LARGEST_SIZE:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} of head_dim={self.head_dim} are larger than any "
                f"model's; their product may be at most {LARGEST_SIZE}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}; every key/value head must serve the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary position embedding needs an even head size.")
        if not 0 <= self.num_embedding_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_embedding_layers={self.num_embedding_layers} must lie between 0 and num_hidden_layers="
                f"{self.num_hidden_layers}, which counts them too."
            )
        _check_rope("rope_parameters", self.rope_parameters)
        _check_rope("embedding_rope_parameters", self.embedding_rope_parameters)
        for name, largest in (("initializer_range", math.inf), ("attention_dropout", 1)):
            if not 0 <= getattr(self, name) < largest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below {largest}.")
        if self.conv_kernel < 2:
            raise ValueError(
                f"conv_kernel={self.conv_kernel} is below 2, the fewest taps that reach a previous token."
            )
        _check_known(self.ssm_implementation)
        if self.prefill_chunk_size is not None:
            _check_positive(self, "prefill_chunk_size", largest=2**40)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not an activation of Transformers; use 'silu'.")

    def validate_layer_type(self):
        """Refuses layer types this network does not have. Raises ValueError."""
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types holds {unknown}; the known layer types are {list(LAYER_TYPES)}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries but num_hidden_layers={self.num_hidden_layers}; "
                "give one entry per layer."
            )


@strict
class MmMambaConfig(PreTrainedConfig):
    """A whole model: `text_config` (the decoder) and `vision_config` (the patch embedding).

    Args:
        text_config: `MmMambaTextConfig`, or its fields as a dict.
        vision_config: `MmMambaVisionConfig`, or its fields as a dict; None for a model that reads text only, if
            `image_token_id` is None, too.
        image_token_id: Id of `<IMG_CONTEXT>`, whose embeddings are replaced by those of the pictures.
    """

    model_type = "mmmamba"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": MmMambaTextConfig, "vision_config": MmMambaVisionConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = 92546
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        _check_inherited(self, kwargs)
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = MmMambaTextConfig(**(self.text_config or {}))
        reads_pictures = self.image_token_id is not None or self.vision_config is not None
        if reads_pictures and not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = MmMambaVisionConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """The decoder's; vLLM asks here whether a model has Mamba-2 layers at all."""
        return self.text_config.layer_types

    @property
    def tokens_per_tile(self) -> int:
        """Decoder positions of one tile in the prompt; 0 for a model that reads text only."""
        return 0 if self.vision_config is None else self.vision_config.tokens_per_tile

    @property
    def extra_positions_per_tile(self) -> int:
        """See `MmMambaVisionConfig`; 0 for a model that reads text only."""
        return 0 if self.vision_config is None else self.vision_config.extra_positions_per_tile

    @property
    def shuffles_behind(self) -> bool:
        """Whether patches are shuffled behind the embedding layers (HoVLE-HD)."""
        return self.vision_config is not None and self.vision_config.patches_per_token > 1

    @property
    def ssm_implementation(self) -> str:
        """The decoder's; `from_pretrained(..., ssm_implementation=...)` sets it here."""
        return self.text_config.ssm_implementation

    @ssm_implementation.setter
    def ssm_implementation(self, value: str):
        _check_known(value)
        self.text_config.ssm_implementation = value

    def validate_architecture(self):
        """Refuses an image token outside the vocabulary, and HoVLE-HD without embedding layers. Raises ValueError."""
        if self.image_token_id is None:
            if self.vision_config is not None:
                raise ValueError(
                    "image_token_id=None is for models that read text only, but there is a vision_config; give the id "
                    "of <IMG_CONTEXT>, or vision_config=None."
                )
        elif not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} lies outside the vocabulary of {self.text_config.vocab_size} "
                "tokens; give the id of <IMG_CONTEXT>."
            )
        if self.shuffles_behind and self.text_config.num_embedding_layers == 0:
            raise ValueError(
                "pixel_shuffle_loc='post' shuffles behind the embedding layers, but num_embedding_layers=0; use 'pre'."
            )
        if self.shuffles_behind and self.text_config.normalize_embedding_output:
            raise ValueError(
                "pixel_shuffle_loc='post' with normalize_embedding_output=True is not supported: no published model "
                "has both, so which comes first is not known."
            )


for _config in (MmMambaTextConfig, MmMambaVisionConfig, MmMambaConfig):
    _config.register_for_auto_class()


# Importing the quantisation tells Transformers of it: whoever reads a quantised folder's config can load its weights.
__all__ = ["MmMambaConfig", "MmMambaQuantizationConfig", "MmMambaTextConfig", "MmMambaVisionConfig"]
