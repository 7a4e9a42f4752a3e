"""Decoding without launch overhead: one step of a model, recorded once as a CUDA graph and replayed for every token.

`generate` asks a model for a compiled forward function; `Decoder` is that. Its first step fixes the sizes of the cache
(keys and values get room for the longest answer; the states of Mamba-2 layers never change their size), and records.
Length lives on the device, so one recording serves all steps. Recording costs two ordinary steps for each call of
`generate`. Where it fails, steps run as they do anywhere else.
"""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging


logger = logging.get_logger(__name__)
FEWEST_STEPS = 8  # an answer that is sure to be shorter is not worth a recording
OUTPUTS = ("output_hidden_states", "output_attentions")  # what a recorded step does not give


def recordable(model, cache: Cache | None) -> bool:
    """Whether steps of this model with this cache can be recorded: on one CUDA device, unquantised, unsharded."""
    if model.device.type != "cuda" or torch.version.cuda is None or cache is None:
        return False
    if getattr(model, "hf_quantizer", None) is not None or torch.distributed.is_initialized():
        return False
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return False
    grows = all(type(layer) is LinearAttentionLayer or isinstance(layer, DynamicLayer) for layer in cache.layers)
    return grows and hasattr(cache, "seen_tokens")


def record(run: Callable[[], Tensor], undo: Callable[[], None]) -> tuple[Callable[[], None], Tensor]:
    """A function that repeats `run`, and the tensor that its result is written to.

    Args:
        run: Launches work on fixed tensors only.
        undo: Takes back what a run changed, in tensors and in what Python counts; called after each.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries and kernels set themselves up
        undo()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    undo()
    return graph.replay, result


class Step:
    """One recorded step of a model with one cache, for a batch that has been read.

    Args:
        model: With `lm_head`.
        cache: Which has read a prompt; its key/value layers get fixed sizes until `release`.
        attention_mask: (batch, length), 1 for what may be seen, the token to come included; None if that is all.
        capacity: Tokens that keys and values have room for.
    """

    def __init__(self, model, cache: Cache, attention_mask: Tensor | None, rows: int, capacity: int):
        self.model, self.cache = model, cache
        device, self.read = model.device, cache.seen_tokens
        self.attends = [index for index, linear in enumerate(cache.is_linear) if not linear]
        self.capacity = capacity
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        counts = torch.full((rows, 1), self.read + 1, device=device)
        if attention_mask is not None:
            counts = attention_mask.long().sum(1, keepdim=True)
        self.positions = counts - 2  # every step begins by counting on
        self.length = torch.full((1,), self.read, dtype=torch.int32, device=device)
        self.mask = None
        if self.attends and attention_mask is not None and not attention_mask.all():
            self.mask = torch.ones(rows, 1, 1, capacity, dtype=torch.bool, device=device)
            self.mask[:, 0, 0, : attention_mask.shape[1]] = attention_mask.bool()
        self._fix()
        try:
            self.replay, self.logits = self._record()
        except BaseException:
            self.release()
            raise

    def _fix(self) -> None:
        self.grown = {index: self.cache.layers[index] for index in self.attends}
        for index, grown in self.grown.items():
            fixed = StaticLayer(max_cache_len=self.capacity)
            fixed.update(grown.keys, grown.values)
            self.cache.layers[index] = fixed

    def release(self) -> None:
        """Gives the cache back layers that grow, with what was read."""
        for index, grown in self.grown.items():
            fixed = self.cache.layers[index]
            if isinstance(fixed, StaticLayer):
                grown.keys, grown.values = fixed.keys[:, :, : self.read], fixed.values[:, :, : self.read]
                self.cache.layers[index] = grown

    def _run(self) -> Tensor:
        self.positions.add_(1)
        self.length.add_(1)
        with decode_attention(self.model):
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

        return record(self._run, undo)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Args: input_ids (batch, 1). Returns logits (batch, 1, vocabulary), overwritten by the next step."""
        self.ids.copy_(input_ids)
        self.replay()
        self.read += 1
        self.cache.seen_tokens = self.read
        return self.logits


class Decoder:
    """The forward function of one call of `generate`: records the first single step, replays it for the others.

    Args:
        model: Whose forward function it stands for.
        max_length: Tokens that the sequence can grow to.
    """

    def __init__(self, model, max_length: int):
        self.model, self.max_length = model, max_length
        self.step: Step | None = None
        self.failed = False

    def __call__(self, **inputs):
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        plain = ids is None or ids.shape[1] != 1 or any(inputs.get(name) for name in OUTPUTS)
        if self.step is None and not plain and not self.failed:
            plain = self.max_length - cache.seen_tokens < FEWEST_STEPS
            if not plain:
                self._start(cache, inputs.get("attention_mask"), len(ids))
        if plain or self.step is None:
            return self.model(**inputs)
        return CausalLMOutputWithPast(logits=self.step(ids), past_key_values=cache)

    def _start(self, cache: Cache, attention_mask, rows: int) -> None:
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        try:
            self.step = Step(self.model, cache, mask, rows, self.max_length)
        except (RuntimeError, NotImplementedError) as error:
            self.failed = True
            logger.info("decoding goes on without a recorded step: %s", error)
        else:
            _started.get().append(self.step)


# Of the call of `generate` under way: the steps that it has recorded, and how long its sequence can get.
_started: ContextVar[list[Step]] = ContextVar("started")
_longest: ContextVar[int | None] = ContextVar("longest", default=None)


def recording_wanted(model, cache: Cache | None, generation_config) -> bool:
    """Whether `generate` should ask for a `Decoder`."""
    plain = generation_config.disable_compile or generation_config.num_beams > 1 or not recordable(model, cache)
    _longest.set(None if plain else generation_config.max_length)
    return not plain


def decoder(model) -> Decoder | None:
    """What `recording_wanted` promised."""
    return None if _longest.get() is None else Decoder(model, _longest.get())


@contextmanager
def recordings():
    """Around a call of `generate`: whatever happens, its cache is as others know it afterwards."""
    started: list[Step] = []
    token = _started.set(started)
    try:
        yield
    finally:
        _started.reset(token)
        for step in started:
            step.release()


@contextmanager
def decode_attention(model):
    """Attention layers use our kernel for one token, which reads keys and values up to `decode_length`."""
    if all(kind == "linear_attention" for kind in model.config.text_config.layer_types):
        yield
        return
    from .attention_mmmamba import NAME

    config = model.config.text_config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
