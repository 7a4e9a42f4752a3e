"""Shows a video to a model in `mmmamba chat`.

The model reads each frame when it is decoded, so a video of any length takes the memory of one frame, and what the
conversation keeps: nothing more by frame in Mamba-2 layers.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor
from mmmamba.video_reading_mmmamba import VideoReader


def check_video(path: Path | str) -> None:
    """Raises ValueError if there is no video at `path`."""
    try:
        VideoReader(path).close()
    except ValueError as error:
        raise ValueError(f"--video {error}") from None


def read_video(
    state: ConversationState,
    processor: MmMambaVideoProcessor,
    path: Path | str,
    num_frames: int | None = None,
    fps: float | None = None,
) -> None:
    """Adds a video to the user's turn: a line `Frame1: <image>` for each frame. Prints one line about it.

    Ctrl-C stops the reading; what was read stays.

    Args:
        state: The conversation; it reads now.
        processor: Cuts frames into tiles, and says how many to take if neither `num_frames` nor `fps` is given.
        path: The video, or its address.
        num_frames: How many frames to take, evenly spaced.
        fps: How many to take in each second; the whole video is read.

    Raises:
        ValueError: if the video cannot be read; what was read until then stays.
    """
    count, stopped = 0, ""
    with VideoReader(path) as video:
        frames, total = _frames(video, processor, num_frames, fps)
        frames = tqdm(frames, f"reading {os.path.basename(path)}", total, unit=" frames", disable=None, leave=False)
        try:
            for number, pixels in enumerate(frames, 1):
                inputs = processor([pixels], return_tensors="pt")
                tiles, counts = inputs["pixel_values"], inputs["num_patches"].tolist()
                state.extend(f"Frame{number}: <image>\n", tiles, counts)
                count = number
        except KeyboardInterrupt:
            stopped = " (interrupted)"
        finally:
            frames.close()
        about = video.metadata
    size = f"{about.width} x {about.height} pixels" + (f", {about.duration:.1f} s" if about.duration else "")
    of = f" of {about.total_num_frames}" if about.total_num_frames else ""
    print(f"{path} ({size}): read {count}{of} frames{stopped}")


def _frames(
    video: VideoReader, processor: MmMambaVideoProcessor, num_frames: int | None, fps: float | None
) -> tuple[Iterator[np.ndarray], int | None]:
    """The frames to show, and how many they are if that is known."""
    if fps is None:
        pixels = video.sample(partial(processor.sample_frames, num_frames=num_frames))
        return iter(pixels), len(pixels)
    about = video.metadata
    rate = min(fps, about.fps or fps)
    total = round(about.duration * rate) if about.duration else None
    return (frame.pixels for frame in video.frames(fps)), total
