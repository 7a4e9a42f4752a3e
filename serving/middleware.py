"""What stands before either engine: the key, the limits, and the reading of pictures and videos.

A pure ASGI middleware, for vLLM by `--middleware mmmamba.serving.middleware.RequestGuard`, which hands over no
arguments: its settings are in the environment. It answers errors as OpenAI's API does.
"""

import hashlib
import hmac
import json
import os
from dataclasses import asdict

from .limits import Limits
from .media import MOST_ADDRESSES, Media, RefusedError, media_parts


KEY_VARIABLE = "MMMAMBA_API_KEY"
LIMITS_VARIABLE = "MMMAMBA_SERVE_LIMITS"
OPEN_PATHS = ("/health", "/ping")  # for load balancers; they say nothing of the model
# What may be sent, and the field of it that may name pictures and videos. Other addresses of vLLM take pictures, too,
# in forms that are not read here (`/v1/messages`).
POST_PATHS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": None,
    "/v1/responses": "input",
    "/tokenize": "messages",
    "/detokenize": None,
}
FASTEST = 1000  # frames per second


def to_environment(limits: Limits) -> str:
    """The value of LIMITS_VARIABLE."""
    return json.dumps(asdict(limits))


def from_environment() -> Limits:
    """The limits that stand in the environment, the default ones if none do."""
    values = json.loads(os.environ.get(LIMITS_VARIABLE, "{}"))
    if values.get("allowed_media_domains") is not None:
        values["allowed_media_domains"] = tuple(values["allowed_media_domains"])
    return Limits(**values)


class RequestGuard:
    """Asks for the key, counts a request's bytes and pixels, and puts pictures and videos into it as `data:`.

    Args:
        app: The ASGI application behind it.
        limits: Those of the environment if not given.
        key: That of the environment if not given; without one everybody may ask.
    """

    def __init__(self, app, limits: Limits | None = None, key: str | None = None):
        self.app = app
        self.limits = from_environment() if limits is None else limits
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        self._digest = _digest(key.encode()) if key else None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "websocket":  # for speech; none of these models hears
            await receive()
            return await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check_key(scope)
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                if scope["method"] != "POST" or scope["path"] not in POST_PATHS:
                    raise RefusedError(
                        f"{scope['method']} {scope['path'][:80]} is not served here; send POST to one of "
                        f"{', '.join(POST_PATHS)}.",
                        404,
                    )
                receive = _replay(await self._read(scope, receive), receive)
        except RefusedError as error:
            return await send_error(send, error.status, str(error))
        except _ClientLeftError:
            return
        await self.app(scope, receive, send)

    def _check_key(self, scope) -> None:
        is_open = scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS
        if self._digest is None or scope["method"] == "OPTIONS" or is_open:
            return
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._digest):
            raise RefusedError("The API key is missing or wrong; send it as `Authorization: Bearer KEY`.", 401)

    async def _read(self, scope, receive) -> bytes:
        """The body, with pictures and videos in it."""
        most = self.limits.max_request_bytes
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared) > most:
            raise _too_large(declared.decode(), most)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientLeftError
            body += message.get("body", b"")
            if len(body) > most:
                raise _too_large("more than that", most)
            if not message.get("more_body"):
                break
        try:
            content = json.loads(body)
            if not isinstance(content, dict):
                raise ValueError("no object")
            found = list(media_parts(content.get(POST_PATHS[scope["path"]])))
            json.dumps(content)
        except (ValueError, RecursionError):
            raise RefusedError(
                "The request is no JSON object that can be read; send one, not nested too deeply, with "
                "Content-Type: application/json."
            ) from None
        if found and self.limits.text_only:
            raise RefusedError(f"This model reads text only; send the request without its {found[0][2]}.")
        addresses = sum(parent[key][:5].lower() != "data:" for parent, key, _ in found)
        if addresses > MOST_ADDRESSES:
            raise RefusedError(
                f"The request names {addresses} addresses of pictures and videos, at most {MOST_ADDRESSES} are "
                "allowed; send fewer, or the content as data:."
            )
        media = Media(self.limits, len(body), **_sampling(content))
        for parent, key, kind in found:
            parent[key] = await media.read(parent[key], kind)
        # Always written anew, so that nothing else is read by the engine than what was read here.
        return json.dumps(content).encode()


class _ClientLeftError(Exception):
    """The client went away before its request was whole."""


def _sampling(content: dict) -> dict[str, float]:
    """How many frames of a video a request asks for, as arguments of `Media`."""
    asked = content.get("media_io_kwargs")
    if asked in (None, {}):
        return {}
    video = asked.get("video") if isinstance(asked, dict) and len(asked) == 1 else None
    ((name, value),) = video.items() if isinstance(video, dict) and len(video) == 1 else [(None, None)]
    right = {
        "num_frames": isinstance(value, int) and value >= 1,
        "fps": isinstance(value, (int, float)) and 0 < value <= FASTEST,
    }
    if isinstance(value, bool) or not right.get(name):
        raise RefusedError(
            f'media_io_kwargs={str(asked)[:80]} is not allowed; give {{"video": {{"num_frames": N}}}} with a whole '
            f'number from 1, or {{"video": {{"fps": N}}}} with a number above 0, at most {FASTEST}.'
        )
    return {name: value}


def _too_large(size: str, most: int) -> RefusedError:
    return RefusedError(
        f"The request is too large: {size} bytes, at most {most} are allowed; send less at once, or start the server "
        "with a larger --max-request-bytes.",
        413,
    )


def _replay(body: bytes, receive):
    """A `receive` that gives this body, then what the client sends further: that it went away."""
    given = False

    async def replay():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _header(scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def error_body(status: int, message: str) -> dict:
    """An error as OpenAI's API writes it."""
    kind = "authentication_error" if status == 401 else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def send_error(send, status: int, message: str) -> None:
    """Answers an error."""
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
