"""Videos in vLLM: the frames that the package's own video processor takes, read by its own reader."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers.video_utils import VideoMetadata
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor
from mmmamba.video_reading_mmmamba import sample_video


@VIDEO_LOADER_REGISTRY.register("mmmamba", video_processor=MmMambaVideoProcessor.__name__)
class MmMambaVideoLoader(VideoLoader):
    """What vLLM calls with the bytes of a video that a request names or holds."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, fps: float = -1, **kwargs) -> tuple[np.ndarray, dict]:
        """Frames of a video, (frames, height, width, 3), and its metadata.

        Args:
            data: The file.
            num_frames: Frames to take, or all if it has fewer; -1: all. vLLM's own default is 32.
            fps: Frames to take in a second of video instead; -1: `num_frames` decides.

        Raises:
            ValueError: if the video cannot be read.
        """

        def choose(metadata: VideoMetadata) -> np.ndarray:
            total = metadata.total_num_frames
            if fps > 0:
                return MmMambaVideoProcessor(fps=fps).sample_frames(metadata)
            return MmMambaVideoProcessor(num_frames=total if num_frames < 0 else num_frames).sample_frames(metadata)

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "video")
            file.write_bytes(data)
            try:
                frames, metadata = sample_video(file, choose)
            except ValueError as error:
                raise ValueError(str(error).replace(str(file), "The video of a request")) from None
        return frames, asdict(metadata) | {"video_backend": "mmmamba", "do_sample_frames": False}
