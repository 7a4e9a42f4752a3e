"""A conversation that goes on from what a model has already read.

Mamba-2 layers keep all they know of the past in a state of fixed size, so a conversation can stop, be copied, saved
and continued without reading anything twice. `ConversationState` is that: the model's cache, and the text that the
cache has not read yet. What it reads is token for token the conversation as the chat template renders it whole.

What was read always ends where tokens end whatever follows: at a control token (the end of a turn, or of a picture)
or before a space. The prompt of an answer is rendered otherwise once the answer is there, so it is read on a copy.
"""

import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from .cache_mmmamba import CACHE
from .chat_template_mmmamba import (
    BOUNDARY_MARK,
    PLACEHOLDER,
    PLAIN_TEXT_MARK,
    as_text,
    check_call,
    check_text,
    whole_numbers,
)
from .fingerprint_mmmamba import weights_checksum, weights_sample, weights_signature
from .generation_mmmamba import PromptImages, answer_options, generation_option, wants_another_cache
from .pictures_mmmamba import as_tiles
from .processing_mmmamba import (
    check_tiles,
    decode_answer,
    expand_placeholders,
    template_parts,
)
from .saved_conversation_mmmamba import FORMAT, check_conversation, read_conversation


# Text up to the last space that follows no other: see `MmMambaTokenizer.splits_at_spaces`.
WORDS = re.compile(f".*[^\\s▁{PLAIN_TEXT_MARK}{BOUNDARY_MARK}](?= )", re.DOTALL)
WORD = "x"  # any word, to stand before a space


class ConversationState:
    """What a model has read and said, ready to go on. Several threads may use one state; they take turns.

        state = model.conversation(tokenizer)
        state.extend(text=document)                     # read now, answer later
        print(state.ask("What is it about?", {"max_new_tokens": 64}))
        other = state.fork()                            # two continuations of one past
        state.save("book.safetensors")
        state = ConversationState.load("book.safetensors", model, tokenizer)

    Args:
        model: An `MmMambaForConditionalGeneration`.
        tokenizer: The package's tokenizer, with its chat template.
        system_message: Replaces the template's own.

    Attributes:
        cache: What the model keeps of what it has read.
        ids: Token ids that it has read.
        pending: Rendered text behind them, which is read when it is certain how it is tokenized.
        in_turn: Whether the user's turn is open.
        turns: Finished turns.

    Raises:
        TemplateError: if the chat template renders a turn otherwise the more turns there are.
    """

    def __init__(self, model, tokenizer, system_message: str | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.system_message = system_message
        self.cache = model.new_cache()
        self.ids: list[int] = []
        self.pending = ""
        self.in_turn = False
        self.turns = 0
        self._last_token = ""  # text whose encoding ends as `ids` do: a control token, or a word
        self._read_by: tuple | None = None  # signature of the weights that read `ids`
        check_call(system_message=system_message)
        self._template = template_parts(tokenizer, system_message)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Tokens that were read and are kept."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Size of the kept state in bytes: constant for Mamba-2 layers, growing by token for attention layers."""
        return sum(tensor.nbytes for tensor in self.cache.tensors().values())

    def extend(
        self,
        text: str = "",
        pixel_values=None,
        num_patches_list: list[int] | None = None,
        *,
        prefill_chunk_size: int | None = None,
    ) -> "ConversationState":
        """Adds to the user's turn and reads it, as far as it cannot change by what may follow.

        Args:
            text: What to add, with `<image>` for each picture; pictures without one stand before the text.
            pixel_values: (tiles, channels, height, width), the tiles of the new pictures in order; or pictures, see
                `as_tiles`; or None.
            num_patches_list: Tiles of each new picture; all tiles are one picture if not given.
            prefill_chunk_size: Tokens that are read at once, as in `generate`.

        Returns:
            This state.

        Raises:
            ValueError: if placeholders, `num_patches_list` and tiles disagree in number, or the model has changed
                since it read; nothing is added then.
        """
        if text or pixel_values is not None or num_patches_list:
            with self._lock, self._rollback_on_error():
                self._add_to_turn(text, pixel_values, num_patches_list, chunk_size=prefill_chunk_size)
        return self

    def ask(
        self,
        question: str,
        generation_config: dict | GenerationConfig | None,
        pixel_values=None,
        num_patches_list: list[int] | None = None,
        streamer=None,
    ) -> str:
        """Ends the user's turn with a question and answers it; the answer becomes part of the conversation.

        Args:
            question: What to ask; may be empty after `extend`.
            generation_config: Arguments of `generate`, or a GenerationConfig; left as it is. See `chat` for what they
                mean here.
            pixel_values, num_patches_list: As in `extend`.
            streamer: A Transformers streamer, which gets the answer as it grows.

        Raises:
            ValueError: as `extend`, and if nothing is asked, or another cache is asked for; the conversation stays as
                it was then.
        """
        check_call(question)
        with self._lock:
            if not self.in_turn and not question.replace(PLACEHOLDER, "").strip():
                raise ValueError("The question is empty; ask something.")
            options, ends = answer_options(self.model, self.tokenizer, generation_config, streamer)
            if wants_another_cache(self.model, options):
                raise ValueError(
                    "cache_implementation and use_cache=False are not for a conversation, which has a cache; leave "
                    "them out, or use chat()."
                )
            chunk_size = generation_option(self.model, options, "prefill_chunk_size")
            with self._rollback_on_error():
                self._add_to_turn(
                    question, pixel_values, num_patches_list, self._template["end of turn"], chunk_size=chunk_size
                )
                self._check_model()
                prompt = self._encode(self.pending + self._template["prompt"])
                ids = torch.tensor([self.ids + prompt], device=self.model.input_device)
                counts = [generation_option(self.model, options, x) for x in ("num_beams", "num_return_sequences")]
                many = max(count or 1 for count in counts) > 1  # they repeat the cache's row
                before, cache = self._snapshot(), self.cache.clone() if many else self.cache
                output = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, **options
                )
                self._restore(before)
                output = getattr(output, "sequences", output)  # with return_dict_in_generate
                answer = decode_answer(self.tokenizer, output[0, ids.shape[1] :].tolist(), ends)
                self._end_turn(answer)
        return answer

    def add_turn(
        self,
        question: str,
        answer: str,
        pixel_values=None,
        num_patches_list: list[int] | None = None,
        *,
        prefill_chunk_size: int | None = None,
    ) -> None:
        """Adds a turn whose answer is known; arguments and what is raised as in `extend` and `ask`."""
        check_call(history=[(question, answer)])
        end = self._template["end of turn"]
        with self._lock, self._rollback_on_error():
            self._add_to_turn(question, pixel_values, num_patches_list, end, chunk_size=prefill_chunk_size)
            self._end_turn(answer)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        # The model was copied, too: the same weights in another place.
        self.__dict__.update(state, _lock=threading.RLock(), _read_by=None)

    def fork(self) -> "ConversationState":
        """A second conversation with the same past; each goes on without the other."""
        with self._lock:
            other = ConversationState.__new__(ConversationState)
            other.__dict__.update(self.__dict__)
            other.ids, other.cache, other._lock = list(self.ids), self.cache.clone(), threading.RLock()
        return other

    def forget_ids(self, keep: int = 1) -> None:
        """Forgets which tokens were read, except the last ones; what the model knows of them stays.

        For streams without end: without attention layers, `ids` are all that grows. Lengths, saved files and what a
        repetition penalty looks at begin with the ids that are kept.

        Args:
            keep: Ids to keep, at least 1.

        Raises:
            ValueError: if layers attend, since they keep keys and values of every token; or for such a `keep`.
        """
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"keep={keep!r:.60} is no number of ids; give a whole number from 1.")
        with self._lock:
            if len(self.ids) > keep:
                self.cache.forget_length(keep)
                del self.ids[:-keep]

    # --- reading -----------------------------------------------------------------------------------------------------

    def _add_to_turn(
        self,
        text: str,
        pixel_values,
        num_patches_list: list[int] | None,
        end: str = "",
        chunk_size: int | None = None,
    ) -> None:
        """Adds to the user's turn, see `extend`, and what the template writes behind it."""
        num_patches_list = whole_numbers(num_patches_list)
        check_text(text, "text")
        check_call(num_patches_list=num_patches_list)
        pixel_values, num_patches_list = as_tiles(pixel_values, num_patches_list, self.model.config, self.tokenizer)
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        check_tiles(num_patches_list, pixel_values)
        if num_patches_list and PLACEHOLDER not in text:
            text = (PLACEHOLDER + "\n") * len(num_patches_list) + text
        parts = text.split(PLACEHOLDER) if self.model.config.tokens_per_tile else [text]
        said = PLACEHOLDER.join(as_text(part, self.tokenizer) for part in parts)
        (said,) = expand_placeholders([said], num_patches_list, self.model.config.tokens_per_tile)
        trimmed = "user" in self._template.get("trimmed", "")
        if not self.in_turn:
            begin = "turn" if self.turns else "start"
            said = said.lstrip() if trimmed else said
            if not said and not end:
                return
            said, end = (self._template[begin] + said, end) if said else (self._template[f"empty {begin}"], "")
        text = self.pending + said
        # White space at the end is never read before what follows is known.
        self._read((text.rstrip() if trimmed and end else text) + end, pixel_values, chunk_size)
        self.in_turn = True

    def _end_turn(self, answer: str) -> None:
        # Read with the next turn: until then only its end would be known for certain.
        said, parts = as_text(answer, self.tokenizer), self._template
        said = said.strip() if "assistant" in parts.get("trimmed", "") else said
        self.pending += parts["answer"] + said + parts["end of answer"] if said else parts["empty answer"]
        self.in_turn = False
        self.turns += 1

    def _encode(self, text: str) -> list[int]:
        """Ids of text that follows what was read."""
        if not self.ids:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = (self._last_token, self._last_token + text)
        read, both = (self.tokenizer(x, add_special_tokens=False)["input_ids"] for x in texts)
        return both[len(read) :]

    def _read(self, text: str, pixel_values: Tensor | None = None, chunk_size: int | None = None) -> None:
        """Reads text as far as its tokens are certain and keeps the rest pending."""
        ends = [(text.rfind(token) + len(token), token) for token in self.tokenizer.get_added_vocab() if token in text]
        if self.tokenizer.splits_at_spaces and (words := WORDS.match(text)):
            ends.append((words.end(), WORD))
        if not ends:
            self.pending = text
            return
        end, last_token = max(ends, key=lambda end: (end[0], end[1] != WORD))  # control tokens split words, too
        ids = self._encode(text[:end])
        known = bool(self.ids) and self._read_by is not None
        if known:
            self._check_model(sample=False)
        new = torch.tensor([ids], device=self.model.input_device)
        images = None
        if pixel_values is not None:
            images = PromptImages(self.model, new == self.model.config.image_token_id, pixel_values)
        self.model.read_prompt(
            self.cache, new, images=images, offset=len(self.ids), chunk_size=chunk_size, progress=True
        )
        if not known:  # not before: bitsandbytes casts biases when a model first runs
            self._read_by = None
            self._check_model()
        self.ids += ids
        self.pending, self._last_token = text[end:], last_token

    def _check_model(self, sample: bool = True) -> None:
        """Raises ValueError if the model is not what it was when it read, by PyTorch's counts or a `sample` of it."""
        signature = (self.model.input_device, self.model.dtype, weights_signature(self.model))
        if not self.ids or self._read_by is None:
            self._read_by = (*signature, weights_sample(self.model))
        *before, old_sample = self._read_by
        if tuple(before[:2]) != signature[:2]:
            raise ValueError(
                f"The model was on {before[0]} in {before[1]} when it read this, now it is on {signature[0]} in "
                f"{signature[1]}; save a conversation before the model is moved and load it afterwards."
            )
        if tuple(before) != signature or (sample and old_sample != weights_sample(self.model)):
            raise ValueError(
                "The model's weights or active adapters are not those that read this conversation, or were moved "
                "since; begin a new one, or load one that was saved with these weights."
            )

    # --- going back --------------------------------------------------------------------------------------------------

    def _snapshot(self) -> tuple:
        return self.cache.snapshot(), len(self.ids), self.pending, self._last_token, self.in_turn, self.turns

    def _restore(self, snapshot: tuple) -> None:
        cache, length, self.pending, self._last_token, self.in_turn, self.turns = snapshot
        del self.ids[length:]
        self.cache.restore(cache)

    @contextmanager
    def _rollback_on_error(self):
        before = self._snapshot()
        try:
            yield
        except BaseException:
            self._restore(before)
            raise

    # --- files -------------------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict:
        """What must be the same where a state is loaded: architecture, every weight, tokenizer and template."""
        text = self.model.config.text_config
        words = hashlib.blake2b(json.dumps([self._template, len(self.tokenizer)]).encode(), digest_size=16)
        names = ("hidden_size", "layer_types", "num_attention_heads", "num_key_value_heads", "head_dim", "conv_kernel")
        described = {name: getattr(text, name) for name in names}
        return described | {"weights": weights_checksum(self.model), "tokenizer or template": words.hexdigest()}

    def save(self, file: str | Path) -> None:
        """Writes the state as one safetensors file, whole or not at all.

        Raises:
            ValueError: if there is no folder for it, or a folder of its name, or the model has changed since it read.
        """
        file = Path(file)
        if not file.resolve().parent.is_dir() or file.is_dir():
            raise ValueError(f"{file} cannot be written: its folder must exist, and it must not be one.")
        with self._lock:
            self._check_model()
            described = {
                "format": FORMAT,
                "model": self._fingerprint(),
                "system_message": self.system_message,
                "last_token": self._last_token,
                "pending": self.pending,
                "in_turn": self.in_turn,
                "turns": self.turns,
            }
            tensors = {name: tensor.contiguous() for name, tensor in self.cache.tensors().items()}
            tensors["ids"] = torch.tensor(self.ids, dtype=torch.int32)
            unfinished = file.with_name(f".{file.name}.{os.urandom(4).hex()}.unfinished")
            try:
                save_file(tensors, unfinished, {"mmmamba": json.dumps(described)})
                unfinished.replace(file)
            finally:
                unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path, model, tokenizer) -> "ConversationState":
        """A saved state, on `model`'s device.

        Raises:
            ValueError: if the file is no saved conversation, or one with another model or other weights.
        """
        described, tensors = read_conversation(file, str(model.input_device))
        state = cls(model, tokenizer, described["system_message"])
        fingerprint = state._fingerprint()
        if described["model"] != fingerprint:
            differing = sorted(name for name in fingerprint if described["model"].get(name) != fingerprint[name])
            raise ValueError(
                f"{file} is another model's conversation ({', '.join(differing)} differ); load that model."
            )
        known = {"", WORD, *tokenizer.get_added_vocab()}
        check_conversation(described, tensors, model, known, file)
        ids = tensors.pop("ids").tolist()
        tensors = {name: x if name.endswith("recurrent_state") else x.to(model.dtype) for name, x in tensors.items()}
        state.cache.load_tensors(tensors, len(ids))
        state._check_model()
        state.ids, state._last_token = ids, described["last_token"]
        for name in ("pending", "in_turn", "turns"):
            setattr(state, name, described[name])
        return state


__all__ = ["ConversationState"]
