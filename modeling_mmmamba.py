"""The mmMamba network.

- Pictures and text enter one causal decoder; there is no separate vision encoder.
- A layer's mixer is softmax attention or Mamba-2, as `layer_types` says; teacher and students are the same class.
- Attention is grouped-query with rotary positions, the MLP is SwiGLU, norms are RMSNorm before each of the two.
- Mamba-2 layers share keys and values inside a group, too, and see no positions.
- The first `num_embedding_layers` layers (the holistic embedding) have their own rotary base and norm epsilon.

Read top to bottom: norm, MLP, rotary positions, attention, Mamba-2 mixer, decoder layer, model, head.
Shapes: B batch, L length, D hidden size, H query heads, K key/value heads, P head size.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging

from .backends_mmmamba import are_plain, backend, project, without_cudnn_attention
from .cache_mmmamba import CACHE, MmMambaCache
from .chat_mmmamba import ChatMixin
from .configuration_mmmamba import MmMambaConfig, MmMambaTextConfig
from .generation_mmmamba import MmMambaGenerationMixin
from .hd_mmmamba import PatchLayout
from .inputs_mmmamba import inputs_of_both_stacks, packed_sequences
from .layer_step_mmmamba import layer_step
from .loading_mmmamba import LoadingMixin
from .pictures_mmmamba import as_tiles
from .ssm_mmmamba import Sequences, ssd_step, state_dtype
from .vision_mmmamba import MmMambaVisionEmbeddings


logger = logging.get_logger(__name__)
# What loads a whole model from its folder; the folder's `auto_map` names them.
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


class MmMambaRMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), which can add to the residual stream on the way."""

    def __init__(self, config: MmMambaTextConfig, eps: float):
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Args: (B, L, D) each. Returns the norm; with a residual the norm of the sum, and the sum."""
        if residual is not None:
            ops = backend(hidden_states.device, hidden_states.dtype, self.config.ssm_implementation)
            return ops.add_rmsnorm(hidden_states, residual, self.weight, self.eps)
        wide = hidden_states.to(state_dtype(hidden_states.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden_states.dtype)


class MmMambaMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: MmMambaTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (B, L, D). Returns the same shape."""
        return project(self.down_proj, self.act_fn(project(self.gate_proj, x)) * project(self.up_proj, x))


class MmMambaRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (arXiv 2104.09864), scaled as `rope_parameters` say.

    Nothing is kept between calls, so there is no buffer that loading, casting or moving a model could spoil.

    Args:
        config: Its `rope_parameters` have `rope_type` and `rope_theta`, and what the type needs beside them.
    """

    def __init__(self, config: MmMambaTextConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters.get("rope_type", "default")

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Args: x (B, L, D), for device and dtype; position_ids (B or 1, L). Returns two of (B or 1, L, P)."""
        if self.rope_type == "default":
            exponents = torch.arange(0, self.config.head_dim, 2, device=x.device).float() / self.config.head_dim
            inv_freq, scaling = self.config.rope_parameters["rope_theta"] ** -exponents, 1.0
        else:
            length = int(position_ids.max()) + 1 if self.rope_type in ("dynamic", "longrope") else None
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, x.device, seq_len=length)
        angles = position_ids[..., None].float() * inv_freq.to(x.device)  # (B, L, P / 2), fp32
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channels i and i + P / 2 by their position's angle. Args: x (B, heads, L, P); cos and sin (B, L, P)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention in plain torch, in the form of Transformers' attention functions.

    Args: query (B, H, L, P); key, value (B, K, past + L, P); attention_mask (B or 1, 1, L, past + L), added to scores.
    Returns: (B, L, H, P), and the weights (B, H, L, past + L).
    """
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=state_dtype(query.dtype)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MmMambaAttention(nn.Module):
    """Grouped-query softmax attention with rotary positions, by whichever attention function the config names."""

    is_causal = True

    def __init__(self, config: MmMambaTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        inner, shared = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: MmMambaCache | None = None,
        attention_function=None,
        attention_weights: list | None = None,
        **kwargs,
    ) -> Tensor:
        """Args: hidden_states (B, L, D); position_embeddings, cosines and sines (B or 1, L, P); attention_mask as the
        attention function needs it; attention_function instead of the config's; attention_weights, a list to append
        the weights to, or None where the function does not give them. Returns (B, L, D)."""
        q = project(self.q_proj, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, L, P)
        k = project(self.k_proj, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, L, P)
        v = project(self.v_proj, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, L, P)
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = attention_function or ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        kwargs |= {"scaling": self.scaling, "dropout": self.config.attention_dropout if self.training else 0.0}
        with without_cudnn_attention(q.device):
            heads, weights = attend(self, q, k, v, attention_mask, **kwargs)
        if attention_weights is not None:
            attention_weights.append(weights)
        return project(self.o_proj, heads.flatten(2))


class MmMambaConv(nn.Conv1d):
    """Depthwise causal convolution and SiLU, from and to a state; the last tap meets the current step."""

    def __init__(self, config: MmMambaTextConfig, channels: int):
        super().__init__(channels, channels, config.conv_kernel, groups=channels)
        self.config = config

    def forward(
        self, x: Tensor, state: Tensor | None = None, sequences: Sequences | None = None
    ) -> tuple[Tensor, Tensor]:
        """Args: x (B, L, channels); state (B, channels, taps - 1). Returns these two shapes, see `ssm_mmmamba`."""
        ops = backend(x.device, x.dtype, self.config.ssm_implementation)
        return ops.causal_conv(x, self.weight.squeeze(1), self.bias, state, sequences)


class MmMambaGatedRMSNorm(nn.Module):
    """RMSNorm over the head size with one weight for all heads, then the SiLU gate."""

    def __init__(self, config: MmMambaTextConfig):
        super().__init__()
        self.config, self.eps = config, config.ssm_norm_eps
        self.weight = nn.Parameter(torch.ones(config.head_dim))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Args: (B, L, H, P) each. Returns the same shape in the gate's dtype."""
        ops = backend(gate.device, gate.dtype, self.config.ssm_implementation)
        return ops.gated_rmsnorm(y, gate, self.weight, self.eps)


class MmMambaMixer(nn.Module):
    """The Mamba-2 mixer with grouped keys and values (arXiv 2502.13145, section 3 and eq. 2)."""

    def __init__(self, config: MmMambaTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        inner, self.shared = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.splits = [2 * self.shared + inner, inner, config.num_attention_heads]  # v|k|q, gate, dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.conv1d = MmMambaConv(config, self.splits[0])
        self.A_log = nn.Parameter(torch.ones(config.num_attention_heads))
        self.dt_bias = nn.Parameter(torch.ones(config.num_attention_heads))
        self.norm = MmMambaGatedRMSNorm(config)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def heads(
        self, hidden_states: Tensor, sequences: Sequences | None = None, cache: MmMambaCache | None = None
    ) -> Tensor:
        """The mixer before its output projection: (B, L, D) to (B, L, H, P)."""
        projected = project(self.in_proj, hidden_states)
        conv_state = state = None
        if cache is not None:
            conv_state, state = cache.conv_state(self.layer_idx), cache.recurrent_state(self.layer_idx)
        ops = backend(projected.device, projected.dtype, self.config.ssm_implementation)
        one_step = state is not None and projected.shape[1] == 1 and sequences is None and not torch.is_grad_enabled()
        modules = {self.conv1d: MmMambaConv, self.norm: MmMambaGatedRMSNorm}
        if one_step and ops.decode_step is not None and are_plain(modules, projected.device):
            conv = (self.conv1d.weight.squeeze(1), self.conv1d.bias)
            scales = (self.A_log, self.dt_bias, self.norm.weight, self.norm.eps)
            return ops.decode_step(projected[:, 0], *conv, *scales, conv_state, state)[:, None]

        vkq, gate, dt = projected.split(self.splits, dim=-1)
        acc = state_dtype(dt.dtype)
        dt = F.softplus(dt.to(acc) + self.dt_bias.to(acc))  # (B, L, H)
        A = -self.A_log.to(acc).exp()  # (H,)
        if sequences is not None:
            vkq, dt = sequences.pack(vkq), sequences.pack(dt)
        vkq, new_conv_state = self.conv1d(vkq, conv_state, sequences)
        v, k, q = (
            x.unflatten(-1, (-1, self.head_dim))  # (B, L, K or H, P)
            for x in vkq.split([self.shared, self.shared, self.splits[1]], dim=-1)
        )
        if one_step:
            y = ssd_step(v[:, 0], k[:, 0], q[:, 0], dt[:, 0], A, state)[:, None]  # changes `state` in place
            conv_state.copy_(new_conv_state)
        else:
            y, state = ops.ssd_scan(v, k, q, dt, A, state, self.config.ssm_chunk_size, sequences)
            if cache is not None:
                cache.update_states(self.layer_idx, new_conv_state, state)
        if sequences is not None:
            y = sequences.unpack(y)
        return self.norm(y, gate.unflatten(-1, (-1, self.head_dim)))

    def forward(
        self, hidden_states: Tensor, sequences: Sequences | None = None, cache: MmMambaCache | None = None
    ) -> Tensor:
        """Args: hidden_states (B, L, D). Returns the same shape."""
        return project(self.out_proj, self.heads(hidden_states, sequences, cache).flatten(2))


class MmMambaDecoderLayer(GradientCheckpointingLayer):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: MmMambaTextConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "full_attention":
            self.self_attn = MmMambaAttention(config, layer_idx)
        else:
            self.mamba = MmMambaMixer(config, layer_idx)
        self.mlp = MmMambaMLP(config)
        eps = config.embedding_rms_norm_eps if layer_idx < config.num_embedding_layers else config.rms_norm_eps
        self.input_layernorm = MmMambaRMSNorm(config, eps)
        self.post_attention_layernorm = MmMambaRMSNorm(config, eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Sequences | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: MmMambaCache | None = None,
        **kwargs,
    ) -> Tensor:
        """Args: hidden_states (B, L, D); attention_mask as the layer's type needs it. Returns (B, L, D)."""
        stepped = layer_step(self, hidden_states, attention_mask, position_embeddings, cache, kwargs)
        if stepped is not None:
            return stepped
        normed = self.input_layernorm(hidden_states)
        if self.layer_type == "full_attention":
            mixed = self.self_attn(normed, position_embeddings, attention_mask, cache, **kwargs)
        else:
            mixed = self.mamba(normed, attention_mask, cache)
        normed, hidden_states = self.post_attention_layernorm(mixed, hidden_states)
        return hidden_states + self.mlp(normed)


@dataclass
class MmMambaModelOutput(BaseModelOutputWithPast):
    """`last_hidden_state` (B, L, D), the cache by the version's name (`CACHE`), and the picture rows it read."""

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class MmMambaCausalLMOutput(CausalLMOutputWithPast):
    """`loss` if there are labels, `logits` (B, L, vocabulary), the cache, and the picture rows that were read."""

    image_outputs: BaseModelOutputWithPooling | None = None


class MmMambaPreTrainedModel(LoadingMixin, PreTrainedModel):
    """Weight initialisation and what the network supports."""

    config_class = MmMambaConfig
    config: MmMambaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MmMambaDecoderLayer", "MmMambaVisionEmbeddings"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MmMambaConfig):
        super().__init__(config)
        # The layers read the decoder's own config; a choice made for the whole model is meant for it.
        if config.text_config._attn_implementation is None:
            config.text_config._attn_implementation = self.config._attn_implementation

    @property
    def _is_stateful(self) -> bool:
        """Whether a cache cannot forget tokens, so that `generate` refuses to guess ahead (assisted decoding)."""
        return "linear_attention" in self.config.text_config.layer_types

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
        elif isinstance(module, MmMambaRMSNorm | MmMambaGatedRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, MmMambaVisionEmbeddings):
            init.normal_(module.position_embedding, std=module.config.initializer_range)


class MmMambaModel(MmMambaPreTrainedModel):
    """The decoder without its head: picture rows and token rows in, hidden states out."""

    def __init__(self, config: MmMambaConfig):
        super().__init__(config)
        text = config.text_config
        if config.vision_config is not None:
            self.vision_embeddings = MmMambaVisionEmbeddings(config.vision_config, text.hidden_size)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList([MmMambaDecoderLayer(text, i) for i in range(text.num_hidden_layers)])
        self.norm = MmMambaRMSNorm(text, text.rms_norm_eps)
        embedding = copy.deepcopy(text)
        embedding.rope_parameters = text.embedding_rope_parameters
        self.embedding_rotary_emb = MmMambaRotaryEmbedding(embedding)
        self.rotary_emb = MmMambaRotaryEmbedding(text)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Rows that stand for pictures in the decoder's input.

        Args: pixel_values (tiles, channels, height, width), normalised; or what else `as_tiles` takes.
        Returns: An output whose `pooler_output` is (tiles, rows per tile, D).
        """
        pixel_values, _ = as_tiles(pixel_values, None, self.config)
        # Tiles do not see each other; their patches take several times the memory of their rows.
        pieces = [pixel_values] if torch.compiler.is_compiling() else pixel_values.split(32)
        rows = torch.cat([self.vision_embeddings(tiles) for tiles in pieces])
        return BaseModelOutputWithPooling(last_hidden_state=rows, pooler_output=rows)

    def image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, L), where `<IMG_CONTEXT>` stands in `input_ids`, or where `inputs_embeds` holds its embedding."""
        token = self.config.image_token_id
        if inputs_embeds is None:
            return input_ids == token
        return (inputs_embeds == self.embed_tokens(torch.tensor(token, device=inputs_embeds.device))).all(-1)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, image_rows: Tensor | None) -> Tensor:
        """Token rows with picture rows in the places of `<IMG_CONTEXT>`, in order over the flattened batch.

        Args: input_ids (B, L), or inputs_embeds (B, L, D) instead; image_rows (..., D), or None.
        Raises: ValueError, if places and rows differ in number.
        """
        rows = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if image_rows is None:
            return rows
        image_rows = image_rows.reshape(-1, rows.shape[-1]).to(rows.device, rows.dtype)
        places = self.image_places(input_ids, inputs_embeds).to(rows.device)
        count = places.sum().item()
        if torch.compiler.is_compiling():
            torch._check(count == image_rows.shape[0])  # `len` would fix the number
        elif count != len(image_rows):
            raise ValueError(
                f"The prompt has {count} image tokens but the pictures give {len(image_rows)} rows; use the "
                "processor, or repeat <IMG_CONTEXT> once per row of every tile."
            )
        return rows.masked_scatter(places[..., None], image_rows)

    def patch_layout(self, rows: Tensor, places: Tensor | None, cache: MmMambaCache | None = None):
        """How embedding layers see these tokens, a `PatchLayout`; None if they see them one by one.

        Args: rows (B, L, ...), of tokens; places (B, L), where pictures stand, or None; cache, what was read before.
        Raises: ValueError, if image tokens are no whole lines of tiles, or the cache cannot hold patches.
        """
        before = None if cache is None else cache.image_places
        if not self.config.shuffles_behind or (places is None and before is None):
            return None
        if cache is not None and not cache.can_hold_patches:
            raise ValueError(
                "Embedding layers of a model with pixel_shuffle_loc='post' read more patches than there are tokens, "
                "which caches of fixed length and Transformers' own cannot hold; pass model.new_cache()."
            )
        if places is None:
            places = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
        if before is None:
            before = places.new_zeros(len(places), 0 if cache is None else cache.get_seq_length())
        places = torch.cat([before.to(places.device), places], dim=1)
        return PatchLayout(places, rows.shape[1], self.config.vision_config.patches_per_side // 2)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        attention_mask: Tensor | dict | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        mm_encoder_outputs: dict | None = None, cache: Cache | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None, **kwargs,
    ) -> MmMambaModelOutput:  # fmt: skip
        """Runs the stack.

        Args:
            input_ids: (B, L).
            pixel_values: (tiles, channels, height, width), for the image tokens among `input_ids` in order.
            attention_mask: (B, past + L), 1 for valid tokens; padding may stand anywhere. Or what `masks` returns.
            position_ids: (B, L). Where they restart inside a row and there is no attention_mask, the row is packed:
                each restart begins a sequence that sees nothing of the others (`DataCollatorWithFlattening`).
            past_key_values: The name of `cache` before Transformers 5.24.
            inputs_embeds: (B, L, D) instead of `input_ids`.
            use_cache: Whether to make and return a cache; by the config if not given, but not in training.
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`.
            cache: What was read before; continued in place.
            output_hidden_states, output_attentions: By the config if not given; the latter needs eager attention.

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
        image_outputs = (mm_encoder_outputs or {}).get("image")
        image_rows = None if image_outputs is None else image_outputs.pooler_output
        patches_given = image_rows is not None and self.config.shuffles_behind
        places = self.image_places(input_ids, inputs_embeds) if patches_given else None
        inputs_embeds = self.embed(input_ids, inputs_embeds, None if patches_given else image_rows)

        cache = past_key_values if cache is None else cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None or use_cache:
                logger.warning_once("Gradient checkpointing runs layers twice, so nothing is cached.")
            cache, use_cache = None, False
        sequences = packed_sequences(inputs_embeds, attention_mask, position_ids)
        if sequences is not None:
            if cache is not None or use_cache:
                raise ValueError(
                    "position_ids restart inside a row, so the row packs several sequences, and a cache holds one "
                    "state per row; pass use_cache=False and no cache, or give the attention_mask if the row is "
                    "padded, not packed."
                )
        elif cache is None and (config.use_cache and not self.training if use_cache is None else use_cache):
            cache = MmMambaCache(config)
        layer_cache = None if cache is None else MmMambaCache.wrapping(cache, config)

        layout = self.patch_layout(inputs_embeds, places, layer_cache)
        hidden_states = inputs_embeds if layout is None else layout.expand(inputs_embeds, image_rows)
        inputs = inputs_of_both_stacks(
            config, layout, inputs_embeds, hidden_states, attention_mask, position_ids, layer_cache, sequences
        )
        rotary = [
            None if of_stack.position_ids is None else embedding(inputs_embeds, of_stack.position_ids)
            for embedding, of_stack in zip((self.embedding_rotary_emb, self.rotary_emb), inputs, strict=True)
        ]
        collected, weights_by_layer = [], None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            kwargs["attention_weights"] = weights_by_layer = []
        for index, layer in enumerate(self.layers):
            collected.append(hidden_states if output_hidden_states else None)
            stack = int(index >= config.num_embedding_layers)
            mask, options = inputs[stack].masks[layer.layer_type], inputs[stack].kwargs | kwargs
            hidden_states = layer(hidden_states, mask, rotary[stack], cache=layer_cache, **options)
            if index + 1 == config.num_embedding_layers:
                if layout is not None:
                    hidden_states = layout.contract(hidden_states, self.vision_embeddings)
                if config.normalize_embedding_output:
                    hidden_states = F.normalize(hidden_states, dim=-1)
        if layer_cache is not None:
            layer_cache.advance(inputs_embeds.shape[1], None if layout is None else layout.image_places)
        hidden_states = self.norm(hidden_states)
        if any(weights is None for weights in weights_by_layer or ()):
            logger.warning_once("`attentions` holds None: load with attn_implementation='eager' to see them.")
        return MmMambaModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=(*collected, hidden_states) if output_hidden_states else None,
            attentions=None if weights_by_layer is None else tuple(weights_by_layer),
            image_outputs=image_outputs,
            **{CACHE: cache},
        )


class MmMambaForConditionalGeneration(ChatMixin, MmMambaGenerationMixin, MmMambaPreTrainedModel):
    """The decoder with its output head, `generate` and `chat`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MmMambaConfig):
        super().__init__(config)
        self.model = MmMambaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `MmMambaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        attention_mask: Tensor | dict | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, mm_encoder_outputs: dict | None = None,
        cache: Cache | None = None, recorded_step=None, **kwargs,
    ) -> MmMambaCausalLMOutput:  # fmt: skip
        """Next-token logits, and the loss when `labels` are given.

        Args:
            labels: (B, L), -100 where no loss is wanted; shifted here. In a packed row the first label of each
                sequence must be -100, as `DataCollatorWithFlattening` sees to.
            logits_to_keep: Compute logits of the last so many positions (0: all), or of these positions.
            recorded_step: Gives the logits of `input_ids` (B, 1) in the network's place, see `capture_mmmamba`.

        The other arguments are those of `MmMambaModel.forward`.
        """
        cache = past_key_values if cache is None else cache
        if recorded_step is not None:
            return MmMambaCausalLMOutput(logits=recorded_step(input_ids), **{CACHE: cache})
        outputs = self.model(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, position_ids=position_ids,
            cache=cache, inputs_embeds=inputs_embeds, use_cache=use_cache, mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = project(self.lm_head, outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return MmMambaCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def save_pretrained(self, *args, **kwargs):
        """As in Transformers; the folder then loads through each of the auto classes that this class serves."""
        self.config.auto_map = dict.fromkeys(AUTO_CLASSES, f"modeling_mmmamba.{type(self).__name__}")
        super().save_pretrained(*args, **kwargs)


for _model in (MmMambaModel, MmMambaForConditionalGeneration):
    _model.register_for_auto_class("AutoModel")

__all__ = ["MmMambaCache", "MmMambaForConditionalGeneration", "MmMambaModel", "MmMambaPreTrainedModel"]
