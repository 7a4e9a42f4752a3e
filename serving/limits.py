"""What one request may bring; in a file of its own, so that `--help` imports nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may bring.

    Args:
        max_request_bytes: Of the request's body, and of all that its addresses bring, together.
        max_image_bytes: Of one picture's file.
        max_image_pixels: Width x height of one picture, or of a video's frames.
        max_request_pixels: Of all pictures and of all frames taken of its videos together.
        allowed_media_domains: Host names that pictures may come from, the server's own network included. None for
            every host with a public address.
        allowed_local_media_path: Folder whose files a request may name as `file://…`. None for no files.
        num_frames: Frames taken of a video unless the request says else, or all if it has fewer; -1 for all.
        fps: Frames taken in a second of video instead of `num_frames`.
        text_only: Whether the model reads text only, so that no request may bring pictures or videos.
    """

    max_request_bytes: int = 64 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 64_000_000
    max_request_pixels: int = 256_000_000
    allowed_media_domains: tuple[str, ...] | None = None
    allowed_local_media_path: str | None = None
    num_frames: int = 8
    fps: float | None = None
    text_only: bool = False
