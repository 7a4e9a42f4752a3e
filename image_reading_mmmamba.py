"""Pictures from files, addresses, base64, arrays and PIL images, all read alike: upright, 8-bit RGB.

What cannot be read is refused with a ValueError that names it, whatever a decoder raises.
"""

import base64
import binascii
import io
import os
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


REMEDY = "give a whole, undamaged image file"
TIMEOUT = 30  # seconds that a server may stay silent
LARGEST_OVERSHOOT = 0.25  # of floats beyond their range, as share of it; filters that sharpen overshoot
SIXTEEN_BITS = 257  # times a level of 8 bits


def read_image(source: str | os.PathLike | bytes) -> Image.Image:
    """A picture from a file, an http(s) address, base64 (with or without `data:image/…,`), or a file's bytes.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), "a picture")
    source = os.fspath(source)
    shown = source if len(source) < 200 else source[:60] + "…"
    if source.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_download(source)), shown)
    try:
        is_file, exists = os.path.isfile(source), os.path.exists(source)
    except ValueError:  # a null byte
        is_file = exists = False
    if is_file:
        return _decode(source, shown)
    if exists:  # opening a pipe would wait for its writer
        raise _unreadable(shown, "it is a folder, pipe or device")
    text = source.split(",", 1)[-1] if source.startswith("data:image/") else source
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        content = b""
    # Four letters of a name that does not exist may be base64, too; no picture is that short.
    if len(content) < 16:
        raise _unreadable(shown, "it is no file that exists, no http(s) address and no base64")
    return _decode(io.BytesIO(content), shown)


def to_rgb(picture: Image.Image) -> Image.Image:
    """A PIL image of any mode as upright 8-bit RGB: its first frame, 16 bits scaled to 8, alpha dropped.

    Transparent pixels keep the colour that is stored for them, as of `picture.convert("RGB")`.

    Raises:
        ValueError: if the file is damaged, or there are no pixels.
    """
    if picture.mode == "RGB" and not picture.info and type(picture) is Image.Image and all(picture.size):
        return picture
    try:
        with _without_warnings():
            return _convert(picture)
    except Exception as error:  # on damaged files decoders raise nearly anything
        raise _unreadable(getattr(picture, "filename", "") or "a picture", error) from None


def to_levels(values: np.ndarray | Tensor) -> Tensor:
    """Pixels of any dtype as levels from 0 to 255, uint8.

    The range shows the scale of all but uint8 and uint16: floats up to 1 are shares of full brightness, and values
    beyond 255 are levels of 16 bits.

    Raises:
        ValueError: if they are no numbers, negative, NaN or infinite.
    """
    return _levels(*_in_float(values))


def array_to_rgb(array: np.ndarray | Tensor, input_data_format: str | None = None, do_rescale: bool = True) -> Tensor:
    """An array as a picture, (3, height, width).

    Args:
        array: (height, width), (channels, height, width) or (height, width, channels), with 1 (grey), 2 (grey and
            alpha), 3 (RGB) or 4 (RGB and alpha) channels. Alpha is dropped. For values see `to_levels`.
        input_data_format: "channels_first" or "channels_last"; seen from the shape if not given.
        do_rescale: Whether levels of 0 to 255 are wanted. If not, floats up to 1 stay as they are.

    Raises:
        ValueError: if it is no picture.
    """
    values, unit = _in_float(array)
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and _channels_last(tuple(values.shape), input_data_format):
        values = values.permute(2, 0, 1)
    if values.ndim != 3 or values.shape[0] not in (1, 2, 3, 4) or not values.numel():
        raise ValueError(
            f"An array of shape {tuple(array.shape)} is no picture; expected (height, width), (channels, height, "
            "width) or (height, width, channels) with 1 to 4 channels and some pixels."
        )
    values = values[:1].expand(3, -1, -1) if values.shape[0] < 3 else values[:3]
    if unit == 1 and not do_rescale:
        return values.clamp(0, 1).contiguous()
    return _levels(values, unit).contiguous()


def _download(url: str) -> bytes:
    try:
        # Some servers refuse the name that Python gives itself.
        request = urllib.request.Request(url, headers={"User-Agent": "mmmamba"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{url[:200]} cannot be fetched ({reason}); give an address that answers.") from None


def _decode(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with _without_warnings(), Image.open(file) as picture:
            return _convert(picture)
    except UnidentifiedImageError:  # whose text holds a memory address
        raise _unreadable(name, "its format is none that Pillow knows") from None
    except Exception as error:  # on damaged files decoders raise nearly anything
        raise _unreadable(name, error) from None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Decoders warn of data that they skip, and of transparency that RGB has not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unreadable(name: str, reason: str | Exception) -> ValueError:
    words = " ".join(map(str, getattr(reason, "args", [reason]))).split()
    words = " ".join(words).rstrip(".") or type(reason).__name__
    return ValueError(f"{name} cannot be opened as a picture ({words}); {REMEDY}.")


def _convert(picture: Image.Image) -> Image.Image:
    picture.load()
    if not all(picture.size):
        raise ValueError(f"it has no pixels but {picture.width} x {picture.height}")
    with suppress(Exception):  # of damaged EXIF data, which then say nothing of an orientation
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        values = np.nan_to_num(np.asarray(picture), nan=0, posinf=0, neginf=0).clip(0)
        picture = Image.fromarray(to_levels(values).numpy())
    rgb = picture.convert("RGB")
    rgb.info = {}  # else whoever converts it again makes pixels transparent, or turns them once more
    return rgb


def _in_float(values: np.ndarray | Tensor) -> tuple[Tensor, float]:
    """Values in fp32, or uint8 as they are, and the value of full brightness: 1, 255 or 65535."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "buif":
            raise ValueError(f"An array of {values.dtype} is no picture; give numbers, such as uint8.")
        values = torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("=")))
    if values.dtype == torch.uint8 or not values.numel():
        return values, 255
    if values.is_complex():
        raise ValueError(f"A tensor of {values.dtype} is no picture; give real numbers.")
    dtype, is_float = values.dtype, values.is_floating_point()
    values = values.float()
    low, high = values.min().item(), values.max().item()
    overshoot = 1 + LARGEST_OVERSHOOT if is_float else 1
    if dtype == torch.bool or (is_float and high <= overshoot):
        unit = 1
    else:
        unit = 65535 if dtype == torch.uint16 or high > 255 * overshoot else 255
    if not (-LARGEST_OVERSHOOT * high <= low <= high < float("inf")):
        raise ValueError(
            f"An array with values from {low:g} to {high:g} is no picture; give levels of 0 to 255, or floats of 0 to "
            "1, before any normalisation."
        )
    return values, unit


def _levels(values: Tensor, unit: float) -> Tensor:
    if values.dtype == torch.uint8:
        return values
    values = values * 255 if unit == 1 else values / SIXTEEN_BITS if unit == 65535 else values
    return values.round().clamp(0, 255).to(torch.uint8)


def _channels_last(shape: tuple[int, ...], data_format: str | None) -> bool:
    if data_format is not None:
        name = getattr(data_format, "value", data_format)
        if name not in ("channels_first", "channels_last"):
            raise ValueError(f"input_data_format={name!r} is unknown; use 'channels_first' or 'channels_last'.")
        return name == "channels_last"
    first, last = shape[0], shape[-1]
    if first in (1, 2, 3, 4) and last in (1, 2, 3, 4):
        return last == 3 and first != 3  # a picture of a few rows; else as Transformers takes it
    return last in (1, 2, 3, 4)


__all__ = ["array_to_rgb", "read_image", "to_rgb"]
