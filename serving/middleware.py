"""What stands before either engine: the key, the limits, and the reading of pictures and videos.

A pure ASGI middleware, for vLLM by `--middleware mmmamba.serving.middleware.Gate`, which hands over no arguments: its
settings are in the environment. It answers errors as OpenAI's API does.
"""

import hashlib
import hmac
import json
import os
from dataclasses import asdict

from .limits import Limits
from .media import Media, RefusedError, all_of


KEY_VARIABLE = "MMMAMBA_API_KEY"
LIMITS_VARIABLE = "MMMAMBA_SERVE_LIMITS"
OPEN_PATHS = ("/health", "/ping")  # for load balancers; they say nothing of the model


def to_environment(limits: Limits) -> str:
    """The value of LIMITS_VARIABLE."""
    return json.dumps(asdict(limits))


def from_environment() -> Limits:
    """The limits that stand in the environment, the default ones if none do."""
    values = json.loads(os.environ.get(LIMITS_VARIABLE, "{}"))
    if values.get("allowed_media_domains") is not None:
        values["allowed_media_domains"] = tuple(values["allowed_media_domains"])
    return Limits(**values)


class Gate:
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
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = _replay(await self._read(scope, receive), receive)
        except RefusedError as error:
            return await send_error(send, error.status, str(error))
        except _ClientLeftError:
            return
        await self.app(scope, receive, send)

    def _check_key(self, scope) -> None:
        if self._digest is None or scope["method"] == "OPTIONS" or scope["path"] in OPEN_PATHS:
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
        except (ValueError, RecursionError):  # the engine says what is wrong with it
            return bytes(body)
        if not isinstance(content, dict):
            return bytes(body)
        media = Media(self.limits, len(body))
        found = [entry for name in ("messages", "input") for entry in all_of(content.get(name))]
        for parent, key, kind in found:
            parent[key] = await media.read(parent[key], kind)
        # Always written anew, so that nothing else is read by the engine than what was read here.
        return json.dumps(content).encode()


class _ClientLeftError(Exception):
    """The client went away before its request was whole."""


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
