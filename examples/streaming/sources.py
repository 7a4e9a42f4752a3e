"""Where frames come from: a clip that begins again whenever it ends, or a device or address that FFmpeg opens."""

import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmmamba.video_reading_mmmamba import VideoReader


LONGEST_SEARCH = 1.0  # seconds that late frames are dropped before one of them is given


class Clip:
    """A video, again and again.

    Without `fps` every frame is given when it is asked for. With it the clip plays in real time: a frame is given at
    its time, and those whose time passed while nobody asked are dropped. If decoding is slower than real time, a
    late frame is given after a second, and the clip goes on from there.

    Args:
        path: A video file or its address.
        fps: Frames of each second.
        stopping: Ends the frames.

    Attributes:
        dropped: Frames that came too late.

    Raises:
        ValueError: if there is no video.
    """

    def __init__(self, path: str | os.PathLike, fps: float | None = None, stopping: threading.Event | None = None):
        self.reader, self.fps, self.stopping = VideoReader(path), fps, stopping or threading.Event()
        self.dropped = 0

    def __enter__(self) -> "Clip":
        return self

    def __exit__(self, *error) -> None:
        self.reader.close()

    def frames(self) -> Iterator[np.ndarray]:
        """(height, width, 3), uint8, until `stopping` is set. Raises ValueError if the file is damaged."""
        start = asked = time.perf_counter()  # start of this pass, and when the next frame was asked for
        while True:
            for frame in self.reader.frames(self.fps):
                if self.stopping.is_set():
                    return
                if self.fps is not None:
                    now = time.perf_counter()
                    wait = start + frame.time - now
                    if wait < -1 / self.fps and now - asked < LONGEST_SEARCH:
                        self.dropped += 1
                        continue
                    if now - asked >= LONGEST_SEARCH and wait < 0:  # decoding does not keep up
                        start = now - frame.time
                    self.stopping.wait(max(0, wait))
                yield frame.pixels
                asked = time.perf_counter()
            start += frame.time + 1 / (self.reader.metadata.fps or 1)


class Device:
    """A camera, or what else FFmpeg opens: the newest frame when one is asked for; those between are dropped.

    Args:
        path: Its name, such as /dev/video0 or rtsp://….
        format: FFmpeg's name of its kind, such as v4l2 (Linux), avfoundation (macOS), dshow (Windows), rtsp.
        fps: At most so many frames of each second.
        stopping: Ends the waiting for a frame.

    Attributes:
        dropped: Frames that nobody asked for in time.

    Raises:
        ValueError: if it cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        format: str,
        fps: float | None = None,
        stopping: threading.Event | None = None,
    ):
        import av

        self.name, self.period, self.dropped = f"{path} ({format})", 1 / fps if fps else 0.0, 0
        try:
            self._container = av.open(os.fspath(path) if isinstance(path, Path) else path, format=format)
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, OSError, ValueError, IndexError) as error:
            raise ValueError(f"{self.name} cannot be opened ({error}); give a device of that format.") from None
        self.stopping = stopping or threading.Event()
        self._newest: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._decode, daemon=True)

    def __enter__(self) -> "Device":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._closed.set()
        self._thread.join(timeout=5)  # a camera may hang
        self._container.close()

    def _decode(self) -> None:
        """Keeps the newest frame in the queue, and at last None, or what went wrong."""
        end, due = None, 0.0
        try:
            for frame in self._container.decode(self._stream):
                if self._closed.is_set():
                    break
                if time.perf_counter() >= due:
                    due = max(due + self.period, time.perf_counter() - self.period)
                    self._put(frame.to_ndarray(format="rgb24"))
        except Exception as error:  # decoders raise nearly anything
            end = ValueError(f"{self.name} gives no more frames ({error}); look whether it is still there.")
        while not self._closed.is_set():  # behind the last frame, not in its place
            with suppress(queue.Full):
                self._newest.put(end, timeout=0.2)
                break

    def _put(self, pixels: np.ndarray) -> None:
        with suppress(queue.Empty):
            self._newest.get_nowait()
            self.dropped += 1
        self._newest.put(pixels)

    def frames(self) -> Iterator[np.ndarray]:
        """(height, width, 3), uint8, until the device ends. Raises ValueError if it fails."""
        while not self.stopping.is_set():
            try:
                item = self._newest.get(timeout=0.2)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
