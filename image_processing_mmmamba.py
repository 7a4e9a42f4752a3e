"""Dynamic tiling: a picture becomes a grid of square tiles near its aspect ratio, and a thumbnail of the whole.

There are two backends: Pillow and numpy, whose pixels equal upstream's, and torchvision, which is faster and whose
bicubic filter differs from Pillow's by at most three of 255 levels.
"""

import os
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torch_tensor

from .image_reading_mmmamba import array_to_rgb, read_image, to_rgb


MOST_TILES = 1024  # of a picture: 262,144 tokens at 256 each


@lru_cache(maxsize=64)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with `min_tiles <= columns * rows <= max_tiles`, fewest tiles first.

    Raises:
        ValueError: if there is none.
    """
    for name, value in (("min_patches", min_tiles), ("max_patches", max_tiles)):
        if type(value) is not int:
            raise ValueError(f"{name}={value!r} is no whole number; give 1 to {MOST_TILES}.")
    if not 1 <= min_tiles <= max_tiles <= MOST_TILES:
        raise ValueError(
            f"min_patches={min_tiles} and max_patches={max_tiles} allow no grid; give 1 <= min_patches <= max_patches "
            f"<= {MOST_TILES}."
        )
    # Upstream sorts a set, whose order decides among grids of as many tiles. That depends on the order in which the
    # set was filled: with all grids of at most `limit` columns and rows, for growing limits.
    candidates = {
        grid
        for limit in range(min_tiles, max_tiles + 1)
        for grid in _grids_up_to(limit, limit > min_tiles, min_tiles, max_tiles)
    }
    return tuple(sorted(candidates, key=lambda grid: grid[0] * grid[1]))


def _grids_up_to(limit: int, new: bool, min_tiles: int, max_tiles: int) -> Iterator[tuple[int, int]]:
    """Allowed grids with at most `limit` columns and rows; if `new`, those with `limit` columns or rows."""
    most_columns = min(limit - 1, max_tiles // limit) if new else limit - 1
    for columns in (*range(1, most_columns + 1), limit):
        lowest, highest = -(-min_tiles // columns), min(limit, max_tiles // columns)
        if new and columns < limit:
            lowest = max(lowest, limit)
        for rows in range(lowest, highest + 1):
            yield columns, rows


def choose_grid(width: int, height: int, tile_size: int, min_tiles: int = 1, max_tiles: int = 12) -> tuple[int, int]:
    """The (columns, rows) whose aspect ratio is nearest to the picture's.

    Of equally near grids the larger one is taken if the picture has more than half of its pixels.

    Args:
        width, height: Size of the picture in pixels.
        tile_size: Side of a tile in pixels.

    Raises:
        ValueError: if there is no such grid, or the picture has no pixels.
    """
    if min(width, height) < 1:
        raise ValueError(f"A picture of {width} x {height} pixels cannot be cut into tiles; give one with pixels.")
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > 0.5 * tile_size**2 * columns * rows:
            best = columns, rows
    return best


def tile_side(size) -> int:
    """The side of a tile in pixels, from an image processor's `size`. Raises ValueError if that is no square."""
    given = dict(size) if isinstance(size, SizeDict) else get_size_dict(size)
    height, width = given.get("height"), given.get("width")
    if type(height) is not int or height != width or height < 1:
        shown = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
        shown = f"{height} x {width}" if None not in (height, width) else shown
        raise ValueError(f"size {shown} is no square; tiles need equal height and width, such as size=448.")
    return height


class MmMambaImageProcessorKwargs(ImagesKwargs, total=False):
    """
    min_patches (`int`): Fewest tiles of a picture, thumbnail not counted.
    max_patches (`int`): Most tiles of a picture, thumbnail not counted.
    use_thumbnail (`bool`): Whether a picture of several tiles gets a small copy of the whole as its last tile.
    crop_to_patches (`bool`): Whether a picture may become several tiles, or is one; TRL's GRPO sets it.
    """

    min_patches: int
    max_patches: int
    use_thumbnail: bool
    crop_to_patches: bool


def _as_rgb(image, input_data_format, do_rescale: bool) -> torch.Tensor:
    """A picture as (3, height, width); see `array_to_rgb`."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).contiguous()
    return array_to_rgb(image, input_data_format, do_rescale)


class _TilingMixin:
    """Cuts pictures into tiles, resized, rescaled and normalised.

    Calling it with pictures returns `pixel_values` (tiles, 3, size, size), the tiles of all pictures in order, and
    `num_patches` (pictures,), how many tiles each picture has, thumbnail included.
    """

    valid_kwargs = MmMambaImageProcessorKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    min_patches = 1
    max_patches = 12
    use_thumbnail = True
    crop_to_patches = True

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        """See Transformers' `BaseImageProcessor`. Raises ValueError for whatever is wrong with pictures or options."""
        if unknown := sorted(set(kwargs) - set(self.valid_kwargs.__annotations__)):
            raise ValueError(
                f"The image processor does not know {unknown[0]}={kwargs[unknown[0]]!r:.60}; leave it out."
            )
        try:
            return super().preprocess(images, *args, **kwargs)
        except StrictDataclassError as error:  # an option of the wrong type
            raise ValueError(" ".join(str(error.__cause__ or error).split())) from None

    def fetch_images(self, image_url_or_urls):
        """Opens paths, URLs and base64, in (lists of) lists. Raises ValueError for what is no picture."""
        image = image_url_or_urls
        if isinstance(image, (list, tuple)):
            return [self.fetch_images(one) for one in image]
        if isinstance(image, (str, os.PathLike)):
            return read_image(image)
        if isinstance(image, Image.Image):
            return image
        if isinstance(image, np.ndarray) or is_torch_tensor(image):
            if image.ndim not in (2, 3, 4):
                raise ValueError(f"An array of shape {tuple(image.shape)} is no picture; give (height, width, 3).")
            # Transformers expects channels.
            shape = image.shape if image.ndim > 2 else (3, *image.shape)
            return np.broadcast_to(image, shape) if isinstance(image, np.ndarray) else image.expand(shape)
        raise ValueError(f"{image!r:.200} is no picture; give a PIL image, an array, a path, an address or base64.")

    def _preprocess(
        self,
        images,
        size: SizeDict,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        return_tensors,
        min_patches: int,
        max_patches: int,
        use_thumbnail: bool,
        crop_to_patches: bool = True,
        **kwargs,
    ) -> BatchFeature:
        min_patches, max_patches = (min_patches, max_patches) if crop_to_patches else (1, 1)
        tiles, counts = [], []
        for image in images:  # (3, height, width)
            side = tile_side(size)
            columns, rows = choose_grid(image.shape[2], image.shape[1], side, min_patches, max_patches)
            resized = self.resize(image, SizeDict(height=rows * side, width=columns * side), resample=resample)
            picture_tiles = [
                resized[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                for row in range(rows)
                for column in range(columns)
            ]
            if use_thumbnail and len(picture_tiles) > 1:
                picture_tiles.append(self.resize(image, SizeDict(height=side, width=side), resample=resample))
            counts.append(len(picture_tiles))
            options = (do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            tiles += [self._rescale_and_normalize(tile, *options) for tile in picture_tiles]
        return BatchFeature({"pixel_values": tiles, "num_patches": counts}, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """How many tiles a picture of this size in pixels gives, thumbnail included."""
        names = ("min_patches", "max_patches", "use_thumbnail", "crop_to_patches", "size")
        options = {name: getattr(self, name) for name in names} | (images_kwargs or {})
        if not options["crop_to_patches"]:
            return 1
        side = tile_side(options["size"])
        columns, rows = choose_grid(width, height, side, options["min_patches"], options["max_patches"])
        return columns * rows + (options["use_thumbnail"] and columns * rows > 1)


class MmMambaImageProcessorPil(_TilingMixin, PilBackend):
    __doc__ = _TilingMixin.__doc__

    def process_image(self, image, input_data_format=None, do_rescale=True, **kwargs) -> np.ndarray:
        return _as_rgb(image, input_data_format, do_rescale).cpu().numpy()

    def _rescale_and_normalize(self, tile, do_rescale, rescale_factor, do_normalize, mean, std):
        if do_rescale:
            tile = self.rescale(tile, rescale_factor)
        return self.normalize(tile, mean, std) if do_normalize else tile


class MmMambaImageProcessor(_TilingMixin, TorchvisionBackend):
    __doc__ = _TilingMixin.__doc__

    def process_image(self, image, input_data_format=None, do_rescale=True, device=None, **kwargs) -> torch.Tensor:
        image = _as_rgb(image, input_data_format, do_rescale)
        return image if device is None else image.to(device)

    def to_dict(self) -> dict:
        """As in Transformers; `auto_map` names both backends, so that AutoImageProcessor can choose."""
        values = super().to_dict()
        auto_map = dict(values.get("auto_map") or {})
        name = auto_map.get("AutoImageProcessor")
        if isinstance(name, str) and name.endswith(".MmMambaImageProcessor"):  # not one that was loaded from Pillow's
            auto_map["AutoImageProcessor"] = {"torchvision": name, "pil": f"{name}Pil"}
            values["auto_map"] = auto_map
        return values

    def _rescale_and_normalize(self, tile, do_rescale, rescale_factor, do_normalize, mean, std):
        return self.rescale_and_normalize(tile, do_rescale, rescale_factor, do_normalize, mean, std)


for _processor in (MmMambaImageProcessorPil, MmMambaImageProcessor):
    _processor.register_for_auto_class()

__all__ = ["MmMambaImageProcessor", "MmMambaImageProcessorPil", "choose_grid"]
