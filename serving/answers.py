"""What Transformers' server does not do itself: several answers, log-probabilities, stop texts, JSON by a schema.

Its handlers read the request, encode the prompt and keep the thread that generates; from here they have how an answer
is generated, and how it is written.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .media import RefusedError


CACHED_GRAMMARS = 64 * 2**20  # bytes
MOST_ANSWERS = 128  # to one request, as OpenAI's API allows
# Labels for an operator's books: they change nothing in an answer.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
# What is not done here, and the values that ask for nothing.
NEUTRAL = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
SHARED_FIELDS = (
    "model",
    "max_tokens",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
)
CHAT_FIELDS = (*SHARED_FIELDS, "messages", "max_completion_tokens", "logprobs", "response_format", "top_logprobs")
COMPLETION_FIELDS = (*SHARED_FIELDS, "prompt", "logprobs", "response_format")


@dataclass
class Options:
    """What a request asks for beyond Transformers' `GenerationConfig`.

    Args:
        n: Answers.
        logprobs: Whether each token's log-probability is told.
        top_logprobs: For each token, how many of the likeliest tokens are told with it.
        stop: Texts that end an answer; they are not part of it.
        grammar: What the answer must follow; None for any text.
        seed: Of the sampling.
        include_usage: Whether a stream ends with the number of tokens.
    """

    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    stop: tuple[str, ...] = ()
    grammar: "Grammar | None" = None
    seed: int | None = None
    include_usage: bool = False


def supported(body: dict, fields: tuple[str, ...]) -> dict:
    """The fields of a request that ask for something.

    Raises:
        RefusedError: for one that this engine does not know or cannot do, by its name.
    """
    for name, value in body.items():
        if name in fields or name in LABELS or value is None or any(value == x for x in NEUTRAL.get(name, ())):
            continue
        raise RefusedError(
            f"{name} is not supported by the engine transformers; leave it out, or serve the model with vLLM."
        )
    return {name: value for name, value in body.items() if name in fields and value is not None}


def options(body: dict) -> Options:
    """What a request asks for, checked; its `response_format` is compiled already (see `Grammar.of`).

    Raises:
        RefusedError: for a value that is none.
    """
    number(body, "temperature", 0, 2)
    number(body, "top_p", 0, 1)
    number(body, "top_k", -1, None, whole=True)
    number(body, "max_tokens", 1, None, whole=True)
    number(body, "max_completion_tokens", 1, None, whole=True)
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise RefusedError(f"stop={stop!r} is no text and no list of texts.")
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict) or set(stream_options) - {"include_usage", "continuous_usage_stats"}:
        raise RefusedError(f'stream_options={stream_options!r} is unknown; give {{"include_usage": true}} or nothing.')
    if "messages" in body:
        logprobs, top = bool(body.get("logprobs")), number(body, "top_logprobs", 0, 20, whole=True) or 0
        if top and not logprobs:
            raise RefusedError("top_logprobs needs logprobs=true.")
    else:  # completions give the number at once
        top = number(body, "logprobs", 0, 20, whole=True)
        logprobs, top = top is not None, top or 0
    return Options(
        n=number(body, "n", 1, MOST_ANSWERS, whole=True) or 1,
        logprobs=logprobs,
        top_logprobs=top,
        stop=tuple(stop),
        grammar=body.get("response_format"),
        seed=number(body, "seed", -(2**63), 2**63 - 1, whole=True),
        include_usage=bool(stream_options.get("include_usage")),
    )


def number(body: dict, name: str, least: float, most: float | None, whole: bool = False) -> Any:
    """A field of a request, or None if it is not there. Raises RefusedError if it is no number within bounds."""
    value = body.get(name)
    if value is None:
        return None
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise RefusedError(f"{name}={value!r} is no {'whole ' if whole else ''}number {bounds}.")
    return value


def generation_config(body: dict, default: GenerationConfig) -> GenerationConfig:
    """Changes Transformers' reading of a request (a copy of the model's own config) to what OpenAI's API means.

    A temperature above 0 samples, from all tokens unless top_p or top_k say else. Without a temperature it is as the
    model's folder says.
    """
    if body.get("temperature") is not None:
        default.do_sample = body["temperature"] > 0
    if not default.do_sample:
        default.temperature = default.top_p = default.top_k = None
    elif body.get("top_k") is not None or default.top_k is None:
        default.top_k = max(0, body.get("top_k") or 0)
    default.stop_strings = None  # whose text would stay in the answer
    return default


@dataclass
class Piece:
    """What one token adds to an answer.

    Args:
        index: Of the answer among the request's.
        text: What is told now; texts that may turn out to be a stop text are held back.
        token: The token's id; None if only text is told.
        logprob: Its log-probability, if asked for.
        top: The likeliest tokens, as (id, log-probability).
        finish_reason: Why the answer ends here, if it does: "stop" or "length".
    """

    index: int
    text: str = ""
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None


class _Answer(BaseStreamer):
    """Follows one `generate`: turns its tokens into pieces, and ends it at a stop text or when nobody waits."""

    def __init__(self, index: int, tokenizer, settings: Options, end_tokens: list[int], cancelled, emit):
        self.index, self.settings, self.end_tokens, self.cancelled, self.emit = (
            index,
            settings,
            end_tokens,
            cancelled,
            emit,
        )
        self.tokenizer = tokenizer.backend_tokenizer
        self.decoder = DecodeStream(ids=[], skip_special_tokens=True)
        self.text, self.told, self.finish_reason = "", 0, None
        self.prompt_seen, self.logprobs = False, None

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # the first call brings the prompt
            self.prompt_seen = True
            return
        (token,) = value.flatten().tolist()
        self.text += self.decoder.step(self.tokenizer, token) or ""
        piece = Piece(self.index, token=token)
        if self.settings.logprobs:
            piece.logprob = self.logprobs[token].item()
            values, ids = self.logprobs.topk(self.settings.top_logprobs)
            piece.top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found = [at for stop in self.settings.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.finish_reason = self.text[: min(found)], "stop"
        elif token in self.end_tokens:
            self.finish_reason = "stop"
        # A stop text may have begun.
        longest = max(map(len, self.settings.stop), default=1)
        ready = len(self.text) if self.finish_reason else max(self.told, len(self.text) - longest + 1)
        piece.text, self.told = self.text[self.told : ready], ready
        self.emit(piece)

    def end(self) -> None:
        self.emit(Piece(self.index, self.text[self.told :], finish_reason=self.finish_reason or "length"))


class _Stop(StoppingCriteria):
    def __init__(self, answer: _Answer):
        self.answer = answer

    def __call__(self, input_ids, scores, **kwargs) -> Tensor:
        over = self.answer.finish_reason is not None or self.answer.cancelled.is_set()
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)


class _ReadLogprobs(LogitsProcessor):
    """Reads the model's own distribution, before temperature and a schema change it."""

    def __init__(self, answer: _Answer):
        self.answer = answer

    def __call__(self, input_ids, scores) -> Tensor:
        self.answer.logprobs = scores[0].float().log_softmax(-1)
        return scores


async def pieces(
    model, tokenizer, inputs, config: GenerationConfig, settings: Options, submit
) -> AsyncIterator[Piece]:
    """Generates the answers to one request, one after another.

    Args:
        model: The model.
        tokenizer: Its fast tokenizer.
        inputs: Arguments of `generate` for one prompt.
        config: For `generate`.
        settings: What else was asked for.
        submit: Runs a function on the thread that generates, and gives a future.

    Whoever stops reading stops the generation, too, at the next token.
    """
    loop, queue, cancelled = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]

    def emit(piece: Piece | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, piece)

    def generate() -> None:
        try:
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
            for index in range(settings.n):
                if cancelled.is_set():
                    return
                answer = _Answer(index, tokenizer, settings, ends, cancelled, emit)
                processors = [_ReadLogprobs(answer)] if settings.logprobs else []
                if settings.grammar is not None:
                    processors.append(settings.grammar.processor())
                model.generate(
                    **inputs,
                    generation_config=config,
                    streamer=answer,
                    stopping_criteria=StoppingCriteriaList([_Stop(answer)]),
                    logits_processor=LogitsProcessorList(processors),
                )
        finally:
            emit(None)

    running = submit(generate)
    try:
        while (piece := await queue.get()) is not None:
            yield piece
        await running  # raises what the thread raised
    finally:
        cancelled.set()
        running.add_done_callback(lambda future: future.cancelled() or future.exception())  # seen, if nobody waits


class Grammar:
    """A grammar of xgrammar, compiled for a tokenizer."""

    compilers: ClassVar[dict] = {}

    def __init__(self, compiled):
        self.compiled = compiled

    @classmethod
    def of(cls, response_format, tokenizer, vocab_size: int) -> "Grammar | None":
        """The grammar of a request's `response_format`, None for any text.

        Compiling may take seconds, so keep it off the event loop.

        Args:
            response_format: `{"type": "text"}`, `{"type": "json_object"}`, `{"type": "json_schema", …}` or None.
            tokenizer: The model's.
            vocab_size: Of its logits.

        Raises:
            RefusedError: if it is none of these, cannot be compiled, or xgrammar is missing.
        """
        kind = response_format.get("type") if isinstance(response_format, dict) else response_format
        if kind in (None, "text"):
            return None
        if kind not in ("json_object", "json_schema"):
            raise RefusedError(f"response_format={kind!r} is unknown; use 'text', 'json_object' or 'json_schema'.")
        try:
            import xgrammar
        except ImportError:
            raise RefusedError(
                "response_format needs xgrammar in the server's environment (`pip install xgrammar`); leave it out."
            ) from None
        if tokenizer not in cls.compilers:
            info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
            cls.compilers[tokenizer] = xgrammar.GrammarCompiler(info, cache_limit_bytes=CACHED_GRAMMARS)
        compiler = cls.compilers[tokenizer]
        if kind == "json_object":
            return cls(compiler.compile_builtin_json_grammar())
        schema = response_format.get("json_schema")
        schema = schema.get("schema") if isinstance(schema, dict) else None
        if not isinstance(schema, dict):
            raise RefusedError('response_format needs {"type": "json_schema", "json_schema": {"schema": {…}}}.')
        try:
            return cls(compiler.compile_json_schema(schema, any_whitespace=False))  # small models never end it
        except RuntimeError as error:
            raise RefusedError(f"The schema of response_format cannot be compiled ({error}).") from None

    def processor(self) -> LogitsProcessor:
        """For one answer."""
        from xgrammar.contrib.hf import LogitsProcessor as XgrammarProcessor

        return XgrammarProcessor(self.compiled)
