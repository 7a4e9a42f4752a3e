"""Recall: which of many things told before is asked for? What an attention layer looks up, a state must have kept.

A conversation lists n named things (`K7: red star. B2: blue card. …`) and then asks for some of them by name (`B2?`);
the answer says the name again, as the list does. The models of the picture world can learn it with their words;
`benchmarks/recall.py` trains and scores them.
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


class RecallExample(NamedTuple):
    """A list of things, and questions about it with their answers."""

    told: str
    turns: tuple[tuple[str, str], ...]


def recall(seed: int, index: int, items: int, turns: int = 1) -> RecallExample:
    """Example number `index`: `items` things with different names, asked for `turns` times."""
    rng = np.random.default_rng((seed, index, items))
    names = [NAMES[i] for i in rng.choice(len(NAMES), items, replace=False)]
    things = [THINGS[i] for i in rng.integers(len(THINGS), size=items)]
    told = " ".join(f"{name}: {thing}." for name, thing in zip(names, things, strict=True))
    asked = rng.choice(items, min(turns, items), replace=False)
    return RecallExample(told, tuple((f"{names[i]}?", f"{names[i]}: {things[i]}") for i in asked))


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
        one = recall(self.seed, index, items, turns=16)
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
        told = one.told + "\n"
        for question, answer in one.turns:
            messages += [{"role": "user", "content": told + question}, {"role": "assistant", "content": answer}]
            told = ""
        return self.encoder({"messages": messages})
