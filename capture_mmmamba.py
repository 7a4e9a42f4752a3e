"""Decoding without launch overhead: one step of a model, recorded once as a CUDA graph and replayed for every token.

`generate` asks a model for a compiled forward function; `Decoder` is that. Its first step fixes the sizes of the cache
(keys and values get room for the longest answer; the states of Mamba-2 layers never change their size), and records.
Length lives on the device, so one recording serves all steps. Recording costs two ordinary steps for each call of
`generate`, and what CUDA keeps of freed memory. Where it fails, steps run as they do anywhere else.
"""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .backends_mmmamba import find


logger = logging.get_logger(__name__)
FEWEST_STEPS = 8  # an answer that is sure to be shorter is not worth a recording
OUTPUTS = ("output_hidden_states", "output_attentions")  # what a recorded step does not give
_recording = Lock()


def recordable(model, cache: Cache | None) -> bool:
    """Whether steps of this model with this cache can be recorded: on one CUDA device, unquantised, unsharded."""
    if model.device.type != "cuda" or torch.version.cuda is None or cache is None:
        return False
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if not all(cache.is_linear) and find("triton")[0] is None:  # attention of a recorded step
        return False
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return False
    grows = all(type(layer) is LinearAttentionLayer or isinstance(layer, DynamicLayer) for layer in cache.layers)
    return grows and hasattr(cache, "seen_tokens") and not getattr(cache, "offloading", False)


def record(run: Callable[[], Tensor], undo: Callable[[], None], device: torch.device) -> tuple[Callable, Tensor]:
    """A function that repeats `run`, and the tensor that its result is written to.

    Args:
        run: Launches work on fixed tensors only.
        undo: Takes back what a run changed, in tensors and in what Python counts; called after each.
        device: Where the tensors are.
    """
    # Streams, graphs and kernels belong to the current device. Other threads may work on while this one records.
    with _recording, torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries and kernels set themselves up
            undo()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
        undo()
    return graph.replay, result


class Step:
    """One recorded step of a model with one cache, for a batch that has been read.

    Args:
        model: With `lm_head`.
        cache: Which has read a prompt; its key/value layers get fixed sizes until `release`.
        attention_mask: (batch, length), 1 for what may be seen, the token to come included; None if that is all.
        rows: Of the batch.
        capacity: Tokens that keys and values have room for.
        position_ids: (batch or 1, 1), of the first step; counted over what may be seen if not given.
    """

    def __init__(
        self,
        model,
        cache: Cache,
        attention_mask: Tensor | None,
        rows: int,
        capacity: int,
        position_ids: Tensor | None = None,
    ):
        self.model, self.cache = model, cache
        device, self.read = model.device, cache.get_seq_length()
        self.attends = [index for index, linear in enumerate(cache.is_linear) if not linear]
        self.capacity = capacity
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        if position_ids is None:
            position_ids = torch.full((rows, 1), self.read, device=device)
            if attention_mask is not None:
                position_ids = attention_mask.long().sum(1, keepdim=True) - 1
        self.positions = position_ids[..., -1:].expand(rows, 1) - 1  # every step begins by counting on
        self.length = torch.full((1,), self.read, dtype=torch.int32, device=device)
        self.mask = None
        if self.attends and attention_mask is not None and not attention_mask.all():
            self.mask = torch.ones(rows, 1, 1, capacity, dtype=torch.bool, device=device)
            self.mask[:, 0, 0, : attention_mask.shape[1]] = attention_mask.bool()
        self.grown = {}
        try:
            self._fix()
            self.replay, self.logits = self._record()
        except BaseException:
            self.release()
            raise

    def _fix(self) -> None:
        for index in self.attends:
            grown, fixed = self.cache.layers[index], StaticLayer(max_cache_len=self.capacity)
            fixed.update(grown.keys, grown.values)
            self.cache.layers[index], self.grown[index] = fixed, grown
            grown.keys = grown.values = grown.room = None  # keys and values are in memory once

    def release(self) -> None:
        """Gives the cache back layers that grow, with what was read."""
        for index, grown in self.grown.items():
            fixed = self.cache.layers[index]
            if isinstance(fixed, StaticLayer):
                grown.room = [fixed.keys, fixed.values]
                grown.keys, grown.values = (x[:, :, : self.read] for x in grown.room)
                self.cache.layers[index] = grown

    def _run(self) -> Tensor:
        self.positions.add_(1)
        self.length.add_(1)
        return self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            attention_mask={"full_attention": self.mask, "linear_attention": None},
            past_key_values=self.cache,
            use_cache=True,
            decode_length=self.length,
        ).logits

    def _record(self):
        linear = [x for x, is_linear in zip(self.cache.layers, self.cache.is_linear, strict=True) if is_linear]
        changing = [state for layer in linear for state in (layer.conv_states[0], layer.recurrent_states[0])]
        changing += [self.cache.layers[index].cumulative_length for index in self.attends]
        changing += [self.positions, self.length]
        kept = [state.clone() for state in changing]

        def undo():
            for state, before in zip(changing, kept, strict=True):
                state.copy_(before)
            self.cache.seen_tokens = self.read

        try:
            return record(self._run, undo, self.model.device)
        except BaseException:
            undo()
            raise

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Args: input_ids (batch, 1). Returns logits (batch, 1, vocabulary), overwritten by the next step."""
        self.ids.copy_(input_ids)
        self.replay()
        self.read += 1
        self.cache.seen_tokens = self.read
        return self.logits


class Decoder:
    """The forward function of one call of `generate`: records the first single step, replays it for the others."""

    def __init__(self, model, call: "_Call"):
        self.model, self.call = model, call
        self.step: Step | None = None
        self.failed = False

    def __call__(self, **inputs):
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        plain = ids is None or ids.shape[1] != 1 or any(inputs.get(name) for name in OUTPUTS)
        if self.step is None and not plain and not self.failed and self.call.steps >= FEWEST_STEPS:
            self._start(cache, inputs, len(ids))
        if plain or self.step is None:
            return self.model(**inputs)
        return CausalLMOutputWithPast(logits=self.step(ids), past_key_values=cache)

    def _start(self, cache: Cache, inputs: dict, rows: int) -> None:
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else None
        capacity = cache.get_seq_length() + self.call.steps
        try:
            self.step = Step(self.model, cache, mask, rows, capacity, inputs.get("position_ids"))
        except Exception as error:  # a recording is never worth an answer; Triton and drivers raise many kinds
            self.failed = True
            logger.info("decoding goes on without a recorded step: %s", error)
        else:
            self.call.started.append(self.step)


@dataclass
class _Call:
    """A call of `generate` under way: how many steps may follow the prompt, and what was recorded for it."""

    steps: int = 0
    started: list[Step] = field(default_factory=list)


_call: ContextVar[_Call | None] = ContextVar("call", default=None)


@contextmanager
def recordings():
    """Around a call of `generate`: whatever happens, its cache is as others know it afterwards."""
    call = _Call()
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
        for step in call.started:
            step.release()


def steps_follow(steps: int) -> None:
    """Says that so many tokens at most will follow the prompt that is about to be read."""
    if (call := _call.get()) is not None:
        call.steps = steps


def recording_wanted(model, cache: Cache | None, generation_config) -> bool:
    """Whether `generate` should ask for a `Decoder`."""
    plain = generation_config.disable_compile or generation_config.num_beams > 1 or not recordable(model, cache)
    return not plain and _call.get() is not None


def decoder(model) -> Decoder:
    """What `recording_wanted` promised."""
    return Decoder(model, _call.get())
