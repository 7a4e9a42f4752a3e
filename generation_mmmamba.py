"""Generation: `generate` of Transformers around this package's own way to read a prompt.

A prompt of any kind (token ids or embeddings, padded or not, with pictures, continuing a cache) is read here and only
here, in pieces, before Transformers' loop begins; the loop's first step reads the last piece. So peak memory does not
depend on the prompt, nor does an answer on a version's own way to prefill. Of Transformers only public hooks are
touched: `generate`, `prepare_inputs_for_generation` and `forward`.
"""

import copy
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .cache_mmmamba import CACHE, MmMambaCache
from .capture_mmmamba import FEWEST_STEPS, RecordedStep, recordable
from .pictures_mmmamba import as_tiles


logger = logging.get_logger(__name__)
TILES_AT_ONCE = 16  # encoded together
CACHES = {  # by `cache_implementation`: arguments of `MmMambaCache`
    None: {},
    "dynamic": {},
    "offloaded": {"offloading": True},
    "static": {"static": True},
    "offloaded_static": {"static": True, "offloading": True},
}
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # in one or the other version of Transformers
OPTIONS_FOR_ALL_OF_A_PROMPT = ("output_hidden_states", "output_attentions", "token_healing")
PROMPT_ARGUMENTS = (  # of `generate`, which a conversation makes from its turns
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "pixel_values", "mm_encoder_outputs",
    *CACHE_NAMES,
)  # fmt: skip


class PromptImages:
    """The picture rows of a prompt, encoded as they are needed.

    Args:
        model: Encodes tiles with `get_image_features`.
        places: (batch, length), where image tokens stand.
        pixel_values: (tiles, channels, height, width), for these places in order over the flattened batch.
        rows: (..., hidden) instead, encoded already.

    Raises:
        ValueError: if places and rows differ in number.
    """

    def __init__(self, model, places: Tensor, pixel_values: Tensor | None = None, rows: Tensor | None = None):
        self.model, self.batch_size = model, len(places)
        self.index = (places.flatten().cumsum(0).view_as(places) - 1).masked_fill(~places, -1)
        vision = model.config.vision_config
        self.rows_per_token = vision.patches_per_token
        self.tokens_per_line = 1 if self.rows_per_token == 1 else vision.patches_per_side // 2
        self.dropped = 0
        self.tiles = iter(() if rows is not None else pixel_values.split(TILES_AT_ONCE))
        self.rows = next(self._encoded()) if rows is None else self._by_token(rows)
        there, expected = len(self.rows), vision.tokens_per_tile
        if rows is None:
            per_tile = there // min(TILES_AT_ONCE, len(pixel_values))
            there = per_tile * len(pixel_values)
        if int(places.sum()) != there:
            if rows is None and per_tile != expected:
                height, width = pixel_values.shape[2:]
                raise ValueError(
                    f"A tile of {height} x {width} pixels gives {per_tile} rows, and a prompt has {expected} for "
                    "each; let the image processor cut the tiles."
                )
            raise ValueError(
                f"The prompt has {int(places.sum())} image tokens but the pictures give {there} rows; use the "
                "processor, or repeat <IMG_CONTEXT> once per row of every tile."
            )

    def _encoded(self):
        for tiles in self.tiles:
            yield self._by_token(self.model.get_image_features(tiles).pooler_output)

    def _by_token(self, rows: Tensor) -> Tensor:
        """(image tokens, rows of each, hidden)."""
        return rows.reshape(-1, self.rows_per_token, rows.shape[-1])

    def cut_before(self, stop: int) -> int:
        """The last place up to `stop` where the prompt may be cut: not within what is shuffled together."""
        line = self.tokens_per_line
        while line > 1 and stop < self.index.shape[1] and (self.index[:, stop].clamp(min=0) % line).any():
            stop -= 1
        return stop

    def cut_behind(self, stop: int) -> int:
        """The first such place from `stop` on."""
        while stop < self.index.shape[1] and self.cut_before(stop) != stop:
            stop += 1
        return stop

    def within(self, start: int, stop: int, repeats: int = 1, drop: bool = False) -> dict | None:
        """Rows for the tokens from `start` to `stop`, as the argument `mm_encoder_outputs`; None if there are none.

        Args:
            repeats: How often each row of the batch stands in the batch at hand.
            drop: Whether what was read is not asked for again.
        """
        index = self.index[:, start:stop].repeat_interleave(repeats, dim=0)
        index = index[index >= 0]
        if not len(index):
            return None
        last = int(index.max())
        while self.dropped + len(self.rows) <= last:
            self.rows = torch.cat([self.rows, next(self._encoded())])
        rows = self.rows[(index - self.dropped).to(self.rows.device)]
        if drop and self.batch_size == 1:  # in a batch, the next piece of another row may need earlier ones
            self.rows, self.dropped = self.rows[last + 1 - self.dropped :], last + 1
        return {"image": BaseModelOutputWithPooling(pooler_output=rows.flatten(0, 1))}


def generation_option(model, kwargs: dict, name: str):
    """The value of a generation option for a call of `generate` with these arguments, by Transformers' precedence."""
    config = kwargs.get("generation_config")
    chosen = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
    return next((value for value in chosen if value is not None), None)


def call_options(generation_config: dict | GenerationConfig | None) -> dict:
    """The same as arguments of `generate`.

    Raises:
        ValueError: if there are arguments that a conversation makes itself.
    """
    if isinstance(generation_config, GenerationConfig):
        return {"generation_config": generation_config}
    if generation_config is not None and not isinstance(generation_config, Mapping):
        raise ValueError(
            f"generation_config={generation_config!r:.80} is no dict of generate's arguments and no GenerationConfig; "
            "give one such as {'max_new_tokens': 64}."
        )
    options = dict(generation_config or {})
    if made := [name for name in PROMPT_ARGUMENTS if options.get(name) is not None]:
        raise ValueError(
            f"{made[0]} is no option of an answer: it is made from question, pictures and history; leave it out, or "
            "call generate()."
        )
    return options


def check_chunk_size(size: int | None) -> None:
    """Raises ValueError unless this is None or a number of tokens."""
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(
            f"prefill_chunk_size={size!r:.60} is no number of tokens; give a whole number from 1, or None."
        )


def wants_another_cache(model, options: dict) -> bool:
    """Whether these arguments of `generate` ask for a cache of a kind, or for none."""
    kind, use_cache = (generation_option(model, options, name) for name in ("cache_implementation", "use_cache"))
    return kind is not None or use_cache is False


def answer_options(
    model, tokenizer, generation_config: dict | GenerationConfig | None, streamer=None
) -> tuple[dict, list[int]]:
    """Arguments of `generate` for an answer, and ids that end it: `<|im_end|>` whatever the generation config knows.

    Args:
        generation_config: Arguments of `generate`, with a GenerationConfig among them if you like; or one alone.
        streamer: Unless there is one among them.

    Raises:
        ValueError: as `call_options`.
    """
    options = call_options(generation_config)
    options.setdefault("streamer", streamer)
    if generation_option(model, options, "stop_strings") is not None:
        options.setdefault("tokenizer", tokenizer)
    ends = generation_option(model, options, "eos_token_id")
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) | {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    ends = sorted(ends - {None, tokenizer.unk_token_id})
    new = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    config = options.pop("generation_config", None)
    if options.get("max_length", getattr(config, "max_length", None)) is not None:
        new["max_new_tokens"] = options.get("max_new_tokens")  # the model's own would win over max_length
    else:
        new["max_new_tokens"] = generation_option(model, {**options, "generation_config": config}, "max_new_tokens")
        new["max_new_tokens"] = new["max_new_tokens"] or 1024
    if config is None:
        return options | new, ends
    config = copy.deepcopy(config)  # a GenerationConfig beside options of its own is deprecated
    return config.update(**options | new) | {"generation_config": config}, ends


@dataclass
class _Call:
    """A call of `generate` under way.

    Attributes:
        model: Whose call it is: an assistant's may run inside.
        cache: What it reads into; None if there is none.
        prompt: Arguments of `read_prompt`.
        repeats: How many beams, or answers, each row of the prompt is for.
        offset: Tokens of the sequence that the loop's `input_ids` lack at their beginning.
        begin: Where in the sequence the tokens that `generate` was given begin, and so the images.
        images: Of the prompt; None if there are none.
        pixel_values: Of the prompt, for an assistant.
        at_once: Whether the first step reads the whole prompt, rather than pieces before it.
        new_tokens: How many may follow.
        may_record: Whether steps may be recorded.
        step: What was recorded.
        started: Whether the loop has begun.
    """

    model: object
    cache: Cache | None = None
    prompt: dict = field(default_factory=dict)
    repeats: int = 1
    offset: int = 0
    begin: int = 0
    images: PromptImages | None = None
    pixel_values: Tensor | None = None
    at_once: bool = True
    new_tokens: int = 0
    may_record: bool = False
    step: RecordedStep | None = None
    started: bool = False


_current_call: ContextVar[_Call | None] = ContextVar("current_call", default=None)


class MmMambaGenerationMixin(GenerationMixin):
    """`generate`, and reading a prompt in pieces."""

    def new_cache(self) -> MmMambaCache:
        """An empty cache for this model."""
        return MmMambaCache(self.config)

    @property
    def input_device(self) -> torch.device:
        """Where inputs may be: with the first weights that are there; Accelerate's hooks bring the others."""
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ):
        """As in Transformers.

        The prompt is read in pieces of `prefill_chunk_size` tokens, or as many as suit device and batch. On CUDA,
        single steps are recorded once and replayed (not with `disable_compile=True`).

        Raises:
            ValueError: if the cache, the mask and the tokens contradict each other, or there is no such cache.
        """
        option = partial(generation_option, self, {**kwargs, "generation_config": generation_config})
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None and kwargs.get("inputs_embeds") is None and option("bos_token_id") is not None:
            ids = torch.tensor([[option("bos_token_id")]], device=self.input_device)
        outer = _current_call.get()
        if outer is not None and outer.model is not self:  # an assistant's call: it reads the pictures itself
            kwargs["pixel_values"] = outer.pixel_values
        if kwargs.get("pixel_values") is not None:
            kwargs["pixel_values"], _ = as_tiles(kwargs["pixel_values"], None, self.config)
        caches = [kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None]
        call = self._new_call(ids, caches[0] if caches else None, option, kwargs)
        if call.cache is not None:
            kwargs[CACHE] = call.cache
        kwargs.pop("pixel_values", None)
        kwargs.pop("mm_encoder_outputs", None)
        # What is done here is not to be done again by Transformers.
        done = [name for name in ("cache_implementation", "prefill_chunk_size") if option(name) is not None]
        if done and generation_config is not None:  # beside an object, options are deprecated
            kwargs = {k: v for k, v in generation_config.to_dict().items() if v is not None} | kwargs
            generation_config = None
        kwargs |= dict.fromkeys(done)
        token = _current_call.set(call)
        try:
            return super().generate(ids, generation_config, *args, **kwargs)
        finally:
            _current_call.reset(token)
            if call.step is not None:
                call.step.release()

    def _new_call(self, ids: Tensor | None, cache: Cache | None, option: Callable, kwargs: dict) -> _Call:
        """Checks what a call of `generate` is given; nothing is read yet."""
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        given = ids if embeds is None else embeds
        if given is None:
            return _Call(self)  # Transformers says what is missing
        if option("assistant_early_exit") is not None:
            raise ValueError(
                "assistant_early_exit is not supported; pass an assistant_model or prompt_lookup_num_tokens."
            )
        length = given.shape[1]
        total = length if mask is None else mask.shape[1]
        new_tokens = option("max_new_tokens") or max(1, (option("max_length") or length + 20) - length)
        implementation = option("cache_implementation")
        if option("use_cache") is False and embeds is None:  # Transformers continues embeddings by a cache only
            if cache is not None:
                raise ValueError("use_cache=False and a cache contradict each other; leave out either.")
            if total != length:
                raise ValueError(
                    f"The attention_mask is for {total} tokens and {length} are given; without a cache give all."
                )
        elif cache is None:
            cache = self._cache_of(implementation, max(total + new_tokens, option("max_cache_len") or 0))
        elif implementation is not None:
            raise ValueError(
                f"cache_implementation={implementation!r} makes a cache, and one was given; leave out either."
            )
        call = _Call(
            self,
            cache,
            pixel_values=kwargs.get("pixel_values"),
            offset=total - (0 if ids is None else ids.shape[1]),
            begin=total - length,
        )
        call.repeats = max(option("num_beams") or 1, option("num_return_sequences") or 1)
        call.new_tokens = new_tokens
        if cache is not None:
            self._check_cache(cache, given, total, new_tokens)
            call.may_record = not option("disable_compile") and (option("num_beams") or 1) == 1
            call.may_record = call.may_record and recordable(self, cache)
            # Whoever replaced the hook, as PEFT does to put virtual tokens before a prompt, gets the whole prompt.
            replaced = "prepare_inputs_for_generation" in vars(self)
            call.at_once = replaced or any(option(name) for name in OPTIONS_FOR_ALL_OF_A_PROMPT)
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None or kwargs.get("pixel_values") is not None:
            with torch.no_grad():
                places = self.model.image_places(ids if embeds is None else None, embeds)
                rows = None if encoded is None else encoded.pooler_output
                call.images = PromptImages(self, places, kwargs.get("pixel_values"), rows)
        call.prompt = {
            "input_ids": ids if embeds is None else None,
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": kwargs.get("position_ids"),
            "chunk_size": option("prefill_chunk_size"),
        }
        return call

    def _cache_of(self, implementation: str | None, max_cache_len: int) -> MmMambaCache:
        if implementation not in CACHES:
            names = ", ".join(repr(name) for name in CACHES if name is not None)
            raise ValueError(f"cache_implementation={implementation!r} is not among this model's caches: {names}.")
        options = dict(CACHES[implementation])
        if options.get("offloading") and self.input_device.type == "cpu":
            raise ValueError(
                f"cache_implementation={implementation!r} moves the cache between a GPU and memory, and the model is "
                "on a CPU; leave it out."
            )
        if options.pop("static", False):
            options["max_cache_len"] = max_cache_len
        return MmMambaCache(self.config, **options)

    def _check_cache(self, cache: Cache, given: Tensor, total: int, new_tokens: int) -> None:
        """Raises ValueError unless `given` (batch, length, ...) ends a sequence of `total` that the cache begins."""
        wrapped = MmMambaCache.wrapping(cache, self.config.text_config)
        if wrapped is not cache and not wrapped.attention_layers:
            raise ValueError(
                f"A {type(cache).__name__} does not count tokens where no layer is attention; pass model.new_cache()."
            )
        read, rows, length = wrapped.get_seq_length(), wrapped.batch_size, given.shape[1]
        if rows not in (None, len(given)):
            raise ValueError(f"The cache holds {rows} rows and the prompt has {len(given)}; give as many.")
        if not total - length <= read < total:
            raise ValueError(
                f"The cache has read {read} tokens, but with {length} tokens given and a sequence of {total} (by the "
                f"attention_mask, if there is one) it should have read {max(0, total - length)} to {total - 1}; give "
                "the whole sequence, or the new tokens with an attention_mask over all."
            )
        if (capacity := wrapped.capacity) is not None and total + new_tokens - 1 > capacity:
            raise ValueError(
                f"The cache has room for {capacity} tokens, and {total} with up to {new_tokens} new ones need more; "
                "make a longer cache or lower max_new_tokens."
            )

    @torch.no_grad()
    def _start(self, call: _Call) -> None:
        """Reads a prompt but for its last piece; called by the loop's first step, when all arguments are checked."""
        call.started = True
        if call.cache is None or not call.prompt:
            return
        if not call.at_once:
            given = next(x for x in (call.prompt["inputs_embeds"], call.prompt["input_ids"]) if x is not None)
            length, begin = given.shape[1], call.cache.get_seq_length() - call.begin
            check_chunk_size(call.prompt["chunk_size"])
            size = call.prompt["chunk_size"] or self.default_chunk_size(len(given), call.begin + length, given.device)
            # Where several copies of a row follow, they should have no more than one token to read again.
            stop = begin + (length - 1 - begin) // size * size if call.repeats == 1 else length - 1
            stop = stop if call.images is None else max(begin, call.images.cut_before(stop))
            self.read_prompt(call.cache, images=call.images, stop=stop, **call.prompt | {"chunk_size": size})
        MmMambaCache.wrapping(call.cache, self.config.text_config).repeat_rows(call.repeats)

    @torch.no_grad()
    def read_prompt(
        self,
        cache: Cache,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        images: PromptImages | None = None,
        stop: int | None = None,
        offset: int | None = None,
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> None:
        """Reads what the cache has not read yet of a prompt, in pieces.

        Args:
            cache: What was read before; continued in place.
            input_ids: (batch, length), the end of a sequence of `offset + length` tokens.
            inputs_embeds: (batch, length, hidden) instead.
            attention_mask: (batch, offset + length), 1 for valid tokens.
            position_ids: (batch or 1, length or offset + length).
            images: Of `input_ids`.
            stop: Where in `input_ids` to stop; at their end if not given.
            offset: Tokens before `input_ids`, which the cache has read; by the attention_mask, or 0, if not given.
            chunk_size: Tokens of a piece; by the config, or by device, batch and length if not given.
            progress: Whether to show a progress bar when it takes seconds.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        length = given.shape[1]
        if offset is None:
            offset = 0 if attention_mask is None else attention_mask.shape[1] - length
        begin, stop = cache.get_seq_length() - offset, length if stop is None else stop
        check_chunk_size(chunk_size)
        size = chunk_size or self.default_chunk_size(len(given), offset + length, given.device)
        with tqdm(
            total=stop - begin,
            unit=" tokens",
            desc="reading",
            delay=2,
            disable=None if progress else True,
            leave=False,
        ) as bar:
            first = begin
            while first < stop:
                last = min(first + size, stop)
                if images is not None and (last := images.cut_before(last)) <= first:
                    last = min(images.cut_behind(first + size), stop)
                positions = position_ids
                if positions is not None:
                    end = positions.shape[-1] - length + last
                    positions = positions[..., end - (last - first) : end]
                inputs = {
                    "input_ids": None if input_ids is None else input_ids[:, first:last],
                    "inputs_embeds": None if inputs_embeds is None else inputs_embeds[:, first:last],
                    "attention_mask": None if attention_mask is None else attention_mask[:, : offset + last],
                    "position_ids": positions,
                }
                pictures = None if images is None else images.within(first, last, drop=True)
                self.model(**self._moved(inputs), use_cache=True, mm_encoder_outputs=pictures, **{CACHE: cache})
                bar.update(last - first)
                first = last

    def default_chunk_size(self, rows: int, length: int, device: torch.device) -> int:
        """How many tokens of a prompt are read at once, if nobody says.

        Args:
            rows: Of the batch.
            length: Of the whole prompt, with what the cache has read.
            device: Where it is.
        """
        config = self.config.text_config
        if config.prefill_chunk_size is not None:
            return config.prefill_chunk_size
        on_gpu = device.type == "cuda"
        tokens = 8192 if on_gpu else 2048
        if "full_attention" in config.layer_types and "flash" not in str(config._attn_implementation):
            mask_entries = 2**28 if on_gpu else 2**24  # of attention layers: (tokens x length)
            tokens = min(tokens, mask_entries // length)
        return max(128, tokens // rows)

    def _moved(self, inputs: dict) -> dict:
        """Tensors on the model's device."""
        return {k: v.to(self.input_device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length=None, attention_mask=None, inputs_embeds=None, **kwargs
    ) -> dict:
        """What the next forward gets: the tokens that the cache has not read, with their positions and pictures.

        Called by Transformers' loop; `input_ids` are all tokens so far, or the generated ones behind `inputs_embeds`.
        """
        call = _current_call.get()
        in_generate = call is not None and call.model is self
        call = call if in_generate else _Call(self)
        if not call.started:
            self._start(call)
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        cache = None if kwargs.get("use_cache") is False else cache
        read = 0 if cache is None else int(cache.get_seq_length())
        unread = call.offset + input_ids.shape[1] - read
        if unread < 1:  # the cache holds tokens that are not in `input_ids`, such as virtual ones
            unread = next_sequence_length or 1
        first = kwargs.pop("is_first_iteration", False)
        left_out = ("labels", "position_ids", "pixel_values", "mm_encoder_outputs", *CACHE_NAMES)
        inputs = {name: value for name, value in kwargs.items() if name not in left_out}
        if inputs_embeds is not None and first:
            inputs["inputs_embeds"], rows = inputs_embeds[:, -unread:], len(inputs_embeds)
        else:
            inputs["input_ids"], rows = input_ids[:, -unread:], len(input_ids)
        replaced = "prepare_inputs_for_generation" in vars(self)  # by PEFT, which knows the older name only
        inputs |= {"attention_mask": attention_mask, "past_key_values" if replaced else CACHE: cache}
        if kwargs.get("position_ids") is not None:
            inputs["position_ids"] = kwargs["position_ids"][..., -unread:]
        if call.images is not None:
            start = read - call.begin
            repeats = rows // call.images.batch_size
            inputs["mm_encoder_outputs"] = call.images.within(start, start + unread, repeats)
        elif not in_generate and (first or cache is None):  # a loop of somebody's own
            inputs |= {name: kwargs.get(name) for name in ("pixel_values", "mm_encoder_outputs")}
        inputs = self._moved(inputs)
        if call.may_record and unread == 1 and "input_ids" in inputs and inputs.get("mm_encoder_outputs") is None:
            inputs["recorded_step"] = self._recorded_step(call, cache, inputs)
        return inputs

    def _recorded_step(self, call: _Call, cache: MmMambaCache, inputs: dict) -> RecordedStep | None:
        """The step of this call, recorded now if it is the first; None if it cannot be recorded."""
        if call.new_tokens < FEWEST_STEPS or any(
            inputs.get(name) for name in ("output_hidden_states", "output_attentions")
        ):
            return None
        if call.step is not None and call.step.is_full:  # a stopping criterion of one's own let it go on
            call.step.release()
            call.step = None
        if call.step is None and not cache.can_be_fixed:  # it has read pictures that a recording has no place for
            call.may_record = False
        elif call.step is None:
            rows, capacity = len(inputs["input_ids"]), cache.get_seq_length() + call.new_tokens
            try:
                call.step = RecordedStep(
                    self, cache, inputs["attention_mask"], rows, capacity, inputs.get("position_ids")
                )
            except Exception as error:  # a recording is never worth an answer; Triton and drivers raise many kinds
                logger.warning_once(f"Decoding is slower than it could be: a step could not be recorded ({error}).")
                call.may_record = False
        return call.step

    def warm_up(self, batch_sizes: tuple[int, ...] = (1,), prompt_length: int = 300) -> float:
        """Compiles what answering needs for these batch sizes, so that the first answer is not late.

        Returns:
            Seconds that it took; also logged.
        """
        start = time.perf_counter()
        for rows in batch_sizes:
            ids = torch.zeros(rows, prompt_length, dtype=torch.long, device=self.input_device)
            mask = torch.ones_like(ids)
            options = {"max_new_tokens": 2 + FEWEST_STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            self.generate(ids, attention_mask=mask, **options)
            if rows > 1:  # rows of different lengths take other paths
                mask[0, 0] = 0
                self.generate(ids, attention_mask=mask, **options)
        seconds = time.perf_counter() - start
        logger.warning("warmed up for batches of %s in %.1f s", ", ".join(map(str, batch_sizes)), seconds)
        return seconds
