"""Transformers' own server with one model of ours: its handlers, thread and encoding, our answers (see answers.py).

Only what serves the model has an address here: Transformers' own application also loads any model of the Hub, with its
code, for whoever asks (`/load_model`), and unloads this one (`/reset`).
"""

import asyncio
import base64
import contextlib
import itertools
import json
import logging
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import jinja2
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import AutoProcessor
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import GenerationState, Modality

from mmmamba.tokenization_mmmamba import load_tokenizer

from . import answers
from .media import RefusedError, media_parts
from .middleware import RequestGuard, error_body


logger = logging.getLogger(__name__)
CONTENT_TYPES = ("text", "image_url", "video_url")


class LoadedModel:
    """What the handlers ask Transformers' `ModelManager` for: here one model, under its names.

    Args:
        model: The model.
        processor: Its processor.
        names: What requests may call it; the first is the one in answers.
    """

    def __init__(self, model, processor, names: list[str]):
        self.model, self.processor, self.names = model, processor, names
        self.loaded_at = int(time.time())

    def get_model_modality(self, model, processor=None) -> Modality:
        return Modality.LLM if model.config.vision_config is None else Modality.VLM

    def listed(self) -> dict:
        """The answer of `/v1/models`."""
        entries = [
            {"id": name, "object": "model", "created": self.loaded_at, "owned_by": "mmmamba"} for name in self.names
        ]
        return {"object": "list", "data": entries}


def tokenizer_of(processor):
    """A processor's tokenizer; a model that reads text only has a tokenizer for a processor."""
    return getattr(processor, "tokenizer", processor)


class _Answers:
    """Before a handler of Transformers: refuses what it would ignore, and generates as answers.py does."""

    fields: tuple[str, ...]

    def _validate_request(self, body: dict) -> None:
        """Done before; Transformers would only log most fields that it ignores."""

    def _resolve_model(self, body: dict):
        loaded = self.model_manager
        asked = body.get("model")
        if asked is not None and asked not in loaded.names:
            raise RefusedError(f"The model {asked!r} is not here; ask for {loaded.names[0]!r}.", 404)
        return loaded.names[0], loaded.model, loaded.processor

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        settings = answers.options(body)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        # The seed is set on the thread that generates, just before it does.
        understood = {**body, "seed": None, "max_tokens": limit, "stop": None}
        config = super()._build_generation_config(understood, model_generation_config, use_cb=use_cb)
        config = answers.generation_config(body, config)
        config.answer_options = settings  # taken off again before `generate`
        return config

    async def handle_request(self, body: dict, request_id: str) -> Response:
        body = answers.supported(body, self.fields)
        self.check(body)
        _, model, processor = self._resolve_model(body)
        # Before the answer begins, so that a wrong one is answered with 400 in a stream, too.
        body["response_format"] = await asyncio.to_thread(
            answers.Grammar.of,
            body.get("response_format"),
            tokenizer_of(processor),
            model.config.get_text_config().vocab_size,
        )
        with tempfile.TemporaryDirectory(prefix="mmmamba-") as folder:  # for videos, until they are encoded
            body = _videos_as_files(body, Path(folder))
            return await super().handle_request(body, request_id)

    def _pieces(self, model, processor, inputs, config, gen_manager) -> AsyncIterator[answers.Piece]:
        settings = config.__dict__.pop("answer_options")
        submit = gen_manager.async_submit
        return settings, answers.pieces(model, tokenizer_of(processor), inputs, config, settings, submit)

    async def _non_streaming(
        self, request_id, model, processor, model_id, inputs, gen_config, gen_manager, *args, **kwargs
    ) -> Response:
        settings, generated = self._pieces(model, processor, inputs, gen_config, gen_manager)
        choices: list[list[answers.Piece]] = [[] for _ in range(settings.n)]
        async with contextlib.aclosing(generated):
            async for piece in generated:
                choices[piece.index].append(piece)
        body = self._head(request_id, model_id, self.kind)
        body["choices"] = [self._choice(index, found, processor, settings) for index, found in enumerate(choices)]
        body["usage"] = _usage(inputs, itertools.chain(*choices))
        return JSONResponse(body)

    def _streaming(
        self, request_id, model, processor, model_id, inputs, gen_config, gen_manager, *args, **kwargs
    ) -> StreamingResponse:
        settings, generated = self._pieces(model, processor, inputs, gen_config, gen_manager)
        return StreamingResponse(
            self._events(request_id, processor, model_id, inputs, settings, generated), media_type="text/event-stream"
        )

    async def _events(self, request_id, processor, model_id, inputs, settings, generated) -> AsyncIterator[str]:
        def event(choices, **more) -> str:
            head = self._head(request_id, model_id, self.kind_of_chunk)
            return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

        told = []
        try:
            for choice in self._first_chunks(settings.n):
                yield event([choice])
            async with contextlib.aclosing(generated):
                async for piece in generated:
                    told.append(piece)
                    if piece.text or piece.finish_reason or piece.logprob is not None:
                        yield event([self._chunk(piece, processor, settings)])
            if settings.include_usage:
                yield event([], usage=_usage(inputs, told))
            yield "data: [DONE]\n\n"
        except (RefusedError, ValueError) as error:
            yield f"data: {json.dumps(error_body(400, str(error)))}\n\n"
        except Exception:
            logger.exception("An answer failed")
            yield f"data: {json.dumps(error_body(500, 'The server failed; its log says why.'))}\n\n"

    @staticmethod
    def _head(request_id: str, model_id: str, kind: str) -> dict:
        return {"id": request_id, "object": kind, "created": int(time.time()), "model": model_id}


class ChatHandler(_Answers, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    fields, kind, kind_of_chunk = answers.CHAT_FIELDS, "chat.completion", "chat.completion.chunk"

    def check(self, body: dict) -> None:
        """Raises RefusedError unless the messages are some that the model reads."""
        reads_text_only = self.model_manager.model.config.vision_config is None
        types = CONTENT_TYPES[:1] if reads_text_only else CONTENT_TYPES
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RefusedError('messages is missing or empty; give [{"role": "user", "content": "…"}].')
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RefusedError(f'{str(message)[:80]!r} is no message; give {{"role": "user", "content": "…"}}.')
            content = message.get("content")
            if not isinstance(content, (str, list)):
                raise RefusedError(
                    f"The content of a message is {str(content)[:80]!r}; give a text or a list of parts."
                )
            for part in [] if isinstance(content, str) else content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind not in types:
                    raise RefusedError(
                        f"A part of a message has the type {kind!r}; this model reads {', '.join(types)}."
                    )
                value = part.get(kind)
                if not isinstance(value if kind == "text" else (value or {}).get("url"), str):
                    raise RefusedError(f"A part of the type {kind!r} has no {'text' if kind == 'text' else 'url'}.")

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        """Messages as chat templates take them; for a text-only model the parts of a text are joined as they are."""
        if modality is Modality.LLM:  # Transformers would write a space between them
            messages = [
                {**message, "content": "".join(part["text"] for part in message["content"])}
                if isinstance(message["content"], list)
                else message
                for message in messages
            ]
        return ChatCompletionHandler.get_processor_inputs_from_messages(messages, modality)

    @staticmethod
    def _first_chunks(n: int) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(n)]

    def _choice(self, index: int, found: list[answers.Piece], processor, settings) -> dict:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in found)},
            "logprobs": _logprobs(found, tokenizer_of(processor)) if settings.logprobs else None,
            "finish_reason": found[-1].finish_reason,
        }

    def _chunk(self, piece: answers.Piece, processor, settings) -> dict:
        logprobs = _logprobs([piece], tokenizer_of(processor)) if piece.logprob is not None else None
        delta = {"content": piece.text} if piece.text or logprobs else {}
        return {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}


class TextHandler(_Answers, CompletionHandler):
    """`/v1/completions`."""

    fields, kind, kind_of_chunk = answers.COMPLETION_FIELDS, "text_completion", "text_completion"

    @staticmethod
    def check(body: dict) -> None:
        """Raises RefusedError unless the prompt is a text."""
        if not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise RefusedError("prompt is no text; the engine transformers completes one text in a request.")

    @staticmethod
    def _first_chunks(n: int) -> list[dict]:
        return []

    def _choice(self, index: int, found: list[answers.Piece], processor, settings) -> dict:
        return {
            "index": index,
            "text": "".join(piece.text for piece in found),
            "logprobs": _text_logprobs(found, tokenizer_of(processor)) if settings.logprobs else None,
            "finish_reason": found[-1].finish_reason,
        }

    def _chunk(self, piece: answers.Piece, processor, settings) -> dict:
        return self._choice(piece.index, [piece], processor, settings)


def _usage(inputs, told: Iterable[answers.Piece]) -> dict:
    prompt, completion = inputs["input_ids"].shape[-1], sum(piece.token is not None for piece in told)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _logprobs(found: list[answers.Piece], tokenizer) -> dict:
    """Of a chat."""

    def entry(token: int, logprob: float) -> dict:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(piece.token, piece.logprob), "top_logprobs": [entry(*pair) for pair in piece.top]}
        for piece in found
        if piece.token is not None
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(found: list[answers.Piece], tokenizer) -> dict:
    """Of a completion. Offsets count characters of the answer as it was told."""
    offsets, length = [], 0
    for piece in found:
        offsets.append(length)
        length += len(piece.text)
    tokens = [(piece, offset) for piece, offset in zip(found, offsets, strict=True) if piece.token is not None]
    return {
        "tokens": [tokenizer.decode([piece.token]) for piece, _ in tokens],
        "token_logprobs": [piece.logprob for piece, _ in tokens],
        "top_logprobs": [{tokenizer.decode([token]): logprob for token, logprob in piece.top} for piece, _ in tokens],
        "text_offset": [offset for _, offset in tokens],
    }


def _videos_as_files(body: dict, folder: Path) -> dict:
    """The request with its videos, which the middleware has made `data:` addresses, as files for the processor."""
    videos = [entry for entry in media_parts(body.get("messages")) if entry[2] == "video"]
    if videos:  # as many frames as the processor takes; Transformers' server would take 32
        body["chat_template_kwargs"] = {"num_frames": None}
    for number, (parent, key, _) in enumerate(videos):
        file = folder / str(number)
        file.write_bytes(base64.b64decode(parent[key].partition(",")[2]))
        parent[key] = str(file)
    return body


def build_app(loaded: LoadedModel) -> FastAPI:
    """The application without what stands before it."""
    state = GenerationState()
    chat, text = ChatHandler(loaded, state), TextHandler(loaded, state)
    app = FastAPI(title="mmMamba", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict) -> Response:
        return await _while_connected(request, chat.handle_request(body, f"chatcmpl-{uuid.uuid4().hex}"))

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict) -> Response:
        return await _while_connected(request, text.handle_request(body, f"cmpl-{uuid.uuid4().hex}"))

    @app.get("/v1/models")
    async def models() -> dict:
        return loaded.listed()

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return JSONResponse(error_body(error.status, str(error)), error.status)

    @app.exception_handler(HTTPException)
    async def answered(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def no_json(request: Request, error: RequestValidationError) -> Response:
        message = "The request is no JSON object; send one, with Content-Type: application/json."
        return JSONResponse(error_body(400, message), 400)

    # What the processor and the chat template refuse: damaged pictures, unknown roles.
    @app.exception_handler(ValueError)
    @app.exception_handler(jinja2.TemplateError)
    async def bad_input(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(400, " ".join(str(error).split())), 400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "The server failed; its log says why."), 500)

    return app


async def _while_connected(request: Request, answer) -> Response:
    """The answer, given up when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()


def serve(model, folder: Path, names: list[str], listener: socket.socket, shutdown_timeout: int) -> None:
    """Serves until SIGTERM or SIGINT, then answers what was asked before, and returns.

    Args:
        model: In evaluation mode.
        folder: Its folder.
        names: What requests may call it.
        listener: A bound socket.
        shutdown_timeout: Seconds that answers may take after the signal.
    """
    if model.config.vision_config is None:
        processor = load_tokenizer(folder)
    else:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    app = RequestGuard(build_app(LoadedModel(model, processor, names)))
    config = uvicorn.Config(app, timeout_graceful_shutdown=shutdown_timeout, log_level="info")
    server = uvicorn.Server(config)
    # uvicorn sends itself the signal again when it is done, which must not end the process otherwise.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
