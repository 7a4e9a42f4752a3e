"""`chat` and `batch_chat`: answers to questions about pictures, by upstream's interface.

`chat` keeps what the model has read: the history that it returns holds the `ConversationState`, so the next call reads
the new turn only.
"""

from contextlib import suppress

import torch
from torch import Tensor
from transformers import GenerationConfig

from .chat_template_mmmamba import PLACEHOLDER, check_call, whole_numbers
from .conversation_mmmamba import ConversationState
from .fingerprint_mmmamba import pictures_digest
from .generation_mmmamba import answer_options, call_options, generation_option, wants_another_cache
from .pictures_mmmamba import as_tiles
from .processing_mmmamba import (
    TemplateError,
    answers_show_pictures,
    check_tiles,
    decode_answer,
    encode_conversation,
)


# Upstream's arguments of these names; in this order in PICTURE_TOKENS.
IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN = PICTURE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")


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


class ChatMixin:
    """`chat`, `batch_chat` and `conversation` of a model, and what upstream's model has beside them.

    Attributes:
        system_message: Of conversations that are given none; None for the chat template's own.
    """

    system_message: str | None = None

    def conversation(self, tokenizer, system_message: str | None = None) -> ConversationState:
        """A conversation that reads as it grows and can be forked, saved and loaded; see `ConversationState`."""
        return ConversationState(self, tokenizer, self._system_message(system_message))

    def chat(
        self,
        tokenizer,
        pixel_values,
        question: str,
        generation_config: dict | GenerationConfig | None,
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        verbose: bool = False,
        *,
        system_message: str | None = None,
        streamer=None,
        IMG_START_TOKEN: str = IMG_START_TOKEN,
        IMG_END_TOKEN: str = IMG_END_TOKEN,
        IMG_CONTEXT_TOKEN: str = IMG_CONTEXT_TOKEN,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """Answers a question about pictures, or about nothing but text.

        The options of `generate` mean what they mean there, with four things to know. Of several answers
        (`num_return_sequences`) the first is returned, which is the best of beams; for all of them, and for scores
        (`return_dict_in_generate`), call `generate`. `stop_strings` end an answer and are part of it. With
        `cache_implementation`, `use_cache=False`, or an `assistant_model` that is to see pictures, the history is read
        again in every call. Models with Mamba-2 layers cannot be assisted: their state does not forget a wrong guess.

        Args:
            tokenizer: The package's tokenizer.
            pixel_values: (tiles, channels, height, width), the tiles of all pictures of the conversation in order; or
                pictures, which are cut as the model's folder says (see `as_tiles`); or None.
            question: What to ask. `<image>` stands for a picture; in a first question it may be left out.
            generation_config: Arguments of `generate`, such as `{"max_new_tokens": 64, "do_sample": True}`; left as
                it is.
            history: Earlier (question, answer) pairs, as an earlier call returned them.
            return_history: Whether to return the history with this turn added, too.
            num_patches_list: Tiles of each picture. If not given, all tiles are one picture; pictures are counted.
            verbose: Print question and answer.
            system_message: Replaces `model.system_message`, or the template's own.
            streamer: A Transformers streamer, which gets the answer as it grows.
            IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN: Arguments of upstream's, which can have no other value.

        Returns:
            The answer, or the answer and the history.

        Raises:
            ValueError: if the question is empty, or `<image>`, `num_patches_list` and the tiles disagree, or an option
                is not for an answer.
        """
        _check_picture_tokens(IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        system_message, options = self._system_message(system_message), call_options(generation_config)
        num_patches_list = whole_numbers(num_patches_list)
        check_call(question, history, system_message, num_patches_list)
        pixel_values, num_patches_list = as_tiles(pixel_values, num_patches_list, self.config, tokenizer)
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        if history is None and pixel_values is not None and "<image>" not in question:
            question = "<image>\n" * len(num_patches_list) + question
        check_tiles(num_patches_list, pixel_values)
        earlier, state = list(history or []), None
        at_once = wants_another_cache(self, options)
        # An assistant has not seen the pictures that a state has read.
        at_once = at_once or (pixel_values is not None and options.get("assistant_model") is not None)
        # A state reads answers as text.
        if not at_once and not answers_show_pictures(history, question, num_patches_list):
            with suppress(TemplateError):
                taken = None
                if isinstance(history, History):
                    taken = history.take(self, tokenizer, pixel_values, num_patches_list, system_message)
                state, seen = taken or self._read_again(
                    tokenizer,
                    earlier,
                    pixel_values,
                    num_patches_list,
                    system_message,
                    generation_option(self, options, "prefill_chunk_size"),
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
        self,
        tokenizer,
        history: list[tuple[str, str]],
        pixel_values: Tensor | None,
        num_patches_list: list[int],
        system_message: str | None,
        chunk_size: int | None,
    ) -> tuple[ConversationState, int]:
        """A new state that has read a history, and how many pictures it has seen."""
        state, pictures, tiles = ConversationState(self, tokenizer, system_message), 0, 0
        for question, answer in history:
            counts = num_patches_list[pictures : pictures + question.count(PLACEHOLDER)]
            of_turn = pixel_values[tiles : tiles + sum(counts)] if counts else None
            state.add_turn(question, answer, of_turn, counts, prefill_chunk_size=chunk_size)
            pictures, tiles = pictures + len(counts), tiles + sum(counts)
        return state, pictures

    def batch_chat(
        self,
        tokenizer,
        pixel_values,
        questions: list[str],
        generation_config: dict | GenerationConfig | None,
        num_patches_list: list[int] | list[list[int]] | None = None,
        history: list[list[tuple[str, str]]] | None = None,
        return_history: bool = False,
        *,
        system_message: str | None = None,
        verbose: bool = False,
        image_counts: list[int] | list[list[int]] | None = None,
        IMG_START_TOKEN: str = IMG_START_TOKEN,
        IMG_END_TOKEN: str = IMG_END_TOKEN,
        IMG_CONTEXT_TOKEN: str = IMG_CONTEXT_TOKEN,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Answers several questions at once, each as `chat` would alone: one answer for each question.

        Args:
            pixel_values: (tiles, channels, height, width), the tiles of all questions in order; or for each question
                its picture, a list of pictures, or None (see `as_tiles`); or None.
            questions: What to ask.
            num_patches_list: For each question the tiles of its picture (0: no picture) or a list of them, one entry
                per picture. If not given, one tile each; pictures are counted.
            history: For each question its earlier (question, answer) pairs.
            verbose: Print questions and answers.
            image_counts: InternVL 1.5's name of `num_patches_list`.

        The other arguments, and what is raised, are those of `chat`.

        Returns:
            The answers, or the answers and the histories.
        """
        _check_picture_tokens(IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        if not isinstance(questions, (list, tuple)):
            raise ValueError(f"questions={questions!r:.80} is no list of texts; give one question per conversation.")
        if not questions:
            raise ValueError("questions is empty; ask at least one.")
        if image_counts is not None:
            if num_patches_list is not None:
                raise ValueError("image_counts is an older name of num_patches_list; give num_patches_list alone.")
            num_patches_list = image_counts
        if num_patches_list is None and isinstance(pixel_values, (list, tuple)):
            pixel_values, num_patches_list = self._tiles_by_question(tokenizer, pixel_values, len(questions))
        if num_patches_list is None:
            num_patches_list = [0 if pixel_values is None else 1] * len(questions)
        num_patches_list = whole_numbers(num_patches_list)
        if not isinstance(num_patches_list, list):
            raise ValueError(f"num_patches_list={num_patches_list!r:.80} is no list; give one entry per question.")
        if len(num_patches_list) != len(questions):
            raise ValueError(
                f"num_patches_list has {len(num_patches_list)} entries for {len(questions)} questions; give one per "
                "question, 0 where there is no picture."
            )
        pictures = [([n] if n else []) if isinstance(n, int) else list(n) for n in num_patches_list]
        histories = history if history is not None else [None] * len(questions)
        if len(histories) != len(questions):
            raise ValueError(f"history has {len(histories)} entries for {len(questions)} questions; give one each.")
        for conversation in zip(questions, histories, [system_message] * len(questions), pictures, strict=True):
            check_call(*conversation)
        questions = [
            "<image>\n" + question if earlier is None and tiles and "<image>" not in question else question
            for question, earlier, tiles in zip(questions, histories, pictures, strict=True)
        ]
        tiles = [count for counts in pictures for count in counts]
        pixel_values, tiles = as_tiles(pixel_values, tiles, self.config, tokenizer)
        system_message = self._system_message(system_message)
        rows = [
            self._conversation_ids(tokenizer, *conversation, system_message)
            for conversation in zip(questions, histories, pictures, strict=True)
        ]
        answers = self._answers(tokenizer, rows, tiles, pixel_values, generation_config)
        if verbose:
            print(*(f"{question}\n{answer}" for question, answer in zip(questions, answers, strict=True)), sep="\n")
        if not return_history:
            return answers
        turns = zip(histories, questions, answers, strict=True)
        return answers, [[*(earlier or []), (question, answer)] for earlier, question, answer in turns]

    def _tiles_by_question(self, tokenizer, pictures: list, questions: int) -> tuple[Tensor | None, list[list[int]]]:
        """Tiles of all questions, and for each question those of its pictures."""
        if len(pictures) != questions:
            raise ValueError(
                f"pixel_values lists pictures for {len(pictures)} questions, and there are {questions}; give for each "
                "question its picture, a list of pictures, or None; or give num_patches_list, too."
            )
        tiles, num_patches_list = [], []
        for of_question in pictures:
            if not isinstance(of_question, (list, tuple)):
                of_question = [] if of_question is None else [of_question]
            new, counts = as_tiles(of_question, None, self.config, tokenizer)
            tiles += [] if new is None else [new]
            num_patches_list.append([] if new is None else counts or [len(new)])
        return as_tiles(tiles, None, self.config)[0], num_patches_list

    def _system_message(self, given: str | None) -> str | None:
        return self.system_message if given is None else given

    def _conversation_ids(self, tokenizer, question, history, num_patches_list, system_message) -> list[int]:
        return encode_conversation(
            tokenizer,
            question,
            history,
            num_patches_list,
            self.config.tokens_per_tile,
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
        answers = output[:: len(output) // len(rows), longest:]  # the first of each row's num_return_sequences
        return [decode_answer(tokenizer, row, ends) for row in answers.tolist()]

    # --- what upstream's model has besides: others' scripts read and set these ---------------------------------------

    @property
    def img_context_token_id(self) -> int:
        """Id of `<IMG_CONTEXT>`. Setting it to another raises ValueError."""
        return self.config.image_token_id

    @img_context_token_id.setter
    def img_context_token_id(self, value: int):
        _check_unchanged("img_context_token_id", value, self.img_context_token_id, "image_token_id")

    @property
    def num_image_token(self) -> int:
        """Decoder rows of a tile. Setting it to another number raises ValueError."""
        return self.config.tokens_per_tile

    @num_image_token.setter
    def num_image_token(self, value: int):
        _check_unchanged("num_image_token", value, self.num_image_token, "vision_config")

    def _refuse_template(self, value):
        raise AttributeError(
            "The prompt is written by tokenizer.chat_template; set that, or model.system_message for another system."
        )

    template = property(fset=_refuse_template, doc="Upstream's name of a prompt format; setting it raises.")
    conv_template = property(fset=_refuse_template, doc="Upstream's prompt format; setting it raises.")


def _check_picture_tokens(*tokens: str) -> None:
    """Raises ValueError unless these are the tokens that prompts have around and for pictures."""
    names = ("IMG_START_TOKEN", "IMG_END_TOKEN", "IMG_CONTEXT_TOKEN")
    for name, token, expected in zip(names, tokens, PICTURE_TOKENS, strict=True):
        if token != expected:
            raise ValueError(f"{name}={token!r}, but the model was trained with {expected!r}; leave {name} out.")


def _check_unchanged(name: str, value: int, current: int, config_name: str) -> None:
    if value != current:
        raise ValueError(f"{name}={value}, but the model's is {current}, by config.{config_name}; leave it out.")


__all__ = ["ChatMixin", "History"]
