"""Dynamic tiling: a picture becomes a grid of square tiles near its aspect ratio, and a thumbnail of the whole.

There are two backends: Pillow and numpy, whose pixels equal upstream's, and torchvision, which is faster and whose
bicubic filter differs from Pillow's by at most three of 255 levels.
"""

import os
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
    load_image,
)
from transformers.processing_utils import ImagesKwargs


@lru_cache(maxsize=64)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with `min_tiles <= columns * rows <= max_tiles`, fewest tiles first.

    Raises:
        ValueError: if there is none.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"min_patches={min_tiles} and max_patches={max_tiles} allow no grid; give 1 <= min_patches <= max_patches."
        )
    # Upstream sorts a set, whose order decides among grids of as many tiles: it depends on how the set was filled.
    candidates = {
        (columns, rows)
        for limit in range(min_tiles, max_tiles + 1)
        for columns in range(1, limit + 1)
        for rows in range(1, limit + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(candidates, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, tile_size: int, min_tiles: int = 1, max_tiles: int = 12) -> tuple[int, int]:
    """The (columns, rows) whose aspect ratio is nearest to the picture's.

    Of equally near grids the larger one is taken if the picture has more than half of its pixels.

    Args:
        width, height: Size of the picture in pixels.
        tile_size: Side of a tile in pixels.
    """
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > 0.5 * tile_size**2 * columns * rows:
            best = columns, rows
    return best


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB: its first frame, 16 bits scaled to 8, alpha dropped.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        picture.load()
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            levels = np.asarray(picture, dtype=np.float64)
            # 32-bit integers and floats may hold levels of 8 or 16 bits; their values show which.
            if picture.mode.startswith("I;16") or levels.max(initial=0) > 255:
                levels = levels / 257
            picture = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that palette transparency is dropped
            return picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        name = getattr(picture, "filename", "") or "a picture"
        raise ValueError(f"{name} cannot be decoded ({error}); give a whole, undamaged image file.") from None


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

    def fetch_images(self, image_url_or_urls):
        """Opens paths, URLs and base64. Raises ValueError for one that is missing or no picture."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if not isinstance(image_url_or_urls, (str, os.PathLike)):
            return image_url_or_urls
        source = os.fspath(image_url_or_urls)
        try:
            if not os.path.isfile(source):
                return load_image(source)
            return ImageOps.exif_transpose(Image.open(source))  # load_image would clip 16-bit levels at 255
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            shown = source if len(source) < 200 else source[:60] + "…"
            reason = str(error).split(", or base64")[0].split(". Failed with")[0]
            raise ValueError(f"{shown} cannot be opened as a picture ({reason}); give a whole image file.") from None

    def process_image(self, image, **kwargs):
        if isinstance(image, Image.Image):
            image = to_rgb(image)
        return super().process_image(image, **kwargs)

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
        crop_to_patches: bool,
        **kwargs,
    ) -> BatchFeature:
        min_patches, max_patches = (min_patches, max_patches) if crop_to_patches else (1, 1)
        tiles, counts = [], []
        for image in images:  # (3, height, width)
            if size.height != size.width:
                raise ValueError(f"size {size.height} x {size.width} is no square; tiles need equal height and width.")
            side = size.height
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
        side = get_size_dict(options["size"])["height"]
        columns, rows = choose_grid(width, height, side, options["min_patches"], options["max_patches"])
        return columns * rows + (options["use_thumbnail"] and columns * rows > 1)


class MmMambaImageProcessorPil(_TilingMixin, PilBackend):
    __doc__ = _TilingMixin.__doc__

    def _rescale_and_normalize(self, tile, do_rescale, rescale_factor, do_normalize, mean, std):
        if do_rescale:
            tile = self.rescale(tile, rescale_factor)
        return self.normalize(tile, mean, std) if do_normalize else tile


class MmMambaImageProcessor(_TilingMixin, TorchvisionBackend):
    __doc__ = _TilingMixin.__doc__

    def _rescale_and_normalize(self, tile, do_rescale, rescale_factor, do_normalize, mean, std):
        return self.rescale_and_normalize(tile, do_rescale, rescale_factor, do_normalize, mean, std)


for _processor in (MmMambaImageProcessorPil, MmMambaImageProcessor):
    _processor.register_for_auto_class()

__all__ = ["MmMambaImageProcessor", "MmMambaImageProcessorPil", "choose_grid"]
