"""The network in vLLM: its layers, what of them is spread over processes, and how checkpoints are read into them.

The mathematics is that of `modeling_mmmamba.py`, which this is tested against; what differs is that the tokens of all
requests lie in one row, and that vLLM keeps keys, values and states.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from mmmamba.configuration_mmmamba import MmMambaTextConfig
from mmmamba.vision_mmmamba import MmMambaVisionEmbeddings

from .vllm_mixer import MmMambaMixer, kv_heads, state_dtypes, state_shapes
from .vllm_processing import MmMambaDummyInputs, MmMambaMultiModalProcessor, MmMambaProcessingInfo


class MmMambaDecoderLayer(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: MmMambaTextConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        index = int(prefix.rsplit(".", 1)[1])
        embedding = index < config.num_embedding_layers
        quant_config = vllm_config.quant_config
        self.layer_type = config.layer_types[index]
        if self.layer_type == "full_attention":
            of_layer = copy.deepcopy(config)
            of_layer.rope_parameters = config.embedding_rope_parameters if embedding else config.rope_parameters
            self.self_attn = LlamaAttention(
                of_layer,
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.max_position_embeddings,
                quant_config,
                bias=config.attention_bias,
                bias_o_proj=config.attention_output_bias,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.self_attn",
            )
        else:
            self.mamba = MmMambaMixer(config, vllm_config, f"{prefix}.mamba")
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.mlp",
        )
        eps = config.embedding_rms_norm_eps if embedding else config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps=eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Args: positions (T,); hidden_states (T, D). Returns (T, D)."""
        normed = self.input_layernorm(hidden_states)
        if self.layer_type == "full_attention":
            mixed = self.self_attn(positions, normed)
        else:
            mixed = self.mamba(normed)
        normed, hidden_states = self.post_attention_layernorm(mixed, hidden_states)
        return hidden_states + self.mlp(normed)


@support_torch_compile
class MmMambaModel(nn.Module):
    """The decoder without its head. With pipeline parallelism each process has some of its layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = text = config.text_config
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        self.vision_embeddings, self.embed_tokens, self.norm = PPMissingLayer(), PPMissingLayer(), PPMissingLayer()
        if first and config.vision_config is not None:
            self.vision_embeddings = MmMambaVisionEmbeddings(config.vision_config, text.hidden_size)
        if first or (last and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                text.vocab_size, text.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            text.num_hidden_layers,
            lambda prefix: MmMambaDecoderLayer(text, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        if last:
            self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], text.hidden_size
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """The layers of this process.

        Args: input_ids (T,), or inputs_embeds (T, D) instead; positions (T,); intermediate_tensors, what the process
        before returned.
        Returns: (T, D); `IntermediateTensors` for the next process unless this is the last one.
        """
        if not get_pp_group().is_first_rank:
            hidden_states = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            hidden_states = self.embed_tokens(input_ids)
        for index in range(self.start_layer, self.end_layer):
            hidden_states = self.layers[index](positions, hidden_states)
            if self.config.normalize_embedding_output and index + 1 == self.config.num_embedding_layers:
                hidden_states = F.normalize(hidden_states, dim=-1)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


@MULTIMODAL_REGISTRY.register_processor(
    MmMambaMultiModalProcessor, info=MmMambaProcessingInfo, dummy_inputs=MmMambaDummyInputs
)
class MmMambaForConditionalGeneration(
    nn.Module,
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsMultiModal,
    SupportsPP,
):
    """mmMamba for vLLM: teacher, hybrid and linear student alike."""

    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "in_proj": ["in_proj"],
        "conv1d": ["conv1d"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}  # noqa: RUF012
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".A_log": ".A"},  # whose loader computes A
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a picture or a video in a prompt, as the chat template writes it."""
        return {"image": "<img><IMG_CONTEXT></img>", "video": "<img></img>"}.get(modality)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config.model_config.dtype, vllm_config.cache_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return state_shapes(
            vllm_config.model_config.hf_config.text_config,
            vllm_config.parallel_config.tensor_parallel_size,
            vllm_config.num_speculative_tokens,
        )

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        text = config.text_config
        if config.shuffles_behind:
            raise ValueError(
                "HoVLE-HD (pixel_shuffle_loc='post') cannot be served by vLLM: its sequences get shorter behind the "
                "embedding layers. Serve it by `mmmamba serve DIR --engine transformers`."
            )
        text.mamba_chunk_size = text.ssm_chunk_size  # where vLLM's kernels look for it
        self.quant_config = vllm_config.quant_config
        if config.vision_config is not None:
            self.configure_mm_token_handling(text.vocab_size, [config.image_token_id])
        with self._mark_language_model(vllm_config):
            self.model = MmMambaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                text.vocab_size,
                text.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(text.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def get_language_model(self) -> nn.Module:
        return self

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: list[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Token rows with rows of pictures in their places.

        Args: input_ids (T,); multimodal_embeddings, (rows, D) each, in the order of their places; is_multimodal (T,),
        where these stand. Returns (T, D).
        """
        rows = self.model.embed_tokens(input_ids)
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            return rows
        pictures = torch.cat(list(multimodal_embeddings)).to(rows.dtype)
        return rows.masked_scatter(is_multimodal.to(rows.device)[:, None], pictures)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules read text and which pictures."""
        return MultiModelKeys.from_string_field(
            language_model="model.layers",
            connector="model.vision_embeddings.projector",
            tower_model="model.vision_embeddings.patch_embedding",
        )

    def embed_multimodal(
        self,
        pixel_values: Tensor | None = None,
        num_patches: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        num_patches_videos: Tensor | None = None,
        **kwargs,
    ) -> list[Tensor]:
        """Rows of pictures and of videos.

        Args:
            pixel_values, pixel_values_videos: (tiles, 3, height, width), of all pictures, and of all videos.
            num_patches, num_patches_videos: (pictures,) and (videos,), how many of these tiles each has.

        Returns:
            (rows, D) of each picture, then of each video.
        """
        rows = []
        for tiles, counts in ((pixel_values, num_patches), (pixel_values_videos, num_patches_videos)):
            if tiles is not None:
                embedded = torch.cat([self.model.vision_embeddings(piece) for piece in tiles.split(32)])
                rows += [of_one.flatten(0, 1) for of_one in embedded.split(counts.flatten().tolist())]
        return rows

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> Tensor | IntermediateTensors:
        """See `MmMambaModel`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(T, D) to (T, vocabulary)."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Reads a checkpoint's tensors, by name. Returns the names of the parameters that were read."""
        text, processes = self.config.text_config, get_tensor_model_parallel_world_size()
        weights = ((name, repeat_kv_heads(name, weight, text, processes)) for name, weight in weights)
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def repeat_kv_heads(name: str, weight: Tensor, config: MmMambaTextConfig, processes: int) -> Tensor:
    """A mixer's weight with its key/value heads repeated where there are more processes than such heads."""
    repeats = kv_heads(config, processes) // config.num_key_value_heads
    if repeats == 1 or (".mamba.in_proj." not in name and ".mamba.conv1d." not in name):
        return weight
    shared = config.num_key_value_heads * config.head_dim
    values, keys, rest = weight.split([shared, shared, len(weight) - 2 * shared])
    values, keys = (
        x.unflatten(0, (-1, config.head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1) for x in (values, keys)
    )
    return torch.cat([values, keys, rest])
