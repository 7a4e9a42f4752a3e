"""Tiles travel to the device as the levels of their pixels, a quarter of the bytes, and are normalised there."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmmamba.image_processing_mmmamba import MmMambaImageProcessor, MmMambaImageProcessorPil


class TileNormalizer:
    """Levels to what an image processor makes of them, to the last bit on any device: by a table of all 256.

    Args:
        image_processor: As it rescales and normalises. From now on it does neither and gives levels, uint8.
    """

    def __init__(self, image_processor: MmMambaImageProcessor | MmMambaImageProcessorPil):
        levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
        size = {"height": 16, "width": 16}
        tile = image_processor([levels], size=size, min_patches=1, max_patches=1, return_tensors="pt")["pixel_values"]
        self._values = tile.float().reshape(3, 256)
        image_processor.do_rescale = image_processor.do_normalize = False

    def __call__(self, levels: Tensor) -> Tensor:
        """(tiles, 3, size, size) uint8 to fp32 of that shape on the same device; tiles of other dtypes as they are."""
        if levels.dtype != torch.uint8:
            return levels
        self._values = self._values.to(levels.device)
        tiles = torch.empty(levels.shape, dtype=torch.float32, device=levels.device)
        for channel, values in enumerate(self._values):
            tiles[:, channel] = values[levels[:, channel].int()]
        return tiles
