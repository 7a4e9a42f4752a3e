"""`from_pretrained` with the arguments of upstream's and InternVL's model cards.

Transformers has other names for them: `attn_implementation` and `quantization_config`.
"""

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from .quantization_mmmamba import QuantizationMixin


HALF_DTYPES = (torch.float16, torch.bfloat16, "float16", "bfloat16")  # those that flash attention computes in


def renamed_arguments(arguments: dict) -> dict:
    """Arguments of `from_pretrained` with upstream's names replaced by Transformers'.

    - `use_flash_attn=True` chooses "flash_attention_2" if the package is installed, there is a GPU, and `dtype` is
      half precision; otherwise, and if False, attention is computed as if it had not been given.
      `attn_implementation` wins over it.
    - `load_in_8bit=True` and `load_in_4bit=True` become a `BitsAndBytesConfig`; False says nothing.

    Raises:
        ValueError: if a `quantization_config` is given, too.
    """
    arguments = dict(arguments)
    use_flash_attn = arguments.pop("use_flash_attn", False)
    dtype = arguments.get("dtype", arguments.get("torch_dtype"))
    if use_flash_attn and dtype in HALF_DTYPES and is_flash_attn_2_available():
        arguments.setdefault("attn_implementation", "flash_attention_2")
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if arguments.pop(name, None)}
    if bits:
        if arguments.get("quantization_config") is not None:
            raise ValueError(
                f"{' and '.join(bits)} and quantization_config exclude each other; give quantization_config alone."
            )
        arguments["quantization_config"] = BitsAndBytesConfig(**bits)
    return arguments


class LoadingMixin(QuantizationMixin):
    """`from_pretrained` of the package's models."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in Transformers; `use_flash_attn`, `load_in_8bit` and `load_in_4bit` see `renamed_arguments`."""
        return super().from_pretrained(*args, **renamed_arguments(kwargs))


__all__ = ["LoadingMixin", "renamed_arguments"]
