"""The models that are measured: ours of three kinds, and Transformers' own of the same width, depth and heads.

Random weights, small vocabulary by default: neither changes speed but for the output head, which all share. Bamba has
attention where our hybrid has it; Falcon-H1 has attention and Mamba-2 in every layer; Llama is what our teacher is
without pictures.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba.cache_mmmamba import CACHE
from mmmamba.capture_mmmamba import RecordedStep
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


OURS = ("linear", "hybrid", "teacher")
PEERS = ("llama", "bamba", "falcon-h1")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {  # layers, hidden, MLP, heads, key/value heads, vocabulary
    "small": (8, 512, 2048, 8, 4, 8192),
    "released": (32, 2048, 8192, 16, 8, 92553),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=OURS + PEERS, default=[*OURS, *PEERS])
    parser.add_argument("--size", choices=list(SIZES), default="small", help="small, or that of the released model")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, default=1)


def make(name: str, args: argparse.Namespace, device: torch.device):
    """One of the models, with random weights."""
    layers, hidden, mlp, heads, kv_heads, vocabulary = SIZES[args.size]
    layers = args.layers or layers
    attention = {"linear": [], "hybrid": range(0, layers, 4), "teacher": range(layers)}.get(name, range(0, layers, 4))
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
        kinds = ["full_attention" if layer in attention else "linear_attention" for layer in range(layers)]
        text = common | {"num_embedding_layers": layers // 4, "layer_types": kinds}
        config = MmMambaConfig(text_config=text, image_token_id=3)
        build = MmMambaForConditionalGeneration
    elif name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config, build = LlamaConfig(**common), LlamaForCausalLM
    elif name == "bamba":
        from transformers import BambaConfig, BambaForCausalLM

        config, build = BambaConfig(**common, **mamba, attn_layer_indices=list(attention)), BambaForCausalLM
    else:
        from transformers import FalconH1Config, FalconH1ForCausalLM

        config, build = FalconH1Config(**common, **mamba, mamba_d_ssm=hidden), FalconH1ForCausalLM
    with torch.device(device):
        model = build._from_config(config, dtype=DTYPES[args.dtype])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read(model, length: int, batch: int = 1):
    """A cache that has `length` tokens behind it, made without reading them: keys and values are random.

    What a cache holds changes nothing in how long a step takes.
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


def stepper(model, cache, batch: int, recorded: bool, steps: int):
    """A function that runs one decoding step after `cache`, `steps` times at most."""
    ids = torch.full((batch, 1), 5, device=model.device)
    if recorded:
        with torch.no_grad():
            step = RecordedStep(model, cache, None, batch, int(cache.get_seq_length()) + steps)
        return lambda: step(ids)
    lengths = {"position": int(cache.get_seq_length())}

    @torch.no_grad()
    def run():
        positions = torch.full((batch, 1), lengths["position"], device=model.device)
        lengths["position"] += 1
        return model(ids, **{CACHE: cache}, use_cache=True, position_ids=positions).logits

    return run


@dataclass
class Work:
    """What has to be moved and computed, counted exactly."""

    bytes: int
    flops: int


def bytes_of_cache(cache) -> tuple[int, int]:
    """Keys and values, which a step reads; states, which it reads and writes."""
    grown = fixed = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            grown += tensor.nbytes if isinstance(tensor, Tensor) else 0
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, None) or {}
            tensors = states.values() if isinstance(states, dict) else states
            fixed += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    return grown, fixed


def decode_work(model, cache, batch: int) -> Work:
    """Of one step: every weight once but the embedding, of which each token takes a row; the cache; products."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)
    weights -= sum(p.nbytes for name, p in model.named_parameters() if "vision" in name)
    grown, fixed = bytes_of_cache(cache)
    rows = batch * embedding.shape[1] * embedding.element_size()
    products = weights // embedding.element_size()
    return Work(weights + rows + grown + 2 * fixed, 2 * batch * products + 2 * grown // embedding.element_size())


def prefill_flops(model, length: int, batch: int) -> int:
    """Of reading a prompt with logits for its last token: products with weights, attention (causal), the scan."""
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    vision = sum(p.numel() for name, p in model.named_parameters() if "vision" in name)
    weights = sum(p.numel() for p in model.parameters()) - embedding.numel() - head.numel() - vision
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attends = sum(kind in ("full_attention", "attention", "hybrid") for kind in kinds)
    scans = sum(kind in ("linear_attention", "mamba", "hybrid") for kind in kinds)
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    attention = attends * 2 * heads * size * length * length
    chunk = 128
    scan = scans * heads * length * (2 * chunk * size + 4 * size * size)  # inside chunks, halved as causal; states
    return batch * (2 * weights * length + attention + scan) + 2 * batch * head.numel()
