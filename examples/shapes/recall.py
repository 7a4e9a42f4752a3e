"""Recall: what was said of one of many names? What an attention layer looks up, a state must have kept.

A conversation lists n names with a word each (`K red`, one to a line) and then asks for some of them (`K?`). The
answer says the name again, as the list does (`K red`). Words and names are single tokens of the picture world's
tokenizer, so that nothing is measured but how much is kept. `benchmarks/recall.py` trains and scores models on it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmmamba.conversion.distillation.data import ConversationEncoder
from mmmamba.processing_mmmamba import MmMambaProcessor

from .data import InOrder
from .tokenizer import SYSTEM_MESSAGE
from .world import COLORS, SHAPES


WORDS = (*COLORS, *SHAPES)


class RecallExample(NamedTuple):
    """A list of names with words, and questions about it with their answers."""

    told: str
    turns: tuple[tuple[str, str], ...]


@lru_cache
def names_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What is one token at a line's beginning, before a word and before a question mark: digits, letters, the rest."""

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    names = []
    for token in set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        name = token.replace("▁", " ")  # some are read as one token only after a space
        if name.strip() and name.strip() not in WORDS:
            lines = tokens(f"x\n{name} red\n{name}?")
            if lines[2:4] == [token, "▁red"] and lines[-2:] == [token, "?"] and len(lines) == 7:
                names.append(name)
    kinds = (str.isdigit, lambda name: len(name) == 1 and name.isalpha(), lambda name: True)
    return tuple(sorted(names, key=lambda name: (next(i for i, kind in enumerate(kinds) if kind(name)), name)))


def recall(names: tuple[str, ...], seed: int, index: int, items: int, asked: int = 1) -> RecallExample:
    """Example number `index`.

    Args:
        names: To choose from; see `names_of`.
        seed: Which series.
        index: In it.
        items: Names that are listed.
        asked: How many of them are asked for, each once.
    """
    rng = np.random.default_rng((seed, index, items))
    words = rng.integers(len(WORDS), size=items)
    chosen = rng.choice(len(names), items, replace=False)
    lines = [f"{names[name]} {WORDS[word]}" for name, word in zip(chosen, words, strict=True)]
    order = rng.choice(items, min(asked, items), replace=False)
    return RecallExample("\n".join(lines), tuple((f"{names[chosen[i]]}?", lines[i]) for i in order))


class RecallConversations(InOrder):
    """An endless series of recall conversations with 4 to `most` names, few as often as many (by their logarithm).

    Args:
        processor: Of the picture world.
        seed: Which series.
        batch_size: Conversations that go together.
        most: Largest number of names in a list.
        known: Names to choose from, the first of `names_of`; all if not given.
    """

    def __init__(
        self,
        processor: MmMambaProcessor,
        seed: int = 0,
        batch_size: int = 1,
        most: int = 256,
        known: int | None = None,
    ):
        super().__init__(seed, batch_size)
        self.encoder, self.most = ConversationEncoder(processor), most
        self.names = names_of(processor.tokenizer)[:known]

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """Conversation number `index`; see `ConversationEncoder`."""
        rng = np.random.default_rng((self.seed, index))
        items = round(math.exp(rng.uniform(math.log(4), math.log(self.most))))
        one = recall(self.names, self.seed, index, items, asked=16)
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
        told = one.told + "\n"
        for question, answer in one.turns:
            messages += [{"role": "user", "content": told + question}, {"role": "assistant", "content": answer}]
            told = ""
        return self.encoder({"messages": messages})
