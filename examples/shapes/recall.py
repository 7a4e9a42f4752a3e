"""Recall: which of many things told before is asked for? What an attention layer looks up, a state must have kept.

A conversation lists n named things (`K7 red star. B2 blue card. …`) and then asks for some of them by name (`B2?`).
The answer says the name again, as the list does (`B2 blue card.`). The models of the picture world can learn it with
their words; `benchmarks/recall.py` trains and scores them.
"""

import math
import string
from typing import NamedTuple

import numpy as np
import torch

from mmmamba.conversion.distillation.data import ConversationEncoder
from mmmamba.processing_mmmamba import MmMambaProcessor

from .data import InOrder
from .tokenizer import SYSTEM_MESSAGE
from .world import COLORS, SHAPES


NAMES = [letter + digit for letter in string.ascii_uppercase for digit in string.digits]  # two tokens each
THINGS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
AT_ONCE = 8  # names that one question asks for, at most


class RecallExample(NamedTuple):
    """A list of things, and questions about it with their answers."""

    told: str
    turns: tuple[tuple[str, str], ...]


def recall(seed: int, index: int, items: int, asked: int = 1, at_once: int = 1) -> RecallExample:
    """Example number `index`.

    Args:
        seed: Which series.
        index: In it.
        items: Things that are listed, each under a name of its own.
        asked: How many of them are asked for.
        at_once: In questions for up to so many.
    """
    rng = np.random.default_rng((seed, index, items))
    names = [NAMES[i] for i in rng.choice(len(NAMES), items, replace=False)]
    lines = [f"{name} {THINGS[i]}." for name, i in zip(names, rng.integers(len(THINGS), size=items), strict=True)]
    left, turns = list(rng.choice(items, min(asked, items), replace=False)), []
    while left:
        count = int(rng.integers(1, at_once + 1))
        some, left = left[:count], left[count:]
        turns.append((" ".join(names[i] for i in some) + "?", " ".join(lines[i] for i in some)))
    return RecallExample(" ".join(lines), tuple(turns))


class RecallConversations(InOrder):
    """An endless series of recall conversations with 4 to `most` things, few as often as many (by their logarithm).

    Args:
        processor: Of the picture world.
        seed: Which series.
        batch_size: Conversations that go together.
        most: Largest number of things.
    """

    def __init__(self, processor: MmMambaProcessor, seed: int = 0, batch_size: int = 1, most: int = 256):
        super().__init__(seed, batch_size)
        self.encoder, self.most = ConversationEncoder(processor), most

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """Conversation number `index`; see `ConversationEncoder`."""
        rng = np.random.default_rng((self.seed, index))
        items = round(math.exp(rng.uniform(math.log(4), math.log(self.most))))
        one = recall(self.seed, index, items, asked=32, at_once=AT_ONCE)
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
        told = one.told + "\n"
        for question, answer in one.turns:
            messages += [{"role": "user", "content": told + question}, {"role": "assistant", "content": answer}]
            told = ""
        return self.encoder({"messages": messages})
