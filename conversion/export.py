"""The network as a function of plain tensors, for `torch.export` and ONNX; see docs/export.md."""

import torch
from torch import Tensor, nn


class FlatModel(nn.Module):
    """A model whose cache is a list of tensors: those of `MmMambaCache.tensors`, in order.

        graph = FlatModel(model)
        logits, *cache = graph(input_ids)                  # a prompt
        logits, *cache = graph(token, past=cache)          # a step

    Rows are not padded: all tokens of the batch are valid.

    Args:
        model: An `MmMambaForConditionalGeneration` in eval mode.

    Attributes:
        names: Of the cache's tensors: `layers.N.keys` and `.values` (batch, key/value heads, tokens, head_dim),
            `layers.N.conv_state` (batch, channels, taps - 1), `.recurrent_state` (batch, heads, head_dim, head_dim).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        kinds = {"full_attention": ("keys", "values"), "linear_attention": ("conv_state", "recurrent_state")}
        layer_types = model.config.text_config.layer_types
        self.names = [f"layers.{index}.{name}" for index, kind in enumerate(layer_types) for name in kinds[kind]]

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, past: list[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Logits of the last token, (batch, 1, vocabulary), and the cache's tensors with what was read.

        Args:
            input_ids: (batch, length); length 1 with `past`.
            pixel_values: (tiles, channels, height, width), for the image tokens among `input_ids`.
            past: The cache's tensors.
        """
        cache = self.model.new_cache()
        if past is not None:
            tensors = dict(zip(self.names, past, strict=True))
            # Where no layer is attention, nothing depends on how many tokens were read.
            length = next((x.shape[2] for name, x in tensors.items() if name.endswith("keys")), 1)
            cache.load_tensors(tensors, length)
        with torch.no_grad():
            outputs = self.model(
                input_ids=input_ids, pixel_values=pixel_values, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        tensors = cache.tensors()  # may be views of longer ones
        return (outputs.logits, *(tensors[name].contiguous() for name in self.names))

    def shapes_of_past(self) -> list[dict[int, torch.export.Dim]]:
        """The dynamic dimensions of `past`, for `dynamic_shapes`: batch, and tokens of keys and values."""
        dynamic = torch.export.Dim.DYNAMIC
        return [{0: dynamic} | ({2: dynamic} if name.endswith(("keys", "values")) else {}) for name in self.names]
