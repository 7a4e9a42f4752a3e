"""Videos to tiles: evenly spaced frames, each cut into tiles as a picture is.

By default a video is eight frames of one tile each, as upstream's examples (InternVL) show videos. In a prompt a video
is a line for each frame: `Frame1: <image>`, `Frame2: <image>`, …
"""

import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import VideosKwargs
from transformers.utils import is_torch_tensor
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .image_processing_mmmamba import MmMambaImageProcessor
from .video_reading_mmmamba import check_sampling, sample_video


class MmMambaVideoProcessorKwargs(VideosKwargs, total=False):
    """
    min_patches (`int`): Fewest tiles of a frame, thumbnail not counted.
    max_patches (`int`): Most tiles of a frame, thumbnail not counted.
    use_thumbnail (`bool`): Whether a frame of several tiles gets a small copy of the whole as its last tile.
    """

    min_patches: int
    max_patches: int
    use_thumbnail: bool


class MmMambaVideoProcessor(MmMambaImageProcessor, BaseVideoProcessor):
    """Samples frames of videos and cuts each into tiles.

    Calling it with videos returns `pixel_values` (tiles, 3, size, size), the tiles of all frames of all videos in
    order; `num_frames` (videos,); and `num_patches` (frames of all videos,), how many tiles each frame has.

    A video is a file, an http(s) address, an array (frames, height, width, channels) or (frames, channels, height,
    width), or a list of pictures. Of files and addresses `num_frames` frames are taken, or `fps` in each second.
    Frames that are given are all taken, unless the call names `num_frames` or `fps` (which needs `video_metadata`).

    Args:
        num_frames: Frames of a video; 8 if neither this nor `fps` is given, or all if it has fewer.
        fps: Frames in a second of video.
        do_sample_frames: True: frames that are given are sampled, too; False: all frames are taken, of files as well.
    """

    valid_kwargs = MmMambaVideoProcessorKwargs
    max_patches = 1
    use_thumbnail = False
    num_frames = 8
    fps = None
    do_sample_frames = None

    def __init__(self, **kwargs):
        check_sampling(kwargs.get("num_frames"), kwargs.get("fps"))
        if kwargs.get("fps") is not None:
            kwargs["num_frames"] = None
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, video_processor_dict: dict, **kwargs):
        if "video_processor_type" not in video_processor_dict:  # a folder older than video: pictures' settings
            other = ("min_patches", "max_patches", "use_thumbnail", "image_processor_type", "auto_map")
            video_processor_dict = {name: x for name, x in video_processor_dict.items() if name not in other}
        return super().from_dict(video_processor_dict, **kwargs)

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """See Transformers' `BaseVideoProcessor` for the keywords.

        Raises:
            ValueError: if a video cannot be read or has no frames, or for frames that it cannot give.
        """
        options = {name: kwargs.pop(name, None) for name in ("num_frames", "fps", "input_data_format")}
        check_sampling(options["num_frames"], options["fps"])
        sample = kwargs.pop("do_sample_frames", None)
        sample = self.do_sample_frames if sample is None else sample
        videos, metadata = list_videos(videos), kwargs.pop("video_metadata", None)
        metadata = [None] * len(videos) if metadata is None else make_batched_metadata(videos, metadata)
        read = [self._read(*one, sample, **options) for one in zip(videos, metadata, strict=True)]
        return super().preprocess(
            [frames for frames, _ in read],
            video_metadata=[described for _, described in read],
            input_data_format=ChannelDimension.FIRST,
            do_sample_frames=False,
            **kwargs | {"do_convert_rgb": False},  # frames are RGB already
        )

    def _read(
        self, video, metadata: VideoMetadata | None, sample: bool | None, num_frames, fps, input_data_format
    ) -> tuple[torch.Tensor, VideoMetadata]:
        """Frames of a video, (frames, 3, height, width)."""

        def choose(metadata: VideoMetadata) -> np.ndarray:
            if sample is False:
                return np.arange(metadata.total_num_frames)
            return self.sample_frames(metadata, num_frames, fps)

        if isinstance(video, (str, os.PathLike)):
            pixels, metadata = sample_video(video, choose)
            return torch.from_numpy(pixels).permute(0, 3, 1, 2), metadata
        frames = self.fetch_images(list(video))
        if not frames:
            raise ValueError("A video has no frames; give at least one.")
        metadata = replace(metadata) if metadata else VideoMetadata(total_num_frames=len(frames))
        metadata.frames_indices = np.arange(len(frames))
        if sample or (sample is None and (num_frames, fps) != (None, None)):
            if metadata.total_num_frames != len(frames):
                raise ValueError(
                    f"A video of {len(frames)} frames has total_num_frames={metadata.total_num_frames} in its "
                    "video_metadata; give all frames, or do_sample_frames=False."
                )
            metadata.frames_indices = choose(metadata)
            frames = [frames[index] for index in metadata.frames_indices]
        frames = [self.process_image(x, do_convert_rgb=True, input_data_format=input_data_format) for x in frames]
        if sizes := {tuple(frame.shape[1:]) for frame in frames[1:]} - {tuple(frames[0].shape[1:])}:
            (height, width), other = frames[0].shape[1:], min(sizes)
            raise ValueError(
                f"The frames of a video differ in size ({height} x {width} and {other[0]} x {other[1]}); give frames "
                "of one size, or pictures."
            )
        return torch.stack(frames), metadata

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs
    ) -> np.ndarray:
        """Numbers of the frames to take: the middles of `num_frames` equal parts, as InternVL's examples take them.

        Args:
            metadata: With `total_num_frames`, and `fps` if that is asked for.
            num_frames, fps: Those of the processor if neither is given.

        Raises:
            ValueError: if there are not as many frames, or `fps` is asked of a video whose own is not known.
        """
        check_sampling(num_frames, fps)
        total = metadata.total_num_frames
        if num_frames is None and fps is None:
            fps = self.fps
            num_frames = None if fps is not None or self.num_frames is None else min(self.num_frames, total)
        if fps is not None:
            if not metadata.fps:
                raise ValueError(
                    f"fps={fps} needs the video's own rate; give video_metadata with fps, or num_frames instead."
                )
            num_frames = min(max(1, round(total / metadata.fps * fps)), total)
        if num_frames is not None and num_frames > total:
            raise ValueError(f"num_frames={num_frames} is more than the {total} frames of the video; give fewer.")
        if num_frames in (None, total):
            return np.arange(total)
        part = (total - 1) / num_frames
        return (part / 2 + np.round(part * np.arange(num_frames))).astype(int)

    def convert_to_rgb(self, image, **kwargs):
        return MmMambaImageProcessor.convert_to_rgb(self, image, **kwargs)  # BaseVideoProcessor's is for whole videos

    def _preprocess(self, videos, return_tensors=None, **kwargs) -> BatchFeature:
        frames = [frame for video in videos for frame in video]
        output = super()._preprocess(frames, return_tensors=None, **kwargs)
        output["num_frames"] = [len(video) for video in videos]
        return output.convert_to_tensors(return_tensors)


def is_video(value) -> bool:
    """Whether this is one video: a path, an address, an array with four dimensions, or a list of pictures."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(frame, Image.Image) or (_is_array(frame) and frame.ndim < 4) for frame in value)
    return isinstance(value, (str, os.PathLike)) or (_is_array(value) and value.ndim == 4)


def list_videos(videos) -> list:
    """One video or several as a list. Frames may be picture files only in a list of videos.

    Raises:
        ValueError: if there is something else.
    """
    if is_video(videos):
        return [videos]
    listed = (
        list(videos) if isinstance(videos, (list, tuple)) or (_is_array(videos) and videos.ndim == 5) else [videos]
    )
    for video in listed:
        paths = isinstance(video, (list, tuple)) and all(isinstance(frame, (str, os.PathLike)) for frame in video)
        if not paths and not is_video(video):
            given = f"An array of shape {tuple(video.shape)}" if _is_array(video) else f"{video!r:.60}"
            raise ValueError(
                f"{given} is no video; give a path, an http(s) address, an array (frames, height, width, channels), "
                "or a list of pictures."
            )
    return listed


def _is_array(value) -> bool:
    return isinstance(value, np.ndarray) or is_torch_tensor(value)


MmMambaVideoProcessor.register_for_auto_class("AutoVideoProcessor")

__all__ = ["MmMambaVideoProcessor"]
