"""The models that are measured: our three kinds, and peers from Transformers of the same width, depth and heads.

Weights are random and the default vocabulary is small; all models have an output head of the same size. Bamba has
attention in the same layers as our hybrid, Falcon-H1 attention and Mamba-2 in every layer; Llama has the architecture
of our teacher's decoder.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from mmmamba.benchmarks.arguments import OURS, SIZES
from mmmamba.cache_mmmamba import CACHE
from mmmamba.capture_mmmamba import RecordedStep
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(name: str, args: argparse.Namespace, device: torch.device):
    """A model of `OURS` or `PEERS` with random weights."""
    layers, hidden, mlp, heads, kv_heads, vocabulary = SIZES[args.size]
    layers = args.layers or layers
    attention_layers = {"linear": [], "teacher": range(layers)}.get(name, range(0, layers, 4))
    common = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 2**21,
    }  # fmt: skip
    mamba = {
        "mamba_n_heads": heads, "mamba_d_head": hidden // heads, "mamba_n_groups": kv_heads, "mamba_expand": 1,
        "mamba_d_state": hidden // heads,
    }  # fmt: skip
    torch.manual_seed(0)
    if name in OURS:
        types = ["full_attention" if i in attention_layers else "linear_attention" for i in range(layers)]
        text = common | {"num_embedding_layers": layers // 4, "layer_types": types}
        config = MmMambaConfig(text_config=text, image_token_id=3)
        model_class = MmMambaForConditionalGeneration
    elif name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config, model_class = LlamaConfig(**common), LlamaForCausalLM
    elif name == "granite":
        from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

        # The published hybrids without experts: attention in every tenth layer, an inner width of twice the hidden
        # size, a state size of 128; a narrower MLP makes up for the wider mixers.
        types = ["full_attention" if i % 10 == min(5, layers // 2) else "linear_attention" for i in range(layers)]
        config = GraniteMoeHybridConfig(
            **common, shared_intermediate_size=mlp * 3 // 4, num_local_experts=0, layer_types=types, mamba_expand=2,
            mamba_d_head=64, mamba_n_heads=2 * hidden // 64, mamba_n_groups=1, mamba_d_state=128,
        )  # fmt: skip
        model_class = GraniteMoeHybridForCausalLM
    elif name == "bamba":
        from transformers import BambaConfig, BambaForCausalLM

        config = BambaConfig(**common, **mamba, attn_layer_indices=list(attention_layers))
        model_class = BambaForCausalLM
    else:
        from transformers import FalconH1Config, FalconH1ForCausalLM

        config, model_class = FalconH1Config(**common, **mamba, mamba_d_ssm=hidden), FalconH1ForCausalLM
    with torch.device(device):
        model = model_class._from_config(config, dtype=DTYPES[args.dtype])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def cache_of_length(model, length: int, batch: int = 1):
    """A cache of `length` tokens, made without reading them: all keys and values but the first 16 are random.

    How long a step takes does not depend on what the cache holds.
    """
    start = 16
    ids = torch.randint(4, model.config.get_text_config().vocab_size, (batch, start), device=model.device)
    cache = model(ids, use_cache=True)[CACHE]
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            shape = (*layer.keys.shape[:2], length - start, layer.keys.shape[3])
            more = torch.randn(shape, device=model.device, dtype=layer.keys.dtype)
            layer.keys, layer.values = torch.cat([layer.keys, more], 2), torch.cat([layer.values, more], 2)
    if hasattr(cache, "advance"):
        cache.advance(length - cache.get_seq_length())
    return cache


def decode_step(model, cache, batch: int = 1, recorded: bool = False, max_steps: int = 0) -> Callable[[], Tensor]:
    """A function that runs the decoding step after `cache`, which grows with every call.

    Args:
        model: One of `make_model`.
        cache: Continued in place.
        batch: Rows of the cache.
        recorded: Whether to replay a CUDA graph, with a cache of fixed length for `max_steps`.
        max_steps: The most calls, if recorded.
    """
    ids = torch.full((batch, 1), 5, device=model.device)
    if recorded:
        with torch.no_grad():
            step = RecordedStep(model, cache, None, batch, int(cache.get_seq_length()) + max_steps)
        return lambda: step(ids)
    positions = torch.full((batch, 1), int(cache.get_seq_length()), device=model.device)

    @torch.no_grad()
    def step():
        logits = model(ids, **{CACHE: cache}, use_cache=True, position_ids=positions).logits
        positions.add_(1)
        return logits

    return step


def cache_bytes(cache) -> tuple[int, int]:
    """Bytes of keys and values, which grow with length, and of convolution and recurrent states, which do not."""
    key_value = state = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            key_value += tensor.nbytes if isinstance(tensor, Tensor) else 0
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, None) or {}
            tensors = states.values() if isinstance(states, dict) else states
            state += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    return key_value, state


def decode_bytes(model, cache, batch: int) -> int:
    """Bytes that one step moves.

    It reads the weights, of the embedding one row per token, and keys and values; it reads and writes the states.
    """
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)
    weights -= sum(p.nbytes for name, p in model.named_parameters() if "vision" in name)
    embedding_rows = batch * embedding.shape[1] * embedding.element_size()
    key_value, state = cache_bytes(cache)
    return weights + embedding_rows + key_value + 2 * state


def prefill_flops(model, length: int, batch: int) -> int:
    """FLOPs of reading a prompt, logits of its last token included: weights, causal attention, the scan."""
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    vision = sum(p.numel() for name, p in model.named_parameters() if "vision" in name)
    weights = sum(p.numel() for p in model.parameters()) - embedding.numel() - head.numel() - vision
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attention_layers = sum(name in ("full_attention", "attention", "hybrid") for name in types)
    mamba_layers = sum(name in ("linear_attention", "mamba", "hybrid") for name in types)
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    attention = attention_layers * 2 * heads * head_dim * length * length
    chunk = 128
    in_chunks, states = 2 * chunk * head_dim, 4 * head_dim * head_dim  # per step and head; in chunks half, as causal
    scan = mamba_layers * heads * length * (in_chunks + states)
    return batch * (2 * weights * length + attention + scan) + 2 * batch * head.numel()
