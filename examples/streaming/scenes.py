"""Endless streams of the picture world: frames of one tile, whose scene changes now and then.

frames = scenes("test", seed=0, index=7, hold=10)
next(frames).draw().resize((480, 480)).show()
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from mmmamba.examples.shapes.world import Picture, scene


FRAME = "<image>"  # what a frame is in the conversation


def scenes(split: str, seed: int, index: int, hold: float) -> Iterator[Picture]:
    """Stream number `index` of a series, frame by frame, without end.

    Args:
        split: "train" or "test"; no scene occurs in both.
        seed: Of the series.
        index: Which of its streams.
        hold: Frames that a scene stays on average: each frame is another scene with a chance of 1 / hold.
    """
    rng = np.random.default_rng((("train", "test").index(split), seed, index))
    picture = _one_tile(rng, split)
    while True:
        yield picture
        if rng.random() < 1 / hold:
            picture = _one_tile(rng, split)


def _one_tile(rng: np.random.Generator, split: str) -> Picture:
    while True:
        if (picture := scene(rng, split)).grid == (1, 1):
            return picture


def pictures(count: int, hold: float, seed: int = 0) -> Iterator[Image.Image]:
    """`count` frames of a held-out stream, 48 x 48 pixels; for `examples.shapes.clip.write_clip`."""
    frames = scenes("test", seed, 0, hold)
    return (next(frames).draw() for _ in range(count))
