"""Pictures as people hand them over (PIL images, arrays, tensors, lists of these) to the tiles that a model reads."""

import os
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import is_torchvision_available, logging

from .configuration_mmmamba import MmMambaConfig
from .image_processing_mmmamba import MmMambaImageProcessor, MmMambaImageProcessorPil


logger = logging.get_logger(__name__)
SETTINGS_FILES = ("processor_config.json", "preprocessor_config.json")


def as_tiles(
    pixel_values, num_patches_list: list[int] | None, config: MmMambaConfig, tokenizer=None
) -> tuple[Tensor | None, list[int] | None]:
    """Tiles as one tensor, and how many each picture has.

    Args:
        pixel_values: One of
            - None;
            - tiles, normalised: a floating-point tensor or array (tiles, channels, height, width), or a list of
              (channels, height, width);
            - a picture to be cut into tiles: a PIL image, or an array or tensor of integers (height, width),
              (height, width, channels) or (channels, height, width);
            - a list of pictures, or an array of them with four dimensions; in a list, each may also be its tiles.
        num_patches_list: Tiles of each picture, if the caller knows.
        config: Of the model.
        tokenizer: Whose folder is looked into first, see `image_processor`.

    Returns:
        (tiles, channels, height, width), or None if there are no pictures; and `num_patches_list`, if it was given,
        or the tiles of each picture, if pictures were given, or None.

    Raises:
        ValueError: if it is none of these, or pictures have other numbers of tiles than `num_patches_list` says.
    """
    if pixel_values is None or (isinstance(pixel_values, (list, tuple)) and not pixel_values):
        return None, num_patches_list
    if config.vision_config is None:
        raise ValueError(
            "The model reads text only (it has no vision_config), but there are pictures; leave them out."
        )
    if isinstance(pixel_values, Tensor) and pixel_values.is_floating_point() and pixel_values.ndim == 4:
        return pixel_values, num_patches_list
    if isinstance(pixel_values, (np.ndarray, Tensor)) and pixel_values.ndim == 4 and _has_levels(pixel_values):
        pixel_values = list(pixel_values)  # such as a video's frames
    is_list = isinstance(pixel_values, (list, tuple))
    elements = [_as_tensor(element, config) for element in (pixel_values if is_list else [pixel_values])]
    if not is_list and isinstance(elements[0], Tensor):
        (tiles,) = elements
        if tiles.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(tiles.shape)}; give all tiles as one tensor of shape (tiles, "
                "channels, height, width), or as a list."
            )
        return tiles, num_patches_list
    single_tiles = [isinstance(element, Tensor) and element.ndim == 3 for element in elements]
    if all(single_tiles):
        return torch.stack(_of_one_size(elements)), num_patches_list
    if any(single_tiles):
        raise ValueError(
            "pixel_values mixes pictures and single tiles; give a picture's tiles as one tensor of shape (tiles, "
            "channels, height, width)."
        )
    pictures = [element for element in elements if not isinstance(element, Tensor)]
    if pictures:
        cut = image_processor(config, tokenizer)(images=pictures, return_tensors="pt")
        cut = iter(cut["pixel_values"].split(cut["num_patches"].tolist()))
        elements = [element if isinstance(element, Tensor) else next(cut) for element in elements]
    counts = [len(element) for element in elements]
    if pictures and num_patches_list is not None and list(num_patches_list) != counts:
        raise ValueError(
            f"num_patches_list={list(num_patches_list)}, but the pictures are cut into {counts} tiles; leave "
            "num_patches_list out, since the pictures are counted here."
        )
    return torch.cat(_of_one_size(elements)), counts if num_patches_list is None else num_patches_list


def _as_tensor(element, config: MmMambaConfig) -> Tensor | Image.Image | np.ndarray:
    """Tiles (channels, height, width) or (tiles, channels, height, width) as a tensor; a picture as it is."""
    channels = config.vision_config.num_channels
    if isinstance(element, Image.Image):
        return element
    if isinstance(element, np.ndarray) and element.dtype.kind == "f":
        if element.ndim == 3 and element.shape[-1] in (3, 4) and element.shape[0] != channels:
            if element.min(initial=0) >= 0 and element.max(initial=0) <= 1:
                return element  # a picture of levels from 0 to 1; normalised tiles have their channels first
        element = torch.tensor(element)
    if isinstance(element, Tensor) and element.is_floating_point():
        if element.ndim in (3, 4) and element.shape[-3] == channels:
            return element
        expected = f"tiles of shape (tiles, {channels}, height, width) or ({channels}, height, width)"
    elif isinstance(element, (Tensor, np.ndarray)):
        if _has_levels(element) and element.ndim in (2, 3) and 0 not in element.shape:
            return np.array(element.cpu() if isinstance(element, Tensor) else element)  # others' may be read-only
        expected = "a picture of shape (height, width, channels), several as a list"
    else:
        shown = f" ({element[:60]!r})" if isinstance(element, str) else ""
        raise ValueError(
            f"pixel_values holds a {type(element).__name__}{shown}; give normalised tiles, PIL images or arrays: open "
            "files with PIL.Image.open, and take inputs['pixel_values'] of what an image processor returns."
        )
    raise ValueError(
        f"pixel_values holds {element.dtype} values of shape {tuple(element.shape)}; floating-point values are "
        f"normalised tiles, integers a picture's levels, so give {expected}."
    )


def _has_levels(values: np.ndarray | Tensor) -> bool:
    """Whether an array holds integers: a picture's levels."""
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "ui"
    return values.dtype != torch.bool and not values.is_floating_point() and not values.is_complex()


def _of_one_size(tiles: list[Tensor]) -> list[Tensor]:
    """The same, of one dtype and on one device. Raises ValueError if heights or widths differ."""
    sizes = {tuple(tile.shape[-3:]) for tile in tiles}
    if len(sizes) > 1:
        raise ValueError(f"pixel_values holds tiles of shapes {sorted(sizes)}; all tiles must be of one size.")
    return [tile.to(tiles[0]) for tile in tiles]


def image_processor(config: MmMambaConfig, tokenizer=None) -> MmMambaImageProcessor | MmMambaImageProcessorPil:
    """The image processor of the folder (or repository) that the tokenizer, else the model, was loaded from.

    Without one there, pictures are cut by the class's defaults into tiles of `vision_config.image_size` pixels.
    """
    for folder in (getattr(tokenizer, "name_or_path", None), config.name_or_path):
        if folder and os.path.isdir(folder):
            if any(os.path.isfile(os.path.join(folder, name)) for name in SETTINGS_FILES):
                return _processor_class().from_pretrained(folder)
        elif folder and (processor := _of_repository(folder)) is not None:
            return processor
    side = config.vision_config.image_size
    processor = _processor_class()(size={"height": side, "width": side})
    logger.warning_once(
        f"There is no preprocessor_config.json where tokenizer or model come from: pictures are cut into up to "
        f"{processor.max_patches} tiles of {side} pixels."
    )
    return processor


def _processor_class() -> type:
    """As `AutoImageProcessor` chooses."""
    return MmMambaImageProcessor if is_torchvision_available() else MmMambaImageProcessorPil


@lru_cache(maxsize=8)
def _of_repository(name: str) -> MmMambaImageProcessor | MmMambaImageProcessorPil | None:
    """The image processor of a repository on the Hub; None if it has none or is out of reach."""
    try:
        return _processor_class().from_pretrained(name)
    except OSError:
        return None


__all__ = ["as_tiles", "image_processor"]
