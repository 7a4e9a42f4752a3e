"""Associative recall: attention looks a pair up, a state of constant size must have stored it.

A conversation lists n names with a word each (`K red`, one to a line) and then asks for some of them (`K?`). The
answer repeats the line (`K red`). Words and names are single tokens of the picture world's tokenizer, so that only
memory is measured. `benchmarks/recall.py` trains and scores models on it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmmamba.conversion.distillation.data import ConversationEncoder
from mmmamba.processing_mmmamba import MmMambaProcessor

from .data import EndlessDataset
from .tokenizer import SYSTEM_MESSAGE
from .world import COLORS, SHAPES


WORDS = (*COLORS, *SHAPES)


class RecallExample(NamedTuple):
    """A list of names with words, and questions about it with their answers."""

    listing: str
    turns: tuple[tuple[str, str], ...]


@lru_cache
def single_token_names(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The names that are one token at the start of a line, whatever follows: digits, then letters, then others."""

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    names = []
    for token in set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        name = token.replace("▁", " ")  # some are one token only after a space
        if name.strip() and name.strip() not in WORDS:
            lines = tokens(f"x\n{name} red\n{name}?")
            if lines[2:4] == [token, "▁red"] and lines[-2:] == [token, "?"] and len(lines) == 7:
                names.append(name)
    kinds = (str.isdigit, lambda name: len(name) == 1 and name.isalpha(), lambda name: True)
    return tuple(sorted(names, key=lambda name: (next(i for i, kind in enumerate(kinds) if kind(name)), name)))


def recall(names: tuple[str, ...], seed: int, index: int, items: int, asked: int = 1) -> RecallExample:
    """Example number `index`.

    Args:
        names: To choose from; see `single_token_names`.
        seed: Of the series.
        index: In the series.
        items: Names that are listed.
        asked: How many of these are asked for, each once.
    """
    rng = np.random.default_rng((seed, index, items))
    words = rng.integers(len(WORDS), size=items)
    chosen = rng.choice(len(names), items, replace=False)
    lines = [f"{names[name]} {WORDS[word]}" for name, word in zip(chosen, words, strict=True)]
    order = rng.choice(items, min(asked, items), replace=False)
    return RecallExample("\n".join(lines), tuple((f"{names[chosen[i]]}?", lines[i]) for i in order))


class RecallConversations(EndlessDataset):
    """Recall conversations without end; the number of names is log-uniform between 4 and `max_items`.

    Args:
        processor: Of the picture world.
        seed: Of the series.
        batch_size: Conversations of similar length that follow each other.
        max_items: Largest number of names in a list.
        num_names: How many of `single_token_names` to choose from, the first ones; all if not given.
    """

    def __init__(
        self,
        processor: MmMambaProcessor,
        seed: int = 0,
        batch_size: int = 1,
        max_items: int = 256,
        num_names: int | None = None,
    ):
        super().__init__(seed, batch_size)
        self.encoder, self.max_items = ConversationEncoder(processor), max_items
        self.names = single_token_names(processor.tokenizer)[:num_names]

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """Conversation number `index`; see `ConversationEncoder`."""
        rng = np.random.default_rng((self.seed, index))
        items = round(math.exp(rng.uniform(math.log(4), math.log(self.max_items))))
        example = recall(self.names, self.seed, index, items, asked=16)
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
        listing = example.listing + "\n"  # in front of the first question
        for question, answer in example.turns:
            messages += [{"role": "user", "content": listing + question}, {"role": "assistant", "content": answer}]
            listing = ""
        return self.encoder({"messages": messages})
