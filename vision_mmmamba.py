"""Pictures as the decoder sees them: every tile becomes rows of patches, which stand among the rows of text.

There is no vision encoder: no layer of this file sees more than a patch, or four of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mmmamba import MmMambaVisionConfig


class MmMambaVisionEmbeddings(nn.Module):
    """Tiles to decoder rows: a strided convolution, a position table, optionally a 2x2 pixel shuffle with an MLP."""

    def __init__(self, config: MmMambaVisionConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels, hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, config.patches_per_side**2, hidden_size))
        if config.use_pixel_shuffle:
            self.projector = nn.Sequential(
                nn.Linear(4 * hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
            )

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table for a grid of patches, (1, hidden, rows, columns); resized if the grid is unusual."""
        side = self.config.patches_per_side
        table = self.position_embedding.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if (rows, columns) == (side, side):
            return table
        resized = F.interpolate(table.float(), size=(rows, columns), mode="bicubic", align_corners=False)
        return resized.to(table.dtype)

    def forward(self, pixel_values: Tensor | None = None, patches: Tensor | None = None) -> Tensor:
        """Tiles to rows.

        Args:
            pixel_values: (tiles, channels, height, width).
            patches: (patches, hidden) instead: with `pixel_shuffle_loc="post"` the rows of tiles are patches, which
                come here a second time, behind the embedding layers.

        Returns:
            (tiles, rows per tile, hidden), or (patches / 4, hidden).
        """
        if patches is not None:
            return self._shuffle(patches, self.config.patches_per_side)
        pixel_values = pixel_values.to(self.position_embedding.device, self.position_embedding.dtype)
        patches = self.patch_embedding(pixel_values)  # (tiles, hidden, rows, columns)
        patches = patches + self.positions(*patches.shape[2:])
        rows, columns = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2)
        if not self.config.use_pixel_shuffle:
            return patches
        if rows % 2 or columns % 2:
            raise ValueError(
                f"A tile of {rows} x {columns} patches cannot be shuffled 2x2; give pixel_values whose height and "
                f"width are multiples of {2 * self.config.patch_size} pixels."
            )
        if self.config.patches_per_token == 1:
            return self._shuffle(patches, columns)
        if columns != self.config.patches_per_side:
            raise ValueError(
                f"A tile of {rows} x {columns} patches does not fit this model, which shuffles behind its embedding "
                f"layers; give pixel_values of {self.config.image_size} x {self.config.image_size} pixels."
            )
        return patches

    def _shuffle(self, patches: Tensor, columns: int) -> Tensor:
        """Makes one row of each 2x2 patches.

        Args: patches (..., patches, hidden), row by row of a grid with so many columns and an even number of rows.
        Returns: (..., patches / 4, hidden).
        """
        blocks = patches.unflatten(-2, (-1, 2, columns // 2, 2)).transpose(-4, -3)  # (..., rows/2, columns/2, 2, 2, ·)
        return self.projector(blocks.flatten(-3).flatten(-3, -2))
