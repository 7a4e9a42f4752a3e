"""Videos from files and addresses, frame by frame.

PyAV decodes one frame after another, so a video of any length takes the memory of one frame. Transformers' own reader
on PyAV needs the number of frames, which WebM and Matroska files do not name, and leaves videos of phones on their
side. Without PyAV, frames are sampled by Transformers' readers on torchcodec or decord.
"""

import math
import os
import shutil
import stat
import tempfile
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from importlib import import_module
from numbers import Integral
from typing import NamedTuple

import numpy as np
from transformers.video_utils import VideoMetadata, load_video


TIMEOUT = 30  # seconds that a server may stay silent
REMEDY = "give a whole video file, such as an mp4"


class VideoFrame(NamedTuple):
    """A frame: its number in the video, its time in seconds from the first one, and RGB (height, width, 3), uint8."""

    index: int
    time: float
    pixels: np.ndarray


class VideoReader:
    """Decodes a video with PyAV, one frame at a time, each upright and in RGB.

        with VideoReader("film.mp4") as video:
            for frame in video.frames(fps=1):
                show(frame.time, frame.pixels)

    Args:
        source: A file, or an http(s) address, which is fetched into a temporary file.

    Attributes:
        metadata: Transformers' `VideoMetadata`. Its `total_num_frames` is what the file's header says, 0 if that names
            none; see `count_frames`.

    Raises:
        ValueError: if PyAV is not installed, or this is no video.
    """

    def __init__(self, source: str | os.PathLike):
        try:
            import av
        except ImportError:
            raise ValueError("Reading a video frame by frame needs PyAV; install it with `pip install av`.") from None
        self.name = shown(source)
        self._file = _open(source)
        try:
            # Other protocols than the open file are not allowed: a playlist may name files and addresses.
            self._container = av.open(self._file, options={"protocol_whitelist": "pipe"})
        except Exception as error:
            self._file.close()
            raise _unreadable(self.name, error) from None
        if not self._container.streams.video:
            self.close()
            raise ValueError(f"{self.name} has no pictures, only sound or text; {REMEDY}.")
        self._stream = stream = self._container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        duration = self._container.duration
        self.metadata = VideoMetadata(
            total_num_frames=stream.frames,
            fps=float(rate) if rate else None,
            duration=duration / av.time_base if duration else None,
            width=stream.width,
            height=stream.height,
            video_backend="pyav",
        )

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def frames(self, fps: float | None = None) -> Iterator[VideoFrame]:
        """The frames in order, decoded when they are asked for.

        Args:
            fps: How many in a second of the video, the first of each interval; all if not given, or if the video has
                fewer.

        Raises:
            ValueError: if `fps` is not positive; at its end if the file is damaged, truncated or has no frames.
        """
        check_sampling(None, fps)
        return self._frames(fps)

    def _frames(self, fps: float | None) -> Iterator[VideoFrame]:
        index, due, start, packets = 0, 0, None, 0
        with _errors_in_a_sentence(self.name):
            self._container.seek(0)
            for packet in self._container.demux(self._stream):
                packets += packet.size > 0
                for frame in packet.decode():
                    if frame.time is None:
                        time = index / (self.metadata.fps or 1)
                    else:
                        start = frame.time if start is None else start
                        time = frame.time - start
                    if fps is None or time * fps >= due - 1e-6:
                        due = math.floor(time * (fps or 0) + 1e-6) + 1
                        yield VideoFrame(index, time, _pixels(frame))
                    index += 1
        self._check_whole(packets, index)

    def sample(self, choose: Callable[[VideoMetadata], np.ndarray]) -> np.ndarray:
        """Chosen frames, (frames, height, width, 3); what is not needed for them is skipped.

        Args:
            choose: Gives the numbers of the frames, growing, from the video's metadata with the true number of frames;
                they are written there as `frames_indices`.

        Raises:
            ValueError: if the file is damaged, truncated or has no frames.
        """
        with _errors_in_a_sentence(self.name):
            self._container.seek(0)
            # Not the packets, which hold the video's data.
            packets = [(x.pts, x.is_keyframe, x.is_discard) for x in self._container.demux(self._stream) if x.size]
        total = sum(not discarded for _, _, discarded in packets)
        times = sorted(pts for pts, _, discarded in packets if pts is not None and not discarded)
        keys = sorted(pts for pts, is_key, _ in packets if pts is not None and is_key)
        self._check_whole(len(packets), total)
        self.metadata.total_num_frames = total
        self.metadata.frames_indices = indices = np.asarray(choose(self.metadata))
        with _errors_in_a_sentence(self.name):
            times = times if len(times) == total else None
            frames = [_pixels(frame) for frame in self._frames_at(indices.tolist(), times, keys)]
        if len(frames) < len(indices):
            raise ValueError(
                f"{self.name} ends after {len(frames)} of the {len(indices)} frames that were chosen; it is damaged "
                "or truncated."
            )
        return np.stack(frames)

    def _frames_at(self, indices: list[int], times: list[int] | None, keys: list[int]) -> Iterator:
        """PyAV's frames of these numbers. With the times of all frames it begins at the last keyframe before each."""
        self._container.seek(0)
        decoded = self._container.decode(self._stream)
        if times is None:
            wanted = set(indices)
            yield from (frame for index, frame in enumerate(decoded) if index in wanted)
            return
        frame = None
        for index in indices:
            before = bisect_right(keys, times[index])
            if before and keys[before - 1] > (times[0] if frame is None else frame.pts):
                self._container.seek(keys[before - 1], stream=self._stream)
                decoded = self._container.decode(self._stream)
            frame = next((frame for frame in decoded if frame.pts >= times[index]), None)
            if frame is None or frame.pts != times[index]:  # some formats cannot be searched exactly
                self._container.seek(0)
                decoded = self._container.decode(self._stream)
                frame = next((frame for frame in decoded if frame.pts >= times[index]), None)
            if frame is None:
                return
            yield frame

    def _check_whole(self, packets: int, frames: int) -> None:
        if frames == 0:
            raise ValueError(f"{self.name} has no frames; {REMEDY}.")
        if packets < self._stream.frames:
            raise ValueError(
                f"{self.name} is truncated: it has {packets} of the {self._stream.frames} frames that it should have; "
                f"{REMEDY}."
            )


def sample_video(
    source: str | os.PathLike, choose: Callable[[VideoMetadata], np.ndarray]
) -> tuple[np.ndarray, VideoMetadata]:
    """Chosen frames of a video, (frames, height, width, 3), and its metadata.

    Args:
        source: A file or an http(s) address.
        choose: See `VideoReader.sample`.

    Raises:
        ValueError: if there is no video, or PyAV, torchcodec and decord are all missing.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        return _sample_with_transformers(source, choose)
    with VideoReader(source) as video:
        return video.sample(choose), video.metadata


def check_sampling(num_frames: int | None, fps: float | None) -> None:
    """Raises ValueError unless at most one is given: `num_frames` a whole number from 1, or `fps` above 0."""
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames={num_frames} and fps={fps} are both given; give one of them.")
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, Integral) or num_frames < 1
    ):
        raise ValueError(f"num_frames={num_frames!r} is no number of frames; give a whole number from 1.")
    if fps is not None and not (isinstance(fps, (int, float)) and 0 < fps < math.inf):
        raise ValueError(f"fps={fps!r} is no number of frames per second; give a number above 0.")


def shown(source: str | os.PathLike) -> str:
    """A file or an address as it is named in errors."""
    name = os.fspath(source)
    name = name if len(name) < 200 else name[:100] + "…"
    return name if name.isprintable() else repr(name)[1:-1]


def _sample_with_transformers(source, choose) -> tuple[np.ndarray, VideoMetadata]:
    backend = None
    for name in ("decord", "torchcodec"):  # torchcodec loads without FFmpeg, but then reads nothing
        with suppress(Exception):
            import_module(name)
            backend = backend or name
    if backend is None:
        raise ValueError(
            "No video decoder is installed; install PyAV with `pip install av` (or torchcodec or decord)."
        )

    def choose_from_some(metadata, **_):
        if not metadata.total_num_frames:
            raise ValueError("it has no frames")
        return choose(metadata)

    with _open(source) as file, _errors_in_a_sentence(shown(source)):
        frames, metadata = load_video(file.name, backend=backend, sample_indices_fn=choose_from_some)
        frames = np.asarray(frames)
    # torchcodec's frames are (frames, 3, height, width).
    return (frames if frames.shape[-1] == 3 else frames.transpose(0, 2, 3, 1)), metadata


def _open(source: str | os.PathLike):
    """An open file with a name. Raises ValueError if there is none."""
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        return _download(name)
    try:
        described = os.stat(name)
    except (FileNotFoundError, ValueError):  # a null byte
        raise ValueError(f"{shown(source)} does not exist; give the path of a video, or an http(s) address.") from None
    except OSError as error:
        raise _unreadable(shown(source), error) from None
    if not stat.S_ISREG(described.st_mode):  # opening a pipe would wait for its writer
        raise ValueError(f"{shown(source)} is no file but a folder, pipe or device; {REMEDY}.")
    if described.st_size == 0:
        raise ValueError(f"{shown(source)} is empty; {REMEDY}.")
    try:
        return open(name, "rb")
    except OSError as error:
        raise _unreadable(shown(source), error) from None


def _download(url: str):
    file = tempfile.NamedTemporaryFile(suffix=os.path.splitext(url.split("?")[0])[1][:8])
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mmmamba"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            shutil.copyfileobj(answer, file)
        file.seek(0)
        return file
    except (OSError, HTTPException, ValueError) as error:
        file.close()
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{shown(url)} cannot be fetched ({reason}); give an address that answers.") from None


def _pixels(frame) -> np.ndarray:
    """(height, width, 3) of a frame of PyAV, turned as its player would turn it."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation % 360 else pixels


@contextmanager
def _errors_in_a_sentence(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise nearly anything
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> ValueError:
    reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return ValueError(f"{name} cannot be read as a video ({reason:.200}); {REMEDY}.")


__all__ = ["VideoFrame", "VideoReader", "sample_video"]
