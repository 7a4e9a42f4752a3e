"""Weights that `mmmamba quantize` wrote, which vLLM has no layers for: what it says of them."""

from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from mmmamba.quantization_mmmamba import METHOD


@register_quantization_config(METHOD)
class MmMambaQuantizationConfig(QuantizationConfig):
    """Refuses a model while vLLM still looks at its configuration; never made."""

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict, *args, **kwargs) -> None:
        """Raises ValueError for this package's weights; asked about all that are quantised."""
        if hf_quant_cfg.get("quant_method") == METHOD:
            raise ValueError(
                "This model was quantised by `mmmamba quantize`, whose weights vLLM does not read; serve the folder "
                "that it was made from, or this one by `mmmamba serve DIR --engine transformers`."
            )
