"""Loads model folders for commands, quantised ones included."""

import os
from pathlib import Path

import torch
from torch import nn

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.cpu_mmmamba import usable_cores
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.quantization_mmmamba import quantization_of


def load_model(
    folder: str | Path, device: torch.device | str, dtype: torch.dtype | str = "auto"
) -> MmMambaForConditionalGeneration:
    """A model in evaluation mode.

    Args:
        folder: Model folder.
        device: Where the model runs.
        dtype: Of the weights. A quantised model is loaded in the dtype that its other weights were saved in: its
            memory is why it was quantised; and of one that another package has quantised, Transformers since 5.23
            casts only some weights to another dtype, so that layers do not fit each other.
    """
    if torch.device(device).type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # torch knows nothing of quotas
    config = MmMambaConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None or quantization_of(config) is not None:
        dtype = dtype if quantization_of(config) is None else "auto"
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
