"""Pictures and videos that a request names, read under limits.

Engines get them as `data:` addresses, so whatever a request names is fetched here and nowhere else. Of the network,
only public addresses are asked unless the server's owner allows a host by name: a request must not reach services that
only the server's own network can see (server-side request forgery, CWE-918). Of the disk, only the folder that the
owner allows.
"""

import asyncio
import base64
import binascii
import contextlib
import io
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Iterable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from PIL import Image

from .limits import Limits


TIMEOUT = 30  # seconds for everything that a request fetches
LONGEST_CHAIN = 5  # of redirects
MOST_ADDRESSES = 64  # that are fetched or read for one request
# What browsers and cameras write. Pillow knows more, but reads some by programs of others (EPS by Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
Image.init()
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)


class RefusedError(ValueError):
    """What is answered instead of an answer: one sentence and an HTTP status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


# IPv6 networks whose addresses end in an IPv4 address: IPv4-compatible, -mapped and -translated, and NAT64 (RFC 6052).
EMBEDDED_IPV4 = tuple(map(ipaddress.ip_network, ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")))
LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")  # RFC 8215


class Media:
    """Reads what one request names, and counts it.

    Args:
        limits: Of the request.
        body_bytes: Size of the request's body.
        num_frames, fps: How many frames of a video the engine takes, see `Limits`; its own if neither is given.
    """

    def __init__(self, limits: Limits, body_bytes: int, num_frames: int | None = None, fps: float | None = None):
        self.limits, self.bytes, self.pixels = limits, body_bytes, 0
        if num_frames is None and fps is None:
            num_frames, fps = limits.num_frames, limits.fps
        self.num_frames, self.fps = num_frames, fps
        self._deadline = None  # begins with the first fetch

    async def read(self, url: str, kind: str) -> str:
        """The address `data:…;base64,…` of a picture or video.

        Args:
            url: Its address: `data:`, `http:`, `https:` or `file:`.
            kind: "image" or "video".

        Raises:
            RefusedError: if it cannot be read, is none, or is larger than allowed.
        """
        scheme = url.split(":", 1)[0].lower() if ":" in url[:16] else ""
        if scheme == "data":
            content = _decode(url)
        elif scheme in ("http", "https"):
            content = await self._fetch(url, kind)
            self._count(len(content))
        elif scheme == "file":
            content = self._read_file(url, kind)
            self._count(len(content))
        else:
            raise RefusedError(
                f"{shown(url)} is no address of {_article(kind)}; give one that begins with https://, http:// or "
                "data:, or file:// if the server allows files."
            )
        name = shown(url)
        if kind == "image":
            if len(content) > self.limits.max_image_bytes:
                raise self._too_large(name, len(content))
            self._check_picture(content, name)
        else:
            await asyncio.to_thread(self._check_video, content, name)
        if scheme == "data":
            return url
        return f"data:{kind}/{_subtype(url, kind)};base64,{base64.b64encode(content).decode()}"

    def _count(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self.limits.max_request_bytes:
            raise RefusedError(
                f"The request brings more than {self.limits.max_request_bytes} bytes, its pictures and videos "
                "included; send less at once, or start the server with a larger --max-request-bytes.",
                413,
            )

    def _bytes_left(self, kind: str) -> int:
        """Bytes that a file may still have."""
        left = self.limits.max_request_bytes - self.bytes
        return min(left, self.limits.max_image_bytes) if kind == "image" else left

    def _too_large(self, name: str, size: int | None = None) -> RefusedError:
        size = "more" if size is None else f"{size}"
        return RefusedError(
            f"{name} is too large: {size} bytes, while {self.limits.max_image_bytes} are allowed for a picture; send "
            "it smaller, or start the server with a larger --max-image-bytes."
        )

    def _over_limit(self, name: str, kind: str) -> RefusedError:
        if kind == "image" and self._bytes_left(kind) == self.limits.max_image_bytes:
            return self._too_large(name)
        return RefusedError(
            f"{name} brings the request over {self.limits.max_request_bytes} bytes; send less at once, or start the "
            "server with a larger --max-request-bytes.",
            413,
        )

    def _check_picture(self, content: bytes, name: str) -> None:
        """Reads the header only."""
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                width, height = picture.size
        except Image.DecompressionBombError:
            raise RefusedError(
                f"{name} has more pixels than Pillow opens; at most {self.limits.max_image_pixels} are allowed, so "
                "send it smaller."
            ) from None
        except Exception:  # on damaged files decoders raise nearly anything
            raise RefusedError(
                f"{name} cannot be opened as a picture; give a whole, undamaged file in one of these formats: "
                f"{', '.join(FORMATS)}."
            ) from None
        self._count_pixels(width, height, 1, name)

    def _count_pixels(self, width: int, height: int, frames: int, name: str) -> None:
        if width * height > self.limits.max_image_pixels:
            raise RefusedError(
                f"{name} has {width} x {height} pixels, at most {self.limits.max_image_pixels} in all are allowed; "
                "send it smaller, or start the server with a larger --max-image-pixels."
            )
        self.pixels += width * height * frames
        if self.pixels > self.limits.max_request_pixels:
            what = f"the {frames} frames of {name}" if frames > 1 else name
            raise RefusedError(
                f"With {what} the request's pictures and videos have {self.pixels} pixels, at most "
                f"{self.limits.max_request_pixels} pixels together are allowed; send fewer or smaller ones, or start "
                "the server with a larger --max-request-pixels."
            )

    def _check_video(self, content: bytes, name: str) -> None:
        """Reads the header and counts the packets, without decoding a frame."""
        import av

        try:
            # Other protocols than the open file are not allowed: a playlist may name files and addresses.
            with av.open(io.BytesIO(content), options={"protocol_whitelist": "pipe"}) as video:
                stream = video.streams.video[0]
                width, height, rate = stream.width, stream.height, stream.average_rate or stream.guessed_rate
                # What the header says of their number need not be true.
                total = sum(packet.size > 0 for packet in video.demux(stream))
        except Exception:  # decoders raise nearly anything
            raise RefusedError(f"{name} cannot be read as a video; give a whole video file, such as an mp4.") from None
        frames = total
        if self.fps is not None:
            frames = max(1, round(total / rate * self.fps)) if rate else total
        elif self.num_frames >= 0:
            frames = self.num_frames
        self._count_pixels(width, height, min(frames, total), name)

    def _read_file(self, url: str, kind: str) -> bytes:
        folder = self.limits.allowed_local_media_path
        if folder is None:
            raise RefusedError(
                f"{shown(url)} names a file, which this server does not read; send the content as data:, or start the "
                "server with --allowed-local-media-path."
            )
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise RefusedError(f"{shown(url)} is no address of a file ({error}); write file:///folder/name.") from None
        try:
            path = Path(unquote(parts.path)).resolve()
            # Whether a file outside exists is nobody's business.
            inside = parts.netloc in ("", "localhost") and path.is_relative_to(Path(folder).resolve())
            details = path.stat() if inside else None
        except (OSError, ValueError, RuntimeError):  # ValueError: a null byte, RuntimeError: a loop of links
            inside, details = True, None
        if not inside:
            raise RefusedError(f"{shown(url)} is not in the folder that this server reads files from.")
        if details is None or not stat.S_ISREG(details.st_mode):
            raise RefusedError(f"{shown(url)} is no file that exists; give one in the server's media folder.")
        try:
            with open(path, "rb") as file:
                content = file.read(self._bytes_left(kind) + 1)
        except OSError as error:
            raise RefusedError(f"{shown(url)} cannot be read ({error.strerror}).") from None
        if len(content) > self._bytes_left(kind):
            raise self._over_limit(shown(url), kind)
        return content

    async def _fetch(self, url: str, kind: str) -> bytes:
        """The content of an http(s) address."""
        now = asyncio.get_running_loop().time()
        self._deadline = now + TIMEOUT if self._deadline is None else self._deadline
        try:
            return await asyncio.wait_for(self._follow(url, kind), self._deadline - now)
        except RefusedError:
            raise
        except (TimeoutError, asyncio.TimeoutError):
            reason = f"no whole answer within the {TIMEOUT} seconds that a request's addresses may take together"
        except (OSError, HTTPException, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(f"{shown(url)} cannot be fetched ({reason}); give an address that answers.")

    async def _follow(self, url: str, kind: str) -> bytes:
        target = url
        for _ in range(LONGEST_CHAIN + 1):
            content, target = await self._get(target, kind)
            if target is None:
                return content
        raise ValueError(f"it redirects more than {LONGEST_CHAIN} times")

    async def _get(self, url: str, kind: str) -> tuple[bytes, str | None]:
        """One request: the content, or the address that it redirects to."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RefusedError(f"{shown(url)} is no address that can be fetched; give one of http or https.")
        connection = _Connection(parts, await self._address(parts))
        thread = asyncio.get_running_loop().run_in_executor(
            None, connection.get, self._bytes_left(kind), self._over_limit(shown(url), kind)
        )
        try:
            # The thread is not cancelled with this request; without its connection it ends by itself.
            status, location, content = await asyncio.shield(thread)
        finally:
            connection.abort()
            thread.add_done_callback(lambda future: future.cancelled() or future.exception())
        if location is not None:
            return b"", urljoin(url, location)
        if status != 200:
            raise RefusedError(f"{shown(url)} cannot be fetched (status {status}); give an address that answers.")
        return content, None

    async def _address(self, parts: SplitResult) -> str:
        """The IP address to ask, checked."""
        domains = self.limits.allowed_media_domains
        if domains is not None and parts.hostname not in map(str.lower, domains):
            raise RefusedError(
                f"Pictures and videos from {parts.hostname} are not fetched here; the server allows "
                f"{', '.join(domains) or 'no host'} (--allowed-media-domains)."
            )
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
        addresses = [entry[4][0] for entry in found]
        if domains is None and not all(map(_is_public, addresses)):
            raise RefusedError(
                f"{parts.hostname} is not on the public internet, so it is not asked for pictures or videos; start "
                f"the server with --allowed-media-domains {parts.hostname} to allow it."
            )
        return addresses[0]


class _Connection(HTTPConnection):
    """Asks the address that was checked, not another one of the same name.

    Proxies of the environment are not used: they would connect to what they please.
    """

    def __init__(self, parts: SplitResult, address: str):
        self.default_port = 443 if parts.scheme == "https" else 80
        super().__init__(parts.hostname, _port(parts), timeout=TIMEOUT)
        self._parts, self._address, self._aborted = parts, address, False

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._parts.scheme == "https":
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        if self._aborted:
            raise OSError("given up")

    def get(self, most: int, over_limit: RefusedError) -> tuple[int, str | None, bytes]:
        """Status, address of a redirection, and content. Raises `over_limit` if that is longer than `most` bytes."""
        path = quote(self._parts.path or "/", safe="/%:=&~+!$,;'@()*")
        query = "?" + quote(self._parts.query, safe="/%:=&~+!$,;'@()*?") if self._parts.query else ""
        self.request("GET", path + query, headers={"User-Agent": "mmmamba"})
        with self.getresponse() as answer:
            if answer.status in (301, 302, 303, 307, 308) and (location := answer.getheader("Location")):
                return answer.status, location, b""
            content = answer.read(most + 1)
            if len(content) > most:
                raise over_limit
            if answer.length:  # what was announced and did not come
                raise OSError("its end is missing")
            return answer.status, None, content

    def abort(self) -> None:
        """Ends `get` in its thread, if it still waits."""
        self._aborted = True
        if (sock := self.sock) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6:
        if ip.is_site_local or ip in LOCAL_NAT64:
            return False
        if any(ip in network for network in EMBEDDED_IPV4):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast


def _decode(url: str) -> bytes:
    kind, comma, text = url.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise RefusedError(f"{shown(url)} is not in base64; write data:image/png;base64,… with the file's bytes.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        message = f"{shown(url)} is not valid base64; write data:image/png;base64,… with the file's bytes."
        raise RefusedError(message) from None


def _subtype(url: str, kind: str) -> str:
    suffix = os.path.splitext(urlsplit(url).path)[1][1:].lower()
    return suffix if suffix.isalnum() and suffix.isascii() else {"image": "png", "video": "mp4"}[kind]


def _article(kind: str) -> str:
    return {"image": "a picture", "video": "a video"}[kind]


def shown(url: str, most: int = 80) -> str:
    """An address, short enough for a sentence."""
    url = "".join(c if c.isprintable() else "?" for c in url[: most + 1])
    if url[:5].lower() == "data:":
        return url.split(",")[0][:40] + ",…"
    return url if len(url) <= most else url[:most] + "…"


def media_parts(parts: object) -> Iterable[tuple[dict, str, str]]:
    """Where a request's messages name pictures and videos: (dictionary, key, "image" or "video")."""
    if isinstance(parts, list):
        for part in parts:
            yield from media_parts(part)
    elif isinstance(parts, dict):
        for key, value in parts.items():
            kind = {"image_url": "image", "video_url": "video"}.get(key)
            if kind and isinstance(value, str):
                yield parts, key, kind
            elif kind and isinstance(value, dict) and isinstance(value.get("url"), str):
                yield value, "url", kind
            else:
                yield from media_parts(value)
