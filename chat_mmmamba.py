"""`chat` and `batch_chat`: answers to questions about pictures, by upstream's interface.

`chat` keeps what the model has read: the history that it returns holds the `ConversationState`, so the next call reads
the new turn only.
"""

from contextlib import suppress

import torch
from torch import Tensor
from transformers import GenerationConfig

from .conversation_mmmamba import ConversationState
from .fingerprint_mmmamba import pictures_digest
from .generation_mmmamba import answer_options
from .processing_mmmamba import (
    PLACEHOLDER,
    TemplateError,
    answers_show_pictures,
    check_tiles,
    decode_answer,
    encode_conversation,
)


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


__all__ = ["ChatMixin", "History"]
