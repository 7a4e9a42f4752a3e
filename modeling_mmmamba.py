"""The mmMamba network.

- Pictures and text enter one causal decoder; there is no separate vision encoder.
- A layer's mixer is softmax attention or Mamba-2, as `layer_types` says; teacher and students are the same class.
- Attention, MLP, RMSNorm and rotary embedding are Llama's; only Mamba-2 layers are new, and they see no positions.
- The first `num_embedding_layers` layers (the holistic embedding) have their own rotary base and norm epsilon.

Read top to bottom: cache, patch embedding, mixer, decoder layer, model, model with head, chat.
"""

import copy
import time
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backends_mmmamba import backend
from .capture_mmmamba import FEWEST_STEPS, OUTPUTS, decoder, recording_wanted, recordings, steps_follow
from .configuration_mmmamba import MmMambaConfig, MmMambaTextConfig, MmMambaVisionConfig
from .conversation_mmmamba import (
    ConversationState,
    History,
    TemplateError,
    check_tiles,
    decode_answer,
    fingerprint,
    generation_options,
    resume,
)
from .processing_mmmamba import answers_show_pictures, encode_conversation
from .ssm_mmmamba import Sequences, decode_step, state_dtype


logger = logging.get_logger(__name__)


class _CountsTokens:
    """Gives a cache a length that does not depend on attention layers, which an all-linear model lacks."""

    seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0):
        """Tokens read so far; from the attention layers where there are any (they may be cropped by others)."""
        return super().get_seq_length(layer_idx) if self.has_attention else self.seen_tokens

    @property
    def has_attention(self) -> bool:
        return not all(self.is_linear)

    def reset(self):
        super().reset()
        self.seen_tokens = 0


class MmMambaKeyValueLayer(DynamicLayer):
    """Keys and values that grow in place: a step writes one column, where Transformers' layer copies all of them."""

    room: list[Tensor] | None = None  # what `keys` and `values` are the beginning of

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Args: (batch, heads, new tokens, head_dim) each. Returns all keys and all values."""
        if key_states.requires_grad:  # autograd needs what it has seen to stay as it was
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        read, length = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        # Whoever crops or reorders a cache puts other tensors in place of `keys` and `values`.
        ours = self.room is not None and self.room[0].data_ptr() == self.keys.data_ptr()
        if not ours or self.room[0].shape[:2] != key_states.shape[:2] or self.room[0].shape[2] < length:
            capacity = length + max(256, length // 8) if read else length + 256
            self.room = [x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (key_states, value_states)]
            for room, kept in zip(self.room, (self.keys, self.values), strict=True):
                room[:, :, :read] = kept
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, read:length] = new
        self.keys, self.values = (room[:, :, :length] for room in self.room)
        return self.keys, self.values


class MmMambaCache(_CountsTokens, DynamicCache):
    """Keys and values for attention layers (growing), convolution and recurrent state for Mamba-2 layers (fixed)."""

    is_compileable = False  # `generate` has a way of its own to make steps fast, see `capture_mmmamba`

    def __init__(self, config: MmMambaTextConfig):
        super().__init__(config=config)
        self.layers = [MmMambaKeyValueLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


class MmMambaStaticCache(_CountsTokens, StaticCache):
    """The same with key/value tensors of fixed size."""


class MmMambaVisionEmbeddings(nn.Module):
    """Tiles to decoder rows: a strided convolution, a position table, optionally a 2x2 pixel shuffle with an MLP."""

    def __init__(self, config: MmMambaVisionConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels, hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, config.patches_per_side**2, hidden_size))
        if config.use_pixel_shuffle:
            self.projector = nn.Sequential(
                nn.Linear(4 * hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
            )

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table for a grid of patches, (1, hidden, rows, columns); resized if the grid is unusual."""
        side = self.config.patches_per_side
        table = self.position_embedding.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if (rows, columns) == (side, side):
            return table
        resized = F.interpolate(table.float(), size=(rows, columns), mode="bicubic", align_corners=False)
        return resized.to(table.dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Args: pixel_values (tiles, channels, height, width). Returns (tiles, rows per tile, hidden)."""
        patches = self.patch_embedding(pixel_values)  # (tiles, hidden, rows, columns)
        patches = patches + self.positions(*patches.shape[2:])
        if not self.config.use_pixel_shuffle:
            return patches.flatten(2).transpose(1, 2)
        rows, columns = patches.shape[2:]
        if rows % 2 or columns % 2:
            raise ValueError(
                f"A tile of {rows} x {columns} patches cannot be shuffled 2x2; give pixel_values whose height and "
                f"width are multiples of {2 * self.config.patch_size} pixels."
            )
        blocks = patches.unflatten(3, (columns // 2, 2)).unflatten(2, (rows // 2, 2))
        blocks = blocks.permute(0, 2, 4, 3, 5, 1)  # (tiles, rows/2, columns/2, 2, 2, hidden)
        return self.projector(blocks.flatten(3).flatten(1, 2))


class MmMambaLinear(nn.Linear):
    """A linear layer without bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MmMambaRMSNorm(LlamaRMSNorm):
    """Llama's norm, which can add to the residual stream on the way."""

    def __init__(self, config: MmMambaTextConfig, eps: float):
        super().__init__(config.hidden_size, eps=eps)
        self.config = config

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Args: (batch, length, hidden) each. Returns the norm; with a residual of the sum, and the sum."""
        if residual is None:
            return super().forward(hidden_states)
        ops = backend(hidden_states.device, hidden_states.dtype, self.config.ssm_implementation)
        return ops.add_rmsnorm(hidden_states, residual, self.weight, self.variance_epsilon)


class MmMambaMixer(nn.Module):
    """The Mamba-2 mixer with grouped keys and values (arXiv 2502.13145, section 3)."""

    def __init__(self, config: MmMambaTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.chunk_size = config.ssm_chunk_size
        self.norm_eps = config.ssm_norm_eps

        inner, shared = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.splits = [2 * shared + inner, inner, self.num_heads]  # v|k|q, gate, dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.conv1d = nn.Conv1d(
            self.splits[0], self.splits[0], config.conv_kernel, groups=self.splits[0], padding=config.conv_kernel - 1
        )
        self.A_log = nn.Parameter(torch.ones(self.num_heads))
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads))
        self.norm = LlamaRMSNorm(self.head_dim, eps=self.norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def heads(self, hidden_states: Tensor, sequences: Sequences | None = None, cache: Cache | None = None) -> Tensor:
        """The mixer before its output projection: (batch, length, hidden) to (batch, length, heads, head_dim)."""
        projected = self.in_proj(hidden_states)
        ops = backend(projected.device, projected.dtype, self.config.ssm_implementation)
        conv = (self.conv1d.weight.squeeze(1), self.conv1d.bias)
        conv_state = state = None
        if cache is not None and cache.has_previous_state(self.layer_idx):
            conv_state = cache.layers[self.layer_idx].conv_states[0]
            state = cache.layers[self.layer_idx].recurrent_states[0]
            if hidden_states.shape[1] == 1 and sequences is None and not torch.is_grad_enabled():
                scales = (self.A_log, self.dt_bias, self.norm.weight, self.norm_eps)
                return (ops.decode_step or decode_step)(projected[:, 0], *conv, *scales, conv_state, state)[:, None]

        vkq, gate, dt = projected.split(self.splits, dim=-1)
        acc = state_dtype(dt.dtype)
        dt = F.softplus(dt.to(acc) + self.dt_bias.to(acc))
        if sequences is not None:
            vkq, dt = sequences.pack(vkq), sequences.pack(dt)
        vkq, conv_state = ops.causal_conv(vkq, *conv, conv_state, sequences)
        shared = self.num_key_value_heads * self.head_dim
        v, k, q = (x.unflatten(-1, (-1, self.head_dim)) for x in vkq.split([shared, shared, self.splits[1]], dim=-1))
        y, state = ops.ssd_scan(v, k, q, dt, -self.A_log.to(acc).exp(), state, self.chunk_size, sequences)
        if cache is not None:
            cache.update_conv_state(conv_state, self.layer_idx)
            cache.update_recurrent_state(state, self.layer_idx)
        if sequences is not None:
            y = sequences.unpack(y)
        return ops.gated_rmsnorm(y, gate.unflatten(-1, (-1, self.head_dim)), self.norm.weight, self.norm_eps)

    def forward(self, hidden_states: Tensor, sequences: Sequences | None = None, cache: Cache | None = None) -> Tensor:
        """Args: hidden_states (batch, length, hidden). Returns the same shape."""
        return self.out_proj(self.heads(hidden_states, sequences, cache).flatten(2))


class MmMambaAttention(LlamaAttention):
    """Llama's; in a recorded step, one token reads a cache of fixed size as far as it is filled, by our own kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        decode_length: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Args: as Llama's, and decode_length (1,), int32: how many tokens there are, the one at hand included."""
        if decode_length is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        from .attention_mmmamba import attend

        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = past_key_values.update(k, v, self.layer_idx)
        mask = None if attention_mask is None else attention_mask[:, 0, 0]
        heads = attend(q[:, :, 0].contiguous(), k, v, mask, decode_length, self.scaling)
        return self.o_proj(heads.flatten(1)[:, None]), None


class MmMambaDecoderLayer(GradientCheckpointingLayer):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: MmMambaTextConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "full_attention":
            self.self_attn = MmMambaAttention(config, layer_idx)
        else:
            self.mamba = MmMambaMixer(config, layer_idx)
        self.mlp = LlamaMLP(config)
        in_embedding = layer_idx < config.num_embedding_layers
        eps = config.embedding_rms_norm_eps if in_embedding else config.rms_norm_eps
        self.input_layernorm = MmMambaRMSNorm(config, eps)
        self.post_attention_layernorm = MmMambaRMSNorm(config, eps)
        for module in self.modules():
            if type(module) is nn.Linear and module.bias is None:  # Llama's parts make their own
                module.__class__ = MmMambaLinear

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Sequences | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> Tensor:
        """Args: hidden_states (batch, length, hidden); attention_mask as the layer's type needs it."""
        normed = self.input_layernorm(hidden_states)
        if self.layer_type == "full_attention":
            mixed, _ = self.self_attn(
                normed,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        else:
            mixed = self.mamba(normed, attention_mask, past_key_values)
        normed, hidden_states = self.post_attention_layernorm(mixed, hidden_states)
        return hidden_states + self.mlp(normed)


class MmMambaPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what the network supports."""

    config_class = MmMambaConfig
    config: MmMambaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MmMambaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": MmMambaDecoderLayer, "attentions": MmMambaAttention}  # noqa: RUF012

    def __init__(self, config: MmMambaConfig):
        super().__init__(config)
        # The layers read the decoder's own config; a choice made for the whole model is meant for it.
        if config.text_config._attn_implementation is None:
            config.text_config._attn_implementation = self.config._attn_implementation

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ) -> dict[str, Tensor | None]:
        """What each type of layer needs of a (batch, past + length) mask; `generate` calls this for fixed caches.

        Unlike Transformers' own function it keeps the padding mask of a single step, which may be padding when a
        prompt is read one token at a time.
        """
        config = config.get_text_config()
        masks = {"full_attention": None, "linear_attention": None}
        if "full_attention" in config.layer_types:
            masks["full_attention"] = create_causal_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            masks["linear_attention"] = attention_mask[:, -inputs_embeds.shape[1] :]
        return masks

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MmMambaMixer):
            # As seeding does: the convolution passes its input through, and steps are log-uniform in [1e-3, 1e-1].
            identity = torch.zeros_like(module.conv1d.weight)
            identity[..., -1] = 1
            init.copy_(module.conv1d.weight, identity)
            init.zeros_(module.conv1d.bias)
            init.ones_(module.A_log)
            steps = 10 ** torch.empty_like(module.dt_bias, dtype=torch.float32).uniform_(-3, -1)
            init.copy_(module.dt_bias, (steps + torch.log(-torch.expm1(-steps))).to(module.dt_bias.dtype))
        elif isinstance(module, MmMambaVisionEmbeddings):
            init.normal_(module.position_embedding, std=module.config.initializer_range)


class MmMambaModel(MmMambaPreTrainedModel):
    """The decoder without its head: picture rows and token rows in, hidden states out."""

    def __init__(self, config: MmMambaConfig):
        super().__init__(config)
        text = config.text_config
        self.vision_embeddings = MmMambaVisionEmbeddings(config.vision_config, text.hidden_size)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList([MmMambaDecoderLayer(text, i) for i in range(text.num_hidden_layers)])
        self.norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        embedding = copy.deepcopy(text)
        embedding.rope_parameters = text.embedding_rope_parameters
        self.embedding_rotary_emb = LlamaRotaryEmbedding(embedding)
        self.rotary_emb = LlamaRotaryEmbedding(text)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Rows that stand for pictures in the decoder's input.

        Args:
            pixel_values: (tiles, channels, height, width), normalised.

        Returns:
            An output whose `pooler_output` is (tiles, rows per tile, hidden).
        """
        weight = self.vision_embeddings.patch_embedding.weight
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; give all tiles as one tensor of shape "
                "(tiles, channels, height, width)."
            )
        # Tiles do not see each other; their patches take several times the memory of their rows.
        rows = [self.vision_embeddings(tiles.to(weight.device, weight.dtype)) for tiles in pixel_values.split(32)]
        rows = torch.cat(rows) if len(rows) > 1 else rows[0]
        return BaseModelOutputWithPooling(last_hidden_state=rows, pooler_output=rows)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, image_rows: Tensor | None) -> Tensor:
        """Token rows with picture rows in the places of `<IMG_CONTEXT>`, in order over the flattened batch.

        Args:
            input_ids: (batch, length), or None.
            inputs_embeds: (batch, length, hidden) instead; its places are the rows that embed `<IMG_CONTEXT>`.
            image_rows: (..., hidden), or None.

        Raises:
            ValueError: if the places and the rows differ in number.
        """
        rows = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if image_rows is None:
            return rows
        image_rows = image_rows.reshape(-1, rows.shape[-1]).to(rows.device, rows.dtype)
        places = self.image_places(input_ids, inputs_embeds)
        if int(places.sum()) != len(image_rows):
            raise ValueError(
                f"The prompt has {int(places.sum())} image tokens but the pictures give {len(image_rows)} rows; use "
                "the processor, or repeat <IMG_CONTEXT> once per row of every tile."
            )
        return rows.masked_scatter(places[..., None], image_rows)

    def image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(batch, length), where `<IMG_CONTEXT>` stands; arguments as in `embed`."""
        token = self.config.image_token_id
        if inputs_embeds is None:
            return input_ids == token
        return (inputs_embeds == self.embed_tokens.weight[token]).all(-1)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the stack.

        Args:
            input_ids: (batch, length).
            pixel_values: (tiles, channels, height, width), for the image tokens among `input_ids` in order.
            attention_mask: (batch, past + length), 1 for valid tokens; padding may stand anywhere.
            position_ids: (batch, length); counted over valid tokens if not given. Where they restart inside a row and
                there is no attention_mask, the row is packed: each restart begins a sequence that sees nothing of
                the others, as from Transformers' `DataCollatorWithFlattening`.
            past_key_values: What was read before; continued in place.
            inputs_embeds: (batch, length, hidden) instead of `input_ids`.
            use_cache: Whether to make and return a cache.
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`.

        Raises:
            ValueError: if inputs contradict each other, or a packed row comes with a cache.
        """
        config = self.config.text_config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None:
            if mm_encoder_outputs:
                raise ValueError("Give either pixel_values or mm_encoder_outputs, which hold the same pictures.")
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values)}
        image_rows = mm_encoder_outputs["image"].pooler_output if mm_encoder_outputs else None
        inputs_embeds = self.embed(input_ids, inputs_embeds, image_rows)

        if use_cache and past_key_values is None:
            past_key_values = MmMambaCache(config=config)
        batch, length = inputs_embeds.shape[:2]
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.create_masks_for_generate(
                config, inputs_embeds, attention_mask, past_key_values, position_ids
            )
        sequences = None
        if masks["linear_attention"] is not None:
            sequences = Sequences.from_mask(masks["linear_attention"])
        elif attention_mask is None and position_ids is not None and length > 1:
            sequences = Sequences.from_position_ids(position_ids.expand(batch, -1))
            if sequences is not None:
                if past_key_values is not None:
                    raise ValueError(
                        "position_ids restart inside a row, so the row packs several sequences, and a cache holds "
                        "one state per row; pass use_cache=False and no past_key_values, or give the attention_mask "
                        "if the row is padded, not packed."
                    )
                kwargs = sequences.attention_kwargs() | kwargs
        masks = {"full_attention": masks["full_attention"], "linear_attention": sequences}
        rotary = {True: None, False: None}
        if "full_attention" in config.layer_types:  # no other layer sees positions
            if position_ids is None:
                position_ids = self.positions(attention_mask, past_key_values, inputs_embeds)
            rotary = {
                True: self.embedding_rotary_emb(inputs_embeds, position_ids),
                False: self.rotary_emb(inputs_embeds, position_ids),
            }
        hidden_states = inputs_embeds
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer.layer_type],
                position_embeddings=rotary[index < config.num_embedding_layers],
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
            if index + 1 == config.num_embedding_layers and config.normalize_embedding_output:
                hidden_states = F.normalize(hidden_states, dim=-1)
        if isinstance(past_key_values, _CountsTokens):
            past_key_values.seen_tokens += length
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def positions(self, attention_mask, past_key_values: Cache | None, inputs_embeds: Tensor) -> Tensor:
        """Positions counted over valid tokens, (batch or 1, length); padding gets position 1 as in upstream."""
        length = inputs_embeds.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            counted = attention_mask.long().cumsum(1) - 1
            return counted.masked_fill(attention_mask == 0, 1)[:, -length:]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)


class MmMambaForConditionalGeneration(MmMambaPreTrainedModel, GenerationMixin):
    """The decoder with its output head, `generate` and `chat`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MmMambaConfig):
        super().__init__(config)
        self.model = MmMambaModel(config)
        self.lm_head = MmMambaLinear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `MmMambaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss when `labels` are given.

        Args:
            labels: (batch, length), -100 where no loss is wanted; shifted here. In a packed row the first label of
                each sequence must be -100, or the last token before it learns to predict it; Transformers'
                `DataCollatorWithFlattening` sees to that.
            logits_to_keep: Compute logits of the last so many positions (0: all), or of these positions.

        The other arguments are those of `MmMambaModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def save_pretrained(self, *args, **kwargs):
        """As in Transformers; the folder then loads through each of the auto classes that this class serves."""
        name = f"modeling_mmmamba.{type(self).__name__}"
        self.config.auto_map = dict.fromkeys(
            ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"), name
        )
        super().save_pretrained(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # generate() names the cache of any class called "…Mamba…" `cache_params`, and its stock caches have no length
        # when every layer is linear: so make the stock cache, then rename it and let it count tokens.
        given = model_kwargs.pop("past_key_values", None)
        if given is not None:
            model_kwargs["cache_params"] = given
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.pop("cache_params", None)
        if type(cache) is DynamicCache and cache is not given:
            if cache.offloading:  # whose layers are moved back and forth
                cache.__class__ = MmMambaCache
            else:
                cache = self.new_cache()
        elif type(cache) is StaticCache:
            cache.__class__ = MmMambaStaticCache
        if cache is not None:
            model_kwargs["past_key_values"] = cache

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, pixel_values=None, **model_kwargs
    ):
        # Newer versions of Transformers encode pictures before they get here. Older ones would repeat tiles as if each
        # were a row of the batch.
        ids, pictures = input_ids, {} if pixel_values is None else {"pixel_values": pixel_values}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pictures and expand_size > 1:
            per_tile = self.get_image_features(pixel_values[:1]).pooler_output.shape[1]
            tiles = ((ids == self.config.image_token_id).sum(1) // per_tile).tolist()
            if sum(tiles) == len(pixel_values):  # else the first step says what is wrong
                rows = [row.repeat(expand_size, 1, 1, 1) for row in pixel_values.split(tiles)]
                pictures = {"pixel_values": torch.cat(rows)}
        return input_ids, model_kwargs | pictures

    def generate(self, *args, **kwargs):
        """As in Transformers; on CUDA, single steps are recorded once and replayed (not with `disable_compile`)."""
        with recordings():
            return super().generate(*args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        recording = recording_wanted(self, model_kwargs.get("past_key_values"), generation_config)
        return recording or super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config):
        return decoder(self) or super().get_compiled_call(compile_config)

    def warm_up(self, batch_sizes: tuple[int, ...] = (1,), prompt_length: int = 300) -> float:
        """Compiles what answering needs for these batch sizes, so that the first answer is not late.

        Returns:
            Seconds that it took; also logged.
        """
        start = time.perf_counter()
        for rows in batch_sizes:
            ids = torch.zeros(rows, prompt_length, dtype=torch.long, device=self.device)
            mask = torch.ones_like(ids)
            options = {"max_new_tokens": 2 + FEWEST_STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            self.generate(ids, attention_mask=mask, **options)
            if rows > 1:  # rows of different lengths take other paths
                mask[0, 0] = 0
                self.generate(ids, attention_mask=mask, **options)
        seconds = time.perf_counter() - start
        logger.warning("warmed up for batches of %s in %.1f s", ", ".join(map(str, batch_sizes)), seconds)
        return seconds

    def new_cache(self) -> MmMambaCache:
        """An empty cache for this model."""
        return MmMambaCache(config=self.config.text_config)

    def prefill_piece(self, rows: int, length: int) -> int:
        """How many tokens of a prompt are read at once.

        Args:
            rows: Of the batch.
            length: Of the whole prompt, with what the cache has read.
        """
        config = self.config.text_config
        if config.prefill_chunk_size is not None:
            return config.prefill_chunk_size
        on_gpu = self.device.type == "cuda"
        tokens = 8192 if on_gpu else 2048
        if "full_attention" in config.layer_types and "flash" not in str(config._attn_implementation):
            mask = 2**28 if on_gpu else 2**24  # of attention layers: (tokens x length) entries
            tokens = min(tokens, mask // length)
        return max(128, tokens // rows)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        # Transformers reads a prompt at once or, if told to, in pieces of token ids. Here a long prompt of any kind is
        # read in pieces, the last of which is left to Transformers.
        steps_follow(generation_config.max_length - input_ids.shape[1])
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        collects = any(model_kwargs.get(name) for name in OUTPUTS)  # of the whole prompt at once
        if cache is None or not is_first_iteration or isinstance(mask, dict) or collects:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        rows, positions = model_kwargs.get("inputs_embeds"), model_kwargs.get("position_ids")
        given = input_ids if rows is None else rows
        length = given.shape[1]
        # Transformers drops a mask of ones and remembers how long it was.
        whole = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
        unseen = whole - length  # tokens before `given`, which the cache must have read
        begin = cache.get_seq_length() - unseen
        size = generation_config.prefill_chunk_size or self.prefill_piece(len(given), whole)
        stop = begin + (length - begin - 1) // size * size
        pictures = self._picture_rows(model_kwargs) if stop > begin else None
        if pictures is not None:
            places = self.model.image_places(input_ids if rows is None else None, rows)
            if int(places.sum()) != len(pictures):
                stop = begin  # the network says what is wrong
            else:
                number = places.flatten().cumsum(0).view_as(places) - 1
                stop = max(stop, int(places.any(0).nonzero().max()) + 1) if places.any() else stop
                stop = stop if stop < length else begin
        for first in range(begin, stop, size):
            piece = slice(first, min(first + size, stop))
            images = None
            if pictures is not None and places[:, piece].any():
                images = pictures[number[:, piece][places[:, piece]]]
                images = {"image": BaseModelOutputWithPooling(pooler_output=images)}
            self.model(
                input_ids=input_ids[:, piece] if rows is None else None,
                inputs_embeds=None if rows is None else rows[:, piece],
                attention_mask=None if mask is None else mask[:, : unseen + piece.stop],
                position_ids=None if positions is None else positions[..., unseen + first : unseen + piece.stop],
                past_key_values=cache,
                use_cache=True,
                mm_encoder_outputs=images,
            )
        if stop > begin:
            for name in ("pixel_values", "mm_encoder_outputs"):
                model_kwargs.pop(name, None)
            if unseen:
                input_ids = input_ids[:, stop:]
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _picture_rows(self, model_kwargs: dict) -> Tensor | None:
        """Rows of all pictures, (rows, hidden): newer versions of Transformers have them encoded by now."""
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None and (pixel_values := model_kwargs.get("pixel_values")) is not None:
            encoded = self.get_image_features(pixel_values)
        return None if encoded is None else encoded.pooler_output.reshape(-1, self.config.text_config.hidden_size)

    def conversation(self, tokenizer, system_message: str | None = None) -> ConversationState:
        """A conversation that reads as it grows and can be forked, saved and loaded; see `ConversationState`."""
        return ConversationState(self, tokenizer, system_message)

    def chat(
        self,
        tokenizer,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict | GenerationConfig,
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        verbose: bool = False,
        *,
        system_message: str | None = None,
        streamer=None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """Answers a question about pictures, or about nothing but text.

        Args:
            tokenizer: The package's tokenizer.
            pixel_values: (tiles, channels, height, width), the tiles of all pictures of the conversation in order; or
                None.
            question: What to ask. `<image>` stands for a picture; a lone picture may go without.
            generation_config: Arguments of `generate`, such as `{"max_new_tokens": 64, "do_sample": True}`; left as
                it is.
            history: Earlier (question, answer) pairs, as an earlier call returned them.
            return_history: Whether to return the history with this turn added, too.
            num_patches_list: Tiles of each picture; all tiles are one picture if not given.
            verbose: Print question and answer.
            system_message: Replaces the template's own.
            streamer: A Transformers streamer, which gets the answer as it grows.

        Returns:
            The answer, or the answer and the history.

        Raises:
            ValueError: if the question is empty, or `<image>`, `num_patches_list` and the tiles disagree.
        """
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        if history is None and pixel_values is not None and "<image>" not in question:
            question = "<image>\n" + question
        check_tiles(num_patches_list, pixel_values)
        kept, state = getattr(history, "kept", None), None
        if not answers_show_pictures(history, question, num_patches_list):  # a state reads answers as text
            with suppress(TemplateError):
                state, seen = resume(self, tokenizer, history, pixel_values, num_patches_list, system_message)
        if state is None:
            row = self._conversation_ids(tokenizer, question, history, num_patches_list, system_message)
            (answer,) = self._answers(tokenizer, [row], num_patches_list, pixel_values, generation_config, streamer)
            longer = [*(history or []), (question, answer)]
        else:
            tiles = sum(num_patches_list[:seen])
            new = pixel_values[tiles:] if num_patches_list[seen:] else None
            try:
                answer = state.ask(question, generation_config, new, num_patches_list[seen:], streamer)
            except BaseException:
                if isinstance(history, History):
                    history.kept = kept  # a failed turn has changed nothing
                raise
            turns = [*(history or []), (question, answer)]
            longer = History(turns, state, num_patches_list, fingerprint(pixel_values)) if return_history else turns
        if verbose:
            print(f"{question}\n{answer}")
        return (answer, longer) if return_history else answer

    def batch_chat(
        self,
        tokenizer,
        pixel_values: Tensor | None,
        questions: list[str],
        generation_config: dict | GenerationConfig,
        num_patches_list: list[int] | list[list[int]] | None = None,
        history: list[list[tuple[str, str]]] | None = None,
        return_history: bool = False,
        *,
        system_message: str | None = None,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Answers several questions at once, each as `chat` would alone.

        Args:
            pixel_values: (tiles, channels, height, width), the tiles of all questions in order; or None.
            questions: What to ask.
            num_patches_list: For each question the tiles of its picture (0: no picture) or a list of them, one entry
                per picture. One tile each if not given.
            history: For each question its earlier (question, answer) pairs.

        The other arguments, and what is raised, are those of `chat`.

        Returns:
            The answers, or the answers and the histories.
        """
        if num_patches_list is None:
            num_patches_list = [0 if pixel_values is None else 1] * len(questions)
        if len(num_patches_list) != len(questions):
            raise ValueError(
                f"num_patches_list has {len(num_patches_list)} entries for {len(questions)} questions; give one per "
                "question, 0 where there is no picture."
            )
        pictures = [([n] if n else []) if isinstance(n, int) else list(n) for n in num_patches_list]
        histories = history if history is not None else [None] * len(questions)
        if len(histories) != len(questions):
            raise ValueError(f"history has {len(histories)} entries for {len(questions)} questions; give one each.")
        questions = [
            "<image>\n" + question if earlier is None and tiles and "<image>" not in question else question
            for question, earlier, tiles in zip(questions, histories, pictures, strict=True)
        ]
        rows = [
            self._conversation_ids(tokenizer, *conversation, system_message)
            for conversation in zip(questions, histories, pictures, strict=True)
        ]
        tiles = [count for counts in pictures for count in counts]
        answers = self._answers(tokenizer, rows, tiles, pixel_values, generation_config)
        if not return_history:
            return answers
        turns = zip(histories, questions, answers, strict=True)
        return answers, [[*(earlier or []), (question, answer)] for earlier, question, answer in turns]

    def _conversation_ids(self, tokenizer, question, history, num_patches_list, system_message) -> list[int]:
        return encode_conversation(
            tokenizer,
            question,
            history,
            num_patches_list,
            self.config.vision_config.tokens_per_tile,
            system_message=system_message,
        )

    def _answers(self, tokenizer, rows, num_patches_list, pixel_values, generation_config, streamer=None) -> list[str]:
        """Generates from left-padded rows of ids and decodes up to the end of the turn."""
        check_tiles(num_patches_list, pixel_values)
        options = generation_options(self, tokenizer, generation_config, streamer)
        longest = max(map(len, rows))
        pad = tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self.device)
        attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        output = self.generate(
            input_ids=input_ids,
            attention_mask=attention_mask.to(self.device),
            **({} if pixel_values is None else {"pixel_values": pixel_values}),
            **options,
        )
        return [decode_answer(tokenizer, row, options["eos_token_id"]) for row in output[:, longest:].tolist()]


for _model in (MmMambaModel, MmMambaForConditionalGeneration):
    _model.register_for_auto_class("AutoModel")

__all__ = ["MmMambaCache", "MmMambaForConditionalGeneration", "MmMambaModel", "MmMambaPreTrainedModel"]
