"""Loads model folders for commands, quantised ones included."""

from pathlib import Path

import torch
from torch import nn

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.quantization_mmmamba import quantization_of


def load_model(
    folder: str | Path, device: torch.device | str, dtype: torch.dtype | str = "auto"
) -> MmMambaForConditionalGeneration:
    """A model in evaluation mode.

    Args:
        folder: Model folder.
        device: Where the model runs.
        dtype: Of the weights that are not quantised. A model that another package has quantised is loaded in the
            dtype that it was saved in: since 5.23 Transformers casts only some of its other weights to another, so
            that layers do not fit each other.
    """
    config = MmMambaConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None or quantization_of(config) is not None:
        return MmMambaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    model = MmMambaForConditionalGeneration.from_pretrained(folder, device_map={"": str(device)}).eval()
    return without_packing(model) if torch.device(device).type == "cpu" else model


def without_packing(model: nn.Module) -> nn.Module:
    """Keeps bitsandbytes' 4-bit layers in the format that they are saved in, on CPUs with AVX-512 and bf16, too.

    bitsandbytes 0.50 repacks them there at the first forward, which needs multiples of 32 rows, and does not restore
    their scales when they are saved. See docs/quantization.md.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
