"""A short video of the picture world: a red star moves past a blue square that stays where it is.

    python -m mmmamba.examples.shapes.clip clip.mp4
    mmmamba chat --video clip.mp4 "Where is the red star?"

The name decides on the format: .mp4, .mkv or .avi (MPEG-4), .webm (VP9) or .gif.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .world import CELL, TILE, Picture, Thing


FPS = 10
SECONDS = 4
ENCODERS = {".mp4": "mpeg4", ".mkv": "mpeg4", ".avi": "mpeg4", ".webm": "libvpx-vp9", ".gif": "gif"}


def pictures(count: int = FPS * SECONDS) -> Iterator[Image.Image]:
    """The frames: the star goes from left to right below the square, 48 x 48 pixels."""
    size = CELL - 4
    for number in range(count):
        at = round((TILE - CELL) * number / max(count - 1, 1))
        things = (
            Thing("blue", "square", None, (0, 0), size, (0, 0)),
            Thing("red", "star", None, (0, 1), size, (at, 0)),
        )
        yield Picture((1, 1), (250, 250, 250), things).draw()


def write_clip(path: str | Path, frames: Iterator[Image.Image] | None = None, zoom: int = 4) -> None:
    """Writes a video with PyAV.

    Args:
        path: The file; see the module for the formats.
        frames: Its pictures, all of one size; those of `pictures` if not given.
        zoom: How much larger than the pictures the video is.

    Raises:
        ValueError: if the format is not known, or PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise ValueError("Writing a video needs PyAV; install it with `pip install av`.") from None
    path = Path(path)
    if path.suffix not in ENCODERS:
        raise ValueError(f"{path} is of an unknown format; end the name with one of {', '.join(ENCODERS)}.")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODERS[path.suffix], rate=FPS)
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        for number, picture in enumerate(pictures() if frames is None else frames):
            size = (picture.width * zoom, picture.height * zoom)
            if number == 0:
                stream.width, stream.height = size
            pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.NEAREST))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the name of the file to write, such as clip.mp4")
    try:
        write_clip(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
