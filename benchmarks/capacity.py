"""How many conversations a GPU's memory holds beside the weights: computed, nothing is measured.

mmmamba bench capacity
mmmamba bench capacity --memory-gb 24 --lengths 4096 32768

A Mamba-2 layer keeps one state per conversation, whatever its length (fp32, and the convolution's last inputs), an
attention layer keys and values of every token. vLLM allots whole blocks and keeps some memory for activations; both
are left out here.
"""

import argparse

import torch

from mmmamba.configuration_mmmamba import MmMambaTextConfig

from .arguments import OURS
from .models import DTYPES, make_model
from .timing import format_table, write_result


def run(args: argparse.Namespace, device: torch.device) -> None:
    rows = capacity_rows(args)
    print(f"{args.size} size, {args.dtype}, {args.memory_gb:g} GB; conversations of so many tokens that fit at once\n")
    print(format_table(rows, list(rows[0])))
    settings = {name: getattr(args, name) for name in ("size", "layers", "dtype", "memory_gb")}
    write_result("capacity", device, {"settings": settings, "rows": rows}, args.results)


def capacity_rows(args: argparse.Namespace) -> list[dict]:
    """A row per model: bytes of its weights and of a conversation, and how many conversations of each length fit."""
    rows = []
    for name in OURS:
        model = make_model(name, args, torch.device("meta"))
        config, dtype = model.config.get_text_config(), DTYPES[args.dtype]
        weights = sum(p.nbytes for p in model.parameters())
        state, per_token = conversation_bytes(config, dtype)
        left = args.memory_gb * 1e9 - weights
        row = {"model": name, "weights GB": weights / 1e9, "state MB": state / 1e6, "KB per token": per_token / 1e3}
        rows.append(row | {f"{n:,}": max(0, int(left // (state + per_token * n))) for n in args.lengths})
    return rows


def conversation_bytes(config: MmMambaTextConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a conversation: those that are the same at every length, and those of each token."""
    linear = config.layer_types.count("linear_attention")
    kv_size, q_size = config.num_key_value_heads * config.head_dim, config.num_attention_heads * config.head_dim
    convolution = (config.conv_kernel - 1) * (2 * kv_size + q_size) * dtype.itemsize
    recurrent = q_size * config.head_dim * torch.float32.itemsize
    per_token = (len(config.layer_types) - linear) * 2 * kv_size * dtype.itemsize
    return linear * (convolution + recurrent), per_token
