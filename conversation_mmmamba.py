"""A conversation that goes on from what a model has already read, and `chat`.

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
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from .cache_mmmamba import CACHE, expected_shapes
from .fingerprint_mmmamba import pictures_digest, weights_checksum, weights_sample, weights_signature
from .generation_mmmamba import PromptImages, answer_options, generation_option
from .processing_mmmamba import (
    PLACEHOLDER,
    TemplateError,
    answers_show_pictures,
    as_text,
    check_tiles,
    decode_answer,
    encode_conversation,
    expand_placeholders,
    template_parts,
)
from .tokenization_mmmamba import PLAIN_TEXT_MARK


FORMAT = "mmmamba-conversation-2"
# Text up to the last space that follows no other: see `MmMambaTokenizer.splits_at_spaces`.
WORDS = re.compile(f".*[^\\s▁{PLAIN_TEXT_MARK}](?= )", re.DOTALL)
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
        self, text: str = "", pixel_values: Tensor | None = None, num_patches_list: list[int] | None = None
    ) -> "ConversationState":
        """Adds to the user's turn and reads it, as far as it cannot change by what may follow.

        Args:
            text: What to add, with `<image>` for each picture; pictures without one stand before the text.
            pixel_values: (tiles, channels, height, width), the tiles of the new pictures in order; or None.
            num_patches_list: Tiles of each new picture; all tiles are one picture if not given.

        Returns:
            This state.

        Raises:
            ValueError: if placeholders, `num_patches_list` and tiles disagree in number, or the model has changed
                since it read; nothing is added then.
        """
        if text or pixel_values is not None or num_patches_list:
            with self._lock, self._rollback_on_error():
                self._add_to_turn(text, pixel_values, num_patches_list)
        return self

    def ask(
        self,
        question: str,
        generation_config: dict | GenerationConfig,
        pixel_values: Tensor | None = None,
        num_patches_list: list[int] | None = None,
        streamer=None,
    ) -> str:
        """Ends the user's turn with a question and answers it; the answer becomes part of the conversation.

        Args:
            question: What to ask; may be empty after `extend`.
            generation_config: Arguments of `generate`, or a GenerationConfig; left as it is.
            pixel_values, num_patches_list: As in `extend`.
            streamer: A Transformers streamer, which gets the answer as it grows.

        Raises:
            ValueError: as `extend`, and if nothing is asked; the conversation stays as it was then.
        """
        with self._lock:
            if not self.in_turn and not question.replace(PLACEHOLDER, "").strip():
                raise ValueError("The question is empty; ask something.")
            options, ends = answer_options(self.model, self.tokenizer, generation_config, streamer)
            with self._rollback_on_error():
                self._add_to_turn(question, pixel_values, num_patches_list, self._template["end of turn"])
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
        pixel_values: Tensor | None = None,
        num_patches_list: list[int] | None = None,
    ) -> None:
        """Adds a turn whose answer is known; arguments and what is raised as in `ask`."""
        with self._lock, self._rollback_on_error():
            self._add_to_turn(question, pixel_values, num_patches_list, self._template["end of turn"])
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

    # --- reading -----------------------------------------------------------------------------------------------------

    def _add_to_turn(
        self, text: str, pixel_values: Tensor | None, num_patches_list: list[int] | None, end: str = ""
    ) -> None:
        """Adds to the user's turn, see `extend`, and what the template writes behind it."""
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        check_tiles(num_patches_list, pixel_values)
        if num_patches_list and PLACEHOLDER not in text:
            text = (PLACEHOLDER + "\n") * len(num_patches_list) + text
        said = PLACEHOLDER.join(as_text(part, self.tokenizer) for part in text.split(PLACEHOLDER))
        (said,) = expand_placeholders([said], num_patches_list, self.model.config.vision_config.tokens_per_tile)
        if not self.in_turn:
            begin = "turn" if self.turns else "start"
            said, end = (self._template[begin] + said, end) if said else (self._template[f"empty {begin}"], "")
        self._read(self.pending + said + end, pixel_values)
        self.in_turn = True

    def _end_turn(self, answer: str) -> None:
        # Read with the next turn: until then only its end would be known for certain.
        said, parts = as_text(answer, self.tokenizer), self._template
        self.pending += parts["answer"] + said + parts["end of answer"] if said else parts["empty answer"]
        self.in_turn = False
        self.turns += 1

    def _encode(self, text: str) -> list[int]:
        """Ids of text that follows what was read."""
        if not self.ids:
            return self.tokenizer(text)["input_ids"]
        texts = (self._last_token, self._last_token + text)
        read, both = (self.tokenizer(x, add_special_tokens=False)["input_ids"] for x in texts)
        return both[len(read) :]

    def _read(self, text: str, pixel_values: Tensor | None = None) -> None:
        """Reads text as far as its tokens are certain and keeps the rest pending."""
        ends = [(text.rfind(token) + len(token), token) for token in self.tokenizer.get_added_vocab() if token in text]
        if self.tokenizer.splits_at_spaces and (words := WORDS.match(text)):
            ends.append((words.end(), WORD))
        if not ends:
            self.pending = text
            return
        end, last_token = max(ends)
        ids = self._encode(text[:end])
        self._check_model(sample=False)
        new = torch.tensor([ids], device=self.model.input_device)
        images = None
        if pixel_values is not None:
            places = new == self.model.config.image_token_id
            images = PromptImages(self.model, places, pixel_values)
        self.model.read_prompt(self.cache, new, images=images, offset=len(self.ids), progress=True)
        self.ids += ids
        self.pending, self._last_token = text[end:], last_token

    def _check_model(self, sample: bool = True) -> None:
        """Raises ValueError if the model is not what it was when it read.

        Args:
            sample: Whether to look at some weights, too; else only at what PyTorch counts.
        """
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
        try:
            with safe_open(file, "pt", device=str(model.input_device)) as opened:
                described = json.loads((opened.metadata() or {}).get("mmmamba", "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        except FileNotFoundError:
            raise ValueError(f"{file} does not exist; give a file that ConversationState.save wrote.") from None
        except OSError as error:
            raise ValueError(
                f"{file} cannot be read ({error}); give a file that ConversationState.save wrote."
            ) from None
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}); save the conversation again."
            ) from None
        if described.get("format") != FORMAT:
            raise ValueError(
                f"{file} is no conversation saved by this version (its format is {described.get('format')!r}, not "
                f"{FORMAT!r}); give a file that ConversationState.save wrote."
            )
        state = cls(model, tokenizer, described["system_message"])
        fingerprint = state._fingerprint()
        if described["model"] != fingerprint:
            differing = sorted(name for name in fingerprint if described["model"].get(name) != fingerprint[name])
            raise ValueError(
                f"{file} is another model's conversation ({', '.join(differing)} differ); load that model."
            )
        state._check_tensors(tensors, file)
        ids = tensors.pop("ids").tolist()
        tensors = {name: x if name.endswith("recurrent_state") else x.to(model.dtype) for name, x in tensors.items()}
        state.cache.load_tensors(tensors, len(ids))
        state._check_model()
        state.ids, state._last_token = ids, described["last_token"]
        for name in ("pending", "in_turn", "turns"):
            setattr(state, name, described[name])
        return state

    def _check_tensors(self, tensors: dict[str, Tensor], file: str | Path) -> None:
        """Raises ValueError unless these are the tensors that `save` writes for this model."""
        read = len(tensors["ids"]) if "ids" in tensors and tensors["ids"].ndim else 0
        places = tensors.get("image_places") if self.model.model.shuffles_behind else None
        expected = {"ids": [read]} | expected_shapes(self.model.config.text_config, read, places)
        if {name: list(tensor.shape) for name, tensor in tensors.items()} != expected:
            raise ValueError(f"{file} does not hold the tensors of a whole conversation; save the conversation again.")


class History(list):
    """The (question, answer) pairs of a conversation, with the state that has read them.

    A plain list to whoever copies, compares or stores it; handed back to `chat`, nothing is read twice. The state goes
    to the first who takes it; for others the history is read again.

    Args:
        turns: The pairs.
        state: Which has read them.
        counts: Tiles of the pictures that it has seen.
        pictures: Their digest.
    """

    def __init__(self, turns: list[tuple[str, str]], state: ConversationState, counts: list[int], pictures: bytes):
        super().__init__(turns)
        self._kept = [(state, tuple(turns), tuple(counts), pictures)]  # taken by `pop`, which no two threads share

    def __reduce__(self):
        return list, (list(self),)

    def take(
        self, model, tokenizer, pixel_values: Tensor | None, num_patches_list: list[int], system_message: str | None
    ) -> tuple[ConversationState, int] | None:
        """The state and how many pictures it has seen, if it fits this call and nobody has it; else None."""
        try:
            kept = self._kept.pop()
        except IndexError:
            return None
        state, turns, counts, pictures = kept
        fits = (
            state.model is model
            and state.tokenizer is tokenizer
            and state.system_message == system_message
            and turns == tuple(self)
            and counts == tuple(num_patches_list[: len(counts)])
            and pictures == pictures_digest(None if pixel_values is None else pixel_values[: sum(counts)])
        )
        with suppress(ValueError):  # the model has changed since: the history is read again
            if fits:
                state._check_model()
                return state, len(counts)
        self._kept.append(kept)
        return None

    def give_back(self, state: ConversationState, counts: list[int], pictures: bytes) -> None:
        """Undoes `take`."""
        self._kept.append((state, tuple(self), tuple(counts), pictures))


class ConversationMixin:
    """`chat`, `batch_chat` and `conversation` of a model."""

    def conversation(self, tokenizer, system_message: str | None = None) -> ConversationState:
        """A conversation that reads as it grows and can be forked, saved and loaded; see `ConversationState`."""
        return ConversationState(self, tokenizer, system_message)

    def chat(
        self,
        tokenizer,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict | GenerationConfig,
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        verbose: bool = False,
        *,
        system_message: str | None = None,
        streamer=None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """Answers a question about pictures, or about nothing but text.

        Args:
            tokenizer: The package's tokenizer.
            pixel_values: (tiles, channels, height, width), the tiles of all pictures of the conversation in order; or
                None.
            question: What to ask. `<image>` stands for a picture; a lone picture may go without.
            generation_config: Arguments of `generate`, such as `{"max_new_tokens": 64, "do_sample": True}`; left as
                it is.
            history: Earlier (question, answer) pairs, as an earlier call returned them.
            return_history: Whether to return the history with this turn added, too.
            num_patches_list: Tiles of each picture; all tiles are one picture if not given.
            verbose: Print question and answer.
            system_message: Replaces the template's own.
            streamer: A Transformers streamer, which gets the answer as it grows.

        Returns:
            The answer, or the answer and the history.

        Raises:
            ValueError: if the question is empty, or `<image>`, `num_patches_list` and the tiles disagree.
        """
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        if history is None and pixel_values is not None and "<image>" not in question:
            question = "<image>\n" + question
        check_tiles(num_patches_list, pixel_values)
        earlier, state = list(history or []), None
        if not answers_show_pictures(history, question, num_patches_list):  # a state reads answers as text
            with suppress(TemplateError):
                taken = None
                if isinstance(history, History):
                    taken = history.take(self, tokenizer, pixel_values, num_patches_list, system_message)
                state, seen = taken or self._read_again(
                    tokenizer, earlier, pixel_values, num_patches_list, system_message
                )
        if state is None:
            row = self._conversation_ids(tokenizer, question, history, num_patches_list, system_message)
            (answer,) = self._answers(tokenizer, [row], num_patches_list, pixel_values, generation_config, streamer)
            longer = [*earlier, (question, answer)]
        else:
            tiles = sum(num_patches_list[:seen])
            new = pixel_values[tiles:] if num_patches_list[seen:] else None
            try:
                answer = state.ask(question, generation_config, new, num_patches_list[seen:], streamer)
            except BaseException:
                if taken:  # a failed turn has changed nothing
                    read = None if pixel_values is None else pixel_values[:tiles]
                    history.give_back(state, num_patches_list[:seen], pictures_digest(read))
                raise
            longer = [*earlier, (question, answer)]
            if return_history:
                longer = History(longer, state, num_patches_list, pictures_digest(pixel_values))
        if verbose:
            print(f"{question}\n{answer}")
        return (answer, longer) if return_history else answer

    def _read_again(
        self, tokenizer, history: list[tuple[str, str]], pixel_values, num_patches_list: list[int], system_message
    ) -> tuple[ConversationState, int]:
        """A new state that has read a history, and how many pictures it has seen."""
        state, pictures, tiles = ConversationState(self, tokenizer, system_message), 0, 0
        for question, answer in history:
            counts = num_patches_list[pictures : pictures + question.count(PLACEHOLDER)]
            of_turn = pixel_values[tiles : tiles + sum(counts)] if counts else None
            state.add_turn(question, answer, of_turn, counts)
            pictures, tiles = pictures + len(counts), tiles + sum(counts)
        return state, pictures

    def batch_chat(
        self,
        tokenizer,
        pixel_values: Tensor | None,
        questions: list[str],
        generation_config: dict | GenerationConfig,
        num_patches_list: list[int] | list[list[int]] | None = None,
        history: list[list[tuple[str, str]]] | None = None,
        return_history: bool = False,
        *,
        system_message: str | None = None,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Answers several questions at once, each as `chat` would alone.

        Args:
            pixel_values: (tiles, channels, height, width), the tiles of all questions in order; or None.
            questions: What to ask.
            num_patches_list: For each question the tiles of its picture (0: no picture) or a list of them, one entry
                per picture. One tile each if not given.
            history: For each question its earlier (question, answer) pairs.

        The other arguments, and what is raised, are those of `chat`.

        Returns:
            The answers, or the answers and the histories.
        """
        if num_patches_list is None:
            num_patches_list = [0 if pixel_values is None else 1] * len(questions)
        if len(num_patches_list) != len(questions):
            raise ValueError(
                f"num_patches_list has {len(num_patches_list)} entries for {len(questions)} questions; give one per "
                "question, 0 where there is no picture."
            )
        pictures = [([n] if n else []) if isinstance(n, int) else list(n) for n in num_patches_list]
        histories = history if history is not None else [None] * len(questions)
        if len(histories) != len(questions):
            raise ValueError(f"history has {len(histories)} entries for {len(questions)} questions; give one each.")
        questions = [
            "<image>\n" + question if earlier is None and tiles and "<image>" not in question else question
            for question, earlier, tiles in zip(questions, histories, pictures, strict=True)
        ]
        rows = [
            self._conversation_ids(tokenizer, *conversation, system_message)
            for conversation in zip(questions, histories, pictures, strict=True)
        ]
        tiles = [count for counts in pictures for count in counts]
        answers = self._answers(tokenizer, rows, tiles, pixel_values, generation_config)
        if not return_history:
            return answers
        turns = zip(histories, questions, answers, strict=True)
        return answers, [[*(earlier or []), (question, answer)] for earlier, question, answer in turns]

    def _conversation_ids(self, tokenizer, question, history, num_patches_list, system_message) -> list[int]:
        return encode_conversation(
            tokenizer,
            question,
            history,
            num_patches_list,
            self.config.vision_config.tokens_per_tile,
            system_message=system_message,
        )

    def _answers(self, tokenizer, rows, num_patches_list, pixel_values, generation_config, streamer=None) -> list[str]:
        """Generates from left-padded rows of ids and decodes up to the end of the turn."""
        check_tiles(num_patches_list, pixel_values)
        options, ends = answer_options(self, tokenizer, generation_config, streamer)
        longest = max(map(len, rows))
        pad = tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self.input_device)
        attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        output = self.generate(
            input_ids=input_ids,
            attention_mask=attention_mask.to(self.input_device),
            **({} if pixel_values is None else {"pixel_values": pixel_values}),
            **options,
        )
        output = getattr(output, "sequences", output)  # with return_dict_in_generate
        return [decode_answer(tokenizer, row, ends) for row in output[:, longest:].tolist()]


__all__ = ["ConversationMixin", "ConversationState", "History"]
